"""The bundle as somebody else gets it: unpacked, read-only, beside a real vLLM in an environment without wrapt."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable

import pytest

from devtools import bundle, servers, tiny_models
from overlay.report import journal_reader as journal_files
from tests.engine.conftest import FEW_PROCESSES, PASS_THROUGH, Run, run_offline

pytestmark = pytest.mark.engine
NAME = "qwen3_5_text"


def environment_without_wrapt(folder: pathlib.Path) -> str:
    """A fresh virtual environment with every package of .venv but wrapt. Gives its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = pathlib.Path(sysconfig.get_path("purelib"))
    links = folder / "packages"
    links.mkdir()
    for entry in packages.iterdir():
        if not entry.name.startswith("wrapt"):
            (links / entry.name).symlink_to(entry)
    (own,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (own / "packages.pth").write_text(f"{links}\n")
    return str(folder / "venv" / "bin" / "python")


def test_a_mounted_bundle_gives_the_tokens_of_stock(
    engine: Callable[..., Run], model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    stock = engine(NAME, overlay=False)
    python = environment_without_wrapt(tmp_path)
    assert subprocess.run([python, "-c", "import wrapt"], stderr=subprocess.DEVNULL, check=False).returncode == 1

    _, packed, _ = bundle.make(tmp_path / "dist")
    mounted = tmp_path / "a folder with spaces"
    with tarfile.open(packed) as tar:
        tar.extractall(mounted)
    mounted.chmod(0o755)
    overlay = mounted / bundle.NAME
    for path in (overlay, *overlay.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "theirs.py").touch()

    extra = {
        **servers.cpu_environment(),
        **PASS_THROUGH,
        **FEW_PROCESSES,
        "VLLMOVERLAY_JOURNAL_DIR": str(tmp_path / "journals"),
    }
    environment = servers.environment(False, tmp_path, os.environ, extra)
    environment["PYTHONPATH"] = os.pathsep.join([str(theirs), str(overlay)])
    request = {"model": str(model(NAME)), "compiled": False, "tensor_parallel_size": 1}
    result = run_offline(python, request, environment, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert json.loads((tmp_path / "answers.json").read_text()) == stock.answers
    journals = journal_files.read(tmp_path / "journals")
    (worker,) = (journal for journal in journals if journal.layers)
    assert worker.layers == tiny_models.gdn_layers(NAME) and worker.calls >= worker.layers * 12
    assert not [problem for journal in journals for problem in journal.problems]
