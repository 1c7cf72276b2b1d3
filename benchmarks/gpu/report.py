"""Tables and plots from a results file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.3f}..{row['high']:.3f}"


def tables(data: dict[str, Any]) -> list[Any]:
    """Everything that a results file holds, as rich renderables."""
    shown: list[Any] = [_head(data)]
    for key, make in (
        ("tokens", _tokens),
        ("first_token", _first_token),
        ("decode", _decode),
        ("trace", _trace),
        ("compile", _compile),
        ("quantized", _quantized),
        ("tensor_parallel", _tensor_parallel),
        ("replay", _replay),
        ("micro", _micro),
    ):
        if data.get(key):
            shown.append(make(data[key]))
    for problem in data.get("problems", []):
        shown.append(f"PROBLEM {problem[:600]}")
    return shown


def _head(data: dict[str, Any]) -> str:
    host, overlay = data.get("host", {}), data.get("overlay", {})
    lines = [
        f"GPU {host.get('gpu')}; kernel {host.get('kernel')}; {host.get('date')}",
        f"overlay {overlay.get('version')}, source {overlay.get('source')}, commit {overlay.get('commit')}",
    ]
    pair = data.get("pair", {})
    for side in ("stock", "overlay"):
        found = pair.get(side)
        if found:
            lines.append(
                f"{side}: vllm {found['vllm']}, torch {found['torch']}, {found['architecture']}, "
                f"async {found['async_scheduling']}, {found['cudagraph_mode']}, compile {found['compile_seconds']:.1f} s, "
                f"build {found['build_seconds']:.0f} s, aot loaded {found['counters'].get('num_aot_artifacts_loaded')}"
            )
    if pair:
        lines.append(f"weights equal: {pair.get('weights_equal')}")
    for row in pair.get("journal", []) or []:
        lines.append(_journal_line(row))
    return "\n".join(lines)


def _journal_line(row: dict[str, Any]) -> str:
    return (
        f"journal: {row['patch']} {row['verdict']}, patched {row['patched']} {row['sizes']}, refused {row['refused']} "
        f"{row['reasons']}, calls {row['calls']}, problems {row['problems']}"
    )


def _tokens(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "greedy tokens, stock and overlay", "case", "requests", "tokens", "distinct", "differ", "logprobs", "repeat"
    )
    for row in rows:
        table.add_row(
            row["case"],
            str(row["requests"]),
            str(row["generated"]),
            str(row["distinct"]),
            str(row["different_requests"]),
            "equal" if row["logprobs_equal"] else "DIFFER",
            "yes" if row["stock_repeats_itself"] and row["stock_repeats_logprobs"] else "NO",
        )
    return table


def _first_token(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "time to first token (ms)", "prompt", "stock", "overlay", "ratio", "95%", "minima", "target", "verdict"
    )
    for row in rows:
        table.add_row(
            str(row["prompt"]),
            _milliseconds(row["stock"]),
            _milliseconds(row["overlay"]),
            f"{row['ratio']:.3f}",
            _interval(row),
            f"{row['overlay_minimum'] / row['stock_minimum']:.3f}",
            f"{row['target']:.2f}",
            row["verdict"],
        )
    return table


def _decode(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "decode step (ms)",
        "N",
        "rounds",
        "stock",
        "overlay",
        "saved",
        "ratio",
        "95%",
        "target",
        "verdict",
        "not slower",
    )
    for row in rows:
        table.add_row(
            str(row["requests"]),
            str(row["rounds"]),
            _milliseconds(row["stock"]),
            _milliseconds(row["overlay"]),
            _milliseconds(row["stock"] - row["overlay"]),
            f"{row['ratio']:.3f}",
            _interval(row),
            f"{row['target']:.2f}",
            row["verdict"],
            "yes" if row["not_slower"] else "NO",
        )
    return table


def _trace(sides: dict[str, dict[str, Any]]) -> Table:
    columns = (
        "side",
        "N",
        "kernels",
        "layers x steps",
        "pairs",
        "two streams",
        "overlap",
        "us/layer",
        "qkvz",
        "ba",
        "both",
        "GPU ms/step",
        "wall ms/step",
    )
    table = _table("trace: the two projections (median us)", *columns)
    for side, row in sides.items():
        if "overlap_us" not in row:
            table.add_row(side, str(row["requests"]), str(row["kernels"]), str(row["convolutions"]), "0", *["-"] * 8)
            continue
        table.add_row(
            side,
            str(row["requests"]),
            str(row["kernels"]),
            str(row["convolutions"]),
            str(row["pairs"]),
            str(row["on_two_streams"]),
            str(row["overlapping"]),
            *(f"{row[key]:.2f}" for key in ("overlap_us", "qkvz_us", "ba_us", "span_us")),
            _milliseconds(row["gpu_seconds_per_step"]),
            _milliseconds(row["mean"]),
        )
    return table


def _compile(found: dict[str, Any]) -> Table:
    table = _table("cold compile", "start", "compile s", "build s", "saved", "inductor", "graphs", "aot", "cache files")
    for start in found["starts"]:
        counters = start["counters"]
        table.add_row(
            start["side"],
            f"{start['compile_seconds']:.2f}",
            f"{start['build_seconds']:.1f}",
            *(
                str(counters.get(f"num_{key}"))
                for key in (
                    "compiled_artifacts_saved",
                    "inductor_compiles",
                    "piecewise_graphs_seen",
                    "aot_artifacts_saved",
                )
            ),
            f"{start['cache']['torch_compile_cache']} of {start['cache']['files']}",
        )
    if "ratio" in found:
        table.add_row(
            f"ratio {found['ratio']:.3f} (target {found['target']:.2f}), artifacts "
            f"{'equal' if found['artifacts_equal'] else 'DIFFER'}"
        )
    return table


def _quantized(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "variant",
        "method",
        "tokens",
        "distinct",
        "weights",
        "tokens =",
        "logprobs =",
        "stock = stock",
        "journal",
    )
    table = _table("quantized", *columns)
    for row in rows:
        if "error" in row:
            table.add_row(row["variant"], "FAILED", *[""] * 6, row["error"][-200:])
            continue
        journal = "; ".join(_journal_line(entry) for entry in row.get("journal") or [])
        table.add_row(
            row["variant"],
            f"{row.get('quantization')} {','.join(row.get('kernels') or [])}",
            str(row.get("generated")),
            str(row.get("distinct")),
            *(str(row.get(key)) for key in ("weights_equal", "tokens_equal", "logprobs_equal", "stock_repeats")),
            journal,
        )
    return table


def _tensor_parallel(found: dict[str, Any]) -> Table:
    table = _table("two GPUs", "what", "value")
    for key, value in found.items():
        if key != "journal":
            table.add_row(key.replace("_", " "), str(value))
    for entry in found.get("journal") or []:
        table.add_row(str(entry.get("process")), _journal_line(entry))
    return table


def _replay(found: dict[str, Any]) -> Table:
    title = f"replays with changing inputs, {found['shape']}, {found['implementation']}, torch {found['torch']}"
    table = _table(title, "tokens", "replays", "compared", "different", "inputs changed", "finite", "s")
    for row in found["rows"]:
        keys = ("tokens", "replays", "compared", "different", "inputs_changed", "finite", "seconds")
        table.add_row(*(str(row[key]) for key in keys))
    return table


def _micro(found: dict[str, Any]) -> Table:
    rows = found.get("graph", [])
    keys = [key for key in (rows[0] if rows else {}) if key not in ("shape", "tokens")]
    table = _table("projections in a CUDA graph (us per layer)", "shape", "tokens", *keys)
    for row in rows:
        table.add_row(row["shape"], str(row["tokens"]), *(f"{row[key]:.1f}" for key in keys))
    costs = found.get("call_costs") or {}
    for name, value in costs.items():
        table.add_row(f"CPU us per call: {name} {value}")
    return table


def show(data: dict[str, Any], path: Path | None = None, make: Callable[[dict[str, Any]], list[Any]] = tables) -> None:
    """Print what `make` gives for a results file, and write it to a file."""
    console = Console(width=170, record=path is not None, soft_wrap=False, highlight=False, markup=False)
    for item in make(data):
        console.print(item)
        console.print()
    if path is not None:
        path.write_text(console.export_text())


def plot(data: dict[str, Any], path: Path) -> None:
    """Ratio to stock with its interval: decode step by batch, first token by prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [
        (data.get("decode"), "requests", "decode step", "running requests"),
        (data.get("first_token"), "prompt", "time to first token", "prompt tokens"),
    ]
    parts = [part for part in parts if part[0]]
    if not parts:
        return
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6 * len(parts), 4), squeeze=False)
    for axis, (found_rows, key, title, label) in zip(axes[0], parts, strict=True):
        rows = found_rows or []
        places = [row[key] for row in rows]
        ratios = [row["ratio"] for row in rows]
        errors = [
            [max(0.0, row["ratio"] - row["low"]) for row in rows],
            [max(0.0, row["high"] - row["ratio"]) for row in rows],
        ]
        axis.errorbar(places, ratios, yerr=errors, fmt="o-", capsize=3, label="overlay / stock")
        axis.step(places, [row["target"] for row in rows], where="mid", linestyle="--", color="tab:red", label="target")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [str(place) for place in places])
        axis.set(title=title, xlabel=label, ylabel="ratio to stock")
        axis.legend()
    found = data.get("pair", {}).get("stock", {})
    figure.suptitle(f"vLLM {found.get('vllm')}, torch {found.get('torch')}, {found.get('device')}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
