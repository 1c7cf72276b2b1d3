"""Main and side of a layer, and the sizes at which they fork: measured on the loaded layers, read from disk, or set.

A plan is a choice at run time. It shapes no graph, no memory and no key of a cache, so noise of a measurement may change
it. Layers of one shape and one kind of main share a plan. Each rank measures for itself. The ranks of a tensor-parallel
group need not agree, because every strategy gives the same bits.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from overlay.engine import compile_cache
from overlay.report.journal import PatchRecord, journal
from overlay.report.log import logger
from overlay.settings import Settings
from overlay.side_work import lane, lowering, measure, ops, plan_file
from overlay.side_work.measure import Measurement, Row
from overlay.side_work.plan import Plan, SizePlan
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL, STRATEGIES

#: Seconds of measuring for one shape. Sizes that are left get their neighbours' strategy.
SECONDS_PER_SHAPE = 2.0


@dataclass(frozen=True)
class Pair:
    """A layer's main and side linear, as start and join use them.

    `main_columns` and `columns` are the sizes of main's and side's output per tensor-parallel shard. `gate` is the name of
    main's parameter that main's GEMM reads. `plain`: side is only a GEMM of its weight, so start needs no layer. `traced`:
    Dynamo traces the layer's method, so start and join are ops around main's GEMM; otherwise they are plain calls around all
    of main. `name` is one line: what the plan depends on, except the machine.
    """

    layer: str
    main: torch.nn.Module
    side: torch.nn.Module
    main_columns: int
    columns: int
    main_kind: str
    side_kind: str
    gate: str
    plain: bool
    traced: bool = True
    name: str = field(init=False)
    on_gpu: bool = field(init=False)

    def __post_init__(self) -> None:
        name = (
            f"{self.hidden} to {self.main_columns} ({self.main_kind}) + {self.columns} ({self.side_kind}), {self.dtype}"
        )
        if not self.traced:
            name += ", not compiled"
        # Fields and no properties: Dynamo reads the one for each layer, and a step the other.
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "on_gpu", self.device.type == "cuda")

    @property
    def shape(self) -> str:
        """The part of the pair that shapes the compiled graph."""
        return f"{self.name} by {self.gate}"

    @property
    def hidden(self) -> int:
        """Columns of the input."""
        return int(self.main.input_size)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the input."""
        dtype = getattr(self.main, "params_dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16

    @property
    def device(self) -> torch.device:
        return next(self.side.parameters()).device


def settle(pairs: Sequence[Pair], worker: Any, settings: Settings, record: PatchRecord, default: Plan) -> None:
    """Give each pair its plan, after the weights have been loaded and before vLLM sizes its KV cache.

    `worker` is vLLM's. On a GPU the auxiliary stream and its cuBLAS workspace are made here, so vLLM counts their memory.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.name, []).append(pair)
    on_gpu = {name: group for name, group in groups.items() if group[0].on_gpu}
    plans: dict[str, Plan] = dict.fromkeys(groups, default)
    if settings.plan not in (SERIAL, DUAL):
        sizes = captured_sizes(worker.vllm_config, settings)
        plans |= {name: _measured(group, sizes, worker, record) for name, group in on_gpu.items()}
    for group in on_gpu.values():  # last, because measuring frees the workspaces of all streams
        lane.use_once(group[0].device, functools.partial(_first_use, group[0]))
    for name, plan in plans.items():
        ops.planned[name] = ops.PlannedPair(plan, record)


def _first_use(pair: Pair, on: lane.Lane) -> torch.Tensor:
    x = torch.zeros((1, pair.hidden), device=pair.device, dtype=pair.dtype)
    return start_side(pair, x, DUAL, on)


def _measured(group: Sequence[Pair], sizes: Sequence[int], worker: Any, record: PatchRecord) -> SizePlan:
    """The plan of one group, read from disk or else measured, with a line in the log and an entry in the journal."""
    begin = time.perf_counter()
    say = logger.info if not getattr(worker, "rank", 0) else logger.debug
    first = group[0]
    key = _machine(first.device) | {
        "overlay": compile_cache.source_hash(),  # other code may measure another plan
        "pair": first.name,
        "sizes": list(sizes),
        "vllm": journal.vllm_version,
    }
    folder = _folder()
    rows = _read(folder, key, say)
    source = "read"
    if rows is None:
        source, rows = "measured", rows_of(group, sizes)
        _write(folder, key, rows, say)
    seconds = time.perf_counter() - begin
    record.plans.append(
        {
            "shape": {
                "hidden": first.hidden,
                "main": first.main_columns,
                "side": first.columns,
                "dtype": str(first.dtype),
                "gemms": [first.main_kind, first.side_kind],
            },
            "layers": len(group),
            "source": source,
            "seconds": round(seconds, 3),
            "rows": [{"tokens": row.tokens, "strategy": row.strategy, "us": row.microseconds} for row in rows],
        }
    )
    say("overlay: %s", table(first.name, len(group), rows, f"{source} in {seconds:.1f} s"))
    return SizePlan.of({row.tokens: row.strategy for row in rows})


def rows_of(group: Sequence[Pair], sizes: Sequence[int]) -> list[Row]:
    """Measure pairs of one name, which are on one GPU. The list is empty where no auxiliary stream can be had."""
    first = group[0]
    found = lane.prepare(first.device)
    if found is None or not sizes:
        return []
    probes = list(group[: measure.layers_for(weight_bytes(first), len(group), first.device)])
    strategies = (SERIAL, DUAL, DUAL_MAIN_FIRST) if first.plain else (SERIAL, DUAL)

    mains: list[Callable[[], Any]] = []

    def prepare(x: torch.Tensor) -> None:
        mains[:] = [_between_start_and_join(pair, x) for pair in probes]

    def work(strategy: str) -> measure.Work:
        def run(layer: int, x: torch.Tensor) -> Sequence[Any]:
            x = x * 1  # stands for the kernel that makes the input in a step
            return run_pair(probes[layer], mains[layer], x, strategy, found)

        return run

    with Measurement(
        {strategy: work(strategy) for strategy in strategies},
        len(probes),
        first.hidden,
        first.dtype,
        first.device,
        prepare,
    ) as measurement:
        return measurement.rows(sizes, SECONDS_PER_SHAPE)


def _between_start_and_join(pair: Pair, x: torch.Tensor) -> Callable[[], Any]:
    """What main's stream runs in the meantime: in a compiled graph main's GEMM alone, because the input is quantized before."""
    main = functools.partial(pair.main, x)
    return measure.gemm_that_reads(getattr(pair.main, pair.gate), main) if pair.traced else main


def run_pair(
    pair: Pair, main: Callable[[], Any], x: torch.Tensor, strategy: str, on: lane.Lane
) -> tuple[Any, torch.Tensor]:
    """Run main and side by a given strategy, as the two ops do around main. Returns both results."""
    if strategy == SERIAL:
        return main(), pair.side(x)[0]
    side = start_side(pair, x, strategy, on)
    result = main()
    on.join(side)
    return result, side


def start_side(pair: Pair, x: torch.Tensor, strategy: str, on: lane.Lane) -> torch.Tensor:
    """Start the side, as the ops do. Returns its result."""
    if not pair.plain:
        return on.start_and_give(lambda: pair.side(x)[0])
    side = x.new_empty((x.shape[0], pair.columns))
    on.start(side, strategy, functools.partial(ops.gemm, x, pair.side.weight, side))
    return side


def captured_sizes(config: Any, settings: Settings) -> list[int]:
    """The sizes of the CUDA graphs that vLLM is going to capture, up to the token threshold if one is set.

    With speculative decoding vLLM later rounds them up to whole requests (some graphs, some releases), so both are
    included.
    """
    compilation = config.compilation_config
    if not lowering.captures(compilation):
        return []
    sizes = {int(size) for size in compilation.cudagraph_capture_sizes}
    per_request = 1 + (getattr(getattr(config, "speculative_config", None), "num_speculative_tokens", None) or 0)
    sizes |= {rounded for size in sizes if (rounded := -(-size // per_request) * per_request) <= max(sizes)}
    limit = settings.token_threshold
    return sorted(size for size in sizes if limit is None or size <= limit)


def weight_bytes(pair: Pair) -> int:
    """Of main and side together."""
    return sum(tensor.nbytes for linear in (pair.main, pair.side) for tensor in linear.parameters())


def _machine(device: torch.device) -> dict[str, Any]:
    """The GPU and its driver, with every setting by which torch chooses a GEMM's kernel."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cublas": _cublas(),
        "matmul": [
            str(torch.backends.cuda.preferred_blas_library()),
            str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
            str(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction),
            torch.get_float32_matmul_precision(),
            os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
        ],
    }


def _driver() -> str:
    """The driver's version from NVML, which vLLM brings along; "unknown" if it does not tell."""
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


def _cublas() -> str:
    """The version of cuBLAS that is installed beside torch; "unknown" if it was installed in another way."""
    from importlib import metadata

    for name in ("nvidia-cublas", f"nvidia-cublas-cu{(torch.version.cuda or '').partition('.')[0]}"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _folder() -> str:
    """A folder beside vLLM's own caches, which an operator keeps from one start to the next."""
    from vllm import envs

    return os.path.join(os.path.expanduser(str(envs.VLLM_CACHE_ROOT)), "auxstream_overlay")


def _read(folder: str, key: dict[str, Any], say: Callable[..., None]) -> list[Row] | None:
    try:
        found = plan_file.load(folder, key)
        if found is not None and [row.tokens for row in found] != key["sizes"]:
            raise plan_file.Unusable(f"{plan_file.path_of(folder, key)}: its sizes are not those of this vLLM's graphs")
        return found
    except plan_file.Unusable as reason:
        say("overlay: the plan on disk is not used, measuring anew: %s", reason)
        return None


def _write(folder: str, key: dict[str, Any], rows: list[Row], say: Callable[..., None]) -> None:
    try:
        plan_file.store(folder, key, rows)
    except OSError as error:
        say("overlay: the plan is not kept, the next start measures again: %s", error)


def table(name: str, layers: int, rows: Sequence[Row], how: str) -> str:
    """The measured rows as text, in microseconds per layer. The journal has the choice for sizes in between."""
    measured = [row for row in rows if row.microseconds]
    names = [name for name in STRATEGIES if any(name in row.microseconds for row in measured)]
    lines = [["tokens", *names, "plan"]]
    for row in measured:
        times = [f"{row.microseconds[name]:.1f}" if name in row.microseconds else "" for name in names]
        lines.append([str(row.tokens), *times, row.strategy])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([f"plan for {layers} layers of {name}, {how}, µs per layer:", *shown])
