"""Tables of the GDN evidence: those of `bench`, and what only the evidence measures."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from gpu import targets
from overlay.cli.bench import report
from overlay.cli.bench.report import journal_line, milliseconds, table


def tables(data: dict[str, Any]) -> list[Any]:
    """Everything that a results file holds, as rich renderables."""
    shown: list[Any] = [Text(report.head(data))]
    for key, make in (
        ("tokens", report.tokens),
        ("first_token", report.first_token),
        ("decode", report.decode),
        ("decode", _targets),
        ("trace", _trace),
        ("compile", _compile),
        ("quantized", _quantized),
        ("tensor_parallel", _tensor_parallel),
        ("replay", _replay),
        ("micro", _micro),
    ):
        if data.get(key):
            shown.append(make(data[key]))
    return [*shown, *report.notes(data)]


def _targets(rows: list[dict[str, Any]]) -> Table:
    found = table("decode step against its target", "N", "ratio", "target", "verdict", "not slower")
    for row in rows:
        target = targets.decode(row["requests"])
        not_slower = "yes" if row["low"] <= 1.0 else "NO"
        found.add_row(
            str(row["requests"]), f"{row['ratio']:.3f}", f"{target:.2f}", targets.verdict(row, target), not_slower
        )
    return found


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
    shown = table("trace: the two projections (median us)", *columns)
    for side, row in sides.items():
        if "overlap_us" not in row:
            shown.add_row(side, str(row["requests"]), str(row["kernels"]), str(row["convolutions"]), "0", *["-"] * 8)
            continue
        shown.add_row(
            side,
            str(row["requests"]),
            str(row["kernels"]),
            str(row["convolutions"]),
            str(row["pairs"]),
            str(row["on_two_streams"]),
            str(row["overlapping"]),
            *(f"{row[key]:.2f}" for key in ("overlap_us", "qkvz_us", "ba_us", "span_us")),
            milliseconds(row["gpu_seconds_per_step"]),
            milliseconds(row["mean"]),
        )
    return shown


def _compile(found: dict[str, Any]) -> Table:
    shown = table("cold compile", "start", "compile s", "build s", "saved", "inductor", "graphs", "aot", "cache files")
    for start in found["starts"]:
        counters = start["counters"]
        shown.add_row(
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
        shown.add_row(
            f"ratio {found['ratio']:.3f} (target {found['target']:.2f}), artifacts "
            f"{'equal' if found['artifacts_equal'] else 'DIFFER'}"
        )
    return shown


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
    shown = table("quantized", *columns)
    for row in rows:
        if "error" in row:
            shown.add_row(row["variant"], "FAILED", *[""] * 6, row["error"][-200:])
            continue
        journal = "; ".join(journal_line(entry) for entry in row.get("journal") or [])
        shown.add_row(
            row["variant"],
            f"{row.get('quantization')} {','.join(row.get('kernels') or [])}",
            str(row.get("generated")),
            str(row.get("distinct")),
            *(str(row.get(key)) for key in ("weights_equal", "tokens_equal", "logprobs_equal", "stock_repeats")),
            journal,
        )
    return shown


def _tensor_parallel(found: dict[str, Any]) -> Table:
    shown = table("two GPUs", "what", "value")
    for key, value in found.items():
        if key != "journal":
            shown.add_row(key.replace("_", " "), str(value))
    for entry in found.get("journal") or []:
        shown.add_row(str(entry.get("process")), journal_line(entry))
    return shown


def _replay(found: dict[str, Any]) -> Table:
    title = f"replays with changing inputs, {found['shape']}, {found['implementation']}, torch {found['torch']}"
    shown = table(title, "tokens", "replays", "compared", "different", "inputs changed", "finite", "s")
    for row in found["rows"]:
        keys = ("tokens", "replays", "compared", "different", "inputs_changed", "finite", "seconds")
        shown.add_row(*(str(row[key]) for key in keys))
    return shown


def _micro(found: dict[str, Any]) -> Table:
    rows = found.get("graph", [])
    keys = [key for key in (rows[0] if rows else {}) if key not in ("shape", "tokens")]
    shown = table("projections in a CUDA graph (us per layer)", "shape", "tokens", *keys)
    for row in rows:
        shown.add_row(row["shape"], str(row["tokens"]), *(f"{row[key]:.1f}" for key in keys))
    costs = found.get("call_costs") or {}
    for name, value in costs.items():
        shown.add_row(f"CPU us per call: {name} {value}")
    return shown
