"""The quantizations that `--format` knows: what a published checkpoint's `config.json` says of itself, for any named shape.

Every entry of FORMATS makes the `quantization_config` of one kind of checkpoint. vLLM 0.33.0 reads them by
`Fp8Config` (exact names; a fused layer is left alone where all its parts are named), `ModelOptQuantConfigBase` (names as
parts of a prefix), `CompressedTensorsConfig` (`re:` patterns) and `AutoGPTQConfig` (parts of a prefix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT = "bf16"
#: Bytes of a 4-bit weight with a 16-bit scale for 128 of them, and with an 8-bit scale for 16.
_GPTQ_BYTES, _NVFP4_BYTES = 0.5 + 2 / 128, 0.5 + 1 / 16


@dataclass(frozen=True)
class Layers:
    """What a format has to know of a model: its layers by kind, under the names that its checkpoint has."""

    prefix: str  #: of a layer's number
    kinds: tuple[str, ...]  #: as in `layer_types`
    mixture: bool  #: whether it has routed experts
    shared: bool  #: whether it has a shared expert beside them
    fused: bool  #: whether the checkpoint has `in_proj_qkvz` and `in_proj_ba` as they are: Qwen3-Next

    def each(self, linear: tuple[str, ...], attention: tuple[str, ...], every: tuple[str, ...]) -> list[str]:
        """Full names: of modules of linear attention layers, of attention layers, and of all layers."""
        own = {"linear_attention": linear, "full_attention": attention}
        return [
            f"{self.prefix}.{index}.{name}"
            for index, kind in enumerate(self.kinds)
            for name in (*own.get(kind, ()), *every)
        ]

    @property
    def main(self) -> tuple[str, ...]:
        return ("in_proj_qkvz",) if self.fused else ("in_proj_qkv", "in_proj_z")

    @property
    def side(self) -> tuple[str, ...]:
        return ("in_proj_ba",) if self.fused else ("in_proj_b", "in_proj_a")

    def left_alone(self) -> list[str]:
        """What all of these checkpoints keep in bf16."""
        gates = ("mlp.gate", "mlp.shared_expert_gate") if self.mixture else ()
        return [
            "lm_head",
            *self.each(tuple(f"linear_attn.{name}" for name in (*self.side, "conv1d")), (), gates),
        ]


def _fp8_block(layers: Layers) -> dict[str, Any]:
    """Qwen's own FP8: blocks of 128 x 128, activations by token and 128 inputs."""
    embeddings = f"{layers.prefix.rpartition('.')[0]}.embed_tokens"
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [embeddings, *layers.left_alone()],
    }


def _fp8_tensor(layers: Layers) -> dict[str, Any]:
    """ModelOpt's FP8: one scale per weight and a static one for its input; experts as well."""
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.39.0"},
        "ignore": layers.left_alone(),
    }


def _fp8_channel(layers: Layers) -> dict[str, Any]:
    """compressed-tensors' FP8_DYNAMIC, as llm-compressor writes it."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    names = "|".join((*layers.side, "conv1d"))
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": [
            "re:.*lm_head",
            rf"re:.*linear_attn\.({names})$",
            r"re:.*mlp\.gate$",
            r"re:.*mlp\.shared_expert_gate$",
        ],
    }


def _gptq(quantized: list[str], **more: Any) -> dict[str, Any]:
    """GPTQ with 4 bits and groups of 128. `quantized`: parts of the names of what is quantized."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "modules_in_block_to_quantize": quantized,
        **more,
    }


def _w4_experts(layers: Layers) -> dict[str, Any]:
    """4-bit experts, and everything else as in bf16."""
    others = (r".*linear_attn.*", r".*self_attn.*", r".*shared_expert.*", r".*mlp\.gate$")
    return _gptq(["mlp.experts"], dynamic={f"-:{name}": {} for name in others})


def _w4(layers: Layers) -> dict[str, Any]:
    """4 bits everywhere, the side projection as well: on Hopper Machete, and Marlin where its sizes do not suit Machete."""
    return _gptq(["self_attn.", "linear_attn.in_proj", "linear_attn.out_proj", "mlp."])


def _nvfp4(layers: Layers) -> dict[str, Any]:
    """nvidia's: ModelOpt's mixed precision, experts (or a dense MLP) in NVFP4, projections in FP8 with static activations."""
    main = tuple(f"linear_attn.{name}" for name in (*layers.main, "out_proj"))
    attention = tuple(f"self_attn.{name}_proj" for name in "qkvo")
    mlp = tuple(f"{name}_proj" for name in ("gate", "up", "down"))
    shared = tuple(f"mlp.shared_expert.{name}" for name in mlp) if layers.shared else ()
    narrow = tuple(f"mlp.experts.0.{name}" if layers.mixture else f"mlp.{name}" for name in mlp)
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "producer": {"name": "modelopt", "version": "0.39.0"},
        "quantized_layers": {
            **{name: {"quant_algo": "FP8"} for name in layers.each(main, attention, shared)},
            **{name: {"quant_algo": "NVFP4", "group_size": 16} for name in layers.each((), (), narrow)},
        },
        "ignore": layers.left_alone(),
    }


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint."""

    configuration: Callable[[Layers], dict[str, Any]] | None
    projections: float  #: bytes of a weight of attention and linear attention
    feed_forward: float  #: bytes of a weight of experts or a dense MLP
    multiple: int = 1  #: what the inputs of every quantized layer are a multiple of
    experts_only: bool = False


FORMATS: Mapping[str, Format] = {
    DEFAULT: Format(None, 2.0, 2.0),
    "fp8-block": Format(_fp8_block, 1.0, 1.0, 128),
    "fp8-tensor": Format(_fp8_tensor, 1.0, 1.0, 16),
    "fp8-channel": Format(_fp8_channel, 1.0, 1.0, 16),
    "w4-experts": Format(_w4_experts, 2.0, _GPTQ_BYTES, 128, experts_only=True),
    "w4": Format(_w4, _GPTQ_BYTES, _GPTQ_BYTES, 128),
    "nvfp4": Format(_nvfp4, 1.0, _NVFP4_BYTES, 16),
}
#: Text fields whose value is a number of inputs of some quantized layer.
INPUT_FIELDS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


def reason_against(name: str, text: Mapping[str, Any], mixture: bool) -> str | None:
    """Why this format cannot be had with these sizes; None where it can."""
    form = FORMATS[name]
    if form.experts_only and not mixture:
        return "the model has no experts"
    for field in INPUT_FIELDS:
        size = text.get(field)
        if size and int(size) % form.multiple:
            return f"its {field} of {size} is no multiple of {form.multiple}"
    return None
