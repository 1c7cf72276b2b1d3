"""Reads the journals that the overlay's processes write (overlay/report/journal.py).

The folder may hold anything: half a file, another program's file, or a journal of an older or newer overlay. A field that
is missing or of a wrong type counts as empty. A file that is no journal is listed with the reason. A file is read as JSON
up to a limit of bytes, and nothing in it is ever evaluated.

A server imports this module too (overlay/report/metrics.py), so it uses only the standard library.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from overlay.report import process_identity
from overlay.report.process_identity import Identity
from overlay.vocabulary import APPLY, OF_PYTHON

SCHEMA = 1
LARGEST_BYTES = 4 * 2**20


@dataclass(frozen=True)
class PlanOfShape:
    """What was measured, or read from disk, for one shape of a patch's layers: strategies by number of tokens."""

    shape: str
    layers: int
    source: str
    seconds: float
    strategies: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Patch:
    """One patch in one process."""

    name: str
    verdict: str = "unknown"
    reason: str = ""
    module: str | None = None
    methods: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    fake_calls: int = 0
    dual_stream_calls: int = 0
    fused_calls: int = 0
    lowered: int = 0
    serial_calls: dict[str, int] = field(default_factory=dict)
    plans: tuple[PlanOfShape, ...] = ()
    #: The loop of vLLM that the process is in; only for a patch of loops.
    loop: str | None = None

    @property
    def calls(self) -> int:
        """How often the op has really run. Calls by the compiler's fake tensors do not count."""
        return self.dual_stream_calls + self.fused_calls + sum(self.serial_calls.values())

    def is_in_effect(self) -> bool:
        """Whether it was installed and has run."""
        return self.verdict == APPLY and (self.calls > 0 or self.loop is not None)


@dataclass(frozen=True)
class Journal:
    """One process. `started` is in seconds since the epoch; `raw` is the file's content.

    `identity` is read from the file's name; None if the name does not say it. `alive`: the process ran on this host when
    the file was read.
    """

    process_id: int
    parent: int
    role: str
    started: float
    patches: tuple[Patch, ...]
    problems: tuple[str, ...]
    transformers: str
    transformers_seconds: float | None
    vllm: str | None
    overlay: str | None
    fingerprint: str | None
    raw: dict[str, Any]
    identity: Identity | None = None
    alive: bool = False

    @property
    def layers(self) -> int:
        return sum(len(patch.layers) for patch in self.patches)

    @property
    def calls(self) -> int:
        return sum(patch.calls for patch in self.patches)


@dataclass(frozen=True)
class Skipped:
    """A file that was not taken for a journal, and why."""

    file: str
    reason: str


def load(folder: Path, wanted: Callable[[str], bool] | None = None) -> tuple[list[Journal], list[Skipped]]:
    """All journals of a folder, in the order in which the processes started. With `wanted`, only files whose name it
    accepts.

    Raises OSError if the folder cannot be listed.
    """
    found, skipped = [], []
    here = process_identity.own()
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".json") or (wanted is not None and not wanted(name)):
            continue
        try:
            journal = _read_file(folder / name)
            identity = process_identity.from_name(name)
            alive = process_identity.runs(str(folder / name), here)
            if alive is None and identity is None:  # an older overlay, or no /proc: only the number is known
                alive = process_identity.number_runs(journal.process_id)
            found.append(replace(journal, identity=identity, alive=bool(alive)))
        except FileNotFoundError:  # the overlay has removed it since it was listed
            continue
        except (OSError, ValueError, RecursionError) as error:
            skipped.append(Skipped(name, str(error) or type(error).__name__))
    return sorted(found, key=lambda journal: (journal.started, journal.process_id)), skipped


def read(folder: Path) -> list[Journal]:
    """All journals of a folder; none if there is no such folder."""
    try:
        return load(folder)[0]
    except FileNotFoundError:
        return []


def _read_file(path: Path) -> Journal:
    """Read one journal. Raises OSError or ValueError, with the reason, if the file is no journal."""
    information = path.stat()
    if not stat.S_ISREG(information.st_mode):  # reading a pipe would wait for its other end
        raise ValueError("is not a file")
    with path.open("rb") as file:
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"is larger than {LARGEST_BYTES // 2**20} MiB")
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(raw, dict) or "pid" not in raw:
        raise ValueError("is not a journal")
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"has schema {raw.get('schema')!r}; this overlay reads {SCHEMA}")
    return parse(raw)


def parse(raw: dict[str, Any]) -> Journal:
    """Read the content of one journal file."""
    transformers = _table(raw, "transformers")
    problems, loop = raw.get("problems"), _text(raw.get("loop"))
    return Journal(
        process_id=_count(raw.get("pid")),
        parent=_count(raw.get("parent")),
        role=_text(raw.get("role")) or "unknown",
        started=_seconds(raw.get("started")) or 0.0,
        patches=tuple(_parse_patch(name, patch, loop) for name, patch in _table(raw, "patches").items()),
        problems=tuple(str(problem) for problem in problems) if isinstance(problems, list) else (),
        transformers=_text(transformers.get("state")) or "unknown",
        transformers_seconds=_seconds(transformers.get("seconds")),
        vllm=_text(raw.get("vllm")),
        overlay=_text(raw.get("overlay")),
        fingerprint=_text(raw.get("fingerprint")),
        raw=raw,
    )


def _parse_patch(name: str, raw: Any, loop: str | None) -> Patch:
    raw = raw if isinstance(raw, dict) else {}
    layers, calls, methods = _table(raw, "layers"), _table(raw, "calls"), raw.get("methods")
    return Patch(
        name=name,
        verdict=_text(raw.get("verdict")) or "unknown",
        reason=_text(raw.get("reason")) or "",
        module=_text(raw.get("module")),
        methods=tuple(str(method) for method in methods) if isinstance(methods, list) else (),
        layers=tuple(_table(layers, "patched")),
        refused={layer: str(reason) for layer, reason in _table(layers, "refused").items()},
        fake_calls=_count(calls.get("fake")),
        dual_stream_calls=_count(calls.get("dual_stream")),
        fused_calls=_count(calls.get("fused")),
        lowered=_count(calls.get("lowered")),
        serial_calls={reason: _count(count) for reason, count in _table(calls, "serial").items()},
        plans=tuple(_parse_plan(plan) for plan in _list(raw, "plans")),
        loop=loop if name in OF_PYTHON else None,
    )


def _parse_plan(raw: Any) -> PlanOfShape:
    raw = raw if isinstance(raw, dict) else {}
    shape = _table(raw, "shape")
    rows = [row for row in _list(raw, "rows") if isinstance(row, dict)]
    return PlanOfShape(
        shape=f"{_count(shape.get('hidden'))} to {_count(shape.get('main'))} + {_count(shape.get('side'))}",
        layers=_count(raw.get("layers")),
        source=_text(raw.get("source")) or "unknown",
        seconds=_seconds(raw.get("seconds")) or 0.0,
        strategies=tuple((_count(row.get("tokens")), _text(row.get("strategy")) or "unknown") for row in rows),
    )


def _list(raw: dict[str, Any], key: str) -> list[Any]:
    value = raw.get(key)
    return value if isinstance(value, list) else []


def _table(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else 0


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e12 or math.isnan(value):
        return None
    return float(value)
