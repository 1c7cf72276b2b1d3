"""A lane: the auxiliary stream beside the stream that runs main work, and the two events that tie them together.

A lane is made before any capture, on the thread that will capture: a stream cannot be made and cuBLAS cannot allocate its
workspace during a capture. The memory contract is in `overlay.side_work`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from overlay.side_work import streams
from overlay.vocabulary import DUAL_MAIN_FIRST

_lanes: dict[tuple[torch.device, int], Lane | None] = {}


def lane_of(device: torch.device) -> Lane | None:
    """The lane of this thread on a device; None before `prepare`, and where no auxiliary stream can be had."""
    return _lanes.get((device, threading.get_ident()))


def prepare(device: torch.device) -> Lane | None:
    """Make this thread's lane on a device, once. Not allowed during a capture.

    None where no auxiliary stream can be had (`streams.auxiliary_stream`).
    """
    key = (device, threading.get_ident())
    if key not in _lanes:
        stream = streams.auxiliary_stream(device, key)
        _lanes[key] = None if stream == torch.cuda.current_stream() else Lane(stream)
    return _lanes[key]


def use_once(device: torch.device, start: Callable[[Lane], torch.Tensor]) -> None:
    """Prepare this thread's lane and have `start` fork on it, once; it gives the result to join.

    What libraries allocate on a stream's first use is allocated now, where vLLM counts it, and not during a capture.
    """
    found = prepare(device)
    if found is not None:
        with torch.inference_mode():
            found.join(start(found))


class Lane:
    """One auxiliary stream. Two uses::

    lane.start(result, strategy, work)   # fork; `work` fills `result` on the auxiliary stream
    ...                                  # main
    lane.join(result)                    # main's stream waits

    result = lane.start_and_give(work)   # `work` makes its own result
    ...
    lane.join(result)
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._start = torch.cuda.Event(enable_timing=False)
        self._done = torch.cuda.Event(enable_timing=False)
        #: The forks that are open, by the address of their results; each with the work that is still to be given.
        self._open: dict[int, Callable[[], Any] | None] = {}

    def start(self, result: torch.Tensor, strategy: str, work: Callable[[], Any]) -> None:
        """Fork. With "dual" the auxiliary stream gets its work now, with "dual_main_first" at the join."""
        self._start.record(torch.cuda.current_stream())
        if strategy == DUAL_MAIN_FIRST:
            self._open[result.data_ptr()] = work
        else:
            self._run(work)
            self._open[result.data_ptr()] = None

    def start_and_give(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Fork, and give the result that `work` makes on the auxiliary stream."""
        self._start.record(torch.cuda.current_stream())
        result = self._run(work)
        self._open[result.data_ptr()] = None
        return result

    def forget(self, result: torch.Tensor) -> None:
        """A result that was computed without a fork. An open fork at its address is what a failed capture has left."""
        if self._open:
            self._open.pop(result.data_ptr(), None)

    def join(self, result: torch.Tensor) -> None:
        """Have the current stream wait for the fork of `result`; nothing where it was not forked."""
        if result.data_ptr() not in self._open:
            return
        work = self._open.pop(result.data_ptr())
        if work is not None:
            self._run(work)
        torch.cuda.current_stream().wait_event(self._done)

    def _run(self, work: Callable[[], Any]) -> Any:
        """`work` on the auxiliary stream. What it raises goes on, after the stream has been joined: a dangling fork would
        hide the error behind another one at the end of the capture."""
        self.stream.wait_event(self._start)
        failed = True
        try:
            with torch.cuda.stream(self.stream):
                result = work()
            failed = False
            return result
        finally:
            self._done.record(self.stream)
            if failed:
                torch.cuda.current_stream().wait_event(self._done)
