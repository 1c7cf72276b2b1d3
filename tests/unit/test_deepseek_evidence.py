"""What of the DeepSeek-V4 evidence (benchmarks/gpu/deepseek.py) can be tested without a GPU."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import deepseek, deepseek_model

from overlay.cli.bench.results import Results


def test_the_layers_have_all_three_kinds_in_the_released_order(tmp_path: Path) -> None:
    content = json.loads((deepseek_model.write(tmp_path, 6) / "config.json").read_text())
    assert content["num_hidden_layers"] == 6
    assert content["compress_ratios"] == [0, 0, 4, 128, 4, 128, 0], "the last one is the MTP layer's"
    assert deepseek_model.compress_ratios(43)[-2:] == [128, 4]
    assert deepseek_model.compress_ratios(1) == [0]


def test_the_kv_score_columns_are_those_of_the_released_modules() -> None:
    """vLLM: twice the head's size for kv and score, twice that again where windows overlap, which ratio 4 does."""
    head, index_head = deepseek_model.FLASH["head_dim"], deepseek_model.FLASH["index_head_dim"]
    assert {4: 4 * head, 128: 2 * head} == deepseek_model.KV_SCORE
    assert 4 * index_head == deepseek_model.INDEXER_KV_SCORE


def filled(name: str, tensor: torch.Tensor, owner: str = "Linear") -> torch.Tensor:
    deepseek_model.fill(tensor, name, owner, 7)
    return tensor


def test_power_of_two_scales_bring_a_sum_to_the_size_of_its_inputs() -> None:
    weight = filled("a.weight", torch.empty(256, 4096).to(torch.float8_e4m3fn)).float()
    scale = filled("a.weight_scale_inv", torch.empty(2, 32, dtype=torch.uint8).view(torch.float8_e8m0fnu)).float()
    assert scale.unique().numel() == 1 and torch.frexp(scale)[0].unique().tolist() == [0.5]
    result = torch.randn(8, 4096) @ (weight * scale[0, 0]).t()
    assert 0.5 < result.std() < 2


def test_experts_have_random_bits_and_finite_scales() -> None:
    weight = filled("e.w13_weight", torch.zeros(4, 64, 64, dtype=torch.uint8))
    assert weight.unique().numel() > 200
    scale = filled("e.w13_weight_scale", torch.zeros(4, 64, 4, dtype=torch.uint8))
    assert scale.unique().numel() == 1 and 110 < int(scale.flatten()[0]) < 127, "255 would be no number"


def test_the_routing_table_stays_within_the_experts() -> None:
    table = filled("m.gate.tid2eid", torch.zeros(500, 6, dtype=torch.int32))
    assert int(table.min()) >= 0 and int(table.max()) < 256 and table.unique().numel() > 200


def test_equal_names_get_equal_bits() -> None:
    first, second = (filled("x.weight", torch.empty(16, 32, dtype=torch.bfloat16)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, filled("y.weight", torch.empty(16, 32, dtype=torch.bfloat16)))


def test_the_next_release_is_a_copy_and_leaves_the_first_alone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "a.py").write_text("old")
    (site / "vllm" / "b.py").write_text("same")
    (tmp_path / "a.py").write_text("new")
    files = tmp_path / "delta.tar"
    with tarfile.open(files, "w") as tar:
        tar.add(tmp_path / "a.py", "vllm/a.py")
    path = deepseek.next_site(site, files, tmp_path / "next")
    first, second = map(Path, path.split(":"))
    assert ((first / "vllm/a.py").read_text(), (first / "vllm/b.py").read_text()) == ("new", "same")
    assert second == site and (site / "vllm/a.py").read_text() == "old"


def test_the_sides_share_what_is_compiled_and_nothing_else(tmp_path: Path) -> None:
    options = deepseek.parse(["run", "--site", "/site", "--out", str(tmp_path), "--env", "A=1"])
    setups = {side: deepseek.Setup(tmp_path, tmp_path, "/site", 10.0, layers=6) for side in ("stock", "overlay")}
    engines = deepseek.Engines(setups, Results(tmp_path / "r.json"), {"A": "1"}, options)
    stock, overlay = engines.environment("stock", "run"), engines.environment("overlay", "run")
    for name in deepseek.CACHES:
        assert stock[name] == overlay[name]
    assert stock["VLLM_CACHE_ROOT"] != overlay["VLLM_CACHE_ROOT"]
    assert stock["PYTHONPATH"] == "/site" and overlay["PYTHONPATH"] == f"{REPOSITORY}:/site"
    assert stock["A"] == overlay["A"] == "1"
    assert not [name for name in stock if name.startswith("VLLMOVERLAY")]


def test_a_row_has_medians_and_ratios_to_stock() -> None:
    (row,) = deepseek.rows_of({4: {"stock": [0.002] * 5, "overlay": [0.001] * 5, "next": [0.002] * 5}})
    assert (row["stock ms"], row["overlay ms"]) == (2.0, 1.0)
    assert row["overlay to stock"]["ratio"] == pytest.approx(0.5)
    assert row["next to stock"]["ratio"] == pytest.approx(1.0)


def test_engine_arguments_are_what_vllm_knows() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    known = set(arg_utils.EngineArgs.__dataclass_fields__)
    arguments: dict[str, Any] = deepseek_model.engine(Path("/m"), (1, 2), mtp=True, tensor_parallel=2)
    assert set(arguments) <= known
