"""Memory of the servers over the time of a soak, and whether it grows."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.5
#: A program has to be started for each of these.
DEVICE_SAMPLE_SECONDS = 5.0
#: A slope is fitted to the medians of so many stretches of time of equal length.
BLOCKS = 20
#: A second half that is shorter than this says nothing: the servers' caches are still being used for the first time.
SHORTEST_SECONDS = 180.0
#: The 97.5 % quantile of Student's t with BLOCKS - 2 degrees of freedom.
STUDENT = 2.101
MIB = 1024.0 * 1024.0

#: (seconds, bytes)
Series = list[tuple[float, float]]


def resident_bytes(process_ids: Iterable[int]) -> int:
    """The resident set of these processes, added up. Pages that several share count for each."""
    pages = 0
    for process_id in process_ids:
        with contextlib.suppress(OSError):  # it has just ended
            pages += int(Path(f"/proc/{process_id}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def device_bytes() -> int | None:
    """Used memory of the GPUs that this process may use (CUDA_VISIBLE_DEVICES), by nvidia-smi; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    result = subprocess.run(
        [program, *([f"--id={chosen}"] if chosen else []), "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    values = result.stdout.split()
    if result.returncode or not values or not all(value.isdigit() for value in values):
        return None
    return int(sum(map(int, values)) * MIB)


@dataclass(frozen=True)
class Slope:
    """MiB per minute, with a 95 % interval."""

    growth: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.growth:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def slope_of(series: Sequence[tuple[float, float]]) -> Slope | None:
    """Least squares through the medians of BLOCKS stretches of the second half; None where that is too short.

    The first half is left out: caches and pools fill. Medians, because garbage collection makes spikes; stretches, because
    samples of neighbouring moments are no independent ones, and would make the interval look narrower than it is.
    """
    if not series:
        return None
    middle = (series[0][0] + series[-1][0]) / 2
    half = [point for point in series if point[0] >= middle]
    if len(half) < BLOCKS or half[-1][0] - half[0][0] < SHORTEST_SECONDS:
        return None
    edges = [round(number * len(half) / BLOCKS) for number in range(BLOCKS + 1)]
    blocks = [half[first:last] for first, last in itertools.pairwise(edges)]
    minutes = [statistics.fmean(seconds for seconds, _ in block) / 60 for block in blocks]
    values = [statistics.median(size for _, size in block) / MIB for block in blocks]
    growth, start = statistics.linear_regression(minutes, values)
    residual = sum((value - start - growth * minute) ** 2 for minute, value in zip(minutes, values, strict=True))
    spread = sum((minute - statistics.fmean(minutes)) ** 2 for minute in minutes)
    margin = STUDENT * (residual / (BLOCKS - 2) / spread) ** 0.5
    return Slope(growth, growth - margin, growth + margin)


def difference(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> Series:
    """second - first, of samples taken at the same moments."""
    return [(seconds, size - other) for (seconds, other), (_, size) in zip(first, second, strict=True)]


class Sampler:
    """Takes samples of each side's processes at the same moments until it is stopped, and of the devices."""

    def __init__(self, sides: Mapping[str, Callable[[], Iterable[int]]]) -> None:
        self._sides = sides
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._stopped = threading.Event()
        self._started = time.monotonic()
        self.resident: dict[str, Series] = {name: [] for name in sides}
        self.device: Series = []

    def start(self) -> None:
        self._thread.start()

    def _follow(self) -> None:
        has_device, device_due = True, 0.0
        while not self._stopped.wait(SAMPLE_SECONDS):
            seconds = time.monotonic() - self._started
            for name, sizes in {name: resident_bytes(ids()) for name, ids in self._sides.items()}.items():
                self.resident[name].append((seconds, sizes))
            if has_device and seconds >= device_due:
                used = device_bytes()
                has_device, device_due = used is not None, seconds + DEVICE_SAMPLE_SECONDS
                if used is not None:
                    self.device.append((seconds, used))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def snapshot(self) -> dict[str, Any]:
        """The samples so far, as pairs of seconds and MiB."""
        # The sides get their samples one after the other; a copy between the two has one more of the first.
        count = min(map(len, self.resident.values()))
        return {
            "resident": {name: _rounded(series[:count]) for name, series in self.resident.items()},
            "device": _rounded(list(self.device)),
        }


def _rounded(series: Series) -> list[tuple[float, float]]:
    return [(round(seconds, 2), round(size / MIB, 3)) for seconds, size in series]
