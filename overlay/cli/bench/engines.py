"""Engines of all arms alive at once on one GPU, taking turns: tokens, time to first token, decode step.

One engine works at a time while the others are idle, and who is first changes from round to round. The times of one round
belong together: a ratio is the median of the rounds' ratios. In a round all engines use the same half of the host's cores,
in the next one the other half: no engine keeps a core that is faster or slower than another's.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.intervals import compare
from overlay.cli.bench.results import Results, journal_problems, journal_summary, size
from overlay.cli.bench.setup import OVERLAY, STOCK, WITH_OVERLAY, Setup
from overlay.cli.bench.workers import SCRIPT, Worker, WorkerError, in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from overlay.cli.bench.progress import Progress

SEED = 20251120
#: A step that would begin with less time left than this is left out.
RESERVE_SECONDS = 15.0


def paired_row(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """One row of a table from the arms' times of the same rounds, in seconds.

    `stock` and `overlay` are medians; `ratio`, `low`, `high` and `interval` are overlay to stock. `arms` has the same of every arm,
    `against` the overlay to every further one.
    """
    stock = times[STOCK]
    row: dict[str, Any] = {"rounds": len(stock), "arms": {}, "against": {}}
    for arm, values in times.items():
        if arm == STOCK:
            continue
        found = compare(stock, values)
        row |= {"stock": found.stock}
        row["arms"][arm] = {"seconds": found.overlay, **found.ratio_as_dict()}
        if arm == OVERLAY:
            row |= found.as_dict()
        elif OVERLAY in times:
            row["against"][arm] = compare(values, times[OVERLAY]).ratio_as_dict()
    return row


class Engines:
    """One worker per arm. Results go under `pair`, `tokens`, `first_token`, `decode` of the results file."""

    def __init__(self, setup: Setup, results: Results, progress: Progress, commands: Path | None = None) -> None:
        """`commands`: a file with a class `Worker`, an EngineWorker that knows further commands."""
        self.setup, self.results, self.progress = setup, results, progress
        self._script = (SCRIPT,) if commands is None else (SCRIPT, commands)
        self.workers: dict[str, Worker] = {}

    # ---- start and end

    def run(
        self,
        engine: Mapping[str, Any],
        together: bool,
        seed: int | None,
        phases: Mapping[str, Callable[[], object]],
    ) -> None:
        """Start all arms, see `start`, go through the phases, and end all arms. A phase that fails is a problem of the run."""
        hurry = True
        with self.setup.in_turn() as alone:
            try:
                self.start(engine, together, seed)
                alone()
                for name, phase in phases.items():
                    try:
                        phase()
                    except WorkerError as error:
                        self.results.problem(f"{name}: {error}")
                        if not self.usable():
                            break
                hurry = False
            finally:
                self.close(hurry)

    def start(self, engine: Mapping[str, Any], together: bool, seed: int | None = SEED) -> None:
        """Start all arms, in the order of `Setup.start_in_order`: all at once where nothing may be timed at start.

        `seed` of random weights; None for a checkpoint's own. An arm that does not start is left out. Raises WorkerError
        where stock does not start, or nothing but stock.
        """
        setup = self.setup
        self.progress.phase("start", len(setup.arms))
        self.results.put("pair", "triton_was_warm", value=setup.triton_is_warm())

        def start(arm: str) -> None:
            log = setup.work / "logs" / f"pair-{arm}.log"
            log.unlink(missing_ok=True)
            self.workers[arm] = Worker(arm, setup.environment(arm, f"pair-{arm}"), log, *self._script)
            self.workers[arm].send("start", engine=engine, weight_seed=seed)

        setup.start_in_order(setup.arms, together, start, self._started)
        if STOCK not in self.workers or len(self.workers) < 2:
            raise WorkerError("without stock and another arm there is nothing to compare")
        sums = self.all("checksum")
        self.results.put("pair", "weights", value=sums)
        self.results.put("pair", "weights_equal", value=len(set(sums.values())) == 1)
        if len(set(sums.values())) != 1:
            self.results.problem(f"the arms hold different weights: {sums}")
        self.results.put("pair", "started_together", value=together)

    def _started(self, arm: str) -> None:
        self.progress.step(arm)
        try:
            answer = self.workers[arm].receive(max(self.setup.remaining(), 0.0) + 60.0)
        except WorkerError as error:
            self.results.problem(f"{arm} did not start: {error}")
            self.workers.pop(arm).close()
            return
        self.setup.mark_triton_warm()
        self.results.put("pair", arm, value=answer)
        loaded = bool(answer["overlay_modules"])
        if loaded != (arm in WITH_OVERLAY) and not self.setup.installed:
            self.results.problem(f"{arm}: overlay modules loaded: {loaded}")
        memory = answer.get("gpu_memory")
        held = f", {memory['reserved'] / 2**30:.1f} GiB" if memory else ""
        self.progress.say(
            f"{arm} ready: vllm {answer['vllm']}, torch {answer['torch']}, {answer['architecture']}, build "
            f"{answer['build_seconds']:.0f} s, compile {answer['compile_seconds']:.1f} s{held}"
        )

    def close(self, hurry: bool = False) -> None:
        """End all workers, and note what the overlay's journals say."""
        for worker in self.workers.values():
            worker.close(1.0 if hurry else 20.0)
        folders = {arm: self.setup.journal_folder(f"pair-{arm}") for arm in self.workers if arm in WITH_OVERLAY}
        journals = {arm: journal_summary(folder) for arm, folder in folders.items()}
        self.workers = {}
        if journals:
            self.results.put("pair", "journals", value=journals)
            problems = {arm: journal_problems(folder) for arm, folder in folders.items()}
            self.results.put("pair", "journal_problems", value=problems)
        if OVERLAY in journals:
            self.results.put("pair", "journal", value=journals[OVERLAY])

    def all(self, command: str, turn: int = 0, **arguments: Any) -> dict[str, Any]:
        """One engine after the other, see `in_turn`."""
        return in_turn(self.workers, command, turn, max(self.setup.remaining(), 0.0) + 60.0, **arguments)

    def usable(self) -> bool:
        """After a failed phase: put all engines back to idle. False where one is gone or does not answer."""
        try:
            self.all("decode_end")
        except WorkerError as error:
            self.results.problem(f"the engines are gone: {error}")
            return False
        return True

    # ---- phases

    def tokens(self, batches: Sequence[int], lengths: Sequence[int], repetitions: int = 1) -> None:
        """Greedy tokens and log probabilities: every arm against stock, and stock against itself, `repetitions` times.

        The last case has twice as many requests as seats. So some prompts are computed in pieces, beside requests that decode.
        """
        cases = [(f"N={count}", [12 + (index * 7) % 23 for index in range(count)]) for count in batches]
        cases += [(f"prompt {length}", [length]) for length in lengths]
        mixed = [length for length in (8, 100, 128, 300, 512) if length in lengths or length in (100, 300)]
        cases.append(("mixed prompts", mixed * 2))
        seats = max(batches)
        waiting = [WAITING[index % len(WAITING)] for index in range(2 * seats)]
        cases.append((f"{2 * seats} requests for {seats} seats", waiting))
        self.progress.phase("tokens", len(cases))
        for index, (name, prompts) in enumerate(cases):
            if self.same_tokens(name, repetitions=repetitions, lengths=prompts, seed=SEED + 1000 * index) is None:
                break

    def same_tokens(
        self, case: str, command: str = "generate", repetitions: int = 1, **asked: Any
    ) -> dict[str, Any] | None:
        """A row of the tokens: the command's answer of every arm, and of stock `repetitions` times more.

        Gives stock's first answer; None where the time is over.
        """
        if self.setup.remaining() < RESERVE_SECONDS:
            self.results.unfinished(f"tokens: out of time before {case}")
            return None
        self.progress.step(case)
        asked = {"tokens": self.setup.tokens, "logprobs": True, **asked}
        found = self.all(command, **asked)
        again = [self.workers[STOCK].call(command, **asked) for _ in range(repetitions)]
        stock: dict[str, Any] = found[STOCK]
        row = {"case": case, "requests": len(stock["tokens"]), **token_row(found, *again)}
        self.results.put("tokens", value=[*self.results.data.get("tokens", []), row])
        return stock

    def first_token(self, lengths: Sequence[int], rounds: int, repetitions: int, **asked: Any) -> None:
        """Latency of one request with one token, the engines taking turns. `asked`: what the worker's command takes beside.

        Each round also times in every process what has nothing to do with vLLM or the overlay (`host_speed`): where a step
        waits for the host, and the processes' hosts are not equally fast, the latencies differ by as much.
        """
        self.progress.phase("time to first token", (2 + rounds) * len(lengths))
        for warm in range(2):
            for length in lengths:
                self.progress.step(f"warm-up, prompt {length}")
                self.all("first_token", length=length, repetitions=2, seed=warm, **asked)
        times: dict[int, dict[str, list[float]]] = {length: {arm: [] for arm in self.workers} for length in lengths}
        host: dict[str, dict[str, list[float]]] = {}
        for index in range(rounds):
            if self.setup.remaining() < RESERVE_SECONDS:
                self.results.unfinished(f"time to first token: out of time after {index} of {rounds} rounds")
                break
            for length in lengths:
                self.progress.step(f"prompt {length}, round {index + 1} of {rounds}")
                seed = SEED + 100_000 + index * 1000
                answers = self.all("first_token", index, length=length, repetitions=repetitions, seed=seed, **asked)
                for arm, values in answers.items():
                    times[length][arm].extend(values)
            rows = []
            for length in lengths:
                row = {"prompt": length, **paired_row(times[length])}
                row |= {f"{arm}_minimum": min(values) for arm, values in times[length].items()}
                rows.append(row)
            for arm, found in self.all("host", index).items():
                for what, seconds in found.items():
                    host.setdefault(what, {}).setdefault(arm, []).append(seconds)
            self.results.put("first_token", value=rows)
            self.results.put("host_speed", value={what: paired_row(arms) for what, arms in host.items()})
        self.results.put("first_token_samples", value=times)

    def decode(
        self,
        cases: Sequence[Mapping[str, Any]],
        passes: int,
        rounds: int,
        steps: int,
        reserve: float = RESERVE_SECONDS,
    ) -> None:
        """Time per decode step with N running requests, the engines taking turns in every round.

        A case has N as `requests`; a `group` is its name in the tables, and everything else goes to the workers. Stops early
        when less than `reserve` seconds are left. Every pass goes over all cases, so that a run that was cut short has
        something of each.
        """
        means: list[dict[str, list[float]]] = [{arm: [] for arm in self.workers} for _ in cases]
        medians: list[dict[str, list[float]]] = [{arm: [] for arm in self.workers} for _ in cases]
        budget = decode_tokens(rounds, steps)
        self.progress.phase("decode step", passes * len(cases))
        for index, (number, case) in itertools.product(range(passes), enumerate(cases)):
            name = size(case, "requests", "N=")
            if self.setup.remaining() < reserve:
                self.results.unfinished(f"decode: out of time in pass {index + 1} of {passes} at {name}")
                break
            self.progress.step(f"{name}, pass {index + 1} of {passes}")
            asked = {key: value for key, value in case.items() if key != "group"}
            seed = SEED + 200_000 + index * 1000
            self.all("decode_begin", prompt=DECODE_PROMPT, tokens=budget, warm=DECODE_WARM, seed=seed, **asked)
            for turn in range(rounds):
                for arm, lap in self.all("decode_steps", turn, count=steps, warm=3).items():
                    means[number][arm].append(lap["mean"])
                    medians[number][arm].append(lap["median"])
            self.all("decode_end")
            self.results.put("decode", value=_decode_rows(cases, means, medians))
        samples = {size(case, "requests"): found for case, found in zip(cases, means, strict=True)}
        self.results.put("decode_samples", value=samples)


DECODE_PROMPT, DECODE_WARM = 16, 16
#: Tokens of the prompts, in turn, where more requests come than there are seats.
WAITING = (300, 5, 130, 40, 300, 77)


def decode_tokens(rounds: int, steps: int) -> int:
    """The tokens that every request of a decode measurement may generate: it must not end before the rounds do."""
    return rounds * (steps + 4) + 64


def _decode_rows(
    cases: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Sequence[float]]],
    medians: Sequence[Mapping[str, Sequence[float]]],
) -> list[dict[str, Any]]:
    rows = []
    for case, arms, others in zip(cases, means, medians, strict=True):
        if not arms[STOCK]:
            continue
        row = {**case, **paired_row(arms)}
        if OVERLAY in arms:
            row["ratio_of_step_medians"] = paired_row(others)["ratio"]
        rows.append(row)
    return rows


def token_row(found: Mapping[str, dict[str, Any]], *again: Mapping[str, Any]) -> dict[str, Any]:
    """The arms' answers against stock's. `again`: stock asked once more; where one differs, nothing else says much.

    Then it helps to ask stock often: `one_of_stocks` says whether an arm's answer, log probabilities and all, is one that
    stock has given, too, and `stock_answers` how many different ones stock has given.
    """
    stock = found[STOCK]
    of_stock = [(answer["tokens"], answer["logprobs"]) for answer in (stock, *again)]
    everything = [token for request in stock["tokens"] for token in request]
    row: dict[str, Any] = {
        "generated": len(everything),
        "distinct": len(set(everything)),
        "stock_repeats_itself": all(other["tokens"] == stock["tokens"] for other in again),
        "stock_repeats_logprobs": all(other["logprobs"] == stock["logprobs"] for other in again),
        "stock_asked": len(of_stock),
        "stock_answers": sum(one not in of_stock[:index] for index, one in enumerate(of_stock)),
        "arms": {},
    }
    for arm, answer in found.items():
        if arm == STOCK:
            continue
        pairs = zip(stock["tokens"], answer["tokens"], strict=True)
        different = [position for position, (old, new) in enumerate(pairs) if old != new]
        row["arms"][arm] = {
            "different_requests": len(different),
            "first_difference": _first_difference(stock, answer, different),
            "logprobs_equal": stock["logprobs"] == answer["logprobs"],
            "one_of_stocks": (answer["tokens"], answer["logprobs"]) in of_stock,
        }
    return {**row, **row["arms"].get(OVERLAY, {})}


def _first_difference(stock: Mapping[str, Any], other: Mapping[str, Any], different: Sequence[int]) -> Any:
    if not different:
        return None
    request = different[0]
    old, new = stock["tokens"][request], other["tokens"][request]
    position = next(index for index, (left, right) in enumerate(zip(old, new, strict=True)) if left != right)
    return {"request": request, "position": position, "stock": old[position], "other": new[position]}
