"""The pooling verdict on every release, and on changes that upstream has not made yet."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import re
from typing import Any

import pytest

from overlay.patches.pooling.verdict import METHOD, MODULE, OUTPUT, RUNNER
from overlay.patches.registry import judge
from overlay.verdict import Source, Upstream, Verdict

from .released import ChangedTree, releases, tree

pytestmark = pytest.mark.contract

EXPECTED: dict[str, dict[str, Any]] = json.loads(
    pathlib.Path(__file__).with_name("expected_pooling.json").read_text("utf-8")
)
LANDED = [version for version, expected in EXPECTED.items() if expected["verdict"] == "landed"]


# --------------------------------------------------------------------------------------------------------- as released


def test_the_table_has_every_release() -> None:
    assert tuple(EXPECTED) == (*releases.OLDER, *releases.SUPPORTED)


@pytest.mark.parametrize("version", EXPECTED)
def test_verdict(version: str) -> None:
    found, expected = judge("pooling", tree(version)), EXPECTED[version]
    assert found.state == expected["verdict"], found
    assert (found.module, found.class_name) == (MODULE, RUNNER)
    assert found.where is not None
    path, _, line = found.where.rpartition(":")
    assert int(line) == expected["line"]
    assert f"    def {METHOD}(" in pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1]
    if found.state == "apply":
        assert found.methods == (METHOD,) and not found.shapes_graph
    else:
        assert found.methods == () and found.upstream == Upstream("#39113", True)


@pytest.mark.parametrize("version", ["0.19.1", "0.33.0"])
def test_the_large_file_is_never_parsed_as_a_whole(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take 40 ms of every start; the blank lines that keep the line numbers cost nothing."""
    parse, lines = ast.parse, []

    def recorded(text: str, *args: Any, **kwargs: Any) -> Any:
        lines.append(sum(1 for line in text.splitlines() if line))
        return parse(text, *args, **kwargs)

    monkeypatch.setattr(ast, "parse", recorded)
    judge("pooling", tree(version))
    assert 0 < sum(lines) < 300


# ------------------------------------------------------------ changes to a release that does it itself; test_known.py has the others


@functools.cache
def released(version: str) -> Source:
    source = tree(version).read(MODULE)
    assert source is not None
    return source


def judged(version: str, text: str) -> Verdict:
    return judge("pooling", ChangedTree(version, MODULE, Source(text, released(version).path)))


def replace_in_method(version: str, pattern: str, replacement: str) -> str:
    """The file with the one match of `pattern` in the method replaced."""
    text = released(version).text
    begin = text.index(f"\n    def {METHOD}(") + 1
    end = text.index("\n    def ", begin)
    changed, count = re.subn(pattern, replacement, text[begin:end], flags=re.MULTILINE)
    assert count == 1, f"{count} matches of {pattern!r} in vLLM {version}"
    return text[:begin] + changed + text[end:]


DRIFTING_WHERE_LANDED: dict[str, tuple[str, str]] = {
    "another output": (rf"return {OUTPUT}\(", "return OtherOutput("),
    "nothing but a sync": (
        rf"^        return {OUTPUT}\(",
        rf"        self._sync_device()\n        kept = {OUTPUT}(",
    ),
    "synchronous under a setting": (r"if not current_platform\.is_cuda_alike\(\):", "if self.synchronous:"),
    "synchronous for everybody": (r"if not current_platform\.is_cuda_alike\(\):", "with self.lock:"),
    "asynchronous elsewhere only": (r"if not (current_platform\.is_cuda_alike\(\)):", r"if \1:"),
}


@pytest.mark.parametrize("version", LANDED)
@pytest.mark.parametrize("name", DRIFTING_WHERE_LANDED)
def test_what_only_looks_landed(version: str, name: str) -> None:
    found = judged(version, replace_in_method(version, *DRIFTING_WHERE_LANDED[name]))
    assert found.state == "drifted", found
