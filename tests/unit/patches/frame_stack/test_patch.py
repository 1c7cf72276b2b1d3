"""Room for frames: no call crosses the end of a chunk, and vLLM's loops are given that room."""

from __future__ import annotations

import resource
import sys
import types

import pytest

from overlay.patches.frame_stack import patch as frame_stack
from overlay.patches.frame_stack.patch import with_room

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


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python may keep a chunk for the next call (gh-145789)")
def test_without_room_some_depth_does() -> None:
    assert crossing() > 0


def test_it_is_a_call_like_any_other() -> None:
    assert with_room(lambda *args, **kwargs: (args, kwargs), 1, 2, three=3) == ((1, 2), {"three": 3})
    with pytest.raises(ZeroDivisionError):
        with_room(lambda: 1 // 0)


def module_of(name: str, **classes: type) -> types.ModuleType:
    module = types.ModuleType(name)
    for class_name, made in classes.items():
        setattr(module, class_name, made)
    return module


def test_both_kinds_of_engine_get_room_and_say_so() -> None:
    class EngineCoreProc:
        def run_busy_loop(self, answer: int = 1) -> tuple[int, int]:
            return answer, crossing()

    class DPEngineCoreProc(EngineCoreProc):
        def run_busy_loop(self, answer: int = 2) -> tuple[int, int]:
            return answer, crossing()

    said: list[str] = []
    module = module_of("vllm.v1.engine.core", EngineCoreProc=EngineCoreProc, DPEngineCoreProc=DPEngineCoreProc)
    frame_stack.give_room(module, said.append)
    assert EngineCoreProc().run_busy_loop() == (1, 0)
    assert DPEngineCoreProc().run_busy_loop(answer=5) == (5, 0)
    assert said == ["EngineCoreProc.run_busy_loop", "DPEngineCoreProc.run_busy_loop"]


def test_a_vllm_without_one_of_the_loops_is_left_as_it_is() -> None:
    class EngineCoreProc:
        def run_busy_loop(self) -> None:
            pass

    loop = EngineCoreProc.run_busy_loop
    with pytest.raises(AttributeError, match="DPEngineCoreProc"):
        frame_stack.give_room(module_of("vllm.v1.engine.core", EngineCoreProc=EngineCoreProc), lambda _: None)
    assert EngineCoreProc.run_busy_loop is loop
