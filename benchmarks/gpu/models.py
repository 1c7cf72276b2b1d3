"""Model configurations in the shape of Qwen3.5-35B-A3B, written as a `config.json` that vLLM reads without a network.

Only the number of layers is smaller than in the released model; every layer has its full size. There are no weights on
disk: `gpu.weights` fills them in place, the same values in every process.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

#: Layer shape of Qwen3.5-35B-A3B.
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 248320,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
MIXTURE: dict[str, Any] = {
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
#: One small block: the tower is never built (`language_model_only`), the configuration class wants the section.
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 128,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
    "hidden_act": "gelu_pytorch_tanh",
}
#: What the CPU test of this script uses instead of the full shape.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "vocab_size": 4096,
    "eos_token_id": 4090,
    "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [2, 1, 1]},
}
TINY_MIXTURE: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
#: The linears that GPTQ packs into 4 bits. Named, because vLLM would read them from the weight files, and there are none.
_PACKED = (
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.out_proj",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def gptq(narrow: bool) -> dict[str, Any]:
    """A GPTQ section for a dense model. Released checkpoints leave the narrow projections (b, a) in 16 bits."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "true_sequential": True,
        "modules_in_block_to_quantize": [
            list(_PACKED) + (["linear_attn.in_proj_b", "linear_attn.in_proj_a"] if narrow else [])
        ],
    }


ARCHITECTURES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text", "qwen3_next")


def layer_types(layers: int) -> list[str]:
    """Full attention every fourth layer, gated delta net everywhere else."""
    return ["full_attention" if (index + 1) % 4 == 0 else "linear_attention" for index in range(layers)]


def configuration(
    architecture: str, layers: int, tiny: bool = False, quantization: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `config.json`.

    `qwen3_5_moe` is the released model's own architecture (vision part switched off by `language_model_only`);
    `…_text` are the text-only classes, which vLLM registers from 0.27 on; `qwen3_next` has the interleaved layout.
    `qwen3_5` and `qwen3_5_text` have a dense MLP.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    mixture = architecture in ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
    text = {**TEXT, **(TINY if tiny else {}), "num_hidden_layers": layers, "layer_types": layer_types(layers)}
    if mixture:
        text |= {**MIXTURE, **(TINY_MIXTURE if tiny else {})}
    if not mixture or architecture == "qwen3_next":
        text["intermediate_size"] = 128 if tiny else 6144
    extra: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if architecture == "qwen3_next":
        rope = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
        text |= {"rope_parameters": rope, "partial_rotary_factor": 0.25, "rope_theta": 10000000}
        return {**text, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", **extra}
    stem, kind = ("Qwen3_5Moe", "qwen3_5_moe") if mixture else ("Qwen3_5", "qwen3_5")
    text["model_type"] = f"{kind}_text"
    if architecture.endswith("_text"):
        return {**text, "architectures": [f"{stem}ForCausalLM"], **extra}
    vocabulary = text["vocab_size"]
    return {
        "architectures": [f"{stem}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": False,
        "image_token_id": vocabulary - 1,
        "video_token_id": vocabulary - 2,
        "vision_start_token_id": vocabulary - 3,
        "vision_end_token_id": vocabulary - 4,
        "text_config": text,
        "vision_config": {**VISION, "model_type": kind, "out_hidden_size": text["hidden_size"]},
        **extra,
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write `config.json` into `folder` and give the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    return folder
