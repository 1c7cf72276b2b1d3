"""What the overlay adds to the start of Python: `python -c pass` with its folder on PYTHONPATH and without, in turn.

    python3 -m benchmarks.startup                        # this interpreter, 200 pairs, fails above 2 ms
    python3 -m benchmarks.startup --python /usr/bin/python3 --pairs 500 --json startup.json

Pairs, because a machine drifts: both halves of a pair see the same machine, the median of their differences sees little
of the drift, and which half goes first alternates. Two cases: with the bytecode in place, as in a folder after
its first use, and without any, as in a read-only folder that nobody has compiled. The runtime files are copied for
this, so that neither case depends on what lies around in the folder itself. Only the first is a promise; the second is
measured to be known (`python -m compileall sitecustomize.py overlay` makes it the first).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from overlay.cli.bench.intervals import interval_of_median, median, quantile

REPOSITORY = Path(__file__).resolve().parents[1]
LIST_MODULES = "import sys; print(*sys.modules)"


@dataclass(frozen=True)
class Case:
    """One measurement; times in milliseconds."""

    name: str
    pairs: int
    without: float
    with_overlay: float
    added: float  # median of the differences within the pairs
    low: float  # 95 % bootstrap interval of that median
    high: float
    quartiles: tuple[float, float]  # of the differences
    promised: bool


def environments(folder: Path, *, write_bytecode: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Give the environment without the overlay and the one with it; they differ in PYTHONPATH alone."""
    stock = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VLLMOVERLAY"))}
    if not write_bytecode:
        stock["PYTHONDONTWRITEBYTECODE"] = "1"
    return stock, stock | {"PYTHONPATH": str(folder)}


def milliseconds(command: list[str], environment: Mapping[str, str]) -> float:
    """Run the command once. posix_spawn, because forking this process would cost more than what is to be measured."""
    start = time.perf_counter()
    process = os.posix_spawn(command[0], command, environment)
    _, status = os.waitpid(process, 0)
    elapsed = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return elapsed * 1000


def measure(name: str, python: str, folder: Path, pairs: int, *, write_bytecode: bool) -> Case:
    command = [python, "-c", "pass"]
    stock, overlaid = environments(folder, write_bytecode=write_bytecode)
    for environment in (stock, overlaid) * 2:
        milliseconds(command, environment)  # warms the page cache, and writes the bytecode where it may
    without, with_overlay = [], []
    for number in range(pairs):
        first, second = (stock, overlaid) if number % 2 else (overlaid, stock)
        times = milliseconds(command, first), milliseconds(command, second)
        without.append(times[0 if number % 2 else 1])
        with_overlay.append(times[1 if number % 2 else 0])
    differences = [more - less for more, less in zip(with_overlay, without, strict=True)]
    found = interval_of_median(differences)
    return Case(
        name=name,
        pairs=pairs,
        without=median(without),
        with_overlay=median(with_overlay),
        added=median(differences),
        low=found.low,
        high=found.high,
        quartiles=(quantile(differences, 0.25), quantile(differences, 0.75)),
        promised=write_bytecode,
    )


def copy_runtime(source: Path, target: Path) -> Path:
    """Copy what a container mounts, without any bytecode."""
    target.mkdir()
    shutil.copy(source / "sitecustomize.py", target)
    shutil.copytree(source / "overlay", target / "overlay", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return target


def added_modules(python: str, folder: Path) -> list[str]:
    stock, overlaid = environments(folder, write_bytecode=False)
    before, after = (
        subprocess.run(
            [python, "-c", LIST_MODULES], env=each, capture_output=True, text=True, check=True
        ).stdout.split()
        for each in (stock, overlaid)
    )
    return [name for name in after if name not in before]


def show(console: Console, python: str, cases: list[Case], modules: list[str], limit: float) -> None:
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    table = Table(title=f"python -c pass, {version}, ms", caption=f"adds {len(modules)} modules: {', '.join(modules)}")
    for heading in ("bytecode", "pairs", "without", "with", "added", "95 % interval", "quartiles", f"limit {limit:g}"):
        table.add_column(heading, justify="left" if heading == "bytecode" else "right")
    for case in cases:
        verdict = "not promised" if not case.promised else "kept" if case.added <= limit else "BROKEN"
        table.add_row(
            case.name,
            str(case.pairs),
            f"{case.without:.2f}",
            f"{case.with_overlay:.2f}",
            f"{case.added:.2f}",
            f"{case.low:.2f} to {case.high:.2f}",
            f"{case.quartiles[0]:.2f} to {case.quartiles[1]:.2f}",
            verdict,
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="What the overlay adds to the start of Python.")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to measure (default: this one)")
    parser.add_argument("--overlay", type=Path, default=REPOSITORY, help="the folder with sitecustomize.py")
    parser.add_argument("--pairs", type=int, default=200, help="runs with and without, each (default: 200)")
    parser.add_argument("--limit", type=float, default=2.0, help="ms; more than this fails (default: 2)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error("--pairs: at least 2, a spread needs more than one")

    with tempfile.TemporaryDirectory() as scratch:
        compiled = copy_runtime(options.overlay, Path(scratch) / "compiled")
        plain = copy_runtime(options.overlay, Path(scratch) / "plain")
        cases = [
            measure("in place", options.python, compiled, options.pairs, write_bytecode=True),
            measure("none", options.python, plain, options.pairs, write_bytecode=False),
        ]
        modules = added_modules(options.python, compiled)
    # Wide enough for the table where there is no terminal to ask, as in CI's log.
    show(Console(width=None if sys.stdout.isatty() else 140), options.python, cases, modules, options.limit)
    if options.json:
        report = {"python": options.python, "limit": options.limit, "modules": modules}
        options.json.write_text(json.dumps(report | {"cases": [asdict(case) for case in cases]}, indent=2) + "\n")
    return int(any(case.promised and case.added > options.limit for case in cases))


if __name__ == "__main__":
    sys.exit(main())
