"""The patch. Its story is the docstring of `overlay.patches.gdn`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import wrapt
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform

from overlay.engine import loaded
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings
from overlay.side_work import lowering, ops, pairs
from overlay.side_work.adoption import Refused, refuse_modes
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
from overlay.side_work.rules import SPLIT_FOR_LORA
from overlay.side_work.waiting import Waiting
from overlay.verdict import Verdict
from overlay.vocabulary import INERT

NAME = "gdn"
#: Tokens, for a plan that is not measured; from an H200 (overlay.side_work.plan has the table). 512 already loses.
TOKEN_THRESHOLD = 256
SIDE = "in_proj_ba"
#: The attribute that holds a layer's `Pair`, or None where the layer stays stock.
PAIR = "_overlay_in_proj_pair"


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
        raise Refused(SPLIT_FOR_LORA)
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


def decide(
    layers: Sequence[tuple[torch.nn.Module, dict[str, int]]], worker: Any, settings: Settings, record: PatchRecord
) -> list[Pair | str]:
    """The pair of each layer of a loaded model, with its plan; or why the layer stays stock."""
    found: list[Pair | str] = []
    for layer, sizes in layers:
        try:
            found.append(make_pair(layer, worker.vllm_config, sizes))
        except Refused as refused:
            found.append(str(refused))
    made = [pair for pair in found if isinstance(pair, Pair)]
    default = Plan(settings.forks, settings.tokens_or(TOKEN_THRESHOLD))
    pairs.settle(made, worker, settings, record, default)
    return found


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
    make = functools.partial(decide, settings=settings, record=record)
    waiting = Waiting(NAME, verdict, record, settings, PAIR, make)

    def after_init(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        waiting.adopt(layer, layer.prefix, lambda: (check_new(layer),) * 2)

    ops.define(declares_writes=current_platform.is_cuda_alike())
    loaded.when_loaded(waiting.decide)
    for name, original in originals.items():
        setattr(target, name, overlap_in_projections(original))
    # Last, because everything before it changes nothing for a layer without a pair.
    wrapt.wrap_function_wrapper(target, "__init__", after_init)
    return verdict
