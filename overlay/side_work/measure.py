"""Which strategy is fastest: measured on this GPU, in CUDA graphs, on the model's own layers.

One graph holds several layers, so each finds the L2 cache as cold as in a step. Only main's GEMM is measured
(`gemm_that_reads`), because in a compiled step the kernel before it often quantizes its input. The strategies take turns,
replay by replay, and their medians are compared. The fastest wins if it is at least 1 % faster than serial.

A measurement takes memory for the results of a few GEMMs. At the end it frees that, its stream, and the libraries' work
space on this stream (unless the process has CUDA graphs already). It takes no number from torch's default random
generators.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from overlay.side_work import streams
from overlay.vocabulary import SERIAL

#: The fastest strategy may take at most this part of serial's time.
ADVANTAGE = 0.99
ROUNDS = 15
#: Layers in one graph: within these bounds, enough that their weights are this many times the L2 cache.
CACHE_SIZES = 3
FEWEST_LAYERS, MOST_LAYERS = 8, 24
#: Sizes that are measured first. A size between two with different strategies is measured too.
MILESTONES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

#: One layer's work by one strategy: from the layer's number in the graph and the input to the results.
Work = Callable[[int, torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """One number of tokens: the time of each strategy in microseconds per layer, and the choice."""

    tokens: int
    microseconds: dict[str, float]
    strategy: str


@dataclass
class Measurement:
    """A stream of its own, and one work for each strategy; "serial" is one of them.

    A work gets the number of one of `layers` layers, and an input of (tokens, hidden). Two uses::

        with Measurement({"serial": ..., "dual": ...}, layers=8, hidden=2048, dtype=torch.bfloat16, device=device) as measurement:
            row = measurement.row(64)

        rows = measurement.rows(sizes, seconds=3.0)
    """

    works: Mapping[str, Work]
    layers: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    #: Called with each new input before any work gets it.
    prepare: Callable[[torch.Tensor], None] = lambda _: None
    stream: torch.cuda.Stream = field(init=False)

    def __post_init__(self) -> None:
        self._random = torch.Generator(self.device)
        self._random.manual_seed(0)

    def __enter__(self) -> Measurement:
        self._keeps_workspaces = _graphs_exist()
        self.stream = streams.unused_stream(self.device) or torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()  # the pool lives as long as a graph of it
        with torch.cuda.stream(self.stream):
            self._anchor.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            torch.zeros((), device=self.device)
            self._anchor.capture_end()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self.device)
        del self._anchor
        # Otherwise cuBLAS keeps the work space of these streams for ever. torch can free that of all streams or of none. A
        # captured graph (another engine's in this process) still writes to its own; if there is one, all of it stays.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None and not self._keeps_workspaces:
            clear()
        torch.cuda.empty_cache()

    def rows(self, sizes: Sequence[int], seconds: float) -> list[Row]:
        """Measure `sizes` for about `seconds`, at least the milestones among them. Returns a row for each, in order of
        size.

        A size that is not measured gets its neighbours' strategy if both have the same one, else serial.
        """
        deadline = time.perf_counter() + seconds
        ordered = sorted(set(sizes))
        measured = {tokens: self.row(tokens) for tokens in _milestones(sizes)}
        while time.perf_counter() < deadline:
            undecided = [size for size in ordered if size not in measured and _neighbours(size, measured) is None]
            if not undecided:
                break
            tokens = undecided[len(undecided) // 2]
            measured[tokens] = self.row(tokens)
        return [measured.get(tokens) or Row(tokens, {}, _neighbours(tokens, measured) or SERIAL) for tokens in ordered]

    def row(self, tokens: int) -> Row:
        """Measure one number of tokens."""
        with torch.cuda.stream(self.stream), torch.inference_mode():
            shape = (tokens, self.hidden)
            inputs = torch.randn(shape, device=self.device, dtype=self.dtype, generator=self._random)
            self.prepare(inputs)
            times = {name: round(value, 2) for name, value in self._times(self.works, inputs).items()}
        return Row(tokens, times, best(times))

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
        """One graph of all layers. All graphs share a pool, because nobody reads their results.

        `torch.cuda.graph` would collect garbage each time, which takes longer in a loaded vLLM than the measurement.
        """
        work(0, inputs)  # outside the capture first, because a kernel's first use sets things up
        graph = torch.cuda.CUDAGraph()
        self.stream.synchronize()
        # thread_local: other threads (such as NCCL's watchdog) may call CUDA meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            for layer in range(self.layers):
                work(layer, inputs)
        finally:
            graph.capture_end()
        return graph


def best(times: Mapping[str, float]) -> str:
    """The strategy to choose, from the time of each. "serial" is one of them."""
    fastest = min(times, key=lambda name: times[name])
    return fastest if times[fastest] <= ADVANTAGE * times[SERIAL] else SERIAL


class _Reader(TorchDispatchMode):  # type: ignore[misc]
    """Notes the first call of an op that reads a tensor, or a view of it."""

    def __init__(self, read: torch.Tensor) -> None:
        super().__init__()
        self._storage = read.untyped_storage().data_ptr()
        self.call: Callable[[], Any] | None = None

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        makes_a_view = any(given.alias_info and not given.alias_info.is_write for given in function._schema.returns)
        if self.call is None and not makes_a_view and any(map(self._reads, tree_leaves((arguments, named)))):
            self.call = functools.partial(function, *arguments, **named)
        return result

    def _reads(self, argument: Any) -> bool:
        return isinstance(argument, torch.Tensor) and argument.untyped_storage().data_ptr() == self._storage


def gemm_that_reads(weight: torch.Tensor, whole: Callable[[], Any]) -> Callable[[], Any]:
    """The one call inside `whole` that reads `weight`, with its arguments; `whole` itself if no op reads the weight."""
    with _Reader(weight) as reader:
        whole()
    return reader.call or whole


def layers_for(weight_bytes: int, available: int, device: torch.device) -> int:
    """How many layers, of `weight_bytes` each, a graph needs so that each finds the L2 cache cold."""
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20)
    wanted = -(-CACHE_SIZES * cache // max(weight_bytes, 1))
    return max(1, min(available, MOST_LAYERS, max(FEWEST_LAYERS, wanted)))


def _graphs_exist() -> bool:
    """Whether this process has CUDA graphs. Each has a memory pool of its own, beside the common one."""
    return any(tuple(segment["segment_pool_id"]) != (0, 0) for segment in torch.cuda.memory_snapshot())


def _milestones(sizes: Sequence[int]) -> list[int]:
    """The smallest size, the largest size, and for each milestone the nearest size that is not below it."""
    ordered = sorted(set(sizes))
    chosen = {ordered[0], ordered[-1]} if ordered else set()
    for milestone in MILESTONES:
        above = [size for size in ordered if size >= milestone]
        if above:
            chosen.add(above[0])
    return sorted(chosen)


def _neighbours(tokens: int, measured: Mapping[int, Row]) -> str | None:
    """The strategy of the measured sizes on both sides, if it is the same."""
    below = max((size for size in measured if size < tokens), default=None)
    above = min((size for size in measured if size > tokens), default=None)
    around = {measured[size].strategy for size in (below, above) if size is not None}
    return around.pop() if len(around) == 1 else None
