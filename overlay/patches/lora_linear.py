"""LoRA linears: the base layer's GEMM, and next to it the first half of what the adapters add.

Symptom: each linear with LoRA runs its base GEMM, then a shrink (a fill, and a GEMM to the adapters' rank) and an expand
(a GEMM from the rank to the output, which it adds to) on one stream. At decode sizes the LoRA kernels take as long as the
GEMM, or longer, and fill a few percent of the GPU.

Cause: nothing orders the shrink and the base GEMM; both read the layer's input.

Fix: the base layer stays on the main stream, the shrink runs next to it on an auxiliary stream, and upstream's own expand
adds to the base layer's output after the join; all inside one custom op. Upstream's `apply` runs, on a copy of the layer
whose punica wrapper only notes which tensor it was asked to add to. So upstream's reshape, 3-D and quantization code is
not repeated here, and its kernels get the arguments that it would have given them itself: the result cannot differ.

Outside a CUDA graph nothing forks, and the host's CPU decides how long a step takes. There stock runs compiled code, which
holds only what upstream's Python came to when it was traced: one GEMM, one buffer, two ops. So does the op: `learn` lets
upstream's Python run once per layer with stand-ins that note what it calls, and `Replay` makes those calls, with the
tensors of the step. A layer whose calls are not exactly these keeps running upstream's `apply`.

Upstream: vLLM #35721 in 0.20.0, off by default (``VLLM_LORA_ENABLE_DUAL_STREAM``). Where that is set, this patch steps
aside. It puts the expand on the auxiliary stream as well, into a buffer of zeros that is added at the end. That hides more
and costs more: a fill, and an addition that reads the whole output once more. Microseconds in a CUDA graph on one H200,
torch 2.11, the four linears of an 8B model, kernels of vLLM 0.33.0, rank 16; base GEMMs alone | serial | this patch | expand
on the auxiliary stream as well: 1 token 118|176|156|155; 8 tokens 120|179|161|164; 64 tokens 128|187|170|175; 128 tokens
137|254|231|237; 256 tokens 168|313|276|300. Rank 64: 8 tokens
119|205|181|188; 256 tokens 170|326|309|347.
Upstream's switch leaves out merged layers (gate_up_proj, qkv_proj) up to 0.24.0 and replicated ones in all releases, takes
the layer name as ``str``, by which every layer becomes a compile artifact of its own, and turns PDL on for the LoRA
kernels; this patch leaves that alone.

Remove when: upstream's switch covers the layers that you serve, and is set.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any, Optional

import torch
import wrapt
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform

from overlay.journal import PatchRecord, journal
from overlay.layers import Refused, adopt, refuse_modes
from overlay.log import logger
from overlay.settings import Settings
from overlay.side_work import ops
from overlay.side_work.plan import Plan
from overlay.side_work.streams import ParallelRegion
from overlay.verdict import INERT, LANDED, Verdict, class_at
from overlay.verdict.lora_linear import ANCESTOR, BASE, SWITCH

NAME = "lora_linear"
OP_NAME = "lora_linear"
#: Tokens; measured on an H200 (above). At 512 serial wins.
TOKEN_THRESHOLD = 256
#: The attribute that holds a layer's `LinearOverlap`, or None where the layer stays stock.
OVERLAP = "_overlay_lora_overlap"
NO_ADAPTER = "no adapter active in the batch"
COPIED = "upstream has copied its output"
BEFORE_CAPTURE = "no call before the capture"
#: Upstream's ops for the two halves of what an adapter adds, and where their functions are.
SHRINK, EXPAND = "lora_shrink", "lora_expand"
OPS = "vllm.lora.ops.triton_ops"
#: Rows of the input from which a layer's calls are learned. Nothing is computed from them.
LEARNED_ROWS = 3
FULLY_SHARDED = "fully_sharded_loras isn't compatible with dual-stream LoRA"
#: vLLM's linears. A subclass with a forward of its own may give another shape or type than the op promises.
LINEARS = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear, ReplicatedLinear)
#: Linears that read the activation as it is, by method or scheme. Any other may quantize it, which a compiled graph
#: fuses with what comes before the layer; inside an op it cannot, and the rounding would differ.
ACTIVATION_AS_IT_IS = frozenset({
    "UnquantizedLinearMethod", "BitsAndBytesLinearMethod", "GGUFLinearMethod",
    "AWQLinearMethod", "AWQMarlinLinearMethod", "AutoAWQLinearMethod", "AutoAWQMarlinLinearMethod",
    "GPTQLinearMethod", "GPTQMarlinLinearMethod", "AutoGPTQLinearMethod",
    "CompressedTensorsWNA16", "CompressedTensorsW4A16Fp4", "CompressedTensorsW8A16Fp8",
})  # fmt: skip

Apply = Callable[..., torch.Tensor]

#: Layers by engine (the identity of its static forward context) and name; two engines of one process share names.
_registered: weakref.WeakValueDictionary[tuple[int, str], LinearOverlap] = weakref.WeakValueDictionary()
#: What all layers of a punica wrapper give its kernels beside their own tensors.
_metadata: weakref.WeakKeyDictionary[Any, Metadata] = weakref.WeakKeyDictionary()


class DeferredAddition:
    """A punica wrapper that adds nothing. It notes the tensors that upstream gives it to add to, (tokens, columns)."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []

    def add_lora_linear(self, output: torch.Tensor, *_args: Any) -> None:
        self.outputs.append(output)

    def add_shrink(self, *_args: Any) -> None:
        """The half before upstream's collective (merged layers, 0.20.0 to 0.24.0)."""

    def add_expand(self, output: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        self.outputs.append(output)


class Halves:
    """Stand-in for `self` in a punica wrapper's own `add_lora_linear`: notes what shrink and expand are to be given.

    Nothing runs but the allocation of the buffer between the two, (slices, tokens, rank).
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        self._given["shrink"] = (args, kwargs)

    def add_expand(self, _output: None, *args: Any, **kwargs: Any) -> None:
        self._given["expand"] = (args, kwargs)

    def shrink(self) -> None:
        args, kwargs = self._given["shrink"]
        self._wrapper.add_shrink(*args, **kwargs)

    def expand_into(self, output: torch.Tensor) -> None:
        args, kwargs = self._given["expand"]
        self._wrapper.add_expand(output, *args, **kwargs)


class LinearOverlap:
    """What the op needs of one layer: columns per tensor-parallel shard, stream and events, and where it counts.

    `original` is upstream's `apply` for the layer.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        layer_name: str,
        output_size: int,
        original: Apply,
        plan: Plan,
        record: PatchRecord,
    ) -> None:
        self.layer_name = layer_name
        self.output_size = output_size
        self.region = ParallelRegion(slots=1)
        self._layer = weakref.ref(layer)
        self._original = original
        self._plan = plan
        self._record = record
        self._learned = False
        self._replay: Replay | None = None

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(…, features) to (…, output_size), of the same type."""
        layer = self._layer()
        assert layer is not None  # it holds this object
        reason = self._reason_for_serial(layer, x)
        if reason is None:
            output = self._overlapped(layer, x, bias)
            if output is not None:
                self._record.calls.dual_stream += 1
                return output
            reason = COPIED
        self._record.calls.count_serial(reason)
        if not self._learned and reason is not BEFORE_CAPTURE:
            self._replay, self._learned = self._learn(layer, x, bias), True
        replay = self._replay
        if replay is not None and replay.fits(layer, x, bias):
            return replay.run(layer, x, bias)
        return self._original(layer, x, bias)

    def _learn(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> Replay | None:
        """The calls of the layer's `apply`; None where they are not those of a `Replay`. Raises nothing."""
        try:
            return learn(layer, self._original, x, bias)
        except Unlearnable as error:
            _say_once(f"{type(layer).__name__} runs upstream's apply where nothing forks: {error}")
        except Exception as error:
            journal.problem(f"{NAME}: {self.layer_name} runs upstream's apply where nothing forks: {error!r}")
        return None

    def _reason_for_serial(self, layer: torch.nn.Module, x: torch.Tensor) -> str | None:
        if not x.is_cuda:
            return "serial pass-through"
        if not self.region.prepared:
            if torch.cuda.is_current_stream_capturing():
                return BEFORE_CAPTURE
            self.region.prepare(x.device)
        if layer.punica_wrapper.token_mapping_meta.no_lora_flag_cpu.item():  # on the host: no synchronization
            return NO_ADAPTER
        return self._plan.reason_for_serial(x.shape[:-1].numel())

    def _overlapped(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The same on two streams; None where upstream's output is not the tensor that was to be added to.

        The buffer between shrink and expand is allocated on the main stream, where it is also read last. So no block of
        memory changes streams, whichever stream is the main one here (vLLM runs shared experts on one of its own).
        """
        addition, halves = DeferredAddition(), Halves(layer.punica_wrapper)
        type(layer.punica_wrapper).add_lora_linear(
            halves, None, x.flatten(0, -2), layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices
        )
        base = _copy_with(layer, punica_wrapper=addition)
        output, _ = self.region.run(lambda: self._original(base, x, bias), [halves.shrink])
        (to_add_to,) = addition.outputs
        if to_add_to.data_ptr() != output.data_ptr() or to_add_to.numel() != output.numel():
            return None
        halves.expand_into(to_add_to)
        assert isinstance(output, torch.Tensor)
        return output


class Unlearnable(Exception):
    """Why upstream's calls for a layer cannot be made without its Python."""


class NotedCalls(TorchDispatchMode):  # type: ignore[misc]  # torch gives no type for it
    """Notes the calls of upstream's two LoRA ops, by name, instead of running them.

    Raises Unlearnable for any other op but torch's own: a rank that learns alone would wait for the others in a collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, list[tuple[Any, list[Any]]]] = {SHRINK: [], EXPAND: []}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "aten":
            return op(*args, **kwargs)
        namespace, _, name = op.name().partition("::")
        if namespace != "vllm" or name not in self.noted:
            raise Unlearnable(f"it calls {op.name()}")
        defaults = op._schema.arguments[len(args) :]  # what is given as a default does not arrive here
        rest = [kwargs.get(argument.name, argument.default_value) for argument in defaults]
        self.noted[name].append((op, [*args, *rest]))
        return None


class NotedMethod:
    """A base layer's method that notes what it is given, and computes nothing."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output
        self.given: list[tuple[Any, ...]] = []

    def apply(self, *given: Any) -> torch.Tensor:
        self.given.append(given)
        return self.output


class NotedMetadata:
    """The metadata of a punica wrapper's kernels, which notes what it is asked for and what it gives."""

    def __init__(self, metadata: Any) -> None:
        self._metadata = metadata
        self.asked: list[tuple[Any, ...]] = []
        self.given: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metadata, name)

    def meta_args(self, *asked: Any) -> tuple[Any, ...]:
        self.asked.append(asked)
        self.given.append(self._metadata.meta_args(*asked))
        return self.given[-1]


class Metadata:
    """What upstream's metadata gives the LoRA kernels, kept for the number of tokens of the last call.

    These are views of tensors that live as long as the wrapper, and whose content changes in place with each step. So
    the layers of a step share them, as they do in stock's compiled graph. `rest` is what upstream's `meta_args` is
    given beside the number of tokens.
    """

    def __init__(self, source: Any, rest: tuple[Any, ...]) -> None:
        self.source = source
        self.rest = rest
        self._kept: tuple[int, tuple[Any, ...]] = (-1, ())

    def arguments(self, tokens: int) -> tuple[Any, ...]:
        kept = self._kept
        if kept[0] != tokens:
            kept = self._kept = tokens, tuple(self.source.meta_args(tokens, *self.rest))
        return kept[1]


@dataclass(frozen=True)
class Half:
    """One of the two LoRA kernels: upstream's function, and what it is given after the metadata."""

    function: Callable[..., None]
    rest: tuple[Any, ...]


@dataclass(frozen=True)
class Replay:
    """The calls that a layer's `apply` comes to, for an `x` of (tokens, features)."""

    with_bias: bool
    a_stacked: tuple[torch.Tensor, ...]
    b_stacked: tuple[torch.Tensor, ...]
    a_list: list[torch.Tensor]
    b_list: list[torch.Tensor]
    buffer_rank: int
    buffer_type: torch.dtype
    metadata: Metadata
    shrink: Half
    expand: Half

    def fits(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether the layer still has the tensors from which it was learned, and `x` the shape."""
        return (
            x.dim() == 2
            and (bias is not None) is self.with_bias
            and layer.lora_a_stacked is self.a_stacked
            and layer.lora_b_stacked is self.b_stacked
            and layer.punica_wrapper.token_mapping_meta is self.metadata.source
        )

    def run(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        base = layer._modules["base_layer"]  # what `layer.base_layer` finds after a detour
        output: torch.Tensor = base.quant_method.apply(base, x, bias)
        tokens = x.shape[0]
        buffer = torch.empty((len(self.a_list), tokens, self.buffer_rank), dtype=self.buffer_type, device=x.device)
        arguments = self.metadata.arguments(tokens)
        self.shrink.function(x, self.a_list, buffer, *arguments, *self.shrink.rest)
        self.expand.function(buffer, self.b_list, output, *arguments, *self.expand.rest)
        return output


def learn(layer: Any, original: Apply, x: torch.Tensor, bias: torch.Tensor | None) -> Replay:
    """The calls that upstream's `apply` comes to for a layer. Raises Unlearnable where they are not those of a `Replay`.

    Only the shape and the type of `x` matter, (tokens, features). No kernel runs but a fill of a buffer of a few rows.
    """
    if x.dim() != 2:
        raise Unlearnable(f"its first input has {x.dim()} dimensions")
    rows = x.new_empty((LEARNED_ROWS, x.shape[1]))
    output = x.new_empty((LEARNED_ROWS, sum(layer.output_slices)))
    wrapper = layer.punica_wrapper
    if not hasattr(wrapper, "token_mapping_meta"):
        raise Unlearnable(f"{type(wrapper).__name__} is not the wrapper of a GPU's kernels")
    _check_base(layer, original, rows, output, bias)
    noted = NotedMetadata(wrapper.token_mapping_meta)
    with NotedCalls() as calls:
        type(wrapper).add_lora_linear(
            _copy_with(wrapper, token_mapping_meta=noted),
            output,
            rows,
            layer.lora_a_stacked,
            layer.lora_b_stacked,
            1.0,
            layer.output_slices,
        )
    if [len(found) for found in calls.noted.values()] != [1, 1]:
        raise Unlearnable(f"{type(wrapper).__name__} does not call {SHRINK} and {EXPAND} once each")
    ((shrink_op, shrink_given),), ((expand_op, expand_given),) = calls.noted.values()
    buffer = shrink_given[2]
    if buffer.shape[:2] != (len(layer.lora_a_stacked), LEARNED_ROWS) or not buffer.is_contiguous():
        raise Unlearnable("the buffer between shrink and expand has another shape")
    if len(noted.asked) != 2 or noted.asked[0] != noted.asked[1] or noted.asked[0][:1] != (LEARNED_ROWS,):
        raise Unlearnable("the kernels' metadata depends on more than the number of tokens")
    rest = noted.asked[0][1:]
    shared = _metadata.get(wrapper)
    if shared is None or shared.source is not wrapper.token_mapping_meta or shared.rest != rest:
        shared = _metadata[wrapper] = Metadata(wrapper.token_mapping_meta, rest)
    return Replay(
        with_bias=bias is not None,
        a_stacked=layer.lora_a_stacked,
        b_stacked=layer.lora_b_stacked,
        a_list=list(layer.lora_a_stacked),
        b_list=list(layer.lora_b_stacked),
        buffer_rank=buffer.shape[2],
        buffer_type=buffer.dtype,
        metadata=shared,
        shrink=_half(SHRINK, shrink_op, shrink_given, rows, layer.lora_a_stacked, buffer, noted.given[0]),
        expand=_half(EXPAND, expand_op, expand_given, buffer, layer.lora_b_stacked, output, noted.given[1]),
    )


def _check_base(
    layer: Any, original: Apply, rows: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise Unlearnable unless `apply` has its base layer's method compute once, adds to what it gives, and returns it."""
    method, addition = NotedMethod(output), DeferredAddition()
    base = _copy_with(layer.base_layer, quant_method=method)
    with NotedCalls():
        returned = original(_copy_with(layer, base_layer=base, punica_wrapper=addition), rows, bias)
    if len(method.given) != 1 or len(addition.outputs) != 1:
        raise Unlearnable("apply does not compute the base layer once and add to it once")
    (given,) = method.given
    if len(given) != 3 or given[0] is not base or given[1] is not rows or given[2] is not bias:
        raise Unlearnable("apply gives the base layer other arguments than its own")
    if not (_same(addition.outputs[0], output) and _same(returned, output)):
        raise Unlearnable("apply adds to, or returns, something else than the base layer's output")


def _half(
    name: str,
    op: Any,
    given: list[Any],
    source: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    target: torch.Tensor,
    metadata: tuple[Any, ...],
) -> Half:
    """One half from the call of its op: (source, weights, target, *metadata, *rest). Raises Unlearnable for any other."""
    end = 3 + len(metadata)
    fits = (
        _same(given[0], source)
        and len(given[1]) == len(weights)
        and all(mine is theirs for mine, theirs in zip(given[1], weights, strict=True))
        and _same(given[2], target)
        and all(mine is theirs for mine, theirs in zip(given[3:end], metadata, strict=True))
        and not any(isinstance(value, torch.Tensor) for value in given[end:])
    )
    if not fits:
        raise Unlearnable(f"{name} is given something else than input, weights, output, metadata and numbers")
    return Half(_function_of(name, op), tuple(given[end:]))


def _function_of(name: str, op: Any) -> Callable[..., None]:
    """The Python function behind one of upstream's ops, which saves the way through the dispatcher; else the op itself."""
    module = importlib.import_module(f"{OPS}.{name}_op")
    function: Callable[..., None] | None = getattr(module, f"_{name}", None)
    names = [argument.name for argument in op._schema.arguments]
    if function is None or list(inspect.signature(function).parameters) != names:
        return op  # type: ignore[no-any-return]
    return function


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of the same elements in the same order."""
    return (one.data_ptr(), one.dtype, one.shape, one.stride()) == (
        other.data_ptr(),
        other.dtype,
        other.shape,
        other.stride(),
    )


@functools.cache
def _say_once(text: str) -> None:
    logger.info("overlay: %s", text)


def _copy_with(original: Any, **changed: Any) -> Any:
    """A shallow copy of a layer, or of another object, with other values of some attributes.

    A real instance of its class, so that upstream's helpers and ``super()`` find the other values, too.
    """
    stand_in = object.__new__(type(original))
    stand_in.__dict__.update(original.__dict__)
    stand_in.__dict__.update(changed)
    return stand_in


def find(layer_name: str) -> LinearOverlap:
    """The layer of a name, of the engine that is running now. Raises KeyError where there is none."""
    try:
        return _registered[id(get_forward_context().no_compile_layers), layer_name]
    except KeyError:
        found = [overlap for (_, name), overlap in list(_registered.items()) if name == layer_name]
        if len(found) != 1:
            raise KeyError(f"{len(found)} LoRA layers have the name {layer_name}, and none is of this engine") from None
        return found[0]


def free_name(prefix: str, context: dict[str, Any]) -> str:
    """The prefix of a layer, with a number where its engine has other layers of that prefix."""
    name, number = prefix, 1
    while (id(context), name) in _registered:
        number += 1
        name = f"{prefix}#{number}"
    return name


def overlap_adapters(original: Apply) -> Apply:
    """A plain function to set on the class in the place of `original`. Plain, because Dynamo drops a wrapt wrapper."""

    @functools.wraps(original)
    def apply(self: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        overlap = getattr(self, OVERLAP, None)
        # Towers of multimodal models run without a forward context.
        if overlap is None or not is_forward_context_available():
            return original(self, x, bias)
        result: torch.Tensor = torch.ops.vllm_overlay.lora_linear(
            x, bias, overlap.output_size, ops.encode_layer_name(overlap.layer_name)
        )
        return result

    return apply


def register_op(record: PatchRecord) -> None:
    """Define ``vllm_overlay::lora_linear`` for the platform's device."""

    def lora_linear(x, bias, output_size, layer_name):  # type: ignore[no-untyped-def]
        return find(ops.resolve_layer_name(layer_name)).apply(x, bias)

    def fake(x, bias, output_size, layer_name):  # type: ignore[no-untyped-def]
        record.calls.fake += 1
        return x.new_empty((*x.shape[:-1], output_size))

    schema = {
        "x": torch.Tensor,
        "bias": Optional[torch.Tensor],  # noqa: UP045 - torch looks this very form up in a table
        "output_size": int,
        "layer_name": ops.LayerNameType,
        "return": torch.Tensor,
    }
    ops.register(OP_NAME, lora_linear, fake, schema)


def shard_size(layer: torch.nn.Module) -> int:
    """The columns of a layer's output per tensor-parallel shard, cross-checked against the base layer's bookkeeping."""
    base = layer.base_layer
    expected = getattr(base, "output_size_per_partition", base.output_size)
    found: int = sum(layer.output_slices)
    if found != expected:
        raise Refused(f"its LoRA slices have {found} columns, but the base layer has {expected} per shard")
    return found


def apply_of(layer_class: type, originals: dict[type, Apply]) -> Apply:
    """Upstream's `apply` for a class. Raises Refused for a class that goes another way than the intercepted ones."""
    linear_class = next(target for target in layer_class.__mro__ if target.__name__ == BASE[1])
    helpers = {name for name in linear_class.__dict__ if name.startswith("_") and not name.startswith("__")}
    found: Apply | None = None
    for owner in layer_class.__mro__:
        if found is None and owner in originals:
            found = originals[owner]
        if owner is linear_class:
            break
        own = owner.__dict__.get("apply") if found is None else None
        if own is not None and not (isinstance(own, FunctionType) and {"super", "apply"} <= set(own.__code__.co_names)):
            raise Refused(f"{owner.__name__} has an apply of its own")
        changed = sorted(helpers & set(owner.__dict__))
        if changed:
            raise Refused(f"{owner.__name__} has {', '.join(changed)} of its own")
    assert found is not None  # the class that all of them come from is intercepted
    return found


def make_overlap(
    layer: torch.nn.Module, originals: dict[type, Apply], plan: Plan, record: PatchRecord
) -> tuple[LinearOverlap, dict[str, Any]]:
    """The overlap of a layer that has its weights, and what the journal shows. Raises Refused where it must stay stock."""
    config = get_current_vllm_config()
    if layer.lora_config.fully_sharded_loras:
        raise Refused(FULLY_SHARDED)
    refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
    original = apply_of(type(layer), originals)
    base = layer.base_layer
    if type(base).forward not in [linear.forward for linear in LINEARS]:
        raise Refused(f"{type(base).__name__} has a forward of its own")
    method = type(getattr(base, "scheme", None) or base.quant_method).__name__
    if method not in ACTIVATION_AS_IT_IS:
        raise Refused(f"quantization method {method} may quantize the activation")
    context = config.compilation_config.static_forward_context
    name = free_name(base.prefix, context)
    overlap = LinearOverlap(layer, name, shard_size(layer), original, plan, record)
    _registered[id(context), name] = overlap
    return overlap, {"output": overlap.output_size, "slices": len(layer.output_slices), "class": type(layer).__name__}


def install(module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
    """Intercept the classes of `verdict` in a package that has just been imported. Gives the verdict that holds here."""
    if verdict.upstream is not None and getattr(envs, SWITCH, False):
        return replace(verdict, state=LANDED, reason=f"{SWITCH} is set: upstream's own dual stream", methods=())
    if not current_platform.is_cuda_alike() and not settings.serial_pass_through:
        device = current_platform.device_type or "none"
        return replace(
            verdict, state=INERT, reason=f"dual CUDA streams are only supported on CUDA platforms, this is {device}"
        )
    linear_class: Any = class_at(module, ".".join(BASE))
    ancestor: Any = class_at(module, ".".join(ANCESTOR))
    targets: list[Any] = [class_at(module, name) for name, _ in verdict.intercepted()]
    originals: dict[type, Apply] = {target: target.__dict__["apply"] for target in targets}
    record = journal.patch(NAME)
    plan = Plan(settings.forks, settings.tokens_or(TOKEN_THRESHOLD))

    def after_set_mapping(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        if not isinstance(layer, linear_class):
            return
        layer_name = getattr(layer.base_layer, "prefix", type(layer).__name__)
        setattr(layer, OVERLAP, None)
        setattr(
            layer,
            OVERLAP,
            adopt(NAME, record, layer_name, lambda: make_overlap(layer, originals, plan, record), settings),
        )
        if record.refused.get(layer_name) == FULLY_SHARDED:
            journal.problem(f"{NAME}: vLLM runs stock: {FULLY_SHARDED}")
            if settings.strict:
                raise ValueError(FULLY_SHARDED)

    register_op(record)
    setattr(linear_class, OVERLAP, None)
    for target in targets:
        target.apply = overlap_adapters(originals[target])
    # Last, because everything before it changes nothing for a layer without an overlap.
    wrapt.wrap_function_wrapper(ancestor, "set_mapping", after_set_mapping)
    return verdict
