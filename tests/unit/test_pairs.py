"""Which plan a loaded model's pairs get: by the setting, by what was measured, and by what may not be touched."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pathlib
import tempfile
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st
from vllm.config import CUDAGraphMode

from overlay import pair as pair_module
from overlay import pair_plans, plan_file, tuning
from overlay.journal import PatchRecord
from overlay.pair import LinearPair
from overlay.side_work.pairs import ADAPTERS, NO_CAPTURE, NOTHING_TO_GAIN, Candidate
from overlay.side_work.plan import ABOVE_THRESHOLD, DUAL, DUAL_MAIN_FIRST, FUSED, SERIAL, Plan, SizePlan
from overlay.settings import Settings
from overlay.side_work.measure import CANCELLING, Bench, Row

namespace = types.SimpleNamespace
SIZES = [1, 2, 4, 8, 16, 32]
FIXED = Plan("dual", 256)


def numbers(*shape: int) -> torch.Tensor:
    """Whole numbers: their sums are the same in every order, so results can be compared bit by bit."""
    return torch.randint(-4, 5, shape).float()


class UnquantizedLinearMethod:
    """Tells the overlay, which goes by this name, that the GEMM is torch's own."""

    @staticmethod
    def default_unquantized_gemm() -> None: ...

    _gemm_impl = default_unquantized_gemm


class Fp8LinearMethod: ...


class Linear(torch.nn.Module):
    def __init__(self, hidden: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(numbers(columns, hidden), requires_grad=False)
        self.quant_method: Any = UnquantizedLinearMethod()
        self.input_size, self.params_dtype = hidden, torch.float32

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(inputs, self.weight), None


def candidates(
    count: int = 3,
    record: PatchRecord | None = None,
    hidden: int = 16,
    takes_slices: bool = True,
    first: int = 0,
    side: int = 8,
) -> list[Candidate]:
    record = record or PatchRecord()
    return [
        Candidate(
            f"layers.{index}",
            LinearPair(24, side, FIXED, record),
            Linear(hidden, 24),
            Linear(hidden, side),
            takes_slices,
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
    from overlay.side_work.measure import best

    return Row(tokens, times, best({name: t for name, t in times.items() if name not in inexact}), inexact)


def without_one_gemm(one: Row) -> Row:
    times = {name: time for name, time in one.microseconds.items() if name != FUSED}
    return row(one.tokens, tuple(name for name in one.inexact if name != FUSED), **times)


def usual(sizes: Sequence[int]) -> list[Row]:
    """What a GPU could say: one GEMM up to 8 tokens, two streams up to 16, then nothing."""
    rows = []
    for tokens in sizes:
        times = {SERIAL: 10.0, DUAL: 9.0 if tokens <= 16 else 11.0, DUAL_MAIN_FIRST: 9.5 if tokens <= 16 else 10.5}
        rows.append(row(tokens, **times, **{FUSED: 8.0 if tokens <= 8 else 12.0}))
    return rows


class Gpu:
    """Stands for the GPU: answers measurements, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], list[int], int, bool, bool]] = []
        self.answer: Callable[[Sequence[int]], list[Row]] = usual
        self.one_result_is_exact = True

    def measure(
        self, group: Sequence[Candidate], sizes: Sequence[int], largest: int, fusable: bool, inexact: bool
    ) -> tuple[list[Row], bool]:
        self.asked.append(([one.layer for one in group], list(sizes), largest, fusable, inexact))
        fused = fusable and (self.one_result_is_exact or inexact)
        return [one if fused else without_one_gemm(one) for one in self.answer(sizes)], fused

    def take_the_place(self, patch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
        patch.setattr(pair_plans, "_measure", self.measure)
        patch.setattr(pair_plans, "_device", lambda one: torch.device("cuda", 0))
        patch.setattr(pair_plans, "_machine", lambda device: {"gpu": "made up"})
        patch.setattr(pair_plans, "_folder", lambda: str(folder / "plans"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Gpu:
    made = Gpu()
    made.take_the_place(monkeypatch, tmp_path)
    return made


def settle(
    group: Sequence[Candidate], settings: Settings | None = None, above_is_stock: bool = True, **of_worker: Any
) -> tuple[Any, PatchRecord]:
    """By default plan auto, where the steps above the captured sizes run stock's graph."""
    record = PatchRecord()
    return pair_plans.settle(group, worker(**of_worker), settings or Settings(), record, above_is_stock), record


def strategies(one: Candidate) -> list[str]:
    assert isinstance(one.pair.plan, SizePlan)
    return [one.pair.plan.strategies[tokens] for tokens in SIZES]


def places(group: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Where the weights lie."""
    return [(one.main.weight.data_ptr(), one.side.weight.data_ptr()) for one in group]


def is_fused(one: Candidate) -> bool:
    return one.pair.common is not None and one.pair._holds(one.main, one.side)


# ---------------------------------------------------------------- the settings


def test_auto_takes_what_was_measured(gpu: Gpu) -> None:
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
    assert (shown["shape"]["hidden"], shown["shape"]["main"], shown["shape"]["side"]) == (16, 24, 8)
    assert [(one["tokens"], one["strategy"]) for one in shown["rows"]] == list(
        zip(SIZES, strategies(group[0]), strict=True)
    )
    assert shown["rows"][0]["us"][FUSED] == 8.0
    json.dumps(shown)


@pytest.mark.parametrize("above_is_stock", [True, False])
@pytest.mark.parametrize("mode", [mode for mode in CUDAGraphMode if mode is not CUDAGraphMode.NONE], ids=str)
def test_auto_has_one_gemm_where_no_step_outside_of_a_graph_has_the_op(
    gpu: Gpu, mode: CUDAGraphMode, above_is_stock: bool
) -> None:
    """Above the captured sizes a step runs stock's graph; below them it has a CUDA graph, if mixed batches have one."""
    expected = above_is_stock and mode.mixed_mode() is not CUDAGraphMode.NONE
    group = candidates()
    if not expected:
        unfused(gpu, group, above_is_stock=above_is_stock, mode=mode.name)
        return
    assert settle(group, above_is_stock=above_is_stock, mode=mode.name)[0] == {}
    assert [asked[3] for asked in gpu.asked] == [True]
    assert strategies(group[0]) == [FUSED] * 4 + [DUAL, SERIAL]
    assert all(one.pair.one_result and is_fused(one) for one in group)


def test_auto_has_no_one_gemm_where_columns_only_align(gpu: Gpu) -> None:
    """They would have to be filled by a kernel of their own in the graph above, so the op stays there."""
    unfused(gpu, candidates(side=6))
    aligned = candidates(side=8)
    settle(aligned)
    assert all(one.pair.one_result for one in aligned)


@pytest.mark.parametrize("plan", ["dual", "serial"])
def test_a_fixed_plan_measures_nothing_and_moves_nothing(gpu: Gpu, plan: str) -> None:
    group = candidates()
    stock, record = settle(group, Settings(plan=plan))
    assert stock == {} and gpu.asked == [] and record.plans == []
    assert all(one.pair.plan is FIXED and not one.pair.one_result and one.pair.common is None for one in group)


times = st.sampled_from([7.0, 9.0, 10.0, 12.0])


def differing(sizes: Sequence[int]) -> list[Row]:
    """One GEMM has other bits at 4 and 8 tokens."""
    return [
        row(tokens, (FUSED,) if tokens in (4, 8) else (), **{SERIAL: 10.0, DUAL: 9.0, FUSED: 8.0}) for tokens in sizes
    ]


@pytest.mark.parametrize("above_is_stock", [True, False])
@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_fused_is_fused_wherever_bits_allow(gpu: Gpu, mode: str, above_is_stock: bool) -> None:
    gpu.answer = differing
    group = candidates()
    assert settle(group, Settings(plan="fused"), above_is_stock=above_is_stock, mode=mode)[0] == {}
    assert strategies(group[0]) == [FUSED, FUSED, DUAL, DUAL, FUSED, FUSED]
    assert all(one.pair.one_result and is_fused(one) for one in group)


@with_settings(deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys(SIZES, st.fixed_dictionaries(dict.fromkeys((SERIAL, DUAL, FUSED), times)))),
    st.sets(st.sampled_from(SIZES)),
    st.booleans(),
)
def test_fused_does_not_ask_what_is_fastest(
    measured: dict[int, dict[str, float]], differs: set[int], inexact: bool
) -> None:
    """A fixed choice: one GEMM wherever its bits are serial's, or may differ; elsewhere what was measured, and the journal
    has the times."""
    rows = [row(tokens, (FUSED,) if tokens in differs else (), **measured[tokens]) for tokens in SIZES]
    group = candidates()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        gpu = Gpu()
        gpu.take_the_place(patch, pathlib.Path(folder))
        gpu.answer = lambda sizes: rows
        _, record = settle(group, Settings(plan="fused", inexact=inexact))
    expected = [FUSED if inexact or one.tokens not in differs else one.strategy for one in rows]
    assert strategies(group[0]) == expected and is_fused(group[0]) == (FUSED in expected)
    shown = record.plans[0]["rows"]
    assert [(one["strategy"], one["us"]) for one in shown] == [
        (strategy, measured[tokens]) for strategy, tokens in zip(expected, SIZES, strict=True)
    ]
    assert [one["inexact"] == [FUSED] for one in shown] == [tokens in differs for tokens in SIZES]


def test_fused_is_fused_where_nothing_is_gained(gpu: Gpu) -> None:
    gpu.answer = lambda sizes: [row(tokens, serial=10.0, dual=11.0, fused=12.0) for tokens in sizes]
    group = candidates()
    assert settle(group, Settings(plan="fused"))[0] == {}
    assert strategies(group[0]) == [FUSED] * 6 and is_fused(group[0])


def test_fused_and_inexact_is_fused_everywhere(gpu: Gpu) -> None:
    gpu.answer = differing
    gpu.one_result_is_exact = False
    group = candidates()
    assert settle(group, Settings(plan="fused", inexact=True))[0] == {}
    assert strategies(group[0]) == [FUSED] * 6
    assert gpu.asked[0][-1] is True


def test_inexact_alone_changes_nothing(gpu: Gpu) -> None:
    """It belongs to the fused plan: nobody gets other bits by a measurement."""
    gpu.answer = differing
    group = candidates()
    settle(group, Settings(inexact=True))
    assert strategies(group[0]) == [FUSED, FUSED, DUAL, DUAL, FUSED, FUSED]
    assert gpu.asked[0][-1] is False


@pytest.mark.parametrize("plan", ["auto", "fused"])
def test_one_gemm_needs_one_result(gpu: Gpu, plan: str) -> None:
    """Where slices of one tensor have other bits than two tensors, the best of the rest is taken."""
    gpu.one_result_is_exact = False
    group = candidates()
    settle(group, Settings(plan=plan))
    assert gpu.asked[0][3] is True
    assert strategies(group[0]) == [DUAL] * 5 + [SERIAL]
    assert not any(one.pair.one_result or is_fused(one) for one in group)


def test_no_size_with_one_gemm_needs_no_one_result(gpu: Gpu) -> None:
    """Where one GEMM is exact and slow, the graph keeps two results, and the weights their place."""
    gpu.answer = lambda sizes: [row(tokens, serial=10.0, dual=9.0, fused=11.0) for tokens in sizes]
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
    getattr(group[1], which).base_layer = Linear(16, 8)
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


def test_no_layer_is_nothing_to_do(gpu: Gpu) -> None:
    assert pair_plans.settle([], None, Settings(), PatchRecord(), True) == {}


def unfused(gpu: Gpu, group: list[Candidate], settings: Settings | None = None, **of_worker: Any) -> None:
    """Measured without one GEMM, and the weights stay where they are."""
    before = places(group)
    assert settle(group, settings, **of_worker)[0] == {}
    assert [asked[3:] for asked in gpu.asked] == [(False, False)]
    assert strategies(group[0]) == [DUAL] * 5 + [SERIAL]
    assert not any(one.pair.one_result or one.pair.common is not None for one in group)
    assert places(group) == before


#: The plans that have one GEMM, if they may.
with_one_gemm = pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(plan="fused"), Settings(plan="fused", inexact=True)],
    ids=["auto", "fused", "inexact"],
)


@with_one_gemm
@pytest.mark.parametrize("name", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_weights_in_a_pool_of_their_own_stay_there(gpu: Gpu, name: str, settings: Settings) -> None:
    unfused(gpu, candidates(), settings, **{name: True})


@with_one_gemm
def test_weights_that_vllm_moves_stay_where_it_puts_them(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """An offloader copies to where the parameters pointed at the start; a buffer of ours would keep the first weights."""
    from vllm.model_executor.offloader import base

    assert not pair_plans._offloads()
    monkeypatch.setattr(base, "_instance", type("PrefetchOffloader", (base.NoopOffloader,), {})())
    unfused(gpu, candidates(), settings)


@with_one_gemm
def test_an_upstream_that_does_not_take_slices(gpu: Gpu, settings: Settings) -> None:
    unfused(gpu, candidates(takes_slices=False), settings)


@with_one_gemm
@pytest.mark.parametrize(
    "spoil",
    [
        lambda linear: linear.register_parameter("bias", torch.nn.Parameter(torch.zeros(8))),
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: linear.register_forward_pre_hook(lambda *_: None),
        lambda linear: setattr(linear, "weight", torch.nn.Parameter(torch.randn(7, 16))),
        lambda linear: setattr(linear, "weight", torch.nn.Parameter(torch.randn(8, 16).double())),
    ],
    ids=["bias", "hook", "hook before", "padded", "another type"],
)
def test_linears_that_one_gemm_cannot_replace(gpu: Gpu, spoil: Callable[[Any], Any], settings: Settings) -> None:
    group = candidates()
    spoil(group[2].side)
    unfused(gpu, group, settings)


def test_a_linear_that_got_another_kernel_while_it_was_loaded(gpu: Gpu) -> None:
    group = candidates()
    group[1].main.quant_method = Fp8LinearMethod()
    stock, _ = settle(group)
    assert list(stock) == ["layers.1"] and "Fp8LinearMethod is not on the allowlist" in stock["layers.1"]
    assert [asked[0] for asked in gpu.asked] == [["layers.0", "layers.2"]]


def test_nothing_to_gain_is_stock(gpu: Gpu) -> None:
    gpu.answer = lambda sizes: [row(tokens, serial=10.0, dual=10.0, fused=9.95) for tokens in sizes]
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
    answers = [usual(SIZES), [row(tokens, serial=10.0, dual=11.0) for tokens in SIZES]]
    gpu.answer = lambda sizes: answers.pop(0)
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
        (Settings(), {"above_is_stock": False}),
        (Settings(), {"mode": "FULL_DECODE_ONLY"}),
        (Settings(plan="fused", inexact=True), {}),
        (Settings(token_threshold=8), {}),
        (Settings(), {"sizes": [1, 2]}),
        (Settings(), {"draft": 2}),
    ],
    ids=["op above the graphs", "op in eager steps", "inexact", "threshold", "sizes", "speculation"],
)
def test_another_question_is_measured(gpu: Gpu, settings: Settings, which: dict[str, Any]) -> None:
    settle(candidates())
    settle(candidates(), settings, **which)
    assert len(gpu.asked) == 2


def test_auto_and_fused_ask_the_same_question(gpu: Gpu) -> None:
    """What is on disk is what was measured; what a setting makes of it is no part of it."""
    found = []
    for settings in (Settings(plan="fused"), Settings(), Settings(plan="fused"), Settings(inexact=True)):
        group = candidates()
        settle(group, settings)
        found.append(strategies(group[0]))
    fixed, fastest = [FUSED] * 6, [FUSED] * 4 + [DUAL, SERIAL]
    assert found == [fixed, fastest, fixed, fastest] and len(gpu.asked) == 1


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
    assert "plan for 3 layers of 16 to 24 + 8, measured in" in said[0].getMessage()


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


# ---------------------------------------------------------------- where weights lie while it is measured


class Region:
    """Stands for a region's streams: runs nothing beside anything before it has been prepared."""

    def __init__(self, slots: int) -> None:
        self.prepared = False

    def prepare(self, device: torch.device) -> None:
        self.prepared = True

    def run(self, default: Callable[[], Any], auxiliary: list[Callable[[], Any]], main_first: bool = False) -> Any:
        assert self.prepared
        return default(), (auxiliary[0](),)

    def run_serially(self, default: Callable[[], Any], auxiliary: list[Callable[[], Any]]) -> Any:
        return default(), (auxiliary[0](),)


class Compared(Bench):
    """A bench that has no GPU: the sizes at which bits are serial's come from a table, and works run once per layer."""

    exact: Mapping[str, set[int]]
    group: Sequence[Candidate]
    found: list[Row]

    def __enter__(self) -> Compared:
        self.stream = None  # type: ignore[assignment]
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.seen: list[tuple[int, int]] = []
        self.compared: dict[str, list[int]] = {}
        self.places_then: list[list[tuple[int, int]]] = []
        return self

    def __exit__(self, *_: object) -> None:
        assert not any(made() is not None for made in self.made), "what is held here is not given back to the GPU"

    def weights(self, rows: int) -> torch.Tensor:
        made = super().weights(rows)
        self.made.append(weakref.ref(made))
        return made

    def wait(self) -> None:
        self.seen = places(self.group)

    def exact_at(self, name: str, sizes: Sequence[int]) -> list[int]:
        assert self.cancels
        self.compared[name] = list(sizes)
        self.places_then.append(places(self.group))
        self._cancel(name)
        return [tokens for tokens in sizes if tokens in self.exact[name]]

    def rows(self, sizes: Sequence[int], seconds: float) -> list[Row]:
        self.timed = list(self.works)
        assert FUSED not in self.works or self.seen == places(self.group), "weights that were moved are waited for"
        for name, work in self.works.items():
            for number, one in enumerate(self.group[: self.layers]):
                inputs = numbers(3, self.hidden)
                big, small = work(number, inputs)
                assert torch.equal(big, one.main(inputs)[0]) and torch.equal(small, one.side(inputs)[0])
            if self.cancels:
                self._cancel(name)
        return [Row(tokens, {SERIAL: 2.0, DUAL: 1.0}, DUAL) for tokens in sizes]

    def _cancel(self, name: str) -> None:
        """By a strategy and serially: the same numbers, but for the order of what is added."""
        inputs = torch.randn(3, self.hidden)
        found, expected = (self.works[strategy](CANCELLING, inputs) for strategy in (name, SERIAL))
        assert all(torch.allclose(*both, rtol=1e-3, atol=1e-2) for both in zip(found, expected, strict=True))


def measure(
    group: Sequence[Candidate], exact: Mapping[str, set[int]], fusable: bool = True, inexact: bool = False
) -> tuple[Compared, bool]:
    """Measure with two of the candidates; the bench, and whether one GEMM was found to be a strategy."""
    benches: list[Compared] = []

    def bench(*arguments: Any, **options: Any) -> Compared:
        benches.append(Compared(*arguments, **options))
        benches[-1].exact, benches[-1].group = exact, group
        return benches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_plans, "Bench", bench)
        patch.setattr(tuning, "layers_for", lambda weight_bytes, available, device: 2)
        patch.setattr(pair_module, "ParallelRegion", Region)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        rows, fused = pair_plans._measure(group, SIZES, 100, fusable, inexact)
        benches[0].found = rows
    return benches[0], fused


EVERY = set(range(1, 101))


@with_settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(SIZES)), st.sets(st.sampled_from([*SIZES, 100]), max_size=1))
def test_weights_are_moved_only_where_one_gemm_can_be_a_strategy(exact: set[int], differs: set[int]) -> None:
    """One GEMM has serial's bits at one captured size at least, and two GEMMs into one tensor at every size up to the largest
    batch. That shows on weights of the measurement's own, so nobody's are moved to find out."""
    group = candidates()
    before = places(group)
    bench, fused = measure(group, {FUSED: exact, pair_plans.ONE_RESULT: EVERY - differs})
    assert fused == (bool(exact) and not differs)
    assert all(then == before for then in bench.places_then), "not while it is being compared"
    assert bench.compared[FUSED] == SIZES
    if exact:
        assert {*SIZES, 100} <= set(bench.compared[pair_plans.ONE_RESULT])
    assert [is_fused(one) for one in group] == [fused, fused, False], "only what is measured"
    after = places(group)
    assert [before[index] == after[index] for index in range(3)] == [not fused, not fused, True]
    assert bench.timed == [SERIAL, DUAL, DUAL_MAIN_FIRST, *([FUSED] if fused else [])]
    assert not any(one.pair.one_result for one in group)
    if not fused:  # what was compared and left out is in the journal, and in the table
        assert {row.tokens for row in bench.found if FUSED in row.inexact} == {*SIZES} - exact
        shown = pair_plans.table(group[0].shape(), len(group), bench.found, "measured")
        assert shown.count("other bits") == len({*SIZES} - exact)


def test_where_bits_may_differ_none_are_compared_before() -> None:
    group = candidates()
    bench, fused = measure(group, {}, inexact=True)
    assert fused and bench.compared == {} and bench.inexact and bench.cancels
    assert bench.timed == [SERIAL, DUAL, DUAL_MAIN_FIRST, FUSED]
    assert [is_fused(one) for one in group] == [True, True, False]


def test_without_one_gemm_the_layers_own_weights_are_compared() -> None:
    group = candidates()
    before = places(group)
    bench, fused = measure(group, {}, fusable=False)
    assert not fused and bench.compared == {} and not bench.cancels
    assert bench.timed == [SERIAL, DUAL, DUAL_MAIN_FIRST]
    assert places(group) == before
