"""The linear layers of a Qwen3 or a Qwen3.5, by their names in a checkpoint: what a made checkpoint holds and what adapters target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Linear(NamedTuple):
    """A linear layer: its name in a checkpoint, input and output features."""

    name: str
    inputs: int
    outputs: int


def of_layer(text: dict[str, Any], kind: str) -> list[Linear]:
    """Those of one layer, names from the layer on. `text` is a text configuration, `kind` a value of its `layer_types`."""
    hidden = text["hidden_size"]
    if kind == "linear_attention":
        heads = text["linear_num_value_heads"]
        value = heads * text["linear_value_head_dim"]
        query_and_key = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"]
        inner = {"in_proj_qkv": query_and_key + value, "in_proj_z": value, "in_proj_b": heads, "in_proj_a": heads}
        found = [Linear(f"linear_attn.{name}", hidden, size) for name, size in inner.items()]
        found.append(Linear("linear_attn.out_proj", value, hidden))
    else:
        query, key = (text[name] * text["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
        gated = 2 * query if text.get("attn_output_gate") else query
        inner = {"q_proj": gated, "k_proj": key, "v_proj": key}
        found = [Linear(f"self_attn.{name}", hidden, size) for name, size in inner.items()]
        found.append(Linear("self_attn.o_proj", query, hidden))
    experts = text.get("num_experts")
    if not experts:
        return found + _mlp("mlp", hidden, text["intermediate_size"])
    found += [Linear("mlp.gate", hidden, experts), Linear("mlp.shared_expert_gate", hidden, 1)]
    found += _mlp("mlp.shared_expert", hidden, text["shared_expert_intermediate_size"])
    for number in range(experts):
        found += _mlp(f"mlp.experts.{number}", hidden, text["moe_intermediate_size"])
    return found


def _mlp(prefix: str, hidden: int, between: int) -> list[Linear]:
    wide = [Linear(f"{prefix}.{name}_proj", hidden, between) for name in ("gate", "up")]
    return [*wide, Linear(f"{prefix}.down_proj", between, hidden)]


def of_model(config: dict[str, Any]) -> Iterator[Linear]:
    """Those of all layers of a model, by its `config.json`. The drafter's are not among them."""
    text = config.get("text_config", config)
    outer = "model.language_model.layers" if "text_config" in config else "model.layers"
    for layer, kind in enumerate(text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"]):
        for name, *features in of_layer(text, kind):
            yield Linear(f"{outer}.{layer}.{name}", *features)
