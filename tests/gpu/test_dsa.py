"""The layer of DeepSeek-V3.2's shape on a real GPU, in vLLM's own breakable CUDA graphs: stock's bits, beside main.

The layer has upstream's order of calls: two projections of one input, an eager break that reads both, and one more
projection. Its sizes are DeepSeek-V3.2's.
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
breakable = pytest.importorskip("vllm.compilation.breakable_cudagraph", reason="this vLLM has no breakable CUDA graphs")

from overlay.patches.dsa.patch import PROJECTIONS  # noqa: E402
from overlay.report.journal import PatchRecord  # noqa: E402
from overlay.side_work import lane, ops  # noqa: E402
from overlay.side_work.pairs import Pair  # noqa: E402
from overlay.side_work.plan import NOT_CAPTURING, Plan  # noqa: E402
from overlay.side_work.waiting import PAIR  # noqa: E402
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST  # noqa: E402

HIDDEN, MAIN, KEY, HEADS = 7168, 2112, 128, 64
LAYERS, REPLAYS, LATE_REPLAYS, LATE = 4, 2_000, 300, 100_000


class Linear(torch.nn.Module):
    def __init__(self, columns: int, rows: int, generator: torch.Generator) -> None:
        super().__init__()
        values = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator) / columns**0.5
        self.weight = torch.nn.Parameter(values, requires_grad=False)
        self.input_size, self.params_dtype = columns, torch.bfloat16

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


class Indexer(torch.nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.head_dim = KEY
        self.wk_weights_proj = Linear(HIDDEN, KEY + HEADS, generator)


class Layer(torch.nn.Module):
    """Upstream's order of calls, with something short in the place of the attention."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.fused_qkv_a_proj = Linear(HIDDEN, MAIN, generator)
        self.indexer = Indexer(generator)
        self.o_proj = Linear(MAIN, HIDDEN, generator)
        self.skip_topk = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.fused_qkv_a_proj(hidden_states)[0]
        if self.indexer is not None and not self.skip_topk:
            kw = self.indexer.wk_weights_proj(hidden_states)[0]
            keys, weights = kw[:, : self.indexer.head_dim], kw[:, self.indexer.head_dim :]
        else:
            keys = weights = qkv[:, :HEADS]
        output = torch.empty_like(qkv)
        self.attend(qkv, keys, weights, output)
        return self.o_proj(output)[0]

    @breakable.eager_break_during_capture  # type: ignore[untyped-decorator]
    def attend(self, qkv: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, output: torch.Tensor) -> None:
        output.copy_(qkv * keys.float().sum(-1, keepdim=True).sigmoid() + weights.float().mean(-1, keepdim=True))


PATCHED = PROJECTIONS.intercept(Layer.forward, traced=False)


@pytest.fixture(scope="module")
def model() -> list[Layer]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [Layer(generator) for _ in range(LAYERS)]


@pytest.fixture
def record(model: list[Layer]) -> Iterator[PatchRecord]:
    made = PatchRecord()
    lane.prepare(torch.device("cuda", torch.cuda.current_device()))
    for number, layer in enumerate(model):
        side = layer.indexer.wk_weights_proj
        pair = Pair(str(number), layer.fused_qkv_a_proj, side, MAIN, KEY + HEADS, "bf16", "bf16", "weight", True, False)
        setattr(layer, PAIR, pair)
    yield made
    ops.planned.clear()


def plan(model: list[Layer], record: PatchRecord, strategy: str) -> None:
    ops.planned[getattr(model[0], PAIR).name] = ops.PlannedPair(Plan(strategy, 256), record)


def run(model: list[Layer], forward: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in model:
        x = forward(layer, x)
    return x


def captured(model: list[Layer], forward: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """vLLM's capture of all layers, each in two segments, in one memory pool as vLLM's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        run(model, forward, x)
        stream.synchronize()
        with breakable.BreakableCUDAGraphCapture(pool=torch.cuda.graph_pool_handle()) as capture:
            result = run(model, forward, x)
    assert capture.num_graphs == LAYERS + 1 and capture.num_eager_breaks == LAYERS
    return capture, result


def differences(model: list[Layer], tokens: int, replays: int) -> int:
    x = torch.zeros(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    stock, wanted = captured(model, Layer.forward, x)
    overlaid, found = captured(model, PATCHED, x)
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    with torch.inference_mode():
        for _ in range(replays):
            x.normal_()
            stock.replay()
            overlaid.replay()
            different += (wanted.view(torch.int16) != found.view(torch.int16)).sum()
    assert wanted.isfinite().all() and wanted.any()
    return int(different)


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("strategy", [DUAL, DUAL_MAIN_FIRST])
def test_replays_have_stocks_bits(model: list[Layer], record: PatchRecord, strategy: str, tokens: int) -> None:
    plan(model, record, strategy)
    assert differences(model, tokens, REPLAYS) == 0
    # The run before the capture is none, and there the real layer runs.
    assert record.calls.dual_stream == LAYERS and record.calls.serial == {NOT_CAPTURING: LAYERS}


def test_a_late_side_is_waited_for_within_its_segment(
    model: list[Layer], record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every side spins first, longer than main takes: what is read before the join has other bits."""
    in_time = ops.gemm

    def late(x: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None:
        torch.cuda._sleep(LATE)
        in_time(x, weight, result)

    monkeypatch.setattr(ops, "gemm", late)
    plan(model, record, DUAL)
    assert differences(model, 8, LATE_REPLAYS) == 0


def test_the_side_runs_beside_main(model: list[Layer], record: PatchRecord) -> None:
    """In every layer, by the profiler: the side's kernel is on another stream, and overlaps one of main's stream."""
    plan(model, record, DUAL)
    x = torch.randn(8, HIDDEN, device="cuda", dtype=torch.bfloat16)
    capture, _ = captured(model, PATCHED, x)
    with torch.inference_mode():  # what stands between two segments is run again by a replay
        capture.replay()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            capture.replay()
            torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    overlapping = sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))
    assert overlapping >= LAYERS
