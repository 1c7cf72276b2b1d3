"""How much of the LoRA kernels' time a trace shows next to the base layers' GEMMs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from overlay.cli.bench.timeline import Kernel, overlap

LORA = re.compile(r"lora_shrink|lora_expand", re.IGNORECASE)
GEMM = re.compile(r"gemm|nvjet|cutlass|cublas|gemv|splitk|split_k|triton_.*mm|_mm_", re.IGNORECASE)
#: Not a GEMM although the name says so: attention kernels are built with CUTLASS.
ATTENTION = re.compile(r"flash|attention|fmha", re.IGNORECASE)


def analyse(kernels: Sequence[Kernel], steps: int) -> dict[str, Any]:
    """Per step: time of LoRA kernels, of GEMMs, of the whole step; and the share of LoRA time that ran next to a GEMM.

    Kernels of a replayed CUDA graph carry no layer name; the names of vLLM's LoRA kernels and of the GEMMs tell them
    apart. The fill of the buffers is not counted. Times are microseconds.
    """
    lora = [kernel for kernel in kernels if LORA.search(kernel.name)]
    others = [kernel for kernel in kernels if not LORA.search(kernel.name) and not ATTENTION.search(kernel.name)]
    gemms = [kernel for kernel in others if GEMM.search(kernel.name)]
    begin = min((kernel.start for kernel in kernels), default=0.0)
    span = max((kernel.end for kernel in kernels), default=0.0) - begin
    total = sum(kernel.duration for kernel in lora)
    hidden = sum(overlap(kernel, gemms) for kernel in lora)
    longest: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        count, time = longest.get(kernel.name, (0, 0.0))
        longest[kernel.name] = (count + 1, time + kernel.duration)
    return {
        "steps": steps,
        "kernels": len(kernels),
        "lora_kernels_per_step": len(lora) / steps,
        "lora_us_per_step": total / steps,
        "gemm_us_per_step": sum(kernel.duration for kernel in gemms) / steps,
        "hidden_us_per_step": hidden / steps,
        "hidden_share": hidden / total if total else None,
        "lora_streams": sorted({kernel.stream for kernel in lora}),
        "gemm_streams": sorted({kernel.stream for kernel in gemms}),
        "gpu_us_per_step": span / steps,
        "busy_us_per_step": overlap(Kernel("all", "", begin, span), kernels) / steps,
        "kernel_names": [
            (name[:120], count, round(time, 1))
            for name, (count, time) in sorted(longest.items(), key=lambda item: -item[1][1])[:30]
        ],
    }
