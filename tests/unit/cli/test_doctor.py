"""``python -m overlay doctor``: one finding a line, and status 1 where something needs doing."""

from __future__ import annotations

import json
import os
import pathlib
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tomllib

from devtools import bundle
from tests.conftest import REPOSITORY, overlay_environment
from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from overlay.cli import doctor

#: What `--json` does, without the import of the command line's libraries, which takes as long as all the rest.
ASK = "import sys; from overlay.cli import doctor; sys.exit(doctor.run(as_json=True))"
#: Handed on to whoever is next, as well-behaved tools do: by importing it.
CHAINS = "import sys; sys.path.remove({folder!r}); del sys.modules['sitecustomize']; import sitecustomize\n"


class Container:
    """A mounted bundle and a stub vLLM, as a container has them; it has no GPU, and the ops are to run without one."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.overlay = folder / "opt" / "overlay"
        bundle.write_folder(bundle.contents(REPOSITORY), self.overlay, 1_700_000_000)
        stub_vllm.write(folder / "site")
        for name in ("opt", "other"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(0o755)

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Python in the folder's own directory: so the command is found, wherever PYTHONPATH leads."""
        given = {"VLLMOVERLAY_JOURNAL_DIR": str(self.folder / "journals"), "VLLMOVERLAY_SERIAL_PASS_THROUGH": "1"}
        environment = overlay_environment(**{"PYTHONPATH": self.path(self.overlay), **given, **settings})
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=self.overlay, capture_output=True, text=True, check=False
        )

    def path(self, *places: pathlib.Path) -> str:
        return os.pathsep.join(map(str, [*places, self.folder / "site"]))

    def find(self, *places: pathlib.Path, options: tuple[str, ...] = (), **settings: str) -> dict[str, Any]:
        """What doctor says, by what it is about: state, finding and what to do, in the order in which it is said."""
        result = self.run(*options, "-c", ASK, PYTHONPATH=self.path(*(places or (self.overlay,))), **settings)
        assert result.stdout, result.stderr
        said: dict[str, Any] = json.loads(result.stdout)
        found: dict[str, Any] = {}
        for one in said["findings"]:
            found.setdefault(one["about"], []).append((one["state"], one["found"], one["do"]))
        assert said["ok"] == all(state != "do" for one in found.values() for state, _, _ in one)
        assert result.returncode == int(not said["ok"])
        return found


@pytest.fixture
def container(tmp_path: pathlib.Path) -> Container:
    return Container(tmp_path)


def needs(found: dict[str, Any]) -> dict[str, str]:
    """What needs doing."""
    return {about: str(do) for about, said in found.items() for state, _, do in said if state == "do"}


def test_a_mounted_folder_needs_nothing(container: Container) -> None:
    found = container.find()
    assert needs(found) == {}
    assert set(found) == set(doctor.ABOUT)
    assert found["sitecustomize"] == [("ok", f"armed by {container.overlay}/sitecustomize.py", None)]
    assert found["plugin"] == [("ok", f"auxstream_overlay, by the metadata in {container.overlay}", None)]
    assert found["vllm"][0][1].startswith("of unknown version: gdn apply, deepseek_v4 absent")
    assert found["journals"] == [("ok", f"{container.folder}/journals, made by the first vLLM here", None)]


def test_it_is_not_on_the_path(container: Container) -> None:
    found = container.find(container.folder / "other")
    assert (
        needs(found)["sitecustomize"]
        == f"export PYTHONPATH={container.overlay}:{container.folder}/other:{container.folder}/site"
    )


def test_python_was_told_not_to_look_there(container: Container) -> None:
    assert needs(container.find(options=("-E",)))["sitecustomize"] == "start it without -E"


@pytest.mark.parametrize("hands_on", [False, True])
def test_another_sitecustomize_is_in_front(container: Container, hands_on: bool) -> None:
    other = container.folder / "other"
    (other / "sitecustomize.py").write_text(CHAINS.format(folder=str(other)) if hands_on else "")
    found = container.find(other, container.overlay)
    ((state, said, do),) = found["sitecustomize"]
    if hands_on:
        assert state == "ok" and do is None
    else:  # the second door is open
        assert state == "note" and f"{other}/sitecustomize.py is in front" in said and "second door" in said
        assert do == f"export PYTHONPATH={container.overlay}:{other}:{container.folder}/site"
        found = container.find(other, container.overlay, VLLM_PLUGINS="a")
        assert set(needs(found)) == {"sitecustomize", "plugin"}
        assert needs(found)["plugin"] == "VLLM_PLUGINS=a,auxstream_overlay"


def test_a_plugin_list_without_it_matters_only_where_the_first_door_is_closed(container: Container) -> None:
    found = container.find(VLLM_PLUGINS="a, auxstream_overlay")  # vLLM takes the space for a part of the name
    assert needs(found) == {} and found["plugin"][0][0] == "note"
    assert container.find(VLLM_PLUGINS="auxstream_overlay")["plugin"][0][0] == "ok"


def test_the_folder_has_lost_a_door(container: Container) -> None:
    (container.overlay / "sitecustomize.py").unlink()
    found = container.find()
    assert needs(found) == {} and found["sitecustomize"][0][0] == "note"
    (metadata,) = container.overlay.glob("*.dist-info")
    shutil.rmtree(metadata)
    assert set(needs(container.find())) == {"sitecustomize", "plugin"}


def test_settings_that_stop_it(container: Container) -> None:
    assert needs(container.find(VLLMOVERLAY="off")) == {"settings": "unset VLLMOVERLAY"}
    found = container.find(VLLMOVERLAY_PLAN="fast")
    assert set(needs(found)) == {"settings"} and "VLLMOVERLAY_PLAN='fast'" in found["settings"][0][1]
    assert container.find(VLLMOVERLAY_STRICT="1")["settings"][0][1].endswith("VLLMOVERLAY_STRICT=1")
    service = {"VLLMOVERLAY_PORT": "tcp://10.0.0.1:80", "VLLMOVERLAY_SERVICE_HOST": "10.0.0.1"}
    assert "10.0.0.1" not in container.find(**service)["settings"][0][1], (
        "Kubernetes made them, and they are no settings"
    )


def test_who_shadows_whom(container: Container) -> None:
    other = container.folder / "other"
    (other / "overlay.py").touch()
    ((_, _, _), (state, said, _)) = container.find(container.overlay, other)["package"]
    assert state == "note" and f"{other}/overlay.py" in said
    found = container.find(other)
    assert f"a server here would import {other}/overlay.py" in found["package"][0][1]
    assert needs(found)["package"].startswith(f"export PYTHONPATH={container.overlay}:{other}:")
    (other / "overlay.py").unlink()
    shutil.copytree(container.overlay / "overlay", other / "overlay")
    assert f"a second copy in {other}/overlay" in container.find(container.overlay, other)["package"][1][1]


def test_permissions_name_the_command(container: Container) -> None:
    (container.overlay / "overlay" / "files.py").chmod(0o666)
    found = container.find()
    assert needs(found) == {"permissions": f"chmod -R go-w {container.overlay}/overlay"}


@pytest.fixture
def folder(container: Container, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The mounted folder as the one that the functions of this process look at."""
    monkeypatch.setattr(doctor, "FOLDER", container.overlay)
    return container.overlay


def test_byte_code(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say() -> doctor.Finding:
        (found,) = doctor._byte_code()
        return found

    assert say().state == "ok"  # nothing there, and it can be written
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert say().state == "note" and "compileall" in str(say().do)
    source = folder / "overlay" / "files.py"
    for path in (folder / "overlay").rglob("*.py"):
        py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert say().state == "ok"
    source.write_text(source.read_text() + "\n")
    assert say().state == "do" and "used unchecked" in say().found and str(folder) in str(say().do)


def test_wrapt(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(version: str | None) -> doctor.Finding:
        site = folder.parent / f"site {version}"
        if version is not None:
            (site / "wrapt").mkdir(parents=True)
            (site / "wrapt" / "__init__.py").touch()
            monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: version)
        monkeypatch.setattr(doctor, "_entries", lambda: [str(site)])
        (found,) = doctor._wrapt()
        return found

    assert say("2.1.0") == doctor.Finding("wrapt", "ok", "2.1.0, this Python's own")
    assert [say(version).state for version in ("1.17", "1.16.9", "3.0.0")] == ["ok", "do", "do"]
    assert "bundled" in say(None).found
    shutil.rmtree(folder / "fallback")
    assert say(None).state == "do"


def test_the_numbers_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    words = [".".join(map(str, one)) for one in (*doctor.PYTHONS, doctor.WRAPTS[0])]
    assert project["requires-python"] == f">={words[0]},<{words[1]}"
    assert project["dependencies"] == [f"wrapt>={words[2]},<{doctor.WRAPTS[1][0]}"]
    assert project["entry-points"][doctor.PLUGIN_GROUP].keys() == {doctor.PLUGIN}


def test_journals_and_processes(container: Container) -> None:
    journals = container.folder / "journals"
    journals.mkdir(mode=0o777)
    journals.chmod(0o777)
    found = container.find()
    assert "chmod go-w" in found["journals"][0][1] and set(needs(found)) == {"journals"}
    journals.chmod(0o700)
    assert container.find()["processes"] == [("note", "no process with the overlay runs here", None)]
    journal = {"schema": 1, "pid": os.getpid(), "started": 0, "overlay": "0.0.1", "problems": ["something"]}
    (journals / "1.json").write_text(json.dumps(journal))
    found = container.find()
    assert [do for _, _, do in found["processes"]] == ["restart them", "python -m overlay status"]


def test_a_vllm_that_is_not_known_and_none(container: Container) -> None:
    stub_vllm.write(container.folder / "site", {stub_vllm.GDN_MODULE: "class QwenGatedDeltaNetAttention: pass\n"})
    found = container.find()
    assert "check" in needs(found)["vllm"] and "gdn" in found["vllm"][1][1]
    shutil.rmtree(container.folder / "site" / "vllm")
    (container.folder / "site" / "vllm").mkdir()
    (container.folder / "site" / "vllm" / "__init__.py").touch()
    found = container.find()
    assert needs(found) == {"vllm": "run this where vLLM runs"} and "not a whole vLLM" in found["vllm"][0][1]


@pytest.mark.parametrize(
    ("script", "variables", "state"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", {}, "ok"),
        ("exit 9", {}, "do"),
        ("exit 9", {"VLLMOVERLAY_SERIAL_PASS_THROUGH": "on"}, "note"),
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", {"CUDA_VISIBLE_DEVICES": ""}, "do"),
    ],
)
def test_gpu(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, script: str, variables: dict[str, str], state: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (found,) = doctor._gpu()
    assert found.state == state and (found.found == "GPU 0: NVIDIA H200") == (state == "ok")


def test_one_line_each_and_the_exit_status(container: Container) -> None:
    well = container.run("-m", "overlay", "doctor")
    assert (well.returncode, well.stderr) == (0, "")
    states = [line.split()[0] for line in well.stdout.splitlines()]
    assert len(states) == len(doctor.ABOUT) and set(states) == {"ok", "note"}
    off = container.run("-m", "overlay", "doctor", VLLMOVERLAY="0")
    assert off.returncode == 1
    assert "\ndo   settings      VLLMOVERLAY switches the overlay off -> unset VLLMOVERLAY\n" in off.stdout


def test_what_cannot_be_looked_at_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed() -> Iterator[doctor.Finding]:
        raise PermissionError(13, "Permission denied", "/root/secret")
        yield

    monkeypatch.setattr(doctor, "ABOUT", {"wrapt": closed, "python": doctor._python})
    first, second = doctor.look()
    assert first.state == "do" and "/root/secret" in first.found and second.about == "python"
