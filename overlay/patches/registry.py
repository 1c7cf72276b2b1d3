"""The table of the patches: what each waits for, and its verdict on a vLLM. Nothing here imports torch or vLLM."""

from __future__ import annotations

from typing import Any

from overlay.patches.deepseek_v4 import verdict as deepseek_v4
from overlay.patches.dsa import verdict as dsa
from overlay.patches.frame_stack import verdict as frame_stack
from overlay.patches.gdn import verdict as gdn
from overlay.patches.lora_linear import verdict as lora_linear
from overlay.patches.pooling import verdict as pooling
from overlay.verdict import SourceTree, Verdict

#: By patch, its module ``verdict``: it has MODULES, WITNESS and ``judge(tree)``.
_VERDICTS: dict[str, Any] = {
    "gdn": gdn,
    "deepseek_v4": deepseek_v4,
    "dsa": dsa,
    "lora_linear": lora_linear,
    "pooling": pooling,
    "frame_stack": frame_stack,
}
#: The modules of vLLM whose import each patch waits for.
TARGET_MODULES: dict[str, tuple[str, ...]] = {patch: found.MODULES for patch, found in _VERDICTS.items()}
#: Modules of every vLLM that say which targets it has.
WITNESSES: tuple[str, ...] = tuple(dict.fromkeys(found.WITNESS.module for found in _VERDICTS.values()))


def judge(patch: str, tree: SourceTree) -> Verdict:
    """The verdict of one patch on one vLLM. Raises KeyError for a patch that does not exist."""
    found: Verdict = _VERDICTS[patch].judge(tree)
    return found
