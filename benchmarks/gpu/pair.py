"""Phases that need a stock and an overlay engine alive on one GPU: tokens, time to first token, decode step, trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu import trace
from gpu.intervals import compare
from gpu.protocol import Worker, WorkerError
from gpu.results import Results, journal_summary
from gpu.run_setup import SIDES, Setup

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SEED = 20251120


def decode_target(requests: int) -> float:
    """The ratio to stock that a decode step is to reach."""
    if requests <= 8:
        return 0.95
    return 0.98 if requests <= 64 else 1.00


FIRST_TOKEN_TARGET = 1.05


class EnginePair:
    """The two engines, started one after the other (Triton's autotuning must not run twice at once) or together."""

    def __init__(self, setup: Setup, results: Results) -> None:
        self.setup, self.results = setup, results
        self.workers: dict[str, Worker] = {}

    def start(self) -> None:
        """Start both. Together only where Triton's choices are in its cache, for then nothing is timed at start."""
        for architecture in self.setup.architectures():
            try:
                self._start(architecture)
                self.results.put("pair", "architecture", value=architecture)
                return
            except WorkerError as error:
                self.results.problem(f"{architecture} did not start: {error}")
                self.close()
        raise WorkerError("no architecture started")

    def _start(self, architecture: str) -> None:
        setup = self.setup
        model = setup.model_folder(architecture)
        engine = setup.engine(model, architecture)
        together = setup.triton_is_warm() and not setup.cpu
        for side in SIDES:
            self.workers[side] = Worker(side, setup.environment(side, "pair"), setup.work / "logs" / f"pair-{side}.log")
            self.workers[side].send("start", engine=engine, weight_seed=SEED)
            if not together:
                self._started(side, architecture)
        if together:
            for side in SIDES:
                self._started(side, architecture)
        setup.mark_triton_warm()
        sums = {side: self.workers[side].call("checksum") for side in SIDES}
        self.results.put("pair", "weights_equal", value=sums["stock"] == sums["overlay"])
        self.results.put("pair", "weights", value=sums)
        self.results.put("pair", "started_together", value=together)

    def _started(self, side: str, architecture: str) -> None:
        answer = self.workers[side].receive(self.setup.remaining() + 60.0)
        self.results.put("pair", side, value=answer)
        loaded = bool(answer["overlay_modules"])
        if loaded != (side == "overlay"):
            self.results.problem(f"{side}: overlay modules loaded: {loaded}")
        print(
            f"[{self.setup.elapsed():5.0f} s] {side} ready: vllm {answer['vllm']}, torch {answer['torch']}, {architecture}, "
            f"build {answer['build_seconds']:.0f} s, compile {answer['compile_seconds']:.1f} s",
            flush=True,
        )

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}
        self.results.put("pair", "journal", value=journal_summary(self.setup.journal_folder("pair")))

    def both(self, command: str, reverse: bool = False, **arguments: Any) -> dict[str, Any]:
        """One engine after the other; the other one is idle meanwhile."""
        answers = {}
        for side in reversed(SIDES) if reverse else SIDES:
            answers[side] = self.workers[side].call(command, self.setup.remaining() + 20.0, **arguments)
        return answers

    def usable(self) -> bool:
        """After a failed phase: put both engines back to idle. False where one is gone or does not answer."""
        try:
            self.both("decode_end")
        except WorkerError as error:
            self.results.problem(f"the pair is gone: {error}")
            return False
        return True

    # ---- phases

    def tokens(self, batches: Sequence[int], lengths: Sequence[int]) -> None:
        """Greedy tokens and log probabilities, stock twice and overlay once."""
        cases: list[tuple[str, list[int], int]] = [
            (f"N={count}", [12 + (index * 7) % 23 for index in range(count)], self.setup.tokens) for count in batches
        ]
        cases += [(f"prompt {length}", [length], self.setup.tokens) for length in lengths]
        mixed = [length for length in (8, 100, 128, 300, 512) if length in lengths or length in (100, 300)]
        cases.append(("mixed prompts", mixed * 2, self.setup.tokens))
        rows = []
        for index, (name, prompts, count) in enumerate(cases):
            if self.setup.remaining() < 15:
                self.results.problem(f"tokens: out of time before {name}")
                break
            arguments: dict[str, Any] = {
                "lengths": prompts,
                "seed": SEED + 1000 * index,
                "tokens": count,
                "logprobs": True,
            }
            first = self.both("generate", **arguments)
            again = self.workers["stock"].call("generate", **arguments)
            stock, overlay = first["stock"], first["overlay"]
            pairs = zip(stock["tokens"], overlay["tokens"], strict=True)
            different = [position for position, (old, new) in enumerate(pairs) if old != new]
            everything = [token for request in overlay["tokens"] for token in request]
            rows.append(
                {
                    "case": name,
                    "requests": len(prompts),
                    "generated": len(everything),
                    "distinct": len(set(everything)),
                    "different_requests": len(different),
                    "first_difference": self._first_difference(stock, overlay, different),
                    "logprobs_equal": stock["logprobs"] == overlay["logprobs"],
                    "stock_repeats_itself": stock["tokens"] == again["tokens"],
                    "stock_repeats_logprobs": stock["logprobs"] == again["logprobs"],
                }
            )
            self.results.put("tokens", value=rows)

    @staticmethod
    def _first_difference(stock: dict[str, Any], overlay: dict[str, Any], different: Sequence[int]) -> Any:
        if not different:
            return None
        request = different[0]
        old, new = stock["tokens"][request], overlay["tokens"][request]
        position = next(index for index, (left, right) in enumerate(zip(old, new, strict=True)) if left != right)
        return {"request": request, "position": position, "stock": old[position], "overlay": new[position]}

    def first_token(self, lengths: Sequence[int], rounds: int, repetitions: int) -> None:
        """Latency of one request with one token, the two engines taking turns."""
        for warm in range(2):
            for length in lengths:
                self.both("first_token", length=length, repetitions=2, seed=warm)
        times: dict[int, dict[str, list[float]]] = {length: {side: [] for side in SIDES} for length in lengths}
        for index in range(rounds):
            if self.setup.remaining() < 15:
                self.results.problem(f"time to first token: out of time after {index} of {rounds} rounds")
                break
            for length in lengths:
                seed = SEED + 100_000 + index * 1000
                answers = self.both(
                    "first_token", reverse=index % 2 == 1, length=length, repetitions=repetitions, seed=seed
                )
                for side in SIDES:
                    times[length][side].extend(answers[side])
            rows = []
            for length in lengths:
                comparison = compare(times[length]["stock"], times[length]["overlay"])
                rows.append(
                    {
                        "prompt": length,
                        **comparison.as_dict(),
                        "stock_minimum": min(times[length]["stock"]),
                        "overlay_minimum": min(times[length]["overlay"]),
                        "target": FIRST_TOKEN_TARGET,
                        "verdict": comparison.verdict(FIRST_TOKEN_TARGET),
                    }
                )
            self.results.put("first_token", value=rows)
        self.results.put("first_token_samples", value=times)

    def decode(self, batches: Sequence[int], passes: int, rounds: int, steps: int, reserve: float) -> None:
        """Time per decode step with N running requests, the engines taking turns in every round.

        Stops early when less than `reserve` seconds are left; complete passes are what counts.
        """
        means: dict[int, dict[str, list[float]]] = {count: {side: [] for side in SIDES} for count in batches}
        medians: dict[int, dict[str, list[float]]] = {count: {side: [] for side in SIDES} for count in batches}
        budget = rounds * (steps + 4) + 64
        for index in range(passes):
            for count in batches:
                if self.setup.remaining() < reserve:
                    place = f"decode: out of time in pass {index + 1} of {passes} at N={count}"
                    if index < 2:
                        self.results.problem(place)
                    print(place, flush=True)
                    self.results.put("decode_samples", value=means)
                    return
                seed = SEED + 200_000 + index * 1000
                self.both("decode_begin", requests=count, prompt=16, tokens=budget, warm=16, seed=seed)
                for turn in range(rounds):
                    answers = self.both("decode_steps", reverse=turn % 2 == 1, count=steps, warm=3)
                    for side in SIDES:
                        means[count][side].append(answers[side]["mean"])
                        medians[count][side].append(answers[side]["median"])
                self.both("decode_end")
                self._put_decode(means, medians)
        self.results.put("decode_samples", value=means)

    def _put_decode(self, means: dict[int, dict[str, list[float]]], medians: dict[int, dict[str, list[float]]]) -> None:
        rows = []
        for count, sides in means.items():
            if not sides["stock"]:
                continue
            comparison = compare(sides["stock"], sides["overlay"])
            by_median = compare(medians[count]["stock"], medians[count]["overlay"])
            target = decode_target(count)
            rows.append(
                {
                    "requests": count,
                    **comparison.as_dict(),
                    "ratio_of_step_medians": by_median.ratio,
                    "target": target,
                    "verdict": comparison.verdict(target),
                    "not_slower": comparison.low <= 1.0,
                }
            )
        self.results.put("decode", value=rows)

    def trace(self, requests: int, steps: int, folder: Path) -> None:
        """Profiler traces of both sides, and what they show about the two projections."""
        for side in SIDES:
            path = folder / f"trace-{side}.json.gz"
            timing = self.workers[side].call(
                "trace", requests=requests, steps=steps, path=str(path), seed=SEED + 300_000
            )
            kernels = trace.read_kernels(path)
            found = trace.analyse(kernels, self.setup.gdn_layers())
            found["gpu_seconds_per_step"] = trace.span(kernels) * 1e-6 / steps
            self.results.put("trace", side, value={**timing, **found, "requests": requests, "steps": steps})
