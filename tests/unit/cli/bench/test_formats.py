"""`bench --format`: what is quantized, and weights that matter in every format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from overlay.cli.bench import formats, memory, shapes
from overlay.cli.bench.outside.bench_engine import weights
from overlay.cli.failure import CommandError

torch = pytest.importorskip("torch")


def _model(name: str = "Qwen3.5-35B-A3B", form: str = formats.DEFAULT, layers: int = 4) -> shapes.Model:
    return shapes.find(name, layers).with_format(form)


@pytest.mark.parametrize("form", formats.FORMATS)
@pytest.mark.parametrize("name", ["Qwen3.5-35B-A3B", "Qwen3.5-27B", "Qwen3-Next-80B-A3B"])
def test_a_shape_has_every_format_but_experts_where_there_are_none(name: str, form: str, tmp_path: Path) -> None:
    if form == "w4-experts" and name == "Qwen3.5-27B":
        with pytest.raises(CommandError, match="no experts"):
            _model(name, form)
        return
    model = _model(name, form, 8)
    written = json.loads((model.folder(tmp_path) / "config.json").read_text())
    assert ("quantization_config" in written) == (form != "bf16")
    assert written == dict(_model(name, form, 4).with_layers(8).configuration)
    assert model.format_name == form
    assert "quantization_config" not in model.config


def test_folders_of_two_formats_are_two(tmp_path: Path) -> None:
    assert len({_model(form=form).folder(tmp_path) for form in formats.FORMATS}) == len(formats.FORMATS)


def test_what_does_not_go_together_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--format='int8': allowed are bf16, fp8-block, fp8-tensor"):
        _model(form="int8")
    with pytest.raises(CommandError, match=r"tiny: its hidden_size of 64 is no multiple of 128"):
        _model("tiny", "fp8-block")
    own = {**_model().config, "quantization_config": {"quant_method": "awq"}}
    shapes.write(tmp_path, own)
    model = shapes.find(str(tmp_path), None)
    assert model.format_name == "awq" and model.with_format("bf16") == model
    with pytest.raises(CommandError, match="format of their own"):
        model.with_format("w4")
    assert _model("tiny", "fp8-tensor").format == "fp8-tensor"


def test_formats_take_less_memory_the_fewer_bits_they_have() -> None:
    sizes = [memory._weights(_model(form=form)) for form in ("bf16", "fp8-block", "nvfp4", "w4")]
    assert sizes == sorted(sizes, reverse=True)
    experts = 4 * (3 * 2048 * 512 * 257 + 2048 * 256)
    saved = memory._weights(_model()) - memory._weights(_model(form="w4-experts"))
    assert saved == pytest.approx(experts * (2 - 0.5 - 2 / 128))


# ---------------------------------------------------------------- values


def _nibbles(packed: Any, width: int) -> Any:
    """4-bit values as one more dimension: eight in an int32, two in a byte."""
    return torch.stack([(packed >> shift) & 15 for shift in range(0, width, 4)], -1).float()


def _gptq(tensors: dict[str, Any], prefix: str) -> Any:
    packed = tensors[prefix + "qweight"]
    values = _nibbles(packed, 32).movedim(-1, -2).flatten(-3, -2) - 8
    return values * tensors[prefix + "scales"].float().repeat_interleave(128, -2)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _nvfp4(tensors: dict[str, Any], prefix: str) -> Any:
    table = torch.tensor(E2M1 + [-value for value in E2M1])
    values = table[_nibbles(tensors[prefix + "weight"], 8).long()].flatten(-2)
    whole = tensors[prefix + "weight_scale_2"].flatten()[0]
    return values * tensors[prefix + "weight_scale"].float().repeat_interleave(16, -1) * whole


def _fp8(tensors: dict[str, Any], prefix: str) -> Any:
    weight = tensors[prefix + "weight"].float()
    scale = tensors.get(prefix + "weight_scale", tensors.get(prefix + "weight_scale_inv"))
    if prefix + "weight_scale_inv" in tensors:
        scale = scale.repeat_interleave(128, -1).repeat_interleave(128, -2)
    elif scale.dim() <= 1 and prefix == "":  # one for each part of a fused layer
        scale = scale.repeat_interleave(weight.shape[-2] // scale.numel())[:, None]
    elif scale.dim() < weight.dim():  # one for an expert, or for each of its parts
        scale = scale.reshape(scale.shape[0], -1)
        scale = scale.repeat_interleave(weight.shape[-2] // scale.shape[-1], -1)[..., None]
    return weight * scale


F8, F32, BF16, I32, U8 = torch.float8_e4m3fn, torch.float32, torch.bfloat16, torch.int32, torch.uint8
OUT, IN, EXPERTS = 256, 512, 3
#: Of each kind of layer: its tensors' shapes and types, and how they become weights of (output, input), or for GPTQ the other
#: way round.
LAYERS: dict[str, tuple[dict[str, tuple[tuple[int, ...], Any]], Any, bool]] = {
    "block": ({"weight": ((OUT, IN), F8), "weight_scale_inv": ((2, 4), F32)}, _fp8, False),
    "tensor": ({"weight": ((OUT, IN), F8), "weight_scale": ((2,), F32), "input_scale": ((2,), F32)}, _fp8, False),
    "channel": ({"weight": ((OUT, IN), F8), "weight_scale": ((OUT, 1), F32)}, _fp8, False),
    "gptq": (
        {"qweight": ((IN // 8, OUT), I32), "scales": ((4, OUT), BF16), "qzeros": ((4, OUT // 8), I32)},
        _gptq,
        True,
    ),
    "nvfp4": (
        {"weight": ((OUT, IN // 2), U8), "weight_scale": ((OUT, IN // 16), F8), "weight_scale_2": ((2,), F32)},
        _nvfp4,
        False,
    ),
    "block experts": (
        {"weight": ((EXPERTS, OUT, IN), F8), "weight_scale_inv": ((EXPERTS, 2, 4), F32)},
        _fp8,
        False,
    ),
    "tensor experts": ({"weight": ((EXPERTS, OUT, IN), F8), "weight_scale": ((EXPERTS, 2), F32)}, _fp8, False),
    "tensor experts, down": ({"weight": ((EXPERTS, OUT, IN), F8), "weight_scale": ((EXPERTS,), F32)}, _fp8, False),
    "channel experts": ({"weight": ((EXPERTS, OUT, IN), F8), "weight_scale": ((EXPERTS, OUT, 1), F32)}, _fp8, False),
    "gptq experts": (
        {"qweight": ((EXPERTS, IN // 8, OUT), I32), "scales": ((EXPERTS, 4, OUT), BF16)},
        _gptq,
        True,
    ),
    "nvfp4 experts": (
        {
            "weight": ((EXPERTS, OUT, IN // 2), U8),
            "weight_scale": ((EXPERTS, OUT, IN // 16), F8),
            "weight_scale_2": ((EXPERTS, 2), F32),
            "input_scale": ((EXPERTS, 2), F32),
        },
        _nvfp4,
        False,
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_format_s_weights_have_a_trained_model_s_size(kind: str) -> None:
    """Outputs of every linear layer and expert as large as inputs; the same in every process; another layer's are others."""
    shapes_of, dequantized, transposed = LAYERS[kind]
    prefix = ("w2_" if "down" in kind else "w13_") if "experts" in kind else ""
    tensors, again, other = (
        {prefix + leaf: torch.zeros(shape, dtype=dtype) for leaf, (shape, dtype) in shapes_of.items()} for _ in range(3)
    )
    for filled, name in ((tensors, "model.layers.0.x"), (again, "model.layers.0.x"), (other, "model.layers.1.x")):
        for leaf, tensor in filled.items():
            weights.fill(tensor, f"{name}.{leaf}", "RoutedExperts", 7, filled)
    for leaf, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), again[leaf].view(torch.uint8))
    assert any(
        not torch.equal(tensor.view(torch.uint8), other[leaf].view(torch.uint8)) for leaf, tensor in tensors.items()
    )
    weight = dequantized(tensors, prefix)
    assert bool(torch.isfinite(weight).all())
    for one in weight if "experts" in kind else [weight]:
        rows = one if transposed else one.T
        assert rows.shape == (IN, OUT)
        outputs = torch.randn(64, IN) @ rows
        assert 0.4 < float(outputs.std()) < 1.6
        assert abs(float(one.mean())) < 0.1 * float(one.std())
    for leaf in (leaf for leaf in tensors if leaf.endswith(("scale", "scales", "scale_inv", "scale_2"))):
        assert float(tensors[leaf].float().min()) > 0, "a scale below zero changes Marlin's values"
    for leaf in (leaf for leaf in tensors if leaf.endswith("input_scale")):
        values = (torch.randn(4096) * 4).clamp(-20, 20) / float(tensors[leaf].flatten()[0])
        assert float(values.abs().max()) < 448 and float(values.abs().median()) > 1


def test_cache_scales_and_what_has_no_weight_beside_it_stay_as_they_were() -> None:
    for leaf in ("k_scale", "_k_scale", "prob_scale", "logit_scale"):
        tensor = torch.full((), -1.0)
        weights.fill(tensor, f"model.layers.3.self_attn.attn.{leaf}", "Attention", 7, {})
        assert float(tensor) == 1.0
    assert weights.unit("scales", {"qweight": torch.zeros(8, 4, dtype=I32)}) == pytest.approx(
        1 / (4.18 * math.sqrt(64))
    )
    assert weights.unit("weight_scale", {}) == 1.0
