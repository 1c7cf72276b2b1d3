"""Which strategy is fastest here: measured on this GPU, in CUDA graphs, over the model's own weights.

Several layers stand in one graph, so that each finds the L2 cache as cold as in a step. Strategies take turns, replay by
replay; medians are compared. The fastest wins if it is at least 1 % faster than serial; of those that are as fast as it, the
one with the fewest kernels and forks.

A strategy whose result differs from serial in any bit is left out, unless it is asked for with `inexact`. Two kernels that
add in another order differ in few of the rounded results of usual numbers: a comparison of some thousand values can miss
it (seen on an H200: 5120 to 4096 + 24 columns as one GEMM, 1 to 24 tokens). So the comparison runs on weights and inputs
whose products cancel: what is left is nothing but the order's rounding errors, in all bits of every result.

What it costs: memory for the results of a few GEMMs and for one more layer's weights, freed at the end together with its
streams and (unless the process has CUDA graphs already) the libraries' work space on them; no number of torch's random
generators.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from overlay import streams
from overlay.plan import DUAL, DUAL_MAIN_FIRST, FUSED, SERIAL

#: The fastest strategy has to take at most this part of serial's time.
ADVANTAGE = 0.99
#: Times that are this close to each other are the same.
TIE = 1.005
#: What is taken of strategies that are as fast as each other.
PREFERENCE = (FUSED, DUAL_MAIN_FIRST, DUAL)
ROUNDS = 15
#: Layers in one graph: enough that their weights are this many times the L2 cache, and in these bounds.
CACHE_SIZES = 3
FEWEST_LAYERS, MOST_LAYERS = 8, 24
#: Sizes that are measured at first; one between two of different strategies is measured as well.
MILESTONES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
#: How often serial is repeated before its bits are believed to be always the same.
REPETITIONS = 8
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: One layer's work by a strategy: its number in the graph and the input, to its results.
Work = Callable[[int, torch.Tensor], Sequence[torch.Tensor]]
#: The number of the layer whose weights cancel.
CANCELLING = -1


@dataclass(frozen=True)
class Row:
    """One number of tokens: microseconds per layer by strategy, those whose bits are not serial's, and the choice."""

    tokens: int
    microseconds: dict[str, float]
    strategy: str
    inexact: tuple[str, ...] = ()


@dataclass
class Bench:
    """A stream of its own, and the works by strategy; "serial" is one of them.

    A work is called with the number of one of `layers` layers, or with CANCELLING where `cancels` says that there is a
    layer whose weights came from `weights`.

    Two uses::

        with Bench({"serial": ..., "dual": ...}, layers=8, hidden=2048, dtype=torch.bfloat16, device=device) as bench:
            row = bench.row(64)

        rows = bench.rows(sizes, seconds=3.0)
    """

    works: Mapping[str, Work]
    layers: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    inexact: bool = False
    cancels: bool = False
    same_kernels: tuple[str, ...] = ()  #: the works that run serial's own kernels, in another order or place
    stream: torch.cuda.Stream = field(init=False)

    def __post_init__(self) -> None:
        self._random = torch.Generator(self.device)
        self._random.manual_seed(0)
        order = torch.randperm(self.hidden, device=self.device, generator=self._random)
        self._halves = order[: self.hidden // 2], order[self.hidden // 2 : self.hidden // 2 * 2]

    def __enter__(self) -> Bench:
        self._keeps_workspaces = _graphs_exist()
        # A main stream of somebody else's would lose its auxiliary streams at the end.
        self.stream = streams.unused_stream(self.device) or torch.cuda.Stream(self.device)
        self.wait()
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()  # a pool lives as long as a graph of it
        with torch.cuda.stream(self.stream):
            self._anchor.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            torch.zeros((), device=self.device)
            self._anchor.capture_end()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)
        del self._anchor
        streams.forget(self.stream)
        # Work space that cuBLAS got for these streams stays with them for ever otherwise. torch lets go of all streams' or of
        # none's, and a captured graph (of another engine in this process) goes on writing to the one that it was captured
        # with; so then it stays.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None and not self._keeps_workspaces:
            clear()
        torch.cuda.empty_cache()

    def wait(self) -> None:
        """Have the stream wait for what has been done on the current one."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def weights(self, rows: int) -> torch.Tensor:
        """(rows, hidden) weights for the layer CANCELLING."""
        with torch.cuda.stream(self.stream):
            weights = self._numbers(rows)
            weights[:, self._halves[1]] = -weights[:, self._halves[0]]
        return weights

    def rows(self, sizes: Sequence[int], seconds: float) -> list[Row]:
        """Measure `sizes`, at least the milestones among them, for about `seconds`; in the order of the sizes.

        A size that is not measured gets its neighbours' strategy where both have the same and its bits are serial's,
        else serial. Bits are compared at every size.
        """
        deadline = time.perf_counter() + seconds
        different = {tokens: self._inexact(tokens) for tokens in sorted(set(sizes))}
        measured: dict[int, Row] = {}
        for tokens in _milestones(sizes):
            measured[tokens] = self._measure(tokens, different[tokens])
        while time.perf_counter() < deadline:
            undecided = [size for size in different if size not in measured and _neighbours(size, measured) is None]
            if not undecided:
                break
            tokens = undecided[len(undecided) // 2]
            measured[tokens] = self._measure(tokens, different[tokens])
        return [
            measured.get(tokens) or self._as_neighbours(tokens, measured, inexact)
            for tokens, inexact in different.items()
        ]

    def row(self, tokens: int) -> Row:
        """Measure one number of tokens."""
        return self._measure(tokens, self._inexact(tokens))

    def exact_at(self, name: str, sizes: Sequence[int]) -> list[int]:
        """Those of `sizes` at which a strategy's results are serial's, bit for bit; one that finds no memory is not."""
        found = []
        for tokens in sizes:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                if name not in self._inexact(tokens):
                    found.append(tokens)
        return found

    def _inexact(self, tokens: int) -> tuple[str, ...]:
        """The strategies whose results are not serial's, bit for bit."""
        with torch.cuda.stream(self.stream), torch.inference_mode():
            inputs = self._numbers(tokens)
            if self.cancels:
                inputs[:, self._halves[1]] = inputs[:, self._halves[0]]
            layer = CANCELLING if self.cancels else 0
            expected = self.works[SERIAL](layer, inputs)
            if not all(result.any() for result in expected):  # says nothing
                return tuple(name for name in self.works if name != SERIAL)
            found = tuple(
                name for name, work in self.works.items() if name != SERIAL and not _same(work(layer, inputs), expected)
            )
            if found and not all(_same(self.works[SERIAL](layer, inputs), expected) for _ in range(REPETITIONS)):
                # A kernel of serial's own adds in an order that varies. Those that run the same kernels are as good.
                found = tuple(name for name in found if name not in self.same_kernels)
            return found

    def _numbers(self, rows: int) -> torch.Tensor:
        """(rows, hidden) random numbers of many magnitudes, so that sums of their products have to be rounded."""
        numbers = torch.empty((rows, self.hidden), device=self.device, dtype=self.dtype)
        numbers.normal_(generator=self._random)
        for part in numbers.split(1024):  # a few rows at a time, to need little memory
            powers = torch.randint(-4, 5, part.shape, device=self.device, generator=self._random, dtype=torch.int8)
            part.mul_(powers.to(self.dtype).exp2_())
        return numbers

    def _measure(self, tokens: int, inexact: tuple[str, ...]) -> Row:
        with torch.cuda.stream(self.stream), torch.inference_mode():
            works = {name: work for name, work in self.works.items() if self.inexact or name not in inexact}
            shape = (tokens, self.hidden)
            inputs = torch.randn(shape, device=self.device, dtype=self.dtype, generator=self._random)
            times = self._times(works, inputs)
        times = {name: round(value, 2) for name, value in times.items()}
        return Row(tokens, times, best(times), inexact)

    def _as_neighbours(self, tokens: int, measured: Mapping[int, Row], inexact: tuple[str, ...]) -> Row:
        strategy = _neighbours(tokens, measured) or SERIAL
        usable = self.inexact or strategy not in inexact
        return Row(tokens, {}, strategy if usable else SERIAL, inexact)

    def _times(self, works: Mapping[str, Work], inputs: torch.Tensor) -> dict[str, float]:
        """Microseconds per layer by strategy: medians over replays that take turns."""
        graphs = {name: self._capture(work, inputs) for name, work in works.items()}
        laps: dict[str, list[tuple[Any, Any]]] = {name: [] for name in graphs}
        for number in range(ROUNDS + 1):
            turn = list(graphs) if number % 2 else list(reversed(graphs))
            for name in turn:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graphs[name].replay()
                end.record()
                if number:  # the first replay uploads the graph
                    laps[name].append((begin, end))
        self.stream.synchronize()
        return {
            name: median(begin.elapsed_time(end) for begin, end in pairs) * 1000.0 / self.layers
            for name, pairs in laps.items()
        }

    def _capture(self, work: Work, inputs: torch.Tensor) -> torch.cuda.CUDAGraph:
        """One graph of all layers. Without `torch.cuda.graph`, which collects garbage each time: that takes longer in a
        loaded vLLM than the measurement. All graphs share a pool, for nobody reads their results."""
        work(0, inputs)  # outside capture first, for what a kernel sets up on its first use
        graph = torch.cuda.CUDAGraph()
        self.stream.synchronize()
        # Other threads (a watchdog of NCCL's) may call CUDA meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            for layer in range(self.layers):
                work(layer, inputs)
        finally:
            graph.capture_end()
        return graph


def best(times: Mapping[str, float]) -> str:
    """The strategy to take, of these times by strategy; serial is one of them."""
    fastest, enough = min(times.values()), ADVANTAGE * times[SERIAL]
    if fastest > enough:
        return SERIAL
    as_fast = [name for name, value in times.items() if value <= min(TIE * fastest, enough)]
    return next((name for name in PREFERENCE if name in as_fast), as_fast[0])


def layers_for(weight_bytes: int, available: int, device: torch.device) -> int:
    """How many layers of so many bytes a graph needs to find the L2 cache cold."""
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20)
    wanted = -(-CACHE_SIZES * cache // max(weight_bytes, 1))
    return max(1, min(available, MOST_LAYERS, max(FEWEST_LAYERS, wanted)))


def _graphs_exist() -> bool:
    """Whether this process has CUDA graphs: each has a memory pool of its own, beside that of everybody."""
    return any(tuple(segment["segment_pool_id"]) != (0, 0) for segment in torch.cuda.memory_snapshot())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in every bit: NaN equals itself here, and 0 is not -0."""
    kind = BITS[left.element_size()]
    return bool(torch.equal(left.view(kind), right.view(kind)))


def _same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(same_bits(*pair) for pair in zip(left, right, strict=True))


def _milestones(sizes: Sequence[int]) -> list[int]:
    """The sizes nearest to the milestones from above, and the smallest and the largest one."""
    ordered = sorted(set(sizes))
    chosen = {ordered[0], ordered[-1]} if ordered else set()
    for milestone in MILESTONES:
        above = [size for size in ordered if size >= milestone]
        if above:
            chosen.add(above[0])
    return sorted(chosen)


def _neighbours(tokens: int, measured: Mapping[int, Row]) -> str | None:
    """The strategy of the measured sizes on both sides, where it is the same."""
    below = max((size for size in measured if size < tokens), default=None)
    above = min((size for size in measured if size > tokens), default=None)
    around = {measured[size].strategy for size in (below, above) if size is not None}
    return around.pop() if len(around) == 1 else None
