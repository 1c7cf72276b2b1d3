"""``status``: what the overlay does in the processes of this host, read from their journals.

JSON (schema 1)::

    {"schema": 1, "overlay": "0.1.0", "folder": "…", "ok": true,
     "missing": ["gdn: no process with the overlay runs here"],
     "processes": [{"pid": 4711, "role": "EngineCore", "alive": true, "started": 1767225600.0, "vllm": "0.33.0" | null,
                    "overlay": "0.1.0" | null, "fingerprint": "…" | null, "problems": ["…"],
                    "patches": {"gdn": {"verdict": "apply", "reason": "…", "module": "vllm.…" | null, "methods": ["…"],
                                        "layers": {"patched": ["…"], "refused": {"layer": "reason"}},
                                        "calls": {"fake": 0, "lowered": 0, "dual_stream": 0, "fused": 0,
                                                  "serial": {"reason": 0}},
                                        "plans": [{"shape": "2048 to 12288 + 64", "layers": 30, "seconds": 1.5,
                                                   "source": "measured" | "read",
                                                   "strategies": {"<tokens>": "serial" | "dual" | "dual_main_first" |
                                                                              "fused"}}]}}}],
     "skipped": [{"file": "…", "reason": "…"}]}

A verdict is one of check's, or "off" (switched off), "not seen" (the process has not imported the target), "ineffective"
(patched, and the op never ran) or "refused" (other code runs than the verdict has read). `ok` is false if a live process
has a problem, or a patch that is drifted, ineffective or refused. ``--all`` also lists processes that are gone. Run it on
the host of the processes, in any container that has their folder. A process of another host counts as gone.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay import __version__, settings
from overlay.cli.failure import CommandError
from overlay.cli.options import parse_words
from overlay.report import journal_reader
from overlay.report.journal_reader import Journal, Patch, Skipped
from overlay.vocabulary import APPLY, DRIFTED, INEFFECTIVE, NOT_SEEN, OF_PYTHON, OFF, PATCH_NAMES, REFUSED

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

SCHEMA = 1
WATCH_SECONDS = 1.0
BAD_VERDICTS = (DRIFTED, INEFFECTIVE, REFUSED)
NOBODY = "no process with the overlay runs here"


@dataclass(frozen=True)
class Process:
    """A journal, and whether its process runs."""

    journal: Journal

    @property
    def alive(self) -> bool:
        return self.journal.alive

    def is_wrong(self) -> bool:
        bad = any(patch.verdict in BAD_VERDICTS for patch in self.journal.patches)
        return self.alive and (bad or bool(self.journal.problems))


@dataclass(frozen=True)
class Look:
    """What one look at the folder found."""

    folder: Path
    processes: tuple[Process, ...]
    skipped: tuple[Skipped, ...]
    required: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not (any(process.is_wrong() for process in self.processes) or self.missing())

    def missing(self) -> list[str]:
        """Each required patch that is in effect nowhere, and what there is instead."""
        live = [process.journal for process in self.processes if process.alive]
        found = {
            name: [patch for journal in live for patch in journal.patches if patch.name == name]
            for name in self.required
        }
        return [
            f"{name}: {_instead(patches)}"
            for name, patches in found.items()
            if not any(patch.is_in_effect() for patch in patches)
        ]


def _instead(patches: list[Patch]) -> str:
    """What a patch is in the processes where it is not in effect. A worker's word counts more than that of a process which
    has not even imported the target."""
    said = {f"{patch.verdict}{_not_run(patch) if patch.verdict == APPLY else ''}" for patch in patches}
    return ", ".join(sorted(said - {NOT_SEEN} or said)) or NOBODY


def _not_run(patch: Patch) -> str:
    return ", and no loop has begun" if patch.name in OF_PYTHON else ", and its op has not run"


def run(given: Path | None, *, gone: bool, as_json: bool, watch: bool, required: str | None = None) -> int:
    """Look, show, and give the exit status."""
    if watch and as_json:
        raise CommandError("--watch is for people; for machines, call status --json as often as you like")
    wanted = parse_words("--require", required, PATCH_NAMES) if required is not None else ()
    folder = _folder(given)
    if watch:
        return _watch(folder, gone, wanted)
    found = look(folder, gone, wanted)
    if as_json:
        print(json.dumps(as_dict(found), indent=1))
    else:
        from overlay.cli import output

        console = output.console()
        for part in rendered(found):
            _print(console, part)
    return int(not found.ok)


def _folder(given: Path | None) -> Path:
    """The journals' folder. One that was named has to be there; the default one may not have been made yet."""
    if given is not None:
        if not given.is_dir():
            raise CommandError(
                f"--journal-dir={str(given)!r} is not a folder; allowed is the folder that holds the journals"
            )
        return given
    try:
        return Path(settings.load(os.environ).journal_folder or settings.default_journal_folder())
    except settings.SettingsError as error:
        raise CommandError(str(error)) from error


def look(folder: Path, gone: bool, required: tuple[str, ...] = ()) -> Look:
    """The processes of a folder's journals; `gone`: also those that have ended."""
    try:
        found, skipped = journal_reader.load(folder)
    except FileNotFoundError:
        found, skipped = [], []
    except OSError as error:
        raise CommandError(f"the journals in {folder} cannot be read: {error}") from error
    processes = map(Process, found)
    return Look(folder, tuple(process for process in processes if process.alive or gone), tuple(skipped), required)


def as_dict(found: Look) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "schema": SCHEMA,
        "overlay": __version__,
        "folder": str(found.folder),
        "ok": found.ok,
        "missing": found.missing(),
        "processes": [_process_as_dict(process) for process in found.processes],
        "skipped": [{"file": one.file, "reason": one.reason} for one in found.skipped],
    }


def _process_as_dict(process: Process) -> dict[str, Any]:
    journal = process.journal
    return {
        "pid": journal.process_id,
        "role": journal.role,
        "alive": process.alive,
        "started": journal.started,
        "vllm": journal.vllm,
        "overlay": journal.overlay,
        "fingerprint": journal.fingerprint,
        "problems": list(journal.problems),
        "patches": {patch.name: _patch_as_dict(patch) for patch in journal.patches},
    }


def _patch_as_dict(patch: Patch) -> dict[str, Any]:
    return {
        "verdict": patch.verdict,
        "reason": patch.reason,
        "module": patch.module,
        "methods": list(patch.methods),
        "layers": {"patched": list(patch.layers), "refused": patch.refused},
        "calls": {
            "fake": patch.fake_calls,
            "lowered": patch.lowered,
            "dual_stream": patch.dual_stream_calls,
            "fused": patch.fused_calls,
            "serial": patch.serial_calls,
        },
        "plans": [
            {
                "shape": plan.shape,
                "layers": plan.layers,
                "source": plan.source,
                "seconds": plan.seconds,
                "strategies": {str(tokens): strategy for tokens, strategy in plan.strategies},
            }
            for plan in patch.plans
        ],
    }


# ---------------------------------------------------------------- for people


def _watch(folder: Path, gone: bool, required: tuple[str, ...]) -> int:
    from rich.console import Group
    from rich.live import Live

    from overlay.cli import output

    found = look(folder, gone, required)
    try:
        with Live(Group(*rendered(found)), console=output.console(), auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_SECONDS)
                found = look(folder, gone, required)
                live.update(Group(*rendered(found)), refresh=True)
    except KeyboardInterrupt:
        return int(not found.ok)


def _print(console: Console, part: RenderableType) -> None:
    console.print(part, soft_wrap=isinstance(part, str) and not sys.stdout.isatty())


def rendered(found: Look) -> Iterator[RenderableType]:
    """A table, then everything that has to be said in words."""
    from overlay.cli.output import visible

    if found.processes:
        yield _table(found)
    else:
        yield f"{NOBODY} (journals: {visible(str(found.folder))}); doctor says whether one would have it"
    who_says: dict[str, list[str]] = {}
    for process in found.processes:
        for note in _notes(process.journal):
            who_says.setdefault(note, []).append(str(process.journal.process_id))
    for note, processes in who_says.items():
        yield visible(f"{', '.join(processes)}: {note}")
    for one in found.skipped:
        yield visible(f"{one.file}: skipped: {one.reason}")
    if found.missing():
        yield visible(f"REQUIRED, and in effect in no process: {'; '.join(found.missing())}")


def _table(found: Look) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from overlay.cli.output import verdict_text, visible

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # a terminal has 80 columns
    table.add_column("process", overflow="fold", min_width=16)
    for name in ("patch", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("layers", "dual", "serial", "traced"):
        table.add_column(name, justify="right", no_wrap=True)
    for process in found.processes:
        journal = process.journal
        head = [f"{journal.process_id} {journal.role}", f"vLLM {journal.vllm or 'not imported'}"]
        head += [] if process.alive else ["gone"]
        head += [journal.fingerprint] if journal.fingerprint else []
        rows = [
            (
                visible(patch.name),
                verdict_text(patch.verdict),
                _layers(patch),
                str(patch.dual_stream_calls or ""),
                str(sum(patch.serial_calls.values()) or ""),
                str(patch.fake_calls or ""),
            )
            for patch in journal.patches
        ]
        columns = [
            Text("\n").join(Text(cell) if isinstance(cell, str) else cell for cell in column)
            for column in zip(*rows, strict=True)
        ]
        table.add_row("\n".join(visible(line) for line in head), *columns, end_section=True)
    return table


def _layers(patch: Patch) -> str:
    if not patch.layers and not patch.refused:
        return ""
    return f"{len(patch.layers)} of {len(patch.layers) + len(patch.refused)}"


def _notes(journal: Journal) -> Iterator[str]:
    """What a table has no room for: problems, why a patch does not act, why layers stay stock, why calls were serial."""
    for problem in journal.problems:
        yield f"PROBLEM: {problem}"
    for patch in journal.patches:
        if patch.verdict not in (APPLY, OFF, NOT_SEEN):
            yield f"{patch.name}: {patch.verdict}: {patch.reason}"
        for reason in sorted(set(patch.refused.values())):
            count = sum(one == reason for one in patch.refused.values())
            yield f"{patch.name}: {count} {'layer stays' if count == 1 else 'layers stay'} stock: {reason}"
        for reason, count in patch.serial_calls.items():
            yield f"{patch.name}: {count} calls serial: {reason}"
        for plan in patch.plans:
            yield f"{patch.name}: plan of {plan.layers} layers, {plan.shape}, {plan.source}: {_ranges(plan.strategies)}"


def _ranges(strategies: tuple[tuple[int, str], ...]) -> str:
    """Sizes in a row that have the same strategy as one: ``1 to 64 dual, 72 to 512 fused``."""
    parts = []
    for strategy, group in itertools.groupby(strategies, key=lambda pair: pair[1]):
        sizes = [tokens for tokens, _ in group]
        parts.append(f"{sizes[0]} to {sizes[-1]} {strategy}" if len(sizes) > 1 else f"{sizes[0]} {strategy}")
    return ", ".join(parts) or "no size"
