"""The verdict of every patch on every release against docs/expected-verdicts.json, and the written table against both."""

from __future__ import annotations

import functools
import os
import time

import pytest

from overlay.verdict import ABSENT, APPLY, DRIFTED, INERT, LANDED, TARGET_MODULES

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


def test_the_written_table_is_the_one_of_now() -> None:
    text = matrix.markdown([judged(version) for version in EXPECTED])
    assert matrix.DOCUMENT.read_text(encoding="utf-8") == text, "make matrix"


def test_all_releases_are_judged_in_less_than_thirty_seconds() -> None:
    for version in EXPECTED:
        judged(version)  # fetched by now
    start = time.perf_counter()
    matrix.judge(list(EXPECTED), EXPECTED, ROOT)
    assert time.perf_counter() - start < 30
