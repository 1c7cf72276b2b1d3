"""vLLM's loops run above one large Python frame, so that no call of a step crosses the end of a chunk of frames.

Symptom: a step that waits for the host takes up to a fifth longer in one process than in another that does the same, and
does so in every step: on one H200 host the first token took 0.86 to 1.20 of stock's time with the same graphs.

Cause: CPython keeps frames in chunks of 16 KiB. A call that does not fit maps a new chunk, and its return unmaps it: 10 µs
on a virtual machine, where a call takes 0.04. Which calls of a step these are depends on the size of every frame below, so
on the number of layers (the compiled model's frame has a local for every weight), and on who has wrapped what. A wrapper
of ours can move stock's calls across an end, so it has to see to it that there is none.

Fix: a function whose code asks for a stack of half a mebibyte gets a chunk of one mebibyte, and what it calls goes into the
rest. Only pages that are used take memory. The loops are entered once per process, so a step pays nothing. Not for
an engine inside somebody's own process, whose frames are not ours, nor for Ray's workers.

Source: CPython gh-142183 (calls across stack chunks perform badly); gh-145789 keeps one chunk for the next call.

Remove when: the oldest Python that vLLM runs on has gh-145789 (3.12 will not get it).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Pointers that the large frame asks for. 8 bytes each are more than half of a chunk of 1 MiB; the other half is for others.
SLOTS = 1 << 16
#: By module: the methods in which a process of vLLM spends its life.
LOOPS = {
    "vllm.v1.engine.core": ("EngineCoreProc.run_busy_loop", "DPEngineCoreProc.run_busy_loop"),
    "vllm.v1.executor.multiproc_executor": ("WorkerProc.worker_busy_loop",),
}


def with_room(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function` with 512 KiB of Python frames in one piece above this one."""
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=SLOTS)


def give_room(module: ModuleType, entered: Callable[[str], None]) -> None:
    """Have this module's loops run with room; `entered` is told the name of one that begins.

    Raises AttributeError where vLLM has no such loop.
    """
    import wrapt

    def wrap(name: str) -> None:
        def loop(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any) -> Any:
            entered(name)
            return with_room(wrapped, *args, **kwargs)

        wrapt.wrap_function_wrapper(module, name, loop)

    names = LOOPS[module.__name__]
    for name in names:  # all, or none
        wrapt.resolve_path(module, name)
    for name in names:
        wrap(name)
