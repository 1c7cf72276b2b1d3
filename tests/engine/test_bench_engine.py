"""`python -m overlay bench` on a real engine: a tiny model, stock and overlay alive at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from devtools import tiny_models
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.engine

#: Without a GPU the tiny model is what it takes.
TINY = ("--quick", "--start-together", "--engine", "enforce_eager=true")
LIMIT_SECONDS = 240.0


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command as a person without a terminal has it."""
    command = [sys.executable, "-m", "overlay", "bench", *TINY, "--out", str(folder / "out"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A work folder for both tests: what vLLM found out about the model once need not be found out again.
    return subprocess.Popen(
        [*command, "--work", str(folder.parent / "bench-work")],
        cwd=REPOSITORY,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def _processes_in(folder: Path) -> list[str]:
    """Processes that work in a folder: engines run in the one of their logs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "cwd").resolve().is_relative_to(folder):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


def test_a_whole_run(tmp_path: Path) -> None:
    process = _start(tmp_path, "--batches", "1,2", "--prompts", "8,100")
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output[-3000:]
    found = _results(tmp_path)
    assert found["problems"] == found["unfinished"] == []
    pair = found["pair"]
    assert pair["weights_equal"]
    assert pair["stock"]["overlay_modules"] == []
    assert "overlay.start.import_hooks" in pair["overlay"]["overlay_modules"] and list(pair["journals"]) == ["overlay"]
    assert pair["journal"][0]["patched"] == found["model"]["linear_attention_layers"] == 3
    assert pair["journal"][0]["calls"]["serial"]["serial pass-through"] > 0
    assert [row["case"] for row in found["tokens"]] == [
        "N=1",
        "N=2",
        "prompt 8",
        "prompt 100",
        "mixed prompts",
        "4 requests for 2 seats",
    ]
    for row in found["tokens"]:
        assert row["different_requests"] == 0 and row["logprobs_equal"] and row["stock_repeats_itself"], row
        assert row["distinct"] > row["generated"] // 2, "tokens that are all the same prove nothing"
    assert [row["requests"] for row in found["decode"]] == [1, 2]
    assert [row["prompt"] for row in found["first_token"]] == [8, 100]
    for row in [*found["decode"], *found["first_token"], found["host_speed"]["Python"]]:
        assert 0.0 < row["low"] <= row["ratio"] <= row["high"]
        assert list(row["arms"]) == ["overlay"]
    report = (tmp_path / "out" / "report.txt").read_text()
    for shown in (report, output):
        assert "greedy tokens against stock" in shown and "CPU: says nothing about speed" in shown
        assert "/ stock" not in shown and "no difference shown" not in shown
    assert not list((tmp_path / "out").glob("*.png"))


def test_real_servers_that_pool(tmp_path: Path) -> None:
    """`vllm serve` of both arms, and `vllm bench serve` that asks them for embeddings."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(tiny_models.CONFIGURATIONS["qwen3"]))
    options = ("--model", str(model), "--engine", "runner=pooling", "--phases", "serving", "--concurrency", "2")
    output, _ = (process := _start(tmp_path, *options)).communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 3, output[-3000:]
    found = _results(tmp_path)
    # This vLLM pools without a synchronisation by itself.
    assert found["problems"] == [] and ["patched no layer" in text for text in found["unfinished"]] == [True]
    (row,) = found["concurrency"]["rows"]
    assert (row["requests"], row["metric"]) == (2, "embedding") and row["rounds"] > 1
    (answers,) = found["concurrency"]["answers"]
    assert all(one["different"] == 0 < one["of"] for one in answers["arms"].values())


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the decode steps."""
    process = _start(tmp_path, "--phases", "decode", "--batches", "1,2,4", "--engine", "max_num_seqs=16")
    limit = time.monotonic() + LIMIT_SECONDS
    while "decode" not in (_results(tmp_path) if (tmp_path / "out" / "results.json").exists() else {}):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 3, output[-3000:]
    found = _results(tmp_path)
    assert found["interrupted"] and "interrupted" in found["unfinished"][-1]
    assert found["decode"][0]["requests"] == 1
    assert "interrupted" in output
    assert _processes_in(tmp_path.parent / "bench-work") == []
