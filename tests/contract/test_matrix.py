"""The verdict of every patch on every release against docs/expected-verdicts.json, and the written table against both."""

from __future__ import annotations

import functools
import os
import time

import pytest
from packaging.version import Version

from overlay.patches.gdn import verdict as gdn
from overlay.patches.registry import TARGET_MODULES, WITNESSES, judge
from overlay.verdict import Source, SourceTree
from overlay.vocabulary import ABSENT, APPLY, DRIFTED, INERT, LANDED

pytest.importorskip("pypi_simple", reason="the command line's libraries are not installed")
from devtools.releases import OLDER, ROOT, SUPPORTED
from overlay.cli import matrix, releases

pytestmark = pytest.mark.contract

EXPECTED = matrix.load(matrix.EXPECTED)


@functools.cache
def judged(version: str) -> matrix.Judged:
    """One release. Without its sources and without a network there is nothing to test; on CI that is a failure."""
    try:
        (one,) = matrix.judge([version], EXPECTED, ROOT)
    except releases.UnreachableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return one


def test_the_table_has_a_verdict_and_a_reason_for_each_patch() -> None:
    assert set(EXPECTED) >= {*OLDER, *SUPPORTED}
    for version, entries in EXPECTED.items():
        assert tuple(entries) == tuple(TARGET_MODULES), version
        for patch, expectation in entries.items():
            assert expectation.verdict in (APPLY, LANDED, ABSENT, DRIFTED, INERT), (version, patch)
            assert len(expectation.reason.split()) >= 4 and expectation.reason.endswith("."), (version, patch)


@pytest.mark.parametrize("version", EXPECTED)
def test_verdicts(version: str) -> None:
    assert list(judged(version).differences()) == []


class Without(SourceTree):
    """A release with modules missing, and others of which only the first half is there."""

    def __init__(self, version: str, missing: tuple[str, ...], halves: tuple[str, ...] = ()) -> None:
        super().__init__(judged(version).vllm.tree.folder)
        self._missing, self._halves = tuple(f"{module}." for module in missing), halves

    def has(self, module: str) -> bool:
        return not f"{module}.".startswith(self._missing) and super().has(module)

    def read(self, module: str) -> Source | None:
        source = None if f"{module}.".startswith(self._missing) else super().read(module)
        if source is not None and module in self._halves:
            return Source(source.text[: len(source.text) // 2], source.path)
        return source


@pytest.mark.parametrize("patch", TARGET_MODULES)
@pytest.mark.parametrize("version", EXPECTED)
def test_a_release_without_a_patchs_modules_is_half_a_release(version: str, patch: str) -> None:
    """Unless its table of models never named them. Releases before 0.19.0 have gdn's in the model."""
    missing = (*TARGET_MODULES[patch], *((gdn.MODEL,) if patch == "gdn" else ()))
    named_from = {"deepseek_v4": Version("0.20.0"), "dsa": Version("0.29.0")}
    never = patch in named_from and Version(version) < named_from[patch]
    found = judge(patch, Without(version, missing))
    assert (found.state, found.where is None) == ((ABSENT, True) if never else (DRIFTED, False))
    assert judge(patch, Without(version, (*missing, *WITNESSES))).state == DRIFTED
    assert judge(patch, Without(version, missing, WITNESSES)).state == DRIFTED


def test_the_written_table_is_the_one_of_now() -> None:
    text = matrix.markdown([judged(version) for version in EXPECTED])
    assert matrix.DOCUMENT.read_text(encoding="utf-8") == text, "make matrix"


def test_all_releases_are_judged_in_less_than_thirty_seconds() -> None:
    for version in EXPECTED:
        judged(version)  # fetched by now
    start = time.perf_counter()
    matrix.judge(list(EXPECTED), EXPECTED, ROOT)
    assert time.perf_counter() - start < 30
