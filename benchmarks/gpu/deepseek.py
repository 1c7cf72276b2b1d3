#!/usr/bin/env python3
"""Evidence for the deepseek_v4 patch on one GPU: vLLM 0.20.0 stock and with the overlay, and 0.20.1, which has it itself.

    python3 -m benchmarks.gpu.deepseek run --site SITE --next-files delta.tar.xz --out OUT
    python3 -m benchmarks.gpu.deepseek run --site SITE --out OUT --phases tokens --engine enforce_eager=true
    python3 -m benchmarks.gpu.deepseek report OUT/deepseek.json

Phases: `micro` the four GEMMs alone, in CUDA graphs, bit for bit; `tokens` greedy tokens and log probabilities; `decode` time per
step; `ttft` time to first token. The engines are alive at once and take turns. The model is a configuration with random
weights made in place. The first start compiles for minutes: folders of `--work` (triton, deep_gemm, tilelang) can be
taken along to the next machine. With `--engine 'speculative_config={"method": "mtp", "num_speculative_tokens": 1}'` the
multi-token-prediction layer is the drafter. Run it in the repository's folder.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import deepseek_model, driver
from overlay.cli.bench import engines, report, shapes
from overlay.cli.bench.engines import Engines
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import NEXT, Results
from overlay.cli.bench.setup import OVERLAY, STOCK, Setup, numbers

PHASES = (driver.MICRO, "tokens", "decode", "ttft")
#: What is compiled at first use, for all arms in one place: the second and third start find it there.
CACHES = {"DG_JIT_CACHE_DIR": "deep_gemm", "TILELANG_CACHE_DIR": "tilelang"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser, run = driver.parsers(__doc__, PHASES)
    run.add_argument(
        "--next-files", type=Path, help="tar with the files of 0.20.1 that differ; without it, no third arm"
    )
    run.add_argument("--layers", type=int, default=6, help="2 with a sliding window, then ratios 4 and 128 in turn")
    run.add_argument("--capture", type=numbers, default=(1, 2, 4, 8, 16, 32, 64))
    run.set_defaults(passes=3, rounds=4, phases=",".join(PHASES))
    found = parser.parse_args(arguments)
    if found.command == "run" and found.next_files and not found.site:
        parser.error("--next-files needs --site: the files of 0.20.1 are laid over a copy of its vLLM")
    return found


def next_site(site: Path, files: Path, target: Path) -> str:
    """0.20.1 as a folder of its own: a copy of vLLM 0.20.0 with the changed files over it. The rest comes from `site`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(site / "vllm", target / "vllm")
    with tarfile.open(files) as tar:
        tar.extractall(target, filter="data")
    return os.pathsep.join((str(target), str(site)))


def setup_of(options: argparse.Namespace) -> Setup:
    arms = (STOCK, OVERLAY, NEXT) if options.next_files else (STOCK, OVERLAY)
    setup = driver.setup_of(options, "deepseek", arms, options.capture)
    shared = {name: str(setup.work / folder) for name, folder in CACHES.items()}
    setup.variables = {**shared, "VLLM_DEEP_GEMM_WARMUP": "skip", **setup.variables}
    if options.next_files:
        site = next_site(Path(options.site), options.next_files, setup.work / "next-site")
        setup.arm_variables = {NEXT: {"PYTHONPATH": site}}
    return setup


def run(options: argparse.Namespace) -> int:
    setup = setup_of(options)
    config = deepseek_model.configuration(options.layers)

    def measure(results: Results, progress: Progress) -> None:
        driver.describe(results, options, "DeepSeek-V4-Flash", "fp8", config)
        if driver.MICRO in options.phases:
            driver.run_alone(setup, results, "benchmarks.gpu.deepseek_micro", 180.0)
        alive = Engines(setup, results, progress)
        cases = [{"requests": count} for count in options.batches]
        times = options.prefill_rounds, options.prefill_repetitions
        every = {
            "tokens": functools.partial(alive.tokens, options.batches, options.prompts),
            "decode": functools.partial(alive.decode, cases, options.passes, options.rounds, options.steps),
            "ttft": functools.partial(alive.first_token, options.prompts, *times),
        }
        phases = {name: every[name] for name in options.phases if name in every}
        model = shapes.write(setup.work / "models" / "flash", config)
        arguments = driver.engine_arguments(
            setup, options, model, max_num_seqs=max(*options.capture, *options.batches), **deepseek_model.ENGINE
        )
        results.put("engine", value=arguments)
        if phases:
            alive.run(arguments, not options.one_by_one, engines.SEED, phases)

    return driver.conduct(setup, "deepseek", measure, tables)


def tables(data: dict[str, Any]) -> list[Any]:
    """The bench's, with the GEMMs alone behind the head."""
    head, *others = report.tables(data)
    found = data.get(driver.MICRO, {})
    shown = []
    for ratio in ("ratio 4", "ratio 128"):
        columns = ("serial", "stock", "overlay", "overlay / stock", "different")
        grid = report.table(f"the GEMMs of a layer alone, {ratio} (us per layer)", "tokens", *columns)
        for row in found.get(ratio, ()):
            times = (f"{row[way]:.1f}" for way in columns[:3])
            grid.add_row(str(row["tokens"]), *times, f"{row['overlay'] / row['stock']:.3f}", str(row["different"]))
        shown += [grid] if grid.rows else []
    return [head, *shown, *others]


if __name__ == "__main__":
    sys.exit(driver.main(parse(), run, PHASES, tables))
