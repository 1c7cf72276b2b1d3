"""The LoRA linears of a released vLLM, small enough to run here: upstream's `apply`, surroundings of our own.

The methods and functions are compiled from the release's files with their names and line numbers. What they call outside
is replaced: the linears, and a punica wrapper that computes and rounds as upstream's kernels do.
"""

from __future__ import annotations
import __future__

import ast
import functools
import pathlib
import types
from collections.abc import Callable
from typing import Any

import torch

from .released import tree

FEATURES, MAX_RANK = 12, 4
COLUMN, MERGED, ROW, REPLICATED = (
    f"{kind}WithLoRA"
    for kind in ("ColumnParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear")
)
CLASSES = (COLUMN, MERGED, ROW, REPLICATED)
FILES = ("base_linear", "column_parallel_linear", "row_parallel_linear", "replicated_linear")
NOT_NEEDED = frozenset({"__init__", "_init_lora_stream_context", "_apply_async_impl"})

# ------------------------------------------------------------------------------------------------ the surroundings


class Quantization:
    """Stands where vLLM has a linear's method. Some columns are negative zeros, whose sign an addition may lose."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        output = torch.nn.functional.linear(x, layer.weight, bias)
        output[..., ::5] = -0.0
        return output


class Linear(torch.nn.Module):
    """A base layer with what the LoRA layers and the overlay ask of vLLM's."""

    def __init__(self, columns: int, prefix: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(columns)
        self.prefix = prefix
        self.weight = torch.nn.Parameter(
            torch.randn(columns, FEATURES, generator=generator).bfloat16(), requires_grad=False
        )
        self.bias: torch.Tensor | None = None
        self.output_size = self.output_size_per_partition = columns
        self.quant_method = type("UnquantizedLinearMethod", (Quantization,), {})()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.quant_method.apply(self, x, self.bias), None


class LinearWithItsOwnForward(Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x)[0] * 2, None


class Punica:
    """A punica wrapper for (tokens, columns), which rounds where upstream's Triton kernels round.

    `adapters` has an adapter's index for each token, or -1 for none.
    """

    def __init__(self, adapters: list[int]) -> None:
        self.adapters = adapters
        no_adapter = all(adapter < 0 for adapter in adapters)
        self.token_mapping_meta = types.SimpleNamespace(no_lora_flag_cpu=torch.tensor([no_adapter]))
        self.calls = 0

    def add_shrink(
        self, buffer: torch.Tensor, x: torch.Tensor, stacked: tuple[torch.Tensor, ...], scale: float
    ) -> None:
        if self.token_mapping_meta.no_lora_flag_cpu.item():
            return
        buffer.zero_()
        for token, adapter in enumerate(self.adapters):
            for piece, weight in enumerate(stacked):
                if adapter >= 0:
                    buffer[piece, token] = (weight[adapter, 0].float() @ x[token].float()) * scale

    def add_expand(
        self,
        output: torch.Tensor,
        buffer: torch.Tensor,
        stacked: tuple[torch.Tensor, ...],
        slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_kwargs: Any,
    ) -> None:
        self.calls += 1
        for token, adapter in enumerate(self.adapters):
            start = offset_start
            for piece, (weight, columns) in enumerate(zip(stacked, slices, strict=True)):
                if adapter >= 0:
                    rank = weight.shape[-1]  # a gathered buffer is wider
                    product = weight[adapter, 0].float() @ buffer[piece, token, :rank].to(weight.dtype).float()
                    output[token, start : start + columns] += product.to(weight.dtype)
                start += columns

    def add_lora_linear(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        a: tuple[torch.Tensor, ...],
        b: tuple[torch.Tensor, ...],
        scale: float,
        slices: tuple[int, ...],
    ) -> None:
        buffer = torch.empty(len(slices), x.shape[0], b[0].shape[-1])
        self.add_shrink(buffer, x, a, scale)
        self.add_expand(output, buffer, b, slices)


# ------------------------------------------------------------------------------------------------ the released classes


def _kept(statement: ast.stmt) -> ast.stmt | None:
    """A LoRA class with its `apply` and helpers only; a function that works on such a class."""
    if isinstance(statement, ast.FunctionDef) and statement.name == "_mcp_apply":
        return statement
    if not isinstance(statement, ast.ClassDef) or not statement.name.endswith("LoRA"):
        return None
    statement.body = [
        item
        for item in statement.body
        if isinstance(item, ast.FunctionDef)
        and item.name not in NOT_NEEDED
        and (item.name == "apply" or item.name.startswith("_"))
    ] or [ast.Pass()]
    return statement


@functools.cache
def code_of(version: str) -> tuple[Any, ...]:
    """The compiled statements of a release, file by file."""
    compiled = []
    for name in FILES:
        path = pathlib.Path(tree(version).folder, "vllm", "lora", "layers", f"{name}.py")
        parsed = ast.parse(path.read_text("utf-8"), str(path))
        body = [kept for statement in parsed.body if (kept := _kept(statement)) is not None]
        module = ast.fix_missing_locations(ast.Module(body, []))
        compiled.append(compile(module, str(path), "exec", flags=__future__.annotations.compiler_flag))
    return tuple(compiled)


def classes_of(version: str, tp_size: int = 1) -> dict[str, type]:
    """Fresh classes of a release by name, in surroundings of their own."""

    def all_gather(buffer: torch.Tensor) -> torch.Tensor:
        return torch.cat([buffer] * tp_size, dim=-1)

    space: dict[str, Any] = {
        "__name__": f"released_lora_{version}",
        "torch": torch,
        "BaseLayerWithLoRA": torch.nn.Module,
        "MergedColumnParallelLinear": Linear,
        "maybe_get_oot_by_class": lambda found: found,
        "current_platform": types.SimpleNamespace(can_update_inplace=lambda: True),
        "is_forward_context_available": lambda: True,
        "tensor_model_parallel_all_gather": all_gather,
        "tensor_model_parallel_all_reduce": lambda buffer: buffer,
    }
    for code in code_of(version):
        exec(code, space)
    return {name: found for name, found in space.items() if isinstance(found, type) and name.endswith("LoRA")}


def make_layer(
    released: dict[str, type],
    name: str,
    adapters: list[int],
    linear: Callable[[int, str], Linear] = Linear,
    tp_size: int = 1,
) -> Any:
    """A LoRA layer of a released class with three adapters, of ranks 4, 2 and 1."""
    slices = (10, 5, 5) if name == MERGED else (20,)
    layer: Any = object.__new__(released[name])
    torch.nn.Module.__init__(layer)
    layer.base_layer = linear(sum(slices), f"model.layers.0.{name}")
    layer.output_slices, layer.n_slices, layer.tp_size = slices, len(slices), tp_size
    layer._enable_aux_cuda_stream = False
    layer.lora_config = types.SimpleNamespace(fully_sharded_loras=False)
    generator = torch.Generator().manual_seed(3)
    layer.lora_a_stacked = tuple(torch.randn(3, 1, MAX_RANK, FEATURES, generator=generator).bfloat16() for _ in slices)
    layer.lora_b_stacked = tuple(torch.randn(3, 1, size, MAX_RANK, generator=generator).bfloat16() for size in slices)
    for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
        for weight in stacked:  # an adapter of a smaller rank is padded with zeros
            padded = weight if weight.shape[-1] == MAX_RANK else weight.transpose(-1, -2)
            padded[1, ..., 2:] = padded[2, ..., 1:] = 0
    layer.punica_wrapper = Punica(adapters)
    return layer
