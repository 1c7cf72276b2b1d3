"""DeepSeek-V4-Flash with few layers: its configuration, and how the engine is started.

Every number but the number of layers is the released checkpoint's (`config.json` of deepseek-ai/DeepSeek-V4-Flash;
transformers' DeepseekV4Config has the same as its defaults). The first two layers have a sliding window only, then
compression ratios 4 (compressor and indexer) and 128 (compressor) alternate.
"""

from __future__ import annotations

from typing import Any

FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_rope_theta": 160000,
    "dtype": "bfloat16",
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "vocab_size": 129280,
}
#: Arguments of `vllm.LLM` that this model needs otherwise than the bench's.
ENGINE: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "block_size": 256,
    "max_model_len": 8192,
    "max_num_batched_tokens": 4096,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 6 << 30,
}
#: Columns of kv_score by compression ratio: twice the head's size, and twice that where the windows overlap (ratio 4).
KV_SCORE = {4: 2048, 128: 1024}
INDEXER_KV_SCORE = 512


def compress_ratios(layers: int) -> list[int]:
    """0 is no compression. One more than there are layers in the released list: the MTP layer, which has none."""
    return [0, 0, *(4 if index % 2 == 0 else 128 for index in range(max(0, layers - 2)))][:layers]


def configuration(layers: int) -> dict[str, Any]:
    """The content of `config.json` for that many layers."""
    return {**FLASH, "num_hidden_layers": layers, "compress_ratios": [*compress_ratios(layers), 0]}
