"""Only a whole vLLM may be said to lack something, and so only there may the overlay be removed."""

from __future__ import annotations

import compileall
import json
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.patches.registry import TARGET_MODULES, WITNESSES, judge
from overlay.verdict import Source, SourceTree
from overlay.vocabulary import DRIFTED
from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from typer.testing import CliRunner

from overlay.cli import check, vllms
from overlay.cli.app import app

#: What the witnesses say of a vLLM that has every target: each name stands before the file's last definition.
NAMES = {
    stub_vllm.REGISTRY: '_MORE = {"DeepseekV4ForCausalLM": "deepseek_v4", "Qwen3_5ForCausalLM": "qwen3_5", "V32": "vllm.models.deepseek_v32"}\n',
    "engine/arg_utils.py": "enable_lora: bool = False\n",
    "v1/worker/gpu_worker.py": "from vllm.v1.worker.gpu_model_runner import GPUModelRunner\n",
    "v1/engine/core_client.py": "from vllm.v1.engine.core import EngineCoreProc\n",
}


class Pieces(SourceTree):
    """A vLLM in memory: the text of each file by its path below vllm/."""

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__("")
        self._files = files

    def _found(self, module: str) -> str | None:
        return next((path for path in self._paths(module) if path.removeprefix("vllm/") in self._files), None)

    def has(self, module: str) -> bool:
        return self._found(module) is not None

    def read(self, module: str) -> Source | None:
        path = self._found(module)
        return None if path is None else Source(self._files[path.removeprefix("vllm/")], path)


def files(changes: dict[str, str | None], before: dict[str, str] | None = None) -> dict[str, str]:
    found = {name: text for name, text in {**stub_vllm.FILES, **changes}.items() if text is not None}
    return {name: (before or {}).get(name, "") + textwrap.dedent(text) for name, text in found.items()}


WITHOUT_ANYTHING = files(stub_vllm.NOTHING)
WITH_EVERYTHING = files({}, NAMES)


def removable(files: dict[str, str]) -> bool:
    return check.is_removable({patch: judge(patch, Pieces(files)) for patch in TARGET_MODULES})


@st.composite
def halves(draw: st.DrawFn, whole: dict[str, str]) -> dict[str, str]:
    """A copy that was interrupted anywhere: files are missing, and others end too early."""
    left = draw(st.sets(st.sampled_from(sorted(whole))))
    return {
        name: whole[name][: draw(st.integers(0, len(whole[name])))] if draw(st.booleans()) else whole[name]
        for name in left
    }


def test_a_whole_vllm_without_any_target_is_removable() -> None:
    assert removable(WITHOUT_ANYTHING) and not removable(WITH_EVERYTHING)


@given(halves(WITH_EVERYTHING))
def test_half_a_vllm_that_has_something_is_never_removable(half: dict[str, str]) -> None:
    assert not removable(half)


@given(halves(WITHOUT_ANYTHING))
def test_half_a_vllm_that_has_nothing_is_removable_only_where_every_witness_says_so(half: dict[str, str]) -> None:
    ends = {
        stub_vllm.REGISTRY: "\nModelRegistry =",
        "engine/arg_utils.py": "\nclass AsyncEngineArgs(",
        "v1/worker/gpu_worker.py": "\ndef init_worker_distributed_environment(",
        "v1/engine/core_client.py": "\nclass DPLBAsyncMPClient",
    }
    assert removable(half) == all(end in half.get(name, "") for name, end in ends.items())


@pytest.mark.parametrize("patch", TARGET_MODULES)
def test_a_target_that_is_named_and_not_there_is_drifted_with_the_line_that_names_it(patch: str) -> None:
    targets = ("gdn/", "qwen3_next.py")
    found = judge(
        patch,
        Pieces({name: text for name, text in WITH_EVERYTHING.items() if not any(target in name for target in targets)}),
    )
    assert found.state == DRIFTED and found.where is not None
    path, _, line = found.where.partition(":")
    named = WITH_EVERYTHING[path.removeprefix("vllm/")].splitlines()[int(line) - 1]
    assert any(
        word in named for word in ("deepseek_v4", "qwen3_5", "enable_lora", "gpu_model_runner", "v1.engine.core")
    )


# ---------------------------------------------------------------- through the command, on a disk


def closed(tree: pathlib.Path) -> None:
    """What cannot be looked into, also for root: a link to itself."""
    shutil.rmtree(tree / "vllm" / "v1")
    (tree / "vllm" / "v1").symlink_to("v1")


def byte_code_only(tree: pathlib.Path) -> None:
    compileall.compile_dir(tree, quiet=1, legacy=True)
    for path in tree.rglob("*.py"):
        path.unlink()


def nested(tree: pathlib.Path) -> None:
    tree.rename(tree.with_name("moved"))
    tree.mkdir()
    tree.with_name("moved").rename(tree / tree.name)


def empty(tree: pathlib.Path) -> None:
    shutil.rmtree(tree)
    tree.mkdir()


def one_module(module: str) -> Callable[[pathlib.Path], None]:
    def remove(tree: pathlib.Path) -> None:
        path = tree.joinpath(*module.split("."))
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).unlink()

    return remove


DAMAGE = {
    "empty": empty,
    "nested": nested,
    "byte code only": byte_code_only,
    "closed": closed,
    **{f"without {module}": one_module(module) for module in vllms.MARKS},
}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.mark.parametrize("how", DAMAGE)
def test_half_a_vllm_is_bad_input_however_it_is_named(
    how: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "0.33.0"
    stub_vllm.write(tree, stub_vllm.NOTHING, transformers=None)
    (tree / "vllm" / "v1" / "worker" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tree))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    ways = (("--vllm", str(tree)), ("--vllm", "0.33.0", "--cache", str(tmp_path)), ())
    for way in ways:
        whole = invoke(*way, "--json")
        assert json.loads(whole.stdout)["removable"] is True, whole.output
    DAMAGE[how](tree)
    if not list(tree.glob("vllm/__init__.py*")):
        ways = ways[:-1]  # then this Python imports another vllm, or none
    for way in ways:
        half = invoke(*way)
        assert half.exit_code == 2 and half.stdout == "", (way, half.output)
        (line,) = half.stderr.splitlines()
        assert line.startswith("error: ") and str(tree) in line


def test_a_closed_place_is_no_missing_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    result = invoke("--vllm", str(tmp_path / "loop" / "vllm"))
    assert result.exit_code == 2 and "cannot be read" in result.stderr and str(tmp_path / "loop") in result.stderr


@pytest.mark.parametrize("module", WITNESSES)
def test_a_witness_that_cannot_be_read_is_named(module: str, tmp_path: pathlib.Path) -> None:
    stub_vllm.write(tmp_path, stub_vllm.NOTHING, transformers=None)
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.write_bytes(b"\xff\xfe")
    result = invoke("--vllm", str(tmp_path))
    assert result.exit_code == 2 and f"{path} is no Python text" in result.stderr


# ---------------------------------------------------------------- how Python writes sources


TEXT = 'NAME = "naïve"\nclass A:\n    pass\n'


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        b"# -*- coding: latin-1 -*-\n" + TEXT.encode("latin-1"),
        b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\n" + TEXT.encode("cp1252"),
        TEXT.replace("\n", "\r\n").encode(),
    ],
    ids=["plain", "byte order mark", "latin-1", "cp1252", "CRLF"],
)
def test_a_source_is_read_as_python_reads_it(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "module.py").write_bytes(content)
    source = SourceTree(tmp_path).read("module")
    assert source is not None and source.text.endswith(TEXT)
    namespace: dict[str, Any] = {}
    exec(compile(content, "module", "exec"), namespace)
    ours: dict[str, Any] = {}
    exec(compile(source.parse(), "module", "exec"), ours)
    assert ours["NAME"] == namespace["NAME"]


@pytest.mark.parametrize(
    "content",
    [b"# coding: no-such-encoding\n", b"\xff\xfe = 1\n", b"\xef\xbb\xbf# coding: latin-1\n", b"NAME = 1\n\0\0"],
)
def test_a_source_that_python_does_not_read_is_named(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "module.py").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "module.py")):
        SourceTree(tmp_path).read("module")


def test_what_is_no_file_is_no_module(tmp_path: pathlib.Path) -> None:
    os.mkdir(tmp_path / "module.py")
    assert not SourceTree(tmp_path).has("module")
