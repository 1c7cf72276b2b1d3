"""Real servers: `vllm serve` of each arm, and one process that runs `vllm bench serve` against them again and again.

The client's process lives as long as the servers do: importing vLLM takes longer than most runs. `drive` gives every arm each load in
turn, round by round. In a round all servers use one half of the host's cores and the client the other, in the next round the other way
round: a prompt's time is the host's, and no server keeps a core that is faster or slower than another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.engines import RESERVE_SECONDS
from overlay.cli.bench.outside.bench_engine import weights
from overlay.cli.bench.results import Results, journal_summary
from overlay.cli.bench.setup import STOCK, WITH_OVERLAY, Setup
from overlay.cli.bench.workers import SCRIPT, Worker, WorkerError, halves, move_group, tail

if TYPE_CHECKING:
    from overlay.cli.bench.progress import Progress

MODEL_NAME = "bench"
MODULE = ("-m", "vllm.entrypoints.cli.main")
#: What the client's process runs, by its path.
CLIENT = SCRIPT.with_name("run_client.py")
START_SECONDS = 900.0
STOP_SECONDS = 20.0
LEAST_WARM_UP = 4
#: Requests of a run at least, so that its median means something.
LEAST_REQUESTS = 8
#: Where a server that pools is asked, and the tokens of the prompts whose embeddings are compared.
EMBEDDINGS, PROBES = "/v1/embeddings", (1, 7, 64, 300)
#: What only `vllm.LLM` takes.
NOT_FOR_SERVERS = ("model", "skip_tokenizer_init", "disable_log_stats")


class ServingError(RuntimeError):
    """A server or its client failed; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Load:
    """One run of the client: its flags for arrivals, the tokens of a prompt and of an answer, requests, and requests before it.

    `size` is the load's number in results and file names: clients, or requests per second. `fresh`: each round sends prompts of its own.
    `pools`: the servers answer with embeddings, and `output` says nothing.
    """

    size: float
    flags: tuple[str, ...]
    prompt: int
    output: int
    requests: int
    warm_up: int = LEAST_WARM_UP
    fresh: bool = False
    pools: bool = False


class Server:
    """A `vllm serve` in a session of its own."""

    def __init__(self, arm: str, setup: Setup, engine: Mapping[str, Any], tokenizer: Path, seed: int | None) -> None:
        self.arm, self._setup = arm, setup
        self.log = setup.work / "logs" / f"server-{arm}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        environment = setup.environment(arm, f"server-{arm}", beside=() if seed is None else (SCRIPT.parent,))
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        command = [sys.executable, *MODULE, "serve", engine["model"], "--served-model-name", MODEL_NAME]
        command += ["--tokenizer", str(tokenizer)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *flags(engine)]
        if seed is not None:
            environment[weights.SEED] = str(seed)
            command += ["--worker-extension-cls", weights.EXTENSION]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.log.parent,  # not the repository: a stock server must not find the overlay
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.launched = time.monotonic()
        self.limit = min(START_SECONDS, max(setup.remaining(), 30.0))
        self.start_seconds = 0.0

    def wait(self) -> None:
        """Wait until it answers. Raises ServingError where it ends, or the time that was left when it was launched does."""
        while not self._answers():
            if self._process.poll() is not None:
                raise ServingError(f"{self.arm}: the server ended, status {self._process.returncode}\n{tail(self.log)}")
            if time.monotonic() - self.launched > self.limit:
                raise ServingError(f"{self.arm}: no answer within {self.limit:.0f} s\n{tail(self.log)}")
            time.sleep(0.3)
        self.start_seconds = time.monotonic() - self.launched

    def move(self, cores: set[int]) -> None:
        """Let all its processes run on these cores only."""
        move_group(self._process.pid, cores)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def embeddings(self) -> list[str]:
        """The embeddings of some fixed prompts, one request after the other, as vLLM writes their bits. Raises ServingError."""
        found = []
        for length in PROBES:
            prompt = [2 + (length * 31 + place * 17) % 400 for place in range(length)]
            body = {"model": MODEL_NAME, "input": prompt, "encoding_format": "base64"}
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.port}{EMBEDDINGS}",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    found += [str(one["embedding"]) for one in json.load(answer)["data"]]
            except OSError as error:
                raise ServingError(f"{self.arm}: no embedding of {length} tokens: {error}\n{tail(self.log)}") from error
        return found

    def close(self, hurry: bool = False) -> None:
        """Stop it, then end whatever of its session is left."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0 if hurry else STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def flags(engine: Mapping[str, Any]) -> list[str]:
    """Arguments of `vllm.LLM` as flags of `vllm serve`."""
    found: list[str] = []
    for name, value in engine.items():
        if name in NOT_FOR_SERVERS:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


@dataclass(frozen=True)
class Fleet:
    """What the servers of all arms have in common. `key` is where their results go.

    `engine` has arguments of `vllm.LLM`. `at_once` starts the servers of a group together (`Setup.start_in_order`). `seed` is that of
    random weights, None for a checkpoint's own.
    """

    setup: Setup
    results: Results
    progress: Progress
    engine: Mapping[str, Any]
    tokenizer: Path
    seed: int | None
    key: str
    at_once: bool = False

    def drive(
        self, schedule: Sequence[tuple[Sequence[str], range]], loads: Sequence[Load]
    ) -> Iterator[tuple[Load, str, int, dict[str, Any]]]:
        """Each load on each arm in every round: load, arm, round and what the client has written.

        `schedule` says which servers are alive for which rounds. Ends early, and says so in the results, where the time is over.
        """
        setup, results, progress = self.setup, self.results, self.progress
        cores = halves(os.sched_getaffinity(0))
        runs = sum(len(alive) * (len(rounds) * len(loads) + 1) for alive, rounds in schedule)
        progress.phase(self.key, runs)
        total = 1 + max((rounds[-1] for _, rounds in schedule), default=0)
        for alive, rounds in schedule:
            if setup.remaining() < 2 * RESERVE_SECONDS:
                results.unfinished(f"{self.key}: out of time before {', '.join(alive)}")
                return
            with self._client() as client, self._running(alive) as servers:  # the client imports meanwhile
                for turn in rounds:
                    ours, others = cores[turn % len(cores)], cores[(turn + 1) % len(cores)]
                    client.move(others)
                    for server in servers.values():
                        server.move(ours)
                    for load in loads:
                        for arm in reversed(alive) if turn % 2 else alive:
                            what = f"{self.key} {load.size:g}, {arm}, round {turn + 1}"
                            if setup.remaining() < 2 * RESERVE_SECONDS:
                                results.unfinished(f"out of time before {what}")
                                return
                            progress.step(f"{what} of {total}")
                            found = self._run(client, servers[arm], load, turn)
                            if found.get("failed"):
                                results.problem(f"{what}: {found['failed']} requests have failed")
                            yield load, arm, turn, found

    @contextlib.contextmanager
    def _running(self, arms: Sequence[str]) -> Iterator[dict[str, Server]]:
        servers: dict[str, Server] = {}
        hurry = True

        def start(arm: str) -> None:
            servers[arm] = Server(arm, self.setup, self.engine, self.tokenizer, self.seed)

        with self.setup.in_turn() as alone:
            try:
                self.setup.start_in_order(arms, self.at_once, start, lambda arm: self._wait(servers[arm]))
                alone()
                yield servers
                hurry = False
            finally:
                for server in servers.values():
                    server.close(hurry)
                for arm in servers:
                    if arm in WITH_OVERLAY:  # now it has written what it says of itself
                        summary = journal_summary(self.setup.journal_folder(f"server-{arm}"))
                        self.results.put(self.key, "journals", arm, value=summary)

    def _wait(self, server: Server) -> None:
        self.progress.step(f"starting {server.arm}")
        server.wait()
        self.setup.mark_triton_warm()
        self.results.put(self.key, "start_seconds", server.arm, value=server.start_seconds)
        self.progress.say(f"{server.arm} server answers after {server.start_seconds:.0f} s")

    @contextlib.contextmanager
    def _client(self) -> Iterator[Worker]:
        environment = self.setup.environment(STOCK, "client")  # the client is the same for all arms
        client = Worker("vllm bench serve", environment, self.setup.work / "logs" / "client.log", CLIENT)
        try:
            yield client
        finally:
            client.close()

    def _run(self, client: Worker, server: Server, load: Load, turn: int) -> dict[str, Any]:
        """One run of `vllm bench serve`: its results file, per request, and `answers`: texts, or embeddings."""
        target = self.setup.work / "serving" / f"{self.key}-{load.size:g}-{turn}-{server.arm}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        kind = ["--backend", "openai-embeddings", "--endpoint", EMBEDDINGS] if load.pools else ["--backend", "vllm"]
        command = [*kind, "--host", "127.0.0.1", "--port", str(server.port)]
        command += ["--model", MODEL_NAME, "--tokenizer", str(self.tokenizer)]
        command += ["--dataset-name", "random", "--random-input-len", str(load.prompt)]
        command += ["--random-output-len", str(load.output), "--num-prompts", str(load.requests)]
        command += [*load.flags, "--num-warmups", str(load.warm_up), "--seed", str(1000 + turn * load.fresh)]
        command += [] if load.pools else ["--temperature", "0", "--ignore-eos"]
        command += ["--disable-tqdm", "--save-result", "--save-detailed"]
        command += ["--result-dir", str(target.parent), "--result-filename", target.name]
        try:
            client.call("serve", max(self.setup.remaining(), 0.0) + 60.0, arguments=command)
        except WorkerError as error:
            raise ServingError(f"{error}\n{tail(client.log)}") from error
        found: dict[str, Any] = json.loads(target.read_text())
        if not found["completed"]:
            raise ServingError(f"{target.stem}: no request was answered: {found['errors'][:1]}\n{tail(server.log)}")
        if load.pools:
            return {**found, "failed": load.requests - found["completed"], "answers": server.embeddings()}
        return {**found, "answers": found["generated_texts"]}


def seconds_of_requests(run: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of every request that was answered: to its first token, and per token after that; of a run that pools, per embedding."""
    if "ttfts" not in run:
        return {"ttft": [], "tpot": [], "embedding": [float(run["duration"]) / int(run["completed"])]}
    ttft, tpot = [], []
    for first, gaps, count in zip(run["ttfts"], run["itls"], run["output_lens"], strict=True):
        if count < 1:
            continue
        ttft.append(float(first))
        if count > 1:
            tpot.append(sum(gaps) / (count - 1))
    return {"ttft": ttft, "tpot": tpot, "embedding": []}
