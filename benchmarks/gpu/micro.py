"""Standalone measurements of the pair of projections: no engine, only torch and the overlay's machinery.

`replay` compares the overlay with the serial order bit for bit over many replays of a CUDA graph. `micro` times the pair
per layer in a CUDA graph in several arrangements, and the CPU cost of one eager call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional

#: Name, hidden size, columns of qkvz and of ba, weight sets (together far larger than the L2 cache).
SHAPES = (
    ("35B TP1", 2048, 12288, 64, 8),
    ("35B TP4", 2048, 3072, 16, 24),
    ("27B TP1", 5120, 16384, 96, 8),
)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024)
Pair = tuple[torch.Tensor, torch.Tensor]
Work = Callable[[], Pair]


def overlay_region(device: torch.device) -> Any:
    """A prepared parallel region of the overlay next to this folder."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.append(root)
    from overlay.side_work.streams import ParallelRegion

    region = ParallelRegion(slots=1)
    region.prepare(device)
    return region


class UnquantizedLinearMethod:
    """Tells the overlay, which goes by this name, that the GEMM is torch's own."""

    @staticmethod
    def default_unquantized_gemm() -> None: ...

    _gemm_impl = default_unquantized_gemm


class Linear(torch.nn.Module):
    """A linear in vLLM's manner: gives its result and no bias."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return functional.linear(hidden_states, self.weight), None


class Layer(torch.nn.Module):
    """The two projections of one GDN layer, and the overlay's way to run them."""

    def __init__(self, hidden: int, qkvz: int, ba: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        scale = hidden**-0.5
        self.in_proj_qkvz = Linear(torch.randn(qkvz, hidden, device=device, dtype=dtype) * scale)
        self.in_proj_ba = Linear(torch.randn(ba, hidden, device=device, dtype=dtype) * scale)

    def serial(self, hidden_states: torch.Tensor) -> Pair:
        big, _ = self.in_proj_qkvz(hidden_states)
        small, _ = self.in_proj_ba(hidden_states)
        return big, small


def overlay_projection(layer: Layer, qkvz: int, ba: int, device: torch.device) -> tuple[str, Callable[..., Pair]]:
    """How the overlay runs the pair: its op's own implementation where vLLM can be imported, else its region."""
    region = overlay_region(device)
    try:
        from overlay.journal import PatchRecord
        from overlay.pair import LinearPair
        from overlay.side_work.plan import Plan

        pair = LinearPair(qkvz, ba, Plan("dual", 1 << 20), PatchRecord())
        pair.plain = True
    except Exception:

        def run(hidden_states: torch.Tensor) -> Pair:
            main, (side,) = region.run(
                lambda: layer.in_proj_qkvz(hidden_states)[0], [lambda: layer.in_proj_ba(hidden_states)[0]]
            )
            return main, side

        return "ParallelRegion", run
    return "LinearPair", lambda hidden_states: pair.project(layer.in_proj_qkvz, layer.in_proj_ba, hidden_states)


def capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Warm up on a side stream, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def replay(replays: int, tokens: tuple[int, ...] = (1, 8, 64, 256), layers: int = 4) -> dict[str, Any]:
    """Replay the overlay's graph and a serial one with new inputs each time; count results that differ in any bit."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    name, hidden, qkvz, ba, _ = SHAPES[0]
    torch.manual_seed(0)
    stack = [Layer(hidden, qkvz, ba, device, dtype) for _ in range(layers)]
    projections = [overlay_projection(layer, qkvz, ba, device) for layer in stack]
    rows = []
    for count in tokens:
        inputs = torch.zeros(count, hidden, device=device, dtype=dtype)
        for _, project in projections:
            project(inputs)

        def overlay_work(inputs: torch.Tensor = inputs) -> list[Pair]:
            return [project(inputs) for _, project in projections]

        def serial_work(inputs: torch.Tensor = inputs) -> list[Pair]:
            return [layer.serial(inputs) for layer in stack]

        overlay_graph, overlay_results = capture(overlay_work)
        serial_graph, serial_results = capture(serial_work)
        differences = torch.zeros((), device=device, dtype=torch.int64)
        changed = torch.zeros((), device=device, dtype=torch.int64)
        last = torch.zeros((), device=device, dtype=torch.float32)
        begin = time.perf_counter()
        for index in range(replays):
            inputs.normal_()
            for pair in overlay_results:
                for tensor in pair:
                    tensor.fill_(float("nan"))  # a result that is not written must be seen
            if index % 2:
                overlay_graph.replay()
                serial_graph.replay()
            else:
                serial_graph.replay()
                overlay_graph.replay()
            for new, old in zip(overlay_results, serial_results, strict=True):
                for left, right in zip(new, old, strict=True):
                    differences += (left.view(torch.int16) != right.view(torch.int16)).any()
            total = serial_results[0][0].float().sum()
            changed += total != last
            last.copy_(total)
            if index % 500 == 499:
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        rows.append(
            {
                "tokens": count,
                "replays": replays,
                "layers": layers,
                "compared": replays * layers * 2,
                "different": int(differences),
                "inputs_changed": int(changed),
                "finite": bool(torch.isfinite(overlay_results[0][0]).all()),
                "seconds": round(time.perf_counter() - begin, 1),
            }
        )
    return {"shape": name, "implementation": projections[0][0], "torch": torch.__version__, "rows": rows}


def _manual_fork(side: torch.cuda.Stream, side_first: bool) -> Callable[[Work, Work], None]:
    """Fork and join written out, for arrangements that the overlay does not use."""
    start, done = torch.cuda.Event(), torch.cuda.Event()

    def run(main_work: Callable[[], Any], side_work: Callable[[], Any]) -> None:
        main = torch.cuda.current_stream()
        start.record(main)
        side.wait_event(start)
        if not side_first:
            main_work()
        with torch.cuda.stream(side):
            side_work()
            done.record(side)
        if side_first:
            main_work()
        main.wait_event(done)

    return run


def _per_layer(graph: torch.cuda.CUDAGraph, layers: int, repetitions: int = 25) -> float:
    """Microseconds per layer: the median over repetitions of one replay."""
    graph.replay()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    each = sorted(begin.elapsed_time(end) for begin, end in times)
    return each[len(each) // 2] * 1000.0 / layers


def graph_times(tokens: tuple[int, ...] = TOKENS) -> list[dict[str, Any]]:
    """Microseconds per layer and arrangement, every shape and number of tokens."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    rows = []
    for name, hidden, qkvz, ba, sets in SHAPES:
        stack = [Layer(hidden, qkvz, ba, device, dtype) for _ in range(sets)]
        fused = [torch.cat([layer.in_proj_qkvz.weight, layer.in_proj_ba.weight]) for layer in stack]
        plain, high = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        projections = [overlay_projection(layer, qkvz, ba, device)[1] for layer in stack]
        manual = {
            "qkvz_first": [_manual_fork(plain, side_first=False) for _ in stack],
            "high_priority": [_manual_fork(high, side_first=True) for _ in stack],
            "high_priority_qkvz_first": [_manual_fork(high, side_first=False) for _ in stack],
        }
        for count in tokens:
            inputs = torch.randn(count, hidden, device=device, dtype=dtype)
            for project in projections:
                project(inputs)

            def forked(forks: list[Any], inputs: torch.Tensor = inputs, stack: list[Layer] = stack) -> None:
                for fork, layer in zip(forks, stack, strict=True):
                    fork(lambda layer=layer: layer.in_proj_qkvz(inputs), lambda layer=layer: layer.in_proj_ba(inputs))

            def ba_then_qkvz(inputs: torch.Tensor = inputs, stack: list[Layer] = stack) -> None:
                for layer in stack:
                    layer.in_proj_ba(inputs)
                    layer.in_proj_qkvz(inputs)

            arrangements: dict[str, Callable[[], Any]] = {
                "qkvz_alone": lambda inputs=inputs, stack=stack: [layer.in_proj_qkvz(inputs) for layer in stack],
                "serial": lambda inputs=inputs, stack=stack: [layer.serial(inputs) for layer in stack],
                "serial_ba_first": ba_then_qkvz,
                "dual": lambda inputs=inputs, projections=projections: [project(inputs) for project in projections],
                **{key: lambda forks=forks, forked=forked: forked(forks) for key, forks in manual.items()},
                "fused": lambda inputs=inputs, fused=fused: [functional.linear(inputs, weight) for weight in fused],
            }
            row: dict[str, Any] = {"shape": name, "tokens": count}
            graphs = {key: capture(work)[0] for key, work in arrangements.items()}
            first = {key: _per_layer(graph, sets) for key, graph in graphs.items()}
            second = {key: _per_layer(graph, sets) for key, graph in reversed(graphs.items())}
            row |= {key: round(min(first[key], second[key]), 2) for key in graphs}
            row["spread"] = round(max(abs(first[key] - second[key]) for key in graphs), 2)
            rows.append(row)
            del graphs
        del stack, fused, projections
        torch.cuda.empty_cache()
    return rows


def call_costs(calls: int = 1500, device_name: str = "cuda") -> dict[str, float]:
    """CPU microseconds per eager call, with weights so small that the GPU never falls behind."""
    device = torch.device(device_name)
    layer = Layer(64, 128, 16, device, torch.bfloat16)
    inputs = torch.randn(1, 64, device=device, dtype=torch.bfloat16)
    transposed = [layer.in_proj_qkvz.weight.t(), layer.in_proj_ba.weight.t()]
    outputs = [
        torch.empty(1, 128, device=device, dtype=torch.bfloat16),
        torch.empty(1, 16, device=device, dtype=torch.bfloat16),
    ]
    mm = torch.ops.aten.mm.out

    def two_mm() -> None:
        mm(inputs, transposed[0], out=outputs[0])
        mm(inputs, transposed[1], out=outputs[1])

    works: dict[str, Callable[[], Any]] = {"two F.linear": lambda: layer.serial(inputs), "two mm(out=)": two_mm}
    if device.type == "cuda":
        label, project = overlay_projection(layer, 128, 16, device)
        project(inputs)
        works[f"overlay outside capture ({label})"] = lambda: project(inputs)
        region = overlay_region(device)
        works["overlay fork and join"] = lambda: region.run(
            lambda: layer.in_proj_qkvz(inputs), [lambda: layer.in_proj_ba(inputs)]
        )
    try:
        works |= _through_custom_op(layer, inputs)
    except Exception as error:
        print(f"custom op not measured: {error}", file=sys.stderr)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best: dict[str, float] = {}
    with torch.inference_mode():
        for _ in range(3):
            for name, work in works.items():
                for _ in range(100):
                    work()
                wait()
                begin = time.perf_counter()
                for index in range(calls):
                    work()
                    if index % 200 == 199:
                        wait()
                each = (time.perf_counter() - begin) / calls * 1e6
                best[name] = min(best.get(name, each), each)
    return {name: round(value, 2) for name, value in best.items()}


def _through_custom_op(layer: Layer, inputs: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The same two linears behind a plain custom op: what the dispatcher and Python cost, whoever registers it."""
    library = torch.library.Library("vllm_overlay_evidence", "FRAGMENT")
    library.define("pair(Tensor hidden_states, int qkvz, int ba, str name) -> (Tensor, Tensor)")
    layers = {"layer": layer}
    library.impl(
        "pair",
        lambda hidden_states, qkvz, ba, name: layers[name].serial(hidden_states),
        "CUDA" if inputs.is_cuda else "CPU",
    )
    operator = torch.ops.vllm_overlay_evidence.pair
    _libraries.append(library)
    return {"two F.linear in a custom op": lambda: operator(inputs, 128, 16, "layer")}


_libraries: list[torch.library.Library] = []
