"""The order of every stream operation of a fork and join, with recording fakes in the place of CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlay import streams
from overlay.streams import ParallelRegion

Log = list[tuple[Any, ...]]


class FakeStream:
    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(("wait", self.name, event.name))


class FakeEvent:
    def __init__(self, log: Log, enable_timing: bool) -> None:
        assert enable_timing is False
        self.log = log
        self.name = f"event{sum(1 for entry in log if entry[0] == 'event')}"
        log.append(("event", self.name))

    def record(self, stream: FakeStream) -> None:
        self.log.append(("record", stream.name, self.name))


@contextlib.contextmanager
def fake_cuda() -> Iterator[Log]:
    """torch.cuda as far as the module uses it, writing every operation into one log."""
    log: Log = []
    current = [FakeStream("main", log)]
    made: list[FakeStream] = []

    def make_stream(device: torch.device) -> FakeStream:
        made.append(FakeStream(f"aux{len(made)}", log))
        return made[-1]

    @contextlib.contextmanager
    def switch(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_streams", {})
        patch.setattr(torch.cuda, "Stream", make_stream)
        patch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(log, enable_timing))
        patch.setattr(torch.cuda, "current_stream", lambda: current[-1])
        patch.setattr(torch.cuda, "stream", switch)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(streams, "_current_for_test", lambda: current[-1].name, raising=False)
        yield log


def work(log: Log, name: str, fails: bool = False) -> Any:
    def run() -> str:
        log.append(("work", name, streams._current_for_test()))  # type: ignore[attr-defined]
        if fails:
            raise RuntimeError(name)
        return name

    return run


def test_two_way_order() -> None:
    with fake_cuda() as log:
        region = ParallelRegion(slots=1)
        region.prepare(torch.device("cuda:0"))
        del log[:]
        assert region.run(work(log, "big"), [work(log, "small")]) == ("big", ("small",))
    assert log == [
        ("record", "main", "event1"),
        ("wait", "aux0", "event1"),
        ("work", "small", "aux0"),
        ("work", "big", "main"),
        ("record", "aux0", "event0"),
        ("wait", "main", "event0"),
    ]


@given(
    pattern=st.lists(st.sampled_from(["none", "ok", "fails"]), min_size=1, max_size=5),
    default_fails=st.booleans(),
)
def test_every_launched_slot_is_joined_whatever_fails(pattern: list[str], default_fails: bool) -> None:
    with fake_cuda() as log:
        region = ParallelRegion(slots=len(pattern))
        region.prepare(torch.device("cuda:0"))
        del log[:]
        auxiliary = [
            None if kind == "none" else work(log, f"slot{i}", kind == "fails") for i, kind in enumerate(pattern)
        ]
        fails = default_fails or "fails" in pattern
        if fails:
            with pytest.raises(RuntimeError):
                region.run(work(log, "default", default_fails), auxiliary)
        else:
            result, results = region.run(work(log, "default"), auxiliary)
            assert result == "default"
            assert results == tuple(None if kind == "none" else f"slot{i}" for i, kind in enumerate(pattern))
        launched = [entry[1] for entry in log if entry[0] == "wait" and entry[1] != "main"]
        joined = [entry[2] for entry in log if entry[0] == "wait" and entry[1] == "main"]
        done = [entry[2] for entry in log if entry[0] == "record" and entry[1] != "main"]
        # one start event if anything was launched, one done event for each launched slot, all waited for, none else
        assert sum(1 for entry in log if entry[:2] == ("record", "main")) == (
            1 if pattern.count("none") < len(pattern) else 0
        )
        assert joined == done and len(done) == len(launched)
        # an empty slot costs no stream switch and no event
        for index, kind in enumerate(pattern):
            if kind == "none":
                assert not any(f"aux{index}" in entry for entry in log)
        # no auxiliary work before its stream waits for the start
        for entry in log:
            if entry[0] == "work" and entry[2] != "main":
                assert log.index(("wait", entry[2], f"event{len(pattern)}")) < log.index(entry)
        assert streams._current_for_test() == "main"  # type: ignore[attr-defined]


def test_serial_runs_default_first_on_the_current_stream() -> None:
    with fake_cuda() as log:
        result = ParallelRegion(slots=3).run_serially(work(log, "a"), [work(log, "b"), None, work(log, "c")])
        assert result == ("a", ("b", None, "c"))
        assert log == [("work", "a", "main"), ("work", "b", "main"), ("work", "c", "main")]


@pytest.mark.parametrize("method", ["run", "run_serially"])
def test_a_wrong_number_of_callables_is_named(method: str) -> None:
    with fake_cuda() as log, pytest.raises(ValueError, match="2 auxiliary slots, got 1"):
        getattr(ParallelRegion(slots=2), method)(work(log, "a"), [work(log, "b")])


def test_streams_are_shared_per_device_and_slot_and_events_are_not() -> None:
    with fake_cuda() as log:
        one, two = ParallelRegion(slots=2), ParallelRegion(slots=2)
        for region in (one, two):
            region.prepare(torch.device("cuda:0"))
        assert one._auxiliary_streams == two._auxiliary_streams
        assert one._auxiliary_streams[0] is not one._auxiliary_streams[1]
        assert sum(1 for entry in log if entry[0] == "event") == 6
        three = ParallelRegion(slots=1)
        three.prepare(torch.device("cuda:1"))
        assert three._auxiliary_streams[0] is not one._auxiliary_streams[0]


def test_not_prepared_and_no_slots_are_errors() -> None:
    with fake_cuda() as log, pytest.raises(RuntimeError, match="not been prepared"):
        ParallelRegion(slots=1).run(work(log, "a"), [work(log, "b")])
    with pytest.raises(ValueError, match="at least one"):
        ParallelRegion(slots=0)


def test_preparing_during_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
            ParallelRegion(slots=1).prepare(torch.device("cuda:0"))
