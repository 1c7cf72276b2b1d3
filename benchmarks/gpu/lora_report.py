"""Tables and a plot from the results files of the LoRA evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overlay.cli.bench.report import milliseconds, table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

VERDICTS = {None: "", "met": "met", "within": "within", "missed": "MISSED"}


def tables(data: dict[str, Any]) -> list[Any]:
    """Everything that a results file holds, as rich renderables."""
    shown: list[Any] = [_head(data)]
    for key, make in (
        ("tokens", _tokens),
        ("decode", _decode),
        ("prefill", _prefill),
        ("trace", _trace),
    ):
        if data.get(key):
            shown.append(make(data[key]))
    if data.get("micro"):
        shown += _micro(data["micro"])
    for problem in data.get("problems", []):
        shown.append(f"PROBLEM {problem[:800]}")
    return shown


def _head(data: dict[str, Any]) -> str:
    host, overlay, engines = data.get("host", {}), data.get("overlay", {}), data.get("engines", {})
    lines = [
        f"GPU {host.get('gpu')}; kernel {host.get('kernel')}; {host.get('date')}",
        f"overlay {overlay.get('version')}, source {overlay.get('source')}, commit {overlay.get('commit')}",
    ]
    for side in ("stock", "upstream", "overlay"):
        found = engines.get(side)
        if found:
            counters = found["counters"]
            lines.append(
                f"{side}: vllm {found['vllm']}, torch {found['torch']}, triton {found['triton']}, {found['device']}, "
                f"async {found['async_scheduling']}, v2 runner {found['v2_model_runner']}, {found['cudagraph_mode']}, "
                f"compile {found['compile_seconds']:.1f} s, build {found['build_seconds']:.0f} s, artifacts saved "
                f"{counters.get('num_compiled_artifacts_saved')}"
            )
    arguments = engines.get("arguments", {})
    if arguments:
        keys = ("max_lora_rank", "max_loras", "max_num_seqs", "max_num_batched_tokens")
        lines.append(", ".join(f"{key} {arguments.get(key)}" for key in keys))
        lines.append(f"weights equal: {engines.get('weights_equal')}")
    for side, state in engines.get("states", {}).items():
        lines.append(f"{side}: {state['linears']} LoRA linears {state['classes']}, upstream's switch {state['switch']}")
    for row in engines.get("journals", []):
        lines.append(
            f"journal: {row['verdict']}, patched {row['patched']}, refused {row['refused']} {row['reasons']}, "
            f"calls {row['calls']}, problems {row['problems']}"
        )
    return "\n".join(lines)


def _tokens(rows: list[dict[str, Any]]) -> Table:
    sides = list(rows[0]["sides"])
    columns = [f"{side} {what}" for side in sides for what in ("differ", "logprobs")]
    grid = table(
        "greedy tokens against stock", "case", "requests", "tokens", "distinct", "adapter changes", *columns, "repeats"
    )
    for row in rows:
        cells: list[str] = []
        for side in sides:
            found = row["sides"][side]
            cells += [str(found["different_requests"]), "equal" if found["logprobs_equal"] else "DIFFER"]
        repeats = min(row["stock_repeats_tokens"], row["stock_repeats_logprobs"])
        grid.add_row(
            row["case"],
            *(str(row[key]) for key in ("requests", "generated", "distinct")),
            str(row.get("changed_by_adapter", "")),
            *cells,
            f"{repeats} of {row['stock_repetitions']}",
        )
    return grid


def _ratio(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['ratio']:.3f} ({found['low']:.3f}..{found['high']:.3f})"


_RATIOS = ("upstream / stock", "overlay / stock", "overlay / upstream")


def _ratio_cells(row: dict[str, Any]) -> list[str]:
    return [milliseconds(row["stock_seconds"]), *(_ratio(row.get(key)) for key in ("upstream", "overlay", "both"))]


def _decode(rows: list[dict[str, Any]]) -> Table:
    title = "decode step: stock in ms, ratios with their 95 % intervals; 5 % is the goal where upstream gains"
    grid = table(title, "adapters", "N", "rounds", "stock", *_RATIOS, "upstream gains", "5 %", "slower than")
    for row in rows:
        slower = [name for name in ("stock", "upstream") if row[f"slower_than_{name}"]]
        grid.add_row(
            row["group"],
            str(row["requests"]),
            str(row["rounds"]),
            *_ratio_cells(row),
            "yes" if row["upstream_gains"] else "",
            VERDICTS[row["target"]],
            ", ".join(slower).upper(),
        )
    return grid


def _prefill(rows: list[dict[str, Any]]) -> Table:
    grid = table("time to first token of one prompt with an adapter: stock in ms", "prompt", "stock", *_RATIOS)
    for row in rows:
        grid.add_row(str(row["prompt"]), *_ratio_cells(row))
    return grid


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
    grid = table(title, "side", *(label for _, label in keys), "LoRA streams", "GEMM streams", "wall ms")
    for side, found in sides.items():
        cells = ["-" if found[key] is None else f"{found[key]:.3g}" for key, _ in keys[4:5]]
        plain = [f"{found[key]:.1f}" for key, _ in keys if key != "hidden_share"]
        streams = [",".join(map(str, found[key])) for key in ("lora_streams", "gemm_streams")]
        grid.add_row(side, *plain[:4], *cells, *plain[4:], *streams, milliseconds(found["mean"]))
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


def plot(data: dict[str, Any], path: Path) -> None:
    """Decode step: ratio to stock with its interval over N, one picture per group, upstream's switch and the overlay."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = data.get("decode") or []
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if not groups:
        return
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4.2 * len(groups), 4), squeeze=False, sharey=True)
    for axis, group in zip(axes[0], groups, strict=True):
        mine = [row for row in rows if row["group"] == group]
        for side, colour in (("upstream", "tab:orange"), ("overlay", "tab:blue")):
            shown = [(row["requests"], row[side]) for row in mine if row.get(side)]
            if not shown:
                continue
            ratios = [found["ratio"] for _, found in shown]
            errors = [
                [max(0.0, found["ratio"] - found["low"]) for _, found in shown],
                [max(0.0, found["high"] - found["ratio"]) for _, found in shown],
            ]
            places = [requests for requests, _ in shown]
            label = "upstream's switch" if side == "upstream" else "overlay"
            axis.errorbar(places, ratios, yerr=errors, fmt="o-", capsize=3, label=label, color=colour)
        places = [row["requests"] for row in mine]
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.axhline(0.95, color="tab:red", linewidth=0.8, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [str(place) for place in places])
        axis.set(title=group, xlabel="running requests")
        axis.legend()
    axes[0][0].set_ylabel("decode step, ratio to stock")
    found = data.get("engines", {}).get("stock", {})
    figure.suptitle(f"LoRA, vLLM {found.get('vllm')}, torch {found.get('torch')}, {found.get('device')}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
