"""The patch. Its story is the docstring of `overlay.patches.lora_linear`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import torch
import wrapt
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.forward_context import is_forward_context_available
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from overlay.patches.lora_linear.verdict import ANCESTOR, BASE, SHRINK, SWITCH
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings, outcome
from overlay.side_work import adoption, gemms, insertion, lane, lowering, ops
from overlay.side_work.adoption import StaysStock, refuse_modes
from overlay.side_work.plan import Plan
from overlay.side_work.waiting import PAIR, Waiting
from overlay.verdict import Verdict, class_at
from overlay.vocabulary import DUAL, LANDED

NAME = "lora_linear"
#: The largest number of tokens at which a layer's linears together are not slower on two streams: TOKENS_OF_SMALL_RANKS for a rank up to
#: SMALL_RANK, TOKENS for a larger one. Source: an H200, bf16, Qwen3-8B's linears whole and as a shard of 4, ranks 8, 16 and 64 (benchmarks/results/h200-lora-micro).
SMALL_RANK, TOKENS_OF_SMALL_RANKS, TOKENS = 16, 256, 64
NO_DEVICE = "dual CUDA streams are only supported on CUDA platforms, this is {device}"
NO_ADAPTER = "no adapter active in the batch"
FULLY_SHARDED = "fully_sharded_loras isn't compatible with dual-stream LoRA"
#: vLLM's linears. A subclass with a forward of its own may give another shape or type than the adapters are made for.
LINEARS = (*gemms.LINEARS, QKVParallelLinear, RowParallelLinear)

Apply = Callable[..., torch.Tensor]


class Halves:
    """Stand-in for `self` in a punica wrapper's own `add_lora_linear`: notes what shrink and expand are to be given.

    Nothing runs but the allocation of the buffer between the two. A plain class, because Dynamo traces through it.
    """

    def add_shrink(
        self, buffer: Any, x: torch.Tensor, weights: tuple[torch.Tensor, ...], *rest: Any, **named: Any
    ) -> None:
        self.buffer = buffer
        self._shrink = x, weights, rest, named

    def add_expand(self, _output: None, *given: Any, **named: Any) -> None:
        self._expand = given, named

    def shrink(self, wrapper: Any, gate: torch.Tensor | None) -> None:
        x, weights, rest, named = self._shrink
        wrapper.add_shrink(self.buffer, x, weights if gate is None else Gated(weights, gate), *rest, **named)

    def expand(self, wrapper: Any, output: torch.Tensor) -> None:
        given, named = self._expand
        wrapper.add_expand(output, *given, **named)


class Gated:
    """The weights of a shrink that is to be started, and the gate: a parameter that the base layer's GEMM reads."""

    def __init__(self, weights: tuple[torch.Tensor, ...], gate: torch.Tensor) -> None:
        self.weights = weights
        self.gate = gate


class AddsNothing:
    """A punica wrapper for an `apply` that is to give the base layer's output alone."""

    def add_lora_linear(self, *_given: Any, **_named: Any) -> None: ...

    add_shrink = add_expand = add_lora_linear


@dataclass(frozen=True)
class LoraPair:
    """Main and side of a layer with adapters: its base layer and the shrink.

    `base` is the layer without its adapters, for upstream's `apply`. `gate` names the base layer's parameter that its GEMM reads.
    Without a gate, on a CPU, the shrink runs serially before the base layer.
    """

    base: torch.nn.Module
    gate: str | None

    @property
    def shape(self) -> str:
        """What of the pair shapes the compiled graph."""
        return f"by {self.gate}"


def lora_shrink(inputs: torch.Tensor, lora_a_weights: Any, *rest: Any, **named: Any) -> None:
    """Stands where upstream's `add_shrink` finds its op. Its other callers get the op."""
    if isinstance(lora_a_weights, Gated):
        torch.ops.vllm_overlay.lora_start(inputs, lora_a_weights.weights, *rest, lora_a_weights.gate, NAME)
    else:
        torch.ops.vllm.lora_shrink(inputs, lora_a_weights, *rest, **named)


def overlap_adapters(original: Apply) -> Apply:
    """A plain function to set on the class in the place of `original`. Plain, because Dynamo drops a wrapt wrapper."""

    @functools.wraps(original)
    def apply(self: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        pair = getattr(self, PAIR, None)
        # Towers of multimodal models run without a forward context. A third dimension is the batch of Transformers' models.
        if pair is None or x.dim() not in (2, 3) or not is_forward_context_available():
            return original(self, x, bias)
        wrapper, halves = self.punica_wrapper, Halves()
        # A view that changes nothing would be a node that stock's graph does not have.
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        type(wrapper).add_lora_linear(
            halves, None, rows, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        halves.shrink(wrapper, None if pair.gate is None else getattr(self.base_layer, pair.gate))
        output = original(pair.base, x, bias)
        if pair.gate is not None:
            torch.ops.vllm_overlay.join(halves.buffer, output, rows)
        elif not torch.compiler.is_compiling():
            ops.choose(rows, NAME)  # start is what counts elsewhere
        halves.expand(wrapper, output if output.dim() == 2 else output.view(-1, output.shape[-1]))
        return output

    return apply


def take_over_shrink(wrapper: Any) -> lowering.Edit:
    """Put `lora_shrink` where a wrapper's `add_shrink` finds upstream's op. Gives what takes a start back (`define_start`).

    Raises StaysStock where add_shrink does not find upstream's op.
    """
    known = getattr(type(wrapper).add_shrink, "__globals__", {})
    found, stock = known.get(SHRINK), getattr(torch.ops.vllm, SHRINK, None)
    if found is not lora_shrink:
        if found is None or found is not stock or not hasattr(wrapper, "token_mapping_meta"):
            raise StaysStock(f"{type(wrapper).__name__} does not shrink by vLLM's own op")
        known[SHRINK] = lora_shrink
    return define_start(stock)


@functools.cache
def define_start(stock: Any) -> lowering.Edit:
    """Define ``vllm_overlay::lora_start`` for upstream's op, once per process. Its arguments differ by release.

    Gives what puts stock's calls in its place.
    """
    flag = [argument.name for argument in stock.default._schema.arguments].index("no_lora_flag_cpu")
    return ops.define_start_of(stock, "lora_start", lambda given: NO_ADAPTER if given[flag].item() else None)


def without_adapters(layer: Any) -> Any:
    """A shallow copy of a layer whose adapters add nothing.

    A real instance of its class with the same modules and parameters, so that upstream's helpers and ``super()`` work.
    """
    copy = object.__new__(type(layer))
    copy.__dict__.update(layer.__dict__)
    copy.__dict__.update({"punica_wrapper": AddsNothing(), PAIR: None})
    return copy


def check_engine(layer: Any) -> None:
    """Raise StaysStock where all LoRA layers of an engine stay stock: on one rank as on all others."""
    config = get_current_vllm_config()
    if layer.lora_config.fully_sharded_loras:
        raise StaysStock(FULLY_SHARDED)
    refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
    lowering.refuse_without_graphs(layer.lora_a_stacked[0].device, config)


def check_class(layer_class: type, intercepted: tuple[type, ...]) -> None:
    """Raise StaysStock for a class that goes another way than through an intercepted `apply` and upstream's helpers."""
    classes = layer_class.__mro__
    linear_class = next(target for target in classes if target.__name__ == BASE[1])
    helpers = {name for name in linear_class.__dict__ if name.startswith("_") and not name.startswith("__")}
    first = min(classes.index(target) for target in intercepted if target in classes)
    for number, owner in enumerate(classes[: classes.index(linear_class)]):
        own = owner.__dict__.get("apply") if number < first else None
        if own is not None and not (isinstance(own, FunctionType) and {"super", "apply"} <= set(own.__code__.co_names)):
            raise StaysStock(f"{owner.__name__} has an apply of its own")
        changed = sorted(helpers & set(owner.__dict__))
        if changed:
            raise StaysStock(f"{owner.__name__} has {', '.join(changed)} of its own")


def check_base(base: Any, compilation: Any) -> None:
    """Raise StaysStock for a base layer beside which stock's bits would be lost.

    Where nothing is compiled, everybody reads the same value.
    """
    reason = gemms.reason_beside(base)
    compiles = bool(getattr(compilation, "mode", None))
    if reason is not None and compiles and not lowering.compiles_by_ranges(compilation):
        raise StaysStock(reason)


def make_pair(
    layer: Any, intercepted: tuple[type, ...], compilation: Any = None, strict: bool = False
) -> tuple[LoraPair, dict[str, Any]]:
    """The pair of a layer that has its weights, and what the journal shows. Raises StaysStock where it must stay stock.

    `compilation` is vLLM's CompilationConfig; None where nothing is compiled.
    """
    check_class(type(layer), intercepted)
    base = layer.base_layer
    if type(base).forward not in [linear.forward for linear in LINEARS]:
        raise StaysStock(f"{type(base).__name__} has a forward of its own")
    check_base(base, compilation)
    columns = getattr(base, "output_size_per_partition", base.output_size)
    found = sum(layer.output_slices)
    if found != columns:
        raise StaysStock(f"its LoRA slices have {found} columns, but the base layer has {columns} per shard")
    gate: str | None = gemms.gate_of(base)
    if adoption.other_device() is None or hasattr(layer.punica_wrapper, "token_mapping_meta"):
        edit = take_over_shrink(layer.punica_wrapper)
        if lowering.compiles_by_ranges(compilation):  # then starts can be put in last
            insertion.require(torch.ops.vllm_overlay.lora_start, torch.ops.vllm.lora_shrink, edit, strict)
    else:
        gate = None
    shown = {"output": found, "slices": len(layer.output_slices), "class": type(layer).__name__}
    return LoraPair(without_adapters(layer), gate), shown


def token_threshold(rank: int) -> int:
    """The largest number of tokens that forks. The kernels run at `rank`, whatever an adapter's own rank is."""
    return TOKENS_OF_SMALL_RANKS if rank <= SMALL_RANK else TOKENS


def decide(
    settings: Settings, record: PatchRecord, layers: Sequence[tuple[Any, LoraPair]], _worker: Any
) -> list[LoraPair]:
    """The pairs of a loaded model's layers, once they have their plan and the lane of their device is ready."""
    rank = max((layer.lora_a_stacked[0].shape[-2] for layer, _ in layers), default=0)
    ops.planned[NAME] = ops.PlannedPair(Plan(settings.forks, settings.tokens_or(token_threshold(rank))), record)
    on_gpu = [layer.lora_a_stacked[0].device for layer, _ in layers if layer.lora_a_stacked[0].is_cuda]
    for device in on_gpu[:1]:
        lane.use_once(device, functools.partial(_first_use, device))
    return [pair for _, pair in layers]


def _first_use(device: torch.device, on: lane.Lane) -> torch.Tensor:
    result = torch.zeros(1, device=device)
    on.start(result, DUAL, result.zero_)
    return result


def install(module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
    """Intercept the classes of `verdict` in a package that has just been imported. Gives the verdict that holds here."""
    if verdict.upstream is not None and getattr(envs, SWITCH, False):
        return replace(verdict, state=LANDED, reason=f"{SWITCH} is set: upstream's own dual stream", methods=())
    inert = adoption.inert_without_cuda(verdict, settings.serial_pass_through, NO_DEVICE)
    if inert is not None:
        return inert
    linear_class: Any = class_at(module, ".".join(BASE))
    ancestor: Any = class_at(module, ".".join(ANCESTOR))
    targets: tuple[Any, ...] = tuple(class_at(module, name) for name, _ in verdict.intercepted())
    record = journal.patch(NAME)
    make = functools.partial(decide, settings, record)
    waiting: Waiting[LoraPair, LoraPair] = Waiting(NAME, verdict, record, settings, make)

    def after_set_mapping(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        if not isinstance(layer, linear_class):
            return
        name = getattr(layer.base_layer, "prefix", type(layer).__name__)

        def check() -> tuple[LoraPair, dict[str, Any]]:
            check_engine(layer)
            return make_pair(layer, targets, get_current_vllm_config().compilation_config, settings.strict)

        waiting.adopt(layer, name, check)
        if record.refused.get(name) == FULLY_SHARDED:
            journal.problem(f"{NAME}: {outcome(settings.strict)}: {FULLY_SHARDED}")
            if settings.strict:
                raise ValueError(FULLY_SHARDED)

    waiting.begin()
    setattr(linear_class, PAIR, None)
    for target in targets:
        target.apply = overlap_adapters(target.__dict__["apply"])
    # Last, because everything before it changes nothing for a layer without a pair.
    wrapt.wrap_function_wrapper(ancestor, "set_mapping", after_set_mapping)
    return verdict
