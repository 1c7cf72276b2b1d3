"""A patch takes a layer, or leaves it stock and says why. The same for a device on which the patch has nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from overlay.engine import compile_cache, ranks, running_code
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings, outcome
from overlay.side_work import rules
from overlay.verdict import Verdict
from overlay.vocabulary import INERT, REFUSED

Adopted = TypeVar("Adopted")


class StaysStock(Exception):
    """Why a layer stays stock. This is expected, and no problem."""


def other_device() -> str | None:
    """The type of this vLLM's device if it has no auxiliary streams, such as "cpu"; None for CUDA and ROCm."""
    from vllm.platforms import current_platform

    return None if current_platform.is_cuda_alike() else current_platform.device_type or "none"


def inert_without_cuda(
    verdict: Verdict, serial_pass_through: bool, why: str = "no CUDA-like device, but {device}"
) -> Verdict | None:
    """The verdict on a device that has no auxiliary streams. None if there are some, or the patch shall run there serially."""
    device = other_device()
    if device is None or serial_pass_through:
        return None
    return replace(verdict, state=INERT, reason=why.format(device=device))


def check_registered(layer: Any, name: str, config: Any) -> None:
    """Raise StaysStock for a layer that vLLM's ops do not find by its name. `config` is a VllmConfig."""
    if config.compilation_config.static_forward_context.get(name) is not layer:
        raise StaysStock("the layer is not registered under its name in the static forward context")


def refuse_modes(config: Any, batch_invariant: bool) -> None:
    """Raise StaysStock if vLLM runs in a mode in which a fork is not safe or not wanted. `config` is a VllmConfig."""
    if config.parallel_config.use_ubatching:
        raise StaysStock(rules.MICRO_BATCHING)
    # Each engine then has its own torch.distributed world. So overlay.engine.ranks does not compare it with the engines
    # that share its steps, neither today's nor later ones (vLLM 0.17.1 to 0.33.0).
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        raise StaysStock(rules.ELASTIC)
    if batch_invariant:
        raise StaysStock(rules.BATCH_INVARIANT)
    if getattr(config.compilation_config, "cache_dir", ""):  # vLLM itself sets it when it compiles, not before
        raise StaysStock(rules.OWN_CACHE)


def adopt(
    patch: str,
    record: PatchRecord,
    layer_name: str,
    make: Callable[[], tuple[Adopted, dict[str, Any]]],
    settings: Settings,
) -> Adopted | None:
    """The first result of `make`, for a layer; the second is its entry in the journal. None if the layer stays stock.

    This runs in upstream's `__init__`, so it raises only under strict.
    """
    for_all = ranks.reason_for_stock(settings) or _stranger(patch, record, settings)
    if for_all is not None:
        _leave_stock(patch, record, layer_name, for_all)
        return None
    try:
        adopted, shown = make()
    except StaysStock as refused:
        _leave_stock(patch, record, layer_name, str(refused))
        return None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if reason not in record.refused.values():  # one problem for all layers that have it
            layer = f"layer {layer_name}"
            said = f"{outcome(True)}: {layer}" if settings.strict else f"{layer} stays stock"
            journal.problem(f"{patch}: {said}: {reason}")
        _leave_stock(patch, record, layer_name, reason)
        if settings.strict:
            raise
        return None
    record.patched[layer_name] = shown
    compile_cache.note_layer(patch, layer_name, stock=False)
    journal.keep_current()
    return adopted


def _leave_stock(patch: str, record: PatchRecord, layer_name: str, reason: str) -> None:
    record.refuse(layer_name, reason)
    compile_cache.note_layer(patch, layer_name, stock=True)


def _stranger(patch: str, record: PatchRecord, settings: Settings) -> str | None:
    """What other code has come between the verdict and this layer, and whose. Then the patch is refused, and strict stops
    vLLM.
    """
    try:
        found = running_code.stranger(patch)
    except Exception as error:
        found = f"cannot tell what runs: {type(error).__name__}: {error}"
    if found is None:
        return None
    said = (
        outcome(settings.strict, "the layers from here on stay stock") if record.patched else outcome(settings.strict)
    )
    text = f"{patch}: {REFUSED}, {said}: {found}"
    journal.problem(text)
    if not record.patched:
        record.conclude(REFUSED, found)
    if settings.strict:
        raise running_code.Replaced(text)
    return found
