"""`bench --format`: vLLM's own readers quantize what the format says and leave alone the rest. No engine: their matching of names."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from overlay.cli.bench import formats, shapes

pytestmark = pytest.mark.engine
QUANTIZED = [name for name in formats.FORMATS if name != formats.DEFAULT]


#: Layer, as vLLM calls it, and the formats that quantize it.
MODULES = {
    "linear_attn.in_proj_qkvz": set(QUANTIZED) - {"w4-experts"},
    "linear_attn.in_proj_ba": {"w4"},
    "linear_attn.out_proj": set(QUANTIZED) - {"w4-experts"},
    "mlp.shared_expert.gate_up_proj": set(QUANTIZED) - {"w4-experts"},
    "mlp.shared_expert.down_proj": set(QUANTIZED) - {"w4-experts"},
    "mlp.experts": set(QUANTIZED),
}
ATTENTION = {"self_attn.qkv_proj": MODULES["linear_attn.out_proj"], "self_attn.o_proj": MODULES["linear_attn.out_proj"]}


def _reader(model: shapes.Model, architecture: Any) -> Any:
    """vLLM's own reader of the configuration, as a model's class prepares it."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    content = json.loads(json.dumps(model.configuration["quantization_config"]))
    method = content["quant_method"]
    if method == "modelopt":
        method = {"FP8": "modelopt", "MIXED_PRECISION": "modelopt_mixed"}[content["quant_algo"]]
    reader = get_quantization_config("auto_gptq" if method == "gptq" else method).from_config(content)
    if (mapper := getattr(architecture, "hf_to_vllm_mapper", None)) is not None:
        reader.apply_vllm_mapper(mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper)
    reader.packed_modules_mapping = architecture.packed_modules_mapping
    return reader


def _is_quantized(reader: Any, name: str) -> bool:
    """By the functions that vLLM's methods ask, without a layer: its classes want a GPU."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, is_layer_gptq_quantized
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    fused, kind = reader.packed_modules_mapping, type(reader).__name__
    if kind == "Fp8Config":
        return not is_layer_skipped(name, reader.ignored_layers, fused)
    if kind == "CompressedTensorsConfig":
        return not should_ignore_layer(name, reader.ignore, fused)
    if kind == "AutoGPTQConfig":
        chosen = is_layer_gptq_quantized(name, reader.modules_in_block_to_quantize, fused)
        return chosen and get_dynamic_override(reader, layer_name=name) is not False
    if kind == "ModelOptMixedPrecisionConfig":
        return not reader.is_layer_excluded(name) and reader._resolve_quant_algo(name) is not None
    return not reader.is_layer_excluded(name)


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize(
    ("name", "module", "architecture", "prefix"),
    [
        ("Qwen3.5-35B-A3B", "qwen3_5", "Qwen3_5MoeForConditionalGeneration", "language_model.model.layers"),
        ("Qwen3-Next-80B-A3B", "qwen3_next", "Qwen3NextForCausalLM", "model.layers"),
    ],
)
def test_vllm_quantizes_what_the_format_says(name: str, module: str, architecture: str, prefix: str, form: str) -> None:
    models = importlib.import_module(f"vllm.model_executor.models.{module}")
    reader = _reader(shapes.find(name, 12).with_format(form), getattr(models, architecture))
    for layer in (0, 1, 10):
        for part, formats_of in MODULES.items():
            assert _is_quantized(reader, f"{prefix}.{layer}.{part}") == (form in formats_of), (layer, part)
    for part, formats_of in ATTENTION.items():
        assert _is_quantized(reader, f"{prefix}.3.{part}") == (form in formats_of), part
    if form == "nvfp4":
        assert reader._resolve_quant_algo(f"{prefix}.1.mlp.experts") == "NVFP4"
        assert reader._resolve_quant_algo(f"{prefix}.1.linear_attn.in_proj_qkvz") == "FP8"
        assert reader._resolve_quant_algo(f"{prefix}.1.mlp.shared_expert.gate_up_proj") == "FP8"
