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
from types import NoneType
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.results import CONTROL, overlays_of, versions
from overlay.cli.failure import CommandError
from overlay.cli.quantization import shown

if TYPE_CHECKING:
    from rich.console import Console

#: The smallest change that counts, as a share of the reference's ratio.
LEAST_CHANGE = 0.01
SAME, SLOWER, FASTER, NEW, GONE = "same", "slower", "faster", "new", "gone"
STYLES = {SAME: "", SLOWER: "bold red", FASTER: "green", NEW: "cyan", GONE: "yellow"}
#: What every run of gpu_evidence.py has measured before results named their model.
EVIDENCE_MODEL = "Qwen3.5-35B-A3B"

#: The kinds of values in JSON, as a message calls them. No number is as large as MOST, and none of them is NaN.
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    NoneType: "null",
}
MOST = 1e12

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
    before, after = checked(old), checked(new)
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
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise CommandError(f"{path} cannot be read as results: {reason}") from error
    if not isinstance(data, dict) or "host" not in data:
        lacks = "host is missing" if isinstance(data, dict) else f"it holds {shown(data)} and no object"
        raise CommandError(f"{path} is no results file of bench: {lacks}")
    return data


def checked(path: Path) -> dict[str, Any]:
    """A results file in which everything is as bench writes it that is compared. Raises CommandError where it is not."""
    data = read(path)
    try:
        subject(data, path)
        _said(data)
        ratios(data)
        _different(data)
    except ValueError as error:
        raise CommandError(f"{path} is no results file of bench: {error}") from error
    return data


def _part(of: Mapping[str, Any], key: str, *kinds: type, within: str = "") -> Any:
    """A value of a results file. Raises ValueError where it is of none of these kinds. A missing one is None."""
    found = of.get(key)
    if type(found) not in kinds or (isinstance(found, (int, float)) and not abs(found) < MOST):
        what = f"is {shown(found)}" if key in of else "is missing"
        raise ValueError(
            f"{within}{key} {what}; allowed is {' or '.join(KINDS[kind] for kind in kinds if kind is not int or float not in kinds)}"
        )
    return found


def _rows(of: Mapping[str, Any], key: str, within: str = "") -> list[dict[str, Any]]:
    """The rows of a table; none where it was not measured."""
    found = _part(of, key, list, NoneType, within=within) or []
    if not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{within}{key} has a row that is no object")
    return found


def _arms(row: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The overlay's arms of a row, with the values of each."""
    if "arms" in row:
        _part(row, "arms", dict, within=where)
    try:
        found = overlays_of(row)
    except KeyError as error:
        raise ValueError(f"{where}{error.args[0]} is missing") from error
    return {arm: _part(found, arm, dict, within=where) for arm in found}


def _ratio(values: Mapping[str, Any], where: str) -> Ratio:
    found = Ratio(*(float(_part(values, key, int, float, within=where)) for key in ("ratio", "low", "high")))
    if found.ratio <= 0:
        raise ValueError(f"{where}ratio is {found.ratio}; allowed is a number above 0")
    return found


def subject(data: Mapping[str, Any], path: Path) -> Subject:
    """What a results file was measured on."""
    host = _part(data, "host", dict)
    gpu = (_part(host, "gpu", str, NoneType, within="host.") or "CPU").partition(",")[0]
    if model := _part(data, "model", dict, NoneType):
        layers, shards = (_part(model, key, int, within="model.") for key in ("layers", "tensor_parallel"))
        form = _part({"format": "bf16", **model}, "format", str, within="model.")
        return Subject(gpu, _part(model, "name", str, within="model."), layers, shards, form)
    arguments = _part(data, "arguments", dict, NoneType) or {}
    if "architecture" not in arguments:
        raise CommandError(f"{path} does not say which model it is of: not a results file of bench")
    layers = str(_part(arguments, "layers", int, str, within="arguments."))  # the forerunner's is a text
    if not layers.isdecimal():
        raise ValueError(f"arguments.layers is {shown(layers)}; allowed is a whole number")
    return Subject(gpu, EVIDENCE_MODEL, int(layers), 1)


def _said(data: Mapping[str, Any]) -> str:
    """The versions of what was measured."""
    overlay = _part(data, "overlay", dict)
    _part(_part(data, "pair", dict, NoneType) or {}, "stock", dict, NoneType, within="pair.")
    _part(data, "versions", dict, NoneType)
    known = versions(data)
    return f"overlay {overlay.get('version')}, vLLM {known['vllm']}, torch {known['torch']}"


def _versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    old, new = _said(before), _said(after)
    return f" ({old})" if old == new else f" ({old}; now {new})"


def ratios(data: Mapping[str, Any]) -> dict[Key, Ratio]:
    """All ratios to stock of a results file. Raises ValueError where a row is not as bench writes it."""
    found: dict[Key, Ratio] = {}
    for kind, size in (("decode", "requests"), ("first_token", "prompt")):
        for row in _rows(data, kind):
            what = f"{kind}, {row['group']}" if row.get("group") else kind
            found |= _row(row, what, size, f"{kind}: ")
    for row in _rows(_part(data, "serving", dict, NoneType) or {}, "rows", "serving."):
        where = "serving.rows: "
        metric, arm = (_part(row, key, str, within=where) for key in ("metric", "arm"))
        if arm != CONTROL:
            key = f"serving {metric}", float(_part(row, "rate", int, float, within=where)), arm
            found[key] = _ratio(row, where)
    for row in _rows(_part(data, "concurrency", dict, NoneType) or {}, "rows", "concurrency."):
        where = "concurrency.rows: "
        found |= _row(row, f"clients {_part(row, 'metric', str, within=where)}", "requests", where)
    return found


def _row(row: dict[str, Any], what: str, size: str, where: str) -> dict[Key, Ratio]:
    """The ratios of one row, of each of the overlay's arms."""
    return {
        (what, float(_part(row, size, int, float, within=where)), arm): _ratio(values, f"{where}{arm}: ")
        for arm, values in _arms(row, where).items()
    }


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Every row that either of them has, in the order of what is measured and of sizes."""
    old, new = ratios(before), ratios(after)
    return [Row(key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]


def tokens_worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Cases in which an arm's tokens differ from stock's now, and did not before; in words."""
    old = _different(before)
    return [
        f"{arm}, {case}: {count} requests differ, {old.get((arm, case), 0)} before"
        for (arm, case), count in _different(after).items()
        if count > old.get((arm, case), 0)
    ]


def _different(data: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """How many requests of an arm and a case have other tokens than stock's, where stock repeats its own."""
    where = "tokens: "
    return {
        (arm, _part(row, "case", str, within=where)): _part(answer, "different_requests", int, within=f"{where}{arm}: ")
        for row in _rows(data, "tokens")
        for arm, answer in _arms(row, where).items()
        if _part(row, "stock_repeats_itself", bool, within=where)
    }


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
