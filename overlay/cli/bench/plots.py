"""Plots of a results file: ratio to stock with its interval. They need matplotlib."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from overlay.cli.bench.results import arms_of
from overlay.cli.bench.setup import OVERLAY, STOCK

COLOURS = {"overlay": "tab:blue", "dual": "tab:green", "fused": "tab:orange", "serial": "tab:red", "auto": "tab:purple"}


def write(data: dict[str, Any], folder: Path) -> list[Path]:
    """`ratio.png` for decode step and time to first token, `timeline.png` for one layer's kernels by stream at the fewest requests,
    `serving.png` for servers; what there are results for.

    Raises ModuleNotFoundError where matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in data.get("decode") or []:
        groups.setdefault(row.get("group", ""), []).append(row)
    panels = [
        (_series(rows, "requests"), f"decode step{name and ', '}{name}", "running requests")
        for name, rows in groups.items()
    ]
    panels.append((_series(data.get("first_token") or [], "prompt"), "time to first token", "prompt tokens"))
    if any(series for series, _, _ in panels):
        written.append(_draw([panel for panel in panels if panel[0]], data, folder / "ratio.png"))
    timelines = [row for row in data.get("timeline") or [] if {STOCK, OVERLAY} <= row["arms"].keys()]
    if timelines:
        written.append(_draw_timeline(min(timelines, key=lambda row: row["requests"]), data, folder / "timeline.png"))
    rows = (data.get("serving") or {}).get("rows") or []
    panels = [
        (_serving_series(rows, metric), title, "requests per second")
        for metric, title in (("tpot", "time per output token"), ("ttft", "time to first token"))
    ]
    if rows:
        written.append(_draw([panel for panel in panels if panel[0]], data, folder / "serving.png"))
    return written


Points = list[tuple[float, dict[str, Any]]]


def _series(rows: list[dict[str, Any]], key: str) -> dict[str, Points]:
    """By arm: the places on the axis with their ratios."""
    found: dict[str, Points] = {}
    for row in rows:
        for arm, ratio in arms_of(row).items():
            found.setdefault(arm, []).append((row[key], ratio))
    return found


def _serving_series(rows: list[dict[str, Any]], metric: str) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for row in rows:
        if row["metric"] == metric:
            found.setdefault(row["arm"], []).append((row["rate"], row))
    return found


def _draw(panels: list[tuple[dict[str, Points], str, str]], data: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    # Two in a row: a page shows a wider picture so small that nobody can read it.
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 4.0 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (series, title, label) in zip(axes.flat, panels, strict=False):
        for arm, points in series.items():
            places = [place for place, _ in points]
            ratios = [found["ratio"] for _, found in points]
            errors = [
                [max(0.0, found["ratio"] - found["low"]) for _, found in points],
                [max(0.0, found["high"] - found["ratio"]) for _, found in points],
            ]
            axis.errorbar(places, ratios, yerr=errors, fmt="o-", capsize=3, label=arm, color=COLOURS.get(arm))
        every = sorted({place for points in series.values() for place, _ in points})
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if _crowded(every) else {}
        axis.set_xticks(every, [f"{place:g}" for place in every], **slanted)
        axis.minorticks_off()
        axis.set(title=title, xlabel=label, ylabel="ratio to stock (below 1: faster)")
        axis.legend()
    figure.suptitle(_title(data))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _crowded(places: list[float]) -> bool:
    """Whether two labels side by side on a logarithmic axis would meet. A label of four digits takes a sixteenth of the axis."""
    steps = [math.log2(after / before) for before, after in itertools.pairwise(places)]
    return bool(steps) and min(steps) < sum(steps) / 12


def _draw_timeline(row: dict[str, Any], data: dict[str, Any], path: Path) -> Path:
    """Stock above, overlay below, a bar for each kernel in the lane of its stream; the overlay's side work in colour in both."""
    from matplotlib import patches, pyplot

    side = {one["name"] for one in row["arms"][OVERLAY]["against_stock"]["side"]}
    long = max(_ends(row["arms"][arm]["kernels"]) for arm in (STOCK, OVERLAY))
    figure, axes = pyplot.subplots(2, 1, figsize=(8.5, 3.4), sharex=True)
    for axis, arm in zip(axes, (STOCK, OVERLAY), strict=True):
        lanes = sorted({kernel["stream"] for kernel in row["arms"][arm]["kernels"]})
        for kernel in row["arms"][arm]["kernels"]:
            moved = kernel["name"] in side
            place = (kernel["start"], kernel["duration"])
            colour = "tab:orange" if moved else "lightsteelblue"
            axis.broken_barh([place], (lanes.index(kernel["stream"]) - 0.4, 0.8), color=colour, edgecolor="white")
        length = row["arms"][arm]["segment"]["median"]
        axis.axvline(length, color="black", linewidth=0.8)
        axis.set_yticks(range(len(lanes)), [f"stream {number}" for number, _ in enumerate(lanes)])
        axis.set(xlim=(0, long * 1.02), ylim=(len(lanes) - 0.4, -0.6))
        axis.set_title(f"{arm}: {length:.1f} µs", loc="left", fontsize=10)
    axes[-1].set_xlabel("µs")
    axes[0].legend(
        handles=[
            patches.Patch(color="tab:orange", label="what the overlay runs on a stream of its own"),
            patches.Patch(color="lightsteelblue", label="every other kernel"),
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    requests = row["requests"]
    figure.suptitle(f"One layer, {requests} running request{'s' * (requests > 1)}: {_title(data)}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _ends(kernels: list[dict[str, Any]]) -> float:
    return max(float(kernel["start"] + kernel["duration"]) for kernel in kernels)


def _title(data: dict[str, Any]) -> str:
    stock = data.get("pair", {}).get("stock", {})
    model = data.get("model")
    what = f"{model['name']}, {model['layers']} layers, " if model else ""
    where = stock.get("device") or (data.get("host", {}).get("gpu") or "CPU").partition(",")[0]
    return f"{what}vLLM {stock.get('vllm')}, torch {stock.get('torch')}, {where}"
