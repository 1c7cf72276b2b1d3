"""The worker process of `frame_stack`: `EngineWorker` at a chosen depth of Python frames. Run by its path."""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not this folder, which has modules by the names of others'
    sys.path[0] = str(Path(__file__).resolve().parents[2] / "overlay" / "cli" / "bench" / "outside")

from bench_engine.worker import EngineWorker, answer_commands, with_room


def below(frames: int, function: Callable[[], list[float]]) -> list[float]:
    """Call `function` above so many further frames."""
    return below(frames - 1, function) if frames else function()


class FrameStackWorker(EngineWorker):
    """Commands are the methods whose names begin with `do_`."""

    def do_first_token_above(self, frames: int, room: bool, **asked: Any) -> dict[str, Any]:
        """`first_token` above so many further frames, with room for its own or where the chunk happens to end.

        Also the pages that were mapped meanwhile, per repetition.
        """
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first_token = functools.partial(self.do_first_token, **asked)
        seconds = with_room(below, frames, first_token) if room else below(frames, first_token)
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return {"seconds": seconds, "pages": pages / len(seconds)}


if __name__ == "__main__":
    answer_commands(FrameStackWorker())
