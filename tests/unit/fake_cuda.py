"""Recording fakes in the place of torch.cuda: every stream operation goes into one log, in its order."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from overlay.side_work import lane, streams
from overlay.side_work.streams import ParallelRegion
from tests.conftest import REPOSITORY

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


class FakeCuda:
    """torch.cuda as far as the module uses it; every operation goes into one log."""

    def __init__(self) -> None:
        self.log: Log = []
        self.main = FakeStream("main", self.log)
        self._entered = [self.main]
        self._made = 0

    def current(self) -> FakeStream:
        return self._entered[-1]

    def make_stream(self, device: torch.device) -> FakeStream:
        self._made += 1
        return FakeStream(f"aux{self._made - 1}", self.log)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._entered.append(stream)
        try:
            yield
        finally:
            self._entered.pop()

    def work(self, name: str, fails: bool = False) -> Any:
        def run() -> str:
            self.log.append(("work", name, self.current().name))
            if fails:
                raise RuntimeError(name)
            return name

        return run

    def prepared(self, slots: int) -> ParallelRegion:
        region = ParallelRegion(slots)
        region.prepare(torch.device("cuda:0"))
        del self.log[:]
        return region


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_streams", {})
        patch.setattr(lane, "_lanes", {})
        patch.setattr(torch.cuda, "Stream", cuda.make_stream)
        patch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(cuda.log, enable_timing))
        patch.setattr(torch.cuda, "current_stream", cuda.current)
        patch.setattr(torch.cuda, "stream", cuda.stream)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
        yield cuda


def check_makes_nothing(code: str) -> None:
    """Run code in a Python where a stream, an event and a CUDA context cannot be made.

    At import they would initialise CUDA before vLLM forks its workers.
    """
    refuse = (
        "import torch\n"
        "def refuse(*args, **kwargs): raise AssertionError('made at import')\n"
        "torch.cuda.Stream.__new__ = torch.cuda.Event.__new__ = torch.cuda.init = torch.cuda._lazy_init = refuse\n"
    )
    command = [sys.executable, "-c", refuse + code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
