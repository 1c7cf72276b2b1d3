"""What this process applied, traced, called, refused and why: one JSON file per process.

"Applied" in a log is a claim. The journal holds the proof: how often the op was seen by the compiler (fake), how often
it ran on two streams, and how often serially and why. Counters are plain integers; the hot path makes no system call.
Milestones write the file at once; once layers are patched, a daemon thread writes it again when it has changed, so that
the file is good even after a kill -9.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from overlay import __version__, files, safety
from overlay.log import fields, logger

SCHEMA = 1
NOT_SEEN = "not seen"  #: the state of a patch whose target this process has not imported
OFF = "off"  #: the state of a patch that is switched off
#: Roles of processes that nobody's multiprocessing has started.
API_SERVER = "APIServer"
MAIN = "Main"
RAY_WORKER = "RayWorker"
_WRITE_INTERVAL_SECONDS = 1.0
_STALE_SECONDS = 3600.0


@dataclass
class Calls:
    """How often a custom op was called, by strategy."""

    fake: int = 0
    lowered: int = 0  #: places in compiled graphs that got stock's calls back (overlay.side_work.lowering)
    dual_stream: int = 0
    fused: int = 0
    serial: dict[str, int] = field(default_factory=dict)

    def count_serial(self, reason: str) -> None:
        self.serial[reason] = self.serial.get(reason, 0) + 1

    def total(self) -> int:
        return self.dual_stream + self.fused + sum(self.serial.values())


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
    #: What was measured, or read from disk, for each shape of this patch's layers (overlay.side_work.pairs).
    plans: list[dict[str, Any]] = field(default_factory=list)
    #: Whether vLLM's own warm-up has to have called the op; else the first step has to.
    runs_in_warm_up: bool = True

    def refuse(self, layer_name: str, reason: str) -> None:
        """A layer stays stock. The worker's summary counts layers by reason; names are for those who debug."""
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
                "fused": self.calls.fused,
                "serial": dict(self.calls.serial),
            },
        }


def role() -> str:
    """What this process is in a running vLLM, from what vLLM calls it."""
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
        return "ModelRegistryProbe"
    return MAIN


class Journal:
    """The record of one process, and its file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: str | None = None
        self._writer: threading.Thread | None = None
        self._written: str | None = None
        self._started = time.time()
        self.patches: dict[str, PatchRecord] = {}
        self.problems: list[str] = []
        self.vllm_version: str | None = None
        self.transformers: dict[str, Any] = {"state": "vllm has not been imported"}
        self.fingerprint: str | None = None
        #: `world` and `rank` of this process, and the `result` of the comparison; None where there is one rank.
        self.agreement: dict[str, Any] | None = None
        #: vLLM's loop that this process is in, with room for its frames (overlay/frame_stack.py).
        self.loop: str | None = None

    def open(self, folder: str) -> None:
        """Name the file and clean up after processes that are gone. A folder that cannot be used costs a WARNING."""
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            safety.check_own_folder(folder)
            _remove_stale(folder)
            self._path = os.path.join(folder, f"{os.getpid()}-{int(self._started)}.json")
            self.write()
        except OSError as error:
            self._path = None
            logger.warning("overlay: no journal, %s cannot be used: %s", folder, error)
            return
        atexit.register(self.write)
        os.register_at_fork(after_in_child=self._after_fork)

    @property
    def folder(self) -> str | None:
        """Where this process's journal is, beside those of the others; None while it has none."""
        return os.path.dirname(self._path) if self._path is not None else None

    def patch(self, name: str) -> PatchRecord:
        return self.patches.setdefault(name, PatchRecord())

    def problem(self, text: str) -> None:
        """Say it once, at WARNING, and keep it."""
        if text in self.problems:
            return
        self.problems.append(text)
        logger.warning("overlay: %s", text, extra=fields("problem", problem=text))
        self.write()

    def entered(self, loop: str) -> None:
        """This process begins with a loop of vLLM's."""
        self.loop = loop
        self.write()

    def keep_current(self) -> None:
        """From now on the file follows the counters. Called when the first layer of this process is patched."""
        if self._writer is None and self._path is not None:
            self._writer = threading.Thread(target=self._follow, name="overlay-journal", daemon=True)
            self._writer.start()

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "parent": os.getppid(),
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
        """Write the file if anything has changed."""
        path = self._path
        if path is None:
            return
        with self._lock:
            text = json.dumps(self.as_dict(), indent=1)
            if text == self._written:
                return
            try:
                files.replace(path, text, ".journal-")
                self._written = text
            except OSError as error:
                self._path = None
                logger.warning("overlay: the journal stops here, %s cannot be written: %s", path, error)

    def _follow(self) -> None:
        while self._path is not None:
            time.sleep(_WRITE_INTERVAL_SECONDS)
            # A counter that gets a new key while it is copied raises RuntimeError; the next round has it.
            with contextlib.suppress(RuntimeError):
                self.write()

    def _after_fork(self) -> None:
        """A forked child is a process of its own: own file, own counters, and threads do not survive a fork."""
        self._lock = threading.Lock()
        self._started = time.time()
        had_writer, self._writer = self._writer is not None, None
        for record in self.patches.values():
            record.calls = Calls()
        if self._path is not None:
            self._path = os.path.join(os.path.dirname(self._path), f"{os.getpid()}-{int(self._started)}.json")
            if had_writer:
                self.keep_current()


def _remove_stale(folder: str) -> None:
    """Remove journals whose process is gone for an hour; a reader may still want the fresh ones."""
    now = time.time()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        process_id = name.partition("-")[0]
        if not name.endswith(".json") or not process_id.isdigit():
            continue
        with contextlib.suppress(OSError):
            if now - os.stat(path).st_mtime > _STALE_SECONDS and not _alive(int(process_id)):
                os.unlink(path)


def _alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


journal = Journal()
