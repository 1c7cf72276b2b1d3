#!/usr/bin/env python3
"""Evidence for the deepseek_v4 patch on one GPU: vLLM 0.20.0 stock and with the overlay, and 0.20.1, which has it itself.

    deepseek.py run --site /tmp/site --next-files delta.tar.xz --out OUT --budget 560
    deepseek.py report OUT/deepseek.json

Phases: `micro` the four GEMMs alone, in CUDA graphs, bit for bit; `tokens` greedy tokens and log probabilities; `decode` time per
step; `ttft` time to first token; `mtp` tokens once more, with the multi-token-prediction layer as drafter. The three engines
are alive at once and take turns. Models are configurations with random weights made in place. Where an engine does not
start, the end of its log is printed and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder has modules by the names of others'; its parent is the one to look in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu import REPOSITORY, deepseek_model

sys.path.append(str(REPOSITORY))

from gpu.run_setup import Setup
from overlay.cli.bench.intervals import compare
from overlay.cli.bench.results import Results, read_journals
from overlay.cli.bench.setup import numbers
from overlay.cli.bench.workers import Worker, WorkerError, in_turn, tail

PHASES = ("micro", "tokens", "decode", "ttft", "mtp")
SIDES = ("stock", "overlay", "next")
SEED = 20251121
SCRIPT = Path(__file__).resolve().with_name("deepseek_worker.py")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--site", required=True, help="folder with vLLM 0.20.0 and what it needs")
    run.add_argument(
        "--next-files", type=Path, help="tar with the files of 0.20.1 that differ; without it, no third side"
    )
    run.add_argument("--out", type=Path, required=True)
    run.add_argument(
        "--work", type=Path, default=Path("/tmp/deepseek"), help="caches and logs; keep it for the next run"
    )
    run.add_argument("--budget", type=float, default=560.0, help="seconds after which no further step is begun")
    run.add_argument("--phases", default=",".join(PHASES[:-1]))
    run.add_argument("--layers", type=int, default=6, help="2 with a sliding window, then ratios 4 and 128 in turn")
    run.add_argument("--batches", type=numbers, default=(1, 4, 16, 64))
    run.add_argument("--prompts", type=numbers, default=(16, 300, 1000, 3000))
    run.add_argument("--capture", type=numbers, default=(1, 2, 4, 8, 16, 32, 64))
    run.add_argument("--tokens", type=int, default=32, help="generated tokens per request")
    run.add_argument("--passes", type=int, default=3)
    run.add_argument("--rounds", type=int, default=4)
    run.add_argument("--steps", type=int, default=48)
    run.add_argument(
        "--eager", action="store_true", help="enforce_eager: without the compiler's fusions, which round otherwise"
    )
    run.add_argument("--tensor-parallel", type=int, default=1)
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for all sides")
    run.add_argument("--load-cache", type=Path, help="deepseek-cache.tar.xz of an earlier run")
    run.add_argument("--save-cache", action="store_true", help="write it, if it is below 15 MiB")
    show = commands.add_parser("report", help="print the tables of a results file")
    show.add_argument("results", type=Path)
    micro = commands.add_parser("micro", help="internal: the GEMMs alone, writes JSON to a file")
    micro.add_argument("target", type=Path)
    micro.add_argument("work", type=Path)
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------- the three sides

#: What is compiled at first use, for all sides in one place: the second and third start find it there.
CACHES = {"TRITON_CACHE_DIR": "triton", "DG_JIT_CACHE_DIR": "deep_gemm", "TILELANG_CACHE_DIR": "tilelang"}


def next_site(site: Path, files: Path, target: Path) -> str:
    """0.20.1 as a folder of its own: a copy of vLLM 0.20.0 with the changed files over it. The rest comes from `site`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(site / "vllm", target / "vllm")
    with tarfile.open(files) as tar:
        tar.extractall(target, filter="data")
    return os.pathsep.join((str(target), str(site)))


@dataclass
class Engines:
    """The workers of one phase group, by side."""

    setups: dict[str, Setup]
    results: Results
    extra: dict[str, str]
    options: argparse.Namespace
    workers: dict[str, Worker] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)

    def environment(self, side: str, run: str) -> dict[str, str]:
        setup = self.setups[side]
        cache = setup.work / f"vllm-{side}"
        kept = setup.environment("overlay" if side == "overlay" else "stock", run, cache)
        shared = {name: str(setup.work / folder) for name, folder in CACHES.items()}
        return {**kept, **shared, "VLLM_DEEP_GEMM_WARMUP": "skip", **self.extra}

    def start(self, run: str, mtp: bool = False) -> None:
        """Stock first, alone: it fills the caches. A side that does not start is left out, and the end of its log shown.

        Raises WorkerError where stock did not start; nothing is tried twice.
        """
        if run in self.started:
            raise WorkerError("the engines have been started before, and are gone")
        self.started.add(run)
        first, *rest = self.setups
        self._send_start(first, run, mtp)
        self._ready(first, run)
        if first not in self.workers:
            raise WorkerError("without a stock engine there is nothing to compare with")
        for side in rest:
            self._send_start(side, run, mtp)
        for side in rest:
            self._ready(side, run)

    def _send_start(self, side: str, run: str, mtp: bool) -> None:
        setup = self.setups[side]
        model = deepseek_model.write(setup.work / "models" / "flash", self.options.layers)
        engine = deepseek_model.engine(model, self.options.capture, mtp, self.options.tensor_parallel)
        engine["enforce_eager"] = self.options.eager
        log = setup.work / "logs" / f"{run}-{side}.log"
        worker = Worker(side, self.environment(side, run), log, SCRIPT)
        self.workers[side] = worker
        worker.send("start", engine=engine, weight_seed=SEED)

    def _ready(self, side: str, run: str) -> None:
        setup, worker = self.setups[side], self.workers[side]
        try:
            answer = worker.receive(max(30.0, setup.remaining()))
            if self.options.tensor_parallel == 1:
                answer["weights"] = worker.call("checksum", 60.0)
        except WorkerError as error:
            self.results.problem(f"{run}: {side} did not start: {error}\n{tail(worker.log, 40)}")
            worker.close()
            del self.workers[side]
            return
        self.results.put(run, "engines", side, value=answer)
        loaded = bool(answer["overlay_modules"])
        if loaded != (side == "overlay"):
            self.results.problem(f"{side}: overlay modules loaded: {loaded}")
        print(
            f"[{setup.elapsed():5.0f} s] {side} ready: vllm {answer['vllm']}, build {answer['build_seconds']:.0f} s, "
            f"compile {answer['compile_seconds']:.1f} s, weights {answer.get('weights')}",
            flush=True,
        )

    def all(self, command: str, turn: int = 0, **arguments: Any) -> dict[str, Any]:
        """One engine after the other, see `in_turn`."""
        return in_turn(self.workers, command, turn, max(30.0, self.remaining() + 20.0), **arguments)

    def remaining(self) -> float:
        return self.setups["stock"].remaining()

    def usable(self) -> bool:
        """After a failed phase: leave out what does not answer any more. False where stock is gone."""
        for side, worker in list(self.workers.items()):
            try:
                worker.call("decode_end", 60.0)
            except WorkerError as error:
                self.results.problem(f"{side} is gone: {error}")
                worker.close()
                del self.workers[side]
        return "stock" in self.workers

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}


# ---------------------------------------------------------------------------------------------- the phases


def tokens(engines: Engines, run: str, batches: tuple[int, ...], prompts: tuple[int, ...], count: int) -> None:
    """Greedy tokens of every side against stock, and of stock against itself."""
    cases = [(f"N={batch}", [12 + (index * 7) % 23 for index in range(batch)]) for batch in batches]
    cases += [(f"prompt {length}", [length]) for length in prompts]
    cases.append(("mixed prompts", [length for length in (*prompts, *prompts) if length <= 1000]))
    rows: list[dict[str, Any]] = []
    for index, (name, lengths) in enumerate(cases):
        if engines.remaining() < 15:
            engines.results.problem(f"{run}: out of time before {name}")
            return
        asked: dict[str, Any] = {"lengths": lengths, "seed": SEED + 1000 * index, "tokens": count, "logprobs": True}
        found = engines.all("generate", **asked)
        again = engines.workers["stock"].call("generate", 120.0, **asked)
        stock = found["stock"]
        row: dict[str, Any] = {
            "case": name,
            "generated": sum(map(len, stock["tokens"])),
            "distinct": len({token for request in stock["tokens"] for token in request}),
            "stock repeats itself": again["tokens"] == stock["tokens"],
            "stock repeats logprobs": again["logprobs"] == stock["logprobs"],
        }
        for side in found:
            if side != "stock":
                pairs = zip(stock["tokens"], found[side]["tokens"], strict=True)
                row[f"{side}: different requests"] = sum(old != new for old, new in pairs)
                row[f"{side}: logprobs equal"] = found[side]["logprobs"] == stock["logprobs"]
        if {"overlay", "next"} <= set(found):
            row["overlay equals next"] = found["overlay"]["tokens"] == found["next"]["tokens"]
            row["overlay's logprobs equal next's"] = found["overlay"]["logprobs"] == found["next"]["logprobs"]
        rows.append(row)
        engines.results.put(run, "tokens", value=rows)
        print(f"[{engines.setups['stock'].elapsed():5.0f} s] {row}", flush=True)


def decode(engines: Engines, options: argparse.Namespace) -> None:
    """Time per decode step with N requests, the engines taking turns."""
    means: dict[int, dict[str, list[float]]] = {}
    for index in range(options.passes):
        for batch in options.batches:
            if engines.remaining() < 25:
                engines.results.problem(f"decode: out of time in pass {index + 1} at N={batch}")
                return
            sides = means.setdefault(batch, {side: [] for side in engines.workers})
            length = options.rounds * (options.steps + 4) + 64
            begin = {
                "requests": batch,
                "prompt": 16,
                "tokens": length,
                "warm": 12,
                "seed": SEED + 200_000 + index * 1000,
            }
            engines.all("decode_begin", **begin)
            for turn in range(options.rounds):
                for side, times in engines.all("decode_steps", turn, count=options.steps, warm=2).items():
                    sides[side].append(times["mean"])
            engines.all("decode_end")
            engines.results.put("engine", "decode", value=rows_of(means))
            engines.results.put("engine", "decode_samples", value=means)
    print_rows("decode, requests", rows_of(means))


def first_token(engines: Engines, options: argparse.Namespace) -> None:
    """Seconds to the first token of one prompt, the engines taking turns."""
    times: dict[int, dict[str, list[float]]] = {}
    for length in options.prompts:
        engines.all("first_token", length=length, repetitions=2, seed=1)
    for turn in range(6):
        for length in options.prompts:
            if engines.remaining() < 15:
                engines.results.problem("time to first token: out of time")
                return
            sides = times.setdefault(length, {side: [] for side in engines.workers})
            asked = {"length": length, "repetitions": 3, "seed": SEED + 300_000 + turn * 1000}
            for side, found in engines.all("first_token", turn, **asked).items():
                sides[side].extend(found)
        engines.results.put("engine", "first_token", value=rows_of(times))
    print_rows("time to first token, prompt", rows_of(times))


def rows_of(samples: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Per size: each side's median in milliseconds, and the ratios to stock with their intervals."""
    rows = []
    for size, sides in samples.items():
        if not sides.get("stock"):
            continue
        row: dict[str, Any] = {"size": size}
        for side, values in sides.items():
            row[f"{side} ms"] = round(sorted(values)[len(values) // 2] * 1000, 4)
            if side != "stock" and values:
                row[f"{side} to stock"] = compare(sides["stock"], values).as_dict()
        rows.append(row)
    return rows


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        ratios = {name: round(value["ratio"], 4) for name, value in row.items() if isinstance(value, dict)}
        times = {name: value for name, value in row.items() if name.endswith(" ms")}
        print(f"{title} {row['size']}: {times} {ratios}", flush=True)


def micro(setup: Setup, engines: Engines) -> None:
    """The GEMMs alone, in a process of its own with the overlay on its path."""
    import subprocess

    target, log = setup.work / "micro.json", setup.work / "logs" / "micro.log"
    target.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "micro", str(target), str(setup.work)]
    with log.open("wb") as file:
        environment = engines.environment("overlay", "micro")
        limit = max(10.0, min(240.0, setup.remaining()))
        try:
            status: Any = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    if target.exists():
        engines.results.put("micro", value=json.loads(target.read_text()))
    print("\n".join(line for line in log.read_text(errors="replace").splitlines() if line.startswith("ratio")))
    if status != 0:
        engines.results.problem(f"micro: {status}\n{tail(log, 40)}")


def journals(folder: Path) -> list[dict[str, Any]]:
    """What the overlay says of this patch, process by process."""
    rows = []
    for content in read_journals(folder):
        patch = content.get("patches", {}).get("deepseek_v4")
        if patch is not None:
            rows.append({"process": content.get("role"), "problems": content.get("problems"), **patch})
    return rows


def run(options: argparse.Namespace) -> int:
    phases = [phase for phase in options.phases.split(",") if phase]
    unknown = set(phases) - set(PHASES)
    if unknown:
        raise SystemExit(f"unknown phases: {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    work, out = options.work.resolve(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if options.load_cache is not None and options.load_cache.exists():
        with tarfile.open(options.load_cache) as tar:
            tar.extractall(work, filter="data")
    results = Results(out / "deepseek.json")
    results.put("arguments", value={key: str(value) for key, value in vars(options).items()})

    def setup_of(site: str) -> Setup:
        return Setup(work, out, site, options.budget, layers=options.layers)

    setups = {"stock": setup_of(options.site), "overlay": setup_of(options.site)}
    if options.next_files is not None:
        setups["next"] = setup_of(next_site(Path(options.site), options.next_files, work / "next-site"))
    extra = dict(item.split("=", 1) for item in options.env)
    engines = Engines(setups, results, extra, options)
    setup = setups["stock"]
    try:
        for phase in phases:
            print(f"[{setup.elapsed():5.0f} s] {phase}", flush=True)
            if setup.remaining() < 30:
                results.problem(f"{phase}: no time left")
                continue
            try:
                run_phase(phase, engines, setup, options)
            except Exception as error:
                logs = "".join(f"\n--- {side}\n{tail(worker.log, 30)}" for side, worker in engines.workers.items())
                results.problem(f"{phase}: {type(error).__name__}: {error}{logs}")
                if not engines.usable():
                    engines.close()
    finally:
        engines.close()
        for name in ("engine", "mtp"):
            results.put("journals", name, value=journals(setup.journal_folder(name)))
        with tarfile.open(out / "deepseek-logs.tar.gz", "w:gz") as tar:
            for name in ("logs", "models", "journals"):
                if (work / name).exists():
                    tar.add(work / name, arcname=name)
        if options.save_cache:
            save_cache(work, out)
    show(results.data)
    return 1 if results.data["problems"] else 0


def run_phase(phase: str, engines: Engines, setup: Setup, options: argparse.Namespace) -> None:
    if phase == "micro":
        micro(setup, engines)
        return
    if phase == "mtp":
        engines.close()
        engines.start("mtp", mtp=True)
        tokens(engines, "mtp", options.batches[:2], options.prompts[:2], options.tokens)
        return
    if not engines.workers:
        engines.start("engine")
    if phase == "tokens":
        tokens(engines, "engine", options.batches, options.prompts, options.tokens)
    elif phase == "decode":
        decode(engines, options)
    else:
        first_token(engines, options)


def save_cache(work: Path, out: Path) -> None:
    """What was compiled at first use, if it is small enough to come back."""
    target = work / "deepseek-cache.tar.xz"
    with tarfile.open(target, "w:xz", preset=1) as tar:
        for name in CACHES.values():
            if (work / name).exists():
                tar.add(work / name, arcname=name)
    size = target.stat().st_size
    print(f"caches: {size / 1e6:.1f} MB")
    if size < 15 << 20:
        shutil.copy(target, out / target.name)


def show(data: dict[str, Any]) -> None:
    """The tables, for a reader."""
    for name in ("ratio 4", "ratio 128"):
        for row in data.get("micro", {}).get(name, []):
            ratio = row["overlay"] / row["stock"]
            times = (
                f"serial {row['serial']:7.1f} | stock {row['stock']:7.1f} | overlay {row['overlay']:7.1f} us per layer"
            )
            print(f"{name:9} tokens {row['tokens']:5d}: {times} | {ratio:.3f} | different {row['different']}")
    for run in ("engine", "mtp"):
        for row in data.get(run, {}).get("tokens", []):
            print(f"{run} tokens: {row}")
    print_rows("decode, requests", data.get("engine", {}).get("decode", []))
    print_rows("time to first token, prompt", data.get("engine", {}).get("first_token", []))
    for run, rows in data.get("journals", {}).items():
        for row in rows:
            layers = row["layers"]
            print(f"journal {run}: {row['process']}: {row['verdict']}, {row['calls']}, problems {row['problems']}")
            print(f"  patched {layers['patched']}\n  refused {sorted(set(layers['refused'].values()))}")
    for text in data["problems"]:
        print(f"PROBLEM {text}")


def main() -> int:
    options = parse()
    if options.command == "micro":
        from gpu import deepseek_micro

        options.target.write_text(json.dumps(deepseek_micro.run(options.work)))
        sys.stdout.flush()
        os._exit(0)
    elif options.command == "report":
        show(json.loads(options.results.read_text()))
    else:
        return run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
