"""Medians and bootstrap intervals of paired measurements."""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Overlay against stock over paired rounds. Times are seconds; `ratio` is the median of the rounds' ratios."""

    rounds: int
    stock: float
    overlay: float
    ratio: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def verdict(self, target: float) -> str:
        """`met`: the median is at or below the target. `within`: not shown to be above it. `above`: shown."""
        if self.ratio <= target:
            return "met"
        return "within" if self.low <= target else "above"


def bootstrap(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A percentile bootstrap interval of the median."""
    if not values:
        raise ValueError("no values")
    if len(values) == 1:
        return values[0], values[0]
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    edge = (1.0 - confidence) / 2.0
    return medians[int(edge * RESAMPLES)], medians[min(RESAMPLES - 1, int((1.0 - edge) * RESAMPLES))]


def compare(stock: Sequence[float], overlay: Sequence[float]) -> Comparison:
    """Compare paired rounds: the two engines' times of one round stand at the same index."""
    ratios = [new / old for old, new in zip(stock, overlay, strict=True)]
    low, high = bootstrap(ratios)
    return Comparison(
        rounds=len(ratios),
        stock=statistics.median(stock),
        overlay=statistics.median(overlay),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
    )
