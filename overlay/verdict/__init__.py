"""Verdicts: what each patch may do with a vLLM, read from that vLLM's source."""

from __future__ import annotations

from collections.abc import Callable

from overlay.verdict import deepseek_v4, gdn, lora_linear, pooling
from overlay.verdict.model import (
    ABSENT,
    APPLY,
    DRIFTED,
    INERT,
    LANDED,
    Source,
    SourceTree,
    Upstream,
    Verdict,
    class_at,
    decoded,
    kind_of,
)

__all__ = [
    "ABSENT",
    "APPLY",
    "DRIFTED",
    "INERT",
    "LANDED",
    "TARGET_MODULES",
    "WITNESSES",
    "Source",
    "SourceTree",
    "Upstream",
    "Verdict",
    "class_at",
    "decoded",
    "judge",
    "kind_of",
]

_JUDGES: dict[str, Callable[[SourceTree], Verdict]] = {
    "gdn": gdn.judge,
    "deepseek_v4": deepseek_v4.judge,
    "lora_linear": lora_linear.judge,
    "pooling": pooling.judge,
}
#: The modules of vLLM whose import each patch waits for.
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "gdn": gdn.MODULES,
    "deepseek_v4": deepseek_v4.MODULES,
    "lora_linear": lora_linear.MODULES,
    "pooling": pooling.MODULES,
}
#: Modules of every vLLM that say which targets it has.
WITNESSES: tuple[str, ...] = tuple(
    dict.fromkeys(judges.WITNESS.module for judges in (gdn, deepseek_v4, lora_linear, pooling))
)


def judge(patch: str, tree: SourceTree) -> Verdict:
    """The verdict of one patch on one vLLM. Raises KeyError for a patch that does not exist."""
    return _JUDGES[patch](tree)
