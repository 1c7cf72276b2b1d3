#!/usr/bin/env python3
"""Evidence for the lora_linear patch on one GPU: stock, vLLM's own switch, and the overlay, side by side.

    PYTHONPATH=/tmp/site python3 -m benchmarks.lora_evidence run --work /tmp/evidence --out OUT --budget 280
    PYTHONPATH=/tmp/site python3 -m benchmarks.lora_evidence run --out OUT --format fp8-block --phases tokens,decode
    PYTHONPATH=/tmp/site python3 -m benchmarks.lora_evidence run --out OUT --phases micro
    python3 -m benchmarks.lora_evidence report OUT/lora.json

Phases: `tokens` greedy tokens and log probabilities: every rank, base and adapters mixed, no adapter, adapters that come
and go; `prefill` time to first token; `decode` time per decode step, the engines alive at once and taking turns;
`trace` how much of the LoRA kernels a profiler saw next to a GEMM; `micro`, before all others, one linear alone, over the
number of tokens: what the patch's threshold is chosen from. Results are written after every step. Needs no network: the
model is a configuration in the layer shape of Qwen3-8B with random weights made in place, adapters are written by this
script. Run it in the repository's folder.

vLLM's LoRA kernels run at the engine's --max-lora-rank, whatever an adapter's own rank is. A small rank is cheaper only in an
engine that is started with it: `--ranks 8,16 --max-lora-rank 16`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu import driver, lora_engines, lora_report
from overlay.cli.bench import formats, shapes
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import Setup, numbers

PHASES = ("tokens", "prefill", "decode", "trace", driver.MICRO)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser, run = driver.parsers(__doc__, PHASES)
    run.add_argument("--layers", type=int, default=24, help="with fewer, the host's CPU may be what a step waits for")
    run.add_argument(
        "--format", choices=tuple(formats.FORMATS), default=formats.DEFAULT, help="of the base model's weights"
    )
    run.add_argument("--ranks", type=numbers, default=(8, 16, 64))
    run.add_argument("--max-lora-rank", type=int, help="of the engines (left out: the largest of --ranks)")
    run.add_argument("--other-batches", type=numbers, default=(1, 8, 64), help="decode without adapter, and mixed")
    run.add_argument("--trace-requests", type=int, default=8)
    run.add_argument("--trace-rank", type=int, default=16)
    run.add_argument("--trace-steps", type=int, default=6)
    run.add_argument("--micro-seconds", type=float, default=60.0)
    run.add_argument("--control", action="store_true", help="a second stock as well")
    run.add_argument(
        "--no-switch",
        dest="switch",
        action="store_false",
        help="without vLLM's own switch, which 0.20 was the first to have",
    )
    run.add_argument("--uncompiled", action="store_true", help="no Inductor, CUDA graphs of decode steps only")
    run.add_argument("--cpu", action="store_true", help="a tiny model on the CPU engine: a test of this script")
    run.set_defaults(budget=280.0, steps=32, batches=(1, 2, 4, 8, 16, 32, 64), prompts=(8, 128, 512, 2048, 8192))
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


def run_micro(setup: Setup, results: Results, seconds: float) -> None:
    """The linears alone, in a process of its own with the overlay on its path."""
    found = driver.run_alone(setup, results, "benchmarks.gpu.lora_micro", seconds)
    rows = found.get("rows", ())
    if found and not found["complete"]:
        results.unfinished(f"micro: stopped by its time after {len(rows)} rows")
    if any(row["different"] for row in rows):
        results.problem("micro: results differ from the serial order")
    if not all(row["on_two_streams"] for row in rows):
        results.problem("micro: NOT ON TWO STREAMS")


def run(options: argparse.Namespace) -> int:
    """Run the phases in the order given; what fails is noted and the rest goes on."""
    setup = lora_engines.setup_of(options)
    config = lora_engines.configuration(options)

    def measure(results: Results, progress: Progress) -> None:
        driver.describe(results, options, "Qwen3-8B with LoRA", options.format, config)
        if driver.MICRO in options.phases:
            run_micro(setup, results, options.micro_seconds)
        alive = lora_engines.LoraEngines(setup, results, progress, options)
        every = {
            "tokens": alive.compare_tokens,
            "prefill": alive.compare_prefill,
            "decode": alive.compare_decode,
            "trace": alive.trace,
        }
        phases = {name: every[name] for name in options.phases if name in every}
        if phases:
            model = shapes.write(setup.work / "models" / f"qwen3-{options.layers}-layers-{options.format}", config)
            arguments = lora_engines.engine_arguments(setup, options, model)
            results.put("engine", value=arguments)
            setup.mark_triton_warm()  # nothing of this model is autotuned, so nobody spoils another's timing
            alive.run(arguments, not options.one_by_one, lora_engines.SEED, phases)

    return driver.conduct(setup, "lora", measure, lora_report.tables)


if __name__ == "__main__":
    sys.exit(driver.main(parse(), run, PHASES, lora_report.tables))
