"""DeepSeek-V4-Flash with few layers: its configuration, random weights that matter, and how the engine is started.

Every number but the number of layers is the released checkpoint's (`config.json` of deepseek-ai/DeepSeek-V4-Flash;
transformers' DeepseekV4Config has the same as its defaults). The first two layers have a sliding window only, then
compression ratios 4 (compressor and indexer) and 128 (compressor) alternate.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from bench_engine import weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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
#: Columns of kv_score by compression ratio: twice the head's size, and twice that where the windows overlap (ratio 4).
KV_SCORE = {4: 2048, 128: 1024}
INDEXER_KV_SCORE = 512


def compress_ratios(layers: int) -> list[int]:
    """0 is no compression. One more than there are layers in the released list: the MTP layer, which has none."""
    return [0, 0, *(4 if index % 2 == 0 else 128 for index in range(max(0, layers - 2)))][:layers]


def configuration(layers: int) -> dict[str, Any]:
    """The content of `config.json` for that many layers."""
    return {**FLASH, "num_hidden_layers": layers, "compress_ratios": [*compress_ratios(layers), 0]}


def write(folder: Path, layers: int) -> Path:
    """Write `config.json` into `folder` and give the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration(layers), indent=1))
    return folder


def engine(model: Path, capture_sizes: tuple[int, ...], mtp: bool, tensor_parallel: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, the same for all sides."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "kv_cache_dtype": "fp8",
        "block_size": 256,
        "max_model_len": 8192,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": max(capture_sizes),
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 6 << 30,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        "tensor_parallel_size": tensor_parallel,
        "compilation_config": {"cudagraph_capture_sizes": list(capture_sizes)},
    }
    if mtp:
        arguments["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    return arguments


def _power_of_two_below_one(inputs: int) -> int:
    """The exponent k of the scale 2**-k that gives a sum over `inputs` products about the size of its inputs."""
    return round(math.log2(inputs) / 2)


def fill(tensor: Any, name: str, owner: str, seed: int, tensors: Mapping[str, Any] | None = None) -> None:
    """As `weights.fill`, and what DeepSeek-V4 has beside: power-of-two scales, 4-bit experts, the hash router's table."""
    import torch

    data, leaf = tensor.data, name.rpartition(".")[2]
    if data.device.type == "meta" or data.numel() == 0:
        return
    generator = weights._generator(data.device, seed, name)
    if data.dtype == torch.float8_e8m0fnu:  # one scale for a block of 128 inputs
        data.view(torch.uint8).fill_(127 - _power_of_two_below_one(data.shape[-1] * 128))
    elif data.dtype == torch.uint8 and leaf.endswith("_scale"):  # one for 32; a random 4-bit float is about 3 in size
        data.fill_(127 - 2 - _power_of_two_below_one(data.shape[-1] * 32))
    elif data.dtype == torch.uint8 and leaf.endswith("_weight"):
        data.random_(0, 256, generator=generator)
    elif leaf == "tid2eid":
        data.random_(0, FLASH["n_routed_experts"], generator=generator)
    else:
        _fill_plain(tensor, name, owner, seed, tensors)


_fill_plain = weights.fill
