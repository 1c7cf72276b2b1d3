"""``check``: the verdict of every patch on one vLLM.

JSON (schema 1)::

    {"schema": 1, "overlay": "0.1.0",
     "vllm": {"kind": "installed" | "tree" | "wheel" | "release", "version": "0.33.0" | null, "path": "…"},
     "patches": {"gdn": {"verdict": "apply" | "landed" | "absent" | "drifted" | "inert", "reason": "…",
                         "module": "vllm.…" | null, "class": "…" | null, "methods": ["…"], "where": "file:line" | null,
                         "upstream": {"pull_request": "#41061", "on_by_default": true, "setting": "…"} | null}},
     "drifted": false, "removable": false,
     "model": {"path": "…", "architecture": "…", "format": "fp8, blocks of 128 x 128", "tensor_parallel": 1,
               "groups": [{"patch": "gdn", "layers": 30, "state": "apply" | "stock" | "unknown", "reason": "…",
                           "sizes": {"hidden", "qkvz", "ba"}, "linears": ["…"]}],
               "notes": ["…"], "modes": ["…"]}}

`model` is present only with ``--model``. The state is `unknown` if check does not know the checkpoint's format. `sizes` are
columns per shard (gdn). `linears` are the linears of the group (lora_linear). `modes` are the ways to serve vLLM in which
every layer stays stock; the list is empty if no layer would fork.
With ``--measure`` a group that applies has `measured` as well (overlay.cli.measured has its fields).

`removable` is true if every patch is landed or absent: then the overlay has nothing to do in this vLLM. frame_stack may be
apply, because it works around Python and lands in no vLLM.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay import __version__
from overlay.cli import checkpoint, measured, vllms
from overlay.cli.bench.workers import WorkerError
from overlay.cli.checkpoint import Checkpoint
from overlay.cli.failure import CommandError, say
from overlay.cli.vllms import Vllm
from overlay.patches import registry
from overlay.verdict import Upstream, Verdict
from overlay.vocabulary import DRIFTED, WITH_IT_GOES, loses_by_removal
from overlay.vocabulary import is_removable as nothing_to_do

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
REMOVABLE = "nothing to do in this vLLM: the overlay can be removed"


def run(
    given: str | None,
    as_json: bool,
    cache: Path | None,
    model: str | None = None,
    shards: int = 1,
    lora: bool = False,
    measure: bool = False,
) -> int:
    """Judge one vLLM, and with it a checkpoint where one is named; show both, and give the exit status."""
    if model is None and (lora or shards != 1 or measure):
        raise CommandError("--tp, --lora and --measure go with --model: they are about that checkpoint")
    if measure and given is not None:
        raise CommandError(f"--measure runs the vLLM of this Python, so it does not go with --vllm={given!r}")
    vllm = vllms.find(given, cache)
    verdicts = judge(vllm)
    found = None if model is None else checkpoint.judge(model, verdicts, _sources(vllm), shards, lora)
    if found is not None and measure:
        try:
            found = measured.measure(found)
        except WorkerError as error:
            say(f"error: --measure: {error}\n")
            return 1
    if as_json:
        of_model = {} if found is None else {"model": found.as_dict()}
        print(json.dumps({**as_dict(vllm, verdicts), **of_model}, indent=1))
    else:
        from overlay.cli import output

        console = output.console()
        show(vllm, verdicts, console)
        if found is not None:
            show_checkpoint(found, console)
            if measure:
                measured.show(found, console)
    return int(is_drifted(verdicts))


def _sources(vllm: Vllm) -> Callable[[str], str]:
    """The text of a module of this vLLM; empty where it has none."""

    @functools.cache
    def source_of(module: str) -> str:
        found = vllms.read(lambda: vllm.tree.read(module), vllm.path)
        return found.text if found else ""

    return source_of


def judge(vllm: Vllm) -> dict[str, Verdict]:
    """The verdict of every patch. Raises CommandError where a source cannot be read at all."""
    return {
        patch: vllms.read(lambda patch=patch: registry.judge(patch, vllm.tree), vllm.path)  # type: ignore[misc]
        for patch in registry.TARGET_MODULES
    }


def is_drifted(verdicts: dict[str, Verdict]) -> bool:
    return any(found.state == DRIFTED for found in verdicts.values())


def is_removable(verdicts: dict[str, Verdict]) -> bool:
    """Whether the overlay has nothing to do in this vLLM."""
    return nothing_to_do(_states(verdicts))


def _states(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {patch: found.state for patch, found in verdicts.items()}


def as_dict(vllm: Vllm, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "schema": SCHEMA,
        "overlay": __version__,
        "vllm": {"kind": vllm.kind, "version": vllm.version, "path": vllm.path},
        "patches": {patch: verdict_as_dict(found) for patch, found in verdicts.items()},
        "drifted": is_drifted(verdicts),
        "removable": is_removable(verdicts),
    }


def verdict_as_dict(found: Verdict) -> dict[str, Any]:
    upstream = found.upstream
    return {
        "verdict": found.state,
        "reason": found.reason,
        "module": found.module,
        "class": found.class_name,
        "methods": list(found.methods),
        "where": found.where,
        "upstream": None
        if upstream is None
        else {
            "pull_request": upstream.pull_request,
            "on_by_default": upstream.on_by_default,
            "setting": upstream.setting,
        },
    }


def upstream_text(upstream: Upstream) -> str:
    """Since when vLLM has a way of its own, and what switches it."""
    setting = f"; {upstream.setting}" if upstream.setting else ""
    return f"{upstream.pull_request}, {'on' if upstream.on_by_default else 'off'} by default{setting}"


def show(vllm: Vllm, verdicts: dict[str, Verdict], console: Console) -> None:
    """The same for people."""
    from rich import box
    from rich.table import Table

    from overlay.cli.output import verdict_text, visible

    version = f"vLLM {vllm.version}" if vllm.version else "a vLLM of unknown version"
    console.print(visible(f"{version} ({vllm.kind}): {vllm.path}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("patch", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("why", overflow="fold")
    for patch, found in verdicts.items():
        lines = [found.reason]
        if found.upstream is not None:
            lines.append(f"upstream: {upstream_text(found.upstream)}")
        if found.where is not None:
            lines.append(vllm.relative(found.where))
        table.add_row(patch, verdict_text(found.state), "\n".join(visible(line) for line in lines))
    console.print(table)
    if is_removable(verdicts):
        console.print(REMOVABLE + (f" ({WITH_IT_GOES})" if loses_by_removal(_states(verdicts)) else ""), soft_wrap=True)


def show_checkpoint(found: Checkpoint, console: Console) -> None:
    """The groups of a checkpoint's layers, then what has to be said in words."""
    from rich import box
    from rich.table import Table

    from overlay.cli.output import verdict_text, visible

    on = f" on {found.shards} GPUs" if found.shards > 1 else ""
    console.print(visible(f"{found.architecture}, format {found.format}{on}: {found.path}"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("patch", "layers", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", overflow="fold")
    for group in found.groups:
        sizes = ", ".join(f"{name} {size}" for name, size in group.sizes)
        lines = [
            group.reason,
            *([f"columns per GPU: {sizes}"] if sizes else []),
            *([", ".join(group.linears)] if group.linears else []),
        ]
        why = "\n".join(visible(line) for line in lines)
        table.add_row(group.patch, str(group.layers), verdict_text(group.state), why)
    if found.groups:
        console.print(table)
    for note in found.notes:
        console.print(visible(note), soft_wrap=True)
    if found.modes:
        console.print(f"stock all the same, however it is quantized: {'; '.join(found.modes)}", soft_wrap=True)
