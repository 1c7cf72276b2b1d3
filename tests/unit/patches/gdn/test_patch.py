"""What gdn declares of its two projections. What follows from a declaration: tests/unit/side_work/test_declaration.py."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from overlay.patches.gdn import patch as gdn
from overlay.side_work import declaration
from overlay.side_work.adoption import StaysStock
from tests.unit.linears import linear


def heads(key_heads: int, value_heads: int, size: int, tp: int, replicated: bool = False) -> Any:
    key_dim, value_dim = key_heads * size, value_heads * size
    return types.SimpleNamespace(
        key_dim=key_dim,
        value_dim=value_dim,
        num_v_heads=value_heads,
        tp_size=tp,
        disable_tp_for_ba_proj=replicated,
        in_proj_qkvz=linear(2 * (key_dim + value_dim) // tp),
        in_proj_ba=linear(2 * value_heads // (1 if replicated else tp)),
    )


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    key_heads=st.integers(1, 8),
    group=st.integers(1, 4),
    size=st.sampled_from([32, 64, 128]),
    replicated=st.booleans(),
)
def test_sizes_are_per_shard_and_agree_with_the_heads(
    tp: int, key_heads: int, group: int, size: int, replicated: bool
) -> None:
    layer = heads(key_heads * tp, key_heads * tp * group, size, tp, replicated)
    sizes = gdn.PROJECTIONS.sizes(layer)
    assert list(sizes) == ["qkvz", "ba"]
    assert sizes["qkvz"] == 2 * key_heads * size * (1 + group)
    assert sizes["ba"] == 2 * key_heads * group * (tp if replicated else 1)


@pytest.mark.parametrize("which", ["in_proj_qkvz", "in_proj_ba"])
def test_sizes_that_disagree_with_the_heads_name_both(which: str) -> None:
    layer = heads(16, 32, 128, 2)
    getattr(layer, which).output_size_per_partition *= 2
    with pytest.raises(ValueError, match=str(getattr(layer, which).output_size_per_partition)):
        gdn.PROJECTIONS.sizes(layer)


def test_a_repacked_weight_is_never_looked_at() -> None:
    layer = heads(16, 32, 128, 1)
    layer.in_proj_qkvz.weight = torch.empty(128, 24576, dtype=torch.int32)  # a Marlin layout
    assert gdn.PROJECTIONS.sizes(layer) == {"qkvz": 12288, "ba": 64}


def test_the_split_projections_of_lora_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declaration, "get_current_vllm_config", lambda: None)
    layer = heads(16, 32, 128, 2)
    gdn.check(layer)
    del layer.in_proj_qkvz
    with pytest.raises(StaysStock, match="split for LoRA"):
        gdn.PROJECTIONS.check_new(layer)
