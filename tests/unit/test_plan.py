"""When a fork pays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlay.plan import ABOVE_THRESHOLD, NOT_CAPTURING, SERIAL_PLAN, Plan


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
