"""What the evidence scripts share beside the bench (overlay/cli/bench): options, folders, a part that runs alone, what is kept."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from overlay.cli import failure, output
from overlay.cli.bench import command, compare, report
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import OVERLAY, Setup, numbers
from overlay.cli.bench.workers import tail
from overlay.cli.failure import CommandError
from overlay.cli.options import parse_words

#: Renderables of a results file.
Tables = Callable[[dict[str, Any]], list[Any]]
#: The part that needs no engine: kernels alone.
MICRO = "micro"
#: Keys of results that only the scripts up to commit 16d5be8 have written.
EARLIER = {"engines", "journals"}


def parsers(text: str | None, phases: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """A parser with the commands `run` and `report`, and that of `run`, which has the options that all scripts have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "report", help="print the tables of results files; what stands in several is the last one's"
    )
    show.add_argument("results", type=Path, nargs="+")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--phases", default=",".join(phase for phase in phases if phase != MICRO))
    run.add_argument("--out", type=Path, required=True, help="results, report, logs")
    run.add_argument("--work", type=Path, help="caches, models, logs; kept for the next run")
    run.add_argument(
        "--site", help="folder with vLLM for the engines (left out: PYTHONPATH, which this process has as well)"
    )
    run.add_argument("--budget", type=float, default=560.0, help="seconds after which no further step is begun")
    run.add_argument("--tokens", type=int, default=32, help="generated tokens per request")
    run.add_argument("--passes", type=int, default=2, help="decode: passes over all rows")
    run.add_argument("--rounds", type=int, default=5, help="decode: rounds per row and pass")
    run.add_argument("--steps", type=int, default=48, help="decode: timed steps per round and engine")
    run.add_argument("--prefill-rounds", type=int, default=6)
    run.add_argument("--prefill-repetitions", type=int, default=3)
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for all arms")
    run.add_argument("--overlay-env", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument(
        "--engine", action="append", default=[], metavar="NAME=JSON", help="arguments of vllm.LLM, for all arms"
    )
    run.add_argument(
        "--in-turn", type=Path, help="as of `python -m overlay bench`: beside others, measure one after the other"
    )
    run.add_argument("--one-by-one", action="store_true", help="start the engines one after the other")
    run.set_defaults(control=False, cpu=False)
    for name, values in (("batches", (1, 4, 16, 64)), ("prompts", (16, 300, 1000, 3000))):
        run.add_argument(f"--{name}", type=numbers, default=values)
    return parser, run


def setup_of(options: argparse.Namespace, name: str, arms: tuple[str, ...], capture_sizes: Sequence[int]) -> Setup:
    """The folders, made, and the environments."""
    out, work = options.out.resolve(), (options.work or Path("/tmp") / f"evidence-{name}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    return Setup(
        work=work,
        out=out,
        site=options.site or command.vllm_folders(dict(os.environ)),
        budget=options.budget,
        cpu=options.cpu,
        tokens=options.tokens,
        capture_sizes=tuple(sorted(capture_sizes)),
        arms=arms,
        variables=command.parse_pairs("--env", tuple(options.env)),
        overlay_environment=command.parse_pairs("--overlay-env", tuple(options.overlay_env)),
        turns=options.in_turn,
        installed=command.is_installed(),
    )


def engine_arguments(setup: Setup, options: argparse.Namespace, model: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, the same for all arms: the bench's without what is GDN's, and those that were asked for."""
    arguments = setup.arguments(model, False, **changes)
    arguments.pop("additional_config", None)
    return arguments | command.parse_engine(tuple(options.engine))


def describe(results: Results, options: argparse.Namespace, name: str, form: str, config: dict[str, Any]) -> None:
    """Write down what was asked for and which model it is."""
    layers, shards = (
        config["num_hidden_layers"],
        command.parse_engine(tuple(options.engine)).get("tensor_parallel_size", 1),
    )
    model = {"name": name, "format": form, "layers": layers, "linear_attention_layers": 0, "tensor_parallel": shards}
    results.put("model", value={**model, "checkpoint": None, "config": config})
    results.put("arguments", value={key: str(value) for key, value in vars(options).items()})


def run_alone(setup: Setup, results: Results, module: str, seconds: float) -> dict[str, Any]:
    """Results of `python -m MODULE FILE SECONDS` with the overlay on its path; they go under `micro`. {} where there are none.

    The module may use up that many seconds, and a minute more until its first result.
    """
    name = module.rpartition(".")[2]
    target, log = setup.work / f"{name}.json", setup.work / "logs" / f"{name}.log"
    target.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        try:
            status: object = subprocess.run(
                [sys.executable, "-m", module, str(target), str(seconds)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=setup.environment(OVERLAY, name),
                cwd=log.parent,
                timeout=max(10.0, min(seconds + 60.0, setup.remaining())),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    if status != 0:
        results.problem(f"{MICRO}: {status}\n{tail(log, 40)}")
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    if found:
        results.put(MICRO, value=found)
    elif status == 0:
        results.unfinished(f"{MICRO}: {seconds:.0f} seconds were too few for a first result")
    return found


def conduct(setup: Setup, name: str, measure: Callable[[Results, Progress], None], tables: Tables) -> int:
    """As the bench's. Keeps logs, models and journals beside the results, for one who cannot look into the work folder."""
    try:
        return command.conduct(setup, output.console(), measure, name, tables)
    finally:
        with tarfile.open(setup.out / f"{name}-logs.tar.gz", "w:gz") as tar:
            for folder in ("logs", "models", "journals"):
                if (setup.work / folder).exists():
                    tar.add(setup.work / folder, arcname=folder)


def show(paths: Sequence[Path], tables: Tables) -> None:
    """Print the tables of results files, put together."""
    data: dict[str, Any] = {}
    for path in paths:
        content = compare.read(path)
        if earlier := EARLIER & set(content):
            raise CommandError(
                f"{path} has {', '.join(earlier)}: its report is beside it, its reader is in commit 16d5be8"
            )
        kept = {key: [*data.get(key, []), *content.get(key, [])] for key in ("problems", "unfinished")}
        data = {**data, **content, **kept}
    report.show(data, report.wide_console(), None, tables)


def main(
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], int],
    phases: tuple[str, ...],
    tables: Tables,
) -> int:
    """The command that was asked for. Bad input is one message, and status 2."""
    try:
        if options.command == "report":
            show(options.results, tables)
            return 0
        options.phases = parse_words("--phases", options.phases, phases)
        return run(options)
    except Exception as error:
        return failure.report(error)
