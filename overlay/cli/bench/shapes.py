"""Models to measure with: named layer shapes, somebody's `config.json`, or a checkpoint.

A named shape is a configuration in the sizes of a published model, with as many layers as wanted. It has no weights on
disk: bench_engine/weights.py fills them in place, of a trained model's size and the same in every process, so that
experts are chosen and tokens differ. Sources of the sizes: `config.json` of Qwen/Qwen3.5-35B-A3B, Qwen/Qwen3.5-27B (64
layers, hidden 5120, MLP 17408, 24 attention heads and 4 for keys of 256) and Qwen/Qwen3-Next-80B-A3B-Instruct (48 layers,
512 experts of 512, 10 chosen) on the Hugging Face hub; field names: transformers' configuration classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overlay.cli import checkpoint
from overlay.cli.bench import formats
from overlay.cli.checkpoint import EXPERT_COUNTS
from overlay.cli.failure import CommandError

#: Layer shape of Qwen3.5-35B-A3B, without its experts.
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
#: Over TEXT: what a CPU can run.
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
#: Qwen3-Next keeps its rope settings in other fields; vLLM before 0.24 reads them at the top level.
NEXT_ROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
}
_27B: dict[str, Any] = {
    **TEXT,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "linear_num_value_heads": 48,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
}
_NEXT_80B: dict[str, Any] = {
    **TEXT,
    **MIXTURE,
    **NEXT_ROPE,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "intermediate_size": 5120,
    "vocab_size": 151936,
    "eos_token_id": 151645,
}

#: Name: architecture, text configuration, number of layers of the published model.
SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen3.5-35B-A3B": ("qwen3_5_moe", {**TEXT, **MIXTURE}, 40),
    "Qwen3.5-27B": ("qwen3_5", _27B, 64),
    "Qwen3-Next-80B-A3B": ("qwen3_next", _NEXT_80B, 48),
    "tiny": ("qwen3_5", {**TEXT, **TINY, "intermediate_size": 128}, 4),
}
#: A folder with one of these is a checkpoint; without, its config.json is a shape.
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
DEFAULT_SHAPE = "Qwen3.5-35B-A3B"
#: Where there is no GPU: larger shapes take hours there to say nothing about speed.
CPU_SHAPE = "tiny"
#: The sizes that memory.py counts by: those of every model, of latent attention and of linear attention, and those that may be missing.
SIZES = ("vocab_size", "hidden_size")
LATENT_SIZES = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
LINEAR_SIZES = (
    "linear_num_key_heads",
    "linear_key_head_dim",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
OPTIONAL_SIZES = (
    *EXPERT_COUNTS,
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "head_dim",
    "num_key_value_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "index_n_heads",
    "index_head_dim",
    "full_attention_interval",
    "max_position_embeddings",
)


def layer_types(layers: int) -> list[str]:
    """Full attention every fourth layer, gated delta net everywhere else."""
    return ["full_attention" if (index + 1) % 4 == 0 else "linear_attention" for index in range(layers)]


def configuration(architecture: str, text: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The content of `config.json`.

    `qwen3_5` and `qwen3_5_moe` are the published models' own architectures (the vision part is switched off by
    `language_model_only`), `…_text` the text-only classes, which vLLM registers from 0.27 on, `qwen3_next` has the
    interleaved layout of the projections.
    """
    text = {**text, "num_hidden_layers": layers, "layer_types": layer_types(layers)}
    if architecture == "qwen3_next":
        return {**text, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    kind = architecture.removesuffix("_text")
    stem = {"qwen3_5_moe": "Qwen3_5Moe", "qwen3_5": "Qwen3_5"}[kind]
    text["model_type"] = f"{kind}_text"
    if architecture.endswith("_text"):
        return {**text, "architectures": [f"{stem}ForCausalLM"]}
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
    }


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write `config.json` into `folder` and give the folder back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    return folder


@dataclass(frozen=True)
class Model:
    """What is measured. `checkpoint` is the folder of one that has its own weights and tokenizer."""

    name: str
    config: Mapping[str, Any]
    checkpoint: Path | None = None
    #: Of formats.FORMATS: the quantization that `configuration` adds to `config`.
    format: str = formats.DEFAULT

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The content of `config.json`, with what the format says of its weights."""
        make = formats.FORMATS[self.format].configuration
        return {**self.config, "quantization_config": make(self._layers())} if make else self.config

    def _layers(self) -> formats.Layers:
        text = self.text
        return formats.Layers(
            prefix="model.language_model.layers" if self.config.get("text_config") else "model.layers",
            kinds=tuple(text.get("layer_types") or ["full_attention"] * self.layers),
            mixture=self.mixture,
            shared=bool(text.get("shared_expert_intermediate_size")),
            fused=text.get("model_type") == "qwen3_next",
        )

    @property
    def mixture(self) -> bool:
        """Whether it has routed experts."""
        return any(self.text.get(field) for field in EXPERT_COUNTS)

    @property
    def format_name(self) -> str:
        """What results call it: the format asked for, or what the configuration says of itself."""
        own = self.config.get("quantization_config")
        return str(own.get("quant_method")) if own else self.format

    def with_format(self, name: str) -> Model:
        """The same shape with the weights of another kind of checkpoint. Raises CommandError where they do not go together."""
        if name not in formats.FORMATS:
            raise CommandError(f"--format={name!r}: allowed are {', '.join(formats.FORMATS)}")
        if name == self.format:
            return self
        reason = formats.reason_against(name, self.text, self.mixture)
        if self.checkpoint is not None or "quantization_config" in self.config:
            reason = "its weights have a format of their own"
        if reason:
            raise CommandError(f"--format={name} does not go with {self.name}: {reason}")
        return replace(self, format=name)

    @property
    def text(self) -> Mapping[str, Any]:
        """The language model's part of the configuration."""
        part: Mapping[str, Any] = self.config.get("text_config") or self.config
        return part

    @property
    def layers(self) -> int:
        return int(self.text["num_hidden_layers"])

    @property
    def also_sees(self) -> bool:
        return "vision_config" in self.config

    @property
    def pattern(self) -> int:
        """The number of layers after which their kinds repeat."""
        types = self.text.get("layer_types")
        if not types:
            return int(self.text.get("full_attention_interval") or 1)
        return next(
            step
            for step in range(1, len(types) + 1)
            if all(kind == types[index % step] for index, kind in enumerate(types))
        )

    def linear_layers(self) -> int:
        """How many layers have linear attention."""
        types = self.text.get("layer_types")
        if types:
            return sum(kind == "linear_attention" for kind in types)
        interval = self.text.get("full_attention_interval")
        return self.layers - self.layers // int(interval) if interval else 0

    def with_layers(self, layers: int) -> Model:
        """The same layer shapes, that many times. Whole repetitions of the pattern only."""
        if self.checkpoint is not None:
            raise CommandError(
                f"--layers={layers} goes with a named shape or a config.json; {self.checkpoint} has its own weights"
            )
        pattern = self.pattern
        if layers < 1 or layers % pattern:
            raise CommandError(
                f"--layers={layers}: the layers of {self.name} repeat every {pattern}; allowed are {pattern} and multiples of it"
            )
        text = {**self.text, "num_hidden_layers": layers}
        if text.get("layer_types"):
            text["layer_types"] = [text["layer_types"][index % pattern] for index in range(layers)]
        if self.config.get("text_config"):
            return replace(self, config={**self.config, "text_config": text})
        return replace(self, config=text)

    def folder(self, work: Path) -> Path:
        """What vLLM takes as its model: the checkpoint, or a folder made in `work` with a configuration."""
        name = f"{self.name}-{self.layers}-layers" + (f"-{self.format}" if self.format != formats.DEFAULT else "")
        return self.checkpoint or write(work / "models" / name, self.configuration)

    def tokenizer(self, work: Path) -> Path:
        """What servers and their clients take as tokenizer: the checkpoint's, or one made in `work`.

        That is in a folder of its own: beside the model's configuration, transformers would read it as that model's own kind.
        """
        return self.checkpoint or write_tokenizer(work / "models", int(self.text["vocab_size"]))


def find(text: str, layers: int | None) -> Model:
    """A model by what was given: the name of a shape, a configuration file, or the folder of a checkpoint.

    Raises CommandError where it is none of these, and where `layers` does not go with it.
    """
    if text in SHAPES:
        architecture, shape, published = SHAPES[text]
        model = Model(text, configuration(architecture, shape, published))
    else:
        model = _local(Path(text))
    return model if layers is None else model.with_layers(layers)


def _local(path: Path) -> Model:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CommandError(
            f"--model={str(path)!r} is neither a named shape ({', '.join(SHAPES)}) nor a config.json nor a checkpoint's folder"
        )
    config = checkpoint.read(str(path))
    model = Model(file.resolve().parent.name, config.content)
    _check(config, model)
    has_weights = path.is_dir() and any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES)
    return replace(model, checkpoint=path.resolve()) if has_weights else model


def _check(config: checkpoint.Configuration, model: Model) -> None:
    """Raise CommandError for a value that memory.py cannot count with, or that is missing."""
    config.kinds()  # the layers, too
    _ = config.quantization
    for key in OPTIONAL_SIZES:
        config.size_or(key, 0, least=0)
    for key in _needed(model):
        config.size(key)
    config.size("num_attention_heads", most=config.size("hidden_size"))


def _needed(model: Model) -> list[str]:
    """The sizes that this model has to have."""
    text = model.text
    found = [*SIZES, "moe_intermediate_size" if model.mixture else "intermediate_size"]
    if text.get("kv_lora_rank"):
        found += LATENT_SIZES
    if model.linear_layers() or "linear_num_value_heads" in text:
        found += LINEAR_SIZES
    if text.get("first_k_dense_replace"):
        found.append("intermediate_size")
    return found


def write_tokenizer(parent: Path, vocabulary: int) -> Path:
    """The folder of a tokenizer for which every token is a word, `w0` to `w<vocabulary - 1>`: any prompt of n words has n tokens.

    `vllm bench serve` makes random prompts through the tokenizer and counts on getting them back unchanged.
    """
    words = {f"w{number}": number for number in range(vocabulary)}
    last = f"w{vocabulary - 1}"
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary - 1,
                "content": last,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": last},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 20,
        "eos_token": last,
        "unk_token": last,
        "clean_up_tokenization_spaces": False,
    }
    # vLLM looks for a configuration beside a tokenizer, and waits two seconds before it looks again. "vit" is a kind of model without a
    # tokenizer of its own; a configuration without a version gets a warning of transformers.
    beside = {"model_type": "vit", "transformers_version": "4.57.0"}
    folder = write(parent / f"tokenizer-{vocabulary}", beside)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder
