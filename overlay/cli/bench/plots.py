"""Plots of a results file: ratio to stock with its interval. They need matplotlib."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from overlay.cli.bench import timeline_picture
from overlay.cli.bench.results import CONTROL, NEXT, UPSTREAM, arms_of, versions

#: By arm; OTHER for one that is no arm any more. To an arm without a colour matplotlib would give the overlay's.
OTHER = "tab:olive"
COLOURS = {
    "overlay": "tab:blue",
    "auto": "tab:purple",
    "dual": "tab:green",
    "serial": "tab:red",
    CONTROL: "tab:gray",
    UPSTREAM: "tab:orange",
    NEXT: "tab:brown",
}


def write(data: dict[str, Any], folder: Path) -> list[Path]:
    """`ratio.png` for decode step and time to first token, `concurrency.png` and `serving.png` for servers, `timeline-N.svg` for one
    layer's kernels by stream; what there are results for.

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
    titles = {"tpot": "time per output token", "ttft": "time to first token", "embedding": "time per embedding"}
    rows = (data.get("concurrency") or {}).get("rows") or []
    panels = [
        (_series([row for row in rows if row["metric"] == metric], "requests"), title, "clients")
        for metric, title in titles.items()
    ]
    if rows:
        written.append(_draw([panel for panel in panels if panel[0]], data, folder / "concurrency.png"))
    rows = (data.get("serving") or {}).get("rows") or []
    panels = [(_serving_series(rows, metric), title, "requests per second") for metric, title in titles.items()]
    if rows:
        written.append(_draw([panel for panel in panels if panel[0]], data, folder / "serving.png"))
    for row in data.get("timeline") or []:
        title = f"a layer and its MLP in a replayed decode step, N={row['requests']}\n{_title(data)}"
        written.append(timeline_picture.draw(row, folder / f"timeline-{row['requests']}.svg", title))
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
            axis.errorbar(places, ratios, yerr=errors, fmt="o-", capsize=3, label=arm, color=COLOURS.get(arm, OTHER))
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


def _title(data: dict[str, Any]) -> str:
    stock, known = data.get("pair", {}).get("stock", {}), versions(data)
    model = data.get("model")
    parts = [f"{model['name']}, {model.get('format', 'bf16')}, {model['layers']} layers"] if model else []
    parts += [f"{label} {known[name]}" for name, label in (("vllm", "vLLM"), ("torch", "torch")) if known[name]]
    parts.append(stock.get("device") or (data.get("host", {}).get("gpu") or "CPU").partition(",")[0])
    return ", ".join(parts)
