#!/usr/bin/env python3
"""Whether the calls by which a GEMM can be made give the same bits: eager code's, a compiled graph's, the overlay's.

    cd benchmarks && python3 -m gpu.gemm_calls --out FILE.json

The reference is ``linear`` on the main stream. Weights and inputs are such that their products cancel, so every result is
nothing but rounding errors: kernels that add in another order differ in all of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

#: Columns in, rows of the large and of the small weight: 35B-A3B, its TP-2 shard, 27B.
SHAPES = ((2048, 12288, 64), (2048, 6144, 32), (5120, 16384, 96))
CAPTURED = (
    *range(1, 18),
    24,
    31,
    32,
    33,
    48,
    64,
    65,
    96,
    100,
    127,
    128,
    129,
    160,
    177,
    192,
    200,
    255,
    256,
    300,
    384,
    512,
)
PROMPTS = (600, 777, 1000, 1024, 1500, 2048, 3000, 4096, 8192)


def cancelling(rows: int, hidden: int, order: torch.Tensor) -> torch.Tensor:
    """(rows, hidden) numbers of which one half of the columns is the other's negative."""
    half = torch.randn(rows, hidden // 2, device="cuda", dtype=torch.bfloat16)
    return torch.cat([half, -half], 1)[:, order].contiguous()


def repeating(rows: int, hidden: int, order: torch.Tensor) -> torch.Tensor:
    """(rows, hidden) numbers of which one half of the columns is the other."""
    half = torch.randn(rows, hidden // 2, device="cuda", dtype=torch.bfloat16)
    return torch.cat([half, half], 1)[:, order].contiguous()


def captured(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of a call that was captured and replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return result.clone()


def results(inputs: torch.Tensor, weight: torch.Tensor, columns: int, first: int) -> dict[str, torch.Tensor]:
    """Every call's result; `columns` and `first`: where in a common result this weight's part would be."""
    tokens, rows = inputs.shape[0], weight.shape[0]
    auxiliary = torch.cuda.Stream()

    def out() -> torch.Tensor:
        return torch.mm(inputs, weight.t(), out=inputs.new_empty(tokens, rows))

    def into_slice() -> torch.Tensor:
        common = inputs.new_empty(tokens, columns)
        torch.mm(inputs, weight.t(), out=common.narrow(1, first, rows))
        return common[:, first : first + rows]

    def on_auxiliary() -> torch.Tensor:
        main = torch.cuda.current_stream()
        auxiliary.wait_stream(main)
        with torch.cuda.stream(auxiliary):
            result = linear(inputs, weight)
        main.wait_stream(auxiliary)
        return result

    calls = {"linear": lambda: linear(inputs, weight), "mm.out": out, "mm.out into a slice": into_slice}
    found = {name: call() for name, call in (*calls.items(), ("linear, auxiliary stream", on_auxiliary))}
    if tokens <= max(CAPTURED):
        on_auxiliary()
        torch.cuda.synchronize()
        for name, call in (*calls.items(), ("linear, auxiliary stream", on_auxiliary)):
            found[f"{name}, captured"] = captured(call)
    torch.cuda.synchronize()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    different: dict[str, dict[str, list[int]]] = {}
    for hidden, large, small in SHAPES:
        order = torch.randperm(hidden, device="cuda")
        for rows, first in ((large, 0), (small, large)):
            name = f"{hidden} to {rows}"
            weight, different[name] = cancelling(rows, hidden, order), {}
            for tokens in (*CAPTURED, *PROMPTS):
                inputs = repeating(tokens, hidden, order)
                with torch.inference_mode():
                    found = results(inputs, weight, large + small, first)
                assert found["linear"].any(), "all sums are zero: the comparison would say nothing"
                for call, result in found.items():
                    if not torch.equal(result, found["linear"]):
                        different[name].setdefault(call, []).append(tokens)
            print(name, different[name] or "no bit differs", flush=True)
    described = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tokens": [*CAPTURED, *PROMPTS],
        "different": different,
    }
    arguments.out.write_text(json.dumps(described, indent=1))


if __name__ == "__main__":
    main()
