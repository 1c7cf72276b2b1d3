"""A large Python frame, and the test whether this Python needs one.

`overlay bench` runs this file by its path in stock processes, so it imports nothing from the overlay.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Pointers of 8 bytes that the large frame asks for. With them a chunk needs more than 512 KiB, so it gets 1 MiB. Other
#: frames use the rest.
SLOTS = 1 << 16
#: Calls in the test. The first call maps memory in every Python.
_CALLS = 8


def with_room(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function` with 512 KiB for Python frames in one piece above this one."""
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=SLOTS)


def is_needed() -> bool:
    """Whether this Python maps memory at each call that does not fit into the chunk of frames. Takes 0.2 ms.

    The frame of `with_room` fits into no existing chunk, so calls of it show the answer: Linux counts the pages that this
    thread faults in (getrusage). A Python that keeps frames elsewhere, or that keeps a chunk for the next call, maps at
    most once. A kernel that counts no faults (gVisor) cannot answer. Room does no harm, so the answer is then yes.
    """
    return _faults(lambda: with_room(int)) > _CALLS // 2 or _faults(_map_a_page) == 0


def _faults(call: Callable[[], object]) -> int:
    """The pages that this thread faults in during `_CALLS` calls."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(_CALLS):
        call()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _map_a_page() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
