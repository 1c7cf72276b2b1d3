"""Medians and their 95 % intervals: of paired rounds, and of two sets of requests.

The interval is scipy's BCa bootstrap. There is one rule for where it does not hold: fewer than FEWEST values, or no answer from
scipy (BCa divides by the spread of the values, so it has none for equal ones). Then the interval is the **range**: the smallest
and the largest value. A median's interval cannot be wider, and n values contain the median with a probability of 1 - 2 / 2^n, which
reaches 95 % at six. So a range of fewer rounds is less than a 95 % interval, and `interval` says that it is a range.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESAMPLES = 2000
CONFIDENCE = 0.95
#: With fewer values not even their range is a 95 % interval of the median.
FEWEST = 6
BCA, RANGE = "bca", "range"
#: Resamples that are held in memory at once, of a set of thousands of requests.
BATCH = 100


@dataclass(frozen=True)
class Interval:
    """`kind` is BCA, or RANGE where there are too few values or they are all alike."""

    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Comparison:
    """Overlay against stock over paired rounds. Times are seconds; `ratio` is the median of the rounds' ratios, `interval` the
    kind of the interval from `low` to `high`."""

    rounds: int
    stock: float
    overlay: float
    ratio: float
    low: float
    high: float
    interval: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def ratio_as_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "low": self.low, "high": self.high, "interval": self.interval}


def median(values: Sequence[float]) -> float:
    return float(numpy.median(values))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies, by numpy's linear interpolation."""
    return float(numpy.quantile(values, share))


def interval_of_median(values: Sequence[float]) -> Interval:
    """The 95 % interval of the median. Raises ValueError where there are no values."""
    return _interval((values,), numpy.median, (min(values, default=math.nan), max(values, default=math.nan)))


def compare(stock: Sequence[float], overlay: Sequence[float]) -> Comparison:
    """Compare paired rounds: the two engines' times of one round stand at the same index."""
    ratios = [new / old for old, new in zip(stock, overlay, strict=True)]
    return _comparison(len(ratios), stock, overlay, median(ratios), interval_of_median(ratios))


def compare_sets(stock: Sequence[float], overlay: Sequence[float]) -> Comparison:
    """Compare two sets of requests that are not paired: the ratio of their medians, each resampled for itself."""

    def ratio(old: Any, new: Any, axis: int = -1) -> Any:
        return numpy.median(new, axis=axis) / numpy.median(old, axis=axis)

    if not stock or not overlay:
        raise ValueError("no values")
    found = _interval((stock, overlay), ratio, (min(overlay) / max(stock), max(overlay) / min(stock)))
    return _comparison(min(len(stock), len(overlay)), stock, overlay, median(overlay) / median(stock), found)


def _comparison(
    rounds: int, stock: Sequence[float], overlay: Sequence[float], ratio: float, found: Interval
) -> Comparison:
    return Comparison(rounds, median(stock), median(overlay), ratio, found.low, found.high, found.kind)


def _interval(
    samples: tuple[Sequence[float], ...], statistic: Callable[..., Any], widest: tuple[float, float]
) -> Interval:
    """scipy's interval, or `widest` by the rule that the module states."""
    if not all(samples):
        raise ValueError("no values")
    if min(map(len, samples)) >= FEWEST:
        with warnings.catch_warnings():  # scipy warns where it has no answer; the answer says so as well
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                samples,
                statistic,
                n_resamples=RESAMPLES,
                batch=BATCH,
                confidence_level=CONFIDENCE,
                method="BCa",
                vectorized=True,
                random_state=0,
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            return Interval(float(found.low), float(found.high), BCA)
    return Interval(float(widest[0]), float(widest[1]), RANGE)
