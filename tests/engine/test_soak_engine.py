"""Seconds of `make soak`: real servers under mixed load, stock and overlay, asked over HTTP with the openai client."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from devtools.soak import load
from devtools.soak.checkpoint import Recipe
from overlay.report import journal_reader
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.engine


def test_seconds_of_mixed_load(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "devtools.soak", "--minutes", "0.25", "--ranks", "8", "--out", str(out)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    found = json.loads(out.read_text())
    for side in found["sides"].values():
        assert set(side["by_kind"]) == set(load.WEIGHTS) and side["under_load"]["same"] > 0
        assert len(side["checks"]) > 1 and not any(check["different"] for check in side["checks"])
        assert set(side["interferences"]) == {"sleep and wake", "other weights"}
    assert set(found["overlay_calls"]) == {"gdn", "lora_linear"}
    kinds = Recipe().configuration()["text_config"]["layer_types"]
    assert found["overlay_calls"]["gdn"]["layers"] == kinds.count("linear_attention")
    written = journal_reader.read(tmp_path / "overlay" / "journals")
    loops = {journal.role.partition("_")[0]: journal.raw["loop"] for journal in written}
    assert loops["APIServer"] is None and loops["EngineCore"] == "EngineCoreProc.run_busy_loop", loops
    assert not list((tmp_path / "stock" / "journals").iterdir())
