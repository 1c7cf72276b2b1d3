"""The loops in which processes of vLLM spend their lives, and the moment when one begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlay.report.journal import journal

#: By module: the loop of an engine core, with data parallelism or without, and that of a worker (multiprocessing).
LOOPS = {
    "vllm.v1.engine.core": ("EngineCoreProc.run_busy_loop", "DPEngineCoreProc.run_busy_loop"),
    "vllm.v1.executor.multiproc_executor": ("WorkerProc.worker_busy_loop",),
}

#: What runs a loop: it is given the loop's name and a call that does not return before the loop ends.
Runner = Callable[[str, Callable[[], Any]], Any]


def run_loops_by(module: ModuleType, run: Runner) -> None:
    """Have `run` run each loop of this module. Raises AttributeError where one is missing, and changes none then."""
    import wrapt

    names = LOOPS[module.__name__]
    for name in names:
        wrapt.resolve_path(module, name)
    for name in names:

        def loop(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any, name: str = name) -> Any:
            return run(name, lambda: wrapped(*args, **kwargs))

        wrapt.wrap_function_wrapper(module, name, loop)


def note_begin(module: ModuleType) -> None:
    """Have the journal name the loop of this module that begins, if all of them are there (frame_stack's verdict says so)."""

    def run(name: str, loop: Callable[[], Any]) -> Any:
        journal.entered(name)
        return loop()

    with contextlib.suppress(AttributeError):
        run_loops_by(module, run)
