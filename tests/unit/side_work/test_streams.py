"""The order of every stream operation of a fork and join, with recording fakes in the place of CUDA."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from overlay.side_work import lane, streams
from overlay.side_work.streams import ParallelRegion
from tests.unit.fake_cuda import FakeCuda, FakeStream, Log, check_makes_nothing, fake_cuda


def test_two_way_order() -> None:
    with fake_cuda() as cuda:
        region = cuda.prepared(slots=1)
        assert region.run(cuda.work("big"), [cuda.work("small")]) == ("big", ("small",))
    assert cuda.log == [
        ("record", "main", "event1"),
        ("wait", "aux0", "event1"),
        ("work", "small", "aux0"),
        ("work", "big", "main"),
        ("record", "aux0", "event0"),
        ("wait", "main", "event0"),
    ]


def test_all_slots_empty_is_the_default_and_nothing_else() -> None:
    with fake_cuda() as cuda:
        assert cuda.prepared(slots=3).run(cuda.work("default"), [None, None, None]) == ("default", (None,) * 3)
    assert cuda.log == [("work", "default", "main")]


NONE, RETURNS, FAILS = "none", "returns", "fails"
patterns = st.lists(st.sampled_from([NONE, RETURNS, FAILS]), min_size=1, max_size=6)


def right_order(pattern: list[str]) -> tuple[Log, str | None]:
    """Every operation of a fork and join, in order, and the name of the callable that fails first."""
    start = f"event{len(pattern)}"
    log: Log = [] if set(pattern) == {NONE} else [("record", "main", start)]
    join: Log = []
    for slot, kind in enumerate(pattern):
        if kind == NONE:
            continue
        log += [("wait", f"aux{slot}", start), ("work", f"slot{slot}", f"aux{slot}")]
        join += [("record", f"aux{slot}", f"event{slot}"), ("wait", "main", f"event{slot}")]
        if kind == FAILS:
            return log + join, f"slot{slot}"
    return [*log, ("work", "default", "main"), *join], None


def callables(cuda: FakeCuda, pattern: list[str]) -> list[Any]:
    return [None if kind == NONE else cuda.work(f"slot{i}", kind == FAILS) for i, kind in enumerate(pattern)]


@given(pattern=patterns, default_fails=st.booleans())
@example(pattern=[RETURNS, FAILS, RETURNS], default_fails=False)
@example(pattern=[RETURNS, NONE, RETURNS], default_fails=True)
def test_exact_order_for_any_slots_and_failures(pattern: list[str], default_fails: bool) -> None:
    """One start event, one done event for each launched slot, each waited for, whatever fails; empty slots cost nothing."""
    with fake_cuda() as cuda:
        region = cuda.prepared(len(pattern))
        expected, failing = right_order(pattern)
        failing = failing or ("default" if default_fails else None)
        for _ in range(2):  # and the region can be used again
            del cuda.log[:]
            if failing:
                with pytest.raises(RuntimeError, match=f"^{failing}$"):
                    region.run(cuda.work("default", default_fails), callables(cuda, pattern))
            else:
                result, results = region.run(cuda.work("default"), callables(cuda, pattern))
                assert result == "default"
                assert results == tuple(None if kind == NONE else f"slot{i}" for i, kind in enumerate(pattern))
            assert cuda.log == expected
            assert cuda.current() is cuda.main


@given(pattern=patterns, default_fails=st.booleans())
def test_disabled_it_is_the_same_work_on_the_current_stream(pattern: list[str], default_fails: bool) -> None:
    with fake_cuda() as cuda:
        region = ParallelRegion(len(pattern))  # needs no preparation
        order = [("default", default_fails)]
        order += [(f"slot{i}", kind == FAILS) for i, kind in enumerate(pattern) if kind != NONE]
        ran = next((i + 1 for i, (_, fails) in enumerate(order) if fails), len(order))
        if any(fails for _, fails in order):
            with pytest.raises(RuntimeError, match=f"^{order[ran - 1][0]}$"):
                region.run_serially(cuda.work("default", default_fails), callables(cuda, pattern))
        else:
            names = tuple(None if kind == NONE else f"slot{i}" for i, kind in enumerate(pattern))
            assert region.run_serially(cuda.work("default"), callables(cuda, pattern)) == ("default", names)
        assert cuda.log == [("work", name, "main") for name, _ in order[:ran]]


@given(slots=st.integers(1, 5), given_slots=st.integers(0, 7), method=st.sampled_from(["run", "run_serially"]))
def test_a_wrong_number_of_callables_is_named_and_nothing_runs(slots: int, given_slots: int, method: str) -> None:
    assume(slots != given_slots)
    with fake_cuda() as cuda:
        region = cuda.prepared(slots)
        with pytest.raises(ValueError, match=f"{slots} auxiliary slots, got {given_slots}"):
            getattr(region, method)(cuda.work("default"), [cuda.work("aux")] * given_slots)
    assert cuda.log == []


def test_a_region_within_a_region_forks_from_the_auxiliary_stream() -> None:
    """The start event of the inner one is recorded on the stream that it runs on, and it is joined there."""
    with fake_cuda() as cuda:
        outer = cuda.prepared(slots=1)
        with cuda.stream(outer._auxiliary_streams[0]):
            inner = cuda.prepared(slots=1)
        assert inner._auxiliary_streams[0] is not outer._auxiliary_streams[0]
        outer.run(cuda.work("a"), [lambda: inner.run(cuda.work("b"), [cuda.work("c")])])
    assert [entry[1:] for entry in cuda.log if entry[0] == "work"] == [("c", "aux1"), ("b", "aux0"), ("a", "main")]
    joins = [entry for entry in cuda.log if entry[0] == "wait" and entry[1] in ("aux0", "main")]
    assert [entry[1] for entry in joins] == ["aux0", "aux0", "main"]


def test_streams_are_shared_per_device_and_slot_and_events_are_not() -> None:
    with fake_cuda() as cuda:
        one, two = ParallelRegion(slots=2), ParallelRegion(slots=2)
        for region in (one, two):
            region.prepare(torch.device("cuda:0"))
        assert one._auxiliary_streams == two._auxiliary_streams
        assert one._auxiliary_streams[0] is not one._auxiliary_streams[1]
        assert sum(1 for entry in cuda.log if entry[0] == "event") == 6
        three = ParallelRegion(slots=1)
        three.prepare(torch.device("cuda:1"))
        assert three._auxiliary_streams[0] is not one._auxiliary_streams[0]


def test_two_main_streams_share_no_auxiliary_stream() -> None:
    """Two engines in one process: what one main stream has not read yet, work next to the other could overwrite."""
    with fake_cuda() as cuda:
        one, two, again = (ParallelRegion(slots=2) for _ in range(3))
        one.prepare(torch.device("cuda:0"))
        with cuda.stream(FakeStream("other main", cuda.log)):
            two.prepare(torch.device("cuda:0"))
        again.prepare(torch.device("cuda:0"))
        assert not set(one._auxiliary_streams) & set(two._auxiliary_streams)
        assert one._auxiliary_streams == again._auxiliary_streams


@pytest.mark.parametrize("handed_out", [1, 2, 4, 5, 7])
def test_torch_hands_out_the_same_streams_again(handed_out: int) -> None:
    """A new stream may be the main stream or another slot's; then the next one is taken, and at last the main stream."""
    with fake_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        pool = [cuda.main, *(FakeStream(f"pool{index}", cuda.log) for index in range(handed_out - 1))]
        turn = itertools.cycle(pool)
        patch.setattr(torch.cuda, "Stream", lambda device: next(turn))
        region = ParallelRegion(slots=4)
        region.prepare(torch.device("cuda:0"))
        own = [stream for stream in region._auxiliary_streams if stream is not cuda.main]
        assert len(set(own)) == len(own) == min(4, handed_out - 1)
        assert region.run(cuda.work("default"), callables(cuda, [RETURNS] * 4))[1] == (
            "slot0",
            "slot1",
            "slot2",
            "slot3",
        )


def test_an_allocator_that_shares_blocks_between_streams_means_serial() -> None:
    """cudaMallocAsync may give a block that the main stream still reads to any stream."""
    with fake_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
        cuda.prepared(slots=2).run(cuda.work("default"), callables(cuda, [RETURNS, NONE]))
    assert [entry for entry in cuda.log if entry[0] == "work"] == [
        ("work", "slot0", "main"),
        ("work", "default", "main"),
    ]


def test_a_stream_for_something_else_is_nobodys() -> None:
    """A measurement's main stream, or a lane's: never one that is somebody's already."""
    with fake_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        region, of_a_thread = cuda.prepared(slots=2), lane.prepare(torch.device("cuda:0"))
        assert of_a_thread is not None
        taken = [cuda.main, of_a_thread.stream, *region._auxiliary_streams]
        assert len(set(taken)) == 4
        pool = [*taken, FakeStream("free", cuda.log)]
        turn = itertools.cycle(pool)
        patch.setattr(torch.cuda, "Stream", lambda device: next(turn))
        assert streams.unused_stream(torch.device("cuda:0")) is pool[-1]
        turn = itertools.cycle(taken)
        assert streams.unused_stream(torch.device("cuda:0")) is None


def test_preparing_again_changes_nothing() -> None:
    with fake_cuda() as cuda:
        region = cuda.prepared(slots=2)
        before = region._auxiliary_streams
        region.prepare(torch.device("cuda:0"))
        assert region.prepared and region._auxiliary_streams is before and cuda.log == []


def test_not_prepared_and_no_slots_are_errors() -> None:
    with fake_cuda() as cuda, pytest.raises(RuntimeError, match="not been prepared"):
        ParallelRegion(slots=1).run(cuda.work("a"), [cuda.work("b")])
    assert cuda.log == []
    with pytest.raises(ValueError, match="at least one"):
        ParallelRegion(slots=0)


def test_preparing_during_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        region = ParallelRegion(slots=1)
        with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
            region.prepare(torch.device("cuda:0"))
        assert not region.prepared


def test_importing_the_module_makes_nothing() -> None:
    check_makes_nothing("import overlay.side_work.streams\noverlay.side_work.streams.ParallelRegion(slots=3)")
