"""Fork and join of one step's independent work within one custom op (`ParallelRegion`); and the owners of the CUDA streams.

The memory contract is in `overlay.side_work`. A region joins every fork before `run` returns, so no fork spans a piecewise
or breakable CUDA graph segment. Inputs stay alive, because the main stream cannot pass the join before the auxiliary work
has read them. Results of a slot are allocated on its auxiliary stream.

There is one stream for each device, main stream and slot. It is made on first use, never at import (that would initialise
CUDA before the process forks) and never during capture. Events belong to one region (one layer), because a captured graph
refers to them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]

#: torch has this many streams per device, and hands them out in turn.
STREAMS_OF_TORCH = 32

#: By device, main stream and slot: the auxiliary stream, or the main stream itself if there was no other.
_streams: dict[tuple[torch.device, torch.cuda.Stream, Hashable], torch.cuda.Stream] = {}


def auxiliary_stream(device: torch.device, slot: Hashable) -> torch.cuda.Stream:
    """The auxiliary stream of a slot, next to the current stream. Made on first use; all who ask for the slot share it.

    It is never a main stream, and never that of another slot or main stream. If torch has no such stream left, or the
    allocator is not torch's own, it is the current stream: right results, serial work.
    """
    main_stream = torch.cuda.current_stream()
    key = (device, main_stream, slot)
    if key not in _streams:
        found = unused_stream(device) if torch.cuda.get_allocator_backend() == "native" else None
        _streams[key] = main_stream if found is None else found
    return _streams[key]


def unused_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that is not the current one, and no main or auxiliary stream of this process; None if torch has none left."""
    taken = {torch.cuda.current_stream(), *_streams.values(), *(main for _, main, _ in _streams)}
    made = (torch.cuda.Stream(device=device) for _ in range(STREAMS_OF_TORCH))
    return next((stream for stream in made if stream not in taken), None)


class ParallelRegion:
    """One default callable on the current stream, and `slots` auxiliary callables next to it.

    Two uses::

        region = ParallelRegion(slots=1)
        region.prepare(device)                     # outside capture
        main, (side,) = region.run(big_gemm, [small_gemm])

        main, (a, _, c) = ParallelRegion(slots=3).run_serially(work, [work_a, None, work_c])
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a parallel region has at least one auxiliary slot, not {slots}")
        self.slots = slots
        self._auxiliary_streams: list[torch.cuda.Stream] = []
        self._start: torch.cuda.Event | None = None
        self._done: list[torch.cuda.Event] = []

    @property
    def prepared(self) -> bool:
        return self._start is not None

    def prepare(self, device: torch.device) -> None:
        """Make the streams and events. Raises RuntimeError while a CUDA graph is captured on the current stream."""
        if self.prepared:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a parallel region must be prepared before a CUDA graph is captured")
        self._auxiliary_streams = [auxiliary_stream(device, slot) for slot in range(self.slots)]
        self._done = [torch.cuda.Event(enable_timing=False) for _ in range(self.slots)]
        self._start = torch.cuda.Event(enable_timing=False)

    def _check(self, auxiliary: Sequence[Work | None]) -> None:
        if len(auxiliary) != self.slots:
            raise ValueError(f"this parallel region has {self.slots} auxiliary slots, got {len(auxiliary)} callables")

    def run(self, default: Work, auxiliary: Sequence[Work | None]) -> tuple[Any, tuple[Any, ...]]:
        """Fork, run, join. A slot that is None costs nothing and gives None.

        Raises what a callable raises, but first joins every slot that was launched, because an open fork would spoil a
        capture.
        """
        self._check(auxiliary)
        start = self._start
        if start is None:
            raise RuntimeError("this parallel region has not been prepared")
        main_stream = torch.cuda.current_stream()
        results: list[Any] = [None] * self.slots
        launched: list[int] = []
        try:
            if any(work is not None for work in auxiliary):
                start.record(main_stream)
            for slot, work in enumerate(auxiliary):
                if work is None:
                    continue
                stream = self._auxiliary_streams[slot]
                stream.wait_event(start)
                launched.append(slot)
                with torch.cuda.stream(stream):
                    results[slot] = work()
            default_result = default()
        finally:
            for slot in launched:
                self._done[slot].record(self._auxiliary_streams[slot])
                main_stream.wait_event(self._done[slot])
        return default_result, tuple(results)

    def run_serially(self, default: Work, auxiliary: Sequence[Work | None]) -> tuple[Any, tuple[Any, ...]]:
        """The same work on the current stream, in upstream's order: default first."""
        self._check(auxiliary)
        default_result = default()
        return default_result, tuple(None if work is None else work() for work in auxiliary)
