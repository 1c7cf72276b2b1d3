"""The order of every stream operation between start and join, with recording fakes in the place of CUDA."""

from __future__ import annotations

import itertools
import threading
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlay.side_work import lane
from overlay.side_work.lane import Lane
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL
from tests.unit.fake_cuda import FakeCuda, FakeStream, fake_cuda

DEVICE = torch.device("cuda:0")
_address = itertools.count(1)


def result() -> Any:
    """A tensor as far as a lane looks at it."""
    address = next(_address)
    return types.SimpleNamespace(data_ptr=lambda: address)


def prepared(cuda: FakeCuda) -> Lane:
    made = lane.prepare(DEVICE)
    assert made is not None
    del cuda.log[:]
    return made


FORK = [("record", "main", "event0"), ("wait", "aux0", "event0")]
SIDE = [("work", "side", "aux0"), ("record", "aux0", "event1")]
MAIN = [("work", "main", "main")]
JOIN = [("wait", "main", "event1")]


@pytest.mark.parametrize(
    ("strategy", "order"),
    [(DUAL, [*FORK, *SIDE, *MAIN, *JOIN]), (DUAL_MAIN_FIRST, [FORK[0], *MAIN, FORK[1], *SIDE, *JOIN])],
)
def test_the_side_waits_for_what_was_before_start_and_main_for_the_side(strategy: str, order: list[Any]) -> None:
    with fake_cuda() as cuda:
        one, side = prepared(cuda), result()
        for _ in range(2):  # the events serve every layer
            del cuda.log[:]
            one.start(side, strategy, cuda.work("side"))
            cuda.work("main")()
            one.join(side)
            assert cuda.log == order
        one.join(side)
        assert cuda.log == order, "a second join has nothing to wait for"


def test_work_that_makes_its_own_result() -> None:
    with fake_cuda() as cuda:
        one, side = prepared(cuda), result()

        def work() -> Any:
            cuda.work("side")()
            return side

        assert one.start_and_give(work) is side
        cuda.work("main")()
        one.join(side)
    assert cuda.log == [*FORK, *SIDE, *MAIN, *JOIN]


def test_a_result_that_was_not_forked_is_not_waited_for() -> None:
    with fake_cuda() as cuda:
        one = prepared(cuda)
        one.join(result())
    assert cuda.log == []


@pytest.mark.parametrize("strategy", [DUAL, DUAL_MAIN_FIRST])
def test_what_a_failed_capture_has_left_open_is_forgotten(strategy: str) -> None:
    """Main failed between start and join. Later a serial result gets the same address: nothing may be waited for."""
    with fake_cuda() as cuda:
        one, side = prepared(cuda), result()
        one.start(side, strategy, cuda.work("side"))
        one.forget(side)
        del cuda.log[:]
        one.join(side)
    assert cuda.log == []


@pytest.mark.parametrize("where", ["start", "start_and_give", "join"])
def test_work_that_fails_is_joined_and_its_error_goes_on(where: str) -> None:
    """A dangling fork would hide the error behind another one, at the end of the capture."""
    with fake_cuda() as cuda:
        one, side, failing = prepared(cuda), result(), cuda.work("side", fails=True)
        if where == "join":
            one.start(side, DUAL_MAIN_FIRST, failing)
        calls = {
            "start": lambda: one.start(side, DUAL, failing),
            "start_and_give": lambda: one.start_and_give(failing),
            "join": lambda: one.join(side),
        }
        with pytest.raises(RuntimeError, match=r"^side$"):
            calls[where]()
        assert cuda.log == [*FORK, *SIDE, *JOIN] and cuda.current() is cuda.main
        del cuda.log[:]
        one.join(side)
    assert cuda.log == [], "nothing is open any more"


@given(st.permutations(range(3)), st.lists(st.sampled_from([DUAL, DUAL_MAIN_FIRST, SERIAL]), min_size=3, max_size=3))
def test_pairs_may_overlap_each_other(order: list[int], strategies: list[str]) -> None:
    """Three starts, then the joins in any order: each side has run, after its own start, when its join is over."""
    with fake_cuda() as cuda:
        one, sides = prepared(cuda), [result() for _ in range(3)]
        for number, strategy in enumerate(strategies):
            work = cuda.work(f"side{number}")
            if strategy == SERIAL:
                work()
                one.forget(sides[number])
            else:
                one.start(sides[number], strategy, work)
        for number in order:
            one.join(sides[number])
            names = [entry[1] for entry in cuda.log if entry[0] == "work"]
            assert names.count(f"side{number}") == 1
            if strategies[number] != SERIAL:
                last_work = max(i for i, entry in enumerate(cuda.log) if entry == ("work", f"side{number}", "aux0"))
                done = cuda.log.index(("record", "aux0", "event1"), last_work)
                assert ("wait", "main", "event1") in cuda.log[done:] or number != order[0]


def test_a_lane_belongs_to_a_thread_and_a_device() -> None:
    with fake_cuda() as cuda:
        here = prepared(cuda)
        assert lane.prepare(DEVICE) is here is lane.lane_of(DEVICE)
        assert lane.lane_of(torch.device("cuda:1")) is None
        there: list[Any] = []
        thread = threading.Thread(target=lambda: there.extend([lane.lane_of(DEVICE), lane.prepare(DEVICE)]))
        thread.start()
        thread.join()
        assert there[0] is None and there[1] is not here and there[1].stream is not here.stream


def test_a_lane_is_nobody_elses_stream() -> None:
    """torch hands out the same streams again: a lane's must not be a main stream, or another engine's."""
    with fake_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        pool = itertools.cycle([cuda.main, FakeStream("aux", cuda.log)])
        patch.setattr(torch.cuda, "Stream", lambda device: next(pool))
        first = lane.prepare(DEVICE)
        assert first is not None and first.stream.name == "aux"
        assert lane.prepare(torch.device("cuda:1")) is None, "none is left"


def test_an_allocator_that_shares_blocks_between_streams_has_no_lane() -> None:
    with fake_cuda(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
        assert lane.prepare(DEVICE) is None
