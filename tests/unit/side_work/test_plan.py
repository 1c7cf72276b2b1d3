"""When a fork pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlay.side_work.plan import ABOVE_THRESHOLD, NOT_CAPTURING, SERIAL_PLAN, Plan, SizePlan
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL


def reason(plan: Plan, tokens: int, capturing: bool) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        return plan.reason_for_serial(tokens)


def test_the_auxiliary_stream_is_for_small_captured_batches() -> None:
    plan = Plan("dual", 256)
    assert reason(plan, 1, capturing=True) is None
    assert reason(plan, 256, capturing=True) is None
    assert reason(plan, 257, capturing=True) == ABOVE_THRESHOLD


@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_never_outside_a_capture_and_never_when_the_plan_is_serial(tokens: int, threshold: int) -> None:
    assert reason(Plan("dual", threshold), tokens, capturing=False) in (NOT_CAPTURING, ABOVE_THRESHOLD)
    assert reason(Plan("serial", threshold), tokens, capturing=True) in (SERIAL_PLAN, ABOVE_THRESHOLD)
    assert (reason(Plan("dual", threshold), tokens, capturing=True) is None) == (tokens <= threshold)


def test_a_large_eager_step_asks_the_driver_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    assert Plan("dual", 256).reason_for_serial(8192) == ABOVE_THRESHOLD


# ---------------------------------------------------------------- a strategy for each captured size

STRATEGIES = st.sampled_from([SERIAL, DUAL, DUAL_MAIN_FIRST])
MEASURED = st.dictionaries(st.integers(1, 1024), STRATEGIES, max_size=12)


@given(MEASURED)
def test_a_measured_size_has_its_strategy_up_to_the_last_one_that_gains(strategies: dict[int, str]) -> None:
    plan = SizePlan.of(strategies)
    gaining = [tokens for tokens, strategy in strategies.items() if strategy != SERIAL]
    assert plan.token_threshold == max(gaining, default=0)
    for tokens, strategy in strategies.items():
        assert plan.strategy(tokens) == strategy
        why = reason(plan, tokens, capturing=True)
        if strategy != SERIAL:
            assert why is None
        else:
            assert why == (ABOVE_THRESHOLD if tokens > plan.token_threshold else SERIAL_PLAN)


@given(MEASURED, st.integers(0, 1100))
def test_a_size_that_was_not_measured_forks_where_both_its_neighbours_do(
    strategies: dict[int, str], tokens: int
) -> None:
    plan = SizePlan.of(strategies)
    below = max((size for size in strategies if size < tokens), default=None)
    above = min((size for size in strategies if size > tokens), default=None)
    around = [strategies[size] for size in (below, above) if size is not None]
    if tokens not in strategies:
        assert plan.strategy(tokens) == (around[0] if around and SERIAL not in around else SERIAL)


def test_the_order_in_which_sizes_were_measured_does_not_matter() -> None:
    assert SizePlan.of({64: DUAL, 8: DUAL, 16: SERIAL}) == SizePlan.of({8: DUAL, 16: SERIAL, 64: DUAL})
    assert SizePlan.of({64: DUAL, 8: DUAL, 16: SERIAL}).strategy(12) == SERIAL


def test_nothing_measured_is_serial_at_once() -> None:
    assert reason(SizePlan.of({}), 1, capturing=True) == ABOVE_THRESHOLD
    assert SizePlan.of({}).strategy(1) == SERIAL


@pytest.mark.parametrize("tokens", [65, 24, 20, 8192])
def test_a_size_that_is_serial_anyway_asks_the_driver_nothing(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    def asked() -> bool:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    plan = SizePlan.of({8: DUAL, 16: DUAL, 24: SERIAL, 64: DUAL_MAIN_FIRST})
    assert plan.reason_for_serial(tokens) in (ABOVE_THRESHOLD, SERIAL_PLAN)
    with pytest.raises(AssertionError, match="driver"):
        plan.reason_for_serial(12)


def test_an_eager_step_of_a_size_that_gains_is_serial() -> None:
    assert reason(SizePlan.of({8: DUAL, 64: DUAL_MAIN_FIRST}), 64, capturing=False) == NOT_CAPTURING
