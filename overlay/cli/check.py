"""``check``: the verdict of every patch on one vLLM.

JSON (schema 1)::

    {"schema": 1, "overlay": "0.1.0",
     "vllm": {"kind": "installed" | "tree" | "wheel" | "release", "version": "0.33.0" | null, "path": "…"},
     "patches": {"gdn": {"verdict": "apply" | "landed" | "absent" | "drifted" | "inert", "reason": "…",
                         "module": "vllm.…" | null, "class": "…" | null, "methods": ["…"], "where": "file:line" | null,
                         "upstream": {"pull_request": "#41061", "on_by_default": true, "setting": "…"} | null}},
     "drifted": false, "removable": false}

`removable` is true where every patch is landed or absent: then the overlay has nothing to do in this vLLM. frame_stack, which
mends Python and lands in no vLLM, may be apply.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay import __version__
from overlay.cli import vllms
from overlay.cli.vllms import Vllm
from overlay.patches import registry
from overlay.verdict import Upstream, Verdict
from overlay.vocabulary import DRIFTED, WITH_IT_GOES, loses_by_removal
from overlay.vocabulary import is_removable as nothing_to_do

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
REMOVABLE = "nothing to do in this vLLM: the overlay can be removed"


def run(given: str | None, as_json: bool, cache: Path | None) -> int:
    """Judge one vLLM, show it, and give the exit status."""
    vllm = vllms.find(given, cache)
    verdicts = judge(vllm)
    if as_json:
        print(json.dumps(as_dict(vllm, verdicts), indent=1))
    else:
        from overlay.cli import output

        show(vllm, verdicts, output.console())
    return int(is_drifted(verdicts))


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
