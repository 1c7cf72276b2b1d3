"""Two linears of one input: every strategy gives the same numbers, and one buffer stays the weights' own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

pytest.importorskip("vllm")

from overlay import pair as pair_module
from overlay.journal import PatchRecord
from overlay.pair import ALIGNMENT, BEFORE_CAPTURE, MOVED_WEIGHTS, TWO_RESULTS, LinearPair
from overlay.plan import (
    ABOVE_THRESHOLD,
    DUAL,
    DUAL_MAIN_FIRST,
    FUSED,
    NOT_CAPTURING,
    SERIAL,
    SERIAL_PLAN,
    Plan,
    SizePlan,
)

HIDDEN = 32


def numbers(*shape: int) -> torch.Tensor:
    """Whole numbers: their sums are the same in every order, so results can be compared bit by bit."""
    return torch.randint(-4, 5, shape).float()


STRATEGIES = (SERIAL, DUAL, DUAL_MAIN_FIRST)


class Linear(torch.nn.Module):
    """A linear in vLLM's manner, that notes when it is called, and with contiguous inputs or not."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(numbers(rows, HIDDEN), requires_grad=False)
        self.calls = 0
        self.contiguous: list[bool] = []

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.calls += 1
        self.contiguous.append(inputs.is_contiguous())
        return linear(inputs, self.weight), None


class OnTheCpu:
    """Stands for a region's streams: keeps what was asked for, and works in that order."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.prepared = 0

    def prepare(self, device: torch.device) -> None:
        self.prepared += 1

    def run(self, default: Callable[[], Any], auxiliary: list[Callable[[], Any]], main_first: bool = False) -> Any:
        self.runs.append("main first" if main_first else "side first")
        if main_first:
            return default(), (auxiliary[0](),)
        side = auxiliary[0]()
        return default(), (side,)

    def run_serially(self, default: Callable[[], Any], auxiliary: list[Callable[[], Any]]) -> Any:
        self.runs.append("serial")
        return default(), (auxiliary[0](),)


def made(
    main_size: int = 48, side_size: int = 6, plan: Plan | None = None, plain: bool = False
) -> tuple[LinearPair, Linear, Linear]:
    pair = LinearPair(main_size, side_size, plan or Plan(DUAL, 256), PatchRecord())
    pair.plain = plain
    pair.region = OnTheCpu()  # type: ignore[assignment]
    return pair, Linear(main_size), Linear(side_size)


@contextlib.contextmanager
def on_gpu(monkeypatch: pytest.MonkeyPatch, capturing: bool = True) -> Iterator[None]:
    """What the driver says of a capture."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        yield


class CudaTensor(torch.Tensor):
    """A tensor of the CPU that says of itself that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def inputs_of(tokens: int, cuda: bool = False) -> torch.Tensor:
    inputs = numbers(tokens, HIDDEN)
    return inputs.as_subclass(CudaTensor) if cuda else inputs  # type: ignore[no-any-return]


sizes = st.integers(1, 70)


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 9), st.sampled_from(STRATEGIES), st.booleans(), st.booleans())
def test_every_strategy_gives_the_linears_results(
    main_size: int, side_size: int, tokens: int, strategy: str, fused: bool, plain: bool
) -> None:
    pair, main, side = made(main_size, side_size, plain=plain)
    inputs = inputs_of(tokens)
    if fused:
        pair.fuse(main, side)
    big, small = pair.run(strategy, main, side, inputs)
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert main.calls == side.calls == (0 if plain else 1), "linears that are a GEMM and nothing else are not called"
    result = pair.run_into_one(strategy, main, side, inputs)
    assert result.shape == (tokens, pair.columns) and pair.columns % ALIGNMENT == 0
    assert 0 <= pair.columns - main_size - side_size < ALIGNMENT
    big, small = pair.slices(result)
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 9))
def test_one_gemm_is_one_linear_of_both_weights(main_size: int, side_size: int, tokens: int) -> None:
    pair, main, side = made(main_size, side_size)
    before = main.weight.clone(), side.weight.clone()
    pair.fuse(main, side)
    inputs = inputs_of(tokens)
    result = pair.run_into_one(FUSED, main, side, inputs)
    padding = torch.zeros(pair.columns - main_size - side_size, HIDDEN)
    assert torch.equal(result, linear(inputs, torch.cat((*before, padding))))
    assert not result[:, main_size + side_size :].any()
    assert [part.shape[1] for part in pair.slices(result)] == [main_size, side_size]
    assert main.calls == side.calls == 0


@pytest.mark.parametrize(
    ("strategy", "order"), [(SERIAL, "serial"), (DUAL, "side first"), (DUAL_MAIN_FIRST, "main first")]
)
@pytest.mark.parametrize("plain", [False, True], ids=["modules", "plain"])
def test_a_strategy_is_the_way_that_the_region_runs(strategy: str, order: str, plain: bool) -> None:
    pair, main, side = made(plain=plain)
    pair.run(strategy, main, side, inputs_of(3))
    pair.run_into_one(strategy, main, side, inputs_of(3))
    assert pair.region.runs == ([order] if strategy == SERIAL else [order, order])  # type: ignore[attr-defined]


# ---------------------------------------------------------------- one buffer


def test_the_parameters_stay_and_share_the_buffer() -> None:
    pair, main, side = made(48, 6)
    parameters, values = (main.weight, side.weight), (main.weight.clone(), side.weight.clone())
    assert pair.fuse(main, side) == sum(value.nbytes for value in values)
    common = pair.common
    assert common is not None and common.shape == (64, HIDDEN) and common.is_contiguous()
    assert (main.weight, side.weight) == parameters, "the objects that vLLM knows"
    assert torch.equal(main.weight, values[0]) and torch.equal(side.weight, values[1])
    assert main.weight.untyped_storage().data_ptr() == side.weight.untyped_storage().data_ptr() == common.data_ptr()
    assert torch.equal(common[:48], main.weight) and torch.equal(common[48:54], side.weight)
    assert not common[54:].any()
    assert pair._holds(main, side)
    assert pair.fuse(main, side) == 0 and pair.common is common, "once"


def test_a_reload_by_copy_reaches_the_buffer() -> None:
    pair, main, side = made()
    pair.fuse(main, side)
    with torch.no_grad():
        main.weight.copy_(numbers(48, HIDDEN))
        side.weight.data.copy_(numbers(6, HIDDEN))
    inputs = inputs_of(4)
    big, small = pair.slices(pair.run_into_one(FUSED, main, side, inputs))
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert pair._holds(main, side)


@pytest.mark.parametrize("which", ["main", "side", "swapped"])
def test_moved_weights_are_noticed(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, main, side = made(plan=SizePlan.of({4: FUSED}))
    pair.one_result = True
    pair.fuse(main, side)
    with on_gpu(monkeypatch, capturing=False):
        pair.project_into_one(main, side, inputs_of(4, cuda=True))
    if which == "swapped":
        main.weight.data, side.weight.data = side.weight.data, main.weight.data
    else:
        moved = main if which == "main" else side
        moved.weight.data = torch.zeros_like(moved.weight)
    assert not pair._holds(main, side)
    if which == "swapped":
        return
    inputs = inputs_of(4, cuda=True)
    with on_gpu(monkeypatch):
        big, small = pair.slices(pair.project_into_one(main, side, inputs))
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert pair._record.calls.serial[MOVED_WEIGHTS] == 1 and pair._record.calls.fused == 0


def test_weights_that_are_not_in_one_buffer_are_not_held() -> None:
    pair, main, side = made()
    assert pair.common is None and not pair._holds(main, side)


def test_what_one_gemm_needs() -> None:
    pair, main, side = made(48, 6)
    assert pair.fits(main, side)
    for change in (
        torch.randn(6, HIDDEN, dtype=torch.bfloat16),
        torch.randn(7, HIDDEN),
        torch.randn(6, HIDDEN + 1),
        torch.randn(HIDDEN, 6).t(),
        torch.randn(6 * HIDDEN),
        torch.randn(6, HIDDEN, device="meta"),
    ):
        side.weight = torch.nn.Parameter(change, requires_grad=False)
        assert not pair.fits(main, side), change.shape
    packed, _, _ = made(12, 6)
    assert not packed.fits(main, Linear(6)), "a packed weight has other rows than the linear"


def test_a_probe_has_its_own_region_and_the_same_weights() -> None:
    pair, main, side = made()
    pair.fuse(main, side)
    probe = pair.probe()
    assert probe.region is not pair.region and probe.common is pair.common
    assert (probe.main_size, probe.side_size, probe.columns, probe.plan) == (48, 6, 64, pair.plan)
    probe.plan = Plan(SERIAL, 0)
    assert pair.plan == Plan(DUAL, 256)


# ---------------------------------------------------------------- which way a call goes, and where it is counted


def test_on_a_cpu_everything_is_serial_through_the_linears() -> None:
    pair, main, side = made()
    inputs = inputs_of(5)
    for _ in range(2):
        big, small = pair.project(main, side, inputs)
        assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert (main.calls, side.calls) == (2, 2)
    assert pair._record.calls.serial == {"serial pass-through": 2} and pair.region.prepared == 0  # type: ignore[attr-defined]


def test_linears_with_adapters_stay_serial(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, main, side = made()
    side.base_layer = Linear(6)
    with on_gpu(monkeypatch):
        pair._prepare(main, side, inputs_of(2, cuda=True))
        pair.project(main, side, inputs_of(2, cuda=True))
    assert pair._record.calls.serial == {"LoRA on the projections": 1}
    assert (main.calls, side.calls) == (1, 1), "never past the adapters"


def test_a_capture_without_a_call_before_it_is_serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream may be made in a capture; the next call outside of one makes it."""
    pair, main, side = made()
    with on_gpu(monkeypatch):
        pair.project(main, side, inputs_of(2, cuda=True))
    assert pair._record.calls.serial == {BEFORE_CAPTURE: 1} and pair.region.prepared == 0  # type: ignore[attr-defined]
    with on_gpu(monkeypatch, capturing=False):
        pair.project(main, side, inputs_of(2, cuda=True))
    assert pair._record.calls.serial == {BEFORE_CAPTURE: 1, NOT_CAPTURING: 1} and pair.region.prepared == 1  # type: ignore[attr-defined]
    with on_gpu(monkeypatch):
        pair.project(main, side, inputs_of(2, cuda=True))
    assert pair._record.calls.dual_stream == 1


def prepared(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, fused: bool = False, plain: bool = True
) -> tuple[LinearPair, Linear, Linear]:
    """A pair after the eager call that comes before every capture, with nothing counted yet."""
    pair, main, side = made(plan=plan, plain=plain)
    if fused:
        pair.fuse(main, side)
    with on_gpu(monkeypatch, capturing=False):
        pair.project(main, side, inputs_of(1, cuda=True))
    pair._record.calls.serial.clear()
    pair.region.runs.clear()  # type: ignore[attr-defined]
    main.calls = side.calls = 0
    return pair, main, side


MEASURED = SizePlan.of({1: SERIAL, 2: DUAL, 4: DUAL_MAIN_FIRST, 8: FUSED, 16: SERIAL, 32: DUAL})


@pytest.mark.parametrize(
    ("tokens", "runs", "counted"),
    [
        (1, None, {SERIAL_PLAN: 1}),
        (2, "side first", "dual"),
        (4, "main first", "dual"),
        (8, None, "fused"),
        (16, None, {SERIAL_PLAN: 1}),
        (32, "side first", "dual"),
        (33, None, {ABOVE_THRESHOLD: 1}),
    ],
)
def test_a_capture_goes_by_the_plan(
    tokens: int, runs: str | None, counted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, main, side = prepared(MEASURED, monkeypatch, fused=True)
    inputs = inputs_of(tokens, cuda=True)
    with on_gpu(monkeypatch):
        big, small = pair.slices(pair.project_into_one(main, side, inputs))
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert pair.region.runs == ([] if runs is None else [runs])  # type: ignore[attr-defined]
    calls = pair._record.calls
    assert (calls.dual_stream, calls.fused) == (int(counted == "dual"), int(counted == "fused"))
    assert calls.serial == (counted if isinstance(counted, dict) else {})
    assert calls.total() == 1


def test_a_graph_with_two_results_is_never_one_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, main, side = prepared(MEASURED, monkeypatch, fused=True)
    inputs = inputs_of(8, cuda=True)
    with on_gpu(monkeypatch):
        big, small = pair.project(main, side, inputs)
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert big.is_contiguous() and small.is_contiguous()
    assert pair._record.calls.fused == 0 and pair._record.calls.serial == {TWO_RESULTS: 1}


@pytest.mark.parametrize("tokens", [4, 33], ids=["of a captured size", "above them"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "more than a GEMM"])
def test_an_eager_step_goes_past_modules_that_are_plain(
    plain: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them costs some microseconds of Python; what is more than a GEMM has to be called."""
    pair, main, side = prepared(MEASURED, monkeypatch, plain=plain)
    inputs = inputs_of(tokens, cuda=True)
    with on_gpu(monkeypatch, capturing=False):
        big, small = pair.project(main, side, inputs)
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert main.calls == side.calls == (0 if plain else 1)
    assert pair._record.calls.serial == {NOT_CAPTURING if tokens == 4 else ABOVE_THRESHOLD: 1}


@pytest.mark.parametrize("one_result", [False, True], ids=["two results", "one result"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "more than a GEMM"])
def test_a_prompt_above_the_captured_sizes_takes_the_shortest_way(
    plain: bool, one_result: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the modules, their look-up of a parameter, and the region; counted once all the same."""
    pair, main, side = prepared(MEASURED, monkeypatch, plain=plain)
    inputs = inputs_of(33, cuda=True)
    looked_up: list[str] = []

    def look_up(module: torch.nn.Module, name: str) -> Any:
        looked_up.append(name)
        return torch.nn.Module.__getattr__(module, name)

    monkeypatch.setattr(Linear, "__getattr__", look_up)
    with on_gpu(monkeypatch, capturing=False):
        if one_result:
            big, small = pair.slices(pair.project_into_one(main, side, inputs))
        else:
            big, small = pair.project(main, side, inputs)
    assert (looked_up == []) == plain
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))
    assert pair.region.runs == ([] if plain or one_result else ["serial"])  # type: ignore[attr-defined]
    assert pair._record.calls.serial == {ABOVE_THRESHOLD: 1}


@pytest.mark.parametrize("one_result", [False, True], ids=["two results", "one result"])
def test_a_prompt_can_be_the_first_call_of_all(one_result: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM profiles with its largest batch; what a capture needs has to be made then."""
    pair, main, side = made(plan=MEASURED, plain=True)
    project = pair.project_into_one if one_result else pair.project
    with on_gpu(monkeypatch, capturing=False):
        project(main, side, inputs_of(33, cuda=True))
    assert pair.region.prepared == 1 and pair._record.calls.serial == {NOT_CAPTURING: 1}  # type: ignore[attr-defined]
    with on_gpu(monkeypatch):
        project(main, side, inputs_of(2, cuda=True))
    assert pair._record.calls.dual_stream == 1


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """Inputs as Inductor may lay them out: with two or three dimensions, rows apart or columns first."""
    leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    if draw(st.booleans()):
        return numbers(*leading, HIDDEN + draw(st.integers(0, 3)))[..., :HIDDEN]
    return numbers(HIDDEN, *leading).movedim(0, -1)


@settings(deadline=None)
@given(strided(), st.sampled_from(STRATEGIES))
def test_modules_are_called_with_contiguous_inputs(inputs: torch.Tensor, strategy: str) -> None:
    """Not every kernel takes other strides than those that vLLM's own graph gives it."""
    pair, main, side = made()
    big, small = pair.run(strategy, main, side, inputs)
    assert main.contiguous == side.contiguous == [True]
    assert torch.equal(big, linear(inputs, main.weight)) and torch.equal(small, linear(inputs, side.weight))


@settings(deadline=None)
@given(strided(), st.sampled_from(STRATEGIES))
def test_a_plain_pair_is_torchs_linear_of_the_inputs_as_they_are(inputs: torch.Tensor, strategy: str) -> None:
    """The call that stock's graph makes, without a copy before it."""
    pair, main, side = made(plain=True)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        given.append((inputs, weight))
        return linear(inputs, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_module, "linear", recorded)
        pair.run(strategy, main, side, inputs)
    order = [main, side] if strategy != DUAL else [side, main]
    assert len(given) == 2 and all(one[0] is inputs for one in given)
    assert all(one[1] is module.weight for one, module in zip(given, order, strict=True))
