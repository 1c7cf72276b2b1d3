"""Reads what the overlay's processes wrote about themselves.

The reader is a stranger to the overlay on purpose: it takes the files as they are, so that the demo and the engine tests
would notice if the overlay stopped telling the truth. Every field may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One patch in one process."""

    name: str
    verdict: str = "unknown"
    reason: str = ""
    layers: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    fake_calls: int = 0
    dual_stream_calls: int = 0
    serial_calls: dict[str, int] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """How often the op has really run; what the compiler's fake tensors called does not count."""
        return self.dual_stream_calls + sum(self.serial_calls.values())


@dataclass(frozen=True)
class Journal:
    """One process."""

    process_id: int
    role: str
    started: float
    patches: tuple[Patch, ...]
    problems: tuple[str, ...]
    transformers: str
    transformers_seconds: float | None
    raw: dict[str, Any]

    @property
    def layers(self) -> int:
        return sum(len(patch.layers) for patch in self.patches)

    @property
    def calls(self) -> int:
        return sum(patch.calls for patch in self.patches)


def parse(raw: dict[str, Any]) -> Journal:
    """One journal file's content."""
    transformers = _table(raw, "transformers")
    return Journal(
        process_id=int(raw.get("pid", 0)),
        role=str(raw.get("role", "unknown")),
        started=float(raw.get("started", 0.0)),
        patches=tuple(_parse_patch(name, patch) for name, patch in _table(raw, "patches").items()),
        problems=tuple(str(problem) for problem in raw.get("problems") or ()),
        transformers=str(transformers.get("state", "unknown")),
        transformers_seconds=transformers.get("seconds"),
        raw=raw,
    )


def _parse_patch(name: str, raw: dict[str, Any]) -> Patch:
    layers, calls = _table(raw, "layers"), _table(raw, "calls")
    return Patch(
        name=name,
        verdict=str(raw.get("verdict", "unknown")),
        reason=str(raw.get("reason", "")),
        layers=tuple(_table(layers, "patched")),
        refused={layer: str(reason) for layer, reason in _table(layers, "refused").items()},
        fake_calls=int(calls.get("fake", 0)),
        dual_stream_calls=int(calls.get("dual_stream", 0)),
        serial_calls={reason: int(count) for reason, count in _table(calls, "serial").items()},
    )


def _table(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def read(folder: Path) -> list[Journal]:
    """All journals of a folder in the order in which the processes started."""
    found = []
    for path in folder.glob("*.json"):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # Replaced or removed between the listing and the reading; the overlay writes by renaming.
            continue
        if isinstance(raw, dict):
            found.append(parse(raw))
    return sorted(found, key=lambda journal: (journal.started, journal.process_id))


def why_without_effect(journals: Sequence[Journal], expected_layers: int, workers: int = 1) -> str | None:
    """None if the overlay changed what ran, in every worker; else the reason in plain words.

    A patch counts as working when every layer it should reach is patched AND its op has run: the first alone is a claim.
    """
    if not journals:
        return "no process wrote a journal: the overlay was never armed"
    patched = [journal for journal in journals if journal.layers]
    if not patched:
        reasons = sorted({f"{patch.name}: {patch.verdict}, {patch.reason}" for j in journals for patch in j.patches})
        problems = sorted({problem for journal in journals for problem in journal.problems})
        return "no layer was patched" + "".join(f"; {text}" for text in reasons + problems)
    if len(patched) < workers:
        return f"layers were patched in {len(patched)} of {workers} workers"
    for journal in patched:
        if journal.layers != expected_layers:
            refused = sorted({f"{layer}: {why}" for patch in journal.patches for layer, why in patch.refused.items()})
            return f"{journal.role} patched {journal.layers} of {expected_layers} layers" + "".join(
                f"; {r}" for r in refused
            )
        if not journal.calls:
            return f"{journal.role} patched {journal.layers} layers, and the op never ran"
    return None
