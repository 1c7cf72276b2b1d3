"""The bench's engines with adapters. Arms: `stock`; `upstream`, which is stock with vLLM's own switch set; `overlay`, with
the switch unset; and `control`, a second stock with caches of its own, which shows what two starts of stock differ in.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import driver, lora_model, lora_trace
from overlay.cli.bench import engines, shapes, timeline
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import CONTROL, UPSTREAM, Results, arms_of
from overlay.cli.bench.setup import OVERLAY, STOCK, Setup
from overlay.cli.failure import CommandError

SEED = engines.SEED
SWITCH = "VLLM_LORA_ENABLE_DUAL_STREAM"
PASS_THROUGH = "VLLMOVERLAY_SERIAL_PASS_THROUGH"
COMMANDS = Path(__file__).resolve().with_name("lora_worker.py")
#: The overlay at least this much faster than stock wherever upstream's switch gains.
TARGET = 0.95
#: The overlay's words for serial calls that there should be none of here.
UNWANTED = ("no auxiliary stream",)
NO_ADAPTER, MIXED = "no adapter", "mixed"
#: Adapters of one batch: a name per request, in turn; None is the base model.
Adapters = tuple[str | None, ...]


def rank_name(rank: int) -> str:
    return f"rank {rank}"


def groups(ranks: Sequence[int]) -> dict[str, Adapters]:
    """What the requests of a batch ask for: nothing, one adapter, or base and all adapters in turn."""
    names = [rank_name(rank) for rank in ranks]
    return {NO_ADAPTER: (None,), **{name: (name,) for name in names}, MIXED: (None, *names)}


def setup_of(options: argparse.Namespace) -> Setup:
    """Upstream's switch is refused by vLLM on anything that is not like CUDA."""
    if not find_spec("torch") or not find_spec("safetensors"):
        raise CommandError(
            "adapters are written with torch and safetensors: put vLLM's folder on PYTHONPATH, not on --site"
        )
    asked = {UPSTREAM: options.switch, CONTROL: options.control}
    others = () if options.cpu else tuple(arm for arm, wanted in asked.items() if wanted)
    setup = driver.setup_of(
        options, "lora", (STOCK, *others, OVERLAY), sorted({*options.batches, *options.other_batches})
    )
    setup.arm_variables = {UPSTREAM: {SWITCH: "1"}}
    if options.cpu:
        setup.overlay_environment.setdefault(PASS_THROUGH, "1")
    return setup


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    config = lora_model.configuration(options.layers, options.cpu)
    return dict(shapes.Model("qwen3", config).with_format(options.format).configuration)


def engine_arguments(setup: Setup, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, the same for all arms. A slot for each rank and one more, for what comes and goes."""
    changes: dict[str, Any] = {
        "max_num_seqs": max(*options.batches, *options.other_batches, 4),
        "gpu_memory_utilization": 0.22,
        "kv_cache_memory_bytes": 8 << 30,
        "enable_lora": True,
        "max_lora_rank": options.max_lora_rank,
        "max_loras": len(options.ranks) + 1,
    }
    if options.cpu:
        # Not compiled: what is compiled has tests of its own. A spare slot more: vLLM 0.32.0 on a CPU gives a base
        # request what is in the last slot.
        changes |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True, "max_loras": len(options.ranks) + 2}
    if options.uncompiled:  # what is captured is what the Python says
        sizes = list(setup.capture_sizes)
        changes["compilation_config"] = {
            "cudagraph_capture_sizes": sizes,
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
        }
    return driver.engine_arguments(setup, options, model, **changes)


class LoraEngines(engines.Engines):
    """Results go to the places of the bench, and under `states` and `trace`."""

    def __init__(self, setup: Setup, results: Results, progress: Progress, options: argparse.Namespace) -> None:
        super().__init__(setup, results, progress, COMMANDS)
        self.options = options
        self.groups = groups(options.ranks)
        self.paths: dict[str, str] = {}

    def start(self, engine: Mapping[str, Any], together: bool, seed: int | None = SEED) -> None:
        """As the bench's; then every arm gets the adapters, and has to be what it is called."""
        with ThreadPoolExecutor(1) as pool:
            paths = pool.submit(self._write_adapters)
            super().start(engine, together, seed)
            self.paths = paths.result()
        for number, name in enumerate(map(rank_name, self.options.ranks), 1):
            self.all("add_adapter", name=name, number=number, path=self.paths[name])
        adapters = self.groups[MIXED][:4]
        self.all("generate", lengths=[8] * len(adapters), seed=1, tokens=2, logprobs=False, adapters=adapters)
        self.check_states()

    def _write_adapters(self) -> dict[str, str]:
        """The files of all adapters, by name: one per rank, one that comes late, one dense."""
        ranks, seed = self.options.ranks, SEED % 1000
        config = configuration(self.options)
        middle = ranks[len(ranks) // 2]
        wanted = {rank_name(rank): (rank, False, seed) for rank in ranks}
        wanted |= {"late": (middle, False, seed + 1), "dense": (middle, True, seed + 2)}
        folder = self.setup.work / "adapters"
        return {name: str(lora_model.write_adapter(folder, config, *what)) for name, what in wanted.items()}

    def check_states(self) -> None:
        """Whether each arm is what it is called; one that is not is a problem of the run."""
        states = self.all("lora_state")
        self.results.put("states", value=states)
        for arm, state in states.items():
            if state["switch"] != (arm == UPSTREAM):
                self.results.problem(f"{arm}: upstream's switch is {state['switch']}")
        overlay = states.get(OVERLAY)
        if overlay is not None:
            for number, rank in enumerate(overlay["ranks"]):
                faults = journal_faults(rank["patch"], overlay["linears"], self.setup.cpu)
                for text in [*faults, *rank["problems"]]:
                    self.results.problem(f"overlay, rank {number}: {text}")

    # ---- phases

    def compare_tokens(self) -> None:
        """Greedy tokens and log probabilities, until the time is over."""
        base: dict[int, dict[str, Any]] = {}
        for case, command, repetitions, wanted in self._token_cases():
            stock = self.same_tokens(case, command, repetitions, **wanted)
            if stock is None:
                break
            first = base.setdefault(wanted["seed"], stock)  # the first case of each seed has no adapter
            if first is not stock and first["tokens"] == stock["tokens"]:
                self.results.problem(f"tokens, {case}: the adapters change nothing")
            for fault in token_faults(self.results.data["tokens"][-1]):
                self.results.problem(f"tokens, {fault}")

    def _token_cases(self) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
        """Name, the worker's command, how often stock repeats it, and what the command takes."""
        ranks, batches = self.options.ranks, self.options.batches
        prompts = [length for length in self.options.prompts if length >= 128]
        self.progress.phase("tokens", len(self.groups) * len(batches) + len(prompts) + 3)
        for (name, adapters), count in itertools.product(self.groups.items(), batches):
            if name != MIXED or count > 1:
                yield f"{name}, N={count}", "generate", 1, asked(count, adapters)
        first, last = rank_name(ranks[0]), rank_name(ranks[-1])
        for length in prompts:
            wanted = {"lengths": [length], "seed": SEED + length, "adapters": [last]}
            yield f"{last}, prompt {length}", "generate", 1, wanted
        churn = {"first": first, "idle": last, "late": "late", "paths": self.paths, "seed": SEED + 77}
        tokens = max(self.setup.tokens, 28)
        yield "adapters loaded and removed while running", "churn", 1, {**churn, "tokens": tokens}
        count = min(8, max(batches))
        yield f"{last} removed and loaded again, N={count}", "generate", 1, asked(count, (last,))
        self.all("add_adapter", name="dense", number=50, path=self.paths["dense"])
        yield f"values everywhere (atomics), N={count}", "generate", 4, asked(count, ("dense",))
        self.all("remove_adapter", name="dense")

    def compare_decode(self) -> None:
        """All batches of each rank, the other batches without adapter and mixed."""
        options = self.options
        cases = [
            {"group": name, "adapters": adapters, "requests": count}
            for name, adapters in self.groups.items()
            for count in (options.other_batches if name in (NO_ADAPTER, MIXED) else options.batches)
            if count > 1 or name != MIXED
        ]
        reserve = 40.0 if "trace" in options.phases else engines.RESERVE_SECONDS
        self.decode(cases, options.passes, options.rounds, options.steps, reserve)

    def compare_prefill(self) -> None:
        """Seconds to the first token of one prompt with an adapter."""
        options = self.options
        adapter = rank_name(options.ranks[len(options.ranks) // 2])
        self.first_token(options.prompts, options.prefill_rounds, options.prefill_repetitions, adapter=adapter)

    def trace(self) -> None:
        """The kernels of a few decode steps per arm, and what they show of LoRA's."""
        options = self.options
        wanted = {"requests": options.trace_requests, "steps": options.trace_steps, "seed": SEED + 400_000}
        self.progress.phase("trace", 1)
        for arm, answer in self.all("kernels", adapters=[rank_name(options.trace_rank)], **wanted).items():
            found = lora_trace.analyse(timeline.read(answer), options.trace_steps)
            row = {**found, "requests": options.trace_requests, "rank": options.trace_rank}
            self.results.put("trace", arm, value=row)


def asked(count: int, adapters: Adapters) -> dict[str, Any]:
    """What `generate` takes for so many requests: the same prompts whatever their adapters are."""
    return {
        "lengths": [12 + (index * 7) % 23 for index in range(count)],
        "seed": SEED + 1000 * count,
        "adapters": [adapters[index % len(adapters)] for index in range(count)],
    }


# ---- what the answers say


def token_faults(row: dict[str, Any]) -> list[str]:
    """Log probabilities that are not stock's, where stock repeats its own, also started anew. Tokens are the bench's business."""
    arms = arms_of(row)
    overlay, control = arms.get(OVERLAY), arms.get(CONTROL)
    if overlay is None or not row["stock_repeats_logprobs"] or (control and not control["logprobs_equal"]):
        return []
    equal = overlay["logprobs_equal"] or overlay["different_requests"]
    return [] if equal else [f"{row['case']}: the overlay's log probabilities differ"]


def goal(row: dict[str, Any]) -> str | None:
    """Of a row of the decode step: whether the overlay is 5 % faster than stock where upstream's switch gains.

    It gains where its whole interval is below 1; None where not. `met`, `within` (not shown to be missed) or `missed`.
    """
    arms = arms_of(row)
    overlay, upstream = arms.get(OVERLAY), arms.get(UPSTREAM)
    if overlay is None or upstream is None or upstream["high"] >= 1.0:
        return None
    return "met" if overlay["ratio"] <= TARGET else "within" if overlay["low"] <= TARGET else "missed"


def journal_faults(patch: Mapping[str, Any] | None, linears: int, cpu: bool) -> list[str]:
    """What says that the overlay did not do what is measured here: no patch, layers left out, no dual stream calls."""
    if patch is None:
        return ["its journal has no lora_linear patch: NOTHING WAS PATCHED"]
    faults = []
    if patch["verdict"] != "apply":
        faults.append(f"verdict {patch['verdict']}: {patch['reason']}")
    patched, refused = patch["layers"]["patched"], patch["layers"]["refused"]
    if len(patched) < linears or not patched:
        reasons = "; ".join(sorted(set(refused.values())))
        faults.append(f"{len(patched)} of {linears} LoRA linears patched, refused: {reasons or 'none'}")
    calls = patch["calls"]
    if cpu and not calls["serial"].get("serial pass-through"):
        faults.append(f"the op was never called: {calls}")
    if not cpu and not calls["dual_stream"]:
        faults.append(f"NO CALL ON TWO STREAMS: {calls}")
    faults += [f"{calls['serial'][reason]} serial calls: {reason}" for reason in UNWANTED if reason in calls["serial"]]
    return faults
