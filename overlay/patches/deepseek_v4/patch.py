"""The patch. The docstring of `overlay.patches.deepseek_v4` tells its story."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import wrapt
from vllm import envs
from vllm.config import get_current_vllm_config

from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings
from overlay.side_work.adoption import StaysStock, adopt, check_registered, inert_without_cuda, refuse_modes
from overlay.side_work.gemms import gemm_of
from overlay.side_work.plan import PASS_THROUGH, Plan
from overlay.side_work.rules import NO_COMPRESSOR
from overlay.side_work.stand_in import StandIn, with_stand_in
from overlay.side_work.streams import ParallelRegion
from overlay.verdict import Verdict
from overlay.vocabulary import DRIFTED

NAME = "deepseek_v4"
#: Tokens. Upstream chose the same in #41061 (VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD).
TOKEN_THRESHOLD = 1024
#: The module global that computes a compressor's kv_score: (tokens, hidden) bf16 and (columns, hidden) bf16 to fp32.
KV_SCORE_GEMM = "cublas_gemm_bf16_bf16_fp32"
#: The attribute that holds a layer's `InputGemms`, or None if the layer stays stock.
STAGE = "_overlay_input_gemms"

Gemm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class HandoverError(RuntimeError):
    """A precomputed result was not taken exactly once, with the input that it was computed from."""


class Handover:
    """Results that are ready before upstream asks for them. The key of each is the weight or module with which upstream
    asks.

    There is one for the process: a step runs on one thread, and layers have different weights. Micro-batching has two
    threads, so it is refused.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[torch.Tensor, Any]] = {}

    def give(self, owner: object, hidden_states: torch.Tensor, result: Any) -> None:
        self._waiting[id(owner)] = (hidden_states, result)

    def take(self, owner: object, hidden_states: torch.Tensor) -> Any | None:
        """Remove and return the result for `owner`; None if there is none. Raises HandoverError for another input."""
        if not self._waiting:
            return None
        source, result = self._waiting.pop(id(owner), (hidden_states, None))
        if source is not hidden_states:
            raise HandoverError("asked for with another input than it was computed from")
        return result

    def withdraw(self, owners: Sequence[object]) -> int:
        """Remove the results that still wait for `owners`. Returns how many there were."""
        return sum(self._waiting.pop(id(owner), None) is not None for owner in owners)


class InputGemms:
    """The first stage of one layer's attention: its GEMMs, and their streams and events.

    Memory, beyond the contract of overlay.side_work.streams: a kv_score is allocated on one of our streams. It is read on
    the main stream or on upstream's auxiliary stream, and upstream joins that one before attention_impl goes on. Our
    streams get no work until the next layer's fork, and its start event is recorded on the main stream after that join.

    Scratch memory: ``fused_wqa_wkv`` is the only quantized GEMM here. The others are bf16 GEMMs of cuBLAS (`make_stage`
    refuses anything else), and cuBLAS keeps concurrent calls apart. torch gives a workspace to each handle and stream. The
    binding of the kv_score sets the stream once more, which drops torch's workspace, and then cuBLAS takes its own pool.
    Upstream has run the same four next to each other since 0.20.1.
    """

    def __init__(self, layer: torch.nn.Module, gemm: Gemm, handover: Handover, plan: Plan, record: PatchRecord) -> None:
        self.region = ParallelRegion(slots=3)
        self._compressor, self._indexer = layer.compressor, layer.indexer
        self._gemm = gemm
        self._handover = handover
        self._plan = plan
        self._record = record
        self._met = False

    def attend(
        self,
        layer: torch.nn.Module,
        attention_impl: Callable[..., None],
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """All of upstream's attention for (tokens, hidden) input. It is written to `out`.

        Raises HandoverError if upstream has not taken every result.
        """
        reason = self._reason_for_serial(hidden_states)
        if reason is None:
            self._record.calls.dual_stream += 1
        else:
            self._record.calls.count_serial(reason)
            if hidden_states.is_cuda:  # upstream computes the others, some of them on its own stream
                qr_kv, _ = layer.fused_wqa_wkv(hidden_states)
                attention_impl(layer, hidden_states, *_split(layer, qr_kv), positions, out)
                return
        owners, work = self._auxiliary_work(hidden_states)
        run = self.region.run if reason is None else self.region.run_serially
        (qr_kv, _), results = run(lambda: layer.fused_wqa_wkv(hidden_states), work)
        for owner, result in zip(owners, results, strict=True):
            if owner is not None:
                self._handover.give(owner, hidden_states, result)
        try:
            attention_impl(layer, hidden_states, *_split(layer, qr_kv), positions, out)
        finally:
            left = self._handover.withdraw(owners)
        if left:
            raise HandoverError(f"{left} of the results that were computed ahead have not been asked for")

    def _auxiliary_work(self, hidden_states: torch.Tensor) -> tuple[tuple[object, ...], list[Callable[[], Any] | None]]:
        """For each slot the owner of its result, and how it is computed. None if the layer has no such GEMM."""
        gemm, indexer = self._gemm, self._indexer
        weight = self._compressor.fused_wkv_wgate.weight
        if indexer is None:
            return (weight, None, None), [lambda: gemm(hidden_states, weight), None, None]
        projection, indexer_weight = indexer.weights_proj, indexer.compressor.fused_wkv_wgate.weight
        return (weight, projection, indexer_weight), [
            lambda: gemm(hidden_states, weight),
            lambda: projection(hidden_states),
            lambda: gemm(hidden_states, indexer_weight),
        ]

    def _reason_for_serial(self, hidden_states: torch.Tensor) -> str | None:
        if not self._met:
            self._met = True
            if self._indexer is not None:  # now, because other code that wraps it has done so by now
                answer_from(self._handover, self._indexer.weights_proj)
        if not hidden_states.is_cuda:
            return PASS_THROUGH
        if not self.region.prepared:
            if torch.cuda.is_current_stream_capturing():
                return "no call before the capture"
            self.region.prepare(hidden_states.device)
            # Libraries allocate memory on a stream's first use, which must not happen during a capture. One row is enough.
            self.region.run(lambda: None, self._auxiliary_work(hidden_states[:1])[1])
        return self._plan.reason_for_serial(hidden_states.shape[0])


def _split(layer: torch.nn.Module, qr_kv: torch.Tensor) -> Any:
    return qr_kv.split([layer.q_lora_rank, layer.head_dim], dim=-1)


def answer_from(handover: Handover, projection: torch.nn.Module) -> None:
    """Make one linear return a result that waits for it, instead of computing it. It never runs inside a trace."""
    compute = projection.forward

    def forward(hidden_states: torch.Tensor) -> Any:
        ready = handover.take(projection, hidden_states)
        return compute(hidden_states) if ready is None else ready

    projection.forward = forward


def answering_gemm(handover: Handover, compute: Gemm) -> Gemm:
    """A kv_score GEMM that returns the result that waits for its weight, instead of computing it."""

    @functools.wraps(compute)
    def gemm(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ready: torch.Tensor | None = handover.take(weight, hidden_states)
        return compute(hidden_states, weight) if ready is None else ready

    return gemm


class WithoutItsGemm(StandIn):
    """Stand-in for `self` in upstream's traced forward. Its one GEMM gives a placeholder.

    The placeholder has no rows and so no memory. vLLM's CUDA graph wrapper ignores it, because it looks only at tensors
    with elements.
    """

    def fused_wqa_wkv(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer = self._layer
        return hidden_states.new_empty((0, layer.q_lora_rank + layer.head_dim)), None


def postponing(layer: torch.nn.Module) -> Any:
    """What upstream's traced forward gets for `self`."""
    return layer if getattr(layer, STAGE, None) is None else WithoutItsGemm(layer)


def project_at_once(original: Callable[..., None]) -> Callable[..., None]:
    """A function that replaces the class's `attention_impl`, which upstream's op calls."""

    @functools.wraps(original)
    def attention_impl(
        self: torch.nn.Module,
        hidden_states: torch.Tensor,
        qr: torch.Tensor,
        kv: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        stage: InputGemms | None = getattr(self, STAGE, None)
        if stage is None or qr.shape[0] == hidden_states.shape[0]:  # no placeholder, or no tokens
            original(self, hidden_states, qr, kv, positions, out)
        else:
            stage.attend(self, original, hidden_states, positions, out)

    return attention_impl


def make_stage(
    layer: torch.nn.Module, module: ModuleType, gemm: Gemm, handover: Handover, plan: Plan, record: PatchRecord
) -> tuple[InputGemms, dict[str, int]]:
    """The stage of a new layer, and its sizes for the journal: columns of each GEMM.

    Raises StaysStock with the reason if the layer must stay stock, and ValueError if its sizes do not agree.
    """
    config = get_current_vllm_config()
    compressor, indexer = layer.compressor, layer.indexer
    if compressor is None:
        raise StaysStock(NO_COMPRESSOR)
    check_registered(layer, layer.layer_name, config)
    refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
    compressors = [compressor] if indexer is None else [compressor, indexer.compressor]
    if indexer is not None and type(indexer) is not module.DeepseekV4Indexer:
        raise StaysStock(f"its indexer is a {type(indexer).__qualname__} of {type(indexer).__module__}")
    for part in compressors:
        if type(part) is not module.DeepseekCompressor:
            raise StaysStock(f"its compressor is a {type(part).__qualname__} of {type(part).__module__}")
    sizes = {"qr_kv": layer.fused_wqa_wkv.output_size_per_partition}  # not sharded: every rank has all of it
    if sizes["qr_kv"] != layer.q_lora_rank + layer.head_dim:
        raise ValueError(
            f"fused_wqa_wkv gives {sizes['qr_kv']} columns, but it is split into {layer.q_lora_rank} and {layer.head_dim}"
        )
    linears = {"kv_score": compressor.fused_wkv_wgate}
    if indexer is not None:
        linears |= {"indexer_weights": indexer.weights_proj, "indexer_kv_score": indexer.compressor.fused_wkv_wgate}
    for name, projection in linears.items():
        gemm_of(projection)
        sizes[name] = projection.output_size
    return InputGemms(layer, gemm, handover, plan, record), {"aux_gemms": len(linears), **sizes}


def install(module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
    """Intercept the class of `verdict` in a module that has just been executed. Returns the verdict that holds here."""
    inert = inert_without_cuda(verdict, settings.serial_pass_through)
    if inert is not None:
        return inert
    compressors = sys.modules[module.DeepseekCompressor.__module__]
    gemm: Gemm = getattr(compressors, KV_SCORE_GEMM)
    owner = getattr(gemm, "__globals__", {}).get("__name__")
    if owner != "vllm.model_executor.layers.utils":
        return replace(verdict, state=DRIFTED, reason=f"{KV_SCORE_GEMM} has been replaced by {owner}", methods=())
    assert verdict.class_name is not None
    target = getattr(module, verdict.class_name)
    record = journal.patch(NAME)
    handover = Handover()
    plan = Plan(settings.forks, settings.tokens_or(TOKEN_THRESHOLD), only_while_capturing=False)

    def after_init(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        setattr(layer, STAGE, None)
        stage = adopt(
            NAME, record, layer.layer_name, lambda: make_stage(layer, module, gemm, handover, plan, record), settings
        )
        setattr(layer, STAGE, stage)

    setattr(compressors, KV_SCORE_GEMM, answering_gemm(handover, gemm))
    target.forward = with_stand_in(target.__dict__["forward"], postponing)
    target.attention_impl = project_at_once(target.__dict__["attention_impl"])
    # Last, because everything before has no effect on a layer without a stage.
    wrapt.wrap_function_wrapper(target, "__init__", after_init)
    return verdict
