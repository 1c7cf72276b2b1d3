"""Medians and bootstrap intervals: of paired rounds, and of two sets of requests."""

from __future__ import annotations

import random
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 2000
CONFIDENCE = 0.95


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


def bootstrap(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
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


def compare_sets(stock: Sequence[float], overlay: Sequence[float], seed: int = 0) -> Comparison:
    """Compare two sets of requests that are not paired: the ratio of their medians, each resampled for itself."""
    if not stock or not overlay:
        raise ValueError("no values")
    generator = random.Random(seed)

    def median(values: Sequence[float]) -> float:
        return statistics.median(generator.choices(values, k=len(values)))

    ratios = sorted(median(overlay) / median(stock) for _ in range(RESAMPLES))
    edge = int((1.0 - CONFIDENCE) / 2.0 * RESAMPLES)
    return Comparison(
        rounds=min(len(stock), len(overlay)),
        stock=statistics.median(stock),
        overlay=statistics.median(overlay),
        ratio=statistics.median(overlay) / statistics.median(stock),
        low=ratios[edge],
        high=ratios[RESAMPLES - 1 - edge],
    )
