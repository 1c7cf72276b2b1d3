"""Kernel by kernel: one layer with a pair and its MLP in a replayed decode step, and what of the side work is hidden.

`results.json` gets `timeline`, all times in microseconds::

    [{"requests": 8, "arms": {
        "stock": {"segment": {"median", "low", "high", "alike", "all"}, "kernels": [{"name", "stream", "start", "duration"}]},
        "overlay": {… the same …, "against_stock": {"ratio", "saved", "side": [{"name", "duration", "overlap", "stock"}],
                    "side_duration", "overlap", "hideable", "hidden_share", "renamed": [{"stock", "arm", "difference"}],
                    "only_stock": [name], "only_arm": [name], "like", "retuned": [{"name", "stock", "arm"}], "like_tuned"}}}}]

A **segment** goes from the first kernel after the two projections (BOUNDARIES) to the next layer's. Those of attention layers and of the end of a
step differ in their kernels: only segments with the most common kernels count (`alike` of `all`), by each stream's order.
`low` and `high` are the 5th and 95th percentile, everything else medians over them. `stream` is "main" for the stream of the
segment's first kernel, "side 1" and so on for others: vLLM itself has routed experts beside a shared one. A replayed graph may go on
with either branch of a fork on the stream before it; of the arm's own fork, what stock runs last is the side.

Against stock:

- `side`: the kernels of the arm's own fork, from the first one that runs beside a kernel and in stock beside none; see `fork`. `overlap` is
  how much of its duration some other kernel runs at the same time. `stock` is the same kernel in stock's segment, `duration` and
  `gap` (idle time before it); where stock has several of that name, the last ones: the side projection is the last GEMM before the boundary.
- `hideable`: the sum of these durations and gaps, and of the kernels that only stock has where the side has some that stock has not: a
  copy that Inductor had fused with another. No more than the shorter branch can be hidden: if the kernels beside the side take less in
  stock, `hideable` is their time. `hidden_share`: `(stock's segment - the arm's, like_tuned) / hideable`. None where there is no side kernel,
  or one has no counterpart and stock has nothing else.
- `only_stock`, `only_arm`: names that one of them has more often, those of Triton's kernels without their numbers. `renamed`: kernels of the
  main stream with another name in the arm: Inductor chose otherwise. `like`: the ratio with stock's durations for these. `retuned`: Triton
  kernels of the same name that nothing overlaps and whose durations differ by more than RETUNED: another block size. `like_tuned`: the
  ratio with stock's durations for both.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from overlay.cli.bench.engines import RESERVE_SECONDS, Engines
from overlay.cli.bench.intervals import median, quantile
from overlay.cli.bench.setup import STOCK

#: What begins a segment, the first kernel after both projections: a part of its name in a GDN layer, and in DeepSeek-V3.2's.
BOUNDARIES = ("causal_conv1d", "fused_norm_rope")
MAIN = "main"
#: How the names of Inductor's kernels begin: reductions that keep a row in registers, other ones, and the rest.
TRITON_KINDS = ("triton_per_", "triton_red_", "triton_poi_")
#: Microseconds that kernels of two streams have to run together to count as beside each other.
TOUCH = 0.2
STEPS, ROUNDS = 6, 2
SEED = 20251120 + 300_000
#: Microseconds, and the part of stock's duration, by which a kernel has to differ to count as another choice.
RETUNED = (0.3, 0.1)


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill; microseconds."""

    name: str
    stream: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration

    def as_dict(self) -> dict[str, Any]:
        times = {"start": round(self.start, 3), "duration": round(self.duration, 3)}
        return {"name": self.name, "stream": self.stream, **times}


@dataclass(frozen=True)
class Layer:
    """The medians over like segments: their kernels by start, and their lengths."""

    kernels: tuple[Kernel, ...]
    lengths: tuple[float, ...]
    all: int

    @property
    def median(self) -> float:
        return median(self.lengths)

    def as_dict(self) -> dict[str, Any]:
        segment = {
            "median": round(self.median, 3),
            "low": round(quantile(self.lengths, 0.05), 3),
            "high": round(quantile(self.lengths, 0.95), 3),
            "alike": len(self.lengths),
            "all": self.all,
        }
        return {"segment": segment, "kernels": [kernel.as_dict() for kernel in self.kernels]}


# ---------------------------------------------------------------- one arm


def read(answer: Mapping[str, Any]) -> list[Kernel]:
    """A worker's answer to `kernels`."""
    names = answer["names"]
    return [Kernel(names[name], str(stream), start, duration) for name, stream, start, duration in answer["kernels"]]


def segments(kernels: Sequence[Kernel]) -> list[tuple[list[Kernel], float]]:
    """From each boundary to the next: its kernels, streams named and starts counted from the boundary, and its length."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    bounds = [index for index, kernel in enumerate(ordered) if any(part in kernel.name for part in BOUNDARIES)]
    found = []
    for first, last in itertools.pairwise(bounds):
        begin = ordered[first].start
        found.append((_named(ordered[first:last], begin), ordered[last].start - begin))
    return found


def _named(kernels: Sequence[Kernel], begin: float) -> list[Kernel]:
    names = {kernels[0].stream: MAIN}
    for kernel in kernels:
        names.setdefault(kernel.stream, f"side {len(names)}")
    return [Kernel(kernel.name, names[kernel.stream], kernel.start - begin, kernel.duration) for kernel in kernels]


def typical(traces: Iterable[Sequence[Kernel]]) -> Layer | None:
    """The most common kind of segment in some traces of the same thing; None where there is no segment."""
    found = [segment for trace in traces for segment in segments(trace)]
    if not found:
        return None
    kinds = Counter(_kind(kernels) for kernels, _ in found)
    # Where two kinds are equally common, the one with fewer kernels: a layer, not a layer and an attention layer.
    kind = max(kinds, key=lambda one: (kinds[one], -sum(len(names) for _, names in one)))
    alike = [(_by_stream(kernels), length) for kernels, length in found if _kind(kernels) == kind]
    layer = [
        Kernel(
            same[0].name,
            same[0].stream,
            median([kernel.start for kernel in same]),
            median([kernel.duration for kernel in same]),
        )
        for same in zip(*(kernels for kernels, _ in alike), strict=True)
    ]
    ordered = tuple(sorted(layer, key=lambda kernel: kernel.start))
    return Layer(ordered, tuple(length for _, length in alike), len(found))


def _by_stream(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The order that does not depend on which of two streams was a little sooner."""
    return sorted(kernels, key=lambda kernel: (kernel.stream, kernel.start))


def _kind(kernels: Sequence[Kernel]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    streams: dict[str, list[str]] = {}
    for kernel in _by_stream(kernels):
        streams.setdefault(kernel.stream, []).append(kernel.name)
    return tuple((stream, tuple(names)) for stream, names in streams.items())


# ---------------------------------------------------------------- two arms


def overlap(kernel: Kernel, others: Iterable[Kernel]) -> float:
    """How long some of the others run at the same time as a kernel."""
    total, reached = 0.0, kernel.start
    for other in sorted(others, key=lambda one: one.start):
        begin, end = max(other.start, reached), min(other.end, kernel.end)
        if end > begin:
            total, reached = total + end - begin, end
    return total


def gap_before(kernel: Kernel, kernels: Iterable[Kernel]) -> float:
    """Idle time between the end of all earlier kernels and this one's start."""
    ends = [other.end for other in kernels if other.start < kernel.start]
    return max(0.0, kernel.start - max(ends)) if ends else 0.0


def counterparts(side: Sequence[Kernel], stock: Sequence[Kernel]) -> list[Kernel | None]:
    """For each side kernel the one of the same name in stock's segment: of several the last ones, in order."""
    wanted = Counter(kernel.name for kernel in side)
    same = {name: [kernel for kernel in stock if kernel.name == name] for name in wanted}
    left = {name: found[-wanted[name] :] if len(found) >= wanted[name] else [] for name, found in same.items()}
    return [left[kernel.name].pop(0) if left[kernel.name] else None for kernel in side]


def _same(kernels: Sequence[Kernel], stock: Sequence[Kernel]) -> dict[int, Kernel]:
    """Stock's kernel for each kernel, by `id`: the first of a name for the first, and so on."""
    left = {name: iter([kernel for kernel in stock if kernel.name == name]) for name in {one.name for one in kernels}}
    found = {id(kernel): next(left[kernel.name], None) for kernel in kernels}
    return {key: other for key, other in found.items() if other is not None}


def _concurrent(kernel: Kernel, kernels: Sequence[Kernel]) -> bool:
    return overlap(kernel, (other for other in kernels if other.stream != kernel.stream)) > TOUCH


def fork(stock: Layer, arm: Layer) -> list[Kernel]:
    """The side kernels of the arm's own fork; none where there is no fork that stock has not.

    A kernel is of the fork where it runs beside one of another stream, and in stock beside none. Of two streams the side is the one whose
    longest kernel is later in stock, and where that does not tell them apart, the one with less to do. All that follows on that stream is
    the side's as well: the segment ends with the join. Where stock, too, runs something beside the whole segment, no fork is found.
    """
    same = _same(arm.kernels, stock.kernels)
    own = [
        kernel
        for kernel in arm.kernels
        if _concurrent(kernel, arm.kernels)
        and not (id(kernel) in same and _concurrent(same[id(kernel)], stock.kernels))
    ]
    branches: dict[str, list[Kernel]] = {}
    for kernel in own:
        branches.setdefault(kernel.stream, []).append(kernel)
    if len(branches) < 2:
        return []
    order = {kernel.name: index for index, kernel in enumerate(stock.kernels)}

    def place(branch: Iterable[Kernel]) -> int:
        return order.get(max(branch, key=lambda one: one.duration).name, -1)

    # Two kernels that touch by chance make a branch as well; the fork's are the two with the most to do.
    more, less = sorted(branches.values(), key=_work, reverse=True)[:2]
    side = more if place(more) > place(less) >= 0 else less
    return [kernel for kernel in arm.kernels if kernel.stream == side[0].stream and kernel.start >= side[0].start]


def _work(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.duration for kernel in kernels)


def with_side(arm: Layer, side: Sequence[Kernel]) -> tuple[Layer, list[Kernel]]:
    """The layer with these kernels on a stream of their own, and what runs beside them on the main one; and these kernels in it."""
    if not side:
        return arm, []
    begin = side[0].start
    beside = {kernel.stream for kernel in arm.kernels if kernel.stream != side[0].stream and overlap(kernel, side)}
    name = side[0].stream if side[0].stream != MAIN else min(beside)
    ours = {id(kernel): replace(kernel, stream=name) for kernel in side}

    def moved(kernel: Kernel) -> Kernel:
        main = kernel.stream in beside and kernel.end > begin
        return ours.get(id(kernel)) or (replace(kernel, stream=MAIN) if main else kernel)

    return replace(arm, kernels=tuple(moved(kernel) for kernel in arm.kernels)), list(ours.values())


def against(stock: Layer, arm: Layer, side: Sequence[Kernel]) -> dict[str, Any]:
    """The numbers of `against_stock`; the module says what they are. `side` has those kernels of the arm that `fork` has found."""
    others = [kernel for kernel in arm.kernels if kernel not in side]
    found = counterparts(side, stock.kernels)
    there = [kernel for kernel in found if kernel is not None]
    pairs = _paired(
        [kernel for kernel in stock.kernels if kernel.stream == MAIN and kernel not in there],
        [kernel for kernel in arm.kernels if kernel.stream == MAIN],
    )
    renamed = [pair for pair in pairs if plain(pair[0].name) != plain(pair[1].name)]
    retuned = [pair for pair in pairs if _is_retuned(*pair, side)]
    gone = _gone(stock.kernels, arm.kernels, [old for old, _ in renamed]) if None in found else []
    hideable = _alone([*gone, *there], stock)
    known = hideable > 0 and (None not in found or bool(gone))
    beside = counterparts([kernel for kernel in others if overlap(kernel, side)], stock.kernels)
    if any(beside):  # no more than the shorter branch can be hidden
        hideable = min(hideable, _alone(filter(None, beside), stock))
    rows = [
        {
            "name": kernel.name,
            "duration": round(kernel.duration, 3),
            "overlap": round(overlap(kernel, others), 3),
            "stock": other
            and {"duration": round(other.duration, 3), "gap": round(gap_before(other, stock.kernels), 3)},
        }
        for kernel, other in zip(side, found, strict=True)
    ]
    like = arm.median + _difference(renamed)
    tuned = like + _difference(retuned)
    return {
        "ratio": round(arm.median / stock.median, 4),
        "saved": round(stock.median - arm.median, 3),
        "side": rows,
        "side_duration": round(_work(side), 3),
        "overlap": round(sum(overlap(kernel, others) for kernel in side), 3),
        "hideable": round(hideable, 3) if known else None,
        "hidden_share": round((stock.median - tuned) / hideable, 3) if known else None,
        "only_stock": _only(stock.kernels, arm.kernels),
        "only_arm": _only(arm.kernels, stock.kernels),
        "renamed": [
            {"stock": old.name, "arm": new.name, "difference": _difference([(old, new)])} for old, new in renamed
        ],
        "like": round(like / stock.median, 4),
        "retuned": [{"name": old.name, "stock": old.duration, "arm": new.duration} for old, new in retuned],
        "like_tuned": round(tuned / stock.median, 4),
    }


def _alone(kernels: Iterable[Kernel], stock: Layer) -> float:
    """What kernels of stock's add to its segment, idle time before them included."""
    return sum(kernel.duration + gap_before(kernel, stock.kernels) for kernel in kernels)


def _gone(stock: Sequence[Kernel], arm: Sequence[Kernel], renamed: Sequence[Kernel]) -> list[Kernel]:
    """Stock's kernels that the arm has not, under another name neither: of several of a name the last ones."""
    left = [kernel for kernel in stock if kernel not in renamed]
    names = Counter(_only(left, arm))
    same = {name: [kernel for kernel in left if plain(kernel.name) == name][-count:] for name, count in names.items()}
    return [kernel for kernels in same.values() for kernel in kernels]


def _only(kernels: Iterable[Kernel], others: Iterable[Kernel]) -> list[str]:
    """Names that are more often among the first."""
    first, second = (Counter(plain(one.name) for one in some) for some in (kernels, others))
    return sorted((first - second).elements())


def plain(name: str) -> str:
    """A Triton kernel's name without its number, which counts the kernels of a graph."""
    return re.sub(r"_\d+$", "", name) if name.startswith("triton_") else name


def _difference(pairs: Iterable[tuple[Kernel, Kernel]]) -> float:
    """What stock's durations add to a segment in place of the arm's."""
    return round(sum(old.duration - new.duration for old, new in pairs), 3)


def _is_retuned(old: Kernel, new: Kernel, side: Sequence[Kernel]) -> bool:
    """Whether a Triton kernel takes another time in both arms, and not because something runs beside it."""
    apart = abs(old.duration - new.duration)
    own = plain(old.name) == plain(new.name) and old.name.startswith("triton_") and not overlap(new, side)
    return own and apart > RETUNED[0] and apart > RETUNED[1] * old.duration


def _paired(old: Sequence[Kernel], new: Sequence[Kernel]) -> list[tuple[Kernel, Kernel]]:
    """Kernels that take each other's place in two sequences.

    Kernels of the same name do. Between two such, the others do if both sequences have as many there. If not, those of one kind of Triton's
    (`triton_per_…`, a reduction) do, of which both have as many.
    """
    matcher = difflib.SequenceMatcher(None, [plain(one.name) for one in old], [plain(one.name) for one in new], False)
    pairs: list[tuple[Kernel, Kernel]] = []
    for _, first, end, start, stop in matcher.get_opcodes():
        if end - first == stop - start:
            pairs += zip(old[first:end], new[start:stop], strict=True)
            continue
        for kind in TRITON_KINDS:
            both = [[one for one in some if one.name.startswith(kind)] for some in (old[first:end], new[start:stop])]
            if len(both[0]) == len(both[1]):
                pairs += zip(*both, strict=True)
    return pairs


# ---------------------------------------------------------------- the phase


def row(requests: int, traces: Mapping[str, Sequence[Sequence[Kernel]]]) -> dict[str, Any]:
    """One row of the results from the arms' traces of the same number of requests."""
    layers = {arm: typical(found) for arm, found in traces.items()}
    stock = layers.get(STOCK)
    arms = {}
    for arm, layer in layers.items():
        if layer is None:
            continue
        if arm == STOCK or stock is None:
            arms[arm] = layer.as_dict()
        else:
            seen, side = with_side(layer, fork(stock, layer))
            arms[arm] = {**seen.as_dict(), "against_stock": against(stock, seen, side)}
    return {"requests": requests, "arms": arms}


def measure(alive: Engines, batches: Sequence[int]) -> None:
    """The phase: traces of every arm in turn, ROUNDS times STEPS decode steps of every number of requests."""
    alive.progress.phase("timeline", len(batches))
    for count in batches:
        if alive.setup.remaining() < RESERVE_SECONDS:
            alive.results.unfinished(f"timeline: out of time before N={count}")
            break
        alive.progress.step(f"N={count}")
        traces: dict[str, list[list[Kernel]]] = {arm: [] for arm in alive.workers}
        for turn in range(ROUNDS):
            for arm, answer in alive.all("kernels", turn, requests=count, steps=STEPS, seed=SEED).items():
                traces[arm].append(read(answer))
        found = row(count, traces)
        missing = [arm for arm in traces if arm not in found["arms"]]
        if missing:
            alive.results.unfinished(
                f"timeline, N={count}: no {' or '.join(BOUNDARIES)} kernels seen in {', '.join(missing)}"
            )
        if len(missing) == len(traces):
            break
        alive.results.put("timeline", value=[*alive.results.data.get("timeline", []), found])
