"""GDN input projections of Qwen3-Next, Qwen3.5 and every model built on the same layer: two GEMMs at once.

Symptom: each GDN layer runs ``in_proj_qkvz`` (2048 to 12288 columns in Qwen3.5-35B-A3B) and then ``in_proj_ba`` (64
columns) on one stream. The second fills a few percent of the GPU and costs a launch and a tail of its own.

Cause: nothing orders the two; they read the same input and write different results.

Fix: both run inside one custom op: `in_proj_qkvz` on the main stream and `in_proj_ba` next to it on an auxiliary one, or
both as one GEMM, or one after the other; whichever was measured to be fastest for the layer's shape and the captured size
(overlay.tuning). Upstream's own forward runs, called with a stand-in for `self` whose two projections are the op's
results. No line of upstream is repeated here, and a changed signature (0.25 to 0.26) does not matter.

A layer is made with a pair, and the pair is settled when the weights are there, before vLLM traces: a layer that has
nothing to gain goes back to stock, op and all; one that gains by one GEMM gets the op that gives one tensor. Steps above the
captured sizes have a compiled graph without the op (overlay.lowering), for which the op takes the weights along.

Upstream: vLLM #36795 did it and #38152 took it back (the op took the layer name as ``str``: every layer became a compile
artifact of its own); #39748 closed, #42301 open; #41457 would fuse the two GEMMs instead.

Remove when: the verdict on your vLLM (in the log, and in the journal) is ``landed``.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import wrapt
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from overlay import cache_identity, loaded, lowering, ops, pair_plans
from overlay.gemms import gemm_of, is_plain
from overlay.journal import PatchRecord, journal
from overlay.layers import Refused, adopt, refuse_modes
from overlay.pair import LinearPair, has_adapters
from overlay.pair_plans import Candidate
from overlay.plan import Plan
from overlay.settings import Settings
from overlay.verdict import INERT, Verdict
from overlay.verdict.gdn import PACKED_SWITCHES

NAME = "gdn"
OP_NAME = "gdn_in_proj"
OP_NAME_ONE = "gdn_in_proj_one"
#: Tokens, for a plan that is not measured; from an H200 (overlay.plan has the table). 512 already loses.
TOKEN_THRESHOLD = 256
#: The attribute that holds a layer's `LinearPair`, or None where the layer stays stock.
PAIR = "_overlay_in_proj_pair"
UNDECIDED = "the plan could not be made"


class InProjView:
    """Stand-in for `self` in upstream's forward: the real layer, but for the two projections.

    A plain class, because Dynamo traces through it (it does not trace wrapt.ObjectProxy or SimpleNamespace). Whichever
    projection is asked for first launches both.
    """

    def __init__(self, layer: torch.nn.Module, pair: LinearPair) -> None:
        self._layer = layer
        self._pair = pair
        self._results: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._results is None:
            layer, pair = self._layer, self._pair
            name = ops.encode_layer_name(layer.prefix)
            weights = (layer.in_proj_qkvz.weight, layer.in_proj_ba.weight) if pair.plain else (None, None)
            if pair.one_result and hidden_states.dim() == 2:
                result = torch.ops.vllm_overlay.gdn_in_proj_one(hidden_states, *weights, pair.columns, name)
                self._results = pair.slices(result)
            else:
                self._results = torch.ops.vllm_overlay.gdn_in_proj(
                    hidden_states, *weights, pair.main_size, pair.side_size, name
                )
        return self._results

    def in_proj_qkvz(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._project(hidden_states)[0], None

    def in_proj_ba(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._project(hidden_states)[1], None


def overlap_in_projections(original: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function to set on the class in the place of `original`.

    Plain, because Dynamo drops a wrapt wrapper from what it traces, without a word (torch 2.11).
    """

    @functools.wraps(original)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        pair = getattr(self, PAIR, None)
        if pair is None:
            return original(self, *args, **kwargs)
        return original(InProjView(self, pair), *args, **kwargs)

    return forward


def register_ops(record: PatchRecord) -> None:
    """Define ``vllm_overlay::gdn_in_proj`` (two results) and ``gdn_in_proj_one`` (one) for the platform's device.

    The weights are there for the graph, in which stock's calls may need them; the ops ask the layer, whose linears can be
    more than a weight. Inductor may choose the layout of their input, as it may for stock's GEMMs: to bring about a certain
    one it would put the op's name into the kernel that makes the input, and time it apart from stock's kernel of the same
    text. The block size it found then was another one at times, which adds in another order (seen in vLLM 0.33.0).
    """

    def layer_of(name: Any) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
        """The layer and its modules, without torch.nn.Module's own look-up: a microsecond for each name."""
        layer = get_forward_context().no_compile_layers[ops.resolve_layer_name(name)]
        return layer, layer._modules

    def two(hidden_states, qkvz, ba, qkvz_size, ba_size, layer_name):  # type: ignore[no-untyped-def]
        layer, linears = layer_of(layer_name)
        return layer.__dict__[PAIR].project(linears["in_proj_qkvz"], linears["in_proj_ba"], hidden_states)

    def fake_two(hidden_states, qkvz, ba, qkvz_size, ba_size, layer_name):  # type: ignore[no-untyped-def]
        record.calls.fake += 1
        leading = hidden_states.shape[:-1]
        return hidden_states.new_empty((*leading, qkvz_size)), hidden_states.new_empty((*leading, ba_size))

    def one(hidden_states, qkvz, ba, columns, layer_name):  # type: ignore[no-untyped-def]
        layer, linears = layer_of(layer_name)
        return layer.__dict__[PAIR].project_into_one(linears["in_proj_qkvz"], linears["in_proj_ba"], hidden_states)

    def fake_one(hidden_states, qkvz, ba, columns, layer_name):  # type: ignore[no-untyped-def]
        record.calls.fake += 1
        return hidden_states.new_empty((hidden_states.shape[0], columns))

    tensor, name, tags = torch.Tensor, ops.LayerNameType, (torch.Tag.flexible_layout,)
    inputs: dict[str, Any] = {"hidden_states": tensor, "qkvz": tensor | None, "ba": tensor | None}
    types = {**inputs, "qkvz_size": int, "ba_size": int, "layer_name": name, "return": tuple[tensor, tensor]}  # type: ignore[valid-type]
    lowering.register(ops.register(OP_NAME, two, fake_two, types, tags), lower_two, record)
    types = {**inputs, "columns": int, "layer_name": name, "return": tensor}
    lowering.register(ops.register(OP_NAME_ONE, one, fake_one, types, tags), lower_one, record)


def lower_two(graph: torch.fx.Graph, node: torch.fx.Node) -> bool:
    """Stock's two linears in the place of ``gdn_in_proj`` and of what takes its results apart."""
    taken = {taker: taker.args[1] if taker.target is operator.getitem else None for taker in node.users}
    if None in node.args[1:3] or not {0, 1}.issuperset(taken.values()):
        return False
    results = _linears(graph, node)
    for taker, index in taken.items():
        result = results[index]  # type: ignore[index]
        result.meta = dict(taker.meta)
        taker.replace_all_uses_with(result)
        graph.erase_node(taker)
    graph.erase_node(node)
    return True


def lower_one(graph: torch.fx.Graph, node: torch.fx.Node) -> bool:
    """Stock's two linears in the place of ``gdn_in_proj_one``, into one tensor: slices of it go on to other compiled pieces,
    which have been traced with its strides. Inductor lets the two GEMMs write where they should, without a copy."""
    weights: list[Any] = list(node.args[1:3])
    if None in weights or sum(weight.meta["example_value"].shape[0] for weight in weights) != node.args[3]:
        return False  # the columns that only align it would cost a kernel
    results = _linears(graph, node)
    with graph.inserting_before(node):
        result = graph.call_function(torch.cat, (results, 1))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _linears(graph: torch.fx.Graph, node: torch.fx.Node) -> list[torch.fx.Node]:
    """Stock's two calls, before an op's node."""
    inputs, *weights = node.args[:3]
    with graph.inserting_before(node):
        return [graph.call_function(torch._C._nn.linear, (inputs, weight, None)) for weight in weights]


def shard_sizes(layer: torch.nn.Module) -> tuple[int, int]:
    """The two output sizes per tensor-parallel shard, cross-checked against the head counts.

    Read from the linears' own bookkeeping, never from ``weight.shape``: Marlin, AWQ, GPTQ and FP8 repack the weight.
    Raises ValueError where the two do not agree.
    """
    qkvz, ba = layer.in_proj_qkvz.output_size_per_partition, layer.in_proj_ba.output_size_per_partition
    tp_size = layer.tp_size
    ba_shards = 1 if getattr(layer, "disable_tp_for_ba_proj", False) else tp_size
    expected = (2 * (layer.key_dim + layer.value_dim) // tp_size, 2 * layer.num_v_heads // ba_shards)
    if (qkvz, ba) != expected:
        raise ValueError(f"shard sizes qkvz={qkvz}, ba={ba}, but the heads say qkvz={expected[0]}, ba={expected[1]}")
    return qkvz, ba


def make_pair(layer: torch.nn.Module, plan: Plan, record: PatchRecord) -> tuple[LinearPair, dict[str, Any]]:
    """The pair of a freshly made layer, and its sizes for the journal.

    Raises Refused with the reason where the layer must stay stock.
    """
    config = get_current_vllm_config()
    if not hasattr(layer, "in_proj_qkvz"):
        raise Refused("the projections are split for LoRA")
    if config.compilation_config.static_forward_context.get(layer.prefix) is not layer:
        raise Refused("the layer is not registered under its name in the static forward context")
    refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
    qkvz_size, ba_size = shard_sizes(layer)
    for projection in (layer.in_proj_qkvz, layer.in_proj_ba):
        gemm_of(projection)
    return LinearPair(qkvz_size, ba_size, plan, record), {"qkvz": qkvz_size, "ba": ba_size}


class Undecided:
    """The layers that have a pair and wait for their weights."""

    def __init__(self, verdict: Verdict, record: PatchRecord, settings: Settings) -> None:
        self._verdict = verdict
        self._record = record
        self._settings = settings
        self._layers: list[weakref.ref[torch.nn.Module]] = []
        self._layouts: dict[str, str] = {}

    def add(self, layer: torch.nn.Module) -> None:
        self._layers.append(weakref.ref(layer))

    def decide(self, worker: Any) -> None:
        """Give every waiting layer its plan, or leave it stock: where deciding fails, too. Only strict lets that out."""
        layers = [layer for layer in (reference() for reference in self._layers) if layer is not None]
        self._layers.clear()
        if not layers:
            return
        plans = len(self._record.plans)
        config = worker.vllm_config
        compilation = config.compilation_config
        endpoints = getattr(compilation, "compile_ranges_endpoints", None)
        try:
            for layer in layers:
                getattr(layer, PAIR).plain = _is_plain(layer)
            above_is_stock = all(getattr(layer, PAIR).plain for layer in layers) and lowering.split_ranges(
                compilation, self._settings.strict
            )
            stock = pair_plans.settle(
                [self._candidate(layer) for layer in layers], worker, self._settings, self._record, above_is_stock
            )
        except Exception as error:
            journal.problem(f"{NAME}: {UNDECIDED}, vLLM runs stock here: {type(error).__name__}: {error}")
            if self._settings.strict:
                raise
            stock = dict.fromkeys((layer.prefix for layer in layers), UNDECIDED)
            del self._record.plans[plans:]
        for layer in layers:
            if layer.prefix in stock:
                setattr(layer, PAIR, None)
                self._record.patched.pop(layer.prefix, None)
                self._record.refuse(layer.prefix, stock[layer.prefix])
            self._layouts[layer.prefix] = _layout(layer)
        alone = getattr(config.parallel_config, "world_size_across_dp", None) == 1
        if endpoints and alone and all(getattr(layer, PAIR) is None for layer in layers):
            compilation.compile_ranges_endpoints = endpoints
        shaping = sorted(f"{name}={layout}" for name, layout in self._layouts.items())
        ranges = f"ranges={getattr(compilation, 'compile_ranges_endpoints', None)}"
        journal.fingerprint = cache_identity.add(NAME, (*self._verdict.methods, *shaping, ranges))
        journal.write()

    def _candidate(self, layer: torch.nn.Module) -> Candidate:
        packed = any(getattr(layer, switch, False) for switch in PACKED_SWITCHES)
        takes_slices = self._verdict.takes_slices and not packed
        return Candidate(layer.prefix, getattr(layer, PAIR), layer.in_proj_qkvz, layer.in_proj_ba, takes_slices)


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether both projections are GEMMs of their weights and nothing else, now that they are loaded."""
    projections = layer.in_proj_qkvz, layer.in_proj_ba
    try:
        return not any(map(has_adapters, projections)) and all(map(is_plain, projections))
    except Refused:
        return False


def _layout(layer: torch.nn.Module) -> str:
    """What of a layer's pair shapes the graph that vLLM traces."""
    pair = getattr(layer, PAIR)
    if pair is None:
        return "stock"
    return f"{'one result' if pair.one_result else 'two results'}{'' if pair.plain else ' of its linears'}"


def install(module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
    """Intercept the class of `verdict` in a module that has just been executed. Gives the verdict that holds here."""
    if not current_platform.is_cuda_alike() and not settings.serial_pass_through:
        return replace(
            verdict, state=INERT, reason=f"no CUDA-like device, but {current_platform.device_type or 'none'}"
        )
    assert verdict.class_name is not None
    target = getattr(module, verdict.class_name)
    originals = {name: target.__dict__[name] for name in verdict.methods}
    record = journal.patch(NAME)
    plan = Plan(settings.forks, settings.tokens_or(TOKEN_THRESHOLD))
    undecided = Undecided(verdict, record, settings)

    def after_init(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        setattr(layer, PAIR, None)
        pair = adopt(NAME, record, layer.prefix, lambda: make_pair(layer, plan, record), settings)
        if pair is not None:
            setattr(layer, PAIR, pair)
            undecided.add(layer)

    register_ops(record)
    loaded.when_loaded(undecided.decide)
    for name, original in originals.items():
        setattr(target, name, overlap_in_projections(original))
    # Last, because everything before it changes nothing for a layer without a pair.
    wrapt.wrap_function_wrapper(target, "__init__", after_init)
    return verdict
