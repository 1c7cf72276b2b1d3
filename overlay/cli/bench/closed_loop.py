"""A fixed number of clients on real servers: each sends its next request when the last one has been answered.

`vllm serve` of every arm and `vllm bench serve --max-concurrency`. The arms get each number of clients in turn, round by round, and the
times of one round belong together. A time of a round is the median over its requests. All rounds send the same prompts, so the
answers of stock's later rounds say what stock itself repeats; the others' are compared with the same ones.

Where the servers do not fit beside each other, each arm has all its rounds at once, and stock has half of its rounds before the
others and half behind them: a drift of the machine meets both.

Servers that pool are asked for embeddings. Their metric `embedding` is a run's time by its embeddings, and their answers are the
embeddings of a few prompts that are sent alone.

`results.json` gets `concurrency`::

    {"rows": [{"requests": 8, "metric": "tpot" | "ttft" | "embedding", "requests_per_second": {"stock", …}, … as a row of decode …}],
     "answers": [{"requests": 8, "arms": {"stock": {"different", "of", "new", "asked"}, "overlay": {…}}}],
     "together": true, "prompt": 512, "output": 128, "start_seconds": {"stock"}, "journals": {"overlay": […]}}

`requests` is the number of clients. `different` counts answers, over all rounds, that are not those of stock's first round. A server's
batches depend on the moment, so above one client an answer may differ by rounding, and often all answers of a round do. `new` counts
the answers that stock has given in no other round, and `asked` counts all. Both are left out where stock had one round. Stock's own
counts are the control.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overlay.cli.bench.engines import paired_row
from overlay.cli.bench.intervals import median
from overlay.cli.bench.servers import LEAST_REQUESTS, LEAST_WARM_UP, Fleet, Load, seconds_of_requests
from overlay.cli.bench.setup import STOCK

KEY = "concurrency"
#: Embeddings of a wave, at least.
LEAST_EMBEDDINGS = 32
METRICS = ("tpot", "ttft", "embedding")

#: Results of `vllm bench serve` by number of clients, arm and round.
Runs = dict[int, dict[str, dict[int, dict[str, Any]]]]


def load(clients: int, waves: int, prompt: int, output: int, pools: bool = False) -> Load:
    """Each client sends `waves` requests. A wave of embeddings has some at least, for each of them is one step."""
    requests = max(LEAST_REQUESTS, waves * max(clients, LEAST_EMBEDDINGS if pools else 1))
    flags = ("--max-concurrency", str(clients))
    return Load(clients, flags, prompt, output, requests, max(LEAST_WARM_UP, clients), pools=pools)


def turns(arms: Sequence[str], rounds: int, together: bool) -> list[tuple[tuple[str, ...], range]]:
    """Which servers are alive for which rounds."""
    if together:
        return [(tuple(arms), range(rounds))]
    half = (rounds + 1) // 2
    others = [((arm,), range(rounds)) for arm in arms if arm != STOCK]
    found = [((STOCK,), range(half)), *others, ((STOCK,), range(half, rounds))]
    return [(alive, some) for alive, some in found if len(some)]


def measure(fleet: Fleet, arms: Sequence[str], loads: Sequence[Load], rounds: int, together: bool) -> None:
    """All numbers of clients on the servers of these arms, stock first."""
    results = fleet.results
    runs: Runs = {int(one.size): {arm: {} for arm in arms} for one in loads}
    for name, value in (("together", together), ("prompt", loads[0].prompt), ("output", loads[0].output)):
        results.put(KEY, name, value=value)
    for one, arm, turn, found in fleet.drive(turns(arms, rounds, together), loads):
        runs[int(one.size)][arm][turn] = found
        results.put(KEY, "rows", value=rows_of(runs))
        results.put(KEY, "answers", value=answers_of(runs))


def _begun(runs: Runs) -> Iterator[tuple[int, dict[str, dict[int, dict[str, Any]]]]]:
    """Per number of clients the arms that have had a turn, stock among them.

    An arm whose turn never came is left out: where servers take turns, the others' times would be lost with it.
    """
    for clients, by_arm in runs.items():
        begun = {arm: rounds for arm, rounds in by_arm.items() if rounds}
        if STOCK in begun:
            yield clients, begun


def rows_of(runs: Runs) -> list[dict[str, Any]]:
    """Per number of clients and metric: the arms' times of the rounds that all of them have, in pairs. Seconds."""
    rows = []
    for clients, by_arm in _begun(runs):
        if len(by_arm) < 2:
            continue
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
    """How many answers of each arm are not those of stock's first round, and how many stock has given in no other round."""
    rows = []
    for clients, by_arm in _begun(runs):
        stock = by_arm[STOCK]
        first = min(stock)
        wanted = stock[first]["answers"]
        arms = {}
        for arm, rounds in by_arm.items():
            found = [run["answers"] for turn, run in rounds.items() if arm != STOCK or turn != first]
            different = sum(old != new for texts in found for old, new in zip(wanted, texts, strict=True))
            arms[arm] = {"different": different, "of": len(wanted) * len(found), **_new(rounds, stock)}
        rows.append({"requests": clients, "arms": arms})
    return rows


def _new(rounds: Mapping[int, dict[str, Any]], stock: Mapping[int, dict[str, Any]]) -> dict[str, int]:
    """How many answers of these rounds stock has given in no other round.

    An answer is not compared with stock's round of the same number. So an arm's answer and stock's own have as many to be found in.
    """
    if len(stock) < 2:
        return {}
    new = asked = 0
    for turn, run in rounds.items():
        of_stock = zip(*(other["answers"] for one, other in stock.items() if one != turn), strict=True)
        new += sum(answer not in given for answer, given in zip(run["answers"], of_stock, strict=True))
        asked += len(run["answers"])
    return {"new": new, "asked": asked}
