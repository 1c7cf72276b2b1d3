"""What of the DeepSeek-V4 evidence (benchmarks/gpu/deepseek.py) can be tested without a GPU."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import deepseek, deepseek_model
from overlay.cli.bench import report
from overlay.cli.bench.outside.bench_engine import weights
from tests.conftest import REPOSITORY


def test_the_layers_have_all_three_kinds_in_the_released_order() -> None:
    content = deepseek_model.configuration(6)
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
    weights.fill(tensor, name, owner, 7)
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


def delta(tmp_path: Path) -> tuple[Path, Path]:
    """A site with vLLM, and a tar with one file of the next release."""
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "a.py").write_text("old")
    (site / "vllm" / "b.py").write_text("same")
    (tmp_path / "a.py").write_text("new")
    with tarfile.open(tmp_path / "delta.tar", "w") as tar:
        tar.add(tmp_path / "a.py", "vllm/a.py")
    return site, tmp_path / "delta.tar"


def test_the_next_release_is_a_copy_and_leaves_the_first_alone(tmp_path: Path) -> None:
    site, files = delta(tmp_path)
    path = deepseek.next_site(site, files, tmp_path / "next")
    first, second = map(Path, path.split(":"))
    assert ((first / "vllm/a.py").read_text(), (first / "vllm/b.py").read_text()) == ("new", "same")
    assert second == site and (site / "vllm/a.py").read_text() == "old"


def test_the_arms_share_what_is_compiled_and_nothing_else(tmp_path: Path) -> None:
    site, files = delta(tmp_path)
    words = ["run", "--site", str(site), "--next-files", str(files), "--out", str(tmp_path), "--work", str(tmp_path)]
    setup = deepseek.setup_of(deepseek.parse([*words, "--env", "A=1"]))
    assert setup.arms == ("stock", "overlay", "next")
    stock, overlay, later = (setup.environment(arm, "run") for arm in setup.arms)
    for name in (*deepseek.CACHES, "TRITON_CACHE_DIR"):
        assert stock[name] == overlay[name] == later[name]
    assert len({arm["VLLM_CACHE_ROOT"] for arm in (stock, overlay, later)}) == 3
    assert stock["PYTHONPATH"] == str(site) and overlay["PYTHONPATH"] == f"{REPOSITORY}:{site}"
    assert later["PYTHONPATH"] == f"{tmp_path / 'next-site'}:{site}"
    assert stock["A"] == overlay["A"] == later["A"] == "1"
    assert not [name for arm in (stock, later) for name in arm if name.startswith("VLLMOVERLAY")]


def test_the_next_release_needs_a_folder_to_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deepseek.parse(["run", "--out", str(tmp_path), "--next-files", "delta.tar"])
    assert "--next-files needs --site" in capsys.readouterr().err


def test_the_gemms_alone_have_a_table() -> None:
    row = {"tokens": 8, "serial": 30.0, "stock": 20.0, "overlay": 15.0, "different": {"overlay": 0}}
    shown = io.StringIO()
    for item in deepseek.tables({"micro": {"ratio 4": [row]}}):
        report.wide_console(shown).print(item)
    assert "ratio 4" in shown.getvalue() and "0.750" in shown.getvalue() and "ratio 128" not in shown.getvalue()


def test_engine_arguments_are_what_vllm_knows() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    assert set(deepseek_model.ENGINE) <= set(arg_utils.EngineArgs.__dataclass_fields__)
