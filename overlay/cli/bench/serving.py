"""Real servers under load: `vllm serve` of stock and overlay, `vllm bench serve` at several request rates.

Both servers are alive at once where they fit, and get each rate in turn; else one is measured after the other. Random
prompts and arrivals come from one seed, so both answer the same requests at the same times. A row's ratio is that of the
medians over all requests, its interval a bootstrap over them: requests are not paired, for a server under load makes its
own batches.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.engines import SEED
from overlay.cli.bench.intervals import compare_sets, median, quantile
from overlay.cli.bench.outside.bench_engine.extension import NAME, WEIGHT_SEED
from overlay.cli.bench.results import Results, journal_summary
from overlay.cli.bench.setup import STOCK, WITH_OVERLAY, Setup
from overlay.cli.bench.workers import SCRIPT, tail

if TYPE_CHECKING:
    from overlay.cli.bench.progress import Progress

MODEL_NAME = "bench"
MODULE = ("-m", "vllm.entrypoints.cli.main")
START_SECONDS = 900.0
STOP_SECONDS = 20.0
WARM_UP_REQUESTS = 4
#: What only `vllm.LLM` takes.
NOT_FOR_SERVERS = ("model", "skip_tokenizer_init", "disable_log_stats")


class ServingError(RuntimeError):
    """A server or its client failed; the message ends with the last lines of its log."""


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
            environment[WEIGHT_SEED] = str(seed)
            command += ["--worker-extension-cls", NAME]
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
        self.start_seconds = 0.0

    def wait(self) -> None:
        """Wait until it answers. Raises ServingError where it ends, or the time does."""
        limit = min(START_SECONDS, max(self._setup.remaining(), 30.0))
        while not self._answers():
            if self._process.poll() is not None:
                raise ServingError(f"{self.arm}: the server ended, status {self._process.returncode}\n{tail(self.log)}")
            if time.monotonic() - self.launched > limit:
                raise ServingError(f"{self.arm}: no answer within {limit:.0f} s\n{tail(self.log)}")
            time.sleep(0.3)
        self.start_seconds = time.monotonic() - self.launched

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

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


class Load:
    """What the clients send: so many requests of a size at each rate."""

    def __init__(self, rates: Sequence[float], seconds: float, rounds: int, prompt: int, output: int) -> None:
        self.rates, self.seconds, self.rounds, self.prompt, self.output = rates, seconds, rounds, prompt, output

    def requests(self, rate: float) -> int:
        """As many as arrive in the time of one run, and enough for a median."""
        return max(8, round(rate * self.seconds))


def measure(
    setup: Setup,
    results: Results,
    progress: Progress,
    engine: Mapping[str, Any],
    tokenizer: Path,
    arms: Sequence[str],
    load: Load,
    together: bool,
    seed: int | None = SEED,
) -> None:
    """All rates on the servers of two arms. Results go under `serving`."""
    samples: dict[float, dict[str, list[dict[str, Any]]]] = {rate: {arm: [] for arm in arms} for rate in load.rates}
    runs = [(rate, turn) for rate in load.rates for turn in range(load.rounds)]
    progress.phase("serving", len(arms) * (len(runs) + 1))
    groups = [list(arms)] if together else [[arm] for arm in arms]
    for group in groups:
        if setup.remaining() < 30:
            results.unfinished(f"serving: out of time before {', '.join(group)}")
            return
        with running(setup, results, progress, engine, tokenizer, group, seed) as servers:
            for rate, turn in runs:
                for arm in reversed(group) if turn % 2 else group:
                    if setup.remaining() < load.seconds:
                        results.unfinished(f"serving: out of time before rate {rate:g}, round {turn + 1}, {arm}")
                        return
                    progress.step(f"{arm}, {rate:g} requests/s, round {turn + 1} of {load.rounds}")
                    samples[rate][arm].append(_at_rate(setup, servers[arm], tokenizer, rate, turn, load))
                    results.put("serving", "rows", value=rows_of(samples, arms))
        put_journals(setup, results, group)


def put_journals(setup: Setup, results: Results, arms: Sequence[str], key: str = "serving") -> None:
    """What the servers of these arms have written of themselves, for each that has the overlay. They have ended."""
    for arm in arms:
        if arm in WITH_OVERLAY:
            results.put(key, "journals", arm, value=journal_summary(setup.journal_folder(f"server-{arm}")))


@contextlib.contextmanager
def running(
    setup: Setup,
    results: Results,
    progress: Progress,
    engine: Mapping[str, Any],
    tokenizer: Path,
    arms: Sequence[str],
    seed: int | None,
    key: str = "serving",
) -> Iterator[dict[str, Server]]:
    """The servers of these arms, started one after the other: Triton's autotuning must not run twice at once."""
    servers: dict[str, Server] = {}
    hurry = True
    try:
        for arm in arms:
            progress.step(f"starting {arm}")
            servers[arm] = Server(arm, setup, engine, tokenizer, seed)
            servers[arm].wait()
            results.put(key, "start_seconds", arm, value=servers[arm].start_seconds)
            progress.say(f"{arm} server answers after {servers[arm].start_seconds:.0f} s")
        yield servers
        hurry = False
    finally:
        for server in servers.values():
            server.close(hurry)


def _at_rate(setup: Setup, server: Server, tokenizer: Path, rate: float, turn: int, load: Load) -> dict[str, Any]:
    return run_client(
        setup,
        server,
        tokenizer,
        f"serve-{rate:g}-{turn}-{server.arm}",
        ["--request-rate", f"{rate:g}"],
        sizes=(load.prompt, load.output),
        requests=load.requests(rate),
        warm_up=WARM_UP_REQUESTS,
        seed=1000 + turn,
    )


def run_client(
    setup: Setup,
    server: Server,
    tokenizer: Path,
    name: str,
    load: Sequence[str],
    *,
    sizes: tuple[int, int],
    requests: int,
    warm_up: int,
    seed: int,
) -> dict[str, Any]:
    """One run of `vllm bench serve`: its results file, per request.

    `load` is its flags for arrivals, `sizes` the tokens of a prompt and of an answer, `seed` that of the prompts.
    """
    target = setup.work / "serving" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    log = setup.work / "logs" / f"{name}.log"
    command = [sys.executable, *MODULE, "bench", "serve", "--backend", "vllm", "--host", "127.0.0.1"]
    command += ["--port", str(server.port), "--model", MODEL_NAME, "--tokenizer", str(tokenizer)]
    command += ["--dataset-name", "random", "--random-input-len", str(sizes[0])]
    command += ["--random-output-len", str(sizes[1]), "--num-prompts", str(requests)]
    command += [*load, "--num-warmups", str(warm_up), "--seed", str(seed)]
    command += ["--temperature", "0", "--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
    command += ["--result-dir", str(target.parent), "--result-filename", target.name]
    limit = max(setup.remaining(), 0.0) + 60.0
    with log.open("wb") as file:
        try:
            status: object = subprocess.run(
                command,
                env=setup.environment(STOCK, name),  # the client is the same for both
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    if status != 0 or not target.exists():
        raise ServingError(f"vllm bench serve, {name}: {status}\n{tail(log)}")
    found: dict[str, Any] = json.loads(target.read_text())
    if not found["completed"]:
        raise ServingError(f"{name}: no request was answered: {found['errors'][:1]}\n{tail(server.log)}")
    return found


def seconds_of_requests(run: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of every request that was answered: to its first token, and per token after that."""
    ttft, tpot = [], []
    for first, gaps, count in zip(run["ttfts"], run["itls"], run["output_lens"], strict=True):
        if count < 1:
            continue
        ttft.append(float(first))
        if count > 1:
            tpot.append(sum(gaps) / (count - 1))
    return {"ttft": ttft, "tpot": tpot}


def rows_of(samples: Mapping[float, Mapping[str, Sequence[Mapping[str, Any]]]], arms: Sequence[str]) -> list[Any]:
    """Per rate and metric: medians, 99th percentiles, the ratio with its interval. Seconds."""
    stock, other = arms
    rows = []
    for rate, by_arm in samples.items():
        if not by_arm[stock] or not by_arm[other]:
            continue
        runs = {arm: [seconds_of_requests(run) for run in by_arm[arm]] for arm in arms}
        for metric in ("ttft", "tpot"):
            values = {arm: [value for run in runs[arm] for value in run[metric]] for arm in arms}
            if not all(values.values()):
                continue
            row = {
                "rate": rate,
                "metric": metric,
                "arm": other,
                **compare_sets(values[stock], values[other]).as_dict(),
                "stock_p99": quantile(values[stock], 0.99),
                "overlay_p99": quantile(values[other], 0.99),
                "requests": {arm: len(values[arm]) for arm in arms},
                "failed": {arm: sum(int(run.get("failed") or 0) for run in by_arm[arm]) for arm in arms},
                "requests_per_second": {
                    arm: median([float(run["request_throughput"]) for run in by_arm[arm]]) for arm in arms
                },
            }
            rows.append(row)
    return rows
