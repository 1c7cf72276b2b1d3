"""``check --measure``: what a decode step of a checkpoint would gain on this GPU, by the plan's own measurement.

vLLM and torch are in a process of their own (`pair_worker.py`), which builds each pair of vLLM's linears with random weights.

What is added under a group (``"measured"``)::

    {"device": "NVIDIA H200", "pair": "2048 to 12288 (…) + 64 (…), torch.bfloat16", "seconds": 2.4,
     "bytes_per_second": 4.1e12,
     "rows": [{"tokens": 8, "us": {"serial": 13.9, "dual": 9.1}, "strategy": "dual", "gain_us": 4.8, "step_gain_us": 144.0,
               "step_percent": [1.6, 4.9] | null}]}

or ``{"device": "…", "stock": "why its layers stay stock, by vLLM's own linears"}``. `us` are per layer; `step_gain_us` is of all
layers of the group.

The rest of the step is a model (`step_us`). It is of the GPU alone: where the host is the limit, nothing is gained.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench import memory
from overlay.cli.bench.results import REPOSITORY
from overlay.cli.bench.shapes import Model
from overlay.cli.bench.workers import SCRIPT, Worker, WorkerError
from overlay.cli.checkpoint import CONFIG, EXPERT_COUNTS, MODELOPT_CONFIG, Checkpoint, Group, Shape
from overlay.cli.failure import CommandError
from overlay.vocabulary import SERIAL

if TYPE_CHECKING:
    from rich.console import Console

#: Of vLLM's reason.
MOST_LETTERS = 500
COMMANDS = Path(__file__).with_name("pair_worker.py")
NO_GPU = "--measure needs an NVIDIA GPU, and {}; without one nothing runs at the same time, so nothing can be gained"
#: Microseconds per layer of a decode step beyond what it reads (see `step_us`): short kernels, and the gaps between them. Between 57
#: and 179 in every timeline of stock in benchmarks/results/h200-vllm-0.33.0-formats and -followers (H200; 7 formats; hidden
#: 2048 and 5120, and a TP-4 shard; 1, 8 and 64 requests) if a copy has 4.2 TB/s; wider here, because that was not measured.
BEYOND_US = (30.0, 190.0)
#: The most tokens of those timelines. Nothing is said of larger steps.
MOST_TOKENS = 64


def measure(found: Checkpoint) -> Checkpoint:
    """`found` with `measured` in each group that has a shape.

    Raises CommandError without a GPU, or for a configuration without the sizes of a step; WorkerError where vLLM fails.
    """
    if not memory.visible(memory.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        raise CommandError(NO_GPU.format("none is visible here"))
    shapes = [group.shape for group in found.groups if group.shape is not None]
    if not shapes:
        return found
    _check_sizes(found, shapes[0])
    with opened(found) as (worker, machine):
        if machine["device"] is None:
            raise CommandError(NO_GPU.format("this Python's torch sees none"))
        groups = [replace(group, measured=_of_group(found, group, worker, machine)) for group in found.groups]
    return replace(found, groups=tuple(groups))


@contextlib.contextmanager
def opened(found: Checkpoint) -> Iterator[tuple[Worker, Mapping[str, Any]]]:
    """A process with vLLM that has read this configuration, and what it says of its machine.

    Where vLLM fails, its log is kept, and the WorkerError says why in one line and names it.
    """
    work = Path(tempfile.mkdtemp(prefix="vllm-overlay-measure-"))
    environment = {**os.environ, "VLLMOVERLAY": "0", "HF_HUB_OFFLINE": "1"}
    places = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *places])
    worker = Worker("vLLM", environment, work / "vllm.log", SCRIPT, COMMANDS)
    keep = False
    try:
        yield worker, worker.call("open", model=str(_folder(found, work)), sees="vision_config" in found.config.content)
    except WorkerError as error:
        keep = True
        raise WorkerError(f"{' '.join(str(error).split())[:MOST_LETTERS]} (log: {worker.log})") from error
    finally:
        worker.close()
        if not keep:
            shutil.rmtree(work)


def _folder(found: Checkpoint, work: Path) -> Path:
    """What vLLM takes as its model."""
    file = found.config.file
    if file.name == CONFIG:
        return file.parent.absolute()
    (work / CONFIG).write_text(json.dumps(found.config.content))
    beside = file.parent / MODELOPT_CONFIG
    if beside.is_file():
        shutil.copy(beside, work)
    return work


def _of_group(found: Checkpoint, group: Group, worker: Worker, machine: Mapping[str, Any]) -> Mapping[str, Any] | None:
    shape = group.shape
    if shape is None:
        return None
    answer = worker.call(
        "measure", patch=group.patch, layers=shape.layers, hidden=shape.hidden, main=shape.main, side=shape.side
    )
    for row in answer.get("rows", ()):
        row["gain_us"] = round(row["us"][SERIAL] - row["us"][row["strategy"]], 2)
        row["step_gain_us"] = round(row["gain_us"] * group.layers, 1)
        row["step_percent"] = None
        if row["tokens"] <= MOST_TOKENS:
            low, high = step_us(found.config.text, shape.bits, row["tokens"], found.shards, machine["bytes_per_second"])
            row["step_percent"] = [round(100 * row["step_gain_us"] / step, 2) for step in (high, low)]
    return {**machine, **answer}


# ---------------------------------------------------------------- a model of the step


def step_us(
    text: Mapping[str, Any], bits: tuple[int, int], tokens: int, shards: int, bytes_per_second: float
) -> tuple[float, float]:
    """The least and the most microseconds of GPU time that a decode step of `tokens` requests takes in stock.

    What it reads at the speed of a copy, and for each layer something between the two of BEYOND_US. Not in it, so a step may be
    longer: the KV cache of long contexts, and the all-reduces of several ranks.
    """
    reads = step_bytes(text, bits, tokens, shards) / bytes_per_second * 1e6
    least, most = (reads + beyond * text["num_hidden_layers"] for beyond in BEYOND_US)
    return least, most


def step_bytes(text: Mapping[str, Any], bits: tuple[int, int], tokens: int, shards: int) -> float:
    """What one rank reads in a decode step: weights, and the states of linear attention, which are also written.

    Of routed experts as many as `tokens` tokens choose on average, if each chooses evenly and for itself. Scales, norms and
    convolutions are too small to matter.
    """
    counts = next((field for field in EXPERT_COUNTS if text.get(field)), None)
    if counts is not None:
        experts = text[counts]
        left = (1 - text.get("num_experts_per_tok", 1) / experts) ** tokens
        text = {**text, counts: max(1, round(experts * (1 - left)))}
    model = Model("", text)
    _, projections, feed_forward = memory.parameters_by_kind(model)
    head = text["vocab_size"] * text["hidden_size"] * memory.WIDTH
    states = 2 * tokens * model.linear_layers() * memory.state_bytes(text)
    return float(head + (projections * bits[0] + feed_forward * bits[1]) / 8 + states) / shards


def _check_sizes(found: Checkpoint, shape: Shape) -> None:
    try:
        step_bytes(found.config.text, shape.bits, MOST_TOKENS, found.shards)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CommandError(
            f"--measure: {found.path}: the size of a step cannot be told ({type(error).__name__}: {error}); allowed is a "
            "configuration with all sizes of its layers, as numbers"
        ) from error


# ---------------------------------------------------------------- for people


def show(found: Checkpoint, console: Console) -> None:
    """A table for each measured group: powers of two of tokens."""
    from rich import box
    from rich.table import Table

    from overlay.cli.output import visible

    groups = [group for group in found.groups if group.measured is not None]
    for group in groups:
        told = group.measured or {}
        if "stock" in told:
            line = f"{group.patch}: by vLLM's own linears its {group.layers} layers stay stock on this {told['device']}: {told['stock']}"
            console.print(visible(line), soft_wrap=True)
            continue
        line = f"{group.patch}, measured on this {told['device']} in {told['seconds']:.1f} s with random weights: {told['pair']}"
        console.print(visible(line), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("tokens", "serial", "best", "its strategy", "gain", "gain of a step", "percent of a step"):
            table.add_column(name, no_wrap=True, justify="left" if name == "its strategy" else "right")
        for row in told["rows"]:
            times, strategy, percent = row["us"], row["strategy"], row["step_percent"]
            if row["tokens"] & (row["tokens"] - 1):
                continue
            share = "" if percent is None else f"{percent[0]:.1f} to {percent[1]:.1f}"
            numbers = (times[SERIAL], times[strategy], row["gain_us"], row["step_gain_us"])
            serial, best, gain, step = (f"{number:.1f}" for number in numbers)
            table.add_row(str(row["tokens"]), serial, best, strategy, gain, step, share)
        console.print(table)
        console.print(
            f"µs per layer, and of a step's {group.layers} layers. Percent is of the step's GPU time: what it reads at this GPU's "
            f"{told['bytes_per_second'] / 1e12:.2f} TB/s, and {BEYOND_US[0]:.0f} to {BEYOND_US[1]:.0f} µs a layer more; up to "
            f"{MOST_TOKENS} tokens, short contexts{', all-reduces not counted' if found.shards > 1 else ''}.",
            soft_wrap=True,
        )
    if not groups:
        console.print("nothing to measure: no group of layers with two linears applies", soft_wrap=True)
