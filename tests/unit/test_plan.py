"""When a fork pays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overlay.plan import Plan


def test_the_auxiliary_stream_is_for_small_captured_batches() -> None:
    plan = Plan("dual", 256)
    assert plan.reason_for_serial(1, capturing=True) is None
    assert plan.reason_for_serial(256, capturing=True) is None
    assert plan.reason_for_serial(257, capturing=True) == "above the token threshold"


@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_never_outside_a_capture_and_never_when_the_plan_is_serial(tokens: int, threshold: int) -> None:
    assert Plan("dual", threshold).reason_for_serial(tokens, capturing=False) == "not capturing a CUDA graph"
    assert Plan("serial", threshold).reason_for_serial(tokens, capturing=True) == "plan is serial"
