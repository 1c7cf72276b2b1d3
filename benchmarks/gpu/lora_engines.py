"""Phases that need the engines of all sides alive on one GPU: tokens, time to first token, decode step, trace.

Sides: `stock`; `upstream`, which is stock with vLLM's own switch set; `overlay`, with the switch unset; and `control`, a
second stock with caches of its own, which shows what two starts of stock differ in.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import lora_model, lora_trace, trace
from overlay.cli.bench import formats, shapes
from overlay.cli.bench.intervals import compare
from overlay.cli.bench.results import read_journals
from overlay.cli.bench.workers import Worker, WorkerError, in_turn, tail

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpu.run_setup import Setup
    from overlay.cli.bench.results import Results

SEED = 20251122
SWITCH = "VLLM_LORA_ENABLE_DUAL_STREAM"
PASS_THROUGH = "VLLMOVERLAY_SERIAL_PASS_THROUGH"
SCRIPT = Path(__file__).resolve().with_name("lora_worker.py")
#: The overlay at least this much faster than stock wherever upstream's switch gains.
TARGET = 0.95
#: The overlay's words for serial calls that there should be none of here.
UNWANTED = ("no auxiliary stream",)
NO_ADAPTER, MIXED = "no adapter", "mixed"
#: Adapters of one batch: a name per request, in turn; None is the base model.
Adapters = tuple[str | None, ...]


def rank_name(rank: int) -> str:
    return f"rank {rank}"


@dataclass
class LoraEngines:
    """The workers, by side."""

    setup: Setup
    results: Results
    ranks: tuple[int, ...]
    max_rank: int
    requests: int
    #: A second stock instead of upstream's switch.
    control: bool = False
    #: Without Dynamo and Inductor, but with CUDA graphs of decode steps: what is captured is what the Python says.
    uncompiled: bool = False
    #: Of the base model's weights, as `bench --format` has it.
    format: str = formats.DEFAULT
    workers: dict[str, Worker] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        """Upstream's switch is refused by vLLM on anything that is not like CUDA."""
        if self.setup.cpu:
            return ("stock", "overlay")
        return ("stock", "control" if self.control else "upstream", "overlay")

    @property
    def config(self) -> dict[str, Any]:
        config = lora_model.configuration(self.setup.layers, self.setup.cpu)
        return shapes.Model("qwen3", config).with_format(self.format).configuration

    def groups(self) -> dict[str, Adapters]:
        """What the requests of a batch ask for: nothing, one adapter, or base and all adapters in turn."""
        names = [rank_name(rank) for rank in self.ranks]
        return {NO_ADAPTER: (None,), **{name: (name,) for name in names}, MIXED: (None, *names)}

    # ---- start and end

    def environment(self, side: str) -> dict[str, str]:
        """One side's environment. Caches of their own, because upstream's switch changes the compiled graph."""
        setup = self.setup
        found = setup.environment("overlay" if side == "overlay" else "stock", "lora", setup.work / f"vllm-lora-{side}")
        if side == "upstream":
            found[SWITCH] = "1"
        if side == "overlay" and setup.cpu:
            found[PASS_THROUGH] = "1"
        return found

    def engine(self, model: Path) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, the same for all sides. A slot for each rank and one more, for what comes and goes."""
        setup = self.setup
        changes: dict[str, Any] = {
            "max_num_seqs": self.requests,
            "gpu_memory_utilization": 0.22,
            "kv_cache_memory_bytes": 8 << 30,
            "enable_lora": True,
            "max_lora_rank": self.max_rank,
            "max_loras": len(self.ranks) + 1,
        }
        if setup.cpu:
            # Not compiled: what is compiled has tests of its own. A spare slot more: vLLM 0.32.0 on a CPU gives a base
            # request what is in the last slot.
            changes |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True, "max_loras": len(self.ranks) + 2}
        arguments = setup.arguments(model, False, **changes)
        arguments.pop("additional_config", None)  # of GDN
        if self.uncompiled:
            arguments["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        return arguments

    def start(self, one_by_one: bool = False) -> None:
        """Start all engines, together: nothing of this model is autotuned, so nobody spoils another's timing."""
        setup = self.setup
        model = shapes.write(setup.work / "models" / f"qwen3-{setup.layers}-layers-{self.format}", self.config)
        engine = self.engine(model)
        self.results.put("engines", "arguments", value=engine)
        for side in self.sides:
            log = setup.work / "logs" / f"lora-{side}.log"
            self.workers[side] = Worker(side, self.environment(side), log, SCRIPT)
            self.workers[side].send("start", engine=engine, weight_seed=SEED)
            if one_by_one:
                self._ready(side)
        self.write_adapters()
        for side in self.sides if not one_by_one else ():
            self._ready(side)
        if "stock" not in self.workers or "overlay" not in self.workers:
            raise WorkerError("without stock and overlay there is nothing to compare")
        sums = self.all("checksum")
        self.results.put("engines", "weights_equal", value=len(set(sums.values())) == 1)
        if len(set(sums.values())) != 1:
            self.results.problem(f"the sides have different weights: {sums}")
        for number, rank in enumerate(self.ranks, 1):
            self.all("add_adapter", name=rank_name(rank), number=number, path=self.paths[rank_name(rank)])
        adapters = self.groups()[MIXED][:4]
        self.all("generate", lengths=[8] * len(adapters), seed=1, tokens=2, logprobs=False, adapters=adapters)
        self.results.put("engines", "states", value=self.check_states())

    def write_adapters(self) -> None:
        """The files of all adapters, by name: one per rank, one that comes late, one dense."""
        if self.setup.site and self.setup.site not in sys.path:
            sys.path.append(self.setup.site)  # behind the host's own packages, for safetensors
        folder, config = self.setup.work / "adapters", self.config
        middle = self.ranks[len(self.ranks) // 2]
        paths = {
            rank_name(rank): lora_model.write_adapter(folder, config, rank, False, SEED % 1000) for rank in self.ranks
        }
        paths["late"] = lora_model.write_adapter(folder, config, middle, False, SEED % 1000 + 1)
        paths["dense"] = lora_model.write_adapter(folder, config, middle, True, SEED % 1000 + 2)
        self.paths = {name: str(path) for name, path in paths.items()}

    def _ready(self, side: str) -> None:
        """Wait for an engine. A side that does not start is left out, and the end of its log is kept."""
        worker = self.workers[side]
        try:
            answer = worker.receive(max(30.0, self.setup.remaining()))
        except WorkerError as error:
            self.results.problem(f"{side} did not start: {error}\n{tail(worker.log, 40)}")
            worker.close()
            del self.workers[side]
            return
        self.results.put("engines", side, value=answer)
        loaded = bool(answer["overlay_modules"])
        if loaded != (side == "overlay"):
            self.results.problem(f"{side}: overlay modules loaded: {loaded}")
        print(
            f"[{self.setup.elapsed():5.0f} s] {side} ready: vllm {answer['vllm']}, torch {answer['torch']}, build "
            f"{answer['build_seconds']:.0f} s, compile {answer['compile_seconds']:.1f} s",
            flush=True,
        )

    def check_states(self) -> dict[str, Any]:
        """Whether each side is what it is called; a side that is not is a problem of the run."""
        states = self.all("lora_state")
        for side, state in states.items():
            if state["switch"] != (side == "upstream"):
                self.results.problem(f"{side}: upstream's switch is {state['switch']}")
        overlay = states.get("overlay")
        if overlay is not None:
            for text in journal_faults(overlay["patch"], overlay["linears"], self.setup.cpu):
                self.results.problem(f"overlay: {text}")
            for text in overlay["problems"] or []:
                self.results.problem(f"overlay's journal: {text}")
        return states

    def all(self, command: str, turn: int = 0, **arguments: Any) -> dict[str, Any]:
        """One engine after the other, see `in_turn`."""
        return in_turn(self.workers, command, turn, max(30.0, self.setup.remaining() + 20.0), **arguments)

    def usable(self) -> bool:
        """After a failed phase: put all engines back to idle. False where one is gone or does not answer."""
        try:
            self.all("decode_end")
        except WorkerError as error:
            self.results.problem(f"the engines are gone: {error}")
            return False
        return True

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        if self.workers:
            self.results.put("engines", "journals", value=journals(self.setup.journal_folder("lora")))
        self.workers = {}

    # ---- tokens

    def tokens(self, batches: Sequence[int], prompts: Sequence[int], logprobs: bool) -> None:
        """Greedy tokens and log probabilities of all sides against stock, and of stock against itself."""
        rows: list[dict[str, Any]] = []
        base: dict[int, Any] = {}
        for (name, adapters), batch in itertools.product(self.groups().items(), batches):
            if name == MIXED and batch < 2:
                continue
            asked = {
                "lengths": [12 + (index * 7) % 23 for index in range(batch)],
                "seed": SEED + 1000 * batch,  # the same prompts for every adapter
                "adapters": [adapters[index % len(adapters)] for index in range(batch)],
            }
            stock = self._case(rows, f"{name}, N={batch}", asked, logprobs)
            if stock is None:
                return
            if name == NO_ADAPTER:
                base[batch] = stock["tokens"]
            else:
                pairs = zip(base[batch], stock["tokens"], strict=True)
                rows[-1]["changed_by_adapter"] = sum(old != new for old, new in pairs)
        for length in prompts:
            asked = {"lengths": [length], "seed": SEED + length, "adapters": [rank_name(self.ranks[-1])]}
            if self._case(rows, f"{rank_name(self.ranks[-1])}, prompt {length}", asked, logprobs) is None:
                return
        self._come_and_go(rows, logprobs)

    def _case(
        self, rows: list[dict[str, Any]], name: str, asked: dict[str, Any], logprobs: bool, repetitions: int = 1
    ) -> Any:
        """One row: every side, and stock again. Gives stock's answer, or None where the time is over."""
        if self.setup.remaining() < 15:
            self.results.problem(f"tokens: out of time before {name}")
            return None
        asked = {**asked, "tokens": self.setup.tokens, "logprobs": logprobs}
        found = self.all("generate", **asked)
        again = [self.workers["stock"].call("generate", 120.0, **asked) for _ in range(repetitions)]
        rows.append(token_row(name, found, again))
        self._put_tokens(rows)
        return found["stock"]

    def _put_tokens(self, rows: list[dict[str, Any]]) -> None:
        self.results.put("tokens", value=rows)
        row = rows[-1]
        for fault in token_faults(row):
            self.results.problem(f"tokens, {row['case']}: {fault}")

    def _come_and_go(self, rows: list[dict[str, Any]], logprobs: bool) -> None:
        """Adapters loaded and removed: while requests run, and between them. Last, an adapter with values everywhere."""
        first, idle = rank_name(self.ranks[0]), rank_name(self.ranks[-1])
        arguments = {
            "first": first,
            "idle": idle,
            "late": {"name": "late", "number": 21, "path": self.paths["late"]},
            "again": {"name": "again", "number": 22, "path": self.paths[idle]},
            "seed": SEED + 77,
            "tokens": max(self.setup.tokens, 28),
            "logprobs": logprobs,
        }
        number = 30

        def restore(sides: Mapping[str, Worker]) -> None:
            nonlocal number
            number += 1
            for worker in sides.values():
                worker.call("remove_adapter", name="again")
                worker.call("add_adapter", name=idle, number=number, path=self.paths[idle])

        found = self.all("churn", **arguments)
        restore(self.workers)
        again = self.workers["stock"].call("churn", **arguments)
        restore({"stock": self.workers["stock"]})
        rows.append(token_row("adapters loaded and removed while running", found, [again]))
        self._put_tokens(rows)

        batch = min(8, self.requests)
        same = {
            "lengths": [12 + (index * 7) % 23 for index in range(batch)],
            "seed": SEED + 1000 * batch,
            "adapters": [idle] * batch,
        }
        if self._case(rows, f"{idle} removed and loaded again, N={batch}", same, logprobs) is None:
            return
        self.all("add_adapter", name="dense", number=50, path=self.paths["dense"])
        self._case(
            rows, f"values everywhere (atomics), N={batch}", {**same, "adapters": ["dense"] * batch}, logprobs, 4
        )
        self.all("remove_adapter", name="dense")

    # ---- timing

    def decode(
        self, batches: Mapping[str, Sequence[int]], passes: int, rounds: int, steps: int, reserve: float
    ) -> None:
        """Time per decode step with N running requests, the engines taking turns in every round.

        `batches` has the numbers of requests by group. Stops when less than `reserve` seconds are left.
        """
        samples: dict[str, dict[str, list[float]]] = {}
        groups = self.groups()
        for index in range(passes):
            for name, numbers in batches.items():
                for batch in numbers:
                    if self.setup.remaining() < reserve:
                        text = f"decode: out of time in pass {index + 1} of {passes} at {name}, N={batch}"
                        if index == 0:
                            self.results.problem(text)
                        else:
                            print(text, flush=True)
                        self.results.put("decode_samples", value=samples)
                        return
                    sides = samples.setdefault(f"{name}|{batch}", {side: [] for side in self.workers})
                    self._decode_rounds(sides, groups[name], batch, index, rounds, steps)
                    self.results.put("decode", value=decode_rows(samples))
        self.results.put("decode_samples", value=samples)

    def _decode_rounds(
        self, sides: dict[str, list[float]], adapters: Adapters, batch: int, index: int, rounds: int, steps: int
    ) -> None:
        self.all(
            "decode_begin",
            requests=batch,
            prompt=16,
            tokens=rounds * (steps + 3) + 64,
            warm=12,
            seed=SEED + 200_000 + index * 1000,
            adapters=adapters,
        )
        for turn in range(rounds):
            answers = self.all("decode_steps", index + turn, count=steps, warm=3)
            for side, times in answers.items():
                sides[side].append(times["mean"])
        self.all("decode_end")

    def prefill(self, lengths: Sequence[int], rounds: int, repetitions: int) -> None:
        """Seconds to the first token of one prompt with an adapter, the engines taking turns."""
        adapter = rank_name(self.ranks[len(self.ranks) // 2])
        samples: dict[int, dict[str, list[float]]] = {length: {side: [] for side in self.workers} for length in lengths}
        for length in lengths:
            self.all("first_token", length=length, repetitions=2, seed=1, adapter=adapter)
        for turn in range(rounds):
            for length in lengths:
                if self.setup.remaining() < 15:
                    self.results.problem(f"prefill: out of time in round {turn + 1} of {rounds}")
                    return
                asked = {"length": length, "repetitions": repetitions, "seed": SEED + 300_000 + turn * 1000}
                for side, times in self.all("first_token", turn, adapter=adapter, **asked).items():
                    samples[length][side].extend(times)
            rows = [{"prompt": length, **ratios(sides)} for length, sides in samples.items() if sides["stock"]]
            self.results.put("prefill", value=rows)
        self.results.put("prefill_samples", value=samples)

    def trace(self, requests: int, steps: int, rank: int, folder: Path) -> None:
        """A profiler trace of a few decode steps per side, and what it shows of the LoRA kernels."""
        for side, worker in self.workers.items():
            path = folder / f"trace-lora-{side}.json.gz"
            asked = {"requests": requests, "steps": steps, "path": str(path), "seed": SEED + 400_000}
            timing = worker.call("trace", 120.0, adapters=[rank_name(rank)], **asked)
            found = lora_trace.analyse(trace.read_kernels(path), steps)
            self.results.put("trace", side, value={**timing, **found, "requests": requests, "rank": rank})


# ---- what the answers say


def token_row(name: str, found: Mapping[str, Any], again: Sequence[Any]) -> dict[str, Any]:
    """A row of the tokens table: each side against stock, and stock's repetitions against stock."""
    stock = found["stock"]
    row: dict[str, Any] = {
        "case": name,
        "requests": len(stock["tokens"]),
        "generated": sum(map(len, stock["tokens"])),
        "distinct": len({token for request in stock["tokens"] for token in request}),
        "stock_repetitions": len(again),
        "stock_repeats_tokens": sum(other["tokens"] == stock["tokens"] for other in again),
        "stock_repeats_logprobs": sum(other["logprobs"] == stock["logprobs"] for other in again),
        "sides": {},
    }
    for side, answer in found.items():
        if side == "stock":
            continue
        pairs = zip(stock["tokens"], answer["tokens"], strict=True)
        row["sides"][side] = {
            "different_requests": sum(old != new for old, new in pairs),
            "logprobs_equal": answer["logprobs"] == stock["logprobs"],
        }
    return row


def token_faults(row: Mapping[str, Any]) -> list[str]:
    """What in a row is a fault of the overlay: another result than stock's, where stock repeats its own, also started anew."""
    overlay, control = row["sides"].get("overlay"), row["sides"].get("control")
    if overlay is None or row["stock_repeats_logprobs"] < row["stock_repetitions"]:
        return []
    if control is not None and not control["logprobs_equal"]:
        return []
    if overlay["different_requests"]:
        return [f"the overlay's tokens differ in {overlay['different_requests']} of {row['requests']} requests"]
    return [] if overlay["logprobs_equal"] else ["the overlay's log probabilities differ"]


def ratios(sides: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians in seconds, and the ratios overlay to stock, upstream to stock, overlay to upstream, over paired rounds."""
    found: dict[str, Any] = {"rounds": len(sides["stock"])}
    pairs = {"overlay": ("stock", "overlay"), "upstream": ("stock", "upstream"), "both": ("upstream", "overlay")}
    for name, (old, new) in pairs.items():
        if sides.get(old) and sides.get(new):
            comparison = compare(sides[old], sides[new])
            found[name] = {"ratio": comparison.ratio, "low": comparison.low, "high": comparison.high}
            found[f"{old}_seconds"], found[f"{new}_seconds"] = comparison.stock, comparison.overlay
    return found


def decode_rows(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """The decode table from its samples, whose keys are `group|N`, with a verdict on the goal."""
    rows = []
    for key, sides in samples.items():
        if not sides["stock"]:
            continue
        name, _, batch = key.partition("|")
        row = {"group": name, "requests": int(batch), **ratios(sides)}
        rows.append({**row, **goal(row)})
    return rows


def goal(row: Mapping[str, Any]) -> dict[str, Any]:
    """The goal: at least 5 % faster than stock wherever upstream's switch gains, never slower than either.

    `gains`: upstream's whole interval is below 1. `met`, `within` (not shown to be missed) or `missed` for the 5 %; None
    where upstream does not gain. Slower: the whole interval is above 1.
    """
    overlay, upstream, both = row.get("overlay"), row.get("upstream"), row.get("both")
    gains = upstream is not None and upstream["high"] < 1.0
    verdict = None
    if gains and overlay is not None:
        verdict = "met" if overlay["ratio"] <= TARGET else "within" if overlay["low"] <= TARGET else "missed"
    return {
        "upstream_gains": gains,
        "target": verdict,
        "slower_than_stock": overlay is not None and overlay["low"] > 1.0,
        "slower_than_upstream": both is not None and both["low"] > 1.0,
    }


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


def journals(folder: Path) -> list[dict[str, Any]]:
    """What the overlay's processes say of this patch, short enough for a table."""
    rows = []
    for content in read_journals(folder):
        patch = content.get("patches", {}).get("lora_linear")
        if patch is None or not (patch["layers"]["patched"] or patch["layers"]["refused"]):
            continue
        rows.append(
            {
                "process": content.get("role"),
                "verdict": patch["verdict"],
                "patched": len(patch["layers"]["patched"]),
                "refused": len(patch["layers"]["refused"]),
                "reasons": sorted(set(patch["layers"]["refused"].values())),
                "calls": patch["calls"],
                "problems": content.get("problems"),
            }
        )
    return rows
