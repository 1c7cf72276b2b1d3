"""One engine per process, driven over pipes: JSON lines in on standard input, JSON lines out on its own descriptor.

vLLM's log goes to a file. The process's side of this is in outside/bench_engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.outside.bench_engine.replies import REPLY_DESCRIPTOR

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

#: What an engine's process runs, by its path.
SCRIPT = Path(__file__).resolve().parent / "outside" / "run_worker.py"


class WorkerError(RuntimeError):
    """The worker answered with an error, ended, or did not answer in time."""


class Worker:
    """The controller's side of one worker process."""

    def __init__(self, side: str, environment: Mapping[str, str], log: Path, *script: Path) -> None:
        """`script` is what the process runs, and its arguments: SCRIPT where nothing is given."""
        self.side = side
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        self._log_file = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, *map(str, script or (SCRIPT,))],
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            env={**environment, REPLY_DESCRIPTOR: str(write_end)},
            cwd=log.parent,  # not the repository: an empty entry of sys.path must not find the overlay
            start_new_session=True,  # Ctrl-C is the controller's business; vLLM's own processes end with this one
        )
        os.close(write_end)
        self._reply = read_end
        self._buffer = b""

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command; `receive` gives its answer."""
        if self._process.stdin is None:
            raise WorkerError(f"{self.side}: no pipe")
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._ended()) from error

    def receive(self, timeout: float = 600.0) -> Any:
        """Wait for the answer to the last command."""
        limit = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            rest = limit - time.monotonic()
            ready = select.select([self._reply], [], [], max(0.0, rest))[0]
            if not ready:
                raise WorkerError(f"{self.side}: no answer within {timeout:.0f} s (log: {self.log})")
            piece = os.read(self._reply, 1 << 20)
            if not piece:
                raise WorkerError(self._ended())
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.side}: {answer['error']}")
        return answer["result"]

    def move(self, cores: set[int]) -> None:
        """Let the process, and those that vLLM has started in it, run on these cores only."""
        move_group(self._process.pid, cores)

    def call(self, command: str, timeout: float = 600.0, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        self.send(command, **arguments)
        return self.receive(timeout)

    def close(self, timeout: float = 20.0) -> None:
        """End the process, politely first, and whatever vLLM has started in it."""
        if self._process.poll() is None:
            try:
                self.send("quit")
                self._process.wait(timeout)
            except (WorkerError, subprocess.TimeoutExpired):
                pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log_file.close()
        if self._reply >= 0:
            os.close(self._reply)
            self._reply = -1

    def _ended(self) -> str:
        self._process.wait()
        return f"{self.side}: the worker ended with status {self._process.returncode}\n{tail(self.log)}"


def in_turn(workers: Mapping[str, Worker], command: str, turn: int, limit: float, **arguments: Any) -> dict[str, Any]:
    """One worker's answer after the other's, each within `limit` seconds; the others are idle meanwhile.

    `turn` shifts who is first, and on which half of the cores all of them are: a worker that kept a core faster or slower
    than another's would be taken for a faster or slower one.
    """
    cores = halves(os.sched_getaffinity(0))
    for worker in workers.values():
        worker.move(cores[turn % len(cores)])
    sides = list(workers)
    shift = turn % len(sides)
    return {side: workers[side].call(command, limit, **arguments) for side in sides[shift:] + sides[:shift]}


def halves(cores: Iterable[int]) -> list[set[int]]:
    """The cores in two halves, or all of them where a half would be a single core."""
    ordered = sorted(cores)
    half = len(ordered) // 2
    return [set(ordered[:half]), set(ordered[half:])] if half >= 2 else [set(ordered)]


def move_group(group: int, cores: set[int]) -> None:
    """Let all processes of a process group run on these cores only."""
    for thread in _threads_of_group(group):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.sched_setaffinity(thread, cores)


def _threads_of_group(group: int) -> Iterator[int]:
    """The threads of all processes of a process group."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getpgid(int(process.name)) == group:
                yield from (int(thread.name) for thread in (process / "task").iterdir())


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log, for an error message."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
