"""Tables from a results file: on a terminal, and as text."""

from __future__ import annotations

import math
from typing import IO, TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from overlay.cli.bench.intervals import FEWEST, RANGE
from overlay.cli.bench.results import CONTROL, arms_of, different, overlays_of, size
from overlay.cli.bench.setup import OVERLAY, STOCK
from overlay.cli.bench.timeline import Kernel, overlap
from overlay.cli.bench.timeline_picture import hidden, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from rich.console import Console

#: A report in a file has no terminal's width.
FILE_COLUMNS = 170
#: Processes whose Python is no further apart than this have equal CPUs.
EVEN_HOST = 0.01
CONCURRENCY = "concurrency"
#: All that a run without a GPU says about times.
CPU = "CPU: says nothing about speed, for there are no streams; it shows whether tokens differ"
#: What stands behind a ratio.
INTERVALS = "95 % intervals; [range] of one round, or of equal ones"
FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference shown"


def table(title: str, *columns: str) -> Table:
    """A table without lines; the first column is text, the others are numbers."""
    found = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        found.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return found


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


STYLES = {FASTER: "green", SLOWER: "red", NO_DIFFERENCE: ""}


def outcome(found: dict[str, Any], rounds: int | None = None) -> str:
    """What an interval of ratios to stock shows. One round alone has no interval."""
    if rounds == 1 or found["low"] <= 1.0 <= found["high"]:
        return NO_DIFFERENCE
    return FASTER if found["high"] < 1.0 else SLOWER


def ratio(found: dict[str, Any] | None) -> Text:
    """A ratio with its interval, a range in square brackets: green where all of it is below 1, red where all of it is above."""
    if not found:
        return Text("-")
    left, right = "[]" if found.get("interval") == RANGE else "()"
    text = f"{found['ratio']:.3f} {left}{found['low']:.3f}..{found['high']:.3f}{right}"
    return Text(text, style=STYLES[outcome(found)])


def tables(data: dict[str, Any]) -> list[Any]:
    """Everything that a results file of `bench` holds, as rich renderables."""
    shown: list[Any] = [Text(head(data))]
    if data.get("cpu"):
        shown += [tokens(data["tokens"])] if data.get("tokens") else []
        return [*shown, *answers(data), *notes(data), Text(CPU)]
    for key, make in (
        ("tokens", tokens),
        ("decode", decode),
        ("first_token", first_token),
        ("pair", starts),
        ("serving", serving),
        (CONCURRENCY, closed_loop),
    ):
        if data.get(key):
            shown.append(make(data[key]))
    shown += answers(data)
    for row in data.get("timeline") or []:
        shown += [*(kernels(row, arm) for arm in row["arms"]), timeline(row)]
    return [*shown, *(Text(text) for text in conclusions(data)), *notes(data), Text(headline(data), style="bold")]


def conclusions(data: dict[str, Any]) -> list[str]:
    """One line for each table of ratios and arm: at which sizes the arm is faster than stock, slower, or neither is shown."""
    found: dict[str, dict[str, list[str]]] = {}
    for what, label, key, rows in timed(data):
        for row in rows:
            for arm, values in arms_of(row).items():
                line = found.setdefault(f"{arm}, {what}, {label}", {})
                line.setdefault(outcome(values, row["rounds"]), []).append(size(row, key))
    for row in (data.get("serving") or {}).get("rows") or []:
        line = found.setdefault(f"{row['arm']}, servers, {row['metric'].upper()} at rate", {})
        line.setdefault(outcome(row), []).append(f"{row['rate']:g}")
    return [
        f"{what}: " + "; ".join(f"{state} {', '.join(sizes)}" for state in STYLES if (sizes := line.get(state)))
        for what, line in found.items()
    ]


def timed(data: dict[str, Any]) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """What was timed in pairs, first what a person asks for first: what it is, how its size is called, its key, the rows."""
    loop = (data.get(CONCURRENCY) or {}).get("rows") or []
    every = (
        ("time per output token", "clients", "requests", [row for row in loop if row["metric"] == "tpot"]),
        ("time per embedding", "clients", "requests", [row for row in loop if row["metric"] == "embedding"]),
        ("decode step", "N", "requests", data.get("decode") or []),
        ("time to first token", "prompt", "prompt", data.get("first_token") or []),
        ("time to first token", "clients", "requests", [row for row in loop if row["metric"] == "ttft"]),
    )
    return [one for one in every if one[-1]]


def headline(data: dict[str, Any]) -> str:
    """The last line of a report: by how much the overlay is faster or slower over all sizes of the first thing that was timed.

    A size with one round only is left out where others have more: the time was over. Where a second stock was measured, the line has its
    outcome as well: two processes that do the same can be so far apart.
    """
    served = [
        {**row, "rate": f"{row['rate']:g}", "arms": {row["arm"]: row}}
        for row in (data.get("serving") or {}).get("rows") or []
        if row["metric"] == "tpot"
    ]
    for what, label, key, rows in [*timed(data), ("time per output token", "requests/s", "rate", served)]:
        arms = [arm for row in rows for arm in overlays_of(row)]
        if not arms:
            continue
        arm = OVERLAY if OVERLAY in arms else arms[0]
        own = [row for row in rows if arm in overlays_of(row)]
        own = [row for row in own if row["rounds"] > 1] or own
        sizes = ", ".join(size(row, key) for row in own) + (", on average" if len(own) > 1 else "")
        said = f"{arm}, {what}: {_verdict_of(arm, own)} at {label} = {sizes}"
        has_control = all(CONTROL in arms_of(row) for row in own)
        return f"{said}; a second stock: {_verdict_of(CONTROL, own)}" if has_control else said
    return "nothing was timed"


def _verdict_of(arm: str, rows: list[dict[str, Any]]) -> str:
    return verdict([{"rounds": row["rounds"], **arms_of(row)[arm]} for row in rows])


def verdict(rows: list[dict[str, Any]]) -> str:
    """One outcome of the ratios of several sizes: their geometric mean, and an interval as wide as independent errors make it."""
    logs = [math.log(row["ratio"]) for row in rows]
    middle = sum(logs) / len(rows)

    def edge(name: str) -> float:
        distances = (math.log(row[name]) - log for row, log in zip(rows, logs, strict=True))
        return math.hypot(*distances) / len(rows)

    whole = {"ratio": math.exp(middle), "low": math.exp(middle - edge("low")), "high": math.exp(middle + edge("high"))}
    fewest = min(row["rounds"] for row in rows)
    found = outcome(whole, fewest)
    if found == NO_DIFFERENCE:
        return found
    percent = sorted(abs(whole[name] - 1.0) * 100.0 for name in ("low", "high"))
    few = f" in {fewest} rounds" if fewest < FEWEST else ""
    return f"{found} by {abs(whole['ratio'] - 1.0) * 100.0:.1f} % ({percent[0]:.1f} to {percent[1]:.1f}{few})"


#: Environment variables by which Inductor's kernels add up in the same order in every process (torch 2.13 and 2.14).
FIXED_KERNELS = ("TORCHINDUCTOR_DYNAMIC_SCALE_RBLOCK=0", "TORCHINDUCTOR_FORCE_FILTER_REDUCTION_CONFIGS=1")


def notes(data: dict[str, Any]) -> list[Text]:
    """What went wrong or was left out, the worst last: there it is seen."""
    hosts = {} if data.get("cpu") else data.get("host_speed", {})
    shown = [Text(text, style="yellow") for text in uneven_hosts(hosts)]
    shown += [Text(text, style="yellow") for text in different_control(data.get("tokens") or [])]
    shown += [Text(f"not done: {text}", style="yellow") for text in data.get("unfinished", [])]
    shown += [Text(f"PROBLEM {text[:800]}", style="bold red") for text in data.get("problems", [])]
    found = different(data)
    shown += [Text(f"TOKENS DIFFER: {text}", style="bold red") for text in found]
    timed = [f"--env {one}" for one in FIXED_KERNELS if one not in data.get("command", [])]
    if found and timed and not data.get("cpu"):
        shown.append(
            Text(
                "Inductor times block sizes in each process, so two starts of stock can differ as well. Before you call it the "
                f"overlay's doing, run again with {' '.join(timed)}",
                style="yellow",
            )
        )
    return shown


def different_control(rows: list[dict[str, Any]]) -> list[str]:
    """A line where stock, started a second time, has other tokens than the first one: then an arm's need not be its own doing."""
    cases = [row["case"] for row in rows if arms_of(row).get(CONTROL, {}).get("different_requests")]
    if not cases:
        return []
    return [f"control: stock started twice has other tokens in {len(cases)} of {len(rows)} cases: {', '.join(cases)}"]


def uneven_hosts(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each arm whose process had another host than stock's, by the same work timed in both."""
    return [
        f"host: the same {what} took {found['ratio']:.2f} of stock's time in the process of {arm} "
        f"({found['low']:.2f} to {found['high']:.2f}); where a step waits for the host, so does its time"
        for what, row in rows.items()
        for arm, found in row["arms"].items()
        if abs(found["ratio"] - 1.0) > EVEN_HOST
    ]


def head(data: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    host, overlay = data.get("host", {}), data.get("overlay", {})
    where = f"CPU, {host.get('cores')} cores" if data.get("cpu") else f"GPU {host.get('gpu')}"
    lines = [
        f"{where}; kernel {host.get('kernel')}; {host.get('date')}",
        f"overlay {overlay.get('version')}, source {overlay.get('source')}, commit {overlay.get('commit')}",
    ]
    model = data.get("model")
    if model:
        lines.append(
            f"{model['name']}, {model['layers']} layers ({model['linear_attention_layers']} of them linear attention), "
            f"format {model.get('format', 'bf16')}, tensor parallel {model['tensor_parallel']}"
        )
    pair = data.get("pair", {})
    for arm, found in pair.items():
        if isinstance(found, dict) and "compile_seconds" in found:
            lines.append(
                f"{arm}: vllm {found['vllm']}, torch {found['torch']}, {found['architecture']}, async "
                f"{found['async_scheduling']}, {found['cudagraph_mode']}, aot loaded "
                f"{found['counters'].get('num_aot_artifacts_loaded')}"
            )
    if pair:
        lines.append(f"weights equal: {pair.get('weights_equal')}")
    elif data.get("versions"):
        lines.append(", ".join(f"{name} {version}" for name, version in data["versions"].items()))
    journals = pair.get("journals") or {OVERLAY: pair.get("journal")}
    lines += [f"{arm}: {journal_line(row)}" for arm, rows in journals.items() for row in rows or []]
    return "\n".join(lines)


def journal_line(row: dict[str, Any]) -> str:
    """What the overlay did in one process."""
    return (
        f"journal: {row['patch']} {row['verdict']}, patched {row['patched']} {row['sizes']}, refused {row['refused']} "
        f"{row['reasons']}, calls {row['calls']}, problems {row['problems']}"
    )


def tokens(rows: list[dict[str, Any]]) -> Table:
    arms = list(arms_of(rows[0]))
    columns = [f"{arm}: {what}" for arm in arms for what in ("identical", "logprobs")]
    found = table("greedy tokens against stock", "case", "requests", "tokens", "distinct", *columns, "stock repeats")
    for row in rows:
        cells: list[str | Text] = []
        for arm in arms:
            answer = arms_of(row)[arm]
            same = row["requests"] - answer["different_requests"]
            also = ", as stock once" if answer.get("one_of_stocks") else ""
            bits = "equal bits" if answer["logprobs_equal"] else f"differ{also}"
            style = "bold red" if answer["different_requests"] else ""
            cells += [Text(f"{same} of {row['requests']}", style=style), bits]
        asked, given = row.get("stock_asked", 2), row.get("stock_answers", 1)  # results of before have neither
        repeats = row["stock_repeats_itself"] and row["stock_repeats_logprobs"]
        said = "yes" if repeats else f"NO: {given} answers to {asked}" if given > 1 else "NO"
        numbers = (str(row[key]) for key in ("requests", "generated", "distinct"))
        found.add_row(row["case"], *numbers, *cells, said)
    return found


def decode(rows: list[dict[str, Any]]) -> Table:
    return _ratios(f"decode step (ms; {INTERVALS})", "N", "requests", rows)


def first_token(rows: list[dict[str, Any]]) -> Table:
    return _ratios(f"time to first token (ms; {INTERVALS})", "prompt", "prompt", rows)


def _ratios(title: str, label: str, key: str, rows: list[dict[str, Any]]) -> Table:
    arms = list(arms_of(rows[0]))
    against = list(rows[0].get("against") or ())
    columns = [*(f"{arm} / stock" for arm in arms), *(f"overlay / {arm}" for arm in against)]
    found = table(title, label, "rounds", "stock", "saved", *columns)
    for row in rows:
        own = arms_of(row)
        first = own[OVERLAY if OVERLAY in own else arms[0]]
        found.add_row(
            size(row, key),
            str(row["rounds"]),
            milliseconds(row["stock"]),
            milliseconds(row["stock"] - first["seconds"]),
            *(ratio(own.get(arm)) for arm in arms),
            *(ratio(row["against"].get(arm)) for arm in against),
        )
    return found


def starts(pair: dict[str, Any]) -> Table | str:
    """Seconds of each arm's start, and what was compiled."""
    arms = {arm: found for arm, found in pair.items() if isinstance(found, dict) and "compile_seconds" in found}
    if not arms:
        return ""
    how = ", all at once, so not comparable" if pair.get("started_together") else ""
    if pair.get("triton_was_warm") is False:
        how += ", the first with an empty Triton cache"
    columns = ("compile s", "to stock", "build s", "import s", "artifacts saved", "inductor", "aot saved")
    found = table(f"start and compile time{how}", "arm", *columns)
    stock = arms.get(STOCK, {}).get("compile_seconds") or 0.0
    for arm, start in arms.items():
        counters = start["counters"]
        found.add_row(
            arm,
            f"{start['compile_seconds']:.2f}",
            f"{start['compile_seconds'] / stock:.3f}" if stock else "-",
            f"{start['build_seconds']:.1f}",
            f"{start['import_seconds']:.1f}",
            *(
                str(counters.get(f"num_{key}"))
                for key in ("compiled_artifacts_saved", "inductor_compiles", "aot_artifacts_saved")
            ),
        )
    return found


def kernels(row: dict[str, Any], arm: str) -> Table:
    """An arm's kernels of one layer by stream, with how long each runs beside one of another stream."""
    found = table(
        f"{arm}, a layer and its MLP, N={row['requests']} (GPU us)", "stream", "number", "start", "takes", "beside"
    )
    found.add_column("kernel", no_wrap=True)
    every = [(number, Kernel(**one)) for number, one in enumerate(row["arms"][arm]["kernels"], 1)]
    for number, kernel in sorted(every, key=lambda one: (one[1].stream, one[1].start)):
        beside = overlap(kernel, [other for _, other in every if other.stream != kernel.stream])
        times = (f"{value:.2f}" for value in (kernel.start, kernel.duration, beside))
        found.add_row(kernel.stream, str(number), *times, short(kernel.name, 90))
    return found


def timeline(row: dict[str, Any]) -> Table:
    """A layer and its MLP at one number of requests, and below it which kernels are not stock's."""
    columns = ("segment", "5 to 95 %", "ratio", "like", "like, tuned", "side", "overlap", "hideable", "hidden share")
    found = table(f"a layer and its MLP, N={row['requests']} (GPU us)", "arm", *columns)
    lines = []
    for arm, layer in row["arms"].items():
        segment, other = layer["segment"], layer.get("against_stock", {})
        keys = ("ratio", "like", "like_tuned", "side_duration", "overlap", "hideable", "hidden_share")
        cells = ("-" if other.get(key) is None else f"{other[key]:.3f}" for key in keys)
        found.add_row(arm, f"{segment['median']:.1f}", f"{segment['low']:.1f}..{segment['high']:.1f}", *cells)
        lines.append(f"{arm}: {segment['alike']} of {segment['all']} segments are alike")
        lines += [f"{arm} {words}" for words in [hidden(other)] if words]
        for kernel in other.get("side", ()):
            same = kernel["stock"]
            stock = f"stock {same['duration']:.2f} after {same['gap']:.2f}" if same else "not in stock"
            lines.append(
                f"{arm}, side: {kernel['duration']:.2f} us, {kernel['overlap']:.2f} hidden, {stock}: {kernel['name'][:90]}"
            )
        for kernel in other.get("renamed", ()):
            lines.append(
                f"{arm}, other kernel, {-kernel['difference']:+.2f} us: {kernel['arm'][:60]} for {kernel['stock'][:60]}"
            )
        for kernel in other.get("retuned", ()):
            lines.append(f"{arm}, same kernel, {kernel['stock']:.2f} to {kernel['arm']:.2f} us: {kernel['name'][:90]}")
        for key, whose in (("only_stock", "stock"), ("only_arm", arm)):
            names = other.get(key)
            if names:
                lines.append(f"only in {whose}: {', '.join(name[:60] for name in names)}")
    found.caption = "\n".join(lines)
    found.caption_justify = "left"
    return found


def serving(found: dict[str, Any]) -> Table:
    columns = ("metric", "requests", "failed", "requests/s", "stock", "p99", "with overlay", "p99", "ratio")
    shown = table("servers under load (median and 99th percentile in ms)", "rate", *columns)
    for row in found.get("rows", []):
        shown.add_row(
            f"{row['rate']:g}",
            row["metric"].upper(),
            " | ".join(str(count) for count in row["requests"].values()),
            " | ".join(str(count) for count in row["failed"].values()),
            " | ".join(f"{value:.2f}" for value in row["requests_per_second"].values()),
            *(milliseconds(row[key]) for key in ("stock", "stock_p99", "overlay", "overlay_p99")),
            ratio(row),
        )
    seconds = found.get("start_seconds", {})
    shown.caption = "; ".join(f"{arm} answers after {value:.0f} s" for arm, value in seconds.items())
    shown.caption_justify = "left"
    return shown


def closed_loop(found: dict[str, Any]) -> Table:
    """Servers with a fixed number of clients."""
    rows = found.get("rows") or []
    arms = list(arms_of(rows[0])) if rows else []
    columns = ("metric", "rounds", "stock", *(f"{arm} / stock" for arm in arms))
    shown = table(f"servers, a fixed number of clients (median of a round in ms; {INTERVALS})", "clients", *columns)
    for row in rows:
        ratios = (ratio(arms_of(row).get(arm)) for arm in arms)
        shown.add_row(
            str(row["requests"]), row["metric"].upper(), str(row["rounds"]), milliseconds(row["stock"]), *ratios
        )
    return shown


#: What is said of servers' answers, and the keys of its numbers.
ANSWERS = (
    ("are not those of stock's first round", "different", "of"),
    ("stock has given in no other round", "new", "asked"),
)


def answers(data: dict[str, Any]) -> list[Text]:
    """How many answers of servers are not stock's. Stock's own numbers are the control."""
    found = data.get(CONCURRENCY) or {}
    lines = [] if found.get("together", True) else ["the servers were alive one after the other"]
    for row in found.get("answers") or []:
        for what, count, total in ANSWERS:
            counts = ", ".join(
                f"{arm} {one[count]} of {one[total]}" for arm, one in row["arms"].items() if count in one
            )
            if counts:  # `new` is not in older results, nor where stock had one round
                lines.append(f"clients {row['requests']}: answers that {what}: {counts}")
    return [Text("\n".join(lines))] if lines else []


def wide_console(file: IO[str] | None = None) -> Console:
    """A console for a report that is kept: no terminal's width, no colours in a file."""
    from rich.console import Console as RichConsole

    return RichConsole(file=file, width=FILE_COLUMNS, highlight=False, markup=False)


def show(
    data: dict[str, Any],
    console: Console,
    path: Path | None = None,
    make: Callable[[dict[str, Any]], Iterable[Any]] = tables,
) -> None:
    """Print what `make` gives for a results file, and write it to a file as plain text."""
    shown = list(make(data))
    for item in shown:
        console.print(item)
        console.print()
    if path is not None:
        with path.open("w") as file:
            text = wide_console(file)
            for item in shown:
                text.print(item)
                text.print()
