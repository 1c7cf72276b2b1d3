#!/usr/bin/env python3
"""What the end of a chunk of Python frames costs a step, and whether room for the frames takes that away.

    cd benchmarks && python3 -m gpu.frame_stack --layers 24 --work FOLDER --out FOLDER

Stock and overlay alive at once, as in `python -m overlay bench`; in each the time to first token above 0 to 110 further
frames (they move the ends of the chunks across a step's calls), as it comes and under `with_room`, in turn. What differs
within one process is the same graph, the same kernels and the same code. See overlay/frame_stack.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from gpu import REPOSITORY

sys.path.append(str(REPOSITORY))

from rich.console import Console
from rich.table import Table

from overlay.cli import output
from overlay.cli.bench import command, engines
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import STOCK, numbers
from overlay.cli.bench.workers import Worker

SCRIPT = Path(__file__).resolve().with_name("frame_stack_worker.py")
#: Of `below`, about 130 bytes each: most of a chunk of 16 KiB.
FRAMES = tuple(range(0, 120, 10))
KINDS = ("as it comes", "with room")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3.5-35B-A3B")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prompts", type=numbers, default=(8, 600))
    parser.add_argument(
        "--bench-prompts", type=numbers, help="prompts of a bench that is to find this run's compile cache"
    )
    parser.add_argument("--batches", type=numbers, help="likewise")
    parser.add_argument("--capture-sizes", type=numbers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--start-together", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=560.0)
    return parser.parse_args()


def measure(alive: engines.Engines, prompts: tuple[int, ...], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """One row per prompt, depth, kind and arm: the medians of its rounds, in seconds and pages."""
    samples: dict[tuple[int, int, str, str], list[tuple[float, float]]] = {}
    progress.phase("frames", rounds * len(prompts) * len(FRAMES))
    for turn in range(-1, rounds):  # the first one warms up
        for prompt in prompts:
            for frames in FRAMES if turn >= 0 else FRAMES[:2]:
                progress.step(f"prompt {prompt}, {frames} frames, round {turn + 1} of {rounds}")
                for kind in KINDS if turn % 2 else KINDS[::-1]:
                    asked = {"length": prompt, "repetitions": 2, "seed": engines.SEED + 1000 * turn}
                    room = kind == KINDS[1]
                    found = alive.all("first_token_above", max(turn, 0), frames=frames, room=room, **asked)
                    for arm, answer in found.items() if turn >= 0 else ():
                        sample = statistics.median(answer["seconds"]), answer["pages"]
                        samples.setdefault((prompt, frames, kind, arm), []).append(sample)
    return [
        {
            "prompt": prompt,
            "frames": frames,
            "kind": kind,
            "arm": arm,
            "seconds": statistics.median(seconds for seconds, _ in values),
            "pages": statistics.median(pages for _, pages in values),
            "samples": values,
        }
        for (prompt, frames, kind, arm), values in samples.items()
    ]


def summary(rows: list[dict[str, Any]]) -> Table:
    """Per prompt, arm and kind: the range over the depths."""
    table = Table("prompt", "arm", "frames", "ms, median", "least", "most", "pages mapped, median", "least", "most")
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["prompt"], row["arm"], row["kind"]), []).append(row)
    for (prompt, arm, kind), group in sorted(groups.items()):
        times, pages = ([row[key] for row in group] for key in ("seconds", "pages"))
        values = [1e3 * statistics.median(times), 1e3 * min(times), 1e3 * max(times)]
        counts = [statistics.median(pages), min(pages), max(pages)]
        table.add_row(str(prompt), arm, kind, *(f"{v:.1f}" for v in values), *(f"{c:.0f}" for c in counts))
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Per prompt: what a step takes as it comes, to the same process with room, over the pages that it maps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {(row["prompt"], row["arm"], row["frames"], row["kind"]): row for row in rows}
    prompts = sorted({row["prompt"] for row in rows})
    figure, panels = pyplot.subplots(1, len(prompts), figsize=(6 * len(prompts), 4), squeeze=False)
    for panel, prompt in zip(panels[0], prompts, strict=True):
        for arm in sorted({row["arm"] for row in rows}, reverse=True):
            pairs = [tuple(found[prompt, arm, frames, kind] for kind in KINDS) for frames in FRAMES]
            ratios = [as_it_comes["seconds"] / with_room["seconds"] for as_it_comes, with_room in pairs]
            colour = "black" if arm == STOCK else "tab:blue"
            panel.plot([row["pages"] for row, _ in pairs], ratios, "o", color=colour, label=arm)
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set(title=f"prompt of {prompt} tokens", xlabel="pages mapped until the first token")
    panels[0][0].set_ylabel("time to first token: as it comes / with room")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    given = parse()
    console = output.console()
    options = command.Options(
        model=given.model,
        layers=given.layers,
        batches=given.batches,
        prompts=given.bench_prompts or given.prompts,
        capture_sizes=given.capture_sizes,
        variables=tuple(given.env),
        together=given.start_together,
        work=given.work,
        out=given.out,
        budget=given.budget,
    )
    plan = command.settle(options)
    setup = command.setup_of(plan)
    engines.Worker = functools.partial(Worker, script=SCRIPT)
    setup.work.mkdir(parents=True, exist_ok=True)
    with Progress(console) as progress:
        results = Results(setup.out / "frame-stack.json", progress.problem)
        alive = engines.Engines(setup, results, progress)
        try:
            alive.start(command.engine_arguments(plan, setup, plan.model.folder(setup.work)), options.together)
            rows = measure(alive, given.prompts, given.rounds, progress)
        finally:
            alive.close()
    results.put("frame_stack", value=rows)
    console.print(summary(rows))
    with (setup.out / "report.txt").open("w") as file:
        file.write(json.dumps(results.data["host"]) + "\n")
        Console(file=file, width=output.PIPE_COLUMNS).print(summary(rows))
    plot(rows, setup.out / "frame-stack.png")
    return int(bool(results.data["problems"]))


if __name__ == "__main__":
    raise SystemExit(main())
