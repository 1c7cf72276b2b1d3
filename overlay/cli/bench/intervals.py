"""Medians and their 95 % intervals: of paired rounds, and of two sets of requests.

Six values or more have scipy's BCa bootstrap. Two to five ratios of paired rounds have Student's t of their logarithms. Their range would
be too narrow: the range of n values contains the median with a probability of 1 - 2 / 2^n, which reaches 95 % at six.

Everything else has its **range**, the smallest and the largest value: one round, a set of fewer than six requests, and values of which so
many are alike that there is no answer (both methods divide by a spread). `interval` says which one it is.
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
BCA, T, RANGE = "bca", "t", "range"
#: Resamples that are held in memory at once, of a set of thousands of requests.
BATCH = 100


@dataclass(frozen=True)
class Interval:
    """`kind` is BCA, T or RANGE."""

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
    found = _interval_of_few(ratios) if len(ratios) < FEWEST else interval_of_median(ratios)
    return _comparison(len(ratios), stock, overlay, median(ratios), found)


def _interval_of_few(ratios: Sequence[float]) -> Interval:
    """Student's t of the logarithms."""
    if len(set(ratios)) < 2:
        return interval_of_median(ratios)
    with warnings.catch_warnings():  # scipy warns of values that are almost alike
        warnings.simplefilter("ignore")
        found = stats.ttest_1samp(numpy.log(ratios), 0.0).confidence_interval(CONFIDENCE)
    return Interval(math.exp(found.low), math.exp(found.high), T)


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
