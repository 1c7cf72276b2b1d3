"""Room for frames: no call crosses the end of a chunk, and whether this Python needs that."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest

from overlay.patches.frame_stack import room
from overlay.patches.frame_stack.room import is_needed, with_room

CALLS = 200
#: More frames than fit into three chunks of 16 KiB.
DEPTHS = range(400)


def leaf() -> None:
    """What is called again and again at one depth. Its frame is larger than a step in depth, so that some depth has room
    for the step and not for this."""


leaf.__code__ = leaf.__code__.replace(co_stacksize=100)


def faults_per_call(depth: int) -> float:
    """Pages that a call at this depth maps anew, over many calls."""
    if depth:
        return faults_per_call(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        leaf()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / CALLS


def crossing() -> int:
    """The depths at which (almost) every call maps a chunk."""
    return sum(faults_per_call(depth) > 0.9 for depth in DEPTHS)


def test_with_room_no_call_crosses_the_end_of_a_chunk() -> None:
    assert with_room(crossing) == 0


def test_room_is_needed_where_calls_at_some_depth_map_a_chunk_each_time() -> None:
    assert is_needed() == (crossing() > 0)


def test_the_answer_does_not_depend_on_who_asks() -> None:
    assert with_room(is_needed) == is_needed()


def test_a_python_that_maps_nothing_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "with_room", lambda function: function())
    assert not is_needed()


def test_a_kernel_that_counts_no_faults_cannot_say_that_it_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_minflt=0))
    assert is_needed()


def test_it_is_a_call_like_any_other() -> None:
    assert with_room(lambda *args, **kwargs: (args, kwargs), 1, 2, three=3) == ((1, 2), {"three": 3})
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)
