"""`make container` itself takes minutes and podman; here is what it decides on."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from devtools import container


def test_what_is_missing_is_the_reason_to_skip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["container"])
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "debootstrap" else f"/usr/bin/{tool}")
    assert container.main() == 0
    assert capsys.readouterr().out.startswith("[container] skipped: needs debootstrap: apt-get install")
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(container.os, "geteuid", lambda: 1000)
    assert container.main() == 0
    assert "need root" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["create", "exec"])
def test_the_runtime_takes_the_limits_out(tmp_path: pathlib.Path, kind: str) -> None:
    """As podman calls it, with a runc that says what it got."""
    runc, runtime, wanted = tmp_path / "runc", tmp_path / "runtime", tmp_path / "config.json"
    runc.write_text('#!/bin/sh\necho "$@"\n')
    runc.chmod(0o755)
    runtime.write_text(container.RUNTIME.format(python=sys.executable, runc=str(runc)))
    runtime.chmod(0o755)
    process = {"args": ["sleep"], "rlimits": [{"type": "RLIMIT_NOFILE"}]}
    wanted.write_text(json.dumps({"process": process, "root": {}} if kind == "create" else process))
    arguments = [kind, *(("--bundle", str(tmp_path)) if kind == "create" else ("--process", str(wanted))), "name"]
    result = subprocess.run([runtime, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.split() == arguments
    left = json.loads(wanted.read_text())
    assert left.get("process", left) == {"args": ["sleep"]}


def test_what_goes_into_the_base_image() -> None:
    names = ("wrapt", "wrapt-2.5.2.dist-info", "wrapt.libs", "ray", "raylet.py", "vllm", "torch", "wraptor")
    assert [name for name in names if not container.LEFT_OUT.match(name)] == ["raylet.py", "vllm", "torch", "wraptor"]
    version = container.VERSION
    wanted = ["", "bin", "bin/python3", f"bin/{version}", "lib", f"lib/{version}/os.py", "lib/libpython3.so.1"]
    others = [
        "share",
        "bin/sh",
        "lib/gcc",
        "lib/python2.7",
        f"lib/{version}/test/x.py",
        f"lib/{version}/site-packages/x.py",
    ]
    names = [f"opt/python/{name}".rstrip("/") for name in [*wanted, *others]]
    kept = [name for name in names if container._of_python(tarfile.TarInfo(name))]
    assert kept == names[: len(wanted)]


def test_what_is_watched_is_read_from_the_files() -> None:
    found = container.watched()
    assert {"vllm_overlay_info", "vllm_overlay_calls_total", "vllm:num_requests_running"} <= found
    assert all(re.fullmatch("vllm[_:][a-z_]+", name) for name in found)
