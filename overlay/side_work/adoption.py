"""One layer at a time: a patch takes a layer, or leaves it stock and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from overlay.engine import compile_cache, ranks, running_code
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings, outcome
from overlay.side_work import rules
from overlay.vocabulary import REFUSED

Adopted = TypeVar("Adopted")


class Refused(Exception):
    """Why a layer stays stock: known, expected, and no problem."""


def refuse_modes(config: Any, batch_invariant: bool) -> None:
    """Raise Refused where vLLM runs in a mode that no fork is safe or wanted in. `config` is a VllmConfig."""
    if config.parallel_config.use_ubatching:
        raise Refused(rules.MICRO_BATCHING)
    # Each engine has a torch.distributed world of its own then, so overlay.engine.ranks does not compare it with those that
    # it runs steps together with, today's and those that join later (vLLM 0.17.1 to 0.33.0).
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        raise Refused(rules.ELASTIC)
    if batch_invariant:
        raise Refused(rules.BATCH_INVARIANT)
    if getattr(config.compilation_config, "cache_dir", ""):  # vLLM sets it itself when it compiles, and not before
        raise Refused(rules.OWN_CACHE)


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
    except Refused as refused:
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
