"""Real servers under load: requests arrive at several rates, at random moments (`vllm bench serve --request-rate`).

Random prompts and arrivals come from one seed, so all servers answer the same requests at the same times. A row's ratio is that of
the medians over all requests, its interval a bootstrap over them: requests are not paired, for a server under load makes its
own batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overlay.cli.bench.intervals import compare_sets, median, quantile
from overlay.cli.bench.servers import LEAST_REQUESTS, Fleet, Load, seconds_of_requests

KEY = "serving"


def load(rate: float, seconds: float, prompt: int, output: int) -> Load:
    """As many requests as arrive in `seconds`, and enough for a median."""
    requests = max(LEAST_REQUESTS, round(rate * seconds))
    return Load(rate, ("--request-rate", f"{rate:g}"), prompt, output, requests, fresh=True)


def measure(fleet: Fleet, arms: Sequence[str], loads: Sequence[Load], rounds: int, together: bool) -> None:
    """All rates on the servers of two arms."""
    samples: dict[float, dict[str, list[dict[str, Any]]]] = {one.size: {arm: [] for arm in arms} for one in loads}
    groups = [tuple(arms)] if together else [(arm,) for arm in arms]
    for one, arm, _, found in fleet.drive([(group, range(rounds)) for group in groups], loads):
        samples[one.size][arm].append(found)
        fleet.results.put(KEY, "rows", value=rows_of(samples, arms))


def rows_of(samples: Mapping[float, Mapping[str, Sequence[Mapping[str, Any]]]], arms: Sequence[str]) -> list[Any]:
    """Per rate and metric: medians, 99th percentiles, the ratio with its interval. Seconds."""
    stock, other = arms
    rows = []
    for rate, by_arm in samples.items():
        if not by_arm[stock] or not by_arm[other]:
            continue
        runs = {arm: [seconds_of_requests(run) for run in by_arm[arm]] for arm in arms}
        for metric in ("ttft", "tpot"):
            values = {arm: [value for run in runs[arm] for value in run[metric]] for arm in arms}
            if not all(values.values()):
                continue
            row = {
                "rate": rate,
                "metric": metric,
                "arm": other,
                **compare_sets(values[stock], values[other]).as_dict(),
                "stock_p99": quantile(values[stock], 0.99),
                "overlay_p99": quantile(values[other], 0.99),
                "requests": {arm: len(values[arm]) for arm in arms},
                "failed": {arm: sum(int(run.get("failed") or 0) for run in by_arm[arm]) for arm in arms},
                "requests_per_second": {
                    arm: median([float(run["request_throughput"]) for run in by_arm[arm]]) for arm in arms
                },
            }
            rows.append(row)
    return rows
