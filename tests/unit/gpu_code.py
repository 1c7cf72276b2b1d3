"""The Triton code that Inductor makes for an H200, on a machine that has neither a GPU nor Triton.

Nothing of it is run or compiled. It shows what the code for a CPU cannot: Inductor fuses otherwise for a GPU, and there a kernel
keeps values that the graph rounds to bf16.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._inductor import config, scheduler
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton

#: What torch says of an H200.
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=140 << 30,
    L2_cache_size=60 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)
#: As vLLM sets them; and no times are taken where there is no GPU.
SETTINGS = {
    "enable_auto_functionalized_v2": False,
    "fx_graph_cache": False,
    "compile_threads": 1,
    "combo_kernels": True,
}


class CodeIsMade(Exception):
    """Ends a compilation: its code is all that is wanted."""


@contextlib.contextmanager
def an_h200() -> Iterator[None]:
    """torch with a GPU that it can ask and not use."""
    replaced: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "_lazy_init": lambda: None,
            "_exchange_device": lambda *_: 0,
            "_maybe_exchange_device": lambda *_: 0,
            "set_device": lambda *_: None,
            "synchronize": lambda *_: None,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_, **__: None,
            "get_device_capability": lambda *_: (H200.major, H200.minor),
            "get_device_properties": lambda *_: H200,
            "_get_device_properties": lambda *_: H200,
        },
        # Patterns of attention, and constants that are known beforehand: both make tensors on the GPU.
        joint_graph: {"lazy_init": lambda *_, **__: None, "constant_fold_uniform_value": lambda *_: None},
        post_grad: {"lazy_init": lambda *_, **__: None},
        scheduler: {"has_triton": lambda *_: True},
        _triton: {"triton_hash_with_backend": lambda: ""},
        torch.Tensor: {"copy_": lambda to, source, _=False: torch.ops.aten.copy_.default(to, source)},
    }
    with contextlib.ExitStack() as stack:
        for place, names in replaced.items():
            for name, value in names.items():
                stack.enter_context(mock.patch.object(place, name, value, create=True))
        yield


def trace(function: Callable[..., Any], given: Sequence[Any]) -> torch.fx.GraphModule:
    """The graph of a function of fake tensors, or of tuples of them; its inputs are all of these in a row."""
    flat, form = torch.utils._pytree.tree_flatten(list(given))

    def call(*values: Any) -> Any:
        return function(*torch.utils._pytree.tree_unflatten(values, form))

    with flat[0].fake_mode, contextlib.ExitStack() as stack:
        for name, method in METHODS.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        return make_fx(call)(*flat)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor
    return torch.ops.aten.clone.default(tensor, memory_format=torch.contiguous_format)


def _row(tensor: torch.Tensor, index: int) -> torch.Tensor:
    return torch.ops.aten.select.int(tensor, 0, index)


#: Methods that ask for the GPU before they call their op.
METHODS = {"contiguous": _contiguous, "__getitem__": _row}


def make(graph: torch.fx.GraphModule, given: Sequence[Any]) -> str:
    """The code of a graph. Raises what the compilation does."""
    flat, _ = torch.utils._pytree.tree_flatten(list(given))
    codes: list[str] = []

    def keep(lowered: GraphLowering, *_: Any) -> None:
        code, _ = lowered.codegen()
        codes.append(getattr(code, "value", code))
        raise CodeIsMade

    with config.patch(SETTINGS), mock.patch.object(GraphLowering, "compile_to_module", keep), torch.no_grad():
        try:
            compile_fx(graph, flat)
        except Exception:
            if not codes:
                raise
    return codes[0]


def kernels(code: str) -> list[str]:
    """The text of every Triton kernel in the order of their definitions, without its name."""
    found = re.findall(r"= async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)
    return [text[text.index("@triton.jit") :].replace(name, "kernel") for name, text in found]


def calls(code: str) -> list[str]:
    """Ops and kernels by the order of their calls; a kernel is `kernel`."""
    body = code[code.index("def call(") :]
    pattern = r"^ +(?:\w+ = )?(?:triton_\w+\.(run)\(|torch\.ops\.\w+\.(\w+)\.|extern_kernels\.(\w+)\()"
    found = re.findall(pattern, body, re.MULTILINE)
    return ["kernel" if run else op or extern for run, op, extern in found]
