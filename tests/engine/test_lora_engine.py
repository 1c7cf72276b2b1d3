"""LoRA in a real vLLM on the CPU: adapters come and go, and the tokens are those of stock.

There is no auxiliary stream on a CPU. With the serial pass-through everything else is there: the hook on a package, the
layers that are taken, upstream's own methods with the stand-ins. vLLM compiles nothing on a CPU when LoRA is on, so all runs are
eager; that the ops are traced into one graph, and in which order, is test_lora_linear_patch's matter.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from devtools import tiny_models
from tests.engine.conftest import FEW_PROCESSES, PASS_THROUGH, Run, run_engine

pytestmark = pytest.mark.engine

MODELS = ("qwen3", "qwen3_5_text")
RANKS = (tiny_models.LORA_RANK, 16)

Both = Callable[[str], tuple[Run, Run]]


@pytest.fixture(scope="module")
def both(model: Callable[[str], pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Stock and overlay, each once per model: an engine in which adapters come and go."""
    runs: dict[str, tuple[Run, Run]] = {}

    def get(name: str) -> tuple[Run, Run]:
        if name not in runs:
            adapters = [model(f"{name}-lora"), model(f"{name}-lora-{RANKS[1]}")]
            stock, overlay = (
                run_engine(
                    model(name),
                    tmp_path_factory.mktemp("lora"),
                    overlay=side,
                    adapters=adapters,
                    **(PASS_THROUGH if side else {}),
                    **FEW_PROCESSES,
                )
                for side in (False, True)
            )
            runs[name] = (stock, overlay)
        return runs[name]

    return get


def lora_record(run: Run) -> dict[str, object]:
    (worker,) = run.workers
    record: dict[str, object] = worker.raw["patches"]["lora_linear"]
    return record


@pytest.mark.parametrize("name", MODELS)
def test_adapters_come_and_go_with_stocks_tokens(both: Both, name: str) -> None:
    stock, overlay = both(name)
    assert overlay.answers == stock.answers
    answers = stock.answers
    assert answers["base"] != answers["first"] != answers["second"] != answers["base"]
    assert answers["removed"] == answers["base"] and answers["again"] == answers["second"]
    # One batch of a base request and one for each adapter; a batch of another make-up may round differently.
    assert [tokens[0] for tokens in answers["mixed"]] == [
        answers[name][prompt][0] for prompt, name in enumerate(("base", "first", "second"))
    ]


def test_every_linear_of_qwen3_is_taken(both: Both) -> None:
    _, overlay = both("qwen3")
    record = lora_record(overlay)
    assert record["verdict"] == "apply"
    layers = record["layers"]
    assert isinstance(layers, dict)
    text = tiny_models.text_configuration("qwen3")
    query, key = (text[heads] * text["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    expected = {
        "qkv_proj": (query + 2 * key, 3, "MergedQKVParallelLinearWithLoRA"),
        "o_proj": (text["hidden_size"], 1, "RowParallelLinearWithLoRA"),
        "gate_up_proj": (2 * text["intermediate_size"], 2, "MergedColumnParallelLinearWithLoRA"),
        "down_proj": (text["hidden_size"], 1, "RowParallelLinearWithLoRA"),
    }
    assert len(layers["patched"]) == len(expected) * text["num_hidden_layers"]
    for layer_name, shown in layers["patched"].items():
        output, slices, class_name = expected[layer_name.rpartition(".")[2]]
        assert shown == {"output": output, "slices": slices, "class": class_name}
    assert layers["refused"] == {}
    calls = record["calls"]
    assert isinstance(calls, dict)
    assert calls["dual_stream"] == 0
    assert calls["serial"]["serial pass-through"] % len(layers["patched"]) == 0, "some layers went another way"


def test_gdn_leaves_layers_with_adapters_to_lora(both: Both) -> None:
    _, overlay = both("qwen3_5_text")
    (worker,) = overlay.workers
    patches = worker.raw["patches"]
    assert patches["gdn"]["layers"]["patched"] == {} and patches["gdn"]["calls"]["serial"] == {}
    reasons = list(patches["gdn"]["layers"]["refused"].values())
    assert reasons == ["LoRA on the projections"] * tiny_models.gdn_layers("qwen3_5_text")
    taken = {name.rpartition(".")[2] for name in patches["lora_linear"]["layers"]["patched"]}
    assert {"in_proj_qkvz", "in_proj_ba", "out_proj"} <= taken
    assert sum(patches["lora_linear"]["calls"]["serial"].values()) > 0


def test_the_overlay_warns_of_nothing(both: Both) -> None:
    for name in MODELS:
        _, overlay = both(name)
        assert "lora_linear: apply, " in overlay.log
        assert [line for line in overlay.log.splitlines() if "WARNING" in line and "overlay" in line.lower()] == []
        assert not [problem for journal in overlay.journals for problem in journal.problems]
