#!/usr/bin/env python3
"""What the GDN op costs the host per layer in an eager step, against the two GEMM calls of stock's compiled graph.

    cd benchmarks && python3 -m gpu.gdn_host_cost --out FILE.json        (vLLM and this repository on PYTHONPATH)

Both sides are compiled by Inductor without CUDA graphs, LAYERS layers in one graph, with weights so small that the GPU
never falls behind; what is timed is the host. Sides take turns; medians, microseconds per layer.
"""

from __future__ import annotations

import argparse
import json
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu.micro import Layer

LAYERS, HIDDEN, QKVZ, BA = 30, 64, 128, 16
CALLS, ROUNDS = 60, 15


def sides(device: torch.device, tokens: int) -> dict[str, Callable[[], Any]]:
    """Compiled calls by name: stock, and the op with two results and with one."""
    from overlay.journal import PatchRecord
    from overlay.pair import LinearPair
    from overlay.patches import gdn
    from overlay.side_work.plan import Plan

    record = PatchRecord()
    gdn.register_ops(record)
    inputs = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    known: dict[str, Layer] = {}
    gdn.get_forward_context = lambda: types.SimpleNamespace(no_compile_layers=known)
    patched = gdn.overlap_in_projections(Layer.serial)

    def compiled(name: str, forward: Callable[..., Any], one_result: bool | None = None) -> Callable[[], Any]:
        layers = [Layer(HIDDEN, QKVZ, BA, device, torch.bfloat16) for _ in range(LAYERS)]
        for number, layer in enumerate(layers):
            layer.prefix = f"{name}.{number}"
            known[layer.prefix] = layer
            if one_result is not None:
                pair = LinearPair(QKVZ, BA, Plan("dual", 256), record)
                pair.one_result, pair.plain = one_result, True
                setattr(layer, gdn.PAIR, pair)

        def model(inputs: torch.Tensor) -> list[Any]:
            return [forward(layer, inputs) for layer in layers]

        call = torch.compile(model, fullgraph=True)
        return lambda: call(inputs)

    return {
        "stock": compiled("stock", Layer.serial),
        "op, two results": compiled("two", patched, False),
        "op, one result": compiled("one", patched, True),
    }


def measure(works: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Microseconds per layer by side, one value per round; sides take turns."""
    found: dict[str, list[float]] = {name: [] for name in works}

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        for work in works.values():
            for _ in range(5):
                work()
        for number in range(ROUNDS):
            for name in list(works) if number % 2 else list(reversed(works)):
                wait()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    works[name]()
                # Without waiting: the GPU's work is not what is timed.
                found[name].append((time.perf_counter() - begin) / CALLS / LAYERS * 1e6)
                wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=600, help="above every threshold: the way of an eager prompt")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found = measure(sides(device, arguments.tokens), device)
    base = median(found["stock"])
    rows = {
        name: {"us": round(median(values), 2), "above_stock": round(median(values) - base, 2)}
        for name, values in found.items()
    }
    import vllm

    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {"device": name, "torch": torch.__version__, "vllm": vllm.__version__, "tokens": arguments.tokens}
    arguments.out.write_text(json.dumps({**result, "rows": rows, "rounds": found}, indent=1))
    for name, row in rows.items():
        print(f"{name:20s} {row['us']:8.2f} us per layer, {row['above_stock']:+.2f}")


if __name__ == "__main__":
    main()
