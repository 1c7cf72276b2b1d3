"""The patch. The docstring of `overlay.patches.frame_stack` tells its story."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from overlay.engine.loops import run_loops_by
from overlay.patches.frame_stack import room
from overlay.report.journal import journal
from overlay.settings import Settings
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY, INERT

NAME = "frame_stack"


def install(module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
    """Have the loops of a module that has just been executed run above a large frame. Returns the verdict that holds here.

    Raises AttributeError if the module lacks a loop.
    """
    if not room.is_needed():
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return replace(verdict, state=INERT, reason=f"{python} maps no memory for a call that does not fit")
    record = journal.patch(NAME)

    def run(name: str, loop: Callable[[], Any]) -> Any:
        record.conclude(APPLY, f"{name} runs above one large frame")
        journal.write()
        return room.with_room(loop)

    run_loops_by(module, run)
    return verdict
