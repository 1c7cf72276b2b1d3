"""What this process applied, traced, called, refused and why: one JSON file per process.

A log line "applied" is only a claim. The journal holds the proof: how often the compiler saw the op (fake), how often it
ran on two streams, and how often serially and why. Counters are plain integers, and the hot path makes no system call.
Milestones write the file at once. Once layers are patched, or a loop of vLLM has begun, a daemon thread rewrites a file
that is outdated or gone. So it is good even after a kill -9.

The file's name says which process it belongs to, and the process holds a lock on it (overlay/report/process_identity.py).
Containers and hosts may share the folder, and it may outlive them. So a process removes, when it starts, files that are an
hour old and belong to no running process. For a process of another host only the age is known, so every file is rewritten
every ten minutes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from overlay import __version__, files
from overlay.report import own_folder, process_identity
from overlay.report.log import fields, logger
from overlay.verdict import Verdict
from overlay.vocabulary import ABSENT, API_SERVER, LANDED, MAIN, NOT_SEEN, RAY_WORKER, REGISTRY_PROBE

SCHEMA = 1
#: Always 0 now. Up to 0.1 one GEMM could do both projections; the schema and the log fields keep the place.
FUSED_CALLS = 0
_WRITE_INTERVAL_SECONDS = 1.0
#: After this time an unchanged file is written too, because another host knows only its age.
_REFRESH_SECONDS = 600.0
_STALE_SECONDS = 3600.0
_TEMPORARY = ".journal-"


@dataclass
class Calls:
    """How often a custom op was called, by strategy."""

    fake: int = 0
    lowered: int = 0  #: places in compiled graphs where stock's calls are back (overlay.side_work.lowering)
    dual_stream: int = 0
    serial: dict[str, int] = field(default_factory=dict)

    def count_serial(self, reason: str) -> None:
        self.serial[reason] = self.serial.get(reason, 0) + 1

    def total(self) -> int:
        return self.dual_stream + sum(self.serial.values())


@dataclass
class PatchRecord:
    """One patch in this process."""

    verdict: str = NOT_SEEN
    reason: str = "this process has not imported the target"
    module: str | None = None
    methods: tuple[str, ...] = ()
    patched: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    #: One entry for each shape of this patch's layers: what was measured or read from disk (overlay.side_work.pairs).
    plans: list[dict[str, Any]] = field(default_factory=list)
    #: Whether vLLM's own warm-up has to call the op. If not, the first step has to.
    runs_in_warm_up: bool = True
    #: Whether the patch has neither layers nor an op (`Verdict.without_layers`). Then its reason says what it does.
    without_layers: bool = False
    #: The verdict on the source alone, if the target was not imported and `note_source` was called.
    _on_source: str | None = None
    #: Verdict and reason before this engine's proof of effect (overlay.engine.proof) replaced them.
    _before_overruled: tuple[str, str] | None = None

    @property
    def state(self) -> str:
        """The verdict. If the target was not imported: landed or absent, if the source says so."""
        unseen_is_enough = self.verdict == NOT_SEEN and self._on_source in (LANDED, ABSENT)
        return str(self._on_source) if unseen_is_enough else self.verdict

    @property
    def is_overruled(self) -> bool:
        """Whether another verdict holds in this engine."""
        return self._before_overruled is not None

    def conclude(self, state: str, reason: str) -> None:
        """Set the state of the patch in this process, and the reason."""
        self.verdict, self.reason = state, reason

    def judged(self, found: Verdict) -> None:
        """Set the state of the patch in this process from a verdict."""
        self.conclude(found.state, found.reason)
        self.module, self.methods, self.without_layers = found.module, found.methods, found.without_layers

    def note_source(self, found: Verdict) -> None:
        """Set the verdict on the source, for a target that was not imported."""
        self._on_source = found.state
        self.reason = f"its target has not been imported; on this vLLM: {found.state}: {found.reason}"

    def begin_engine(self) -> None:
        """A new engine of this process begins: forget what belongs to the last one."""
        self.patched, self.refused, self.calls, self.plans = {}, {}, Calls(), []
        if self._before_overruled is not None:
            (self.verdict, self.reason), self._before_overruled = self._before_overruled, None

    def overrule(self, verdict: str, reason: str) -> None:
        """Set another verdict and reason for this engine only."""
        self._before_overruled = self._before_overruled or (self.verdict, self.reason)
        self.verdict, self.reason = verdict, reason

    def refuse(self, layer_name: str, reason: str) -> None:
        """Note that a layer stays stock, and why. The worker's summary counts layers by reason; the names are for
        debugging.
        """
        logger.debug("overlay: layer %s stays stock: %s", layer_name, reason)
        self.refused[layer_name] = reason

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "module": self.module,
            "methods": list(self.methods),
            "layers": {"patched": dict(self.patched), "refused": dict(self.refused)},
            "plans": list(self.plans),
            "calls": {
                "fake": self.calls.fake,
                "lowered": self.calls.lowered,
                "dual_stream": self.calls.dual_stream,
                "fused": FUSED_CALLS,
                "serial": dict(self.calls.serial),
            },
        }


def role() -> str:
    """The role of this process in a running vLLM, from its name or its command line."""
    name = multiprocessing.current_process().name
    if name != "MainProcess":
        return name
    arguments = sys.argv
    program = os.path.basename(arguments[0]) if arguments else ""
    if (program == "vllm" and arguments[1:2] == ["serve"]) or "api_server" in (arguments[0] if arguments else ""):
        return API_SERVER
    if program == "default_worker.py":
        return RAY_WORKER
    if arguments and arguments[0].endswith(os.path.join("models", "registry.py")):
        return REGISTRY_PROBE
    return MAIN


class OwnJournal:
    """The record of one process, and its file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: str | None = None
        self._writer: threading.Thread | None = None
        self._written: dict[str, Any] | None = None
        self._written_at = 0.0  #: in seconds of the monotonic clock
        self._held: tuple[int, os.stat_result] | None = None  #: the descriptor that holds the lock, and its file
        self._started = time.time()
        self.patches: dict[str, PatchRecord] = {}
        self.problems: list[str] = []
        self.vllm_version: str | None = None
        self.transformers: dict[str, Any] = {"state": "vllm has not been imported"}
        self.fingerprint: str | None = None
        #: `world` and `rank` of this process, and the `result` of the comparison; None where there is one rank.
        self.agreement: dict[str, Any] | None = None
        #: vLLM's loop that this process is in (overlay/engine/loops.py).
        self.loop: str | None = None

    def open(self, folder: str) -> None:
        """Name the file, and remove those of processes that are gone. If the folder cannot be used, log a WARNING."""
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            own_folder.check_own_folder(folder)
            self._name_file(folder)
            self.write()
            if self._path is not None:
                _remove_stale(folder, os.stat(self._path).st_mtime)
        except OSError as error:
            self._path = None
            logger.warning("overlay: no journal, %s cannot be used: %s", folder, error)
            return
        atexit.register(self.write)
        os.register_at_fork(after_in_child=self._after_fork)

    @property
    def folder(self) -> str | None:
        """The folder of this process's journal, which other processes share. None if it has none."""
        return os.path.dirname(self._path) if self._path is not None else None

    def patch(self, name: str) -> PatchRecord:
        return self.patches.setdefault(name, PatchRecord())

    def problem(self, text: str) -> None:
        """Log a problem once, at WARNING, and keep it."""
        if text in self.problems:
            return
        self.problems.append(text)
        logger.warning("overlay: %s", text, extra=fields("problem", problem=text))
        self.write()

    def begin_engine(self) -> None:
        """A worker begins. A process can have several, one after the other; the journal describes the last one."""
        for record in self.patches.values():
            record.begin_engine()

    def note_unseen(self, judge: Callable[[str], Verdict]) -> None:
        """Ask for the verdict of every patch whose target was not imported."""
        for name, record in self.patches.items():
            if record.verdict == NOT_SEEN:
                record.note_source(judge(name))

    def entered(self, loop: str) -> None:
        """Note that this process begins one of vLLM's loops."""
        self.loop = loop
        self.write()
        self.keep_current()

    def keep_current(self) -> None:
        """Start the thread that keeps the file up to date. Call it after this process has forked its children."""
        if self._writer is None and self._path is not None:
            self._writer = threading.Thread(target=self._follow, name="overlay-journal", daemon=True)
            self._writer.start()

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "parent": _parent(),
            "started": self._started,
            "role": role(),
            "overlay": __version__,
            "vllm": self.vllm_version,
            "python": ".".join(map(str, sys.version_info[:3])),
            "transformers": self.transformers,
            "fingerprint": self.fingerprint,
            "agreement": self.agreement,
            "loop": self.loop,
            "problems": list(self.problems),
            "patches": {name: record.as_dict() for name, record in self.patches.items()},
        }

    def write(self) -> None:
        """Write the file if anything has changed, or if the file is gone."""
        path = self._path
        if path is None:
            return
        with self._lock:
            # Compared as objects: with many layers, making text takes milliseconds of the interpreter's time.
            content, now = self.as_dict(), time.monotonic()
            fresh = now - self._written_at < _REFRESH_SECONDS
            if fresh and content == self._written and os.path.exists(path):
                return
            try:
                held = files.replace_and_lock(path, json.dumps(content, indent=1), _TEMPORARY)
            except OSError as error:
                self._path = None
                logger.warning("overlay: the journal stops here, %s cannot be written: %s", path, error)
                return
            self._release()
            self._held, self._written, self._written_at = (held, os.fstat(held)), content, now

    def _name_file(self, folder: str) -> None:
        self._path = os.path.join(folder, process_identity.file_name(process_identity.own()))

    def _release(self) -> None:
        """Close the lock's descriptor. In a forked child this does not unlock the parent's file.

        A program that becomes a daemon closes all of its descriptors, so the number may belong to another file now.
        """
        held, self._held = self._held, None
        if held is None:
            return
        descriptor, file = held
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file):
                os.close(descriptor)

    def _follow(self) -> None:
        while self._path is not None:
            time.sleep(_WRITE_INTERVAL_SECONDS)
            # A counter that gets a new key during the copy raises RuntimeError; the next round writes it.
            with contextlib.suppress(RuntimeError):
                self.write()

    def _after_fork(self) -> None:
        """Give a forked child its own file, counters and thread. Threads do not survive a fork."""
        self._lock = threading.Lock()
        self._started = time.time()
        self._release()
        had_writer, self._writer = self._writer is not None, None
        for record in self.patches.values():
            record.calls = Calls()
        if self._path is not None:
            self._name_file(os.path.dirname(self._path))
            if had_writer:
                self.keep_current()


def _parent() -> int:
    """The number of the process that started this one.

    A process that multiprocessing has started asks multiprocessing. To the kernel, the parent of a fork server's child is
    the fork server, and the parent of an orphan is process 1, which may be another vLLM.
    """
    started_by = multiprocessing.parent_process()
    return os.getppid() if started_by is None or started_by.pid is None else started_by.pid


def _remove_stale(folder: str, now: float) -> None:
    """Remove files of the overlay that are an hour old and belong to no running process. A reader may want the fresh ones.

    `now` is the time by the folder's file system, because hosts that share the folder have different clocks.
    """
    here = process_identity.own()
    for name in os.listdir(folder):
        if not process_identity.is_name(name) and not name.startswith(_TEMPORARY):
            continue
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            information = os.lstat(path)
            is_old = abs(now - information.st_mtime) > _STALE_SECONDS  # abs: a clock may have been set back
            if is_old and stat.S_ISREG(information.st_mode) and not process_identity.runs(path, here):
                os.unlink(path)


journal = OwnJournal()
