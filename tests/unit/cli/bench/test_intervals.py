"""The statistics of the benchmark."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.cli.bench import engines, intervals

#: Seconds of something that took time. Few different ones, so that rounds are often equal.
TIMES = st.one_of(st.floats(1e-6, 1e3), st.sampled_from([0.5, 1.0, 1.01]))


def test_the_interval_covers_the_median() -> None:
    generator = random.Random(1)
    covered = 0
    for _ in range(60):
        found = intervals.interval_of_median([generator.gauss(1.0, 0.1) for _ in range(15)])
        covered += found.low <= 1.0 <= found.high
        assert found.kind == intervals.BCA
    assert 51 <= covered < 60


@pytest.mark.parametrize("rounds", range(2, intervals.FEWEST))
def test_the_interval_of_few_rounds_covers_as_often_as_it_says(rounds: int) -> None:
    """Their range, which was taken before, covers the ratio in half of all runs of two rounds, and in three quarters of three."""
    generator, runs = random.Random(1), 400
    covered = 0
    for _ in range(runs):
        found = intervals.compare([1.0] * rounds, [0.95 * math.exp(generator.gauss(0.0, 0.01)) for _ in range(rounds)])
        covered += found.low <= 0.95 <= found.high
        assert found.interval == intervals.T
    assert 0.92 <= covered / runs <= 0.98


@given(st.lists(TIMES, min_size=1, max_size=12))
def test_the_interval_of_ratios_has_their_median_in_it(times: list[float]) -> None:
    found = intervals.compare([1.0] * len(times), times)
    assert (
        0.0 < found.low <= found.ratio * (1 + 1e-9)
        and found.ratio <= found.high * (1 + 1e-9)
        and math.isfinite(found.high)
    )
    if len(set(times)) == 1:
        assert found.interval == intervals.RANGE
    elif len(times) < intervals.FEWEST:
        assert found.interval == intervals.T


def test_rounds_are_compared_in_pairs() -> None:
    found = intervals.compare([1.0, 2.0, 4.0], [0.9, 1.8, 3.6])
    assert found.ratio == pytest.approx(0.9)


@settings(deadline=None, max_examples=60)
@given(st.lists(TIMES, min_size=1, max_size=12))
def test_every_number_of_rounds_has_an_interval(times: list[float]) -> None:
    found = intervals.interval_of_median(times)
    middle = statistics.median(times)
    near = 1e-9 * max(times)
    assert math.isfinite(found.low) and math.isfinite(found.high)
    assert min(times) - near <= found.low <= middle + near and middle - near <= found.high <= max(times) + near
    if len(times) < intervals.FEWEST or len(set(times)) == 1:
        assert found == intervals.Interval(min(times), max(times), intervals.RANGE)


@settings(deadline=None, max_examples=40)
@given(st.lists(TIMES, min_size=1, max_size=9), st.lists(TIMES, min_size=1, max_size=9))
def test_two_sets_of_requests_have_one_however_few_they_are(stock: list[float], overlay: list[float]) -> None:
    found = intervals.compare_sets(stock, overlay)
    assert found.ratio == pytest.approx(statistics.median(overlay) / statistics.median(stock))
    assert math.isfinite(found.low) and math.isfinite(found.high) and found.low <= found.high
    if min(len(stock), len(overlay)) < intervals.FEWEST:
        assert found.interval == intervals.RANGE and found.low <= found.ratio <= found.high


def test_no_values_are_no_interval() -> None:
    with pytest.raises(ValueError, match="no values"):
        intervals.interval_of_median([])
    with pytest.raises(ValueError, match="no values"):
        intervals.compare_sets([], [1.0])


def test_a_row_says_which_kind_its_intervals_are() -> None:
    few = engines.paired_row({"stock": [1.0] * 5, "overlay": [0.9] * 5, "serial": [1.0] * 5})
    assert few["interval"] == few["arms"]["overlay"]["interval"] == few["against"]["serial"]["interval"] == "range"
    few = engines.paired_row({"stock": [1.0] * 3, "overlay": [0.9, 0.91, 0.9], "serial": [1.0, 1.0, 1.1]})
    assert few["interval"] == few["arms"]["serial"]["interval"] == few["against"]["serial"]["interval"] == "t"
    generator = random.Random(2)
    times = [generator.uniform(0.9, 1.1) for _ in range(12)]
    assert engines.paired_row({"stock": [1.0] * 12, "overlay": times})["arms"]["overlay"]["interval"] == "bca"
