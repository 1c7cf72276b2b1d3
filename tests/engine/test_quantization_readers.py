"""How `check --model` reads a checkpoint's quantization, against vLLM's own readers: the same lists, the same linears left alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from overlay.cli import checkpoint, quantization

pytestmark = pytest.mark.engine

TORN = "only some parts are quantized"
PREFIXES = ("model.language_model.layers", "language_model.model.layers", "model.layers")
PARTS = (
    "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a",
    "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj", "self_attn.q_proj", "self_attn.k_proj",
    "self_attn.v_proj", "self_attn.o_proj", "mlp.gate", "linear_attn",
)  # fmt: skip
LINEARS = (
    "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_ba",
    "linear_attn.out_proj",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
)
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}


def entry(choose: random.Random) -> str:
    """One name as somebody might write it: whole, a part, its end, a tree, or a pattern of compressed-tensors."""
    layer, part = choose.choice([0, 1]), choose.choice(PARTS)
    whole = f"{choose.choice(PREFIXES)}.{layer}.{part}"
    pattern = choose.choice([rf"re:.*{part}$", r"re:.*linear_attn\.in_proj_[ba]$", rf"re:.*\.{layer}\..*"])
    return choose.choice([whole, whole, whole, part, part.rpartition(".")[2], f"{whole}*", pattern])


def fp8(names: list[str]) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": names}


def modelopt(names: list[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": names}


def mixed(names: list[str]) -> dict[str, Any]:
    layers = {name: {"quant_algo": "FP8"} for name in [*names[2:], "x"]}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "ignore": names[:2],
        "quantized_layers": layers,
    }


def compressed_tensors(names: list[str]) -> dict[str, Any]:
    group = {"targets": names[3:] or ["Linear"], "weights": FP8, "input_activations": FP8}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": names[:3],
        "config_groups": {"a": group},
    }


def gptq(names: list[str]) -> dict[str, Any]:
    left_out = {f"-:{name.removeprefix('re:').replace('*', '')}": {} for name in names[:1]}
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "dynamic": left_out}
    return {"quant_method": "gptq", "modules_in_block_to_quantize": names, **settings}


MAKERS = (fp8, modelopt, mixed, compressed_tensors, gptq)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any], str], object]:
    """Whether vLLM leaves a linear alone, or TORN; by the maker's name, the configuration and the linear's name."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import auto_gptq, modelopt
    from vllm.model_executor.layers.quantization import fp8 as vllms_fp8
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as tensors
    from vllm.model_executor.models.qwen3_5 import Qwen3_5MoeForConditionalGeneration as Model

    def method(*_: Any, **__: Any) -> Any:
        """In the place of methods that ask for a GPU."""
        return type("Quantized", (), {})()

    monkeypatch.setattr(vllms_fp8, "Fp8LinearMethod", method)
    monkeypatch.setattr(vllms_fp8, "get_marlin_input_dtype", lambda _: None)
    monkeypatch.setattr(modelopt, "build_linear_method", method)
    monkeypatch.setattr(auto_gptq, "AutoGPTQLinearMethod", method)
    readers: dict[str, Any] = {
        "fp8": vllms_fp8.Fp8Config,
        "modelopt": modelopt.ModelOptFp8Config,
        "mixed": modelopt.ModelOptMixedPrecisionConfig,
        "compressed_tensors": tensors.CompressedTensorsConfig,
        "gptq": auto_gptq.AutoGPTQConfig,
    }
    linear = object.__new__(MergedColumnParallelLinear)

    def asked(maker: str, config: dict[str, Any], name: str) -> object:
        reader = readers[maker].from_config(dict(config))
        reader.packed_modules_mapping = Model.packed_modules_mapping
        reader.apply_vllm_mapper(Model.hf_to_vllm_mapper)
        try:
            if maker == "compressed_tensors":
                return reader.get_scheme_dict(linear, name) is None
            return isinstance(reader.get_quant_method(linear, name), UnquantizedLinearMethod)
        except ValueError:
            return TORN

    return asked


def test_the_same_linears_are_left_alone(theirs: Callable[[str, dict[str, Any], str], object]) -> None:
    names = quantization.Names(
        {"model.language_model.": "language_model.model."}, {**checkpoint.ATTENTION, **checkpoint.MLP, **checkpoint.GDN}
    )
    choose = random.Random(7)
    seen: dict[str, set[object]] = {maker.__name__: set() for maker in MAKERS}
    for _ in range(200):
        entries = [entry(choose) for _ in range(choose.randint(0, 6))]
        if choose.random() < 0.4:
            entries += [f"{PREFIXES[0]}.0.linear_attn.{part}" for part in ("in_proj_b", "in_proj_a")]
        for maker in MAKERS:
            config = maker(entries)
            reader = quantization.find(config, "bfloat16", names, None)
            for linear in LINEARS:
                name = f"language_model.model.layers.0.{linear}"
                try:
                    ours: object = reader.read(name).said == "bf16"
                except quantization.Torn:
                    ours = TORN
                assert ours == theirs(maker.__name__, config, name), (name, config)
                seen[maker.__name__].add(ours)
    assert all(found == {True, False, TORN} for found in seen.values()), seen
