"""``python -m overlay check``: every way to name a vLLM, what is said of it, and the exit status."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import overlay_environment, run_python
from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from typer.testing import CliRunner

from overlay.cli import check, releases, vllms
from overlay.cli.app import app
from overlay.cli.failure import CommandError
from overlay.vocabulary import WITH_IT_GOES

#: As the build writes it.
BUILT = {
    "_version.py": """
        __version__: str
        __version__ = version = '0.32.0+stub'
        __version_tuple__ = version_tuple = (0, 32, 0)
        __commit_id__ = commit_id = 'g4ba787ec9'
        """
}
DRIFTED = {stub_vllm.GDN_MODULE: "class QwenGatedDeltaNetAttention:\n    pass\n"}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.fixture
def stub(tmp_path: pathlib.Path) -> Callable[[dict[str, str | None]], pathlib.Path]:
    """A folder that holds a stub of vLLM."""

    def write(changes: dict[str, str | None]) -> pathlib.Path:
        folder = tmp_path / "tree"
        stub_vllm.write(folder, {**BUILT, **changes}, transformers=None)
        return folder

    return write


def packed(folder: pathlib.Path) -> bytes:
    """A wheel of what lies in a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.py")):
            archive.write(path, path.relative_to(folder).as_posix())
        archive.writestr("vllm-0.32.0.dist-info/METADATA", "Name: vllm\n")
    return buffer.getvalue()


@pytest.mark.parametrize("inside", ["", "vllm"], ids=["the folder that holds it", "the package folder"])
def test_a_tree(stub: Callable[..., pathlib.Path], inside: str) -> None:
    result = invoke("--vllm", str(stub({}) / inside), "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and result.stderr == ""
    assert answer["schema"] == 1 and answer["removable"] is False and answer["drifted"] is False
    assert answer["vllm"]["kind"] == "tree" and answer["vllm"]["version"] == "0.32.0+stub"
    gdn = answer["patches"]["gdn"]
    assert (gdn["verdict"], gdn["class"], gdn["methods"]) == ("apply", "QwenGatedDeltaNetAttention", ["forward_cuda"])
    assert gdn["where"].endswith(f"vllm/{stub_vllm.GDN_MODULE}:3") and gdn["upstream"] is None


def test_a_wheel_says_what_its_tree_says(stub: Callable[..., pathlib.Path], tmp_path: pathlib.Path) -> None:
    wheel = tmp_path / "vllm-0.32.0-cp38-abi3-manylinux1_x86_64.whl"
    wheel.write_bytes(packed(stub({})))
    of_tree, of_wheel = (
        json.loads(invoke("--vllm", str(path), "--json").stdout) for path in (tmp_path / "tree", wheel)
    )
    assert of_wheel["vllm"] == {"kind": "wheel", "version": "0.32.0+stub", "path": str(wheel)}
    for answer in (of_tree, of_wheel):
        for patch in answer["patches"].values():
            patch["where"] = (patch["where"] or "").rpartition("/vllm/")[2]
    assert of_wheel["patches"] == of_tree["patches"]


def test_a_release_in_the_cache_needs_no_network(
    stub: Callable[..., pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    stub({}).rename(tmp_path / "0.32.0")
    answer = json.loads(invoke("--vllm", "0.32", "--cache", str(tmp_path), "--json").stdout)
    assert (answer["vllm"]["kind"], answer["vllm"]["version"]) == ("release", "0.32.0")


def test_the_table_for_people(stub: Callable[..., pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke("--vllm", str(stub({})))
    assert result.exit_code == 0
    assert "vLLM 0.32.0+stub (tree)" in result.stdout
    assert f"vllm/{stub_vllm.GDN_MODULE}"[:40] in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80


def test_drift_is_status_1_with_file_and_line(stub: Callable[..., pathlib.Path]) -> None:
    result = invoke("--vllm", str(stub(DRIFTED)))
    assert result.exit_code == 1
    assert "drifted" in result.stdout and f"{stub_vllm.GDN_MODULE}:1" in "".join(result.stdout.split())


def test_nothing_to_do_is_said(stub: Callable[..., pathlib.Path]) -> None:
    folder = stub(stub_vllm.NOTHING)
    assert check.REMOVABLE in invoke("--vllm", str(folder)).stdout
    assert json.loads(invoke("--vllm", str(folder), "--json").stdout)["removable"] is True


def test_what_goes_with_the_overlay_is_said_with_the_rest(stub: Callable[..., pathlib.Path]) -> None:
    loop = "    def {}(self):\n        while True: pass\n"
    core = "".join(f"class {name}:\n{loop.format('run_busy_loop')}" for name in ("EngineCoreProc", "DPEngineCoreProc"))
    worker = "class WorkerProc:\n" + loop.format("worker_busy_loop")
    changes = {"v1/engine/core.py": core, "v1/executor/multiproc_executor.py": worker}
    folder = stub({**stub_vllm.NOTHING, **changes})
    assert f"{check.REMOVABLE} ({WITH_IT_GOES})" in invoke("--vllm", str(folder)).stdout
    assert json.loads(invoke("--vllm", str(folder), "--json").stdout)["removable"] is True


def test_a_checkout_that_was_never_built_has_no_version(stub: Callable[..., pathlib.Path]) -> None:
    folder = stub({})
    (folder / "vllm" / "_version.py").unlink()
    assert json.loads(invoke("--vllm", str(folder), "--json").stdout)["vllm"]["version"] is None
    assert "unknown version" in invoke("--vllm", str(folder)).stdout


# ---------------------------------------------------------------- bad input


def refused(*arguments: str) -> str:
    """One message on stderr and status 2; gives the message."""
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


@pytest.mark.parametrize("value", ["", "main", "no/such/folder", "0.33.0.whl", "vllm-0.33.0-py3-none-any.whl"])
def test_what_is_no_vllm_is_named_with_what_is_allowed(value: str) -> None:
    message = refused("--vllm", value)
    assert repr(value) in message and vllms.ALLOWED in message


def test_a_folder_of_the_shell_that_is_gone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the vLLM in here/vllm cannot be read: FileNotFoundError" in refused("--vllm", "here/vllm")


def test_a_version_that_is_none(tmp_path: pathlib.Path) -> None:
    assert "'0.33.x' is not a version number" in refused("--vllm", "0.33.x", "--cache", str(tmp_path))


def test_no_network(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "Without a network, copy" in refused("--vllm", "0.33.0", "--cache", str(tmp_path))


def test_the_latest_release(
    stub: Callable[..., pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub({}).rename(tmp_path / "0.34.0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    message = refused("--vllm", "latest", "--cache", str(tmp_path))
    assert "cannot tell which release of vLLM is the latest" in message and "name a release by its number" in message
    monkeypatch.setattr(releases, "latest", lambda: "0.34.0")
    answer = json.loads(invoke("--vllm", "latest", "--cache", str(tmp_path), "--json").stdout)
    assert (answer["vllm"]["kind"], answer["vllm"]["version"]) == ("release", "0.34.0")


def test_a_folder_without_a_vllm(tmp_path: pathlib.Path) -> None:
    assert "is a folder without a whole vLLM" in refused("--vllm", str(tmp_path))


def test_half_a_copy_is_not_taken_for_a_vllm_without_models(stub: Callable[..., pathlib.Path]) -> None:
    folder = stub({})
    (folder / "vllm" / "envs.py").unlink()
    assert "is a folder without a whole vLLM" in refused("--vllm", str(folder))


def test_another_packages_wheel(tmp_path: pathlib.Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    assert "is not a wheel of vLLM" in refused("--vllm", str(wheel))


@pytest.mark.parametrize("content", [b"\xff\xfe = 1\n", b"a = '\x00'\n"], ids=["not UTF-8", "a NUL"])
def test_a_source_that_is_no_text(stub: Callable[..., pathlib.Path], content: bytes) -> None:
    folder = stub({})
    (folder / "vllm" / stub_vllm.GDN_MODULE).write_bytes(content)
    result = invoke("--vllm", str(folder))
    assert result.exit_code == 2 and "cannot be read" in result.stderr


@pytest.mark.timeout(30)
def test_a_source_that_is_a_pipe_is_not_waited_for(stub: Callable[..., pathlib.Path]) -> None:
    source = stub({}) / "vllm" / stub_vllm.GDN_MODULE
    source.unlink()
    os.mkfifo(source)
    result = invoke("--vllm", str(source.parents[len(pathlib.Path(stub_vllm.GDN_MODULE).parts)]))
    assert result.exit_code == 2 and "not a regular file" in result.stderr and str(source) in result.stderr


def test_no_vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no vLLM is installed in this Python" in refused()


def test_something_else_is_installed_as_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('was executed')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert str(tmp_path / "vllm") in refused()


# ---------------------------------------------------------------- damaged wheels


@pytest.fixture(scope="module")
def whole_wheel(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    stub_vllm.write(folder, BUILT, transformers=None)
    return packed(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_half_a_wheel(whole_wheel: bytes, tmp_path: pathlib.Path, share: float) -> None:
    wheel = tmp_path / "vllm.whl"
    wheel.write_bytes(whole_wheel[: int(len(whole_wheel) * share)])
    message = refused("--vllm", str(wheel))
    assert str(wheel) in message and "fetch it again" in message


def test_a_damaged_source_in_a_wheel(whole_wheel: bytes, tmp_path: pathlib.Path) -> None:
    content = bytearray(whole_wheel)
    name = f"vllm/{stub_vllm.GDN_MODULE}".encode()
    content[content.index(name) + len(name) + 4] ^= 0xFF
    wheel = tmp_path / "vllm.whl"
    wheel.write_bytes(content)
    assert "fetch it again" in refused("--vllm", str(wheel))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_no_damage_is_a_traceback_or_another_verdict(
    whole_wheel: bytes, tmp_path: pathlib.Path, place: float, bits: int
) -> None:
    """Every byte of a wheel may be wrong: then the answer is a message, or what the whole wheel says."""
    wheel = tmp_path / "vllm.whl"
    wheel.write_bytes(whole_wheel)
    expected = {patch: found.state for patch, found in check.judge(vllms.find(str(wheel), None)).items()}
    content = bytearray(whole_wheel)
    content[int(place * len(content))] ^= bits
    wheel.write_bytes(content)
    try:
        found = check.judge(vllms.find(str(wheel), None))
    except CommandError:
        return
    # A damaged name in the directory is a file that is not there, and a missing file is never a missing feature.
    assert {patch: found[patch].state for patch in found if found[patch].state != "drifted"}.items() <= expected.items()


# ---------------------------------------------------------------- as a program


@pytest.fixture
def installed(stub: Callable[..., pathlib.Path], tmp_path: pathlib.Path) -> dict[str, str]:
    """The environment of a Python with the overlay mounted, and a vLLM that must not be executed."""
    folder = stub({"__init__.py": "raise SystemExit('vLLM was executed')\n"})
    environment = overlay_environment(VLLMOVERLAY_JOURNAL_DIR=str(tmp_path / "journal"))
    environment["PYTHONPATH"] += os.pathsep + str(folder)
    return environment


def test_the_installed_vllm_is_not_executed(installed: dict[str, str], tmp_path: pathlib.Path) -> None:
    result = run_python("-m", "overlay", "check", "--json", environment=installed)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["vllm"] == {"kind": "installed", "version": "0.32.0+stub", "path": str(tmp_path / "tree" / "vllm")}
    assert not (tmp_path / "journal").exists(), "the overlay itself was not set going"


def test_check_takes_less_than_a_second_and_imports_nothing_heavy(installed: dict[str, str]) -> None:
    """Against this environment's own vLLM where it has one: that is the size that counts."""
    environment = {**installed, "PYTHONPATH": installed["PYTHONPATH"].split(os.pathsep)[0]}
    if run_python("-c", "import importlib.util as u; u.find_spec('vllm').origin", environment=environment).returncode:
        environment = installed
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run_python("-X", "importtime", "-m", "overlay", "check", environment=environment)
        seconds.append(time.perf_counter() - start)
        assert "gdn" in result.stdout, result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    heavy = {name.partition(".")[0] for name in imported} & {
        "torch",
        "vllm",
        "transformers",
        "wrapt",
        "requests",
        "numpy",
    }
    assert heavy == set() and "overlay.patches.gdn.verdict" in imported
    assert "overlay.start.import_hooks" not in imported
    assert min(seconds) < 1.0


def test_without_the_libraries_the_way_out_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    environment = overlay_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    result = run_python("-m", "overlay", "check", environment=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: this command needs typer: pip install typer\n"


def test_a_library_that_only_one_command_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setitem(sys.modules, "pypi_simple", None)
    monkeypatch.delitem(sys.modules, "overlay.cli.releases", raising=False)
    monkeypatch.delattr("overlay.cli.releases", raising=False)
    assert "needs pypi_simple: pip install pypi-simple" in refused("--vllm", "0.33.0", "--cache", str(tmp_path))


def test_a_missing_module_of_the_overlay_is_no_missing_library(
    monkeypatch: pytest.MonkeyPatch, stub: Callable[..., pathlib.Path]
) -> None:
    monkeypatch.setitem(sys.modules, "overlay.cli.output", None)
    monkeypatch.delattr("overlay.cli.output", raising=False)
    result = invoke("--vllm", str(stub({})))
    assert result.exit_code == 2 and "Traceback" in result.stderr and "overlay.cli.output" in result.stderr


def test_it_runs_from_a_mounted_folder_of_any_name(stub: Callable[..., pathlib.Path], tmp_path: pathlib.Path) -> None:
    mounted = tmp_path / "mounted"
    repository = pathlib.Path(vllms.__file__).parents[2]
    shutil.copytree(repository / "overlay", mounted / "overlay", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "sitecustomize.py", mounted)
    environment = overlay_environment()
    environment["PYTHONPATH"] = str(mounted)
    result = run_python("-m", "overlay", "check", "--vllm", str(stub({})), environment=environment)
    assert result.returncode == 0, result.stderr


def test_help_and_version() -> None:
    runner = CliRunner()
    alone = runner.invoke(app, [])
    assert alone.exit_code == 0 and all(command in alone.stdout for command in ("check", "matrix", "status", "doctor"))
    assert runner.invoke(app, ["--version"]).stdout.startswith("vllm-auxstream-overlay ")
    assert runner.invoke(app, ["nothing"]).exit_code == 2
