"""GDN input projections of Qwen3-Next, Qwen3.5 and every model built on the same layer: two GEMMs at once.

Symptom: each GDN layer runs ``in_proj_qkvz`` (2048 to 12288 columns in Qwen3.5-35B-A3B) and then ``in_proj_ba`` (64
columns) on one stream. The second fills a few percent of the GPU and costs a launch and a tail of its own.

Cause: nothing orders the two; they read the same input and write different results.

Fix: start launches `in_proj_ba` on an auxiliary stream, `in_proj_qkvz` runs as vLLM runs it, whatever its quantization, and join
waits (overlay.side_work). Upstream's own forward runs, called with a stand-in for `self` whose two projections do that. No line
of upstream is repeated here, and a changed signature (0.25 to 0.26) does not matter.

A layer is made with its sizes. When the weights are there, before vLLM traces, it gets its pair; at which sizes that forks is
measured on the layers as they are.

Upstream: vLLM #36795 did it and #38152 took it back (the op took the layer name as ``str``: every layer became a compile
artifact of its own); #39748 closed, #42301 open; #41457 would fuse the two GEMMs instead.

Remove when: the verdict on your vLLM (in the log, and in the journal) is ``landed``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import wrapt
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform

from overlay.engine import compile_cache, loaded
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings, outcome
from overlay.side_work import lowering, ops, pairs
from overlay.side_work.adoption import Refused, adopt, refuse_modes
from overlay.side_work.gemms import (
    ADAPTERS,
    TORCH_GEMM,
    check_beside,
    check_side,
    gate_of,
    gemm_of,
    has_adapters,
    main_kind,
)
from overlay.side_work.pairs import NO_CAPTURE, Pair
from overlay.side_work.plan import Plan
from overlay.verdict import Verdict
from overlay.vocabulary import INERT

NAME = "gdn"
#: Tokens, for a plan that is not measured; from an H200 (overlay.side_work.plan has the table). 512 already loses.
TOKEN_THRESHOLD = 256
SIDE = "in_proj_ba"
#: The attribute that holds a layer's `Pair`, or None where the layer stays stock.
PAIR = "_overlay_in_proj_pair"
UNDECIDED = "the plan could not be made"


class InProjView:
    """Stand-in for `self` in upstream's forward: the real layer, but for the two projections.

    A plain class, because Dynamo traces through it (it does not trace wrapt.ObjectProxy or SimpleNamespace). Whichever
    projection is asked for first starts the side.
    """

    def __init__(self, layer: torch.nn.Module, pair: Pair) -> None:
        self._layer = layer
        self._pair = pair
        self._side: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def _started(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._side is None:
            layer, pair = self._layer, self._pair
            gate = getattr(layer.in_proj_qkvz, pair.gate)
            if pair.plain:
                self._side = torch.ops.vllm_overlay.start(
                    hidden_states, layer.in_proj_ba.weight, gate, pair.columns, pair.name
                )
            else:
                self._side = torch.ops.vllm_overlay.start_layer(
                    hidden_states, gate, pair.columns, SIDE, pair.name, ops.encode_layer_name(layer.prefix)
                )
        return self._side

    def in_proj_qkvz(self, hidden_states: torch.Tensor) -> Any:
        side = self._started(hidden_states)
        result = self._layer.in_proj_qkvz(hidden_states)
        torch.ops.vllm_overlay.join(side, result[0], hidden_states)
        return result

    def in_proj_ba(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._started(hidden_states), None


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


def check_new(layer: torch.nn.Module) -> dict[str, int]:
    """The sizes of a freshly made layer, for the journal and the fake tensors.

    Raises Refused with the reason where the layer must stay stock.
    """
    config = get_current_vllm_config()
    if not hasattr(layer, "in_proj_qkvz"):
        raise Refused("the projections are split for LoRA")
    if config.compilation_config.static_forward_context.get(layer.prefix) is not layer:
        raise Refused("the layer is not registered under its name in the static forward context")
    refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
    qkvz, ba = shard_sizes(layer)
    gemm_of(layer.in_proj_ba)
    return {"qkvz": qkvz, "ba": ba}


def make_pair(layer: torch.nn.Module, config: Any, sizes: dict[str, int]) -> Pair:
    """The pair of a layer that has its weights. Raises Refused where the layer must stay stock."""
    main, side = layer.in_proj_qkvz, layer.in_proj_ba
    if has_adapters(main):
        raise Refused(ADAPTERS)
    check_side(side)
    kind = gemm_of(side)  # again: loading may have given it another kernel
    device = next(side.parameters()).device
    if device.type == "cuda" and not lowering.captures(config.compilation_config):
        raise Refused(NO_CAPTURE)
    plain = kind == TORCH_GEMM
    if not plain:
        check_beside(main)
    if plain and side.weight.shape != (sizes["ba"], int(side.input_size)):
        raise Refused(f"the side's weight has the shape {tuple(side.weight.shape)}")
    return Pair(layer.prefix, main, side, sizes["qkvz"], sizes["ba"], main_kind(main), kind, gate_of(main), plain)


class Undecided:
    """The layers that have been made and wait for their weights."""

    def __init__(self, verdict: Verdict, record: PatchRecord, settings: Settings) -> None:
        self._verdict = verdict
        self._record = record
        self._settings = settings
        self._layers: list[tuple[weakref.ref[torch.nn.Module], dict[str, int]]] = []
        #: What shapes the graph of each layer that has been decided, by name.
        self._shapes: dict[str, str] = {}

    def add(self, layer: torch.nn.Module, sizes: dict[str, int]) -> None:
        self._layers.append((weakref.ref(layer), sizes))

    def decide(self, worker: Any) -> None:
        """Give every waiting layer its pair, or leave it stock: where deciding fails, too. Only strict lets that out."""
        waiting = [
            (layer, sizes) for layer, sizes in ((one(), sizes) for one, sizes in self._layers) if layer is not None
        ]
        self._layers.clear()
        if not waiting:
            return
        plans = len(self._record.plans)
        compilation = worker.vllm_config.compilation_config
        made: dict[int, Pair] = {}
        stock: dict[int, str] = {}
        try:
            for number, (layer, sizes) in enumerate(waiting):
                try:
                    made[number] = make_pair(layer, worker.vllm_config, sizes)
                except Refused as refused:
                    stock[number] = str(refused)
            # With several ranks always: a rank with other ranges would run other warm-up steps, and the others would wait.
            if made or getattr(worker.vllm_config.parallel_config, "world_size_across_dp", None) != 1:
                lowering.split_ranges(compilation, self._settings.strict)
            default = Plan(self._settings.forks, self._settings.tokens_or(TOKEN_THRESHOLD))
            pairs.settle(list(made.values()), worker, self._settings, self._record, default)
        except Exception as error:
            journal.problem(f"{NAME}: {UNDECIDED}, {outcome(self._settings.strict)}: {type(error).__name__}: {error}")
            if self._settings.strict:
                raise
            made, stock = {}, dict.fromkeys(range(len(waiting)), UNDECIDED)
            del self._record.plans[plans:]
        for number, (layer, _) in enumerate(waiting):
            pair = made.get(number)
            setattr(layer, PAIR, pair)
            if pair is None:
                self._record.patched.pop(layer.prefix, None)
                self._record.refuse(layer.prefix, stock[number])
            self._shapes[layer.prefix] = "stock" if pair is None else f"{pair.name} by {pair.gate}"
        shaping = sorted(f"{name}={shape}" for name, shape in self._shapes.items())
        ranges = f"ranges={getattr(compilation, 'compile_ranges_endpoints', None)}"
        compile_cache.add(NAME, (*self._verdict.methods, *shaping, ranges))
        journal.write()


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
    undecided = Undecided(verdict, record, settings)

    def after_init(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        setattr(layer, PAIR, None)
        sizes = adopt(NAME, record, layer.prefix, lambda: (check_new(layer),) * 2, settings)
        if sizes is not None:
            undecided.add(layer, sizes)

    ops.define(declares_writes=current_platform.is_cuda_alike())
    loaded.when_loaded(undecided.decide)
    for name, original in originals.items():
        setattr(target, name, overlap_in_projections(original))
    # Last, because everything before it changes nothing for a layer without a pair.
    wrapt.wrap_function_wrapper(target, "__init__", after_init)
    return verdict
