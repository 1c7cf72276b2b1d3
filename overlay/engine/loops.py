"""The loops that vLLM's processes run in. Each is wrapped once; a patch can set what runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlay.report.journal import journal

#: By module: the loop of an engine core, without and with data parallelism, and the loop of a worker (multiprocessing).
LOOPS = {
    "vllm.v1.engine.core": ("EngineCoreProc.run_busy_loop", "DPEngineCoreProc.run_busy_loop"),
    "vllm.v1.executor.multiproc_executor": ("WorkerProc.worker_busy_loop",),
}

#: What runs a loop. It gets the loop's name, and a call that returns when the loop ends.
Runner = Callable[[str, Callable[[], Any]], Any]
_runners: dict[str, Runner] = {}  #: by module


def check_loops(module: ModuleType) -> None:
    """Raise AttributeError if this module lacks one of its loops."""
    import wrapt

    for name in LOOPS[module.__name__]:
        wrapt.resolve_path(module, name)


def wrap_loops(module: ModuleType) -> None:
    """Have the journal name the loop of this module when it begins.

    A module that lacks one stays as it is; the verdict of frame_stack says so.
    """
    import wrapt

    with contextlib.suppress(AttributeError):
        check_loops(module)
        for name in LOOPS[module.__name__]:

            def loop(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any, name: str = name) -> Any:
                journal.entered(name)
                run = _runners.get(module.__name__)
                return wrapped(*args, **kwargs) if run is None else run(name, lambda: wrapped(*args, **kwargs))

            wrapt.wrap_function_wrapper(module, name, loop)


def run_loops_by(module: ModuleType, run: Runner) -> None:
    """Have `run` run each loop of this module that begins from now on. Raises AttributeError if one is missing."""
    check_loops(module)
    _runners[module.__name__] = run
