"""A model in the layer shape of Qwen3-8B, and LoRA adapters for it, written by this repository: no network, no download.

Two kinds of adapter. vLLM's shrink kernel splits the input features over thread blocks that add to one float32 result with
atomics, in no fixed order, so a usual adapter need not give the same bits twice, in stock neither. In a `repeatable`
adapter every row of A has values in one aligned block of 32 features only. Each of the kernel's ways to split (blocks of 32
or 256 features) gives such a row to one thread block, the others add zero, and no order can change the sum. With these,
different bits are a fault. A `dense` adapter has values everywhere; it shows how far stock repeats itself.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import linears
from benchmarks.gpu.linears import Linear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Layer shape of Qwen3-8B. The released model has 36 layers.
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 151936,
}
#: For the CPU test of the script.
TINY: dict[str, Any] = {
    "eos_token_id": 4090,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
#: LoRA linears of one layer in vLLM: qkv_proj, o_proj, gate_up_proj, down_proj.
LINEARS_PER_LAYER = 4
#: Features of a row of A that a repeatable adapter uses: the smallest block of vLLM's shrink kernel.
BLOCK = 32
#: Standard deviation of what an adapter adds, for an input of deviation 1. The base layer's output has 1.
ADDED = 0.5


def configuration(layers: int, tiny: bool = False) -> dict[str, Any]:
    """The content of `config.json`."""
    return {**QWEN3_8B, **(TINY if tiny else {}), "num_hidden_layers": layers}


def projections(config: dict[str, Any]) -> list[Linear]:
    """Every linear that the adapters target.

    Routed and shared experts have none, nor have the input projections of linear attention.
    """
    mixture = "num_experts" in config.get("text_config", config)
    left_out = (".in_proj_", ".mlp.") if mixture else (".in_proj_",)
    return [linear for linear in linears.of_model(config) if not any(part in linear.name for part in left_out)]


def lora_a(rank: int, inputs: int, dense: bool, generator: Any) -> Any:
    """A, (rank, inputs), float32: gives values of deviation 1 for an input of deviation 1."""
    import torch

    if dense or inputs <= BLOCK:
        return torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
    blocks = torch.zeros(rank, inputs // BLOCK, BLOCK)
    chosen = torch.randint(inputs // BLOCK, (rank,), generator=generator)
    blocks[torch.arange(rank), chosen] = torch.randn(rank, BLOCK, generator=generator) / math.sqrt(BLOCK)
    values = torch.zeros(rank, inputs)
    values[:, : inputs // BLOCK * BLOCK] = blocks.flatten(1)
    return values


def adapter_folder(parent: Path, config: dict[str, Any], rank: int, dense: bool, seed: int) -> Path:
    """Where `write_adapter` puts an adapter."""
    kind = "dense" if dense else "repeatable"
    layers = config.get("text_config", config)["num_hidden_layers"]
    return parent / f"{kind}-rank-{rank}-seed-{seed}-{layers}-layers"


def write_adapter(parent: Path, config: dict[str, Any], rank: int, dense: bool, seed: int) -> Path:
    """Write a PEFT adapter in bfloat16 and give its folder back. One that is there already is kept."""
    target = adapter_folder(parent, config, rank, dense, seed)
    if not (target / "adapter_config.json").exists():
        save_adapter(target, config["model_type"], projections(config), rank, dense, seed)
    return target


def save_adapter(target: Path, base: str, targets: Sequence[Linear], rank: int, dense: bool, seed: int) -> None:
    """Write a PEFT adapter for these linears of a model that is called `base`."""
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed * 1000 + rank * 2 + dense)
    tensors = {}
    for name, inputs, outputs in targets:
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = lora_a(rank, inputs, dense, generator).to(torch.bfloat16)
        added = torch.randn(outputs, rank, generator=generator) * (ADDED / math.sqrt(rank))
        tensors[f"{prefix}.lora_B.weight"] = added.to(torch.bfloat16)
    save_file(tensors, str(target / "adapter_model.safetensors"))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,  # a scaling of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "base_model_name_or_path": base,
        "target_modules": sorted({linear.name.rpartition(".")[2] for linear in targets}),
    }
    (target / "adapter_config.json").write_text(json.dumps(settings, indent=1))  # last: it says that all is there
