"""A large Python frame, and the question whether this Python needs one.

`overlay bench` runs this file by its path in stock processes, so it imports nothing of the overlay.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")

#: Pointers that the large frame asks for. 8 bytes each are more than half of a chunk of 1 MiB; the other half is for others.
SLOTS = 1 << 16
#: How often the test calls; the first call maps memory in every Python.
_CALLS = 8


def with_room(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function` with 512 KiB of Python frames in one piece above this one."""
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=SLOTS)


def is_needed() -> bool:
    """Whether this Python maps memory each time that a call does not fit into the chunk of frames. Takes 0.2 ms.

    The frame of `with_room` fits into no chunk that is there, so its calls show it: by the pages that this thread
    faults in, which Linux counts (getrusage). A Python that keeps frames elsewhere, or a chunk for the next call, maps at
    most once. A kernel that counts no faults (gVisor) cannot answer; room does no harm, so the answer is yes.
    """
    return _faults(lambda: with_room(int)) > _CALLS // 2 or _faults(_map_a_page) == 0


def _faults(call: Callable[[], object]) -> int:
    """The pages that this thread has faulted in during some calls."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(_CALLS):
        call()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _map_a_page() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
