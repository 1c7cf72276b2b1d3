"""The verdict for the projections of DeepSeek-V3.2's attention: a pair of linears that read one input, one in the indexer."""

from __future__ import annotations

import re
from dataclasses import replace

from overlay.verdict import data_flow
from overlay.verdict.data_flow import Pair
from overlay.verdict.model import SourceTree, Verdict, in_model_registry, without_target
from overlay.vocabulary import APPLY, DRIFTED

QKV_A, WK_WEIGHTS = "fused_qkv_a_proj", "indexer.wk_weights_proj"
PAIR = Pair(
    main=QKV_A,
    sides=(WK_WEIGHTS,),
    entries=("forward",),
    # The stand-in runs for a layer with an indexer that does not skip it (`overlay.patches.dsa.patch`).
    always=("self.indexer is not None and (not self.skip_topk)",),
)
#: Where the class has lived: from vLLM 0.27.0, and 0.25 to 0.26.
CLASSES = {
    "vllm.models.deepseek_v32.attention": "DeepseekV32Attention",
    "vllm.models.deepseek_v32.nvidia.attention": "DeepseekV32Attention",
}
MODULES = tuple(CLASSES)
#: The model that is built on it.
MODEL = "vllm.models.deepseek_v32.nvidia.model"
#: The package of the model. vLLM runs these checkpoints by it from 0.29.0 on, before by models/deepseek_v2.py, which is compiled.
WITNESS = in_model_registry(r"vllm\.models\.deepseek_v32")


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    found = data_flow.judge(tree, CLASSES, PAIR, f"{WK_WEIGHTS} runs after {QKV_A}, and needs nothing of it")
    if found is None:
        return without_target(
            tree,
            WITNESS,
            absent="this vLLM runs DeepSeek-V3.2 by models/deepseek_v2.py, or not at all",
            lost=f"this vLLM has DeepSeek-V3.2, but its attention is not in {' or '.join(MODULES)}",
        )
    if found.state != APPLY:
        return found
    # A tree of its own: what runs need not be these texts, and vLLM is just importing the model when it is judged.
    others = SourceTree(tree.folder)
    model, registry = others.read(MODEL), others.read(WITNESS.module)
    if model is not None and "support_torch_compile" in model.text:
        return replace(found, state=DRIFTED, reason="the model is compiled now", methods=(), where=f"{model.path}:1")
    by_default = registry is None or re.search(WITNESS.names, registry.text)
    reason = (
        found.reason if by_default else f"{found.reason}; vLLM runs it only where model_class_overrides asks for it"
    )
    return replace(found, reason=reason, shapes_graph=False)
