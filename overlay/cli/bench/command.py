"""``bench``: stock and overlay measured against each other on this machine. The method is in docs/benchmarks.md.

``results.json`` (schema 2; times in seconds; written after every step)::

    {"schema": 2, "command": ["…"], "cpu": false, "overlay": {"version", "commit", "source"}, "host": {"gpu", "kernel", "date", …},
     "versions": {"vllm", "torch"},
     "model": {"name", "format", "layers", "linear_attention_layers", "tensor_parallel", "checkpoint"}, "memory": {…},
     "pair": {"stock": {"vllm", "torch", "compile_seconds", "build_seconds", "counters", …}, "overlay": {…},
              "weights_equal": true, "started_together": false, "journals": {"overlay": […]}},
     "tokens": [{"case", "requests", "generated", "distinct", "stock_repeats_itself", "stock_repeats_logprobs",
                 "stock_asked", "stock_answers",
                 "arms": {"overlay": {"different_requests", "first_difference", "logprobs_equal", "one_of_stocks"}}, …}],
     "decode": [{"requests", "rounds", "stock", "overlay", "ratio", "low", "high",
                 "arms": {"overlay": {"seconds", "ratio", "low", "high"}},
                 "against": {"serial": {"ratio", "low", "high"}}}],
     "first_token": [{"prompt", … as decode …}], "host_speed": {"Python": {… as decode …}, …},
     "timeline": [{"requests", "arms": {…}}],
     "serving": {"rows": [{"rate", "metric": "ttft" | "tpot", "arm", "stock", "overlay", "ratio", "low", "high",
                           "stock_p99", "overlay_p99", …}], "start_seconds": {…}},
     "concurrency": {"rows": [{"requests", "metric": "tpot" | "ttft" | "embedding", … as decode …}], "answers": […], …},
     "problems": ["…"], "unfinished": ["…"], "interrupted": true}

`ratio` is the median of the paired rounds' ratios to stock, `low` and `high` its interval. `interval` is "bca" (95 %), "t" (95 %, of
two to five rounds; before commit 7a1257d those have their range) or "range" (of one round, or of equal ones). Results before 2026-11-29 have
no `interval`: theirs is a percentile bootstrap. The fields beside `arms` are those of the arm `overlay`. `against` is the overlay to
another arm. Only with `--phases timeline` is there `timeline`, in microseconds; timeline.py says what its rows hold. closed_loop.py says
it of `concurrency`.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli import vllms
from overlay.cli.bench import closed_loop, engines, formats, memory, report, serving, shapes, timeline
from overlay.cli.bench.engines import Engines
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import REPOSITORY, Results, different
from overlay.cli.bench.servers import Fleet, ServingError
from overlay.cli.bench.setup import ARMS, OVERLAY, STOCK, WITH_OVERLAY, Setup, has_flashinfer
from overlay.cli.bench.workers import WorkerError
from overlay.cli.failure import CommandError, without_credentials
from overlay.cli.options import parse_words

if TYPE_CHECKING:
    from rich.console import Console

    from overlay.cli.bench.shapes import Model

OK, FAULT, INCOMPLETE = 0, 1, 3
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPTS = (8, 128, 512, 2048, 8192)
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: The fewest requests that an engine must be able to run together, for prompts of mixed lengths.
LEAST_REQUESTS = 16
#: Tokens of one step at most: longer prompts are prefilled in pieces, as a server does.
PREFILL_TOKENS = 8192
#: Only checked when an engine starts, for its cache has a size of its own; small, so that the last arm passes, too.
MEMORY_UTILIZATION = 0.05
PHASES = ("tokens", "ttft", "decode", "serving")
#: What --phases may name beside: a profiler's trace of decode steps.
ALL_PHASES = (*PHASES, "timeline")


@dataclass(frozen=True)
class Effort:
    """How often everything is measured."""

    tokens: int
    decode_passes: int
    decode_rounds: int
    decode_steps: int
    first_token_rounds: int
    first_token_repetitions: int
    serving_seconds: float
    serving_rounds: int
    loop_rounds: int
    loop_waves: int


FULL = Effort(32, 3, 6, 64, 10, 3, 30.0, 2, 6, 4)
QUICK = Effort(16, 1, 5, 16, 4, 2, 8.0, 1, 3, 2)
#: Engine arguments that the bench gives itself.
OWN_ARGUMENTS = ("worker_extension_cls",)


@dataclass(frozen=True)
class Options:
    """What was asked for. None: chosen here."""

    model: str | None = None
    format: str = formats.DEFAULT
    layers: int | None = None
    tensor_parallel: int = 1
    arms: tuple[str, ...] = (STOCK, OVERLAY)
    phases: tuple[str, ...] = PHASES
    batches: tuple[int, ...] | None = None
    prompts: tuple[int, ...] | None = None
    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] | None = None
    capture_sizes: tuple[int, ...] | None = None
    out: Path | None = None
    work: Path | None = None
    budget: float = 7200.0
    quick: bool = False
    together: bool = False
    warm: bool = False
    memory_check: bool = True
    serving_prompt: int = 512
    serving_output: int = 64
    loop_output: int = 128
    ask_stock: int = 2
    in_turn: Path | None = None
    engine: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    overlay_variables: tuple[str, ...] = ()

    @property
    def pools(self) -> bool:
        """Whether the engines pool: they give embeddings and no tokens."""
        return parse_engine(self.engine).get("runner") == "pooling"

    @property
    def alive_at_once(self) -> int:
        """Engines that have to fit beside each other: all arms; one where only servers are asked for, which can take turns."""
        return 1 if set(self.phases) == {"serving"} else len(self.arms)


@dataclass(frozen=True)
class Settled:
    """Everything that is settled before the first engine starts."""

    options: Options
    model: Model
    effort: Effort
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    cpu: bool
    load: memory.Load
    need: memory.Need
    free: int

    def fits(self, servers: int) -> bool:
        """Whether so many servers fit beside each other, or the user says so."""
        return not self.options.memory_check or servers * self.need.total <= self.free

    @property
    def serving_arms(self) -> tuple[str, str]:
        """Stock, and of the others the overlay, or else the first that is not stock again."""
        return STOCK, min(self.options.arms[1:], key=lambda arm: (arm != OVERLAY, arm not in WITH_OVERLAY))


# ---------------------------------------------------------------- before the first engine


def parse_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """`1,2,4` as numbers. Raises CommandError that names the option."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise CommandError(f"{option}={text!r}: allowed are whole numbers from 1 on, separated by commas")
    return tuple(sorted(set(found)))


def parse_rates(text: str | None) -> tuple[float, ...]:
    """`1,4,16` as requests per second."""
    try:
        found = tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if any(not 0.0 < rate < 1e6 for rate in found):
        raise CommandError(f"--rates={text!r}: allowed are requests per second above 0, separated by commas")
    return tuple(sorted(set(found)))


def parse_arms(text: str) -> tuple[str, ...]:
    """The arms; stock is always the first, for it is what the others are compared with."""
    found = parse_words("--arms", text, ARMS)
    others = tuple(arm for arm in found if arm != STOCK)
    if not others:
        raise CommandError(f"--arms={text!r}: one more is needed of {', '.join(arm for arm in ARMS if arm != STOCK)}")
    return (STOCK, *others)


def parse_phases(text: str | None, timeline: bool) -> tuple[str, ...]:
    """What to measure. `timeline` alone is the tokens and the timeline; beside phases it is one more of them."""
    found = parse_words("--phases", text, ALL_PHASES) if text is not None else ("tokens",) if timeline else PHASES
    return (*found, "timeline") if timeline and "timeline" not in found else found


def parse_pairs(option: str, words: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE words."""
    for word in words:
        if "=" not in word.lstrip("="):
            raise CommandError(f"{option} {word!r}: allowed is NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def parse_engine(words: tuple[str, ...]) -> dict[str, Any]:
    """NAME=JSON words: arguments of `vllm.LLM`; what is no JSON is a string. Raises CommandError for what the bench sets itself."""
    found: dict[str, Any] = {}
    for name, value in parse_pairs("--engine", words).items():
        if name in OWN_ARGUMENTS:
            raise CommandError(
                f"--engine {name}={value}: allowed is any other engine argument; bench needs this one itself"
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def check_engine(arguments: Mapping[str, Any]) -> None:
    """Raise CommandError for an argument that this Python's vLLM does not take, by its source."""
    vllm = vllms.find(None, None)
    source = vllms.read(lambda: vllm.tree.read("vllm.engine.arg_utils"), vllm.path)
    fields = re.search(
        r"^class EngineArgs\b.*?(?=^    (?:def |@))", source.text if source else "", re.MULTILINE | re.DOTALL
    )
    known = re.findall(r"^    (\w+):", fields[0] if fields else "", re.MULTILINE)
    for name in arguments if known else ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise CommandError(
                f"--engine {name}: vLLM {vllm.version} has no such engine argument"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )


def settle(options: Options) -> Settled:
    """Look at the machine and the model. Raises CommandError for everything that cannot work."""
    if importlib.util.find_spec("vllm") is None:
        raise CommandError("there is no vLLM in this Python; run it where vLLM is, or put its folder on PYTHONPATH")
    if set(options.phases) == {"serving"} and not (options.rates or options.concurrency):
        raise CommandError("--phases=serving: allowed is to name the servers' load, by --concurrency or --rates")
    if options.pools and (set(options.phases) != {"serving"} or options.rates):
        raise CommandError(
            "--engine runner=pooling: what pools has no tokens; allowed is --phases serving with --concurrency"
        )
    check_engine(parse_engine(options.engine))
    gpus = memory.visible(memory.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    cpu = not gpus
    shards = options.tensor_parallel
    if not cpu and len(gpus) < shards:
        raise CommandError(f"--tensor-parallel={shards}: {len(gpus)} GPU is visible here")
    if cpu:
        place, free = "this CPU (no NVIDIA GPU is visible)", memory.free_host_memory() // shards
    else:
        used = gpus[:shards]
        place = f"{used[0][1]}" if shards == 1 else f"each of {shards} x {used[0][1]}"
        free = min(gpu[2] for gpu in used)
    effort = QUICK if options.quick or cpu else FULL
    batches = options.batches or ((1, 2, 4) if cpu else (1, 8, 64) if options.quick else BATCHES)
    prompts = options.prompts or ((8, 100, 300) if cpu else (8, 128, 2048) if options.quick else PROMPTS)
    tokens = (
        engines.DECODE_PROMPT + engines.DECODE_WARM + engines.decode_tokens(effort.decode_rounds, effort.decode_steps)
    )
    longest = max(*prompts, 300) + effort.tokens  # 300: the longest of the mixed prompts
    if options.rates or options.concurrency:
        longest = max(longest, options.serving_prompt + max(options.serving_output, options.loop_output))
    running = () if set(options.phases) <= {"serving", "ttft"} else batches
    load = memory.Load(
        requests=max(*running, *(options.concurrency or ()), LEAST_REQUESTS),
        request_tokens=tokens,
        prompt=max(longest, tokens),
        prefill=min(PREFILL_TOKENS, max(2048, longest)),
    )
    name = options.model or (shapes.CPU_SHAPE if cpu else shapes.DEFAULT_SHAPE)
    model = shapes.find(name, options.layers).with_format(options.format)
    most = model.text.get("max_position_embeddings")
    if most and load.prompt > int(most):
        raise CommandError(
            f"{model.name} takes {most} tokens at most; the longest --prompts and its answer need {load.prompt}"
        )
    arms = options.alive_at_once
    if options.layers is None and model.checkpoint is None and options.memory_check:
        fitting = memory.largest_layers(model, load, arms, free, shards, cpu)
        model = model if fitting is None else model.with_layers(fitting)
    if options.memory_check:
        need = memory.check(model, load, arms, free, place, shards, cpu)
    else:
        need = memory.need(model, load, shards, cpu)
    return Settled(options, model, effort, batches, prompts, cpu, load, need, free)


def vllm_folders(environ: dict[str, str]) -> str | None:
    """PYTHONPATH without this overlay or another copy of it: what both sides get."""
    places = [place for place in environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    kept = [place for place in places if not (Path(place) / "overlay" / "bootstrap.py").exists()]
    return os.pathsep.join(os.path.abspath(place) for place in kept) or None


def is_installed() -> bool:
    """Whether the overlay is installed in this Python, so that even a stock vLLM loads its plugin."""
    for entry in importlib.metadata.entry_points(group="vllm.general_plugins", name="auxstream_overlay"):
        folder = Path(str(entry.dist.locate_file(""))).resolve() if entry.dist else None
        if folder != REPOSITORY or folder.name in ("site-packages", "dist-packages"):
            return True
    return False


def setup_of(settled: Settled) -> Setup:
    """Folders and environments of this run."""
    options = settled.options
    out = options.out or Path(time.strftime("bench-%Y%m%d-%H%M%S"))
    work = options.work or Path(tempfile.gettempdir()) / f"vllm-overlay-bench-{os.getuid()}"
    variables = parse_pairs("--env", options.variables)
    overlay = parse_pairs("--overlay-env", options.overlay_variables)
    if settled.cpu:
        # There are no streams, and without this the overlay leaves everything as it is.
        overlay.setdefault("VLLMOVERLAY_SERIAL_PASS_THROUGH", "1")
        # Whole GiB, and stronger than the engine's own argument.
        variables.setdefault("VLLM_CPU_KVCACHE_SPACE", str(math.ceil(settled.need.cache / memory.GIB)))
    if (out / "results.json").exists():
        raise CommandError(f"--out={str(out)!r} has results already; allowed is a new folder")
    if options.in_turn is not None:
        try:
            options.in_turn.open("a").close()
        except OSError as error:
            raise CommandError(f"--in-turn={str(options.in_turn)!r} cannot be used: {error.strerror}") from error
    _make("--out", out)
    _make("--work", work)
    return Setup(
        work=work.resolve(),
        out=out.resolve(),
        site=vllm_folders(dict(os.environ)),
        budget=options.budget,
        cpu=settled.cpu,
        tokens=settled.effort.tokens,
        capture_sizes=options.capture_sizes
        or tuple(sorted({*CAPTURE_SIZES, *settled.batches, *(options.concurrency or ())})),
        arms=options.arms,
        variables=variables,
        overlay_environment=overlay,
        turns=options.in_turn,
        flashinfer=has_flashinfer(),
        installed=is_installed(),
    )


def _make(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option}={str(folder)!r} cannot be made: {error}") from error


def engine_arguments(settled: Settled, setup: Setup, folder: Path) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, the same for all arms."""
    changes: dict[str, Any] = {
        "max_model_len": settled.load.prompt + 64,
        "max_num_batched_tokens": settled.load.prefill,
        "max_num_seqs": settled.load.requests,
        "gpu_memory_utilization": MEMORY_UTILIZATION,
        "kv_cache_memory_bytes": settled.need.cache,
    }
    if settled.options.tensor_parallel > 1:
        changes["tensor_parallel_size"] = settled.options.tensor_parallel
    if settled.model.checkpoint is not None:
        changes["load_format"] = "auto"
    changes |= parse_engine(settled.options.engine)
    return setup.arguments(folder, settled.model.also_sees, **changes)


# ---------------------------------------------------------------- the run


def run(options: Options) -> int:
    """Measure, show, and give the exit status: 0, 1 where tokens differ or something failed, 3 where it is incomplete."""
    from overlay.cli import output

    settled = settle(options)
    setup = setup_of(settled)

    def measure(results: Results, progress: Progress) -> None:
        _describe(settled, results, progress)
        _measure(settled, setup, results, progress)

    return conduct(setup, output.console(), measure)


def conduct(
    setup: Setup,
    console: Console,
    measure: Callable[[Results, Progress], None],
    name: str = "results",
    tables: Callable[[dict[str, Any]], Iterable[Any]] = report.tables,
) -> int:
    """Measure into `<name>.json`, show its tables, and give the exit status as `run` does."""
    with _alone(setup.work), Progress(console) as progress, _stoppable():
        results = Results(setup.out / f"{name}.json", progress.problem)
        results.put("command", value=[without_credentials(word) for word in sys.argv])
        results.put("cpu", value=setup.cpu)
        try:
            measure(results, progress)
        except KeyboardInterrupt:
            results.put("interrupted", value=True)
            results.unfinished("interrupted; what was measured before is kept")
        except (WorkerError, ServingError) as error:
            results.problem(str(error))
    report.show(results.data, console, setup.out / "report.txt", tables)
    if not setup.cpu:
        _plots(results.data, setup.out, console)
    console.print(f"results: {setup.out}", soft_wrap=True)
    return status(results.data)


def status(data: dict[str, Any]) -> int:
    """The exit status of a run that has written everything down."""
    if different(data) or data["problems"]:
        return FAULT
    return INCOMPLETE if data["unfinished"] else OK


def _describe(settled: Settled, results: Results, progress: Progress) -> None:
    model, options = settled.model, settled.options
    known = {"vllm": vllms.find(None, None).version, "torch": importlib.metadata.version("torch")}
    results.put("versions", value=known)
    results.put(
        "model",
        value={
            "name": model.name,
            "format": model.format_name,
            "layers": model.layers,
            "linear_attention_layers": model.linear_layers(),
            "tensor_parallel": options.tensor_parallel,
            "checkpoint": str(model.checkpoint) if model.checkpoint else None,
            "config": dict(model.configuration),
        },
    )
    results.put(
        "memory", value={"engine": settled.need.as_dict(), "engines": options.alive_at_once, "free": settled.free}
    )
    if settled.cpu:
        progress.say(f"no NVIDIA GPU is visible. {report.CPU}")
    progress.say(
        f"{model.name}, {model.format_name}, {model.layers} layers; arms {', '.join(options.arms)}; {settled.need.total / memory.GIB:.1f} GiB "
        f"per engine and GPU, {settled.free / memory.GIB:.1f} GiB free"
    )


def _measure(settled: Settled, setup: Setup, results: Results, progress: Progress) -> None:
    options, effort = settled.options, settled.effort
    folder = settled.model.folder(setup.work)
    arguments = engine_arguments(settled, setup, folder)
    results.put("engine", value=arguments)
    seed = None if settled.model.checkpoint is not None else engines.SEED
    serve = "serving" in options.phases and bool(options.rates or options.concurrency)
    phases = [phase for phase in options.phases if phase != "serving"]
    if not options.warm:
        for arm in setup.arms:
            shutil.rmtree(setup.cache_root(arm), ignore_errors=True)
    shutil.rmtree(setup.work / "journals", ignore_errors=True)
    if phases:
        alive = Engines(setup, results, progress)

        def one(phase: str) -> None:
            _phase(phase, settled, alive, _serving_seconds(settled, results) if serve else 0.0)

        alive.run(arguments, options.together, seed, {phase: functools.partial(one, phase) for phase in phases})
        _check_effect(settled, results, results.data["pair"])
    if serve:
        fleet = functools.partial(
            Fleet,
            setup,
            results,
            progress,
            arguments,
            settled.model.tokenizer(setup.work),
            seed,
            at_once=options.together,
        )
        sizes = options.serving_prompt, options.loop_output
        loops = [
            closed_loop.load(clients, effort.loop_waves, *sizes, options.pools) for clients in options.concurrency or ()
        ]
        if loops:
            closed_loop.measure(
                fleet(closed_loop.KEY), options.arms, loops, effort.loop_rounds, settled.fits(len(options.arms))
            )
            _check_effect(settled, results, results.data[closed_loop.KEY])
        sizes = options.serving_prompt, options.serving_output
        rates = [serving.load(rate, effort.serving_seconds, *sizes) for rate in options.rates]
        if rates:
            serving.measure(fleet(serving.KEY), settled.serving_arms, rates, effort.serving_rounds, settled.fits(2))


def _phase(phase: str, settled: Settled, alive: Engines, reserve: float) -> None:
    """One phase on the engines that are alive. `reserve`: seconds that the servers will want afterwards."""
    effort = settled.effort
    if phase == "tokens":
        alive.tokens(settled.batches, settled.prompts, settled.options.ask_stock - 1)
    elif phase == "timeline":
        timeline.measure(alive, settled.batches)
    elif phase == "ttft":
        alive.first_token(settled.prompts, effort.first_token_rounds, effort.first_token_repetitions)
    else:
        passes, rounds = effort.decode_passes, effort.decode_rounds
        cases = [{"requests": count} for count in settled.batches]
        alive.decode(cases, passes, rounds, effort.decode_steps, engines.RESERVE_SECONDS + reserve)


def _check_effect(settled: Settled, results: Results, found: Mapping[str, Any]) -> None:
    """An arm in which nothing was patched measures stock under another name. `found` has the arms' journals."""
    for arm, rows in found.get("journals", {}).items():
        if not any(row["patched"] for row in rows):
            said = "; ".join(found.get("journal_problems", {}).get(arm, ())) or "nothing"
            text = f"{arm}: the overlay has patched no layer, so its times are stock's; its journal's problems: {said}"
            if settled.model.linear_layers():
                results.problem(text)
            else:
                results.unfinished(text)


def _serving_seconds(settled: Settled, results: Results) -> float:
    """What the servers will take: their starts, as long as the engines' own, and the runs."""
    pair = results.data["pair"]
    known = [pair[arm]["build_seconds"] + pair[arm]["import_seconds"] for arm in settled.serving_arms if arm in pair]
    starts = 2 * max(known)
    runs = 2 * len(settled.options.rates) * settled.effort.serving_rounds
    loops = len(settled.options.arms) * len(settled.options.concurrency or ()) * settled.effort.loop_rounds
    return float(starts + (runs + loops) * (settled.effort.serving_seconds + 20.0))


def _plots(data: dict[str, Any], folder: Path, console: Any) -> None:
    from overlay.cli.bench import plots

    try:
        for path in plots.write(data, folder):
            console.print(f"plot: {path}", soft_wrap=True)
    except ModuleNotFoundError as error:
        console.print(f"no plots without {error.name}: pip install {error.name}")


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One run per work folder: two would write into each other's caches."""
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CommandError(f"another bench runs in {work}; give this one a --work of its own") from error
        yield


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: with what there is."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
