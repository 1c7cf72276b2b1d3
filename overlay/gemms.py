"""Which linears may run next to another one.

Two quantized GEMMs at once can share scratch memory, so this is an allowlist: unquantized through torch's own GEMM, and
Marlin kernels that make a workspace of their own (from vLLM 0.31.0 on all Marlin layers share one).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.utils import dispatch_unquantized_gemm

from overlay.layers import Refused

TORCH_GEMM = "default_unquantized_gemm"  #: vLLM's name for a plain torch.nn.functional.linear
#: What a Marlin kernel that sets up its own workspace mentions while it does so.
MARLIN_WORKSPACE = frozenset({"workspace", "marlin_make_workspace_new"})


def gemm_of(projection: torch.nn.Module) -> str:
    """The name of a linear's GEMM if it may run next to another one, else raise Refused."""
    method = projection.quant_method
    name = type(method).__name__
    kernel: Any = getattr(method, "kernel", None) or getattr(getattr(projection, "scheme", None), "kernel", None)
    if name == "UnquantizedLinearMethod":
        implementation = getattr(method, "_gemm_impl", None)
        if implementation is None:
            implementation = dispatch_unquantized_gemm()
        gemm = getattr(implementation, "__name__", type(implementation).__name__)
        if gemm in (TORCH_GEMM, "cpu_unquantized_gemm"):
            return gemm
        raise Refused(f"unquantized GEMM {gemm} has not been shown to be safe next to another one")
    if type(kernel).__name__ == "MarlinLinearKernel":
        if MARLIN_WORKSPACE.issubset(type(kernel).process_weights_after_loading.__code__.co_names):
            return f"{name} with {type(kernel).__name__}"
        raise Refused(f"{name}: its Marlin kernel shares one workspace between layers")
    detail = f" with {type(kernel).__name__}" if kernel is not None else ""
    raise Refused(f"quantization method {name}{detail} is not on the allowlist")


def is_plain(projection: torch.nn.Module) -> bool:
    """Whether calling a linear is torch's own GEMM of its weight and nothing else."""
    return (
        gemm_of(projection) == TORCH_GEMM
        and getattr(projection, "bias", None) is None
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
    )
