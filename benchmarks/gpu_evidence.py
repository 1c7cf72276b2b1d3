#!/usr/bin/env python3
"""Evidence from a GPU host: the same engine with and without the overlay, side by side.

    gpu_evidence.py run --site /tmp/site --out OUT --phases tokens,ttft,decode,trace --budget 540
    gpu_evidence.py report OUT/results.json [--plot FOLDER]

Phases: `tokens` greedy tokens and log probabilities; `ttft` time to first token; `decode` time per decode step, the two
engines alive at once and taking turns; `trace` profiler traces and the overlap found in them; `compile` cold compile
times and artifacts; `quant` quantized checkpoints; `replay` graph replays against the serial order, bit for bit; `micro`
the two projections alone; `tp` tensor parallelism over two GPUs. Results are written after every step. What the numbers mean is in docs and in the modules
under `gpu/`. Needs no network: models are configurations with random weights made in place.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import REPOSITORY

sys.path.append(str(REPOSITORY))

from gpu.pair import EnginePair
from gpu.run_setup import Setup
from gpu.starts import QUANTIZED, compile_cold, quantized, tensor_parallel

from overlay.cli import output
from overlay.cli.bench import report as tables
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import numbers
from overlay.cli.bench.shapes import DEFAULT_SHAPE
from overlay.cli.bench.workers import tail

if TYPE_CHECKING:
    from collections.abc import Sequence

PHASES = ("tokens", "ttft", "decode", "trace", "compile", "quant", "replay", "micro", "tp")
PAIR_PHASES = ("tokens", "ttft", "decode", "trace")
PIECE_BYTES = 15 << 20


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--phases", default=",".join(PHASES[:-1]), help="all but tp, which needs two GPUs")
    run.add_argument("--out", type=Path, required=True, help="results, report, traces, logs")
    run.add_argument(
        "--work", type=Path, default=Path("/tmp/evidence"), help="caches, models, logs; keep it for the next run"
    )
    run.add_argument("--site", help="folder with vLLM, put on PYTHONPATH (left out: vLLM is installed)")
    run.add_argument("--budget", type=float, default=560.0, help="seconds after which no further step is begun")
    run.add_argument("--architecture", default="auto", help="auto, qwen3_5_moe, qwen3_5_moe_text, qwen3_next")
    run.add_argument("--layers", type=int, default=12)
    run.add_argument("--batches", type=numbers, default=(1, 2, 4, 8, 16, 32, 64, 128, 256))
    run.add_argument("--prompts", type=numbers, default=(8, 128, 512, 2048, 8192))
    run.add_argument(
        "--extra-prompts", type=numbers, default=(100, 300), help="time to first token outside captured sizes"
    )
    run.add_argument("--tokens", type=int, default=32, help="generated tokens per request")
    run.add_argument("--passes", type=int, default=4, help="decode: passes over all batches")
    run.add_argument("--rounds", type=int, default=5, help="decode: rounds per batch and pass")
    run.add_argument("--steps", type=int, default=64, help="decode: timed steps per round and engine")
    run.add_argument("--ttft-rounds", type=int, default=8)
    run.add_argument("--ttft-repetitions", type=int, default=3)
    run.add_argument("--trace-requests", type=int, default=8)
    run.add_argument("--trace-steps", type=int, default=6)
    run.add_argument("--compile-order", default="stock,overlay,overlay,stock")
    run.add_argument("--quant-variants", default=";".join(QUANTIZED), help="separated by semicolons")
    run.add_argument("--replays", type=int, default=10_000)
    run.add_argument("--overlay-env", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("--load-cache", type=Path, help="folder with cache-NN pieces of an earlier run")
    run.add_argument(
        "--save-cache", type=int, default=0, metavar="PIECES", help="write the caches to OUT, this many pieces"
    )
    run.add_argument("--cpu", action="store_true", help="a tiny model on the CPU engine: a test of this script")
    show = commands.add_parser("report", help="print the tables of a results file")
    show.add_argument("results", type=Path, nargs="+", help="several files are put together, the later one wins")
    show.add_argument("--plot", type=Path, help="a folder for ratio.png")
    alone = commands.add_parser("standalone", help="internal: replay or micro, writes JSON to a file")
    alone.add_argument("what", choices=("replay", "micro", "call-costs"))
    alone.add_argument("target", type=Path)
    alone.add_argument("--replays", type=int, default=10_000)
    alone.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


# ---- caches


def load_cache(folder: Path, work: Path) -> None:
    """Unpack the pieces that an earlier run saved. Nothing there is no error."""
    pieces = sorted(folder.glob("cache-*"))
    if not pieces:
        print(f"no saved cache in {folder}")
        return
    work.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|xz').extractall({str(work)!r})",
        ],
        stdin=subprocess.PIPE,
    )
    process.communicate(b"".join(piece.read_bytes() for piece in pieces))
    print(f"loaded {len(pieces)} cache pieces, status {process.returncode}")


#: Triton's intermediate stages. They must be there, or Triton compiles again, but nothing reads them: kept empty.
INTERMEDIATE = (".ttir", ".ttgir", ".llir", ".ptx", ".source")


def save_cache(work: Path, out: Path, pieces: int) -> None:
    """Pack Triton's and vLLM's caches, in pieces. What is too large is left out, vLLM's part first."""
    compressor = ["xz", "-1", "-T0", "-c"] if shutil.which("xz") else [sys.executable, "-c", COMPRESS]
    archive = work / "cache.tar.xz"
    for folders in (("triton", "vllm-stock", "vllm-overlay"), ("triton",)):
        with archive.open("wb") as target:
            process = subprocess.Popen(compressor, stdin=subprocess.PIPE, stdout=target)
            with tarfile.open(fileobj=process.stdin, mode="w|") as tar:
                for name in folders:
                    _pack(tar, work / name, name)
            if process.stdin is not None:
                process.stdin.close()
            process.wait()
        data = archive.read_bytes()
        print(f"cache of {', '.join(folders)}: {len(data) / 1e6:.1f} MB")
        if len(data) <= pieces * PIECE_BYTES:
            for index in range(0, len(data), PIECE_BYTES):
                (out / f"cache-{index // PIECE_BYTES:02d}").write_bytes(data[index : index + PIECE_BYTES])
            return
    print("the caches are too large to keep")


COMPRESS = "import lzma, shutil, sys; shutil.copyfileobj(sys.stdin.buffer, lzma.open(sys.stdout.buffer, 'w', preset=1))"


def _pack(tar: tarfile.TarFile, folder: Path, name: str) -> None:
    """Add a cache folder; intermediate stages become empty files."""
    for path in sorted(folder.rglob("*")):
        entry = tar.gettarinfo(str(path), arcname=f"{name}/{path.relative_to(folder)}")
        if not entry.isfile():
            tar.addfile(entry)
        elif path.suffix in INTERMEDIATE and name == "triton":
            entry.size = 0
            tar.addfile(entry)
        else:
            with path.open("rb") as content:
                tar.addfile(entry, content)


def save_logs(work: Path, out: Path) -> None:
    """The workers' logs, the models' configurations and the journals."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
        for name in ("logs", "models", "journals"):
            if (work / name).exists():
                tar.add(work / name, arcname=name)


# ---- phases


def standalone(setup: Setup, results: Results, what: str, replays: int) -> None:
    """Run a standalone measurement in a process of its own, with the overlay on PYTHONPATH."""
    target = setup.work / f"{what}.json"
    target.unlink(missing_ok=True)
    log = setup.work / "logs" / f"{what}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "standalone",
        what,
        str(target),
        "--replays",
        str(replays),
    ]
    command += ["--device", "cpu" if setup.cpu else "cuda"]
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=setup.environment("overlay", what),
                cwd=log.parent,
                timeout=max(10.0, setup.remaining()),
                check=False,
            )
            status: object = done.returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    if target.exists():
        found = json.loads(target.read_text())
        if what == "call-costs":
            results.put("micro", "call_costs", value=found)
        else:
            for key, value in found.items():
                results.put(what, key, value=value)
    if status != 0:
        results.problem(f"{what}: {status}\n{tail(log)}")


def run_standalone(options: argparse.Namespace) -> None:
    """Inside that process."""
    import torch
    from gpu import micro

    if options.what == "replay":
        found = micro.replay(options.replays)
        options.target.write_text(json.dumps(found))
    elif options.what == "micro":
        found = {"torch": torch.__version__, "call_costs": micro.call_costs(device_name=options.device)}
        options.target.write_text(json.dumps(found))
        found["graph"] = micro.graph_times()
        options.target.write_text(json.dumps(found))
    else:
        options.target.write_text(json.dumps(micro.call_costs(device_name=options.device)))
    sys.stdout.flush()
    os._exit(0)


def run_pair_phase(pair: EnginePair, phase: str, options: argparse.Namespace) -> None:
    if phase == "tokens":
        pair.tokens(options.batches, options.prompts)
    elif phase == "ttft":
        lengths = sorted({*options.prompts, *options.extra_prompts})
        pair.first_token(lengths, options.ttft_rounds, options.ttft_repetitions)
    elif phase == "decode":
        reserve = 45.0 if "trace" in options.phases else 15.0
        pair.decode(options.batches, options.passes, options.rounds, options.steps, reserve)
    else:
        pair.trace(options.trace_requests, options.trace_steps, options.out)


def run(options: argparse.Namespace) -> int:
    """Run the phases in the order given; what fails is noted and the rest goes on."""
    from gpu import report

    phases = [phase for phase in options.phases.split(",") if phase]
    unknown = set(phases) - set(PHASES)
    if unknown:
        raise SystemExit(f"unknown phases: {', '.join(sorted(unknown))}; there are {', '.join(PHASES)}")
    setup = Setup(
        work=options.work.resolve(),
        out=options.out.resolve(),
        site=options.site,
        architecture=options.architecture,
        layers=options.layers,
        budget=options.budget,
        cpu=options.cpu,
        tokens=options.tokens,
        overlay_environment=dict(item.split("=", 1) for item in options.overlay_env),
    )
    options.out = setup.out
    setup.out.mkdir(parents=True, exist_ok=True)
    if options.load_cache is not None:
        load_cache(options.load_cache, setup.work)
    results = Results(setup.out / "results.json")
    results.put("arguments", value={key: str(value) for key, value in vars(options).items()})
    results.put(
        "model",
        value={
            "name": DEFAULT_SHAPE,
            "layers": setup.layers,
            "tensor_parallel": 1,
            "linear_attention_layers": setup.gdn_layers(),
        },
    )
    progress = Progress(output.console())
    pair: EnginePair | None = None
    replaying: threading.Thread | None = None
    try:
        for phase in phases:
            if phase not in PAIR_PHASES and pair is not None:
                pair.close()
                pair = None
            print(f"[{setup.elapsed():5.0f} s] {phase}", flush=True)
            if setup.remaining() < 20:
                results.problem(f"{phase}: no time left")
                continue
            try:
                if phase in PAIR_PHASES:
                    if pair is None:
                        pair = EnginePair(setup, results, progress)
                        pair.start_any()
                    run_pair_phase(pair, phase, options)
                elif phase == "compile":
                    started = results.data.get("pair", {}).get("architecture", setup.architectures()[0])
                    compile_cold(setup, results, options.compile_order.split(","), started)
                elif phase == "quant":
                    if "replay" in phases and not setup.cpu:
                        # Neither is timed, and replays under load are the harder test.
                        replaying = threading.Thread(
                            target=standalone, args=(setup, results, "replay", options.replays)
                        )
                        replaying.start()
                    quantized(setup, results, [name for name in options.quant_variants.split(";") if name])
                elif phase == "replay" and replaying is not None:
                    replaying.join()
                elif phase == "tp":
                    tensor_parallel(setup, results, setup.architectures()[0])
                elif setup.cpu:
                    standalone(setup, results, "call-costs", 0)
                else:
                    standalone(setup, results, phase, options.replays)
            except Exception as error:
                results.problem(f"{phase}: {type(error).__name__}: {error}")
                if pair is not None and not pair.usable():
                    pair.close()
                    pair = None
    finally:
        if pair is not None:
            pair.close()
        if replaying is not None:
            replaying.join()
        print(f"[{setup.elapsed():5.0f} s] packing", flush=True)
        save_logs(setup.work, setup.out)
        if options.save_cache:
            save_cache(setup.work, setup.out, options.save_cache)
    tables.show(results.data, tables.wide_console(), setup.out / "report.txt", report.tables)
    return 1 if results.data["problems"] or results.data["unfinished"] else 0


def main() -> int:
    options = parse()
    if options.command == "standalone":
        run_standalone(options)
    elif options.command == "report":
        from gpu import report

        data: dict[str, Any] = {"problems": []}
        for path in options.results:
            content = json.loads(path.read_text())
            data = {**data, **content, "problems": data["problems"] + content["problems"]}
        tables.show(data, tables.wide_console(), None, report.tables)
        if options.plot is not None:
            from overlay.cli.bench import plots

            plots.write(data, options.plot)
    else:
        return run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
