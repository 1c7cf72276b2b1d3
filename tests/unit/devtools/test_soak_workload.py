"""What a soak serves: checkpoints in a published model's names, and the servers' arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devtools.soak import workload
from devtools.soak.checkpoint import BLOCK_FP8, QUANTIZED, SEEDS, Recipe, adapter_of, tensors, tokenizer_of, write
from devtools.soak.workload import Workload
from overlay.cli.bench import shapes
from overlay.cli.failure import CommandError
from tests.conftest import REPOSITORY

MIXTURE = Recipe("Qwen3.5-35B-A3B", 4, BLOCK_FP8)


def names_of(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    return {name: shape for file in tensors(recipe.configuration()["text_config"]) for name, shape in file}


def test_what_is_not_quantized_is_named_as_such() -> None:
    """vLLM takes a layer for a quantized one unless the configuration names it."""
    left_alone = MIXTURE.configuration()["quantization_config"]["modules_to_not_convert"]
    linears = {
        name.removesuffix(".weight")
        for name, shape in names_of(MIXTURE).items()
        if len(shape) == 2 and "embed_tokens" not in name
    }
    assert linears - set(left_alone) == {name for name in linears if name.rpartition(".")[2] in QUANTIZED}


@pytest.mark.parametrize("shape", ["tiny", "Qwen3.5-35B-A3B", "Qwen3.5-27B"])
def test_the_drafter_is_one_attention_layer_more(shape: str) -> None:
    recipe = Recipe(shape, 4)
    text, names = recipe.configuration()["text_config"], names_of(recipe)
    assert text["mtp_num_hidden_layers"] == 1
    drafter = {name.removeprefix("mtp.layers.0.") for name in names if name.startswith("mtp.layers")}
    last = "model.language_model.layers.3."  # the last layer of each repetition has attention
    assert drafter == {name.removeprefix(last) for name in names if name.startswith(last)}
    assert names["mtp.fc.weight"] == (text["hidden_size"], 2 * text["hidden_size"])


def test_a_recipe_leaves_the_shapes_as_they_are() -> None:
    before = json.dumps(shapes.find(MIXTURE.shape, 4).with_format(BLOCK_FP8).configuration)
    MIXTURE.configuration()
    assert json.dumps(shapes.find(MIXTURE.shape, 4).with_format(BLOCK_FP8).configuration) == before


def test_block_fp8_does_not_go_with_narrow_layers() -> None:
    with pytest.raises(CommandError, match="multiple of 128"):
        Recipe("tiny", 4, BLOCK_FP8).configuration()


def small(folder: Path) -> str:
    """The configuration of a mixture of experts that block FP8 goes with."""
    text = {**shapes.TEXT, **shapes.MIXTURE, **shapes.TINY, "hidden_size": 128, "num_experts": 2}
    narrow = {**text, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    return str(shapes.write(folder, shapes.configuration("qwen3_5_moe", narrow, 4)) / "config.json")


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_checkpoint_has_every_weight_and_a_scale_for_each_block(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="no engine in this environment")
    recipe = Recipe(small(tmp_path / "shape"), 4, BLOCK_FP8)
    found = read(write(tmp_path / "first", recipe))
    expected = names_of(recipe)
    assert {name: tuple(tensor.shape) for name, tensor in found.items() if not name.endswith("_scale_inv")} == expected
    scales = {name.removesuffix("_scale_inv"): tensor for name, tensor in found.items() if name.endswith("_scale_inv")}
    assert set(scales) == {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    for name, scale in scales.items():
        assert tuple(scale.shape) == tuple(-(-size // 128) for size in expected[name])
        large = (found[name].float() * scale.float().mean()).std() * expected[name][1] ** 0.5
        assert 0.5 < large < 2, f"{name}: outputs are not as large as inputs"
    other = read(write(tmp_path / "second", recipe, SEEDS[1]))
    assert not [name for name in expected if torch.equal(other[name].float(), found[name].float())]


def test_a_finished_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="no engine in this environment")
    folder = write(tmp_path / "model", Recipe())
    assert (tokenizer_of(folder, Recipe()) / "tokenizer.json").exists()
    file = folder / "model-00000.safetensors"
    made = file.stat().st_mtime_ns
    assert write(folder, Recipe()) == folder and file.stat().st_mtime_ns == made


def test_servers_get_adapters_only_where_there_are_some(tmp_path: Path) -> None:
    some, none = Workload(Recipe(), tmp_path), Workload(Recipe(), tmp_path, ())
    assert some.patches == ("gdn", "lora_linear") and none.patches == ("gdn",)
    arguments = some.arguments(on_gpu=False)
    for rank in workload.RANKS:
        assert f"rank-{rank}={adapter_of(some.model, some.recipe, rank)}" in arguments
    assert not [argument for argument in none.arguments(on_gpu=False) if "lora" in argument]


@pytest.mark.parametrize("shape", ["tiny", "Qwen3.5-35B-A3B"])
def test_the_longest_prompt_takes_several_steps(shape: str, tmp_path: Path) -> None:
    served = Workload(Recipe(shape), tmp_path)
    arguments = served.arguments(on_gpu=True)
    step = int(arguments[arguments.index("--max-num-batched-tokens") + 1])
    assert min(served.prompt_lengths) < step < max(served.prompt_lengths)
    assert "--enable-sleep-mode" in arguments and "--enable-sleep-mode" not in served.arguments(on_gpu=False)


def test_two_kinds_of_weights_are_two_checkpoints_of_one_recipe(tmp_path: Path) -> None:
    for shape in ("tiny", "/some/config.json"):
        served = Workload(Recipe(shape), tmp_path)
        assert served.model != served.other and served.model.parent == served.other.parent == tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["devtools.soak.checkpoint", "x", "--format", "w4"], "allowed are bf16, fp8-block"),
        (["devtools.soak.checkpoint", "x", "--shape", "Qwen9"], "Qwen9"),
        (["devtools.soak", "--interfere", "sleep,dream"], "'dream'"),
        (["devtools.soak", "--ranks", "8,x"], "'8,x'"),
        (["devtools.soak", "--env", "NAME"], "'NAME'"),
        (["devtools.soak", "--shape", "Qwen9"], "Qwen9"),
        (["devtools.soak", "--shape", "Qwen3-Next-80B-A3B"], "is no Qwen3.5"),
        (["devtools.soak", "--format", "fp8-block"], "multiple of 128"),
    ],
)
def test_bad_input_is_said_before_anything_starts(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr and not (REPOSITORY / "x").exists()
