#!/usr/bin/env python3
"""What the end of a chunk of Python frames costs a step, and whether room for the frames takes that away.

    python3 -m benchmarks.gpu.frame_stack --layers 24 --work FOLDER --out FOLDER

Stock and overlay alive at once, as in `python -m overlay bench`; in each the time to first token above 0 to 110 further
frames (they move the ends of the chunks across a step's calls), as it comes and under `with_room`, in turn. What differs
within one process is the same graph, the same kernels and the same code. See docs/frame-stack.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from overlay.cli import output
from overlay.cli.bench import command, engines, report
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import STOCK, numbers

COMMANDS = Path(__file__).resolve().with_name("frame_stack_worker.py")
#: Of `below`, about 130 bytes each: most of a chunk of 16 KiB.
FRAMES = tuple(range(0, 120, 10))
KINDS = AS_IT_COMES, WITH_ROOM = "as it comes", "with room"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3.5-35B-A3B")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prompts", type=numbers, default=(8, 600))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--start-together", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=560.0)
    return parser.parse_args()


def measure(alive: engines.Engines, prompts: tuple[int, ...], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """One row per prompt, depth, kind and arm: the medians of its rounds, in seconds and pages."""

    def ask(turn: int, prompt: int, frames: int, kind: str, seed: int) -> dict[str, dict[str, Any]]:
        asked = {"room": kind == WITH_ROOM, "length": prompt, "repetitions": 2, "seed": engines.SEED + seed}
        return alive.all("first_token_above", turn, frames=frames, **asked)

    progress.phase("frames", rounds * len(prompts) * len(FRAMES))
    for prompt, frames, kind in itertools.product(prompts, FRAMES[:2], KINDS):
        ask(0, prompt, frames, kind, -1000)  # warms up
    samples: dict[tuple[int, int, str, str], list[tuple[float, float]]] = {}
    for turn, prompt, frames in itertools.product(range(rounds), prompts, FRAMES):
        progress.step(f"prompt {prompt}, {frames} frames, round {turn + 1} of {rounds}")
        for kind in KINDS if turn % 2 else KINDS[::-1]:
            for arm, answer in ask(turn, prompt, frames, kind, 1000 * turn).items():
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
    columns = ("prompt", "arm", "frames", "ms, median", "least", "most", "pages mapped, median", "least", "most")
    shown = report.table("time to first token over the depths", *columns)
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["prompt"], row["arm"], row["kind"]), []).append(row)
    for (prompt, arm, kind), group in sorted(groups.items()):
        times, pages = ([row[key] for row in group] for key in ("seconds", "pages"))
        cells = [report.milliseconds(value) for value in (statistics.median(times), min(times), max(times))]
        cells += [f"{value:.0f}" for value in (statistics.median(pages), min(pages), max(pages))]
        shown.add_row(str(prompt), arm, kind, *cells)
    return shown


def tables(data: dict[str, Any]) -> list[Any]:
    """What this file adds to the head and the notes of every report."""
    return [
        Text(report.head(data)),
        *([summary(rows)] if (rows := data.get("frame_stack")) else []),
        *report.notes(data),
    ]


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
    options = command.Options(
        model=given.model,
        layers=given.layers,
        prompts=given.prompts,
        variables=tuple(given.env),
        together=given.start_together,
        work=given.work,
        out=given.out,
        budget=given.budget,
    )
    plan = command.settle(options)
    setup = command.setup_of(plan)

    def run(results: Results, progress: Progress) -> None:
        alive = engines.Engines(setup, results, progress, COMMANDS)

        def frames() -> None:
            results.put("frame_stack", value=measure(alive, given.prompts, given.rounds, progress))
            plot(results.data["frame_stack"], setup.out / "frame-stack.png")

        arguments = command.engine_arguments(plan, setup, plan.model.folder(setup.work))
        alive.run(arguments, options.together, engines.SEED, {"frames": frames})

    return command.conduct(setup, output.console(), run, "frame-stack", tables)


if __name__ == "__main__":
    raise SystemExit(main())
