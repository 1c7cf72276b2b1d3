"""A picture of one layer of a replayed decode step: every arm's kernels by stream, stock first, all on one axis of time.

A bar is a kernel. Its number stands above it, and the key beside the panel has the name of each number. The arm's side work and what
it is in stock have a colour of their own. Numbers that would overlap stand on different levels. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overlay.cli.bench.setup import STOCK
from overlay.cli.bench.timeline import Kernel, Layer, counterparts, fork

SIDE, OTHER = "tab:orange", "lightsteelblue"
WIDTH, KEY_WIDTH = 11.0, 4.5  #: inches of a panel and of its key
LEVEL, BAR, LINE = 0.14, 0.26, 0.125  #: inches of a level of numbers, of a bar, and of a line of the key
NUMBER_SIZE, KEY_SIZE = 6, 6.5  #: points
#: Inches that a digit takes at NUMBER_SIZE, and between two numbers.
DIGIT, GAP = 0.062, 0.03


def short(name: str, letters: int = 46) -> str:
    """What a person calls a kernel: without its arguments and templates; CUTLASS kernels by what they are instances of."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    inner = name.partition("device_kernel<")[2]
    name = (inner or name).partition("<")[0].partition("(")[0]
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def hidden(against: Mapping[str, Any]) -> str:
    """How much of what can be hidden is hidden, in words; empty where there is nothing to say."""
    if against.get("hidden_share") is None:
        return ""
    hideable, share = against["hideable"], against["hidden_share"]
    saved = hideable * share
    if not 0.0 <= share <= 1.0:  # something else differs as well
        return f"takes {abs(saved):.1f} µs {'less' if saved > 0 else 'more'} than stock, where {hideable:.1f} µs can be hidden"
    return f"hides {saved:.1f} µs of the {hideable:.1f} µs that can be hidden ({share * 100:.0f} %)"


def levels(places: Sequence[tuple[float, int]], inches_per_microsecond: float) -> list[int]:
    """For numbers centred at these times, of so many digits, the lowest level on which each touches none before it."""
    ends: list[float] = []
    found = []
    for middle, digits in places:
        half = digits * DIGIT / 2
        begin = middle * inches_per_microsecond - half
        level = next((index for index, end in enumerate(ends) if end + GAP <= begin), len(ends))
        ends[level : level + 1] = [begin + 2 * half]
        found.append(level)
    return found


def draw(row: Mapping[str, Any], path: Path, title: str = "") -> Path:
    """Draw a row of `timeline` into a file, by its ending SVG or PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = sorted(row["arms"], key=lambda arm: arm != STOCK)
    end = max(one["start"] + one["duration"] for arm in arms for one in row["arms"][arm]["kernels"])
    scale = WIDTH / end
    side = _side_work(row)
    lanes = {arm: _lanes(row["arms"][arm]["kernels"], scale) for arm in arms}
    heights = [
        max(sum(lane["height"] for lane in lanes[arm].values()) + 0.5, len(row["arms"][arm]["kernels"]) * LINE + 0.4)
        for arm in arms
    ]
    figure, axes = pyplot.subplots(
        len(arms),
        2,
        figsize=(WIDTH + KEY_WIDTH + 1.2, sum(heights) + 0.9),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [WIDTH, KEY_WIDTH], "height_ratios": heights},
    )
    for (axis, key), arm, height in zip(axes, arms, heights, strict=True):
        found = row["arms"][arm]
        words = hidden(found.get("against_stock", {}))
        axis.set_title(
            f"{arm}: {found['segment']['median']:.1f} µs{', ' if words else ''}{words}", loc="left", fontsize=9
        )
        axis.set(xlim=(0, end), ylim=(0, height))
        middles = []
        top = height - 0.1
        for name, lane in lanes[arm].items():
            base = top - lane["height"]
            for number, kernel, level in lane["bars"]:
                colour = SIDE if Kernel(**kernel) in side.get(arm, ()) else OTHER
                axis.broken_barh(
                    [(kernel["start"], kernel["duration"])],
                    (base, BAR),
                    facecolor=colour,
                    edgecolor="grey",
                    linewidth=0.3,
                )
                middle = kernel["start"] + kernel["duration"] / 2
                axis.text(
                    middle,
                    base + BAR + 0.02 + level * LEVEL,
                    str(number),
                    ha="center",
                    va="bottom",
                    fontsize=NUMBER_SIZE,
                )
            middles.append((base + BAR / 2, name))
            top = base
        axis.set_yticks([place for place, _ in middles], [name for _, name in middles], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        key.set(xlim=(0, 1), ylim=(0, height))
        key.axis("off")
        for index, kernel in enumerate(found["kernels"]):
            text = f"{index + 1:>3} {kernel['duration']:6.2f} µs  {short(kernel['name'])}"
            key.text(0, height - 0.1 - index * LINE, text, va="top", fontsize=KEY_SIZE, family="monospace")
    axes[-1][0].set_xlabel("µs since the layer's convolution")
    figure.suptitle(title or f"a layer and its MLP in a replayed decode step, N={row['requests']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _lanes(kernels: Sequence[Mapping[str, Any]], scale: float) -> dict[str, dict[str, Any]]:
    """By stream, the main one first: its kernels with their numbers and levels, and the inches that it takes."""
    streams: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, kernel in enumerate(kernels, 1):
        streams.setdefault(kernel["stream"], []).append((number, kernel))
    found = {}
    for stream in sorted(streams):  # "main" comes before "side 1"
        numbered = sorted(streams[stream], key=lambda one: one[1]["start"] + one[1]["duration"] / 2)
        places = [(one["start"] + one["duration"] / 2, len(str(number))) for number, one in numbered]
        chosen = levels(places, scale)
        bars = [(number, one, level) for (number, one), level in zip(numbered, chosen, strict=True)]
        found[stream] = {"bars": bars, "height": BAR + (max(chosen) + 1) * LEVEL + 0.12}
    return found


def _side_work(row: Mapping[str, Any]) -> dict[str, list[Kernel]]:
    """By arm the kernels of its side work, and in stock those that they are there."""
    layers = {arm: Layer(tuple(Kernel(**one) for one in row["arms"][arm]["kernels"]), (), 0) for arm in row["arms"]}
    stock = layers.pop(STOCK, None)
    if stock is None:
        return {}
    found = {arm: fork(stock, layer) for arm, layer in layers.items()}
    same = [one for side in found.values() for one in counterparts(side, stock.kernels) if one is not None]
    return {**found, STOCK: same}
