"""Tiny models with the real architectures, made on the spot: random weights, a trained tokenizer, nothing fetched.

    python -m devtools.tiny_models FOLDER [NAME …]

The weights are large (standard deviation 0.2) on purpose. With vLLM's own dummy weights every token is the same one, and
a patch that computes nonsense would not show. Three layers out of four are GDN layers, as in the real models, and every
size is the smallest that the CPU engine's GDN kernel takes (heads of 128).
"""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

# In a shell this would otherwise be the one process of the demo that runs with whatever overlay is on PYTHONPATH.
os.environ.setdefault("VLLMOVERLAY", "0")

SEED = 20260
VOCABULARY = 512
SPECIAL_TOKENS = ("<|pad|>", "<|eos|>", "<|bos|>", "<|unk|>")
PAD, EOS, BOS = VOCABULARY - 4, VOCABULARY - 3, VOCABULARY - 2
WEIGHT_DEVIATION = 0.2
LORA_RANK = 8

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

# A few hundred distinct words are enough to train the merges of a byte-level tokenizer; it can write any other text in bytes.
TRAINING_TEXT = textwrap.dedent(
    """\
    A stream is a queue of work for a device. Work on one stream runs in the order in which it was given; work on two
    streams may run at the same time when the device has room for both. A small matrix multiplication leaves most of a
    large device idle, so a second one beside it costs little. An event marks a place in a stream, and another stream can
    wait for it: that is the fork, and the same thing backwards is the join.
    The user asks a question and the assistant answers it. The system says how. Hello world, this is a test of the server:
    what is the answer, how many layers are there, and which of them were changed? One, two, three, four, five, six, seven.
    Once upon a time there was a model with four layers that had learned nothing at all, and it said so in many words.
    The quick brown fox jumps over the lazy dog; the five boxing wizards jump quickly; pack my box with a dozen jugs.
    """
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": WEIGHT_DEVIATION,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "use_cache": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

_GDN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
}

_QWEN3_NEXT: dict[str, Any] = {
    **_COMMON,
    **_GDN,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "partial_rotary_factor": 0.25,
    # Top-level too: vLLM releases before 0.24 read it from here.
    "rope_theta": 10000.0,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

_QWEN3_5_TEXT: dict[str, Any] = {
    **_COMMON,
    **_GDN,
    "model_type": "qwen3_5_text",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "qwen3": {**_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_next_dense": {**_QWEN3_NEXT, "num_experts": 0},
    "qwen3_5_text": {**_QWEN3_5_TEXT, "architectures": ["Qwen3_5ForCausalLM"]},
    # What is published and served under this name: the text model inside a model that also sees.
    "qwen3_5": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": False,
        "image_token_id": 500,
        "video_token_id": 501,
        "vision_start_token_id": 502,
        "vision_end_token_id": 503,
        "text_config": _QWEN3_5_TEXT,
        "vision_config": {
            "model_type": "qwen3_5",
            "depth": 1,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [],
            "hidden_act": "gelu_pytorch_tanh",
        },
    },
}

# Without this `vllm serve` wants the image processor's files, which only a real checkpoint has.
SERVE_ARGUMENTS: dict[str, tuple[str, ...]] = {"qwen3_5": ("--limit-mm-per-prompt", '{"image": 0, "video": 0}')}


def text_configuration(name: str) -> dict[str, Any]:
    """The language model's part of a configuration."""
    configuration = CONFIGURATIONS[name]
    part: dict[str, Any] = configuration.get("text_config", configuration)
    return part


def gdn_layers(name: str) -> int:
    """How many layers the GDN patch has to reach in this model."""
    return sum(kind == "linear_attention" for kind in text_configuration(name).get("layer_types", ()))


def serve_arguments(name: str) -> tuple[str, ...]:
    """What `vllm serve` needs for this model beside its folder."""
    return SERVE_ARGUMENTS.get(name, ())


def build(name: str, folder: Path) -> Path:
    """Make one model; a finished one of the same recipe is left as it is. Returns the model's own folder."""
    target = folder / name
    mark = target / "made-from.json"
    recipe = json.dumps([SEED, TRAINING_TEXT, CHAT_TEMPLATE, CONFIGURATIONS[name]])
    if mark.exists() and mark.read_text(encoding="utf-8") == recipe:
        return target
    target.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(target)
    configuration = json.dumps(CONFIGURATIONS[name], indent=1)
    (target / "config.json").write_text(configuration, encoding="utf-8")
    _write_weights(name, target)
    # save_pretrained has replaced it by transformers' own view, which drops what vLLM reads.
    (target / "config.json").write_text(configuration, encoding="utf-8")
    mark.write_text(recipe, encoding="utf-8")
    return target


def _write_tokenizer(target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    # Special tokens last, so that their numbers are the ones in the configurations.
    assert tokenizer.get_vocab_size() == PAD, "the training text is too short for the vocabulary"
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(target / "tokenizer.json"))
    pad, eos, bos, unknown = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "eos_token": eos,
        "bos_token": bos,
        "unk_token": unknown,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _write_weights(name: str, target: Path) -> None:
    import torch
    import transformers

    configuration = transformers.AutoConfig.from_pretrained(target)
    for part in (configuration, *(getattr(configuration, key, None) for key in ("text_config", "vision_config"))):
        if part is not None:
            part.initializer_range = WEIGHT_DEVIATION
    torch.manual_seed(SEED)
    automatic = transformers.AutoModelForCausalLM
    if "text_config" in CONFIGURATIONS[name]:
        automatic = transformers.AutoModelForImageTextToText
    model = automatic.from_config(configuration, dtype=torch.bfloat16)
    model.save_pretrained(target)


def build_lora(name: str, folder: Path, rank: int = LORA_RANK) -> Path:
    """Make a LoRA adapter for a dense model: the GDN projections of Qwen3.5, or attention and MLP of Qwen3.

    Adapters of different ranks have different weights. Returns the adapter's own folder.
    """
    from benchmarks.gpu import linears, lora_model

    target = folder / (f"{name}-lora" if rank == LORA_RANK else f"{name}-lora-{rank}")
    every = linears.of_model(text_configuration(name))
    targets = [linear for linear in every if _LORA_TARGETS[name] in linear.name]
    lora_model.save_adapter(target, name, targets, rank, True, SEED)
    return target


#: Of each model that adapters are made for, a part of the names of their linears.
_LORA_TARGETS = {"qwen3": "_proj", "qwen3_5_text": ".linear_attn."}


def main() -> None:
    """`python -m devtools.tiny_models FOLDER [NAME …]`; NAME-lora, or NAME-lora-RANK, makes an adapter for that model."""
    import typer

    def make(folder: Path, names: list[str] = typer.Argument(None)) -> None:  # noqa: B008 - typer's way
        for name in names or [*CONFIGURATIONS, *(f"{base}-lora" for base in _LORA_TARGETS)]:
            base, lora, rank = name.partition("-lora")
            if base not in (_LORA_TARGETS if lora else CONFIGURATIONS):
                raise typer.BadParameter(f"no model {name!r}; there are {', '.join(CONFIGURATIONS)}")
            made = build_lora(base, folder, int(rank.lstrip("-") or LORA_RANK)) if lora else build(base, folder)
            print(made, flush=True)

    typer.run(make)


if __name__ == "__main__":
    main()
