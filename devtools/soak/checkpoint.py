"""A checkpoint on disk in the layer shape of a Qwen3.5: names as published, random weights that matter, a drafter (MTP), adapters.

    python -m devtools.soak.checkpoint FOLDER [--shape tiny] [--layers 4] [--format fp8-block] [--rank 16] …

`bench` fills weights in place and needs no such files. A soak needs them: it has vLLM load the weights again while it runs. Block
FP8 has the tensors of Qwen/Qwen3.5-35B-A3B-FP8: a weight in e4m3, and a scale for 128 x 128 of its values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.gpu import linears, lora_model
from overlay.cli.bench import formats, shapes
from overlay.cli.failure import CommandError

#: Of the weights that are served, and of those that are loaded now and then.
SEEDS = (1, 2)
BLOCK_FP8 = "fp8-block"
#: Names and shapes.
Tensors: TypeAlias = list[tuple[str, tuple[int, ...]]]
#: Of a linear layer that block FP8 quantizes, by the end of its name.
QUANTIZED = (
    *(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "out")),
    "in_proj_qkv",
    "in_proj_z",
)


@dataclass(frozen=True)
class Recipe:
    """What is made: a shape of `bench` that is a Qwen3.5, and so many of its layers."""

    shape: str = "tiny"
    layers: int = 4
    format: str = formats.DEFAULT

    def configuration(self) -> dict[str, Any]:
        """The content of `config.json`. Raises CommandError where this cannot be made."""
        if self.format not in (formats.DEFAULT, BLOCK_FP8):
            raise CommandError(f"--format={self.format!r}: allowed are {formats.DEFAULT}, {BLOCK_FP8}")
        model = shapes.find(self.shape, self.layers).with_format(self.format)
        content = copy.deepcopy(dict(model.configuration))
        if "text_config" not in content:
            raise CommandError(f"--shape={self.shape!r} is no Qwen3.5: its names are others")
        content["text_config"]["mtp_num_hidden_layers"] = 1
        if self.format == BLOCK_FP8:
            gates = (f"mtp.layers.0.mlp.{name}" for name in ("gate", "shared_expert_gate"))
            content["quantization_config"]["modules_to_not_convert"] += ["mtp.fc", *gates]
        return content


def tensors(text: dict[str, Any]) -> Iterator[Tensors]:
    """Names and shapes of all weights before they are quantized, file by file. `text` is a text configuration."""
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    outer = "model.language_model"
    yield [
        (f"{outer}.embed_tokens.weight", (vocabulary, hidden)),
        (f"{outer}.norm.weight", (hidden,)),
        ("lm_head.weight", (vocabulary, hidden)),
    ]
    for number, kind in enumerate(text["layer_types"]):
        yield _layer(f"{outer}.layers.{number}", kind, text)
    yield [
        ("mtp.fc.weight", (hidden, 2 * hidden)),
        *((f"mtp.{name}.weight", (hidden,)) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")),
        *_layer("mtp.layers.0", "full_attention", text),
    ]


def _layer(prefix: str, kind: str, text: dict[str, Any]) -> Tensors:
    inner = linears.of_layer(text, kind)
    norms = ("input_layernorm", "post_attention_layernorm")
    found: Tensors = [(f"{prefix}.{name}.weight", (text["hidden_size"],)) for name in norms]
    found += [(f"{prefix}.{one.name}.weight", (one.outputs, one.inputs)) for one in inner]
    if kind == "linear_attention":
        heads, channels = text["linear_num_value_heads"], inner[0].outputs  # the convolution follows in_proj_qkv
        own: dict[str, tuple[int, ...]] = {
            "conv1d.weight": (channels, 1, text["linear_conv_kernel_dim"]),
            "A_log": (heads,),
            "dt_bias": (heads,),
            "norm.weight": (text["linear_value_head_dim"],),
        }
        return found + [(f"{prefix}.linear_attn.{name}", shape) for name, shape in own.items()]
    return found + [(f"{prefix}.self_attn.{name}_norm.weight", (text["head_dim"],)) for name in "qk"]


def write(folder: Path, recipe: Recipe, seed: int = SEEDS[0]) -> Path:
    """Write the checkpoint and its tokenizer into `folder`. One that is there is left as it is."""
    import torch
    from safetensors.torch import save_file

    content = recipe.configuration()
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = content["text_config"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, names in enumerate(tensors(text)):
        made: dict[str, Any] = {}
        for name, shape in names:
            quantized = recipe.format == BLOCK_FP8 and name.split(".")[-2] in QUANTIZED
            made |= _filled(name, shape, quantized, device, seed)
        save_file(made, str(folder / f"model-{number:05d}.safetensors"))
    shapes.write_tokenizer(tokenizer_of(folder, recipe).parent, int(text["vocab_size"]))
    shapes.write(folder, content)  # last: it says that all is there
    return folder


def _filled(name: str, shape: tuple[int, ...], quantized: bool, device: str, seed: int) -> dict[str, Any]:
    """One weight, and its scales where it has some."""
    import torch

    from overlay.cli.bench.outside.bench_engine import weights

    # Norms of the layers add 1 to their weight. That of linear attention does not.
    gemma = "norm" in name and "linear_attn" not in name
    tensor = torch.empty(shape, dtype=torch.float8_e4m3fn if quantized else torch.bfloat16, device=device)
    owner = "GemmaNorm" if gemma else "Embedding" if "embed_tokens" in name else "Linear"
    weights.fill(tensor, name, owner, seed)
    made = {name: tensor.cpu()}
    if quantized:
        scale = torch.empty([-(-size // 128) for size in shape], dtype=torch.bfloat16, device=device)
        weights.fill(scale, f"{name}_scale_inv", owner, seed, {"weight": tensor, "weight_scale_inv": scale})
        made[f"{name}_scale_inv"] = scale.cpu()
    return made


def tokenizer_of(folder: Path, recipe: Recipe) -> Path:
    """Where the tokenizer of a checkpoint is. Beside a configuration, transformers would read it as that model's own kind."""
    return folder / f"tokenizer-{recipe.configuration()['text_config']['vocab_size']}"


def adapter_of(folder: Path, recipe: Recipe, rank: int) -> Path:
    """Where an adapter of a checkpoint is."""
    return lora_model.adapter_folder(folder / "adapters", recipe.configuration(), rank, False, SEEDS[0])


def main() -> None:
    """The command line."""
    import typer

    def make(
        folder: Path,
        shape: str = typer.Option("tiny", help="tiny, Qwen3.5-35B-A3B or Qwen3.5-27B"),
        layers: int = typer.Option(4, help="multiples of 4"),
        format: str = typer.Option(formats.DEFAULT, help=f"{formats.DEFAULT} or {BLOCK_FP8}"),
        seed: int = typer.Option(SEEDS[0], help="of the weights"),
        rank: list[int] = typer.Option([], help="an adapter of this rank as well, in FOLDER/adapters"),  # noqa: B008 - typer's way
    ) -> None:
        recipe = Recipe(shape, layers, format)
        try:
            write(folder, recipe, seed)
        except CommandError as error:
            raise typer.BadParameter(str(error)) from None
        for one in rank:
            lora_model.write_adapter(folder / "adapters", recipe.configuration(), one, False, SEEDS[0])

    typer.run(make)


if __name__ == "__main__":
    main()
