"""Further commands for the bench's workers: `EngineWorker` at a chosen depth of Python frames."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable
from typing import Any

from bench_engine.worker import EngineWorker, with_room


def below(frames: int, function: Callable[[], list[float]]) -> list[float]:
    """Call `function` above so many further frames."""
    return below(frames - 1, function) if frames else function()


class Worker(EngineWorker):
    """Commands are the methods whose names begin with `do_`."""

    room = False

    def do_first_token_above(self, frames: int, room: bool, **asked: Any) -> dict[str, Any]:
        """`first_token` above so many further frames, with room for its own or where the chunk happens to end.

        Also the pages that were mapped meanwhile, per repetition.
        """
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first_token = functools.partial(self.do_first_token, **asked)
        seconds = with_room(below, frames, first_token) if room else below(frames, first_token)
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return {"seconds": seconds, "pages": pages / len(seconds)}
