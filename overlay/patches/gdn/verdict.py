"""The verdict for the GDN input projections: a pair of linears that read one input."""

from __future__ import annotations

from dataclasses import replace

from overlay.verdict import data_flow
from overlay.verdict.data_flow import Pair
from overlay.verdict.model import SourceTree, Upstream, Verdict, in_model_registry, without_target
from overlay.vocabulary import ABSENT, APPLY

QKVZ, BA = "in_proj_qkvz", "in_proj_ba"
PAIR = Pair(
    main=QKVZ,
    sides=(BA,),
    entries=("forward_cuda", "forward", "forward_hip", "forward_cpu"),
    # The separate projections that 0.19.0 to 0.20.2 use under LoRA.
    never=("hasattr(self, 'in_proj_qkv')",),
    upstream_op="gdn_in_proj",  # vLLM #36795 brought it, and #38152 reverted it
)
#: Where the class has lived: from vLLM 0.22.0, and 0.19.0 to 0.21.0.
CLASSES = {
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn": "QwenGatedDeltaNetAttention",
    "vllm.model_executor.layers.mamba.gdn_linear_attn": "GatedDeltaNetAttention",
}
MODULES = tuple(CLASSES)
#: Where releases before 0.19.0 kept it.
MODEL = "vllm.model_executor.models.qwen3_next"
#: The models that are built on it.
WITNESS = in_model_registry("qwen3_next|qwen3_5")
#: The op of vLLM #56530. It is for a few layers only (both projections FP8 per tensor), which the patch refuses itself.
OPT_IN = "vllm.model_executor.layers.mamba.gdn.input_projection"
OPT_IN_UPSTREAM = Upstream("#56530", False, "additional_config.gdn_concurrent_input_gemm")


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    found = data_flow.judge(tree, CLASSES, PAIR, f"{QKVZ} and {BA} run one after the other")
    if found is not None:
        return replace(found, upstream=OPT_IN_UPSTREAM) if found.state == APPLY and tree.has(OPT_IN) else found
    model = tree.read(MODEL)
    if model is not None and f"self.{QKVZ}(" in model.text:
        reason = "the GDN layer is part of models/qwen3_next.py, as before vLLM 0.19.0; the overlay supports 0.19.0 and later"
        return Verdict(ABSENT, reason, MODEL, where=f"{model.path}:1")
    return without_target(
        tree,
        WITNESS,
        absent="this vLLM has no Qwen3-Next and no GDN layer",
        lost=f"this vLLM has Qwen3-Next, but its GDN layer is not in {' or '.join(MODULES)}",
    )
