"""How much of the LoRA kernels' time a trace shows next to the base layers' GEMMs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gpu.trace import GEMM, Kernel, span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LORA = re.compile(r"lora_shrink|lora_expand", re.IGNORECASE)
#: Not a GEMM although the name says so: attention kernels are built with CUTLASS.
ATTENTION = re.compile(r"flash|attention|fmha", re.IGNORECASE)


def union(kernels: Iterable[Kernel]) -> list[tuple[float, float]]:
    """The time during which at least one of the kernels ran: sorted intervals that do not touch, microseconds."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted((kernel.start, kernel.end) for kernel in kernels):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def covered(kernel: Kernel, intervals: Sequence[tuple[float, float]]) -> float:
    """Microseconds of a kernel that fall into the intervals."""
    return sum(max(0.0, min(kernel.end, end) - max(kernel.start, begin)) for begin, end in intervals)


def analyse(kernels: Sequence[Kernel], steps: int) -> dict[str, Any]:
    """Per step: time of LoRA kernels, of GEMMs, of the whole step; and the share of LoRA time that ran next to a GEMM.

    Kernels of a replayed CUDA graph carry no layer name; the names of vLLM's LoRA kernels and of the GEMMs tell them
    apart. The fill of the buffers is not counted. Times are microseconds.
    """
    lora = [kernel for kernel in kernels if LORA.search(kernel.name)]
    others = [kernel for kernel in kernels if not LORA.search(kernel.name) and not ATTENTION.search(kernel.name)]
    gemms = [kernel for kernel in others if GEMM.search(kernel.name)]
    times = union(gemms)
    total = sum(kernel.duration for kernel in lora)
    hidden = sum(covered(kernel, times) for kernel in lora)
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
        "gpu_us_per_step": span(kernels) / steps,
        "busy_us_per_step": sum(end - begin for begin, end in union(kernels)) / steps,
        "kernel_names": [
            (name[:120], count, round(time, 1))
            for name, (count, time) in sorted(longest.items(), key=lambda item: -item[1][1])[:30]
        ],
    }
