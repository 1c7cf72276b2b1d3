"""Proof of overlap from a profiler trace: when did the two input projections of each GDN layer run?

Works on the Chrome trace that torch's profiler writes. Kernels of a replayed CUDA graph carry no layer name, so a layer
is found by what follows its projections: the causal convolution of a decode step, one kernel per GDN layer. The last
two GEMMs that end before it are the layer's `qkvz` (the longer one) and `ba`; a split-K reduction belongs to its GEMM.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

GEMM = re.compile(r"gemm|nvjet|cutlass|cublas|gemv|splitk|split_k|triton_.*mm|_mm_", re.IGNORECASE)
#: Not a projection although the name matches: routed experts.
NOT_DENSE = re.compile(r"fused_moe|moe_align|grouped|topk", re.IGNORECASE)
REDUCTION = re.compile(r"splitkreduce|split_k_reduce|reduce_1Block", re.IGNORECASE)
ANCHOR = re.compile(r"causal_conv1d_update", re.IGNORECASE)
#: The convolution follows its projections within this many microseconds.
REACH = 200.0


@dataclass(frozen=True)
class Kernel:
    """One kernel of the trace, in microseconds."""

    name: str
    start: float
    duration: float
    stream: int

    @property
    def end(self) -> float:
        return self.start + self.duration

    def overlap(self, other: Kernel) -> float:
        """Microseconds during which both ran."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


@dataclass(frozen=True)
class Pair:
    """The two projections of one GDN layer in one step."""

    qkvz: Kernel
    ba: Kernel
    until_convolution: float

    @property
    def overlap(self) -> float:
        return self.qkvz.overlap(self.ba)

    @property
    def span(self) -> float:
        """From the start of the first to the end of the last projection."""
        return max(self.qkvz.end, self.ba.end) - min(self.qkvz.start, self.ba.start)


def read_kernels(path: Path) -> list[Kernel]:
    """All kernels of a Chrome trace (`.json` or `.json.gz`), by start."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        content = json.load(file)
    return kernels_of(content["traceEvents"])


def kernels_of(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """The kernels among Chrome trace events, by start."""
    found = [
        Kernel(
            name=event["name"],
            start=float(event["ts"]),
            duration=float(event["dur"]),
            stream=int(event.get("args", {}).get("stream", event.get("tid", -1))),
        )
        for event in events
        if event.get("ph") == "X" and event.get("cat") == "kernel"
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def _is_projection(kernel: Kernel) -> bool:
    return bool(GEMM.search(kernel.name)) and not NOT_DENSE.search(kernel.name) and not REDUCTION.search(kernel.name)


def find_pairs(kernels: Sequence[Kernel]) -> list[Pair]:
    """The projections of every GDN layer in every step of the trace."""
    pairs: list[Pair] = []
    previous_end = float("-inf")
    for index, anchor in enumerate(kernels):
        if not ANCHOR.search(anchor.name):
            continue
        before: list[Kernel] = []
        for kernel in reversed(kernels[:index]):
            if kernel.start < max(previous_end, anchor.start - REACH):
                break
            if _is_projection(kernel) and kernel.end <= anchor.start + 0.5:
                before.append(kernel)
            if len(before) == 2:
                break
        previous_end = anchor.end
        if len(before) == 2:
            ba, qkvz = sorted(before, key=lambda kernel: kernel.duration)
            pairs.append(Pair(qkvz, ba, anchor.start - max(qkvz.end, ba.end)))
    return pairs


def span(kernels: Sequence[Kernel]) -> float:
    """Microseconds from the first kernel's start to the last one's end."""
    return max(kernel.end for kernel in kernels) - kernels[0].start if kernels else 0.0


def analyse(kernels: Sequence[Kernel], layers_per_step: int) -> dict[str, Any]:
    """What the trace shows: per layer of a step, the microseconds of `ba` that ran inside `qkvz`."""
    pairs = find_pairs(kernels)
    anchors = sum(1 for kernel in kernels if ANCHOR.search(kernel.name))
    result: dict[str, Any] = {
        "kernels": len(kernels),
        "streams": sorted({kernel.stream for kernel in kernels}),
        "convolutions": anchors,
        "pairs": len(pairs),
        "kernel_names": _names(kernels),
    }
    if not pairs:
        return result
    per_layer = []
    for layer in range(layers_per_step):
        mine = pairs[layer::layers_per_step]
        if not mine:
            continue
        per_layer.append(
            {
                "layer": layer,
                "overlap_us": statistics.median([pair.overlap for pair in mine]),
                "qkvz_us": statistics.median([pair.qkvz.duration for pair in mine]),
                "ba_us": statistics.median([pair.ba.duration for pair in mine]),
                "span_us": statistics.median([pair.span for pair in mine]),
                "until_convolution_us": statistics.median([pair.until_convolution for pair in mine]),
                "streams": sorted({(pair.qkvz.stream, pair.ba.stream) for pair in mine}),
            }
        )
    result |= {
        "per_layer": per_layer,
        "overlap_us": statistics.median([pair.overlap for pair in pairs]),
        "overlapping": sum(1 for pair in pairs if pair.overlap > 0),
        "on_two_streams": sum(1 for pair in pairs if pair.qkvz.stream != pair.ba.stream),
        "ba_inside_qkvz": sum(1 for pair in pairs if pair.qkvz.start <= pair.ba.start and pair.ba.end <= pair.qkvz.end),
        "qkvz_us": statistics.median([pair.qkvz.duration for pair in pairs]),
        "ba_us": statistics.median([pair.ba.duration for pair in pairs]),
        "span_us": statistics.median([pair.span for pair in pairs]),
        "pair_kernels": sorted({(pair.qkvz.name[:160], pair.ba.name[:160]) for pair in pairs}),
    }
    return result


def _names(kernels: Sequence[Kernel]) -> list[tuple[str, int, float]]:
    """Kernel names with how often and how long they ran: what to look at when no pair was found."""
    total: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        count, time = total.get(kernel.name, (0, 0.0))
        total[kernel.name] = (count + 1, time + kernel.duration)
    longest = sorted(total.items(), key=lambda item: -item[1][1])[:40]
    return [(name[:120], count, round(time, 1)) for name, (count, time) in longest]
