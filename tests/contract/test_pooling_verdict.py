"""The pooling verdict on every release, and on changes that upstream has not made yet."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import re
from typing import Any

import pytest

from overlay.patches.pooling.verdict import EXECUTORS, FLAG, METHOD, MODULE, OUTPUT, RUNNER, STREAM, SYNC
from overlay.patches.registry import judge
from overlay.verdict import Source, SourceTree, Upstream, Verdict

from .released import ChangedTree, releases, tree

pytestmark = pytest.mark.contract

EXPECTED: dict[str, dict[str, Any]] = json.loads(
    pathlib.Path(__file__).with_name("expected_pooling.json").read_text("utf-8")
)
APPLY = [version for version, expected in EXPECTED.items() if expected["verdict"] == "apply"]
LANDED = [version for version, expected in EXPECTED.items() if expected["verdict"] == "landed"]
CHOICE = f"if self.{FLAG}:"


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
    assert 0 < sum(lines) < 150


# ----------------------------------------------------------------------------------------------- changes to a released file


@functools.cache
def released(version: str) -> Source:
    source = tree(version).read(MODULE)
    assert source is not None
    return source


def judged(version: str, text: str) -> Verdict:
    return judge("pooling", ChangedTree(version, MODULE, Source(text, released(version).path)))


def replace_in(version: str, kind: str, pattern: str, replacement: str) -> str:
    """The file with the one match of `pattern` replaced, inside of the method or of the class of the output."""
    text = released(version).text
    header = {"method": rf"^    def {METHOD}\(", "output": rf"^class {OUTPUT}\b", "file": r"\A"}[kind]
    begin = re.search(header, text, re.MULTILINE)
    assert begin is not None
    following = {"method": r"^    def ", "output": r"^class ", "file": r"\Z"}[kind]
    end = re.compile(following, re.MULTILINE).search(text, begin.end())
    assert end is not None
    block = text[begin.start() : end.start()]
    changed, count = re.subn(pattern, replacement, block, flags=re.MULTILINE)
    assert count == 1, f"{count} matches of {pattern!r} in vLLM {version}"
    return text[: begin.start()] + changed + text[end.start() :]


#: What stands before, in place of, or behind a place that every applicable release has once.
PLACE = r"^( +)" + re.escape(CHOICE) + "$"
COPY_STREAM = rf"{STREAM}=self\.{STREAM},"
ASSIGNED = r"^(        )(model_runner_output)(\.pooler_output) = (_copy_pooler_output_to_cpu\()$"

DRIFTING: dict[str, tuple[str, str, str]] = {
    # ------------------------------------------------------------------ the flag
    "the flag read twice": ("method", PLACE, rf"\1early = self.{FLAG}\n\1{CHOICE}"),
    "the flag in a longer condition": ("method", PLACE, rf"\1if self.{FLAG} and kv_connector_output is None:"),
    "the flag negated": ("method", PLACE, rf"\1if not self.{FLAG}:"),
    "the flag through a variable": ("method", PLACE, rf"\1wanted = self.{FLAG}\n\1if wanted:"),
    "the flag by getattr": ("method", PLACE, rf'\1if getattr(self, "{FLAG}"):'),
    "the flag by getattr as well": ("method", PLACE, rf'\1late = getattr(self, "{FLAG}")\n\1{CHOICE}'),
    "the flag written": ("method", PLACE, rf"\1self.{FLAG} = bool(num_reqs)\n\1{CHOICE}"),
    "the flag under another condition": ("method", PLACE, rf"\1if num_reqs: {CHOICE[3:-1]}\n\1{CHOICE}"),
    "something else done under the flag": ("method", PLACE, rf"\1{CHOICE}\n\1    num_reqs += 1"),
    "the flag's other arm": (
        "method", r"^(        )(model_runner_output\.pooler_output = _copy)", r"\1else:\n\1    num_reqs = 0\n\1\2",
    ),
    "the flag in a loop": ("method", PLACE, rf"\1while self.{FLAG}:"),
    # ------------------------------------------------------------------ what is returned under it
    "another class returned": ("method", rf"return {OUTPUT}\(", "return OtherOutput("),
    "the class called by another name": ("method", rf"return {OUTPUT}\(", f"return outputs.{OUTPUT}("),
    "the output kept": ("method", rf"return {OUTPUT}\(", f"return self.kept or {OUTPUT}("),
    "another stream": ("method", COPY_STREAM, f"{STREAM}=self.other_stream,"),
    "a stream made on the way": ("method", COPY_STREAM, f"{STREAM}=torch.cuda.Stream(),"),
    "one argument more": ("method", COPY_STREAM, rf"{STREAM}=self.{STREAM}, device=hidden_states.device,"),
    "one argument less": ("method", COPY_STREAM, ""),
    "the arguments by a star": ("method", COPY_STREAM, rf"{STREAM}=self.{STREAM}, **options,"),
    "the stream used elsewhere": ("method", PLACE, rf"\1prepare(self.{STREAM})\n\1{CHOICE}"),
    # ------------------------------------------------------------------ the way without the flag
    "another result filled": ("method", ASSIGNED, r"\1other\3 = \4"),
    "another attribute filled": ("method", ASSIGNED, r"\1\2.pooled = \4"),
    "another copy": ("method", ASSIGNED, r"\1\2\3 = _copy_pinned("),
    "something copied that the output does not get": ("method", ASSIGNED, r"\1finished_mask = finished_mask[:]\n\1\2\3 = \4"),
    "no sync": ("method", rf"^        self\.{SYNC}\(\)$", "        pass"),
    "another sync": ("method", rf"self\.{SYNC}\(\)", "self.event.synchronize()"),
    "one statement more at the end": ("method", rf"^(        self\.{SYNC}\(\))$", r"\1\n        num_reqs = 0"),
    "something else returned": ("method", rf"(self\.{SYNC}\(\)\n\n        return) model_runner_output", r"\1 finished_mask"),
    # ------------------------------------------------------------------ self
    "self handed out": ("method", PLACE, rf"\1prepare(self)\n\1{CHOICE}"),
    "self under another name": ("method", PLACE, rf"\1runner = self\n\1{CHOICE}"),
    "a method of its own called": ("method", PLACE, rf"\1self._prepare_pooling()\n\1{CHOICE}"),
    "super used": ("method", PLACE, rf"\1super().prepare()\n\1{CHOICE}"),
    "the class cell used": ("method", PLACE, rf"\1__class__.prepare(self)\n\1{CHOICE}"),
    "a generator": ("method", PLACE, rf"\1yield num_reqs\n\1{CHOICE}"),
    "not Python": ("method", PLACE, r"\1if if:"),
    # ------------------------------------------------------------------ the definition
    "the method decorated": ("file", rf"^    def {METHOD}\(", rf"    @instrument()\n    def {METHOD}("),
    "the method decorated over two lines": ("file", rf"^    def {METHOD}\(", rf"    @trace(\n    )\n    def {METHOD}("),
    "the method async": ("file", rf"^    def {METHOD}\(", rf"    async def {METHOD}("),
    "the method renamed": ("file", rf"^    def {METHOD}\(", rf"    def {METHOD}_all("),
    "the method defined again": (
        "file", rf"^(    def {METHOD}\()", rf"    def {METHOD}(self):\n        pass\n\n\1",
    ),
    "the method bound again": ("file", rf"^(    def {METHOD}\()", rf"    {METHOD} = other\n\n\1"),
    "the method handed out": ("file", r"\Z", f"\nregister({RUNNER}.{METHOD})\n"),
    "the method replaced after the class": ("file", r"\Z", f"\n{RUNNER}.{METHOD} = other\n"),
    "the method set by name": ("file", r"\Z", f'\nsetattr(Base, "{METHOD}", other)\n'),
    "the method in another class": ("file", rf"^(    def {METHOD}\()", r"    pass\n\n\nclass Another:\n\1"),
    "the class decorated": ("file", rf"^class {RUNNER}\(", f"@traced\nclass {RUNNER}("),
    "the class renamed": ("file", rf"^class {RUNNER}\(", f"class {RUNNER}V1("),
    "the class bound again": ("file", r"\Z", f"\n{RUNNER} = traced({RUNNER})\n"),
    "the class bound again under a condition": ("file", r"\Z", f"\nif traced:\n    {RUNNER} = traced\n"),
    "the class changed in a function": ("file", r"\Z", f"\ndef trace():\n    setattr({RUNNER}, name, other)\n"),
    # ------------------------------------------------------------------ upstream's own output
    "the copy waits for nothing": ("output", rf"^ +{STREAM}\.wait_stream\(.*$", "            pass"),
    "another stream waits": ("output", rf"{STREAM}\.wait_stream\(default_stream\)", f"default_stream.wait_stream({STREAM})"),
    "the wait comes after the copy": (
        "output",
        rf"^( +{STREAM}\.wait_stream\(.*\)\n)((?:.*\n)+?)( +self\.async_copy_ready_event\.record)",
        r"\2\1\3",
    ),
    "no event": ("output", r"self\.async_copy_ready_event\.record\(\)", "pass"),
    "the copy on the main stream": ("output", rf"with torch\.cuda\.stream\({STREAM}\)", "with torch.cuda.stream(default_stream)"),
    "the result read without a wait": ("output", r"^        self\.async_copy_ready_event\.synchronize\(\)$", "        pass"),
    "the result waits for another event": ("output", r"self\.async_copy_ready_event\.synchronize", "self.other.synchronize"),
    "no way to the result": ("output", r"def get_output\(", "def result("),
    "the output takes something else": ("output", r"finished_mask: ", "mask: "),
    "the output renamed": ("output", f"class {OUTPUT}", "class AsyncOutput"),
}  # fmt: skip

HARMLESS: dict[str, tuple[str, str, str]] = {
    "a comment in the method": ("method", PLACE, rf"\1# self.{FLAG} decides; {METHOD} reads it once\n\1{CHOICE}"),
    "a comment about the class": ("file", r"\Z", f"\n# {RUNNER} = traced({RUNNER}) was here, and {METHOD}\n"),
    "a docstring": ("method", r"^(        num_reqs = )", r'        """Pool, then copy."""\n\1'),
    "a docstring that names it": ("file", rf"^class {RUNNER}\(", f'"""See ``{METHOD}``."""\n\n\nclass {RUNNER}('),
    "another local variable": ("method", PLACE, rf"\1rows = hidden_states.shape[0]\n\1{CHOICE}"),
    "another early return": ("method", PLACE, rf"\1if num_reqs == 0:\n\1    return model_runner_output\n\n\1{CHOICE}"),
    "another parameter": ("method", r"^(        num_scheduled_tokens: int,)", r"        extra: int,\n\1"),
    "another order of arguments": ("method", rf" {STREAM}=self\.{STREAM},", rf" {STREAM}=self.{STREAM}"),
    "a method with a like name": ("file", rf"^(    def {METHOD}\()", rf"    def {METHOD}_all(self):\n        pass\n\n\1"),
    "a subclass in the same file": ("file", r"\Z", f"\nclass Another({RUNNER}):\n    pass\n"),
    "a type in quotes": ("file", r"\Z", f'\ndef of(runner: "{RUNNER}") -> None:\n    runner.{METHOD}2()\n'),
    "a docstring in the output": ("output", r"^(        self\.async_copy_ready_event\.synchronize)", r'        """Wait."""\n\1'),
}  # fmt: skip


@pytest.mark.parametrize("version", APPLY)
@pytest.mark.parametrize("name", DRIFTING)
def test_drift(version: str, name: str) -> None:
    found = judged(version, replace_in(version, *DRIFTING[name]))
    assert found.state == "drifted", found
    assert found.methods == () and found.where is not None
    assert ("not readable" in found.reason) == (name == "not Python"), "a change that is no Python shows nothing else"
    path, _, line = found.where.rpartition(":")
    assert path == released(version).path and int(line) > 0


@pytest.mark.parametrize("version", APPLY)
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(version: str, name: str) -> None:
    found = judged(version, replace_in(version, *HARMLESS[name]))
    assert (found.state, found.methods) == ("apply", (METHOD,)), found


@pytest.mark.parametrize("version", APPLY)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_executor_that_cannot_take_the_output(version: str, executor: str) -> None:
    source = tree(version).read(executor)
    assert source is not None
    text = source.text.replace("isinstance(result, Async", "same(result, Async").replace(
        "isinstance(output, Async", "same(output, Async"
    )
    assert text != source.text
    found = judge("pooling", ChangedTree(version, executor, Source(text, source.path)))
    assert found.state == "drifted" and executor in found.reason


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_executor_that_is_not_where_it_was(executor: str) -> None:
    """Nobody can tell whether it takes the output."""

    class Without(SourceTree):
        def read(self, module: str) -> Source | None:
            return None if module == executor else super().read(module)

    found = judge("pooling", Without(tree(APPLY[0]).folder))
    assert found.state == "drifted" and executor in found.reason


DRIFTING_WHERE_LANDED: dict[str, tuple[str, str, str]] = {
    "another output": ("method", rf"return {OUTPUT}\(", "return OtherOutput("),
    "nothing but a sync": (
        "method",
        rf"^        return {OUTPUT}\(",
        rf"        self.{SYNC}()\n        kept = {OUTPUT}(",
    ),
    "synchronous under a setting": ("method", r"if not current_platform\.is_cuda_alike\(\):", "if self.synchronous:"),
    "synchronous for everybody": ("method", r"if not current_platform\.is_cuda_alike\(\):", "with self.lock:"),
    "asynchronous elsewhere only": ("method", r"if not (current_platform\.is_cuda_alike\(\)):", r"if \1:"),
}


@pytest.mark.parametrize("version", LANDED)
@pytest.mark.parametrize("name", DRIFTING_WHERE_LANDED)
def test_what_only_looks_landed(version: str, name: str) -> None:
    found = judged(version, replace_in(version, *DRIFTING_WHERE_LANDED[name]))
    assert found.state == "drifted", found


def test_the_list_is_broad() -> None:
    assert len(DRIFTING) > 50 and len(HARMLESS) >= 12 and len(APPLY) == 4
