"""Start and join on a real GPU: in CUDA graphs, bit for bit the serial result, and nothing left behind by a failure.

Delays are kernels that spin, so an order that is missing shows as a wrong value, not as luck.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]
pytest.importorskip("vllm")

from overlay.report.journal import PatchRecord  # noqa: E402
from overlay.side_work import lane, ops  # noqa: E402
from overlay.side_work.plan import Plan  # noqa: E402
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL  # noqa: E402

REPLAYS = 10_000
#: Replays where every side spins first, and for how many cycles: about 50 µs at 2 GHz, longer than main takes.
LATE_REPLAYS, LATE = 500, 100_000
TOKENS, HIDDEN, MAIN, SIDE = 8, 2048, 4096, 64
NAME = "a pair"


class Model:
    """Some layers of start, main and join; each feeds the next one. `op` is the start that they use."""

    def __init__(self, layers: int = 4, seed: int = 0, op: str = "start") -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.op = op

        def weight(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator)
            return values / columns**0.5

        self.layers = [(weight(MAIN, HIDDEN), weight(SIDE, HIDDEN), weight(HIDDEN, MAIN)) for _ in range(layers)]

    def __call__(self, x: torch.Tensor, fails: bool = False) -> torch.Tensor:
        for main_weight, side_weight, out in self.layers:
            results = self._start(x, side_weight, main_weight)
            if fails:
                raise RuntimeError("the real error")
            main = torch.mm(x, main_weight.t())
            if self.op == "start_into":
                torch.ops.vllm_overlay.join_into(results, main, x)
            else:
                torch.ops.vllm_overlay.join(results[0], main, x)
            parts = [*results[0], results[1]] if self.op == "start_into" else self._apart(results[0], main)
            x = torch.mm(main * (parts[0] * 2 + parts[1]).sum(-1, keepdim=True).sigmoid() + parts[2], out.t())
        return x

    @staticmethod
    def _apart(side: torch.Tensor, main: torch.Tensor) -> list[torch.Tensor]:
        """What stock does after both: the halves of the side's result, each in memory of its own, and zeros."""
        return [*(half.contiguous() for half in side.chunk(2, -1)), torch.zeros_like(main)]

    def _start(self, x: torch.Tensor, side_weight: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
        if self.op == "start_into":
            results = [x.new_empty((2, x.shape[0], SIDE // 2)), x.new_empty((x.shape[0], MAIN))]
            torch.ops.vllm_overlay.start_into(x, side_weight, results, gate, NAME)
            return results
        found = lane.lane_of(x.device)
        if self.op == "start" or found is None or ops.choose(x, NAME)[0] == SERIAL:
            return [torch.ops.vllm_overlay.start(x, side_weight, gate, SIDE, NAME)]

        def work() -> torch.Tensor:
            """As `start_layer` has it: what is in between and the result are allocated on the auxiliary stream."""
            result = torch.empty(x.shape[0], SIDE, device=x.device, dtype=x.dtype)
            ops.gemm(x.contiguous(), side_weight, result)
            return result

        return [found.start_and_give(work)]


@pytest.fixture
def record() -> Iterator[PatchRecord]:
    ops.define(declares_writes=True)
    record = PatchRecord()
    lane.prepare(torch.device("cuda", 0))
    yield record
    ops.planned.pop(NAME, None)


def captured(
    model: Model, x: torch.Tensor, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = model(x)
    return graph, result


@pytest.mark.parametrize("op", ["start", "start_into"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("strategy", [DUAL, DUAL_MAIN_FIRST])
def test_replays_with_changing_inputs_have_serials_bits(
    record: PatchRecord, strategy: str, tokens: int, op: str
) -> None:
    """Stock's own order is `start`'s with the plan `serial`: the GEMM, then copies and zeros of their own."""
    x = torch.zeros(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    graphs = {}
    for plan, model in ((SERIAL, Model()), (strategy, Model(op=op))):
        ops.planned[NAME] = ops.PlannedPair(Plan(plan, 256), record)
        graphs[plan] = captured(model, x)
    assert record.calls.dual_stream == len(model.layers)
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(REPLAYS):
        x.normal_()
        for graph, _ in graphs.values():
            graph.replay()
        different += (graphs[SERIAL][1].view(torch.int16) != graphs[strategy][1].view(torch.int16)).sum()
    assert int(different) == 0 and graphs[SERIAL][1].isfinite().all() and graphs[SERIAL][1].any()


@pytest.mark.parametrize("op", ["start", "start_layer", "start_into"])
@pytest.mark.parametrize("shared_pool", [False, True])
def test_two_models_take_turns(
    record: PatchRecord, monkeypatch: pytest.MonkeyPatch, op: str, shared_pool: bool
) -> None:
    """Two runners (each with a main stream and a pool), or target and drafter (one stream, one pool): they share one lane.

    Every side is late, and blocks are freed and taken between the replays: what is read too early, or written by the
    other model, has other bits.
    """
    models = [Model(4, 1, op), Model(2, 2, op)]
    inputs = [torch.zeros(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in models]
    ops.planned[NAME] = ops.PlannedPair(Plan(SERIAL, 256), record)
    expected = [captured(model, x) for model, x in zip(models, inputs, strict=True)]

    ops.planned[NAME] = ops.PlannedPair(Plan(DUAL, 256), record)
    in_time = ops.gemm

    def late(x: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None:
        torch.cuda._sleep(LATE)
        in_time(x, weight, result)

    monkeypatch.setattr(ops, "gemm", late)
    pool = torch.cuda.graph_pool_handle() if shared_pool else None
    streams = [torch.cuda.Stream() for _ in range(1 if shared_pool else 2)]
    streams = streams * (len(models) // len(streams))
    found = [captured(model, x, pool, stream) for model, x, stream in zip(models, inputs, streams, strict=True)]
    assert record.calls.dual_stream == sum(len(model.layers) for model in models)

    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for turn in range(LATE_REPLAYS):
        noise = torch.empty(1 << (10 + turn % 12), device="cuda")
        noise.fill_(float("nan"))
        for x in inputs:
            x.normal_()
        for stream, (graph, _) in zip(streams, found, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
        del noise
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for (serial, wanted), (_, result) in zip(expected, found, strict=True):
            serial.replay()
            different += (wanted.view(torch.int16) != result.view(torch.int16)).sum()
    assert int(different) == 0 and all(result.isfinite().all() and result.any() for _, result in found)


def test_the_side_runs_beside_main(record: PatchRecord) -> None:
    """In one graph, by the profiler: the side's kernel overlaps one of main's in time."""
    ops.planned[NAME] = ops.PlannedPair(Plan(DUAL, 256), record)
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    graph, _ = captured(Model(), x)
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    assert any(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))


def test_a_failure_in_a_capture_shows_its_error_and_leaves_nothing(record: PatchRecord) -> None:
    """CUDA reports unjoined work at the end of the capture; the real error is its context, so both are in the log."""
    ops.planned[NAME] = ops.PlannedPair(Plan(DUAL, 256), record)
    model, x = Model(), torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    with pytest.raises(RuntimeError) as caught, torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x, fails=True)
    errors = [caught.value, caught.value.__context__]
    assert any("the real error" in str(error) for error in errors)
    for _ in range(2):
        graph, result = captured(model, x)
        graph.replay()
        assert torch.equal(result, expected)


def test_outside_a_capture_nothing_forks(record: PatchRecord) -> None:
    ops.planned[NAME] = ops.PlannedPair(Plan(DUAL, 256), record)
    model = Model()
    model(torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16))
    assert (record.calls.dual_stream, sum(record.calls.serial.values())) == (0, len(model.layers))
