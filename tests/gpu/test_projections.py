"""The pair of projections on a real GPU: two streams in a CUDA graph, bit for bit the serial result.

The arrangements are the ones that `benchmarks/gpu_evidence.py` measures; here they are checked, in seconds.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]


@pytest.fixture(scope="module")
def micro() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from gpu import micro
    finally:
        sys.path.pop(0)
    return micro


def test_replays_with_changing_inputs_are_bit_identical_to_serial(micro: ModuleType) -> None:
    found = micro.replay(replays=500)
    assert [row["different"] for row in found["rows"]] == [0] * len(found["rows"])
    assert all(row["inputs_changed"] >= 499 and row["finite"] for row in found["rows"])


def test_two_streams_hide_most_of_the_small_gemm(micro: ModuleType) -> None:
    (row,) = [
        row for row in micro.graph_times(tokens=(8,)) if row["shape"] == "35B TP1"
    ]  # ratios of one run; no absolute times, those belong to a GPU's name
    hidden = (row["serial"] - row["dual"]) / (row["serial"] - row["qkvz_alone"])
    assert hidden > 0.5


def test_preparing_inside_a_capture_is_refused(micro: ModuleType) -> None:
    from overlay.side_work.streams import ParallelRegion

    region = ParallelRegion(slots=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        region.prepare(torch.device("cuda"))


def test_a_failing_callable_leaves_no_dangling_fork(micro: ModuleType) -> None:
    from overlay.side_work.streams import ParallelRegion

    region = ParallelRegion(slots=1)
    region.prepare(torch.device("cuda"))
    values = torch.ones(8, device="cuda")

    def fails() -> None:
        raise ZeroDivisionError

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ZeroDivisionError):
            region.run(fails, [lambda: values.add_(1)])
        values.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert values.tolist() == [4.0] * 8
