"""The regression gate: a run's ratios to stock against those of a reference, row by row.

A row has moved where the two intervals do not overlap and the ratios differ by more than 1 %. Ratios are compared and not
times, so that a host's slow day does not count; still only runs of one GPU, model and number of layers can be compared.
Reads what `python -m overlay bench` writes, and the results of its forerunner gpu_evidence.py in benchmarks/results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.results import CONTROL, overlays_of, versions
from overlay.cli.failure import CommandError

if TYPE_CHECKING:
    from rich.console import Console

#: The smallest change that counts, as a share of the reference's ratio.
LEAST_CHANGE = 0.01
SAME, SLOWER, FASTER, NEW, GONE = "same", "slower", "faster", "new", "gone"
STYLES = {SAME: "", SLOWER: "bold red", FASTER: "green", NEW: "cyan", GONE: "yellow"}
#: What every run of gpu_evidence.py has measured before results named their model.
EVIDENCE_MODEL = "Qwen3.5-35B-A3B"

#: What is measured, the size, the arm.
Key = tuple[str, float, str]


@dataclass(frozen=True)
class Ratio:
    """A ratio to stock with its interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f}..{self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    key: Key
    old: Ratio | None
    new: Ratio | None

    @property
    def verdict(self) -> str:
        if self.old is None or self.new is None:
            return NEW if self.old is None else GONE
        return decide(self.old, self.new)


def decide(old: Ratio, new: Ratio) -> str:
    """Whether a ratio has moved, and which way."""
    apart = new.low > old.high or new.high < old.low
    if not apart or abs(new.ratio - old.ratio) <= LEAST_CHANGE * old.ratio:
        return SAME
    return SLOWER if new.ratio > old.ratio else FASTER


@dataclass(frozen=True)
class Subject:
    """What was measured on what; runs with another one are not comparable."""

    gpu: str
    model: str
    layers: int
    tensor_parallel: int
    format: str = "bf16"

    def __str__(self) -> str:
        form = "" if self.format == "bf16" else f" ({self.format})"
        return f"{self.model}{form} with {self.layers} layers on {self.tensor_parallel} x {self.gpu}"


def run(old: Path, new: Path, console: Console) -> int:
    """Compare two results files and show the table. 1: something is slower, or tokens differ that did not."""
    before, after = read(old), read(new)
    for data, path in ((before, old), (after, new)):
        if data.get("cpu"):
            raise CommandError(f"not comparable: {path} is of a CPU, which says nothing about speed")
    first, second = subject(before, old), subject(after, new)
    if first != second:
        raise CommandError(f"not comparable: {old} is of {first}, {new} is of {second}")
    rows = compare(before, after)
    if not any(row.old and row.new for row in rows):
        raise CommandError(f"not comparable: {old} and {new} have no row in common")
    worse = tokens_worse(before, after)
    show(rows, worse, console, f"{first}: {old} to {new}{_versions(before, after)}")
    return int(bool(worse) or any(row.verdict == SLOWER for row in rows))


def read(path: Path) -> dict[str, Any]:
    """A results file. Raises CommandError where it is none."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read as results: {error}") from error
    if not isinstance(data, dict) or "host" not in data:
        raise CommandError(f"{path} is no results file of bench")
    return data


def subject(data: Mapping[str, Any], path: Path) -> Subject:
    """What a results file was measured on."""
    gpu = (data["host"].get("gpu") or "CPU").partition(",")[0]
    model = data.get("model")
    if model:
        return Subject(
            gpu, model["name"], int(model["layers"]), int(model["tensor_parallel"]), model.get("format", "bf16")
        )
    arguments = data.get("arguments", {})
    if "architecture" not in arguments:
        raise CommandError(f"{path} does not say which model it is of: not a results file of bench")
    return Subject(gpu, EVIDENCE_MODEL, int(arguments["layers"]), 1)


def _versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    def of(data: Mapping[str, Any]) -> str:
        known = versions(data)
        return f"overlay {data['overlay'].get('version')}, vLLM {known['vllm']}, torch {known['torch']}"

    old, new = of(before), of(after)
    return f" ({old})" if old == new else f" ({old}; now {new})"


def ratios(data: Mapping[str, Any]) -> dict[Key, Ratio]:
    """All ratios to stock of a results file."""
    found: dict[Key, Ratio] = {}
    for kind, size in (("decode", "requests"), ("first_token", "prompt")):
        for row in data.get(kind) or []:
            what = f"{kind}, {row['group']}" if row.get("group") else kind
            for arm, values in overlays_of(row).items():
                found[what, float(row[size]), arm] = Ratio(values["ratio"], values["low"], values["high"])
    for row in (data.get("serving") or {}).get("rows") or []:
        if row["arm"] != CONTROL:
            key = f"serving {row['metric']}", float(row["rate"]), row["arm"]
            found[key] = Ratio(row["ratio"], row["low"], row["high"])
    for row in (data.get("concurrency") or {}).get("rows") or []:
        for arm, values in overlays_of(row).items():
            found[f"clients {row['metric']}", float(row["requests"]), arm] = Ratio(
                values["ratio"], values["low"], values["high"]
            )
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Every row that either of them has, in the order of what is measured and of sizes."""
    old, new = ratios(before), ratios(after)
    return [Row(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]


def tokens_worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Cases in which an arm's tokens differ from stock's now, and did not before; in words."""

    def different(data: Mapping[str, Any]) -> dict[tuple[str, str], int]:
        return {
            (arm, row["case"]): answer["different_requests"]
            for row in data.get("tokens") or []
            for arm, answer in overlays_of(row).items()
            if row["stock_repeats_itself"]
        }

    old = different(before)
    return [
        f"{arm}, {case}: {count} requests differ, {old.get((arm, case), 0)} before"
        for (arm, case), count in different(after).items()
        if count > old.get((arm, case), 0)
    ]


def show(rows: list[Row], worse: list[str], console: Console, title: str) -> None:
    """The table, then the verdict in words."""
    from rich.text import Text

    from overlay.cli.bench.report import table

    console.print(title, soft_wrap=True)
    found = table("", "what", "size", "arm", "reference", "now", "change", "")
    for row in rows:
        kind, size, arm = row.key
        both = row.old is not None and row.new is not None
        change = f"{(row.new.ratio / row.old.ratio - 1) * 100:+.1f} %" if both and row.old and row.new else ""
        cells = (kind.replace("_", " "), f"{size:g}", arm, str(row.old or ""), str(row.new or ""), change)
        found.add_row(*cells, Text(row.verdict, style=STYLES[row.verdict]))
    console.print(found)
    for text in worse:
        console.print(f"TOKENS: {text}", style="bold red")
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in STYLES}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
