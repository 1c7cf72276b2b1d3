"""Measured plans on a real GPU: what is chosen is fast, changes no bit, and leaves nothing behind."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]
pytest.importorskip("vllm")

from overlay import pair_plans  # noqa: E402
from overlay.journal import PatchRecord  # noqa: E402
from overlay.pair import LinearPair  # noqa: E402
from overlay.side_work.pairs import Candidate  # noqa: E402
from overlay.side_work.plan import FUSED, SERIAL, Plan, SizePlan  # noqa: E402
from overlay.settings import Settings  # noqa: E402
from overlay.side_work.measure import same_bits  # noqa: E402

SIZES = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, *range(136, 513, 8)]
#: Name, hidden size, columns of qkvz and of ba, layers.
SHAPES = {
    "35B TP1": (2048, 12288, 64, 30),
    "35B TP4": (2048, 3072, 16, 30),
    "27B TP1": (5120, 16384, 96, 16),
    "27B TP4": (5120, 4096, 24, 48),
}


class UnquantizedLinearMethod:
    """Tells the overlay, which goes by this name, that the GEMM is torch's own."""

    @staticmethod
    def default_unquantized_gemm() -> None: ...

    _gemm_impl = default_unquantized_gemm


class Linear(torch.nn.Module):
    """A linear in vLLM's manner: gives its result and no bias."""

    def __init__(self, hidden: int, columns: int) -> None:
        super().__init__()
        weight = torch.randn(columns, hidden, device="cuda", dtype=torch.bfloat16) * hidden**-0.5
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()
        self.input_size, self.params_dtype = hidden, torch.bfloat16

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(inputs, self.weight), None


def candidates(shape: str, record: PatchRecord, takes_slices: bool = True) -> list[Candidate]:
    hidden, main, side, layers = SHAPES[shape]
    made = []
    for index in range(layers):
        pair = LinearPair(main, side, Plan("dual", 256), record)
        pair.plain = True
        made.append(Candidate(f"layer.{index}", pair, Linear(hidden, main), Linear(hidden, side), takes_slices))
    return made


def places(group: list[Candidate]) -> list[tuple[int, int]]:
    """Where the weights lie."""
    return [(one.main.weight.data_ptr(), one.side.weight.data_ptr()) for one in group]


def worker(
    sizes: list[int] | None = None, sleep: bool = False, largest: int = 8192, mode: str = "FULL_AND_PIECEWISE"
) -> Any:
    compilation = types.SimpleNamespace(
        cudagraph_capture_sizes=SIZES if sizes is None else sizes,
        cudagraph_mode=types.SimpleNamespace(name=mode),
    )
    config = types.SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=largest),
        model_config=types.SimpleNamespace(enable_sleep_mode=sleep),
    )
    return types.SimpleNamespace(vllm_config=config, rank=0)


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Settles candidates with the plans' folder in `tmp_path`; gives what stays stock."""
    monkeypatch.setattr(pair_plans, "_folder", lambda: str(tmp_path / "plans"))
    torch.manual_seed(0)

    def run(
        group: list[Candidate],
        record: PatchRecord,
        settings: Settings | None = None,
        above_is_stock: bool = True,
        **which: Any,
    ) -> Any:
        return pair_plans.settle(group, worker(**which), settings or Settings(), record, above_is_stock)

    yield run
    torch.cuda.empty_cache()


#: The plan, and whether steps above the captured sizes run stock's graph: then `auto` has one GEMM among its strategies.
ways = pytest.mark.parametrize(
    ("setting", "above_is_stock"),
    [("auto", False), ("auto", True), ("fused", True)],
    ids=["auto, op above the graphs", "auto", "fused"],
)


@ways
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_measured_in_time_and_leaves_nothing(
    settle: Callable[..., Any], shape: str, setting: str, above_is_stock: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the comparison at 8192 tokens, whose results are as large as a step's, it needs little memory."""
    record = PatchRecord()
    settle(candidates("35B TP4", record)[:8], record, sizes=[1])  # loads the libraries' kernels
    record = PatchRecord()
    group = candidates(shape, record)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, state = torch.cuda.mem_get_info()[0], torch.cuda.get_rng_state()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert settle(group, record, Settings(plan=setting), above_is_stock, largest=512) == {}
    (plan,) = record.plans
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    left = (free - torch.cuda.mem_get_info()[0]) / 2**20
    with capsys.disabled():
        way = f"{setting}, {'stock' if above_is_stock else 'the op'} above the graphs"
        print(f"\n{shape}, {way}: {plan['seconds']} s, peak {peak:.0f} MiB, left {left:.0f} MiB")
        for row in plan["rows"]:
            if row["us"]:
                print(f"  {row['tokens']:5d} {row['strategy']:16s} {row['us']} {row['inexact']}")
    assert torch.equal(torch.cuda.get_rng_state(), state), "torch's generator was used"
    assert plan["seconds"] < 3.0
    _, columns, side, layers = SHAPES[shape]
    weights = (columns + side) * SHAPES[shape][0] * 2 / 2**20
    assert peak < 100 + 2 * weights and left < 10 + 2 * layers  # torch's allocator rounds each buffer up to 2 MiB
    assert [row["tokens"] for row in plan["rows"]] == SIZES
    for row in plan["rows"]:
        assert row["strategy"] not in row["inexact"]
        fixed = setting == "fused" and row["strategy"] == FUSED
        if row["us"] and row["strategy"] != SERIAL and not fixed:
            assert row["us"][row["strategy"]] <= 0.99 * row["us"][SERIAL]
    if not above_is_stock:
        assert not any(one.pair.one_result for one in group)


def test_an_order_that_few_rounded_results_show_is_seen() -> None:
    """5120 to 24 columns alone, and as a part of 4120: on an H200 the kernels add in different orders, which random
    numbers show in about one of ten thousand results."""
    from overlay.side_work.measure import Bench

    def two(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(inputs, weights[4096:4120])]

    def one(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(inputs, weights)[:, 4096:4120]]

    def again(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        return two(layer, inputs)

    works = {"serial": two, "one": one, "again": again}
    with Bench(works, 1, 5120, torch.bfloat16, torch.device("cuda"), cancels=True) as bench:
        weights = bench.weights(4128)
        sizes = [1, 2, 4, 8, 16, 24, 64, 256]
        assert bench.exact_at("again", sizes) == sizes
        exact = bench.exact_at("one", sizes)
    if torch.cuda.get_device_name() == "NVIDIA H200":
        assert exact == []


@ways
@pytest.mark.parametrize("shape", ["35B TP1", "27B TP4"])
def test_what_is_captured_by_the_plan_has_serials_bits(
    settle: Callable[..., Any], shape: str, setting: str, above_is_stock: bool
) -> None:
    record = PatchRecord()
    group = candidates(shape, record)[:4]
    before = [(one.main.weight.clone(), one.side.weight.clone()) for one in group]
    settle(group, record, Settings(plan=setting), above_is_stock)
    hidden = SHAPES[shape][0]
    for tokens in (1, 8, 56, 64, 128, 200, 256, 512, 600):
        static = torch.zeros(tokens, hidden, device="cuda", dtype=torch.bfloat16)

        def work(static: torch.Tensor = static) -> list[Any]:
            results = []
            for one in group:
                if one.pair.one_result:
                    results.append(one.pair.slices(one.pair.project_into_one(one.main, one.side, static)))
                else:
                    results.append(one.pair.project(one.main, one.side, static))
            return results

        with torch.inference_mode():
            work()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = work()
            for _ in range(3):
                static.normal_()
                graph.replay()
                torch.cuda.synchronize()
                for (big, small), (main, side) in zip(results, before, strict=True):
                    assert same_bits(big, torch.nn.functional.linear(static, main))
                    assert same_bits(small, torch.nn.functional.linear(static, side))
    calls = record.calls
    assert calls.dual_stream or calls.fused, calls
    if torch.cuda.get_device_name() == "NVIDIA H200":
        exact = shape == "35B TP1"  # at every size; nowhere for the other shape
        assert bool(calls.fused) == (exact and above_is_stock), calls
        assert bool(calls.dual_stream) == (not exact or setting == "auto"), calls


def test_the_next_start_reads_the_plan(settle: Callable[..., Any], tmp_path: Path) -> None:
    first, second = PatchRecord(), PatchRecord()
    settle(candidates("35B TP4", first), first)
    settle(candidates("35B TP4", second), second)
    assert (first.plans[0]["source"], second.plans[0]["source"]) == ("measured", "read")
    assert [row["strategy"] for row in first.plans[0]["rows"]] == [row["strategy"] for row in second.plans[0]["rows"]]
    assert second.plans[0]["seconds"] < 0.3
    (path,) = (tmp_path / "plans").glob("plan-*.json")
    path.write_text("{")
    third = PatchRecord()
    settle(candidates("35B TP4", third), third)
    assert third.plans[0]["source"] == "measured"


def test_reloaded_weights_are_the_fused_ones(settle: Callable[..., Any]) -> None:
    """A reload copies into the parameters; the common buffer has to see it."""
    record = PatchRecord()
    group = candidates("35B TP1", record)[:8]
    settle(group, record, Settings(plan="fused"))
    assert isinstance(group[0].pair.plan, SizePlan) and FUSED in group[0].pair.plan.strategies.values()
    one = group[0]
    one.main.weight.copy_(torch.randn_like(one.main.weight))
    one.side.weight.copy_(torch.randn_like(one.side.weight))
    inputs = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        big, small = one.pair.slices(one.pair.run_into_one(FUSED, one.main, one.side, inputs))
        assert same_bits(big, one.main(inputs)[0]) and same_bits(small, one.side(inputs)[0])


def test_weights_that_were_moved_are_not_fused(settle: Callable[..., Any]) -> None:
    record = PatchRecord()
    group = candidates("35B TP1", record)[:8]
    settle(group, record, Settings(plan="fused"))
    one = group[0]
    one.main.weight.data = torch.zeros_like(one.main.weight)
    static = torch.randn(256, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        one.pair.project_into_one(one.main, one.side, static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = one.pair.project_into_one(one.main, one.side, static)
        graph.replay()
    torch.cuda.synchronize()
    assert not one.pair.slices(result)[0].any(), "the buffer's old weights were used"
    assert record.calls.serial["the weights have left their common buffer"] == 1


@pytest.mark.parametrize(
    ("which", "settings"),
    [
        ({"sleep": True}, Settings(plan="fused")),
        ({"above_is_stock": False}, Settings()),
        ({"mode": "FULL_DECODE_ONLY"}, Settings()),
        ({}, Settings(plan="dual")),
    ],
    ids=["sleep mode", "op above the graphs", "op in eager steps", "dual"],
)
def test_what_leaves_the_weights_where_they_are(settle: Callable[..., Any], which: Any, settings: Settings) -> None:
    record = PatchRecord()
    group = candidates("35B TP1", record)[:8]
    before = places(group)
    assert settle(group, record, settings, **which) == {}
    assert not any(one.pair.one_result for one in group)
    assert places(group) == before


def test_without_graphs_everything_is_stock_and_a_threshold_is_kept(settle: Callable[..., Any]) -> None:
    record = PatchRecord()
    group = candidates("35B TP1", record)[:8]
    assert set(settle(group, record, sizes=[])) == {one.layer for one in group}
    assert settle(group, record, Settings(token_threshold=64)) == {}
    assert group[0].pair.plan.reason_for_serial(65) == "above the token threshold"


@pytest.mark.parametrize("setting", ["auto", "fused"])
def test_a_shape_whose_bits_differ_is_fused_only_when_that_is_allowed(settle: Callable[..., Any], setting: str) -> None:
    """27B: one GEMM rounds ba differently at every captured size (H200), and then the weights stay where they are. On a GPU
    where it does not, there is nothing to see."""
    record = PatchRecord()
    group = candidates("27B TP1", record)[:8]
    before = places(group)
    settle(group, record, Settings(plan=setting))
    rows = record.plans[0]["rows"]
    measured = any(FUSED in row["us"] for row in rows)
    if measured and not any(row["inexact"] for row in rows):
        pytest.skip(f"one GEMM has serial's bits at every size on {torch.cuda.get_device_name()}")
    assert all(row["strategy"] not in row["inexact"] for row in rows)
    assert all(one.pair.one_result == any(row["strategy"] == FUSED for row in rows) for one in group)
    if not measured:
        assert places(group) == before and FUSED not in {row["strategy"] for row in rows}
    allowed = PatchRecord()
    settle(candidates("27B TP1", allowed)[:8], allowed, Settings(plan="fused", inexact=True))
    assert {row["strategy"] for row in allowed.plans[0]["rows"]} == {FUSED}
