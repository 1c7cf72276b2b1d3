"""CUDA graphs of some work, and how long they take, for the scripts that time kernels without an engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch


def capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm up on a side stream, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def microseconds(graphs: Mapping[str, torch.cuda.CUDAGraph], replays: int, rounds: int = 9) -> dict[str, float]:
    """Of one replay of each graph: the median of the rounds' means. The graphs take turns, and who is first alternates."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for index in range(rounds):
        for name in list(graphs)[:: -1 if index % 2 else 1]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graphs[name].replay()
            begin.record()
            for _ in range(replays):
                graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1000 / replays)
    return {name: statistics.median(values) for name, values in samples.items()}
