"""Configurations in the shape of Qwen3.5-35B-A3B in every architecture that its layers come in, and quantized.

The sizes are in overlay/cli/bench/shapes.py; only the number of layers is smaller than in the released model.
"""

from __future__ import annotations

from typing import Any

from overlay.cli.bench import shapes

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
#: Over shapes.MIXTURE, for the CPU test of the scripts.
TINY_MIXTURE: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ARCHITECTURES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_text", "qwen3_next")


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


def configuration(
    architecture: str, layers: int, tiny: bool = False, quantization: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `config.json`: as `shapes.configuration`, always with the 35B model's layer sizes."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    mixture = architecture in ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
    text = {**shapes.TEXT, **(shapes.TINY if tiny else {})}
    if mixture:
        text |= {**shapes.MIXTURE, **(TINY_MIXTURE if tiny else {})}
    if not mixture or architecture == "qwen3_next":
        text["intermediate_size"] = 128 if tiny else 6144
    if architecture == "qwen3_next":
        text |= shapes.NEXT_ROPE
    extra: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    return {**shapes.configuration(architecture, text, layers), **extra}
