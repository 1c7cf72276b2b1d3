"""What a soak found, what of it is a fault, and the table of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from devtools.soak import memory
from devtools.soak.load import Margins, Tally, Tokens

if TYPE_CHECKING:
    from rich.table import Table

    from overlay.report.journal_reader import Journal

STOCK, OVERLAY = "stock", "overlay"


@dataclass(frozen=True)
class Check:
    """Requests that were sent alone in a quiet moment; `different` says of each that was not the reference how."""

    seconds: float
    compared: int
    different: tuple[str, ...]


def check(seconds: float, answers: Mapping[str, Tokens | str], reference: Mapping[str, Tokens]) -> Check:
    """Compare answers with the reference. A request that failed is different."""
    different = []
    for name, tokens in answers.items():
        if isinstance(tokens, str):
            different.append(f"{name}: {tokens}")
        elif tokens != reference[name]:
            pairs = enumerate(zip(tokens, reference[name], strict=False))
            at = next((place for place, (new, old) in pairs if new != old), min(len(tokens), len(reference[name])))
            different.append(f"{name}: from token {at} on")
    return Check(seconds, len(answers), tuple(different))


@dataclass
class Side:
    """One server."""

    start_seconds: float = 0.0
    processes: int = 0
    tally: Tally = field(default_factory=Tally)
    checks: list[Check] = field(default_factory=list)
    #: How often the engine was put to sleep, or got other weights.
    interferences: Counter[str] = field(default_factory=Counter)
    #: Requests that were still in the engine long after their clients had left.
    left: int = 0

    @property
    def compared(self) -> int:
        return sum(one.compared for one in self.checks)

    @property
    def different(self) -> list[str]:
        return [text for one in self.checks for text in one.different]

    def as_dict(self) -> dict[str, Any]:
        return {
            "start_seconds": round(self.start_seconds, 1),
            "processes": self.processes,
            **self.tally.as_dict(),
            "checks": [
                {"seconds": round(one.seconds, 1), "compared": one.compared, "different": list(one.different)}
                for one in self.checks
            ],
            "interferences": dict(self.interferences),
            "left_in_the_engine": self.left,
        }


@dataclass
class Soak:
    """Everything that is known so far."""

    settings: dict[str, Any]
    growth_limit: float  # MiB per minute
    #: Patches whose ops have to have run.
    patches: tuple[str, ...]
    sides: dict[str, Side] = field(default_factory=lambda: {STOCK: Side(), OVERLAY: Side()})
    samples: dict[str, Any] = field(default_factory=lambda: {"resident": {STOCK: [], OVERLAY: []}, "device": []})
    reference: dict[str, Tokens] = field(default_factory=dict)
    #: With other weights.
    other_reference: dict[str, Tokens] = field(default_factory=dict)
    margins: dict[str, Margins] = field(default_factory=dict)
    journals: list[Journal] = field(default_factory=list)
    load_seconds: float = 0.0
    interrupted: bool = False
    died: str = ""

    def growth(self) -> dict[str, memory.Slope | None]:
        """Of each side, of the overlay beyond stock, and of the devices' memory, which both use."""
        series = {name: _bytes(points) for name, points in self.samples["resident"].items()}
        found = {name: memory.slope_of(points) for name, points in series.items()}
        found["beyond stock"] = memory.slope_of(memory.difference(series[STOCK], series[OVERLAY]))
        found["device"] = memory.slope_of(_bytes(self.samples["device"]))
        return found

    def faults(self) -> list[str]:
        """Everything that makes the soak fail, in plain words."""
        found = [self.died] if self.died else []
        for name, side in self.sides.items():
            errors = side.tally.errors
            if errors:
                text, _ = errors.most_common(1)[0]
                found.append(f"{name}: {errors.total()} requests failed, most of them so: {text}")
            if side.different:
                found.append(f"{name}: {len(side.different)} of {side.compared} checks differ: {side.different[0]}")
            if side.left:
                found.append(f"{name}: {side.left} requests were still in the engine after their clients had left")
        stock, overlay = self.sides[STOCK], self.sides[OVERLAY]
        if overlay.tally.different and not stock.tally.different:
            found.append(
                f"overlay: {overlay.tally.different.total()} answers under load leave those to the same request alone where "
                f"rounding decides nothing; none of stock's do"
            )
        if len(set(self.reference.values())) * 2 < len(self.reference):
            found.append("most requests have the same answer, which proves nothing")
        if any(tokens == self.reference.get(name) for name, tokens in self.other_reference.items()):
            found.append("other weights give the same answer, so they were not loaded")
        if not self.interrupted and not self.died:
            if len(overlay.checks) < 2:
                found.append("nothing was compared after the load")
            found += without_effect(self.journals, self.patches)
        growth = self.growth()
        for name, what in (("beyond stock", "overlay: memory beyond stock's"), ("device", "the GPU's used memory")):
            slope = growth[name]
            if slope is not None and slope.low > self.growth_limit:
                found.append(f"{what} grows by {slope} MiB per minute, more than {self.growth_limit:g}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "load_seconds": round(self.load_seconds, 1),
            "interrupted": self.interrupted,
            "faults": self.faults(),
            "growth_mib_per_minute": {
                name: slope and {key: round(value, 4) for key, value in slope.as_dict().items()}
                for name, slope in self.growth().items()
            },
            "growth_limit_mib_per_minute": self.growth_limit,
            "sides": {name: side.as_dict() for name, side in self.sides.items()},
            "overlay_calls": calls(self.journals),
            "samples_seconds_mib": self.samples,
        }


def _bytes(points: Sequence[tuple[float, float]]) -> memory.Series:
    return [(seconds, size * memory.MIB) for seconds, size in points]


def calls(journals: Sequence[Journal]) -> dict[str, dict[str, int]]:
    """Per patch: layers, calls on several streams, serial calls."""
    found: dict[str, dict[str, int]] = {}
    for patch in (patch for journal in journals for patch in journal.patches if patch.layers):
        counts = found.setdefault(patch.name, {"layers": 0, "dual_stream": 0, "calls": 0})
        counts["layers"] += len(patch.layers)
        counts["dual_stream"] += patch.dual_stream_calls
        counts["calls"] += patch.calls
    return found


def without_effect(journals: Sequence[Journal], patches: Sequence[str]) -> list[str]:
    """Why stock may have been compared with stock, and what the overlay reports of itself."""
    ran = calls(journals)
    found = [
        f"{name}: patched in no layer, or its op never ran" for name in patches if not ran.get(name, {}).get("calls")
    ]
    return found + sorted({f"the overlay reports: {problem}" for journal in journals for problem in journal.problems})


def table(soak: Soak) -> Table:
    from rich.table import Table

    growth = soak.growth()
    result = Table(title=f"{soak.load_seconds:.0f} s of mixed load", title_justify="left")
    for heading in ("", STOCK, OVERLAY):
        result.add_column(heading, justify="left" if not heading else "right", overflow="fold")

    def row(name: str, cell: Any) -> None:
        result.add_row(name, *(cell(soak.sides[side], side) for side in (STOCK, OVERLAY)))

    row("requests under load", lambda side, _: str(side.tally.sent.total()))
    for kind in sorted({kind for side in soak.sides.values() for kind in side.tally.sent}):
        row(f"  {kind}", lambda side, _, kind=kind: str(side.tally.sent[kind]))
    row("tokens", lambda side, _: str(side.tally.tokens))
    row("errors", lambda side, _: str(side.tally.errors.total()))
    for what in sorted({what for side in soak.sides.values() for what in side.interferences}):
        row(f"  {what}", lambda side, _, what=what: str(side.interferences[what]))
    row("left in the engine", lambda side, _: str(side.left))
    row("sent alone: checks, different", lambda side, _: f"{side.compared}, {len(side.different)}")
    row(
        "under load: same, rounded, different",
        lambda side, _: f"{side.tally.same}, {side.tally.rounded.total()}, {side.tally.different.total()}",
    )
    row("processes", lambda side, _: str(side.processes))
    row("resident, MiB: first, last", lambda _, name: _ends(soak.samples["resident"][name]))
    row("grows, MiB per minute (95 %)", lambda _, name: _slope(growth[name]))
    result.add_row("  beyond stock", "", _slope(growth["beyond stock"]))
    if soak.samples["device"]:
        result.add_row("GPU memory, MiB: first, last", _ends(soak.samples["device"]), "(both servers)")
        result.add_row("  grows, MiB per minute (95 %)", _slope(growth["device"]), "")
    result.caption = (
        f"Growth over the second half. It fails when the overlay is shown to grow by more than {soak.growth_limit:g} MiB "
        "per minute beyond stock. Rounded: the answer leaves the one to the same request alone where two tokens were about as "
        "likely, for a request's batch may change how its sums are rounded. Different ones fail where stock has none."
    )
    result.caption_justify = "left"
    return result


def _ends(points: Sequence[tuple[float, float]]) -> str:
    return f"{points[0][1]:.0f}, {points[-1][1]:.0f}" if points else "no samples"


def _slope(slope: memory.Slope | None) -> str:
    return "too short to tell" if slope is None else str(slope)
