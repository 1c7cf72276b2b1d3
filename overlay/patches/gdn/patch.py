"""The patch. Its story is the docstring of `overlay.patches.gdn`."""

from __future__ import annotations

from typing import Any

from overlay.side_work.adoption import StaysStock
from overlay.side_work.declaration import TwoLinears
from overlay.side_work.rules import SPLIT_FOR_LORA

#: One projection in the place of the two (vLLM #42746, #41457).
FUSED = ("in_proj_qkvzba", "in_proj")


def sizes_by_heads(layer: Any) -> dict[str, int]:
    """The columns of the two projections per tensor-parallel shard. vLLM 0.22 and later may keep ba whole on every rank."""
    shards = layer.tp_size
    ba_shards = 1 if getattr(layer, "disable_tp_for_ba_proj", False) else shards
    return {"qkvz": 2 * (layer.key_dim + layer.value_dim) // shards, "ba": 2 * layer.num_v_heads // ba_shards}


def check(layer: Any) -> None:
    """Raise StaysStock where vLLM has made other projections: split ones in 0.19 and 0.20, or one for both."""
    if getattr(layer, "in_proj_qkvz", None) is None:
        fused = next((name for name in FUSED if getattr(layer, name, None) is not None), None)
        raise StaysStock(f"upstream computes both in one GEMM, {fused}" if fused else SPLIT_FOR_LORA)


PROJECTIONS = TwoLinears(
    patch="gdn",
    main="in_proj_qkvz",
    side="in_proj_ba",
    sizes_by_heads=sizes_by_heads,
    token_threshold=256,  # from an H200 (overlay.side_work.plan has the table); 512 already loses
    check=check,
)
install = PROJECTIONS.install
