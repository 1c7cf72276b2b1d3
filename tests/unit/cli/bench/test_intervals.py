"""The statistics of the benchmark."""

from __future__ import annotations

import random

import pytest

from overlay.cli.bench import intervals


def test_the_interval_covers_the_median() -> None:
    generator = random.Random(1)
    covered = 0
    for _ in range(60):
        low, high = intervals.bootstrap([generator.gauss(1.0, 0.1) for _ in range(15)])
        covered += low <= 1.0 <= high
    assert covered >= 51


def test_rounds_are_compared_in_pairs() -> None:
    found = intervals.compare([1.0, 2.0, 4.0], [0.9, 1.8, 3.6])
    assert found.ratio == pytest.approx(0.9)
