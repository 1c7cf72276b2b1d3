"""The ops of side work as a GPU has them, in a process of tests that may have defined others."""

from __future__ import annotations

import inspect
import re

import torch
from vllm.compilation.passes.utility import fix_functionalization

from overlay.side_work import lowering, ops


def define() -> None:
    """Define the ops with the writes that they declare on a GPU, in the place of those without."""
    if ops._libraries and "!" in str(torch.ops.vllm_overlay.start.default._schema):
        return
    for library in ops._libraries:
        library._destroy()
    ops._libraries.clear()
    ops._defined = False
    lowering._above.clear()
    lowering._captured.clear()
    ops.define(declares_writes=True)


def define_missing_kernels() -> torch.library.Library:
    """vLLM's graph pass for ops that write looks kernels up by name. Those that a build for a CPU lacks get a name here."""
    library = torch.library.Library("_C", "FRAGMENT")
    for name in {*re.findall(r"torch\.ops\._C\.(\w+)", inspect.getsource(fix_functionalization))}:
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library
