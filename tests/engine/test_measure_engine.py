"""``check --measure`` without a GPU: its process builds vLLM's own linears from a checkpoint's configuration. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from overlay.cli import checkpoint, measured
from overlay.cli.bench import shapes
from overlay.cli.bench.workers import Worker, WorkerError
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY, PATCH_NAMES
from tests.engine.conftest import RUN_SECONDS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_measure.py measures where there is a GPU"),
]
NAME = "language_model.model.layers.{}.linear_attn"
#: GPTQ everywhere but in layer 0, and in the side of layer 1.
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
    "modules_in_block_to_quantize": ["linear_attn.in_proj"],
    "dynamic": {r"-:.*layers\.0\..*": {}, r"-:.*layers\.1\.linear_attn\.in_proj_ba": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    """A configuration under another name than config.json, so a folder has to be made for vLLM."""
    file = tmp_path_factory.mktemp("model") / "tiny.json"
    file.write_text(json.dumps({**shapes.find("tiny", 4).config, "quantization_config": GPTQ}))
    applies = {name: Verdict(APPLY, "the shape is known") for name in PATCH_NAMES}
    return checkpoint.judge(str(file), applies, lambda _: '"Qwen3_5ForConditionalGeneration"', 2, lora=False)


@pytest.fixture(scope="module")
def worker(found: checkpoint.Checkpoint) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with measured.opened(found) as (opened, machine):
            assert machine == {"device": None, "bytes_per_second": None}
            yield opened


def built(worker: Worker, layer: int, **changes: Any) -> dict[str, Any]:
    shape = {"hidden": 64, "main": (128, 128, 256, 256), "side": (2, 2), **changes}
    answer: dict[str, Any] = worker.call("measure", RUN_SECONDS, patch="gdn", layers=[NAME.format(layer)], **shape)
    return answer


def test_check_asks_for_the_layers_that_vllm_has(found: checkpoint.Checkpoint) -> None:
    groups = [group.shape for group in found.groups if group.shape is not None]
    assert {name for shape in groups for name in shape.layers} >= {NAME.format(0), NAME.format(1)}
    assert {(shape.hidden, shape.main, shape.side) for shape in groups} == {(64, (128, 128, 256, 256), (2, 2))}


@pytest.mark.parametrize(
    ("layer", "main"), [(0, "UnquantizedLinearMethod"), (1, "AutoGPTQLinearMethod CPUWNA16LinearKernel")]
)
def test_a_pair_is_what_the_configuration_says_of_its_layer(worker: Worker, layer: int, main: str) -> None:
    found = built(worker, layer)
    assert found["pair"] == f"64 to 768 ({main}) + 4 (cpu_unquantized_gemm), torch.bfloat16"
    assert found["rows"] == []  # a CPU captures nothing


def test_what_vllms_own_linears_forbid_is_said(worker: Worker) -> None:
    reason = "quantization method AutoGPTQLinearMethod with CPUWNA16LinearKernel is not on the allowlist"
    assert built(worker, 2, side=(32, 32)) == {"stock": reason}


def test_a_failure_inside_vllm_is_one_answer(worker: Worker) -> None:
    """Groups of 32 inputs do not fit into 48. The process goes on."""
    with pytest.raises(WorkerError, match=r"^vLLM: measure: \w+: "):
        built(worker, 1, hidden=48)
    assert built(worker, 0)["rows"] == []
