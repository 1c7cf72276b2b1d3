"""Which way the pairs of linears of a loaded model run: measured, read from disk, or fixed by the setting.

Layers of one shape share a plan. Every strategy in a plan gives serial's bits (unless the setting allows otherwise), so the
ranks of a tensor-parallel group need not agree: each measures for itself.

One GEMM needs the weights in one buffer and the results in one tensor. At the sizes where two GEMMs run into that tensor it
costs the host more than two tensors do (H200, vLLM 0.33.0, 24 layers, time to first token of 600 to 8192 tokens, bound by the
host's CPU: 1.02 to 1.04 of stock). So it is among the strategies where the op runs in CUDA graphs alone, because larger
steps have a graph of stock's (overlay.lowering), or where the setting asks for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from overlay import cache_identity, plan_file, tuning
from overlay.gemms import gemm_of, is_plain
from overlay.journal import PatchRecord, journal
from overlay.layers import Refused
from overlay.log import logger
from overlay.pair import ADAPTERS, LinearPair, has_adapters
from overlay.plan import DUAL, DUAL_MAIN_FIRST, FUSED, SERIAL, SizePlan
from overlay.settings import Settings
from overlay.tuning import Bench, Row

NO_CAPTURE = "no CUDA graph is captured, so there is nothing to overlap"
NOTHING_TO_GAIN = "serial was measured to be fastest at every captured size"
#: Seconds for one shape before what is left is taken from its neighbours.
SECONDS_PER_SHAPE = 2.0
#: Modes in which vLLM pads every step to a captured size, up to the largest.
MIXED_GRAPHS = ("FULL", "PIECEWISE", "FULL_AND_PIECEWISE")
ONE_RESULT = "two GEMMs into one tensor"
#: Sizes outside CUDA graphs at which one result tensor is compared with two, up to the largest batch.
STEPS_BETWEEN_POWERS = (1.0, 1.02, 1.27, 1.5, 1.77)
EMPTY_CACHE_AFTER_BYTES = 256 << 20
#: Fields of vLLM's model configuration by which weights lie in a pool of their own: what they leave behind would stay
#: there. The second is there from vLLM 0.22.0 on; sleep mode turns it on.
OWN_MEMORY_POOL = ("enable_sleep_mode", "enable_cumem_allocator")


@dataclass(frozen=True)
class Candidate:
    """A layer's pair, its linears, and whether what reads their results may be given slices of one tensor."""

    layer: str
    pair: LinearPair
    main: torch.nn.Module
    side: torch.nn.Module
    takes_slices: bool

    def shape(self) -> dict[str, Any]:
        """What the times depend on, but for the machine: columns and rows of the weights, types, kernels."""
        return {
            "hidden": int(self.main.input_size),
            "main": self.pair.main_size,
            "side": self.pair.side_size,
            "dtype": str(getattr(self.main, "params_dtype", None) or self.main.weight.dtype),
            "gemms": [gemm_of(self.main), gemm_of(self.side)],
            "takes_slices": self.takes_slices,
        }


def settle(
    candidates: Sequence[Candidate], worker: Any, settings: Settings, record: PatchRecord, above_is_stock: bool
) -> dict[str, str]:
    """Give each pair its plan, before vLLM traces; the layers that are better off stock, with the reason.

    `worker` is vLLM's, with its model loaded; `above_is_stock`: steps above the captured sizes run stock's graph. Layers that
    run on no GPU keep what they have.
    """
    stock = {one.layer: ADAPTERS for one in candidates if has_adapters(one.main) or has_adapters(one.side)}
    left = [one for one in candidates if one.layer not in stock and _device(one).type == "cuda"]
    if settings.plan == SERIAL or not left:
        return stock
    sizes = _captured_sizes(worker.vllm_config, settings)
    if not sizes:
        return stock | {one.layer: NO_CAPTURE for one in left}
    shapes: dict[str, list[Candidate]] = {}
    for one in left:
        try:
            shapes.setdefault(str(one.shape()), []).append(one)
        except Refused as refused:  # loading has given it another kernel
            stock[one.layer] = str(refused)
    if settings.plan == DUAL:
        return stock
    for group in shapes.values():
        for layer in _settle_shape(group, sizes, worker, settings, record, above_is_stock):
            stock[layer] = NOTHING_TO_GAIN
    return stock


def _settle_shape(
    group: Sequence[Candidate],
    sizes: Sequence[int],
    worker: Any,
    settings: Settings,
    record: PatchRecord,
    above_is_stock: bool,
) -> list[str]:
    begin = time.perf_counter()
    say = logger.info if not getattr(worker, "rank", 0) else logger.debug
    shape, device = group[0].shape(), _device(group[0])
    config = worker.vllm_config
    # With columns that only align the one tensor, the op stays in the graph above.
    only_graphs = above_is_stock and _mode(config) in MIXED_GRAPHS and group[0].pair.fills_one_result
    largest = int(config.scheduler_config.max_num_batched_tokens)
    fusable = (settings.plan == FUSED or only_graphs) and _fusable(group, config)
    inexact = fusable and settings.plan == FUSED and settings.inexact
    key = _machine(device) | {
        "overlay": cache_identity.source_hash(),  # another way to measure is another plan
        "shape": shape,
        "sizes": list(sizes),
        "largest": largest,
        "fusable": fusable,
        "inexact": inexact,
        "vllm": journal.vllm_version,
    }
    folder = _folder()
    found = _read(folder, key, say)
    if found is None:
        rows, one_result = _measure(group, sizes, largest, fusable, inexact)
        _write(folder, key, rows, one_result, say)
        source = "measured"
    else:
        (rows, one_result), source = found, "read"
    if settings.plan == FUSED and one_result:
        rows = [_fixed(row, inexact) for row in rows]
    strategies = {row.tokens: row.strategy for row in rows}
    if FUSED in strategies.values():
        _fuse(group)
    plan = SizePlan.of(strategies)
    for one in group:
        one.pair.plan = plan
        one.pair.one_result = FUSED in strategies.values()
    seconds = time.perf_counter() - begin
    record.plans.append(
        {
            "shape": shape,
            "layers": len(group),
            "source": source,
            "seconds": round(seconds, 3),
            "rows": [
                {"tokens": row.tokens, "strategy": row.strategy, "us": row.microseconds, "inexact": list(row.inexact)}
                for row in rows
            ],
        }
    )
    say("overlay: %s", table(shape, len(group), rows, f"{source} in {seconds:.1f} s"))
    return [] if plan.token_threshold else [one.layer for one in group]


def _fixed(row: Row, inexact: bool) -> Row:
    """The row with one GEMM wherever it may be. Where it may change bits that is at every size, for the ranks of a group must
    not differ in that."""
    return replace(row, strategy=FUSED) if inexact or FUSED not in row.inexact else row


def _measure(
    group: Sequence[Candidate], sizes: Sequence[int], largest: int, fusable: bool, inexact: bool
) -> tuple[list[Row], bool]:
    """The rows of a shape, and whether one GEMM is among the strategies: then one result tensor has the bits of two at every
    size that was tried up to `largest`."""
    device = _device(group[0])
    probes = list(group[: tuning.layers_for(_weight_bytes(group[0]), len(group), device)])
    linears: list[tuple[LinearPair, Any, Any]] = []

    def apart(strategy: str) -> tuning.Work:
        def work(layer: int, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
            pair, main, side = linears[layer]
            return pair.run(strategy, main, side, inputs)

        return work

    def in_one(strategy: str) -> tuning.Work:
        def work(layer: int, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
            pair, main, side = linears[layer]
            return pair.slices(pair.run_into_one(strategy, main, side, inputs))

        return work

    works = {strategy: apart(strategy) for strategy in (SERIAL, DUAL, DUAL_MAIN_FIRST)}
    bench = Bench(
        works,
        len(probes),
        int(probes[0].main.input_size),
        _input_dtype(probes[0]),
        device,
        inexact,
        same_kernels=(DUAL, DUAL_MAIN_FIRST),
    )
    other_bits: set[int] = set()  #: sizes at which one GEMM was compared and left out
    with bench:
        if fusable:
            bench.cancels = True
            linears.append(_cancelling(probes[0], bench))  # stays the last one, which is number CANCELLING
            bench.works = {SERIAL: works[SERIAL], FUSED: in_one(FUSED), ONE_RESULT: in_one(SERIAL)}
            if not inexact:
                other_bits = {*sizes} - {*bench.exact_at(FUSED, sizes)}
                fusable = other_bits != {*sizes} and _is_exact_into_one(bench, _sizes_to_compare(sizes, largest))
            bench.works = works
        if fusable:
            _fuse(probes)
            bench.wait()
            works[FUSED] = in_one(FUSED)
        linears[:0] = [(one.pair.probe(), one.main, one.side) for one in probes]
        with torch.cuda.stream(bench.stream):
            for number in range(len(linears)):  # no name for one of them: it would keep its memory until the end
                linears[number][0].region.prepare(device)
        rows = bench.rows(sizes, SECONDS_PER_SHAPE)
        linears.clear()
    if not fusable:
        rows = [replace(row, inexact=(*row.inexact, FUSED)) if row.tokens in other_bits else row for row in rows]
    return rows, fusable


def _is_exact_into_one(bench: Bench, sizes: Sequence[int]) -> bool:
    """Whether two GEMMs into one tensor have serial's bits at all of the sizes."""
    return bench.exact_at(ONE_RESULT, sizes) == list(sizes)


def _cancelling(one: Candidate, bench: Bench) -> tuple[LinearPair, Any, Any]:
    """A pair like a candidate's, with weights that cancel."""
    pair = LinearPair(one.pair.main_size, one.pair.side_size, one.pair.plan, PatchRecord())
    common = pair.common = bench.weights(pair.columns)
    first, last = pair.main_size, pair.main_size + pair.side_size
    return pair, _Weights(common[:first]), _Weights(common[first:last])


class _Weights:
    """A linear in vLLM's manner, of given weights."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(inputs, self.weight), None


def _sizes_to_compare(sizes: Sequence[int], largest: int) -> list[int]:
    """Every captured size, and five between each two powers of two up to the largest number of tokens that the op sees."""
    between = (int(step * 2**power) for power in range(largest.bit_length()) for step in STEPS_BETWEEN_POWERS)
    return sorted({*sizes, largest, *(tokens for tokens in between if tokens <= largest)})


def _captured_sizes(config: Any, settings: Settings) -> list[int]:
    """The sizes of the CUDA graphs that vLLM is going to capture, up to the token threshold where one was set.

    With speculative decoding vLLM rounds them up to whole requests later on (for some graphs, in some releases), so both
    are among them.
    """
    compilation = config.compilation_config
    if _mode(config) == "NONE":
        return []
    sizes = {int(size) for size in compilation.cudagraph_capture_sizes or []}
    per_request = 1 + (getattr(getattr(config, "speculative_config", None), "num_speculative_tokens", None) or 0)
    sizes |= {rounded for size in sizes if (rounded := -(-size // per_request) * per_request) <= max(sizes)}
    limit = settings.token_threshold
    return sorted(size for size in sizes if limit is None or size <= limit)


def _mode(config: Any) -> str:
    """The name of vLLM's CUDAGraphMode."""
    return getattr(config.compilation_config.cudagraph_mode, "name", "")


def _fusable(group: Sequence[Candidate], config: Any) -> bool:
    """Whether one GEMM may take the place of two: plain weights, and nobody who keeps an eye on where they lie."""
    if any(getattr(config.model_config, name, False) for name in OWN_MEMORY_POOL) or _offloads():
        return False
    return all(
        one.takes_slices and is_plain(one.main) and is_plain(one.side) and one.pair.fits(one.main, one.side)
        for one in group
    )


def _offloads() -> bool:
    """Whether vLLM keeps weights in CPU memory: it lets their parameters point to where it copies them, or to the CPU's
    memory itself, and a buffer of ours would keep what lay there at the start."""
    try:
        from vllm.model_executor.offloader.base import NoopOffloader, get_offloader
    except ImportError:  # not where it was in vLLM 0.19.0 to 0.33.0
        return True
    return type(get_offloader()) is not NoopOffloader


def _fuse(group: Iterable[Candidate]) -> None:
    """Each layer's weights into one buffer; what they leave is given back soon, so memory grows by little."""
    freed = 0
    for one in group:
        freed += one.pair.fuse(one.main, one.side)
        if freed > EMPTY_CACHE_AFTER_BYTES:
            torch.cuda.empty_cache()
            freed = 0
    torch.cuda.empty_cache()


def _device(one: Candidate) -> torch.device:
    return next(one.main.parameters()).device


def _input_dtype(one: Candidate) -> torch.dtype:
    dtype = getattr(one.main, "params_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _weight_bytes(one: Candidate) -> int:
    return sum(tensor.nbytes for linear in (one.main, one.side) for tensor in linear.parameters())


def _machine(device: torch.device) -> dict[str, Any]:
    """The GPU and what drives it, with everything by which torch chooses a GEMM's kernel."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matmul": [
            str(torch.backends.cuda.preferred_blas_library()),
            str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
            str(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction),
            torch.get_float32_matmul_precision(),
            os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
        ],
    }


def _driver() -> str:
    """The driver's version by NVML, which vLLM brings; "unknown" where it does not tell."""
    try:
        from vllm.utils.import_utils import import_pynvml

        nvml = import_pynvml()
        nvml.nvmlInit()
        try:
            return str(nvml.nvmlSystemGetDriverVersion())
        finally:
            nvml.nvmlShutdown()
    except Exception:
        return "unknown"


def _folder() -> str:
    """Beside vLLM's own caches, which an operator keeps from one start to the next."""
    from vllm import envs

    return os.path.join(os.path.expanduser(str(envs.VLLM_CACHE_ROOT)), "auxstream_overlay")


def _read(folder: str, key: dict[str, Any], say: Callable[..., None]) -> tuple[list[Row], bool] | None:
    try:
        found = plan_file.load(folder, key)
        if found is not None and [row.tokens for row in found[0]] != key["sizes"]:
            raise plan_file.Unusable(f"{plan_file.path_of(folder, key)}: its sizes are not those of this vLLM's graphs")
        return found
    except plan_file.Unusable as reason:
        say("overlay: the plan on disk is not used, measuring anew: %s", reason)
        return None


def _write(folder: str, key: dict[str, Any], rows: list[Row], one_result: bool, say: Callable[..., None]) -> None:
    try:
        plan_file.store(folder, key, rows, one_result)
    except OSError as error:
        say("overlay: the plan is not kept, the next start measures again: %s", error)


def table(shape: dict[str, Any], layers: int, rows: Sequence[Row], how: str) -> str:
    """The measured rows as text, microseconds per layer; the choice of sizes in between is in the journal."""
    shown_of = [{*row.microseconds, *row.inexact} for row in rows if row.microseconds]
    names = [name for name in plan_file.STRATEGIES if any(name in of_row for of_row in shown_of)]
    columns: list[tuple[str, Callable[[Row], str]]] = [("tokens", lambda row: str(row.tokens))]
    for name in names:
        columns.append((name, lambda row, name=name: _time(row, name)))  # type: ignore[misc]
    columns.append(("plan", lambda row: row.strategy))
    shown = [[read(row) for _, read in columns] for row in rows if row.microseconds]
    widths = [max(len(title), *(len(line[index]) for line in shown), 0) for index, (title, _) in enumerate(columns)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in shown]
    title = "  ".join(text.rjust(width) for (text, _), width in zip(columns, widths, strict=True))
    head = f"plan for {layers} layers of {shape['hidden']} to {shape['main']} + {shape['side']}, {how}, µs per layer:"
    return "\n".join([head, title, *lines])


def _time(row: Row, name: str) -> str:
    if name in row.inexact:
        return "other bits"
    return f"{row.microseconds[name]:.1f}" if name in row.microseconds else ""
