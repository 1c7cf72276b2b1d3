"""Verdicts: what each patch may do with a vLLM, read from that vLLM's source."""

from __future__ import annotations

from collections.abc import Callable

from overlay.verdict import gdn
from overlay.verdict.model import ABSENT, APPLY, DRIFTED, INERT, LANDED, Source, SourceTree, Verdict

__all__ = [
    "ABSENT",
    "APPLY",
    "DRIFTED",
    "INERT",
    "LANDED",
    "TARGET_MODULES",
    "Source",
    "SourceTree",
    "Verdict",
    "judge",
]

_JUDGES: dict[str, Callable[[SourceTree], Verdict]] = {"gdn": gdn.judge}
#: The modules of vLLM whose import each patch waits for.
TARGET_MODULES: dict[str, tuple[str, ...]] = {"gdn": tuple(module for module, _ in gdn.TARGETS)}


def judge(patch: str, tree: SourceTree) -> Verdict:
    """The verdict of one patch on one vLLM. Raises KeyError for a patch that does not exist."""
    return _JUDGES[patch](tree)
