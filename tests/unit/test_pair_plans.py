"""Which plan a loaded model's pairs get: by the setting, by what was measured, and by what may not be touched."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pathlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from overlay import pair_plans, plan_file
from overlay.journal import PatchRecord
from overlay.pair import LinearPair
from overlay.pair_plans import ADAPTERS, NO_CAPTURE, NOTHING_TO_GAIN, Candidate
from overlay.plan import ABOVE_THRESHOLD, DUAL, DUAL_MAIN_FIRST, FUSED, SERIAL, Plan, SizePlan
from overlay.settings import Settings
from overlay.tuning import Row

namespace = types.SimpleNamespace
SIZES = [1, 2, 4, 8, 16, 32]
FIXED = Plan("dual", 256)


class UnquantizedLinearMethod:
    """Tells the overlay, which goes by this name, that the GEMM is torch's own."""

    @staticmethod
    def default_unquantized_gemm() -> None: ...

    _gemm_impl = default_unquantized_gemm


class Fp8LinearMethod: ...


class Linear(torch.nn.Module):
    def __init__(self, hidden: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(columns, hidden), requires_grad=False)
        self.quant_method: Any = UnquantizedLinearMethod()
        self.input_size, self.params_dtype = hidden, torch.float32


def candidates(
    count: int = 3, record: PatchRecord | None = None, hidden: int = 16, takes_slices: bool = True, first: int = 0
) -> list[Candidate]:
    record = record or PatchRecord()
    return [
        Candidate(
            f"layers.{index}", LinearPair(24, 6, FIXED, record), Linear(hidden, 24), Linear(hidden, 6), takes_slices
        )
        for index in range(first, first + count)
    ]


def worker(
    sizes: Sequence[int] | None = None, mode: str = "FULL_AND_PIECEWISE", rank: int = 0, draft: int = 0, **model: bool
) -> Any:
    config = namespace(
        compilation_config=namespace(
            cudagraph_capture_sizes=list(SIZES if sizes is None else sizes), cudagraph_mode=namespace(name=mode)
        ),
        scheduler_config=namespace(max_num_batched_tokens=8192),
        model_config=namespace(**model),
        speculative_config=namespace(num_speculative_tokens=draft) if draft else None,
    )
    return namespace(vllm_config=config, rank=rank)


def row(tokens: int, inexact: tuple[str, ...] = (), **times: float) -> Row:
    from overlay.tuning import best

    return Row(tokens, times, best({name: t for name, t in times.items() if name not in inexact}), inexact)


#: What a GPU could say: one GEMM up to 8 tokens, two streams up to 16, then nothing.
def usual(sizes: Sequence[int], fusable: bool) -> list[Row]:
    rows = []
    for tokens in sizes:
        times = {SERIAL: 10.0, DUAL: 9.0 if tokens <= 16 else 11.0, DUAL_MAIN_FIRST: 9.5}
        if tokens > 16:
            times[DUAL_MAIN_FIRST] = 10.5
        if fusable:
            times[FUSED] = 8.0 if tokens <= 8 else 12.0
        rows.append(row(tokens, **times))
    return rows


class Gpu:
    """Stands for the GPU: answers measurements, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[int], int, bool, bool]] = []
        self.answer: Callable[[Sequence[int], bool], list[Row]] = usual
        self.one_result_is_exact = True

    def measure(
        self, group: Sequence[Candidate], sizes: Sequence[int], largest: int, fusable: bool, inexact: bool
    ) -> tuple[list[Row], bool]:
        self.asked.append(([one.layer for one in group], list(sizes), largest, fusable, inexact))
        return self.answer(sizes, fusable), fusable and (self.one_result_is_exact or inexact)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(pair_plans, "_measure", made.measure)
    monkeypatch.setattr(pair_plans, "_device", lambda one: torch.device("cuda", 0))
    monkeypatch.setattr(pair_plans, "_machine", lambda device: {"gpu": "made up"})
    monkeypatch.setattr(pair_plans, "_folder", lambda: str(tmp_path / "plans"))
    return made


def settle(group: Sequence[Candidate], settings: Settings | None = None, **of_worker: Any) -> tuple[Any, PatchRecord]:
    record = PatchRecord()
    return pair_plans.settle(group, worker(**of_worker), settings or Settings(plan="fused"), record), record


def strategies(one: Candidate) -> list[str]:
    assert isinstance(one.pair.plan, SizePlan)
    return [one.pair.plan.strategies[tokens] for tokens in SIZES]


def is_fused(one: Candidate) -> bool:
    return one.pair.common is not None and one.pair._holds(one.main, one.side)


# ---------------------------------------------------------------- the settings


def test_fused_takes_what_was_measured(gpu: Gpu) -> None:
    group = candidates()
    before = [one.main.weight.clone() for one in group]
    stock, record = settle(group)
    assert stock == {}
    for one, weight in zip(group, before, strict=True):
        assert strategies(one) == [FUSED] * 4 + [DUAL, SERIAL]
        assert one.pair.plan.token_threshold == 16
        assert one.pair.one_result and is_fused(one) and torch.equal(one.main.weight, weight)
    assert gpu.asked == [(["layers.0", "layers.1", "layers.2"], SIZES, 8192, True, False)]
    (shown,) = record.plans
    assert shown["layers"] == 3 and shown["source"] == "measured" and shown["seconds"] >= 0
    assert (shown["shape"]["hidden"], shown["shape"]["main"], shown["shape"]["side"]) == (16, 24, 6)
    assert [(one["tokens"], one["strategy"]) for one in shown["rows"]] == list(
        zip(SIZES, strategies(group[0]), strict=True)
    )
    assert shown["rows"][0]["us"][FUSED] == 8.0
    json.dumps(shown)


def test_auto_leaves_one_gemm_out_and_the_weights_where_they_are(gpu: Gpu) -> None:
    unfused(gpu, candidates(), Settings())


@pytest.mark.parametrize("plan", ["dual", "serial"])
def test_a_fixed_plan_measures_nothing_and_moves_nothing(gpu: Gpu, plan: str) -> None:
    group = candidates()
    stock, record = settle(group, Settings(plan=plan))
    assert stock == {} and gpu.asked == [] and record.plans == []
    assert all(one.pair.plan is FIXED and not one.pair.one_result and one.pair.common is None for one in group)


def differing(sizes: Sequence[int], fusable: bool) -> list[Row]:
    """One GEMM has other bits at 4 and 8 tokens."""
    return [
        row(tokens, (FUSED,) if tokens in (4, 8) else (), **{SERIAL: 10.0, DUAL: 9.0, FUSED: 8.0}) for tokens in sizes
    ]


def test_fused_is_fused_wherever_bits_allow(gpu: Gpu) -> None:
    gpu.answer = differing
    group = candidates()
    assert settle(group, Settings(plan="fused"))[0] == {}
    assert strategies(group[0]) == [FUSED, FUSED, DUAL, DUAL, FUSED, FUSED]
    assert all(one.pair.one_result and is_fused(one) for one in group)


def test_fused_and_inexact_is_fused_everywhere(gpu: Gpu) -> None:
    gpu.answer = differing
    gpu.one_result_is_exact = False
    group = candidates()
    assert settle(group, Settings(plan="fused", inexact=True))[0] == {}
    assert strategies(group[0]) == [FUSED] * 6
    assert gpu.asked[0][-1] is True


def test_inexact_alone_changes_nothing(gpu: Gpu) -> None:
    """It belongs to the fused plan: nobody gets other bits by a measurement."""
    unfused(gpu, candidates(), Settings(inexact=True))
    assert gpu.asked[0][-1] is False


def test_one_gemm_needs_one_result(gpu: Gpu) -> None:
    """Where slices of one tensor have other bits than two tensors, the best of the rest is taken."""
    gpu.one_result_is_exact = False
    group = candidates()
    settle(group)
    assert strategies(group[0]) == [DUAL] * 5 + [SERIAL]
    assert not any(one.pair.one_result for one in group)


def test_no_size_with_one_gemm_needs_no_one_result(gpu: Gpu) -> None:
    """Where one GEMM is exact and slow, the graph keeps two results, and the weights their place."""
    gpu.answer = lambda sizes, fusable: [row(tokens, serial=10.0, dual=9.0, fused=11.0) for tokens in sizes]
    group = candidates()
    settle(group)
    assert strategies(group[0]) == [DUAL] * 6
    assert not any(one.pair.one_result or is_fused(one) for one in group)


def test_a_token_threshold_ends_what_is_measured(gpu: Gpu) -> None:
    group = candidates()
    settle(group, Settings(token_threshold=4))
    assert gpu.asked[0][1] == [1, 2, 4]
    assert group[0].pair.plan.reason_for_serial(5) == ABOVE_THRESHOLD


def test_a_token_threshold_of_nothing_is_stock(gpu: Gpu) -> None:
    stock, _ = settle(candidates(), Settings(token_threshold=0))
    assert set(stock.values()) == {NO_CAPTURE} and gpu.asked == []


# ---------------------------------------------------------------- what stays as it is


@pytest.mark.parametrize("plan", ["auto", "dual", "fused"])
@pytest.mark.parametrize("which", [{"mode": "NONE"}, {"sizes": []}], ids=["off", "no size"])
def test_without_graphs_every_layer_is_stock(gpu: Gpu, plan: str, which: dict[str, Any]) -> None:
    stock, _ = settle(candidates(), Settings(plan=plan), **which)
    assert stock == {f"layers.{index}": NO_CAPTURE for index in range(3)} and gpu.asked == []


@pytest.mark.parametrize("plan", ["auto", "dual", "serial", "fused"])
@pytest.mark.parametrize("which", ["main", "side"])
def test_adapters_keep_their_layer_stock(gpu: Gpu, which: str, plan: str) -> None:
    group = candidates()
    getattr(group[1], which).base_layer = Linear(16, 6)
    del getattr(group[1], which).quant_method
    stock, _ = settle(group, Settings(plan=plan))
    assert stock == {"layers.1": ADAPTERS}
    assert all("layers.1" not in asked[0] for asked in gpu.asked)
    assert group[1].pair.plan is FIXED and group[1].pair.common is None


def test_layers_that_are_on_no_gpu_keep_what_they_have(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_plans, "_device", lambda one: torch.device("cpu"))
    group = candidates()
    assert settle(group, mode="NONE")[0] == {} and gpu.asked == []
    assert group[0].pair.plan is FIXED


@pytest.mark.parametrize(
    ("mode", "backend", "compiled"),
    [(3, "inductor", True), (3, "", True), (1, "inductor", True), (3, "eager", False), (2, "", False), (0, "", False)],
)
@pytest.mark.parametrize("plan", ["auto", "dual"])
def test_which_call_stock_makes(gpu: Gpu, mode: int, backend: str, compiled: bool, plan: str) -> None:
    group, of_vllm = candidates(), worker()
    of_vllm.vllm_config.compilation_config.mode = mode
    of_vllm.vllm_config.compilation_config.backend = backend
    pair_plans.settle(group, of_vllm, Settings(plan=plan), PatchRecord())
    assert [one.pair.as_compiled for one in group] == [compiled] * 3


def test_no_layer_is_nothing_to_do(gpu: Gpu) -> None:
    assert pair_plans.settle([], None, Settings(), PatchRecord()) == {}


def unfused(gpu: Gpu, group: list[Candidate], settings: Settings | None = None, **of_worker: Any) -> None:
    """Measured without one GEMM, and the weights stay where they are."""
    places = [one.main.weight.data_ptr() for one in group]
    assert settle(group, settings, **of_worker)[0] == {}
    assert [asked[3] for asked in gpu.asked] == [False]
    assert strategies(group[0]) == [DUAL] * 5 + [SERIAL]
    assert not any(one.pair.one_result or one.pair.common is not None for one in group)
    assert [one.main.weight.data_ptr() for one in group] == places


@pytest.mark.parametrize("name", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_weights_in_a_pool_of_their_own_stay_there(gpu: Gpu, name: str) -> None:
    unfused(gpu, candidates(), **{name: True})


def test_weights_that_vllm_moves_stay_where_it_puts_them(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offloader copies to where the parameters pointed at the start; a buffer of ours would keep the first weights."""
    from vllm.model_executor.offloader import base

    assert not pair_plans._offloads()
    monkeypatch.setattr(base, "_instance", type("PrefetchOffloader", (base.NoopOffloader,), {})())
    unfused(gpu, candidates())


def test_an_upstream_that_does_not_take_slices(gpu: Gpu) -> None:
    unfused(gpu, candidates(takes_slices=False))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda linear: linear.register_parameter("bias", torch.nn.Parameter(torch.zeros(6))),
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: setattr(linear, "weight", torch.nn.Parameter(torch.randn(7, 16))),
        lambda linear: setattr(linear, "weight", torch.nn.Parameter(torch.randn(6, 16).double())),
    ],
    ids=["bias", "hook", "hook before", "padded", "another type"],
)
def test_linears_that_one_gemm_cannot_replace(gpu: Gpu, spoil: Callable[[Any], Any]) -> None:
    group = candidates()
    spoil(group[2].side)
    unfused(gpu, group)


def test_a_linear_that_got_another_kernel_while_it_was_loaded(gpu: Gpu) -> None:
    group = candidates()
    group[1].main.quant_method = Fp8LinearMethod()
    stock, _ = settle(group)
    assert list(stock) == ["layers.1"] and "Fp8LinearMethod is not on the allowlist" in stock["layers.1"]
    assert [asked[0] for asked in gpu.asked] == [["layers.0", "layers.2"]]


def test_nothing_to_gain_is_stock(gpu: Gpu) -> None:
    gpu.answer = lambda sizes, fusable: [row(tokens, serial=10.0, dual=10.0, fused=9.95) for tokens in sizes]
    stock, record = settle(candidates())
    assert stock == {f"layers.{index}": NOTHING_TO_GAIN for index in range(3)}
    assert {one["strategy"] for one in record.plans[0]["rows"]} == {SERIAL}, "the journal shows why"


# ---------------------------------------------------------------- shapes


def test_layers_of_one_shape_share_a_plan(gpu: Gpu) -> None:
    group = [
        *candidates(2),
        *candidates(1, hidden=32, first=2),
        *candidates(2, first=3),
        *candidates(1, takes_slices=False, first=5),
    ]
    stock, record = settle(group)
    assert [asked[0] for asked in gpu.asked] == [
        ["layers.0", "layers.1", "layers.3", "layers.4"],
        ["layers.2"],
        ["layers.5"],
    ]
    assert stock == {} and [plan["layers"] for plan in record.plans] == [4, 1, 1]
    assert group[0].pair.plan is group[4].pair.plan and group[0].pair.plan is not group[2].pair.plan
    assert [one.pair.one_result for one in group] == [True] * 5 + [False]


def test_one_shape_can_be_stock_and_another_not(gpu: Gpu) -> None:
    answers = [usual(SIZES, True), [row(tokens, serial=10.0, dual=11.0) for tokens in SIZES]]
    gpu.answer = lambda sizes, fusable: answers.pop(0)
    group = [*candidates(1), *candidates(1, hidden=32, first=1)]
    assert settle(group)[0] == {"layers.1": NOTHING_TO_GAIN}
    assert is_fused(group[0]) and not is_fused(group[1])


def test_sizes_are_those_of_the_graphs_once_each(gpu: Gpu) -> None:
    settle(candidates(), sizes=[8, 1, 8, 4])
    assert gpu.asked[0][1] == [1, 4, 8]


@given(st.sets(st.integers(1, 512), min_size=1, max_size=20), st.integers(0, 7), st.none() | st.integers(0, 600))
def test_with_speculation_the_rounded_sizes_are_there_too(sizes: set[int], draft: int, limit: int | None) -> None:
    """vLLM rounds sizes up to whole requests, and drops what is then above the largest, after this has been settled."""
    found = pair_plans._captured_sizes(worker(sorted(sizes), draft=draft).vllm_config, Settings(token_threshold=limit))
    step = draft + 1
    rounded = {-(-size // step) * step for size in sizes}
    expected = sizes | {size for size in rounded if size <= max(sizes)}
    assert found == sorted(size for size in expected if limit is None or size <= limit)


# ---------------------------------------------------------------- the disk


def plans_in(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return sorted((tmp_path / "plans").glob("*"))


def test_the_next_start_reads_the_plan(gpu: Gpu, tmp_path: pathlib.Path) -> None:
    first, second = candidates(), candidates()
    settle(first)
    assert len(plans_in(tmp_path)) == 1
    _, record = settle(second)
    assert len(gpu.asked) == 1 and record.plans[0]["source"] == "read"
    assert strategies(first[0]) == strategies(second[0]) and all(is_fused(one) for one in second)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(pair_plans, "_machine", lambda device: {"gpu": "another"}),
        lambda patch: patch.setattr(pair_plans.journal, "vllm_version", "9.9.9"),
        lambda patch: patch.setattr(pair_plans.cache_identity, "source_hash", lambda: "another overlay"),
        lambda patch: patch.setattr(pair_plans, "_offloads", lambda: True),
    ],
    ids=["another GPU", "another vLLM", "another overlay", "weights that move"],
)
def test_another_machine_or_program_measures_anew(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, change: Callable[[Any], None]
) -> None:
    settle(candidates())
    change(monkeypatch)
    settle(candidates())
    assert len(gpu.asked) == 2 and len(plans_in(tmp_path)) == 2


@pytest.mark.parametrize(
    ("settings", "which"),
    [
        (Settings(), {}),
        (Settings(plan="fused", inexact=True), {}),
        (Settings(plan="fused", token_threshold=8), {}),
        (Settings(plan="fused"), {"sizes": [1, 2]}),
        (Settings(plan="fused"), {"draft": 2}),
    ],
    ids=["auto", "inexact", "threshold", "sizes", "speculation"],
)
def test_another_question_is_measured(gpu: Gpu, settings: Settings, which: dict[str, Any]) -> None:
    settle(candidates())
    settle(candidates(), settings, **which)
    assert len(gpu.asked) == 2


def test_an_exact_plan_is_no_answer_where_bits_may_differ(gpu: Gpu) -> None:
    for settings in (Settings(plan="fused"), Settings(plan="fused", inexact=True), Settings(plan="fused")):
        settle(candidates(), settings)
    assert [asked[-1] for asked in gpu.asked] == [False, True]


@pytest.mark.parametrize("content", [b"{", None], ids=["spoiled", "another's sizes"])
def test_a_file_that_cannot_be_used_is_measured_anew_with_the_reason(
    gpu: Gpu, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    settle(candidates())
    (path,) = plans_in(tmp_path)
    if content is None:
        whole = json.loads(path.read_bytes())
        content = json.dumps({**whole, "rows": whole["rows"][:-1]}).encode()
    path.write_bytes(content)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "vllm.overlay"):
        _, record = settle(candidates())
    assert record.plans[0]["source"] == "measured" and len(gpu.asked) == 2
    (said,) = [one for one in caplog.records if "measuring anew" in one.getMessage()]
    assert str(path) in said.getMessage() and said.levelno == logging.INFO
    _, record = settle(candidates())
    assert record.plans[0]["source"] == "read", "the good plan has taken its place"


def test_a_folder_that_cannot_be_written_costs_a_line(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pair_plans, "_folder", lambda: str(tmp_path / "file" / "plans"))
    with caplog.at_level(logging.DEBUG, "vllm.overlay"):
        assert settle(candidates())[0] == {}
    assert [one.getMessage() for one in caplog.records if "is not kept" in one.getMessage()]
    assert not [one for one in caplog.records if one.levelno > logging.INFO]


def test_the_folder_is_beside_vllms_own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert pair_plans._folder() == os.path.join(tmp_path, "auxstream_overlay")


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_speaks_for_all(gpu: Gpu, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, rank: int) -> None:
    level = logging.INFO if rank == 0 else logging.DEBUG
    with caplog.at_level(logging.DEBUG, "vllm.overlay"):
        settle(candidates(), rank=rank)
        plans_in(tmp_path)[0].write_text("{")
        settle(candidates(), rank=rank)
    said = [one for one in caplog.records if one.name == "vllm.overlay"]
    assert len(said) == 3 and {one.levelno for one in said} == {level}
    assert "plan for 3 layers of 16 to 24 + 6, measured in" in said[0].getMessage()


def test_the_table() -> None:
    rows = [
        Row(1, {SERIAL: 10.0, DUAL: 9.04, FUSED: 8.0}, FUSED),
        Row(128, {SERIAL: 120.0, DUAL: 99.96}, DUAL, (FUSED,)),
        Row(136, {}, DUAL),
        Row(512, {SERIAL: 300.0, DUAL: 310.0, FUSED: 320.0}, SERIAL),
    ]
    text = pair_plans.table({"hidden": 2048, "main": 12288, "side": 64}, 30, rows, "measured in 1.2 s")
    assert text.splitlines() == [
        "plan for 30 layers of 2048 to 12288 + 64, measured in 1.2 s, µs per layer:",
        "tokens  serial   dual       fused    plan",
        "     1    10.0    9.0         8.0   fused",
        "   128   120.0  100.0  other bits    dual",
        "   512   300.0  310.0       320.0  serial",
    ]


def test_a_table_without_a_measured_row_is_its_head() -> None:
    text = pair_plans.table({"hidden": 1, "main": 2, "side": 3}, 1, [Row(8, {}, SERIAL)], "read in 0.0 s")
    assert text.splitlines() == ["plan for 1 layers of 1 to 2 + 3, read in 0.0 s, µs per layer:", "tokens  plan"]


@given(st.integers(1, 40_000), st.sets(st.integers(1, 512), max_size=9))
def test_sizes_at_which_one_result_is_compared(largest: int, captured: set[int]) -> None:
    """Every captured one, the largest batch, and no step between of more than a third."""
    sizes = pair_plans._sizes_to_compare(sorted(captured), largest)
    assert sizes == sorted(set(sizes)) and {*captured, largest} <= set(sizes)
    assert max(sizes) == max({largest, *captured}) and sizes[0] == 1
    assert all(
        after <= max(1.34 * before, before + 1) for before, after in itertools.pairwise(sizes) if after <= largest
    )


def test_what_is_written_can_be_read(gpu: Gpu) -> None:
    """Times as they come from the GPU, through the file, without loss."""
    rows = [Row(1, {SERIAL: 10.01, FUSED: 8.77}, FUSED, (DUAL,)), Row(2, {}, SERIAL, (FUSED, DUAL))]
    folder = pair_plans._folder()
    plan_file.store(folder, {"a": 1}, rows, True)
    assert plan_file.load(folder, {"a": 1}) == (rows, True)
