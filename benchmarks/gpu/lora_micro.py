"""One LoRA linear alone, in CUDA graphs: up to how many tokens does the auxiliary stream pay?

vLLM's own punica wrapper and kernels, the overlay's own `apply` and ops, and torch's linear as the base layer. Two ways are
compared. `serial` is the order of stock: GEMM, shrink, expand in place. `dual` is the overlay's. `gemm` is the base layer alone: what
would be left if everything were hidden. Every graph runs over several layers with weights of their own, together larger than the L2
cache. Results are compared bit for bit.

On an H200 it would not pay to have the expand beside the GEMM as well (benchmarks/results/h200-lora-micro).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional

from benchmarks.gpu import lora_model
from benchmarks.gpu.capture import capture, microseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from overlay.report.journal import PatchRecord

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
#: Per tensor-parallel size: linear, input features, columns of each slice (per shard), in the shape of Qwen3-8B.
SHAPES: dict[int, tuple[tuple[str, int, tuple[int, ...]], ...]] = {
    1: (
        ("qkv", 4096, (4096, 1024, 1024)),
        ("o", 4096, (4096,)),
        ("gate_up", 4096, (12288, 12288)),
        ("down", 12288, (4096,)),
    ),
    4: (
        ("qkv", 4096, (1024, 256, 256)),
        ("o", 1024, (4096,)),
        ("gate_up", 4096, (3072, 3072)),
        ("down", 3072, (4096,)),
    ),
}
#: What is measured, most wanted first: tensor-parallel size and rank.
ORDER = ((1, 16), (1, 64), (4, 16), (1, 8), (4, 64), (4, 8))
SLOTS = 4
#: Bytes of base weights per graph, well above the L2 cache of an H200 (50 MB).
WEIGHTS = 160 << 20
#: Replays of a graph in one of its turns.
REPLAYS = 5
#: A way counts as not slower up to this ratio: the spread of these medians.
SLACK = 1.01


class LoraLinear(torch.nn.Module):
    """What upstream's `apply` and the overlay use of a LoRA linear."""

    def __init__(self, inputs: int, slices: tuple[int, ...], rank: int, punica: Any, device: torch.device) -> None:
        super().__init__()
        outputs, dtype = sum(slices), torch.bfloat16
        self.base_layer = torch.nn.Module()
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
        self.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        generator = torch.Generator().manual_seed(inputs + rank)
        first = lora_model.lora_a(rank, inputs, False, generator).to(device, dtype)
        self.lora_a_stacked = tuple(first.expand(SLOTS, 1, rank, inputs).contiguous() for _ in slices)
        self.lora_b_stacked = tuple(
            torch.randn(SLOTS, 1, columns, rank, device=device, dtype=dtype) * (0.5 * rank**-0.5) for columns in slices
        )
        self.output_slices = slices
        self.punica_wrapper = punica


def serial(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In stock's order: the base layer, then the adapters added to its output in place."""
    output = functional.linear(x, layer.base_layer.weight, bias)
    layer.punica_wrapper.add_lora_linear(
        output, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices
    )
    return output


def overlap(layers: Sequence[LoraLinear]) -> tuple[Callable[..., torch.Tensor], PatchRecord]:
    """The overlay's `apply` for these layers, which takes `serial` for upstream's; and where it counts its calls."""
    from overlay.patches.lora_linear import patch as lora_linear
    from overlay.report.journal import PatchRecord
    from overlay.side_work import lane, ops
    from overlay.side_work.plan import Plan

    record = PatchRecord()
    ops.define(declares_writes=True)
    ops.planned[lora_linear.NAME] = ops.PlannedPair(Plan("dual", 1 << 20), record)
    device = layers[0].base_layer.weight.device
    if device.type == "cuda":
        lane.prepare(device)
    for layer in layers:
        lora_linear.take_over_shrink(layer.punica_wrapper)
        setattr(layer, lora_linear.PAIR, lora_linear.LoraPair(lora_linear.without_adapters(layer), "weight"))
    return lora_linear.overlap_adapters(serial), record


def punica_wrapper(rank: int, device: torch.device) -> Any:
    """vLLM's wrapper of the LoRA kernels, as the engine makes it."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = LoRAConfig(max_lora_rank=rank, max_loras=SLOTS, lora_dtype=torch.bfloat16)  # type: ignore[arg-type]
    return PunicaWrapperGPU(max(TOKENS), 256, device, lora_config=config)


def forget_pointers() -> None:
    """vLLM keeps tables of weight pointers by address. New weights may get an old address with another shape."""
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


def _row(
    stack: list[LoraLinear], dual: Callable[..., torch.Tensor], record: PatchRecord, tokens: int, punica: Any
) -> dict[str, Any]:
    """All ways at one number of tokens."""
    weight = stack[0].base_layer.weight
    device = weight.device
    x = torch.randn(tokens, weight.shape[1], device=device, dtype=weight.dtype)
    punica.token_mapping_meta.prepare_tensors(torch.zeros(tokens, dtype=torch.long, device=device))
    before = record.calls.dual_stream
    ways: dict[str, Callable[[], Any]] = {
        "gemm": lambda: [functional.linear(x, layer.base_layer.weight) for layer in stack],
        "serial": lambda: [serial(layer, x, None) for layer in stack],
        "dual": lambda: [dual(layer, x) for layer in stack],
    }
    graphs = {name: capture(work) for name, work in ways.items()}
    calls = record.calls.dual_stream - before
    found = microseconds({name: graph for name, (graph, _) in graphs.items()}, REPLAYS)
    pairs = zip(graphs["serial"][1], graphs["dual"][1], strict=True)
    different = sum(not torch.equal(old.view(torch.int16), new.view(torch.int16)) for old, new in pairs)
    times = {name: round(time / len(stack), 2) for name, time in found.items()}
    return {**times, "layers": len(stack), "different": different, "on_two_streams": calls == len(stack)}


def run(target: Path, seconds: float, tokens: Sequence[int] = TOKENS) -> None:
    """Measure in the order of `ORDER` until the time is over; the file is written after every linear."""
    from vllm.forward_context import override_forward_context

    device, begin = torch.device("cuda"), time.monotonic()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"torch": torch.__version__, "rows": rows, "complete": False}
    torch.manual_seed(0)
    with torch.inference_mode(), override_forward_context(object()):
        for shards, rank in ORDER:
            for linear, inputs, slices in SHAPES[shards]:
                if time.monotonic() - begin > seconds:
                    return
                forget_pointers()
                punica = punica_wrapper(rank, device)
                layers = max(2, -(-WEIGHTS // (2 * inputs * sum(slices))))
                stack = [LoraLinear(inputs, slices, rank, punica, device) for _ in range(layers)]
                dual, record = overlap(stack)
                for count in tokens:
                    row = _row(stack, dual, record, count, punica)
                    rows.append({"shards": shards, "rank": rank, "linear": linear, "tokens": count, **row})
                found["threshold"] = thresholds(rows)
                target.write_text(json.dumps(found))
                del stack
                torch.cuda.empty_cache()
    target.write_text(json.dumps({**found, "complete": True}))


def thresholds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Up to how many tokens `dual` is not slower: for each linear, and for a whole layer (the sum of its linears).

    The largest measured number of tokens such that it and all smaller ones are not slower; 0 where the smallest is.
    """
    found = []
    groups = sorted({(row["shards"], row["rank"]) for row in rows})
    for shards, rank in groups:
        mine = [row for row in rows if (row["shards"], row["rank"]) == (shards, rank)]
        linears = sorted({row["linear"] for row in mine})
        sums: dict[int, tuple[float, float, int]] = {}
        for row in mine:
            old, new, count = sums.get(row["tokens"], (0.0, 0.0, 0))
            sums[row["tokens"]] = (old + row["serial"], new + row["dual"], count + 1)
        whole = {tokens: new / old for tokens, (old, new, count) in sums.items() if count == len(linears)}
        each = {
            linear: not_slower_up_to(
                {row["tokens"]: row["dual"] / row["serial"] for row in mine if row["linear"] == linear}
            )
            for linear in linears
        }
        found.append(
            {"shards": shards, "rank": rank, "linears": each, "layer": not_slower_up_to(whole), "ratio": whole}
        )
    return found


def not_slower_up_to(ratio: Mapping[int, float]) -> int:
    """The largest number of tokens such that its ratio and those of all smaller numbers are at most `SLACK`."""
    largest = 0
    for tokens in sorted(ratio):
        if ratio[tokens] > SLACK:
            break
        largest = tokens
    return largest


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
