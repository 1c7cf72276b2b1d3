"""The ratios to stock that the gdn patch was built to reach."""

from __future__ import annotations

from typing import Any

FIRST_TOKEN = 1.05
COMPILE = 1.02


def decode(requests: int) -> float:
    """Of a decode step with that many running requests."""
    if requests <= 8:
        return 0.95
    return 0.98 if requests <= 64 else 1.00


def verdict(row: dict[str, Any], target: float) -> str:
    """`met`: the median is at or below the target. `within`: not shown to be above it. `above`: shown."""
    if row["ratio"] <= target:
        return "met"
    return "within" if row["low"] <= target else "above"
