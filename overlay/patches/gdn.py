"""GDN input projections of Qwen3-Next, Qwen3.5 and every model built on the same layer: two GEMMs at once.

Symptom: each GDN layer runs ``in_proj_qkvz`` (2048 to 12288 columns in Qwen3.5-35B-A3B) and then ``in_proj_ba`` (64
columns) on one stream. The second fills a few percent of the GPU and costs a launch and a tail of its own.

Cause: nothing orders the two; they read the same input and write different results.

Fix: `in_proj_qkvz` stays on the main stream, `in_proj_ba` runs next to it on an auxiliary stream, inside one custom op.
Upstream's own forward runs, called with a stand-in for `self` whose two projections are the op's two results. No line
of upstream is repeated here, and a changed signature (0.25 to 0.26) does not matter.

Upstream: vLLM #36795 did it and #38152 took it back (the op took the layer name as ``str``: every layer became a compile
artifact of its own); #39748 closed, #42301 open; #41457 would fuse the two GEMMs instead.

Remove when: the verdict on your vLLM (in the log, and in the journal) is ``landed``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch.nn.functional import linear
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from overlay import ops
from overlay.gemms import gemm_of, is_plain
from overlay.journal import PatchRecord, journal
from overlay.layers import Refused, adopt, refuse_modes
from overlay.plan import NOT_CAPTURING, Plan
from overlay.settings import Settings
from overlay.streams import ParallelRegion
from overlay.verdict import INERT, Verdict

NAME = "gdn"
OP_NAME = "gdn_in_proj"
#: Tokens; measured on an H200 (overlay.plan has the table). 512 already loses.
TOKEN_THRESHOLD = 256
#: The attribute that holds a layer's `InProjPair`, or None where the layer stays stock.
PAIR = "_overlay_in_proj_pair"


class InProjPair:
    """What the op needs of one layer: sizes per tensor-parallel shard, stream and events, and where it counts."""

    def __init__(self, layer_name: str, qkvz_size: int, ba_size: int, plan: Plan, record: PatchRecord) -> None:
        self.layer_name = layer_name
        self.qkvz_size = qkvz_size
        self.ba_size = ba_size
        self.region = ParallelRegion(slots=1)
        self._plan = plan
        self._record = record
        self._prepared = False
        self._always_serial: str | None = None
        self._plain_linears: tuple[torch.nn.Module, torch.nn.Module] | None = None

    def project(self, layer: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both projections of (tokens, hidden) input: (tokens, qkvz_size) and (tokens, ba_size)."""
        reason = self._reason_for_serial(layer, hidden_states)
        if reason is None:
            self._record.calls.dual_stream += 1
            run = self.region.run
        else:
            self._record.calls.count_serial(reason)
            if self._plain_linears is not None:
                # Every eager step comes by here. The linears would do the same after some microseconds of Python each.
                qkvz_linear, ba_linear = self._plain_linears
                return linear(hidden_states, qkvz_linear.weight), linear(hidden_states, ba_linear.weight)
            run = self.region.run_serially
        (qkvz, _), ((ba, _),) = run(
            lambda: layer.in_proj_qkvz(hidden_states), [lambda: layer.in_proj_ba(hidden_states)]
        )
        return qkvz, ba

    def _reason_for_serial(self, layer: torch.nn.Module, hidden_states: torch.Tensor) -> str | None:
        if self._prepared:
            return self._always_serial or self._plan.reason_for_serial(hidden_states.shape[0])
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            return "no call before the capture"
        self._prepare(layer, hidden_states)
        return self._always_serial or NOT_CAPTURING

    def _prepare(self, layer: torch.nn.Module, hidden_states: torch.Tensor) -> None:
        """Once per layer, outside capture: streams, events, and what libraries allocate on a stream's first use."""
        self._prepared = True
        linears = (layer.in_proj_qkvz, layer.in_proj_ba)
        if not hidden_states.is_cuda:
            self._always_serial = "serial pass-through"
        elif any(hasattr(projection, "base_layer") for projection in linears):
            self._always_serial = "LoRA on the projections"
        else:
            self.region.prepare(hidden_states.device)
            self.region.run(lambda: None, [lambda: layer.in_proj_ba(hidden_states)])
            if all(is_plain(projection) for projection in linears):
                self._plain_linears = linears


class InProjView:
    """Stand-in for `self` in upstream's forward: the real layer, but for the two projections.

    A plain class, because Dynamo traces through it (it does not trace wrapt.ObjectProxy or SimpleNamespace). Whichever
    projection is asked for first launches both.
    """

    def __init__(self, layer: torch.nn.Module, pair: InProjPair) -> None:
        self._layer = layer
        self._pair = pair
        self._results: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._results is None:
            pair = self._pair
            self._results = torch.ops.vllm_overlay.gdn_in_proj(
                hidden_states, pair.qkvz_size, pair.ba_size, ops.encode_layer_name(pair.layer_name)
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


def register_op(record: PatchRecord) -> None:
    """Define ``vllm_overlay::gdn_in_proj`` for the platform's device."""

    def gdn_in_proj(hidden_states, qkvz_size, ba_size, layer_name):  # type: ignore[no-untyped-def]
        layer = get_forward_context().no_compile_layers[ops.resolve_layer_name(layer_name)]
        return getattr(layer, PAIR).project(layer, hidden_states)

    def fake(hidden_states, qkvz_size, ba_size, layer_name):  # type: ignore[no-untyped-def]
        record.calls.fake += 1
        leading = hidden_states.shape[:-1]
        return hidden_states.new_empty((*leading, qkvz_size)), hidden_states.new_empty((*leading, ba_size))

    schema = {
        "hidden_states": torch.Tensor,
        "qkvz_size": int,
        "ba_size": int,
        "layer_name": ops.LayerNameType,
        "return": tuple[torch.Tensor, torch.Tensor],
    }
    ops.register(OP_NAME, gdn_in_proj, fake, schema)


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


def make_pair(layer: torch.nn.Module, plan: Plan, record: PatchRecord) -> tuple[InProjPair, dict[str, int]]:
    """The pair of a freshly made layer, and its sizes for the journal. Raises Refused with the reason where the layer must stay stock."""
    config = get_current_vllm_config()
    if not hasattr(layer, "in_proj_qkvz"):
        raise Refused("the projections are split for LoRA")
    if config.compilation_config.static_forward_context.get(layer.prefix) is not layer:
        raise Refused("the layer is not registered under its name in the static forward context")
    refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
    qkvz_size, ba_size = shard_sizes(layer)
    for projection in (layer.in_proj_qkvz, layer.in_proj_ba):
        gemm_of(projection)
    return InProjPair(layer.prefix, qkvz_size, ba_size, plan, record), {"qkvz": qkvz_size, "ba": ba_size}


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
    plan = Plan(settings.plan, settings.tokens_or(TOKEN_THRESHOLD))

    def after_init(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        setattr(layer, PAIR, None)
        setattr(layer, PAIR, adopt(NAME, record, layer.prefix, lambda: make_pair(layer, plan, record), settings))

    register_op(record)
    for name, original in originals.items():
        setattr(target, name, overlap_in_projections(original))
    # Last, because everything before it changes nothing for a layer without a pair.
    wrapt.wrap_function_wrapper(target, "__init__", after_init)
    return verdict
