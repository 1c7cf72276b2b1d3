#!/usr/bin/env python3
"""Evidence for the lora_linear patch on one GPU: stock, vLLM's own switch, and the overlay, side by side.

    lora_evidence.py run --site /tmp/site --work /tmp/evidence --out OUT --budget 280
    lora_evidence.py run --site /tmp/site --work /tmp/evidence --out OUT --phases micro
    lora_evidence.py report OUT/lora.json [--plot lora.png]

Phases: `tokens` greedy tokens and log probabilities: every rank, base and adapters mixed, no adapter, adapters that come
and go; `prefill` time to first token; `decode` time per decode step, the three engines alive at once and taking turns;
`trace` profiler traces, and how much of the LoRA kernels ran next to a GEMM; `micro` one linear alone, over the number of
tokens: what the patch's threshold is chosen from. Results are written after every step. Needs no network: the model is a
configuration in the layer shape of Qwen3-8B with random weights made in place, adapters are written by this script.

vLLM's LoRA kernels run at the engine's --max-lora-rank, whatever an adapter's own rank is. A small rank is cheaper only in an
engine that is started with it: `--ranks 8,16 --max-lora-rank 16`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import REPOSITORY

sys.path.append(str(REPOSITORY))

from gpu.run_setup import Setup

from overlay.cli.bench import formats, report
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import numbers
from overlay.cli.bench.workers import tail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpu.lora_engines import LoraEngines

PHASES = ("tokens", "prefill", "decode", "trace", "micro")
ENGINE_PHASES = PHASES[:-1]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--phases", default=",".join(ENGINE_PHASES))
    run.add_argument("--out", type=Path, required=True, help="results, report, traces, logs")
    run.add_argument("--work", type=Path, default=Path("/tmp/evidence"), help="caches, adapters, logs; may be kept")
    run.add_argument("--site", help="folder with vLLM, put on PYTHONPATH (left out: vLLM is installed)")
    run.add_argument("--budget", type=float, default=280.0, help="seconds after which no further step is begun")
    run.add_argument("--layers", type=int, default=24, help="with fewer, the host's CPU may be what a step waits for")
    run.add_argument("--format", choices=tuple(formats.FORMATS), default=formats.DEFAULT, help="of the base model's weights")
    run.add_argument("--ranks", type=numbers, default=(8, 16, 64))
    run.add_argument("--max-lora-rank", type=int, help="of the engines (left out: the largest of --ranks)")
    run.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16, 32, 64))
    run.add_argument("--other-batches", type=numbers, default=(1, 8, 64), help="decode without adapter, and mixed")
    run.add_argument("--prompts", type=numbers, default=(8, 128, 512, 2048, 8192))
    run.add_argument("--tokens", type=int, default=32, help="generated tokens per request")
    run.add_argument("--passes", type=int, default=2, help="decode: passes over all rows")
    run.add_argument("--rounds", type=int, default=5, help="decode: rounds per row and pass")
    run.add_argument("--steps", type=int, default=32, help="decode: timed steps per round and engine")
    run.add_argument("--prefill-rounds", type=int, default=6)
    run.add_argument("--prefill-repetitions", type=int, default=3)
    run.add_argument("--trace-requests", type=int, default=8)
    run.add_argument("--trace-rank", type=int, default=16)
    run.add_argument("--trace-steps", type=int, default=6)
    run.add_argument("--micro-seconds", type=float, default=60.0)
    run.add_argument("--control", action="store_true", help="a second stock in the place of upstream's switch")
    run.add_argument("--uncompiled", action="store_true", help="no Inductor, CUDA graphs of decode steps only")
    run.add_argument("--one-by-one", action="store_true", help="start the engines one after the other")
    run.add_argument("--overlay-env", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("--cpu", action="store_true", help="a tiny model on the CPU engine: a test of this script")
    show = commands.add_parser("report", help="print the tables of a results file")
    show.add_argument("results", type=Path, nargs="+", help="several files are put together, the later one wins")
    show.add_argument("--plot", type=Path)
    micro = commands.add_parser("micro", help="internal: one linear alone, writes JSON to a file")
    micro.add_argument("target", type=Path)
    micro.add_argument("seconds", type=float)
    found = parser.parse_args(arguments)
    if found.command == "run":
        if len(found.ranks) < 2:
            parser.error("--ranks needs two at least: one adapter goes while another runs")
        found.max_lora_rank = found.max_lora_rank or max(found.ranks)
        if found.cpu:
            found.layers = min(found.layers, 2)
            found.batches = tuple(batch for batch in found.batches if batch <= 4)
            found.other_batches = tuple(batch for batch in found.other_batches if batch <= 4)
            found.prompts = tuple(length for length in found.prompts if length <= 512)
        if found.trace_rank not in found.ranks:
            found.trace_rank = found.ranks[len(found.ranks) // 2]
    return found


def run_phase(engines: LoraEngines, phase: str, phases: list[str], options: argparse.Namespace) -> None:
    """One phase of those that need the engines."""
    from gpu.lora_engines import MIXED, NO_ADAPTER, rank_name

    if phase == "tokens":
        engines.tokens(options.batches, [length for length in options.prompts if length >= 128], logprobs=True)
    elif phase == "prefill":
        engines.prefill(options.prompts, options.prefill_rounds, options.prefill_repetitions)
    elif phase == "decode":
        rows = {rank_name(rank): options.batches for rank in options.ranks}
        rows |= {NO_ADAPTER: options.other_batches, MIXED: [count for count in options.other_batches if count > 1]}
        reserve = 40.0 if "trace" in phases[phases.index("decode") :] else 12.0
        engines.decode(rows, options.passes, options.rounds, options.steps, reserve)
    else:
        engines.trace(options.trace_requests, options.trace_steps, options.trace_rank, options.out)


def run_micro(setup: Setup, results: Results, seconds: float) -> None:
    """The linears alone, in a process of its own with the overlay on its path."""
    target, log = setup.work / "lora-micro.json", setup.work / "logs" / "lora-micro.log"
    target.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "micro", str(target), str(seconds)]
    with log.open("wb") as file:
        try:
            status: object = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=setup.environment("overlay", "lora-micro", setup.work / "vllm-lora-micro"),
                cwd=log.parent,
                timeout=max(10.0, setup.remaining()),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    if target.exists():
        results.put("micro", value=json.loads(target.read_text()))
    if status != 0:
        results.problem(f"micro: {status}\n{tail(log, 40)}")
        return
    found = results.data["micro"]
    if not found["complete"]:
        print(f"micro: stopped by its time after {len(found['rows'])} rows", flush=True)
    if any(row["different"] for row in found["rows"]):
        results.problem("micro: results differ from the serial order")
    if not all(row["on_two_streams"] for row in found["rows"]):
        results.problem("micro: NOT ON TWO STREAMS")


def save_logs(work: Path, out: Path) -> None:
    """The workers' logs, the model's configuration and the journals."""
    with tarfile.open(out / "lora-logs.tar.gz", "w:gz") as tar:
        for name in ("logs", "models", "journals"):
            if (work / name).exists():
                tar.add(work / name, arcname=name)


def run(options: argparse.Namespace) -> int:
    """Run the phases in the order given; what fails is noted and the rest goes on."""
    from gpu import lora_report
    from gpu.lora_engines import LoraEngines

    phases = [phase for phase in options.phases.split(",") if phase]
    unknown = set(phases) - set(PHASES)
    if unknown:
        raise SystemExit(f"unknown phases: {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    setup = Setup(
        work=options.work.resolve(),
        out=options.out.resolve(),
        site=options.site,
        layers=options.layers,
        budget=options.budget,
        cpu=options.cpu,
        tokens=options.tokens,
        capture_sizes=tuple(sorted({*options.batches, *options.other_batches})),
        overlay_environment=dict(item.split("=", 1) for item in options.overlay_env),
    )
    options.out = setup.out
    setup.out.mkdir(parents=True, exist_ok=True)
    results = Results(setup.out / "lora.json")
    results.put("arguments", value={key: str(value) for key, value in vars(options).items()})
    requests = max(*options.batches, *options.other_batches, 4)
    engines: LoraEngines | None = None
    try:
        for phase in phases:
            print(f"[{setup.elapsed():5.0f} s] {phase}", flush=True)
            if setup.remaining() < 15:
                results.problem(f"{phase}: no time left")
                continue
            try:
                if phase == "micro":
                    if engines is not None:
                        engines.close()
                        engines = None
                    run_micro(setup, results, min(options.micro_seconds, setup.remaining() - 5.0))
                    continue
                if engines is None:
                    engines = LoraEngines(
                        setup,
                        results,
                        options.ranks,
                        options.max_lora_rank,
                        requests,
                        options.control,
                        options.uncompiled,
                        options.format,
                    )
                    engines.start(options.one_by_one)
                run_phase(engines, phase, phases, options)
            except Exception as error:
                results.problem(f"{phase}: {type(error).__name__}: {error}")
                if engines is not None and not engines.usable():
                    engines.close()
                    engines = None
    finally:
        if engines is not None:
            engines.close()
        save_logs(setup.work, setup.out)
    report.show(results.data, report.wide_console(), setup.out / "lora-report.txt", lora_report.tables)
    print(f"[{setup.elapsed():5.0f} s] done", flush=True)
    return 1 if results.data["problems"] else 0


def main() -> int:
    options = parse()
    if options.command == "micro":
        from gpu import lora_micro

        lora_micro.run(options.target, options.seconds)
        sys.stdout.flush()
        os._exit(0)
    elif options.command == "report":
        from gpu import lora_report

        data: dict[str, Any] = {"problems": []}
        for path in options.results:
            content = json.loads(path.read_text())
            data = {**data, **content, "problems": data["problems"] + content["problems"]}
        report.show(data, report.wide_console(), None, lora_report.tables)
        if options.plot is not None:
            lora_report.plot(data, options.plot)
    else:
        return run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
