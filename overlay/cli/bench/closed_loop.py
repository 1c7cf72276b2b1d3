"""A fixed number of clients on real servers: each sends its next request when the last one has been answered.

`vllm serve` of every arm and `vllm bench serve --max-concurrency`. The arms get each number of clients in turn, round by round, and the
times of one round belong together. A time of a round is the median over its requests. All rounds send the same prompts, so the
answers of stock's later rounds say what stock itself repeats; the others' are compared with the same ones.

Where the servers do not fit beside each other, each arm has all its rounds at once, and stock has half of its rounds before the
others and half behind them: a drift of the machine meets both.

`results.json` gets `concurrency`::

    {"rows": [{"requests": 8, "metric": "tpot" | "ttft", "requests_per_second": {"stock", …}, … as a row of decode …}],
     "answers": [{"requests": 8, "arms": {"stock": {"different", "of"}, "overlay": {"different", "of"}}}],
     "together": true, "prompt": 512, "output": 128, "start_seconds": {"stock"}, "journals": {"overlay": […]}}

`requests` is the number of clients. `different` counts answers, over all rounds, that are not those of stock's first round. A server's
batches depend on the moment, so above one client an answer may differ by rounding; stock's own count is the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.engines import SEED, paired_row
from overlay.cli.bench.intervals import median
from overlay.cli.bench.results import Results
from overlay.cli.bench.serving import WARM_UP_REQUESTS, put_journals, run_client, running, seconds_of_requests
from overlay.cli.bench.setup import STOCK, Setup

if TYPE_CHECKING:
    from overlay.cli.bench.progress import Progress

KEY = "concurrency"
METRICS = ("tpot", "ttft")
#: Requests of a run at least, so that its median means something with one client.
LEAST_REQUESTS = 8
#: A run that would begin with less time left is left out.
RESERVE_SECONDS = 30.0

#: Results of `vllm bench serve` by number of clients, arm and round.
Runs = dict[int, dict[str, dict[int, dict[str, Any]]]]


@dataclass(frozen=True)
class Loop:
    """Numbers of clients; rounds, and requests of each client in a round; tokens of a request and of its answer."""

    clients: tuple[int, ...]
    rounds: int
    waves: int
    prompt: int
    output: int

    def requests(self, clients: int) -> int:
        return max(LEAST_REQUESTS, self.waves * clients)


def turns(arms: Sequence[str], rounds: int, together: bool) -> list[tuple[tuple[str, ...], range]]:
    """Which servers are alive for which rounds."""
    if together:
        return [(tuple(arms), range(rounds))]
    half = (rounds + 1) // 2
    others = [((arm,), range(rounds)) for arm in arms if arm != STOCK]
    found = [((STOCK,), range(half)), *others, ((STOCK,), range(half, rounds))]
    return [(alive, some) for alive, some in found if len(some)]


def measure(
    setup: Setup,
    results: Results,
    progress: Progress,
    engine: Mapping[str, Any],
    tokenizer: Path,
    arms: Sequence[str],
    loop: Loop,
    together: bool,
    seed: int | None = SEED,
) -> None:
    """All numbers of clients on the servers of these arms, stock first. Results go under `concurrency`."""
    runs: Runs = {clients: {arm: {} for arm in arms} for clients in loop.clients}
    for name, value in (("together", together), ("prompt", loop.prompt), ("output", loop.output)):
        results.put(KEY, name, value=value)
    schedule = turns(arms, loop.rounds, together)
    progress.phase(
        "closed loop", len(arms) * loop.rounds * len(loop.clients) + sum(len(alive) for alive, _ in schedule)
    )
    for alive, rounds in schedule:
        if setup.remaining() < RESERVE_SECONDS:
            results.unfinished(f"closed loop: out of time before {', '.join(alive)}")
            return
        with running(setup, results, progress, engine, tokenizer, alive, seed, KEY) as servers:
            for turn in rounds:
                for clients in loop.clients:
                    for arm in reversed(alive) if turn % 2 else alive:
                        if setup.remaining() < RESERVE_SECONDS:
                            results.unfinished(f"closed loop: out of time before N={clients}, round {turn + 1}, {arm}")
                            return
                        progress.step(f"{arm}, N={clients}, round {turn + 1} of {loop.rounds}")
                        found = run_client(
                            setup,
                            servers[arm],
                            tokenizer,
                            f"loop-{clients}-{turn}-{arm}",
                            ["--max-concurrency", str(clients)],
                            sizes=(loop.prompt, loop.output),
                            requests=loop.requests(clients),
                            warm_up=max(WARM_UP_REQUESTS, clients),
                            seed=1000,
                        )
                        if found.get("failed"):
                            results.problem(f"closed loop, N={clients}, {arm}: {found['failed']} requests have failed")
                        runs[clients][arm][turn] = found
                    results.put(KEY, "rows", value=rows_of(runs))
                    results.put(KEY, "answers", value=answers_of(runs))
        put_journals(setup, results, alive, KEY)


def rows_of(runs: Runs) -> list[dict[str, Any]]:
    """Per number of clients and metric: the arms' times of the rounds that all of them have, in pairs. Seconds."""
    rows = []
    for clients, by_arm in runs.items():
        common = sorted(set.intersection(*(set(rounds) for rounds in by_arm.values())))
        seconds = {arm: [seconds_of_requests(rounds[turn]) for turn in common] for arm, rounds in by_arm.items()}
        for metric in METRICS:
            if not common or not all(one[metric] for found in seconds.values() for one in found):
                continue
            times = {arm: [median(one[metric]) for one in found] for arm, found in seconds.items()}
            rate = {
                arm: median([float(rounds[turn]["request_throughput"]) for turn in common])
                for arm, rounds in by_arm.items()
            }
            rows.append({"requests": clients, "metric": metric, "requests_per_second": rate, **paired_row(times)})
    return rows


def answers_of(runs: Runs) -> list[dict[str, Any]]:
    """How many answers of each arm are not those of stock's first round; stock's own are of its later rounds."""
    rows = []
    for clients, by_arm in runs.items():
        stock = by_arm[STOCK]
        if not stock:
            continue
        first = min(stock)
        wanted = stock[first]["generated_texts"]
        arms = {}
        for arm, rounds in by_arm.items():
            found = [run["generated_texts"] for turn, run in rounds.items() if arm != STOCK or turn != first]
            different = sum(old != new for texts in found for old, new in zip(wanted, texts, strict=True))
            arms[arm] = {"different": different, "of": len(wanted) * len(found)}
        rows.append({"requests": clients, "arms": arms})
    return rows
