"""Custom ops: how a patch puts work that runs on several streams into a graph that Dynamo traces.

An op takes the name of its layer, as vLLM's own opaque type where there is one: a name as ``str`` makes every layer a
compile artifact of its own (vLLM #38152 took the first dual-stream op back for that).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.utils import torch_utils

LIBRARY = "vllm_overlay"

# vLLM 0.20.0 and later with torch 2.11 and later; before that a plain str.
LayerNameType = getattr(torch_utils, "LayerNameType", str)
encode_layer_name = getattr(torch_utils, "_encode_layer_name", str)
resolve_layer_name = getattr(torch_utils, "_resolve_layer_name", str)

_libraries: list[torch.library.Library] = []  # an op lives as long as its library object


def register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    schema: dict[str, Any],
    tags: tuple[torch.Tag, ...] = (),
) -> Any:
    """Define ``vllm_overlay::<name>`` for the platform's device, and give it; it mutates nothing.

    `schema` has the type of each argument in order, and of ``return``. The types are real ones, from which torch makes the
    op's schema; annotations in a file are text.
    """
    implementation.__annotations__ = schema
    library = torch.library.Library(LIBRARY, "FRAGMENT")
    torch_utils.direct_register_custom_op(
        name, implementation, mutates_args=[], fake_impl=fake, target_lib=library, tags=tags
    )
    _libraries.append(library)
    return getattr(getattr(torch.ops, LIBRARY), name)
