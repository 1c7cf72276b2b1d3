"""devtools.tiny_models: the configurations are what the tests and the demo take them for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devtools import tiny_models


def test_the_gdn_models_have_three_gdn_layers_and_the_dense_one_none() -> None:
    found = {name: tiny_models.gdn_layers(name) for name in tiny_models.CONFIGURATIONS}
    assert found == {"qwen3": 0, "qwen3_next": 3, "qwen3_next_dense": 3, "qwen3_5_text": 3, "qwen3_5": 3}


def test_only_the_seeing_model_needs_arguments() -> None:
    assert tiny_models.serve_arguments("qwen3_next") == ()
    option, value = tiny_models.serve_arguments("qwen3_5")
    assert option == "--limit-mm-per-prompt"
    assert json.loads(value) == {"image": 0, "video": 0}


def test_a_model_is_made_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="no engine in this environment")
    pytest.importorskip("torch")
    first = tiny_models.build("qwen3", tmp_path)
    weights = first / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert tiny_models.build("qwen3", tmp_path) == first
    assert weights.stat().st_mtime_ns == made
    assert json.loads((first / "config.json").read_text()) == tiny_models.CONFIGURATIONS["qwen3"]

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
    encoded = tokenizer.encode("Hello world, how many layers? ÄÖ 漢")
    assert tokenizer.decode(encoded.ids) == "Hello world, how many layers? ÄÖ 漢"
    assert tokenizer.token_to_id("<|eos|>") == tiny_models.EOS
    assert tokenizer.get_vocab_size() == tiny_models.VOCABULARY
