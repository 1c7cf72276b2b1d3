"""Tables from the results files of the LoRA evidence: the bench's, and what only LoRA has."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.gpu.lora_engines import goal
from overlay.cli.bench import report
from overlay.cli.bench.report import table


def tables(data: dict[str, Any]) -> list[Any]:
    """Everything that a results file holds, as rich renderables."""
    head, *others = report.tables(data)
    shown: list[Any] = [
        Text(f"{arm}: {state['linears']} LoRA linears {state['classes']}, upstream's switch {state['switch']}")
        for arm, state in data.get("states", {}).items()
    ]
    shown += [Text(line) for line in goals(data.get("decode") or [])]
    if data.get("trace"):
        shown.append(_trace(data["trace"]))
    if data.get("micro"):
        shown += _micro(data["micro"])
    return [head, *shown, *others]


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each group of requests: where 5 % against stock, the goal where upstream's switch gains, is met."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if (word := goal(row)) is not None:
            found.setdefault(row["group"], {}).setdefault(word, []).append(str(row["requests"]))
    return [
        f"{group}, 5 % faster than stock where upstream's switch gains: "
        + "; ".join(f"{word} at N={', '.join(sizes)}" for word, sizes in words.items())
        for group, words in found.items()
    ]


def _trace(sides: dict[str, dict[str, Any]]) -> Table:
    keys = (
        ("lora_kernels_per_step", "LoRA kernels"),
        ("lora_us_per_step", "LoRA us"),
        ("gemm_us_per_step", "GEMM us"),
        ("hidden_us_per_step", "LoRA next to GEMM us"),
        ("hidden_share", "share"),
        ("busy_us_per_step", "GPU busy us"),
        ("gpu_us_per_step", "GPU us"),
    )
    row = next(iter(sides.values()))
    title = f"trace of a decode step, N={row['requests']}, rank {row['rank']}"
    grid = table(title, "side", *(label for _, label in keys), "LoRA streams", "GEMM streams")
    for side, found in sides.items():
        cells = ["-" if found[key] is None else f"{found[key]:.3g}" for key, _ in keys[4:5]]
        plain = [f"{found[key]:.1f}" for key, _ in keys if key != "hidden_share"]
        streams = [",".join(map(str, found[key])) for key in ("lora_streams", "gemm_streams")]
        grid.add_row(side, *plain[:4], *cells, *plain[4:], *streams)
    return grid


def _micro(found: dict[str, Any]) -> list[Any]:
    """Per tensor-parallel size and rank: microseconds per linear, and the ratio of a whole layer."""
    shown: list[Any] = []
    rows = found["rows"]
    for entry in found.get("threshold", []):
        shards, rank = entry["shards"], entry["rank"]
        mine = [row for row in rows if (row["shards"], row["rank"]) == (shards, rank)]
        linears = list(dict.fromkeys(row["linear"] for row in mine))
        title = f"one linear in a CUDA graph, TP{shards}, rank {rank}: GEMM | serial | dual us, torch {found['torch']}"
        grid = table(title, "tokens", *linears, "layer dual / serial", "different")
        for tokens in sorted({row["tokens"] for row in mine}):
            here = {row["linear"]: row for row in mine if row["tokens"] == tokens}
            cells = [
                "{gemm:.1f} | {serial:.1f} | {dual:.1f}".format(**here[linear]) if linear in here else ""
                for linear in linears
            ]
            whole = entry["ratio"].get(tokens, entry["ratio"].get(str(tokens)))  # JSON has made the numbers strings
            different = sum(row["different"] for row in here.values())
            alone = "" if all(row["on_two_streams"] for row in here.values()) else " NOT ON TWO STREAMS"
            grid.add_row(str(tokens), *cells, "" if whole is None else f"{whole:.3f}", f"{different}{alone}")
        each = ", ".join(f"{linear} {tokens}" for linear, tokens in entry["linears"].items())
        shown += [grid, f"TP{shards}, rank {rank}: not slower up to {entry['layer']} tokens (a layer); {each}"]
    return shown
