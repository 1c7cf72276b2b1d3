"""What start, start_layer and join do on a GPU, with recording fakes in the place of CUDA."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from overlay.report.journal import PatchRecord
from overlay.side_work import lane, ops
from overlay.side_work.plan import ABOVE_THRESHOLD, NOT_CAPTURING, SERIAL_PLAN, Plan, SizePlan
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL
from tests.unit.fake_cuda import FakeCuda, fake_cuda

HIDDEN, MAIN, SIDE = 16, 24, 8
NAME = "a pair"
CPU = torch.device("cpu")
FORK = [("record", "main", "event0"), ("wait", "aux0", "event0")]
SIDE_WORK = [("work", "side", "aux0"), ("record", "aux0", "event1")]
MAIN_WORK = [("work", "main", "main")]
JOIN = [("wait", "main", "event1")]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def whole_numbers(*shape: int) -> torch.Tensor:
    """Their sums are the same in every order."""
    return torch.randint(-4, 5, shape).float()


class Gpu:
    """A GPU of recording fakes, the layer of a pair, and what the ops count."""

    def __init__(self, cuda: FakeCuda, plan: Plan | None) -> None:
        self.cuda, self.record = cuda, PatchRecord()
        self.pairs = {} if plan is None else {NAME: ops.PlannedPair(plan, self.record)}
        self.weight, self.gate = whole_numbers(SIDE, HIDDEN), whole_numbers(MAIN, HIDDEN)
        self.capturing = True
        self.gives: torch.Tensor | None = None  #: what a serial side gives, to have its address
        self.of_torch = torch.nn.functional.linear

    def gemm(self, x: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None:
        self.cuda.work("side")()
        assert result.shape == (x.shape[0], SIDE), "torch.mm would give it another size, and with it other memory"
        torch.mm(x, weight.t(), out=result)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.cuda.work("side")()
        assert x.is_contiguous()
        return self.of_torch(x, weight) if self.gives is None else self.gives

    def start(self, plain: bool, x: torch.Tensor) -> torch.Tensor:
        if plain:
            return ops._start(x, self.weight, self.gate, SIDE, NAME)
        return ops._start_layer(x, self.gate, SIDE, "ba", NAME, ops.encode_layer_name("a layer"))

    def step(self, plain: bool, x: torch.Tensor) -> torch.Tensor:
        side = self.start(plain, x)
        self.cuda.work("main")()
        ops._join(side, self.gate, x)
        return side


@contextlib.contextmanager
def gpu(plan: Plan | None, with_lane: bool = True) -> Iterator[Gpu]:
    with fake_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        made = Gpu(cuda, plan)
        layer = types.SimpleNamespace(_modules={"ba": lambda x: (made.linear(x, made.weight), None)})
        context = types.SimpleNamespace(no_compile_layers={"a layer": layer})
        patch.setattr(ops, "planned", made.pairs)
        patch.setattr(ops, "gemm", made.gemm)
        patch.setattr(ops, "get_forward_context", lambda: context)
        patch.setattr(torch.nn.functional, "linear", made.linear)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
        if with_lane:
            assert lane.prepare(CPU) is not None
        del cuda.log[:]
        yield made


#: By the number of tokens.
PLAN = SizePlan.of({1: DUAL, 2: DUAL_MAIN_FIRST, 3: SERIAL, 4: DUAL})
SERIAL_ORDER = [("work", "side", "main"), *MAIN_WORK]
FORKED = [*FORK, *SIDE_WORK, *MAIN_WORK, *JOIN]
either = pytest.mark.parametrize("plain", [True, False], ids=["a plain side", "a side that is called"])


@either
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_the_order_on_the_streams_is_the_plans(plain: bool, tokens: int) -> None:
    main_first = [FORK[0], *MAIN_WORK, FORK[1], *SIDE_WORK, *JOIN] if plain else FORKED
    expected = {DUAL: FORKED, DUAL_MAIN_FIRST: main_first, SERIAL: SERIAL_ORDER}[PLAN.strategies[tokens]]
    with gpu(PLAN) as on:
        x = whole_numbers(tokens, HIDDEN)
        for number in (1, 2):
            del on.cuda.log[:]
            side = on.step(plain, x.as_subclass(OnGpu))
            assert on.cuda.log == expected
            assert torch.equal(side.as_subclass(torch.Tensor), on.of_torch(x, on.weight))
            serial = tokens == 3
            assert on.record.calls.dual_stream == (0 if serial else number)
            assert on.record.calls.serial == ({SERIAL_PLAN: number} if serial else {}), "each call counts once"


@either
@pytest.mark.parametrize(
    "reason", [NOT_CAPTURING, ABOVE_THRESHOLD, ops.NO_STREAM, ops.PASS_THROUGH, "a pair of yesterday"]
)
def test_where_nothing_may_be_forked_the_side_is_computed_at_once(plain: bool, reason: str) -> None:
    known = reason != "a pair of yesterday"
    with gpu(PLAN if known else None, with_lane=reason != ops.NO_STREAM) as on:
        on.capturing = reason != NOT_CAPTURING
        x = whole_numbers(5 if reason == ABOVE_THRESHOLD else 4, HIDDEN)
        side = on.step(plain, x if reason == ops.PASS_THROUGH else x.as_subclass(OnGpu))
    assert on.cuda.log == SERIAL_ORDER
    assert torch.equal(side.as_subclass(torch.Tensor), on.of_torch(x, on.weight))
    assert on.record.calls.serial == ({reason: 1} if known else {}) and on.record.calls.dual_stream == 0


@given(st.booleans(), st.sampled_from([1, 2]))
def test_a_fork_that_a_failed_capture_has_left_is_not_joined_by_a_later_call(plain: bool, tokens: int) -> None:
    """The serial result has the address of the one that was never joined."""
    with gpu(PLAN) as on:
        left = on.start(plain, whole_numbers(tokens, HIDDEN).as_subclass(OnGpu))
        on.gives = left
        del on.cuda.log[:]
        assert on.step(plain, whole_numbers(3, HIDDEN).as_subclass(OnGpu)) is left
    assert on.cuda.log == SERIAL_ORDER


def test_an_input_of_another_shape_than_a_model_has_is_not_forked() -> None:
    """torch.mm, which is what a fork calls, takes rows and columns only."""
    with gpu(PLAN) as on:
        x = whole_numbers(2, 3, HIDDEN)
        side = on.step(True, x.as_subclass(OnGpu))
    assert on.cuda.log == SERIAL_ORDER and torch.equal(side.as_subclass(torch.Tensor), on.of_torch(x, on.weight))


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_side_that_is_called_gets_its_rows_one_after_the_other_in_memory(tokens: int) -> None:
    """Inductor may lay the op's input out otherwise."""
    with gpu(SizePlan.of({2: DUAL, 3: SERIAL})) as on:
        x = whole_numbers(HIDDEN, tokens).t()
        assert not x.is_contiguous()
        side = on.step(False, x.as_subclass(OnGpu))  # `Gpu.linear` looks at it
    assert torch.equal(side.as_subclass(torch.Tensor), on.of_torch(x, on.weight))
