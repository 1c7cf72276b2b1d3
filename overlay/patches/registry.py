"""The table of the patches: what each waits for, and its verdict on a vLLM. Nothing here imports torch or vLLM."""

from __future__ import annotations

from collections.abc import Callable

from overlay.patches.deepseek_v4 import verdict as deepseek_v4
from overlay.patches.frame_stack import verdict as frame_stack
from overlay.patches.gdn import verdict as gdn
from overlay.patches.lora_linear import verdict as lora_linear
from overlay.patches.pooling import verdict as pooling
from overlay.verdict import SourceTree, Verdict

_JUDGES: dict[str, Callable[[SourceTree], Verdict]] = {
    "gdn": gdn.judge,
    "deepseek_v4": deepseek_v4.judge,
    "lora_linear": lora_linear.judge,
    "pooling": pooling.judge,
    "frame_stack": frame_stack.judge,
}
#: The modules of vLLM whose import each patch waits for.
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "gdn": gdn.MODULES,
    "deepseek_v4": deepseek_v4.MODULES,
    "lora_linear": lora_linear.MODULES,
    "pooling": pooling.MODULES,
    "frame_stack": frame_stack.MODULES,
}
#: Modules of every vLLM that say which targets it has.
WITNESSES: tuple[str, ...] = tuple(
    dict.fromkeys(judges.WITNESS.module for judges in (gdn, deepseek_v4, lora_linear, pooling, frame_stack))
)


def judge(patch: str, tree: SourceTree) -> Verdict:
    """The verdict of one patch on one vLLM. Raises KeyError for a patch that does not exist."""
    return _JUDGES[patch](tree)
