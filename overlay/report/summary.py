"""The one INFO line of a process, as text for people and as fields for a JSON log.

A worker logs after its warm-up what each patch did, with proof. The process of ``vllm serve`` has no worker of its own and
logs first; it says that the overlay is there. Every other process logs nothing at INFO.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from overlay import __version__
from overlay.report import log
from overlay.report.journal import FUSED_CALLS, OwnJournal, PatchRecord, role
from overlay.vocabulary import API_SERVER, APPLY, INERT, NOT_SEEN, WITH_IT_GOES, is_removable, loses_by_removal

REMOVABLE = "nothing to do in this vLLM, it can be removed"
#: How many reasons for stock layers the line names, and how many characters of each. The journal has all of them.
_REASONS = 3
_REASON_CHARACTERS = 80


def say_armed(vllm_version: str | None) -> None:
    """In the process of ``vllm serve`` only: say that the overlay is there, minutes before a worker can say what it did."""
    if role() == API_SERVER:
        log.logger.info(
            "overlay %s is armed in vLLM %s; each worker says after its warm-up what was patched",
            __version__,
            vllm_version,
            extra=log.fields("armed", vllm=vllm_version),
        )


def say(journal: OwnJournal, *, removable_is_said_here: bool) -> None:
    """Log what every patch of this process did."""
    patches = [_Patch(name, record.state, record) for name, record in journal.patches.items()]
    states = {patch.name: patch.state for patch in patches}
    removable = is_removable(states)
    clauses = [str(patch) for patch in patches]
    if removable and removable_is_said_here:
        clauses.append(REMOVABLE + (f" ({WITH_IT_GOES})" if loses_by_removal(states) else ""))
    log.logger.info(
        "overlay %s on vLLM %s: %s",
        __version__,
        journal.vllm_version,
        "; ".join(clauses),
        extra=log.fields(
            "summary",
            vllm=journal.vllm_version,
            fingerprint=journal.fingerprint,
            removable=removable,
            problems=len(journal.problems),
            patches={patch.name: patch.fields() for patch in patches},
        ),
    )


@dataclass(frozen=True)
class _Patch:
    name: str
    state: str
    record: PatchRecord

    def fields(self) -> dict[str, Any]:
        calls = self.record.calls
        return {
            "state": self.state,
            "reason": self.record.reason,
            "layers_patched": len(self.record.patched),
            "layers_refused": dict(Counter(self.record.refused.values())),
            "calls_traced": calls.fake,
            "calls_dual_stream": calls.dual_stream,
            "calls_fused": FUSED_CALLS,
            "calls_serial": dict(calls.serial),
        }

    def __str__(self) -> str:
        """``gdn: apply, 9 layers patched, op ran 27 times (27 dual stream), 1 layer stock (batch-invariant mode)``."""
        parts = [f"{self.name}: {self.state}"]
        if self.state == NOT_SEEN:
            parts.append("its target was not imported")
        elif self.state == INERT or (self.state == APPLY and self.record.without_layers):
            parts.append(_short(self.record.reason))
        elif self.state == APPLY and not self.record.patched and not self.record.refused:
            parts.append("no such layer in this model")
        if self.record.patched:
            parts += [f"{_count(len(self.record.patched), 'layer')} patched", self._proof()]
        return ", ".join(parts + self._refused())

    def _proof(self) -> str:
        calls = self.record.calls
        if not calls.total():
            return "op has not run yet" + (f" (traced {_count(calls.fake, 'time')})" if calls.fake else "")
        ways = {"dual stream": calls.dual_stream, "serial": sum(calls.serial.values())}
        return f"op ran {_count(calls.total(), 'time')} ({', '.join(f'{n} {way}' for way, n in ways.items() if n)})"

    def _refused(self) -> list[str]:
        reasons = Counter(self.record.refused.values()).most_common()
        parts = [f"{_count(layers, 'layer')} stock ({_short(reason)})" for reason, layers in reasons[:_REASONS]]
        rest = sum(layers for _, layers in reasons[_REASONS:])
        return parts + ([f"{_count(rest, 'layer')} stock for other reasons"] if rest else [])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_CHARACTERS else f"{line[: _REASON_CHARACTERS - 1]}…"
