"""What a call of a LoRA linear costs the host's CPU where nothing forks: stock's compiled graph, and the overlay's op in one.

    cd benchmarks && PYTHONPATH=/tmp/site python -m gpu.lora_host_cost /tmp/out/lora-host-cost.json
    cd benchmarks && python -m gpu.lora_host_cost cost.json --cpu

A prompt with more tokens than the largest captured size runs eagerly, and then the host decides how long it takes. Four ways,
each through the four LoRA linears of one decoder layer in the shape of Qwen3-8B, with vLLM's own layers, punica wrapper and
kernels:

`stock`   upstream's `apply`, compiled: what stock runs.
`overlay` the overlay's op in a compiled graph.
`apply`   the same op, where upstream's `apply` runs in it as Python.
`python`  upstream's `apply` as Python, not compiled.

Only the time to issue the work counts, a few hundred launches at once, fewer than the GPU's queue holds. Compiled graphs
are called past Dynamo's guards, as vLLM does. `parts` times single calls. Results of all ways are compared bit for bit.
With --cpu the kernels are left out and the layers are small: what is left is Python's share, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpu import REPOSITORY, lora_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Appended, not on PYTHONPATH, so that the overlay is not armed: stock has to be stock here.
sys.path.append(str(REPOSITORY))

WAYS = ("stock", "overlay", "apply", "python")
TOKENS = (128, 512)
FEW_TOKENS = (2, 4)  #: where the GEMM runs on the CPU that is measured
#: Hidden size, heads, key and value heads, head size, intermediate size.
QWEN3_8B = (4096, 32, 8, 128, 12288)
SMALL = (32, 2, 1, 16, 32)
MAX_TOKENS, SLOTS, RANK = 1024, 4, 16
#: Passes over the four linears per sample: about 240 launches.
PASSES, SAMPLES = 12, 41
PART_CALLS = 40


class NoKernel:
    """In the place of a Triton kernel where there is no GPU."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def leave_out_kernels() -> None:
    """Let vLLM's LoRA kernels do nothing, and its linears take torch's own GEMM, as they do on a GPU."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu
    from vllm.model_executor.layers import linear, utils

    changes: list[tuple[Any, str, Any]] = [
        (lora_shrink_op, "_lora_shrink_kernel", NoKernel()),
        (lora_expand_op, "_lora_expand_kernel", NoKernel()),
        (punica_gpu, "LoRAKernelMeta", LoRAKernelMeta),
        (punica_gpu, "lora_shrink", lora_shrink_op.lora_shrink),
        (punica_gpu, "lora_expand", lora_expand_op.lora_expand),
        (linear, "dispatch_unquantized_gemm", lambda *args, **kwargs: utils.default_unquantized_gemm),
    ]
    for owner, name, value in changes:
        setattr(owner, name, value)
    if not hasattr(lora_shrink_op.triton, "cdiv"):  # what stands for Triton up to 0.20 has none
        lora_shrink_op.triton.cdiv = lambda numerator, denominator: -(-numerator // denominator)
    torch.backends.mkldnn.enabled = False  # its threads would decide the times
    torch.set_num_threads(1)


def make_layers(shape: tuple[int, ...], device: torch.device) -> tuple[list[Any], Any]:
    """The four LoRA linears of one decoder layer as the engine makes them, with random weights; their punica wrapper."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora import layers as lora_layers
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
    from vllm.model_executor.layers import linear

    hidden, heads, kv_heads, head, intermediate = shape
    config = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=torch.bfloat16)  # type: ignore[arg-type]
    punica = PunicaWrapperGPU(MAX_TOKENS, 256, device, lora_config=config)
    kept, dtype = torch.get_default_dtype(), torch.bfloat16
    torch.set_default_dtype(dtype)
    try:
        with device:
            bases = (
                linear.QKVParallelLinear(hidden, head, heads, kv_heads, bias=False, prefix="layers.0.qkv_proj"),
                linear.RowParallelLinear(heads * head, hidden, bias=False, prefix="layers.0.o_proj"),
                linear.MergedColumnParallelLinear(
                    hidden, [intermediate] * 2, bias=False, prefix="layers.0.gate_up_proj"
                ),
                linear.RowParallelLinear(intermediate, hidden, bias=False, prefix="layers.0.down_proj"),
            )
    finally:
        torch.set_default_dtype(kept)
    row = lora_layers.RowParallelLinearWithLoRA
    classes = (lora_layers.MergedQKVParallelLinearWithLoRA, row, lora_layers.MergedColumnParallelLinearWithLoRA, row)
    made: list[Any] = []
    for base, layer_class in zip(bases, classes, strict=True):
        base.weight.requires_grad_(False).normal_(std=base.weight.shape[1] ** -0.5)
        if device.type == "cuda":
            base.quant_method.process_weights_after_loading(base)
        layer: Any = layer_class(base)  # type: ignore[arg-type]
        layer.create_lora_weights(SLOTS, config, None)
        for weight in layer.lora_a_stacked:  # sums that do not depend on the order of the kernel's atomic additions
            generator = torch.Generator().manual_seed(len(made))
            weight[:] = lora_model.lora_a(RANK, weight.shape[-1], False, generator).to(weight)
        for weight in layer.lora_b_stacked:
            weight.normal_(std=0.1)
        layer.set_mapping(punica)
        made.append(layer)
    return made, punica


@contextlib.contextmanager
def engine(port_file: Path) -> Iterator[Any]:
    """vLLM's configuration, process groups of one rank, and the forward context of a step."""
    from vllm import envs
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context

    config = VllmConfig()
    envs.enable_envs_cache()  # as the engine does when it is up
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{port_file}", 0, "gloo")
        initialize_model_parallel(1, 1)
        with set_forward_context(None, config), torch.inference_mode():
            yield config


def compiled(layers: list[Any], inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """All four `apply` in one graph of Inductor's, for any number of tokens; called without Dynamo's guards."""
    kept: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        run = torch._dynamo.lookup_backend("inductor")(graph, example)

        def keep(*arguments: Any) -> Any:
            kept[:] = [run, arguments]
            return run(*arguments)

        return keep

    def forward(*given: torch.Tensor) -> list[torch.Tensor]:
        return [layer.apply(x) for layer, x in zip(layers, given, strict=True)]

    torch._dynamo.reset()
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 0)
    torch.compile(forward, backend=backend, fullgraph=True, dynamic=True)(*inputs)
    run, arguments = kept
    return lambda: run(*arguments)


class Overlaid:
    """The overlay's op for the four layers, and where it counts its calls."""

    def __init__(self, layers: list[Any]) -> None:
        from vllm.lora import layers as package

        from overlay.journal import PatchRecord
        from overlay.patches import lora_linear
        from overlay.side_work.plan import Plan
        from overlay.verdict import SourceTree, class_at, judge

        found = judge("lora_linear", SourceTree(Path(package.__file__).parents[3]))
        owners: list[Any] = [class_at(package, name) for name, _ in found.intercepted()]
        if not owners:
            raise RuntimeError(f"the overlay would not patch this vLLM: {found.reason}")
        self._originals = {owner: vars(owner)["apply"] for owner in owners}
        self._replaced = {owner: lora_linear.overlap_adapters(apply) for owner, apply in self._originals.items()}
        self.record = PatchRecord()
        lora_linear.register_op(self.record)
        self.overlaps = []
        for layer in layers:
            overlap, _ = lora_linear.make_overlap(layer, self._originals, Plan("dual", 256), self.record)
            setattr(layer, lora_linear.OVERLAP, overlap)
            self.overlaps.append(overlap)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In here the classes have the overlay's `apply`."""
        for owner, apply in self._replaced.items():
            owner.apply = apply
        try:
            yield
        finally:
            for owner, apply in self._originals.items():
                owner.apply = apply

    def keep_replays(self) -> Callable[[str], None]:
        """A function that sets the op for a way: `apply` does without what the layers have learned."""
        replays = [overlap._replay for overlap in self.overlaps]

        def prepare(way: str) -> None:
            for overlap, replay in zip(self.overlaps, replays, strict=True):
                overlap._replay = None if way == "apply" else replay

        return prepare


def issue(work: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Microseconds of the host per call; the GPU has nothing to do when the clock starts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begin) / calls * 1e6


def measure(
    ways: dict[str, Callable[[], Any]], calls: int, device: torch.device, prepare: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Medians, microseconds per call, the ways taking turns; `prepare` is called before the clock starts."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    gc.disable()
    try:
        for _ in range(SAMPLES + 2):
            for name, work in ways.items():
                if prepare is not None:
                    prepare(name)
                samples[name].append(issue(work, calls, device))
    finally:
        gc.enable()
    return {name: round(statistics.median(found[2:]), 2) for name, found in samples.items()}


def parts(layer: Any, x: torch.Tensor, punica: Any, device: torch.device) -> dict[str, float]:
    """What the single calls of one linear cost the host, microseconds."""
    from vllm.forward_context import get_forward_context
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    base, slices = layer.base_layer, len(layer.lora_a_stacked)
    output = base.quant_method.apply(base, x, None)
    turned = base.weight.t()
    buffer = torch.zeros(slices, x.shape[0], RANK, device=device)
    first, second = list(layer.lora_a_stacked), list(layer.lora_b_stacked)
    metadata = punica.token_mapping_meta
    arguments = metadata.meta_args(x.shape[0], False)
    flag = metadata.no_lora_flag_cpu
    shrink, expand = torch.ops.vllm.lora_shrink.default, torch.ops.vllm.lora_expand.default
    works: dict[str, Callable[[], Any]] = {
        "torch.mm(out=)": lambda: torch.mm(x, turned, out=output),
        "quant_method.apply": lambda: base.quant_method.apply(base, x, None),
        "torch.empty": lambda: torch.empty((slices, x.shape[0], RANK), dtype=torch.float32, device=device),
        "shrink, op": lambda: shrink(x, first, buffer, *arguments, 1.0),
        "shrink, function": lambda: lora_shrink_op._lora_shrink(x, first, buffer, *arguments, 1.0),
        "expand, op": lambda: expand(buffer, second, output, *arguments, 0, True),
        "expand, function": lambda: lora_expand_op._lora_expand(buffer, second, output, *arguments, 0, True),
        "meta_args": lambda: metadata.meta_args(x.shape[0], False),
        "flag on the host": flag.item,
        "get_forward_context": get_forward_context,
    }
    if device.type == "cuda":
        works["is_current_stream_capturing"] = torch.cuda.is_current_stream_capturing
    return measure(works, PART_CALLS, device)


def run(target: Path, cpu: bool) -> bool:
    """Measure, print a table, write JSON. Whether all ways gave the same bits, and the overlay replayed."""
    device = torch.device("cpu" if cpu else "cuda")
    if cpu:
        leave_out_kernels()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, engine(Path(folder, "rendezvous")):
        layers, punica = make_layers(SMALL if cpu else QWEN3_8B, device)
        overlaid = Overlaid(layers)
        for tokens in FEW_TOKENS if cpu else TOKENS:
            inputs = [
                torch.randn(tokens, layer.base_layer.weight.shape[1], device=device, dtype=torch.bfloat16)
                for layer in layers
            ]
            for adapter in (0, -1):
                punica.token_mapping_meta.prepare_tensors(torch.full((tokens,), adapter, device=device))
                rows.append(_row(layers, inputs, overlaid, device) | {"tokens": tokens, "adapter": adapter >= 0})
        punica.token_mapping_meta.prepare_tensors(torch.zeros(tokens, dtype=torch.long, device=device))
        single = parts(layers[0], inputs[0], punica, device)
    import vllm

    where = torch.cuda.get_device_name() if not cpu else "CPU, no kernels"
    found = {"vllm": vllm.__version__, "torch": torch.__version__, "where": where, "rows": rows, "parts": single}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1))
    print(table(found))
    return all(row["same_bits"] and row["replayed"] for row in rows)


def _row(layers: list[Any], inputs: list[torch.Tensor], overlaid: Overlaid, device: torch.device) -> dict[str, Any]:
    """All ways at one number of tokens, microseconds per linear."""

    def python() -> list[torch.Tensor]:
        return [layer.apply(x) for layer, x in zip(layers, inputs, strict=True)]

    stock = compiled(layers, inputs)
    with overlaid.applied():
        overlay = compiled(layers, inputs)
    ways = {"stock": stock, "overlay": overlay, "apply": overlay, "python": python}
    prepare, results = overlaid.keep_replays(), {}
    for name, work in ways.items():
        prepare(name)
        results[name] = work()
    same = all(
        torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
        for found in results.values()
        for mine, theirs in zip(found, results["stock"], strict=True)
    )
    times = measure(ways, PASSES, device, prepare)
    prepare("overlay")
    return {
        **{name: round(time / len(layers), 2) for name, time in times.items()},
        "same_bits": same,
        "replayed": all(overlap._replay is not None for overlap in overlaid.overlaps),
        "forked": overlaid.record.calls.dual_stream,
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"vLLM {found['vllm']}, torch {found['torch']}, {found['where']}; microseconds of the host per linear"]
    lines.append("tokens  adapter" + "".join(f"{way:>10}" for way in WAYS) + "  overlay - stock  apply - stock")
    for row in found["rows"]:
        line = f"{row['tokens']:6}  {'yes' if row['adapter'] else 'no':7}"
        line += "".join(f"{row[way]:10.1f}" for way in WAYS)
        line += f"{row['overlay'] - row['stock']:+17.1f}{row['apply'] - row['stock']:+15.1f}"
        line += "" if row["same_bits"] else "  BITS DIFFER"
        line += "" if row["replayed"] else "  NOT REPLAYED"
        lines.append(line)
    lines += ["", f"single calls, {found['rows'][-1]['tokens']} tokens, microseconds"]
    lines += [f"  {name:30}{time:8.2f}" for name, time in found["parts"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the JSON file to write")
    parser.add_argument("--cpu", action="store_true", help="without kernels, on a machine without a GPU")
    options = parser.parse_args()
    return 0 if run(options.target, options.cpu) else 1


if __name__ == "__main__":
    sys.exit(main())
