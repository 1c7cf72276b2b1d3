"""A patch takes a layer, or leaves it stock and says why; and so for a device on which it has nothing to do."""

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
    """Why a layer stays stock: known, expected, and no problem."""


def other_device() -> str | None:
    """The type of this vLLM's device where it has no auxiliary streams, such as "cpu"; None for CUDA and ROCm."""
    from vllm.platforms import current_platform

    return None if current_platform.is_cuda_alike() else current_platform.device_type or "none"


def inert_without_cuda(
    verdict: Verdict, serial_pass_through: bool, why: str = "no CUDA-like device, but {device}"
) -> Verdict | None:
    """The verdict on a device that has no auxiliary streams, unless the patch is to show its way there, serially; else None."""
    device = other_device()
    if device is None or serial_pass_through:
        return None
    return replace(verdict, state=INERT, reason=why.format(device=device))


def check_registered(layer: Any, name: str, config: Any) -> None:
    """Raise StaysStock for a layer that vLLM's ops do not find by its name. `config` is a VllmConfig."""
    if config.compilation_config.static_forward_context.get(name) is not layer:
        raise StaysStock("the layer is not registered under its name in the static forward context")


def refuse_modes(config: Any, batch_invariant: bool) -> None:
    """Raise StaysStock where vLLM runs in a mode that no fork is safe or wanted in. `config` is a VllmConfig."""
    if config.parallel_config.use_ubatching:
        raise StaysStock(rules.MICRO_BATCHING)
    # Each engine has a torch.distributed world of its own then, so overlay.engine.ranks does not compare it with those that
    # it runs steps together with, today's and those that join later (vLLM 0.17.1 to 0.33.0).
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        raise StaysStock(rules.ELASTIC)
    if batch_invariant:
        raise StaysStock(rules.BATCH_INVARIANT)
    if getattr(config.compilation_config, "cache_dir", ""):  # vLLM sets it itself when it compiles, and not before
        raise StaysStock(rules.OWN_CACHE)


def adopt(
    patch: str,
    record: PatchRecord,
    layer_name: str,
    make: Callable[[], tuple[Adopted, dict[str, Any]]],
    settings: Settings,
) -> Adopted | None:
    """What `make` gives for a layer, beside what the journal shows of it; None where the layer stays stock.

    Runs in upstream's `__init__`: nothing but strict lets an exception out.
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
        if reason not in record.refused.values():  # one problem, however many layers have it
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
    """Who has come between the verdict and this layer. The patch is refused then, and under strict vLLM stops."""
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
