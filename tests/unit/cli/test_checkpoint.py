"""``python -m overlay check --model``: what is said of a checkpoint by its configuration, and of everything that is none."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY, run_python
from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from typer.testing import CliRunner

from overlay.cli import checkpoint, quantization
from overlay.cli.app import app
from overlay.cli.bench import formats, shapes
from overlay.cli.failure import CommandError
from overlay.side_work import rules
from overlay.verdict import Verdict
from overlay.vocabulary import ABSENT, APPLY, LANDED, PATCH_NAMES

APPLIES = {name: Verdict(APPLY, "the shape is known") for name in PATCH_NAMES}
LAYERS = range(3)  # of the first four, the linear attention ones
PREFIX = "model.language_model.layers"
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def sources(module: str) -> str:
    """Of a vLLM that has every model, keeps ba whole, and compiles by ranges of tokens."""
    if module == quantization.EXLLAMA:
        return ""
    every = ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Qwen3NextForCausalLM", *OTHERS)
    return " ".join(f'"{name}"' for name in every) + checkpoint.WHOLE_SIDE + checkpoint.DSA_PACKAGE + checkpoint.RANGES


OTHERS = (
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "LlamaForCausalLM",
    "DeepseekV4ForCausalLM",
    "BertModel",
    "Qwen3_5ForCausalLM",
)
#: By name: a shape with the layers of one group.
BASE = {name: dict(shapes.find(name, 4).config) for name in shapes.SHAPES}


def named(*linears: str) -> list[str]:
    return [f"{PREFIX}.{index}.linear_attn.{name}" for index in LAYERS for name in linears]


def judged(
    folder: Path, content: object, shards: int = 1, lora: bool = False, verdicts: Mapping[str, Verdict] = APPLIES
) -> checkpoint.Checkpoint:
    (folder / "config.json").write_text(json.dumps(content))
    return checkpoint.judge(str(folder), verdicts, sources, shards, lora)


def gdn(found: checkpoint.Checkpoint) -> list[tuple[int, str, str]]:
    return [(one.layers, one.state, one.reason) for one in found.groups if one.patch == "gdn"]


def of_format(name: str, shape: str = "Qwen3.5-35B-A3B") -> dict[str, Any]:
    found = shapes.find(shape, 4).with_format(name).configuration["quantization_config"]
    return dict(found)


MARLIN = "; where vLLM takes Marlin for in_proj_ba; another kernel stays stock"
NOT_ALLOWED = "quantization method FP8 per tensor is not on the allowlist"
LLM_COMPRESSOR_FP4 = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {"targets": [r"re:.*in_proj_(qkv|z)$"], "weights": FP8, "input_activations": FP8},
        "group_1": {
            "targets": ["re:.*experts.*_proj$"],
            "weights": {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
            "input_activations": {"num_bits": 4, "type": "float"},
        },
    },
}
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [r"re:.*linear_attn\.in_proj_[ab]$", "re:.*lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
}
AUTOROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "data_type": "int",
    "group_size": 128,
    "packing_format": "auto_round:auto_gptq",
    "block_name_to_quantize": [PREFIX],
    "extra_config": {name: {"bits": 16, "data_type": "float"} for name in named("in_proj_b", "in_proj_a")},
}
#: Rows of ../shared/checkpoints.md, and of the formats that bench makes: quantization, name of the format, what is said.
CHECKPOINTS: dict[str, tuple[dict[str, Any] | None, str, str, str]] = {
    "unquantized": (None, "bf16", APPLY, "in_proj_ba is bf16 beside bf16"),
    "Qwen's own FP8": (
        of_format("fp8-block"), "fp8, blocks of 128 x 128", APPLY, "in_proj_ba is bf16 beside FP8 in blocks",
    ),
    "FP8 in both": (
        {**of_format("fp8-block"), "modules_to_not_convert": ["lm_head"]}, "fp8, blocks of 128 x 128", "stock",
        "in_proj_ba is FP8 in blocks beside FP8 in blocks: quantization method FP8 in blocks is not on the allowlist",
    ),
    "FP8 per tensor in both": (
        {"quant_method": "fp8", "activation_scheme": "static"}, "fp8, per tensor, static inputs", "stock",
        f"in_proj_ba is FP8 per tensor beside FP8 per tensor: {NOT_ALLOWED}",
    ),
    "ModelOpt FP8": (of_format("fp8-tensor"), "modelopt, FP8", APPLY, "in_proj_ba is bf16 beside FP8 per tensor"),
    "ModelOpt, of its own file": (
        {"producer": {"name": "modelopt"}, "quantization": {
            "quant_algo": "NVFP4", "exclude_modules": [f"{PREFIX}.*.linear_attn*", "lm_head"]}},
        "modelopt, NVFP4", APPLY, "in_proj_ba is bf16 beside bf16",
    ),
    "nvidia's NVFP4": (of_format("nvfp4"), "modelopt, mixed precision", APPLY, "in_proj_ba is bf16 beside FP8 per tensor"),
    "llm-compressor's NVFP4 example": (
        LLM_COMPRESSOR_FP4, "compressed-tensors, mixed-precision", APPLY, "in_proj_ba is bf16 beside FP8 per channel",
    ),
    "compressed-tensors FP8_DYNAMIC": (
        of_format("fp8-channel"), "compressed-tensors, float-quantized", APPLY, "in_proj_ba is bf16 beside FP8 per channel",
    ),
    "llm-compressor's W4A16": (W4A16, "compressed-tensors, pack-quantized", APPLY, "in_proj_ba is bf16 beside 4-bit"),
    "W4A16 in both": (
        {**W4A16, "ignore": []}, "compressed-tensors, pack-quantized", APPLY, f"in_proj_ba is 4-bit beside 4-bit{MARLIN}",
    ),
    "rotated": (
        {**W4A16, "transform_config": {"config_groups": {}, "x": 1}}, "compressed-tensors, rotated", "stock",
        "in_proj_ba is rotated beside rotated: quantization method rotated is not on the allowlist",
    ),
    "AutoRound": (AUTOROUND, "auto-round, 4 bits", APPLY, "in_proj_ba is bf16 beside 4-bit"),
    "AWQ": (
        {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["in_proj_b", "in_proj_a"]},
        "awq, 4 bits", APPLY, "in_proj_ba is bf16 beside 4-bit",
    ),
    "Qwen's GPTQ-Int4": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*attn.*": {}, "-:.*shared_expert.*": {}}},
        "gptq, 4 bits", APPLY, "in_proj_ba is bf16 beside bf16",
    ),
    "GPTQ experts": (of_format("w4-experts"), "gptq, 4 bits", APPLY, "in_proj_ba is bf16 beside bf16"),
    "GPTQ everywhere": (of_format("w4"), "gptq, 4 bits", APPLY, f"in_proj_ba is 4-bit beside 4-bit{MARLIN}"),
    "4-bit side, FP8 main": (
        {"quant_method": "compressed-tensors", "format": "mixed", "config_groups": {
            "a": {"targets": [r"re:.*in_proj_[ba]$"], "format": "pack-quantized", "weights": INT4},
            "b": {"targets": ["Linear"], "weights": FP8, "input_activations": FP8}}},
        "compressed-tensors, mixed", "stock", (
            "in_proj_ba is 4-bit beside FP8 per channel: "
            "FP8 per channel may quantize its input, and Inductor would round it otherwise than in stock"
        ),
    ),
    "MXFP4 experts": ({"quant_method": "mxfp4"}, "mxfp4, experts only", APPLY, "in_proj_ba is bf16 beside bf16"),
    "only a part": (
        {**of_format("fp8-block"), "modules_to_not_convert": named("in_proj_b")}, "fp8, blocks of 128 x 128", "stock",
        "vLLM does not load it: only some of in_proj_b, in_proj_a are quantized",
    ),
    "unknown": (
        {"quant_method": "quark"}, "unknown: quark", "unknown",
        "the format is unknown: quark: what vLLM makes of it decides, when it is served",
    ),
    "unknown ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "FP3"}, "unknown: modelopt FP3", "unknown",
        "the format is unknown: modelopt FP3: what vLLM makes of it decides, when it is served",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_by_its_quantization(name: str, tmp_path: Path) -> None:
    quantized, form, state, reason = CHECKPOINTS[name]
    content = BASE["Qwen3.5-35B-A3B"] | ({} if quantized is None else {"quantization_config": quantized})
    found = judged(tmp_path, content)
    assert found.format == form and gdn(found) == [(3, state, reason)]


@pytest.mark.parametrize("name", [form for form in formats.FORMATS if form != "w4-experts"])
def test_the_dense_one_and_next_are_read_as_well(name: str, tmp_path: Path) -> None:
    for shape in ("Qwen3.5-27B", "Qwen3-Next-80B-A3B"):
        (group,) = gdn(judged(tmp_path, dict(shapes.find(shape, 4).with_format(name).configuration)))
        wide = shape == "Qwen3.5-27B"
        assert group[:2] == (3, APPLY) and (f"hidden size above {rules.WIDEST_ROW}" in group[2]) == wide
        assert group[2].startswith(f"in_proj_ba is {'4-bit' if name == 'w4' else 'bf16'} beside ")


@pytest.mark.parametrize(
    ("top", "text", "said"),
    [
        ({"dtype": "bfloat16"}, {}, "bf16"),
        ({"dtype": "float16"}, {"dtype": "bfloat16"}, "fp16"),
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}, "fp16"),
        ({}, {"torch_dtype": "bfloat16"}, "bf16"),
        ({"vision_config": {"dtype": "float16"}}, {}, "fp16"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "16-bit"),
        ({"vision_config": 7}, {}, "unquantized"),
    ],
)
def test_the_type_is_read_where_vllm_reads_it(
    top: dict[str, Any], text: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = BASE["Qwen3.5-35B-A3B"]
    inner = {key: value for key, value in base["text_config"].items() if "dtype" not in key}
    outer = {key: value for key, value in base.items() if "dtype" not in key and key != "vision_config"}
    found = judged(tmp_path, {**outer, **top, "text_config": {**inner, **text}})
    assert gdn(found) == [(3, APPLY, f"in_proj_ba is {said} beside {said}")]


def test_layers_of_several_kinds_are_several_groups(tmp_path: Path) -> None:
    names = [name for name in named("in_proj_b", "in_proj_a") if ".1." not in name]
    quantized = {**of_format("fp8-block"), "modules_to_not_convert": names}
    found = gdn(judged(tmp_path, BASE["Qwen3.5-35B-A3B"] | {"quantization_config": quantized}))
    assert [(layers, state) for layers, state, _ in found] == [(2, APPLY), (1, "stock")]


def test_old_modelopt_checkpoints_have_a_file_of_their_own(tmp_path: Path) -> None:
    quantized = CHECKPOINTS["ModelOpt, of its own file"][0]
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantized))
    assert judged(tmp_path, BASE["Qwen3.5-35B-A3B"]).format == "modelopt, NVFP4"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_4_bit_without_a_list_is_read_from_the_index_of_its_weights(method: str, tmp_path: Path) -> None:
    content = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": {"quant_method": method, "bits": 4}}
    alone = judged(tmp_path, content)
    assert gdn(alone)[0][2].startswith("in_proj_ba is 4-bit") and "asks the weight files" in alone.notes[0]
    packed = [f"{name}.{part}" for name in named("in_proj_qkv", "in_proj_z") for part in ("qweight", "scales")]
    plain = [f"{name}.weight" for name in (*named("in_proj_a", "in_proj_b"), "x")]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(packed + plain)}))
    found = judged(tmp_path, content)
    assert gdn(found) == [(3, APPLY, "in_proj_ba is bf16 beside 4-bit")] and found.notes == ()


def test_awq_takes_the_owner_of_a_tensor_for_a_layer_that_is_not_quantized(tmp_path: Path) -> None:
    """As vLLM does: a part of a name is enough, and `linear_attn.A_log` makes one of all its linears."""
    content = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    names = [f"{name}.qweight" for name in named("in_proj_qkv", "in_proj_z")]
    names += [f"{PREFIX}.{index}.linear_attn.A_log" for index in LAYERS]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names)}))
    assert gdn(judged(tmp_path, content)) == [(3, APPLY, "in_proj_ba is bf16 beside bf16")]


def test_sizes_are_those_of_a_shard(tmp_path: Path) -> None:
    (group, *_) = judged(tmp_path, BASE["Qwen3.5-35B-A3B"], shards=2).groups
    assert dict(group.sizes) == {"hidden": 2048, "qkvz": 6144, "ba": 32}
    whole = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": of_format("w4")}
    assert dict(judged(tmp_path, whole, shards=2).groups[0].sizes)["ba"] == 64
    with pytest.raises(
        CommandError, match=r"--tp=3: the model's num_attention_heads is 16; allowed is a number that div"
    ):
        judged(tmp_path, BASE["Qwen3.5-35B-A3B"], shards=3)
    content = copy.deepcopy(BASE["Qwen3.5-35B-A3B"])
    content["text_config"]["linear_num_value_heads"] = 30
    with pytest.raises(CommandError, match="--tp=4: the model's linear_num_value_heads is 30"):
        judged(tmp_path, content, shards=4)
    content = copy.deepcopy(BASE["Qwen3.5-35B-A3B"])
    content["text_config"]["num_key_value_heads"] = 3
    with pytest.raises(CommandError, match="--tp=2: the model's num_key_value_heads is 3; allowed is a number that"):
        judged(tmp_path, content, shards=2)


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (["linear_attention", "full_attention"], "layer_types is a list of length 2; allowed is a list of 4 kinds"),
        (["foo"] * 4, "an entry of layer_types is 'foo'; allowed is full_attention or linear_attention"),
    ],
)
def test_wrong_kinds_of_layers_have_one_message(types: list[str], said: str, tmp_path: Path) -> None:
    content = copy.deepcopy(BASE["Qwen3.5-35B-A3B"])
    content["text_config"]["layer_types"] = types
    with pytest.raises(CommandError, match=said):
        judged(tmp_path, content)


def test_what_this_vllm_does_decides_first(tmp_path: Path) -> None:
    content = BASE["Qwen3.5-35B-A3B"]
    landed = {**APPLIES, "gdn": Verdict(LANDED, "upstream does it")}
    assert gdn(judged(tmp_path, content, verdicts=landed)) == [(3, "stock", "landed in this vLLM: upstream does it")]
    content = content | {"architectures": ["Qwen3_8MoeForConditionalGeneration"]}
    assert gdn(judged(tmp_path, content))[0][2] == "this vLLM has no Qwen3_8MoeForConditionalGeneration of its own"


def test_lora_takes_the_linears_and_leaves_the_projections_stock(tmp_path: Path) -> None:
    content = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": of_format("fp8-block")}
    found = judged(tmp_path, content, lora=True)
    assert gdn(found)[0][1:] == ("stock", f"{rules.ADAPTERS} (unless --lora-target-modules leaves both out)")
    quantized, plain = (group for group in found.groups if group.patch == "lora_linear")
    assert (quantized.state, quantized.reason) == (APPLY, "the base layer is FP8 in blocks")
    assert "self_attn.qkv_proj" in quantized.linears
    assert (plain.state, plain.linears, plain.layers) == (APPLY, ("linear_attn.in_proj_ba",), 3)
    told = [group.reason for group in judged(tmp_path, content).groups if group.patch == "lora_linear"]
    assert all(reason.startswith(checkpoint.WHEN_SERVED) for reason in told)


def test_before_vllm_compiles_by_ranges_a_base_layer_that_quantizes_stays_stock(tmp_path: Path) -> None:
    content = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": of_format("fp8-block")}
    (tmp_path / "config.json").write_text(json.dumps(content))

    def older(module: str) -> str:
        return sources(module).replace(checkpoint.RANGES, "")

    found = checkpoint.judge(str(tmp_path), APPLIES, older, 1, True)
    groups = [group for group in found.groups if group.patch == "lora_linear"]
    assert [group.state for group in groups] == ["stock", APPLY]
    assert "FP8 in blocks may quantize its input" in groups[0].reason


@pytest.mark.parametrize(
    ("quantized", "said"),
    [
        ({"quant_method": "awq", "w_bit": 8}, "w_bit is 8; allowed with awq is 4"),
        ({"quant_method": "awq", "bits": 8}, "bits is 8; allowed with awq is 4"),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, "sym is False; allowed with gptq is true"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; allowed with gptq is 4 or 8"),
    ],
)
def test_bits_that_vllm_refuses_are_bad_input(quantized: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": quantized}
    with pytest.raises(CommandError, match=f"quantization_config: {said}"):
        judged(tmp_path, content)
    if quantized["quant_method"] == "gptq":  # up to 0.21 it has a kernel of its own
        found = checkpoint.judge(str(tmp_path), APPLIES, lambda module: sources("") + module, 1, False)
        assert gdn(found)[0][1] == "unknown" and found.format == f"unknown: gptq, {said.partition(';')[0]}"


LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32}


def test_other_models(tmp_path: Path) -> None:
    found = judged(tmp_path, LLAMA)
    assert [(one.patch, one.layers, one.state) for one in found.groups] == [("lora_linear", 8, APPLY)]
    assert found.notes == ("no patch applies to LlamaForCausalLM but lora_linear, when served with --enable-lora",)
    off = {**APPLIES, "lora_linear": Verdict(ABSENT, "no LoRA")}
    assert "no patch applies to this checkpoint (LlamaForCausalLM, " in judged(tmp_path, LLAMA, verdicts=off).notes[0]

    bert = {"architectures": ["BertModel"]}
    (pooling,) = judged(tmp_path, bert).groups
    assert (pooling.patch, pooling.layers, pooling.state) == ("pooling", 1, APPLY) and "async" in pooling.reason
    assert judged(tmp_path, bert).modes == () and judged(tmp_path, LLAMA).modes == rules.MODES
    classifier = {"architectures": ["Qwen3ForSequenceClassification"]}  # vLLM has it as Qwen3ForCausalLM, with a pooler
    assert [(one.patch, one.state) for one in judged(tmp_path, classifier).groups] == [("pooling", APPLY)]
    off = {**APPLIES, "pooling": Verdict(LANDED, "upstream does it")}
    assert judged(tmp_path, classifier, verdicts=off).groups[0].reason == "landed in this vLLM: upstream does it"
    assert "no other patch applies" in judged(tmp_path, classifier, lora=True, verdicts=off).notes[1]
    assert "lora_linear: it is not judged for a pooling model" in judged(tmp_path, bert, lora=True).notes[0]
    assert judged(tmp_path, bert).notes == ()
    (tmp_path / "modules.json").write_text("[]")
    assert [one.patch for one in judged(tmp_path, LLAMA).groups] == ["pooling"]

    ratios = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 128, 4, 128, 4],
    }
    (tmp_path / "modules.json").unlink()
    groups = judged(tmp_path, ratios).groups
    assert "the journal of a server tells" in judged(tmp_path, ratios).notes[0]
    assert [(one.layers, one.state) for one in groups] == [(1, "stock"), (2, APPLY), (2, APPLY)]
    assert groups[0].reason == rules.NO_COMPRESSOR

    unknown = judged(tmp_path, LLAMA | {"quantization_config": {"quant_method": "quark"}})
    assert [one.state for one in unknown.groups] == ["unknown"] and unknown.notes == ()


FUSED = 'packed_modules_mapping = {"qkv_proj": ["q_proj"], "gate_up_proj": ["gate_proj"]}'


@pytest.mark.parametrize(
    ("module", "text", "fields", "is_known"),
    [
        ("x", FUSED, {}, True),
        ("vllm.models.x", FUSED, {}, True),
        ("x", "class X(LlamaForCausalLM): pass", {}, True),
        ("x", '{"qkv_proj": ["q_proj"]}', {"num_experts": 8}, True),  # of experts no linear is named
        ("x", '{"qkv_proj": ["q_proj"]}', {}, False),  # OPT
        ("x", '{"self_attn.qkv_proj": ["self_attn.q_proj"]}', {}, False),  # Whisper
        ("x", f"{FUSED}; self.mixer = Mixer()", {}, False),  # Nemotron-H
        ("x", "", {}, False),  # Mamba
        ("x", FUSED, {"kv_lora_rank": 512}, False),
    ],
)
def test_linears_are_named_only_where_the_models_source_names_them(
    module: str, text: str, fields: dict[str, Any], is_known: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    texts = {
        checkpoint.REGISTRY: f'"LlamaForCausalLM": ("{module}", "X"),',
        module if "." in module else f"{checkpoint.MODELS}.{module}": text,
    }
    found = checkpoint.judge(str(tmp_path), APPLIES, lambda name: texts.get(name, ""), 1, True)
    assert [one.state for one in found.groups] == [APPLY] * is_known
    assert any("names its linears is not known here" in note for note in found.notes) != is_known


#: DeepSeek-V3.2, as its `config.json` says it, with few layers.
V32 = {
    "architectures": ["DeepseekV32ForCausalLM"], "torch_dtype": "bfloat16", "num_hidden_layers": 6, "hidden_size": 7168,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_n_heads": 64,
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}  # fmt: skip


def dsa(found: checkpoint.Checkpoint) -> list[tuple[int, str, str]]:
    return [(one.layers, one.state, one.reason) for one in found.groups if one.patch == "dsa"]


def test_every_layer_of_deepseek_v32_has_an_indexer(tmp_path: Path) -> None:
    found = judged(tmp_path, V32)
    assert dsa(found) == [(6, APPLY, "wk_weights_proj is bf16 beside FP8 in blocks")] and found.modes == rules.MODES
    (group,) = (one for one in found.groups if one.patch == "dsa")
    assert dict(group.sizes) == {"hidden": 7168, "qkv_a": 2112, "wk_weights": 192}
    assert judged(tmp_path, V32, shards=8).groups == found.groups, "both are whole on every rank"


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, 6),
        ({"index_topk_freq": 4}, 3),  # 0 and 1, then 5: the offset is 2
        ({"index_topk_freq": 2, "index_skip_topk_offset": 0}, 3),
        ({"index_topk_pattern": "FSSFSS"}, 2),
        ({"index_topk_pattern": ["F", "S"]}, 5),  # what the pattern does not name has one
    ],
)
def test_layers_without_an_indexer_are_not_counted(fields: dict[str, Any], layers: int, tmp_path: Path) -> None:
    glm = {**V32, "architectures": ["GlmMoeDsaForCausalLM"], **fields}
    assert [count for count, _, _ in dsa(judged(tmp_path, glm))] == [layers]


def test_the_side_of_dsa_is_never_quantized_so_main_may_be_anything(tmp_path: Path) -> None:
    plain = {key: value for key, value in V32.items() if key != "quantization_config"}
    assert dsa(judged(tmp_path, plain)) == [(6, APPLY, "wk_weights_proj is bf16 beside bf16")]
    unknown = {**V32, "quantization_config": {"quant_method": "quark"}}
    ((_, state, reason),) = dsa(judged(tmp_path, unknown))
    assert state == APPLY and "beside a format that is unknown" in reason
    ((_, state, reason),) = dsa(judged(tmp_path, V32, lora=True))
    assert state == "stock" and reason.startswith(rules.ADAPTERS)
    one = {**V32["quantization_config"], "modules_to_not_convert": ["model.layers.2.self_attn.q_a_proj"]}  # type: ignore[dict-item]
    torn = [row for row in dsa(judged(tmp_path, {**V32, "quantization_config": one})) if row[1] == "stock"]
    assert [count for count, _, _ in torn] == [1] and "only some of q_a_proj, kv_a_proj_with_mqa" in torn[0][2]


def test_dsa_says_why_it_does_nothing_in_this_vllm(tmp_path: Path) -> None:
    absent = {**APPLIES, "dsa": Verdict(ABSENT, "another layer")}
    assert dsa(judged(tmp_path, V32, verdicts=absent)) == [(6, "stock", "absent in this vLLM: another layer")]
    (tmp_path / "config.json").write_text(json.dumps(V32))
    of_028 = checkpoint.judge(str(tmp_path), APPLIES, lambda _: '"DeepseekV32ForCausalLM"', 1, False)
    assert dsa(of_028) == [(6, "stock", "the shape is known")], "its table of models has another class under that name"


@pytest.mark.parametrize(
    ("field", "value"),
    [("index_topk_pattern", 7), ("index_topk_pattern", [1]), ("index_topk_freq", 0), ("index_n_heads", "64")],
)
def test_a_wrong_value_of_the_indexer_has_one_message(field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=f"{field} is .*; allowed is"):
        judged(tmp_path, {**V32, field: value})


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("BertModel", True), ("Qwen3ForSequenceClassification", True), ("InternLM2ForRewardModel", True),
        ("T5ForTextEncoding", True), ("LlamaForCausalLM", False), ("GPT2LMHeadModel", False), ("QWenChatModel", False),
    ],
)  # fmt: skip
def test_pooling_models_are_known_by_the_end_of_their_name(name: str, pools: bool) -> None:
    assert bool(checkpoint.POOLING.search(name)) == pools


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 6000 + b"}", "no JSON"),
        (b"[]", "holds a list and no object"),
        (b"null", "holds a NoneType"),
        (b"{}", "architectures is None; allowed is a list"),
        (b'{"architectures": [[]]}', "architectures is a list of length 1; allowed is a list"),
        (b'{"architectures": []}', "architectures is a list of length 0; allowed is a list"),
        (b'{"architectures": ["Qwen3_5ForCausalLM"]}', "hidden_size is None; allowed is a whole number"),
        (b'{"architectures": ["A"], "text_config": 7}', "text_config is 7; allowed is an object"),
        (
            b'{"architectures": ["A"], "quantization_config": "fp8"}',
            "quantization_config is 'fp8'; allowed is an object",
        ),
        (b'{"architectures": ["A"], "quantization_config": {}}', "no quant_method"),
        (b'{"architectures": ["A"], "num_hidden_layers": 1e9}', "num_hidden_layers is 1000000000.0; allowed is"),
        (b'{"architectures": ["A"], "num_hidden_layers": true}', "num_hidden_layers is True; allowed is"),
    ],
)
def test_what_is_no_configuration_has_one_message(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CommandError) as caught:
        checkpoint.judge(str(tmp_path), APPLIES, sources, 1, False)
    assert said in str(caught.value) and "\n" not in str(caught.value)


#: Any value that JSON has, and those that are nearly right.
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["re:(", "-:[", "fp8", "*", "Linear", "re:.*", "NVFP4", -1, 0, 4, 128, 1 << 70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(content: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in a configuration."""
    found = [path] if path else []
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        found += places(value, (*path, key))
    return found


HOSTILE = [
    BASE["Qwen3.5-35B-A3B"] | ({} if quantized is None else {"quantization_config": quantized})
    for quantized, *_ in CHECKPOINTS.values()
]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_wrong_value_anywhere_is_an_answer_or_one_message(data: st.DataObject, tmp_path: Path) -> None:
    content = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
    *path, last = data.draw(st.sampled_from(places(content)))
    holder: Any = content
    for key in path:
        holder = holder[key]
    if isinstance(holder, dict) and data.draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = data.draw(JUNK)
    shards, lora = data.draw(st.integers(1, 9)), data.draw(st.booleans())
    try:
        said = json.dumps(judged(tmp_path, content, shards, lora).as_dict())
    except CommandError as error:
        said = str(error)
    assert "\n" not in said and (said.startswith("{") or len(said) < 600)


@settings(deadline=None, max_examples=200)
@given(
    method=st.sampled_from(["fp8", "modelopt", "compressed-tensors", "awq", "gptq", "auto-round", "mxfp4", "x"]),
    rest=st.dictionaries(
        st.sampled_from(
            [
                "ignore",
                "bits",
                "w_bit",
                "modules_to_not_convert",
                "ignored_layers",
                "config_groups",
                "dynamic",
                "extra_config",
                "quant_algo",
                "format",
                "quantized_layers",
                "quantization",
                "weight_block_size",
                "block_name_to_quantize",
                "exclude_modules",
                "targets",
            ]
        ),
        JUNK,
    ),
)
def test_every_format_reads_anything_or_says_what_is_wrong(method: str, rest: dict[str, Any]) -> None:
    names = quantization.Names({}, checkpoint.GDN)
    try:
        found = quantization.find({"quant_method": method, **rest}, "bfloat16", names, None)
        said = found.read("model.layers.0.linear_attn.in_proj_ba").said
    except (quantization.Unusable, quantization.Unknown, quantization.Torn) as error:
        said = str(error)
    assert said


# ---------------------------------------------------------------- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.fixture
def tree(tmp_path: Path) -> str:
    registry = stub_vllm.FILES[stub_vllm.REGISTRY].replace("{", '{"Qwen3_5MoeForConditionalGeneration": ("a", "b"), ')
    stub_vllm.write(tmp_path / "tree", {stub_vllm.REGISTRY: registry}, transformers=None)
    return str(tmp_path / "tree")


def test_the_command_shows_both_the_vllm_and_the_checkpoint(tree: str, tmp_path: Path) -> None:
    content = BASE["Qwen3.5-35B-A3B"] | {"quantization_config": of_format("fp8-block")}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    found = json.loads(invoke("--vllm", tree, "--model", str(file), "--tp", "2", "--json").stdout)
    assert found["schema"] == 1 and found["patches"]["gdn"]["verdict"] == APPLY
    (group, *_) = found["model"]["groups"]
    assert found["model"]["format"] == "fp8, blocks of 128 x 128" and found["model"]["modes"] == list(rules.MODES)
    assert {key: group[key] for key in ("patch", "layers", "state")} == {"patch": "gdn", "layers": 3, "state": APPLY}
    assert "model" not in json.loads(invoke("--vllm", tree, "--json").stdout)
    shown = invoke("--vllm", tree, "--model", str(file))
    assert shown.exit_code == 0 and "in_proj_ba is bf16 beside FP8 in blocks" in shown.stdout
    assert rules.BATCH_INVARIANT in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/no/such"], "--model='/no/such' is no file; allowed are"),
        (["--model", "a\0b"], r"--model='a\x00b'"),
        (["--tp", "2"], "--tp, --lora and --measure go with --model"),
        (["--measure"], "--tp, --lora and --measure go with --model"),
        (["--lora"], "--tp, --lora and --measure go with --model"),
    ],
)
def test_wrong_options_are_one_message_and_status_2(arguments: list[str], said: str, tree: str) -> None:
    result = invoke("--vllm", tree, *arguments)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and result.stdout == "" and said in line


def test_a_pipe_is_no_configuration_and_is_not_waited_for(tree: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert "is a folder without config.json" in invoke("--vllm", tree, "--model", str(tmp_path)).stderr


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = "import sys, overlay.cli.check; print([name for name in ('torch', 'vllm') if name in sys.modules])"
    assert run_python("-c", code, environment={**os.environ, "PYTHONPATH": str(REPOSITORY)}).stdout.strip() == "[]"
