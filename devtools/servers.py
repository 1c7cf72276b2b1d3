"""Starts a real `vllm serve`, waits until it answers, and takes the whole process group down again.

    with serve(python, model, overlay=True, folder=folder) as server:
        server.client().completions.create(...)
        server.journals()

`launch` and `wait_until_ready` are the two halves of `serve`, for servers that start side by side. The demo and the
engine tests share this. A stock server and one with the overlay differ in PYTHONPATH and in the overlay's own settings,
and in nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overlay.report import journal_reader as journal_files

if TYPE_CHECKING:
    import openai

ROOT = Path(__file__).resolve().parent.parent
MODEL_NAME = "tiny"
START_TIMEOUT_SECONDS = 300.0
# vLLM itself waits some seconds for its engine when it is asked to stop.
STOP_TIMEOUT_SECONDS = 20.0
HURRIED_STOP_SECONDS = 2.0
# The overlay writes counters about once a second.
JOURNAL_DELAY_SECONDS = 2.5
# A start writes fewer lines than this from one stage to the next.
LOG_LINES = 400
# Packages that environment.py put beside a vLLM it must not change.
BESIDE = ROOT / ".cache" / "beside-gpu-vllm"

SMALL_SERVER = (
    *("--max-model-len", "256"),
    *("--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "256"),
    *("--seed", "0"),
)

# vLLM logs this after it has run the model once, without a KV cache. Triton's kernels are chosen by then.
KV_CACHE_MARK = "KV cache size"
# What vLLM logs on its way up, the last first.
STAGES = (
    ("Application startup complete", "answering"),
    ("init engine", "starting the API"),
    (KV_CACHE_MARK, "first run of the model"),
    ("Loading weights took", "setting up the KV cache"),
    ("Starting to load model", "building the model"),
    ("Initializing a V1 LLM engine", "starting the worker"),
    ("Resolved architecture", "starting the engine core"),
    ("non-default args", "reading the model's configuration"),
    ("", "importing vLLM"),
)

Progress = Callable[[float, str], None]


class ServerError(RuntimeError):
    """The server did not come up or went away; the message ends with the last lines of its log."""


@dataclass
class Server:
    """A server that was launched."""

    base_url: str
    log_path: Path
    journal_folder: Path
    process: subprocess.Popen[bytes]
    launched: float
    # Known once the server is ready.
    start_seconds: float = 0.0
    asked_to_stop: bool = False

    def client(self) -> openai.OpenAI:
        import openai

        # No retries: a request that fails once has to be seen.
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key="none", max_retries=0, timeout=120)

    def journals(self, wait_seconds: float = JOURNAL_DELAY_SECONDS) -> list[journal_files.Journal]:
        """What the processes say of themselves, after they have had the time to write it down."""
        time.sleep(wait_seconds)
        return journal_files.read(self.journal_folder)

    def process_ids(self) -> list[int]:
        """Every process of the server's group."""
        return list(group_members(self.process.pid))

    def cpu_seconds(self) -> float:
        """The CPU time that the server's processes have used so far."""
        return sum(group_members(self.process.pid).values())

    def is_ready(self) -> bool:
        """One look at /health; raises ServerError when there is no process any more that could answer."""
        if self.process.poll() is not None:
            raise self.fail(f"ended with status {self.process.returncode}")
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=5):
                return True
        except OSError:
            return False

    def has_kv_cache(self) -> bool:
        """Whether vLLM has logged that the server has a KV cache, or the server answers; raises ServerError when it has ended."""
        return self.is_ready() or KV_CACHE_MARK in log_tail(self.log_path, LOG_LINES)

    def stage(self) -> str:
        """Where a starting server is, from what it has logged."""
        log = log_tail(self.log_path, LOG_LINES)
        return next((name for mark, name in STAGES if mark in log), STAGES[-1][1])

    def fail(self, what: str) -> ServerError:
        """An error that shows the end of the log."""
        return ServerError(f"vllm serve {what}. {self.log_path} ends:\n{log_tail(self.log_path)}")


def environment(
    overlay: bool, folder: Path, base: Mapping[str, str], extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a server, free of whatever this shell has set for vLLM or the overlay.

    Each server gets compile caches of its own in `folder`: a warm cache on one side would make start times
    incomparable, and a cache shared by both sides is a test of its own.
    """
    kept = {name: value for name, value in base.items() if not name.startswith(("VLLM", "TORCHINDUCTOR_"))}
    # Which GPUs, which libraries: the machine's own business, not this shell's experiments.
    others = [
        place for place in base.get("PYTHONPATH", "").split(os.pathsep) if place and Path(place).resolve() != ROOT
    ]
    places = ([str(ROOT)] if overlay else []) + others + ([str(BESIDE)] if BESIDE.is_dir() else [])
    kept.pop("PYTHONPATH", None)
    if places:
        kept["PYTHONPATH"] = os.pathsep.join(places)
    kept.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_CACHE_ROOT=str(folder / "vllm-cache"),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor-cache"),
    )
    if overlay:
        kept["VLLMOVERLAY_JOURNAL_DIR"] = str(folder / "journals")
    kept.update(extra or {})
    return kept


def cpu_environment() -> dict[str, str]:
    """What makes the CPU build of vLLM small and quick to start."""
    return {
        # GiB; the default is a part of the machine's memory.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Upstream's own switch for its CPU tests: Dynamo traces the model as ever, and the traced graph runs without
        # Inductor's C++ code. That halves the start and needs no compiler on the machine.
        "VLLM_CPU_CI_ENV": "1",
        # A tiny model gains nothing by more threads, and vLLM would bind those of every server to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    """A port that was free a moment ago; vLLM has no way to report one that it chose itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def group_members(group: int) -> dict[int, float]:
    """The processes of a process group, each with the CPU seconds that it and its finished children have used."""
    members = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # The name in parentheses may hold spaces. After it: state, parent, group, …, and the four times.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    members[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return members


@contextlib.contextmanager
def launch(
    python: str,
    model: Path,
    *,
    overlay: bool,
    folder: Path,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
) -> Iterator[Server]:
    """Start `vllm serve` with everything it writes in `folder`, which is emptied first; stop it at the end.

    `env` is laid over the environment of this process without its vLLM settings. On a CPU pass `cpu_environment()` in it,
    and VLLMOVERLAY_SERIAL_PASS_THROUGH=1 if the overlay is to do anything there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "journals").mkdir(parents=True)
    log_path = folder / "server.log"
    port = free_port()
    command = [str(Path(python).with_name("vllm"))]
    if not Path(command[0]).exists():
        command = [python, "-m", "vllm.entrypoints.cli.main"]
    command += ["serve", str(model), "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, *SMALL_SERVER, *args],
            env=environment(overlay, folder, os.environ, env),
            # Not the repository: a server must find the overlay by PYTHONPATH or not at all.
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log_path, folder / "journals", process, time.monotonic())
    try:
        yield server
    except BaseException:
        # Whoever pressed Ctrl-C does not want to wait, and a server that is still starting ignores the polite request.
        _stop(server, HURRIED_STOP_SECONDS)
        raise
    _stop(server, STOP_TIMEOUT_SECONDS)


def wait_until_ready(
    servers: Sequence[Server], on_progress: Progress | None = None, timeout: float = START_TIMEOUT_SECONDS
) -> None:
    """Wait until all of them answer, and note for each how long that took."""

    def is_ready(server: Server) -> bool:
        if ready := server.is_ready():
            server.start_seconds = time.monotonic() - server.launched
        return ready

    _wait(servers, is_ready, on_progress, timeout)


def wait_for_kv_cache(
    server: Server, on_progress: Progress | None = None, timeout: float = START_TIMEOUT_SECONDS
) -> None:
    """Wait until a starting server has a KV cache. One that starts after it reads what Triton has measured for it."""
    _wait([server], Server.has_kv_cache, on_progress, timeout)


def _wait(
    servers: Sequence[Server], is_done: Callable[[Server], bool], on_progress: Progress | None, timeout: float
) -> None:
    waiting = list(servers)
    while True:
        waiting = [server for server in waiting if not is_done(server)]
        if not waiting:
            return
        seconds = time.monotonic() - waiting[0].launched
        if seconds > timeout:
            raise waiting[0].fail(f"did not answer in {timeout:.0f} s")
        if on_progress is not None:
            on_progress(seconds, " | ".join(server.stage() for server in servers))
        time.sleep(0.2)


@contextlib.contextmanager
def serve(
    python: str,
    model: Path,
    *,
    overlay: bool,
    folder: Path,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    on_progress: Progress | None = None,
    timeout: float = START_TIMEOUT_SECONDS,
) -> Iterator[Server]:
    """`launch`, and wait until the server answers."""
    with launch(python, model, overlay=overlay, folder=folder, env=env, args=args) as server:
        wait_until_ready([server], on_progress, timeout)
        yield server


def ask_to_stop(servers: Sequence[Server]) -> None:
    """Begin stopping several servers at once; leaving their `with` blocks waits for the end."""
    for server in servers:
        # Once: a second signal makes vLLM drop everything.
        if not server.asked_to_stop:
            server.asked_to_stop = True
            with contextlib.suppress(ProcessLookupError):
                server.process.send_signal(signal.SIGTERM)


def _stop(server: Server, timeout: float) -> None:
    """Ask the server to stop, then end whatever of its group is left: a worker must not outlive its test."""
    process = server.process
    ask_to_stop([server])
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if group_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
