"""The patch. Its story is the docstring of `overlay.patches.dsa`."""

from __future__ import annotations

from typing import Any

from overlay.side_work.declaration import TwoLinears


def sizes_by_heads(layer: Any) -> dict[str, int]:
    """The columns of the two projections. Every tensor-parallel rank has all of them."""
    latent = layer.q_lora_rank + layer.kv_lora_rank + layer.qk_rope_head_dim
    return {"qkv_a": latent, "wk_weights": layer.indexer.head_dim + layer.indexer.n_head}


PROJECTIONS = TwoLinears(
    patch="dsa",
    main="fused_qkv_a_proj",
    side="indexer.wk_weights_proj",
    sizes_by_heads=sizes_by_heads,
    token_threshold=256,
    name="layer_name",
    calls_side=lambda layer: not layer.skip_topk,  # the drafter's layers skip the indexer in some steps
)
install = PROJECTIONS.install
