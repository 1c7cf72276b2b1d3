"""What of benchmarks/gpu/frame_stack.py can be tested without an engine."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.gpu import frame_stack
from overlay.cli import output
from overlay.cli.bench.outside.bench_engine import worker


class Engines:
    """Stands in for the bench's: 40 ms with room, 1 ms more for every ten frames without."""

    def all(self, command: str, turn: int, *, frames: int, room: bool, **asked: Any) -> dict[str, Any]:
        assert command == "first_token_above" and turn >= 0 and asked["repetitions"] == 2
        answer = (
            {"seconds": [0.04, 0.04], "pages": 3} if room else {"seconds": [0.04 + frames / 1e4] * 2, "pages": frames}
        )
        return {"stock": answer, "overlay": answer}


class Quiet:
    def phase(self, *_: object) -> None: ...

    def step(self, *_: object) -> None: ...


def test_every_depth_is_measured_both_ways_on_every_arm_and_shown(tmp_path: Path) -> None:
    rows = frame_stack.measure(Engines(), (8, 600), 3, Quiet())
    places = {(row["prompt"], row["frames"], row["kind"], row["arm"]) for row in rows}
    assert len(places) == len(rows) == 2 * len(frame_stack.FRAMES) * 2 * 2
    assert all(len(row["samples"]) == 3 for row in rows)
    console = Console(width=output.PIPE_COLUMNS)
    with console.capture() as shown:
        console.print(frame_stack.summary(rows))
    assert "as it comes" in shown.get() and "51.0" in shown.get() and "40.0" in shown.get()
    frame_stack.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_function_is_called_above_so_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bench_engine.worker", worker)
    commands = runpy.run_path(str(frame_stack.COMMANDS))
    assert issubclass(commands["Worker"], worker.EngineWorker) and not commands["Worker"].room

    def depth() -> list[float]:
        frame, count = sys._getframe(), 0
        while frame.f_back is not None:
            frame, count = frame.f_back, count + 1
        return [count]

    (least,), (more,) = (commands["below"](frames, depth) for frames in (0, 30))
    assert more - least == 30
