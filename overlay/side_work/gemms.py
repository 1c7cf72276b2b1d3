"""What the linears of a loaded model are by the rules of `overlay.side_work.rules`, and what a main linear is called in a plan."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.utils import dispatch_unquantized_gemm

from overlay.side_work import rules
from overlay.side_work.adoption import StaysStock

TORCH_GEMM = "default_unquantized_gemm"  #: vLLM's name for a plain torch.nn.functional.linear
CPU_GEMM = "cpu_unquantized_gemm"
PLAIN = (torch.bfloat16, torch.float16)  #: types of an input that a kernel for quantized weights alone reads
#: What a Marlin kernel that sets up a workspace for each layer mentions while it does so.
MARLIN_WORKSPACE = frozenset({"workspace", "marlin_make_workspace_new"})
#: The linears whose forward is known: the method's result, and nothing after it unless their settings say so.
LINEARS = (ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear)


def check_side(linear: Any) -> None:
    """Raise StaysStock, with the reason, where calling a linear may be more than its GEMM."""
    if has_adapters(linear):
        raise StaysStock(rules.ADAPTERS)
    if type(linear) not in LINEARS:
        raise StaysStock(f"the side is a {type(linear).__qualname__} of {type(linear).__module__}")
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        raise StaysStock("the side has a hook")
    if getattr(linear, "bias", None) is not None:
        raise StaysStock("the side has a bias")
    if not getattr(linear, "return_bias", True):
        raise StaysStock("the side gives its result alone, without a bias")
    if getattr(linear, "gather_output", False):
        raise StaysStock("the side gathers its output")


def gemm_of(linear: Any) -> str:
    """What the GEMM of a side linear is called, TORCH_GEMM for torch's own. Raises StaysStock for one that is not allowed."""
    method = linear.quant_method
    name = type(method).__name__
    if name == "UnquantizedLinearMethod":
        implementation = getattr(method, "_gemm_impl", None)
        if implementation is None:
            implementation = dispatch_unquantized_gemm()
        gemm = str(getattr(implementation, "__name__", type(implementation).__name__))
        if gemm in (TORCH_GEMM, CPU_GEMM):
            return gemm
        raise StaysStock(f"unquantized GEMM {gemm} has not been shown to be safe next to another one")
    kernel = _kernel(linear)
    detail = f" with {type(kernel).__name__}" if kernel is not None else ""
    if type(kernel).__name__ == "MarlinLinearKernel":
        mentioned = type(kernel).process_weights_after_loading.__code__.co_names
        if MARLIN_WORKSPACE.issubset(mentioned) or _marlin_locks_belong_to_a_stream():
            return f"{name}{detail}"
        raise StaysStock(f"{name}: its Marlin kernel shares one workspace between layers")
    raise StaysStock(rules.NOT_ALLOWED.format(f"{name}{detail}"))


def check_beside(main: Any) -> None:
    """Raise StaysStock where a main linear may quantize its input, and the side is not torch's GEMM."""
    reason = reason_beside(main)
    if reason is not None:
        raise StaysStock(reason)


def reason_beside(main: Any) -> str | None:
    """`rules.reason_against_main` for a linear: why it may have no side but torch's GEMM; None if it may have any."""
    kernel = _kernel(main)
    unquantized = type(main.quant_method).__name__ == "UnquantizedLinearMethod"
    weights_only = any(kind.__name__ == "MPLinearKernel" for kind in type(kernel).__mro__)
    reads_input = unquantized or (weights_only and kernel.config.act_type in PLAIN)
    gemm = rules.TORCH if unquantized else rules.OTHER
    return rules.reason_against_main(rules.Linear(main_kind(main), gemm, reads_input))


def has_adapters(linear: torch.nn.Module) -> bool:
    """Whether vLLM has put a LoRA layer in a linear's place."""
    return hasattr(linear, "base_layer")


def main_kind(linear: Any) -> str:
    """What main's method is called: scheme, method and kernel, as far as it has them. Anything is allowed."""
    parts = [type(linear.quant_method).__name__]
    scheme = getattr(linear, "scheme", None)
    parts += [type(part).__name__ for part in (scheme, _kernel(linear)) if part is not None]
    return " ".join(parts)


def gate_of(linear: torch.nn.Module) -> str:
    """The name of the largest parameter: the weight that main's GEMM reads. Raises StaysStock where there is none."""
    named = dict(linear.named_parameters(recurse=False))
    if not named:
        raise StaysStock(f"main is a {type(linear).__qualname__} without a parameter of its own")
    return str(max(named, key=lambda name: named[name].nbytes))


def _kernel(linear: Any) -> Any:
    for holder in (linear.quant_method, getattr(linear, "scheme", None)):
        for name in ("kernel", "fp8_linear", "w8a8_block_fp8_linear"):
            found = getattr(holder, name, None)
            if found is not None:
                return found
    return None


def _marlin_locks_belong_to_a_stream() -> bool:
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    return hasattr(marlin_utils, "get_marlin_workspace")
