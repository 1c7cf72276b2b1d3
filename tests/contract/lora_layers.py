"""The LoRA linears of a released vLLM, small enough to run here: upstream's `apply`, surroundings of our own.

The methods and functions are compiled from the release's files with their names and line numbers, those of the GPU's punica
wrapper and of its metadata, too. What they call outside is replaced: the linears, and the two LoRA ops, which compute and round
as upstream's kernels do.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import itertools
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from .released import tree

FEATURES, MAX_RANK, SLOTS, ROWS = 12, 4, 3, 16
COLUMN, MERGED, ROW, REPLICATED = (
    f"{kind}WithLoRA"
    for kind in ("ColumnParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear")
)
CLASSES = (COLUMN, MERGED, ROW, REPLICATED)
FILES = ("base_linear", "column_parallel_linear", "row_parallel_linear", "replicated_linear")
PUNICA_FILE = ("punica_wrapper", "punica_gpu.py")
METADATA_FILE = ("ops", "triton_ops", "lora_kernel_metadata.py")
NOT_NEEDED = frozenset({"__init__", "_init_lora_stream_context", "_apply_async_impl"})

_numbers = itertools.count()

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


class Kernels:
    """Upstream's two LoRA ops on a CPU: its names and arguments; computed and rounded as its Triton kernels do."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def shrink(self, inputs: Any, weights: Any, output: Any, adapters: Any, *rest: Any) -> None:
        no_lora, scaling = rest[-3], rest[-1]
        self.calls.append("shrink")
        assert isinstance(weights, list) and len(adapters) == len(inputs) == output.shape[1]
        assert len(weights) == len(output) and output.is_contiguous()
        if no_lora.item():
            return
        output.zero_()
        for token, adapter in enumerate(adapters.tolist()):
            for piece, weight in enumerate(weights):
                if adapter >= 0:
                    output[piece, token] = (weight[adapter, 0].float() @ inputs[token].float()) * scaling

    def expand(self, inputs: Any, weights: Any, output: Any, adapters: Any, *rest: Any) -> None:
        no_lora, start, add = rest[4], *([*rest[6:], 0, False][:2])
        self.calls.append("expand")
        assert isinstance(weights, list) and len(adapters) == inputs.shape[1] == len(output) and add
        if no_lora.item():
            return
        for token, adapter in enumerate(adapters.tolist()):
            column = start
            for piece, weight in enumerate(weights):
                columns, rank = weight.shape[2:]  # a gathered buffer is wider than the rank
                if adapter >= 0:
                    product = weight[adapter, 0].float() @ inputs[piece, token, :rank].to(weight.dtype).float()
                    output[token, column : column + columns] += product.to(weight.dtype)
                column += columns


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
def parsed(version: str) -> tuple[ast.Module, ...]:
    """What is kept of a release, file by file: its layers, the GPU's punica wrapper, and the metadata of its kernels."""
    folder = pathlib.Path(tree(version).folder, "vllm", "lora")
    modules = []
    for name in FILES:
        statements = ast.parse(folder.joinpath("layers", f"{name}.py").read_text("utf-8")).body
        body = [kept for statement in statements if (kept := _kept(statement)) is not None]
        modules.append(ast.fix_missing_locations(ast.Module(body, [])))
    (wrapper,) = (
        statement
        for statement in ast.parse(folder.joinpath(*PUNICA_FILE).read_text("utf-8")).body
        if isinstance(statement, ast.ClassDef) and statement.name == "PunicaWrapperGPU"
    )
    wanted = {"add_shrink", "add_expand", "add_lora_linear"}
    wrapper.body = [item for item in wrapper.body if isinstance(item, ast.FunctionDef) and item.name in wanted]
    assert len(wrapper.body) == len(wanted)
    wrapper.bases, wrapper.decorator_list = [], []
    modules.append(ast.fix_missing_locations(ast.Module([wrapper], [])))
    return (*modules, ast.parse(folder.joinpath(*METADATA_FILE).read_text("utf-8")))


def shape_of(version: str) -> str:
    """What is kept of a release as text, without what says nothing: comments, documentation, types."""
    dumps = []
    for kept in parsed(version)[:-1]:
        module = copy.deepcopy(kept)
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef):
                node.returns = None
                for argument in (*node.args.args, *node.args.kwonlyargs, node.args.kwarg):
                    if argument is not None:
                        argument.annotation = None
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        dumps.append(ast.unparse(module))
    return "\n".join(dumps)


@functools.cache
def code_of(version: str) -> tuple[Any, ...]:
    """The compiled statements of a release, file by file, with types as text."""
    flags = __future__.annotations.compiler_flag
    *modules, metadata = parsed(version)
    compiled = [compile(module, f"{version}/{number}.py", "exec", flags=flags) for number, module in enumerate(modules)]
    return (*compiled, compile(metadata, f"{version}/metadata.py", "exec"))


def module_of(name: str, **content: Any) -> dict[str, Any]:
    """The globals of a fresh module. A real one, because Dynamo looks a function's globals up by the name of its module."""
    module = types.ModuleType(f"{name}_{next(_numbers)}")
    sys.modules[module.__name__] = module
    vars(module).update(content)
    return vars(module)


def classes_of(version: str, tp_size: int = 1) -> dict[str, type]:
    """Fresh classes of a release by name, in surroundings of their own."""

    def all_gather(buffer: torch.Tensor) -> torch.Tensor:
        return torch.cat([buffer] * tp_size, dim=-1)

    space = module_of(
        "released_lora",
        torch=torch,
        BaseLayerWithLoRA=torch.nn.Module,
        MergedColumnParallelLinear=Linear,
        maybe_get_oot_by_class=lambda found: found,
        current_platform=types.SimpleNamespace(can_update_inplace=lambda: True),
        is_forward_context_available=lambda: True,
        tensor_model_parallel_all_gather=all_gather,
        tensor_model_parallel_all_reduce=lambda buffer: buffer,
    )
    for code in code_of(version)[: len(FILES)]:
        exec(code, space)
    return {name: found for name, found in space.items() if isinstance(found, type) and name.endswith("LoRA")}


def punica_of(version: str, specialize: bool = False) -> Any:
    """A release's GPU punica wrapper on a CPU, in a module of its own; it calls the ops of the installed vLLM."""
    space = module_of(
        "released_punica", torch=torch, lora_shrink=torch.ops.vllm.lora_shrink, lora_expand=torch.ops.vllm.lora_expand
    )
    for code in reversed(code_of(version)[len(FILES) :]):
        exec(code, space)
    wrapper = object.__new__(space["PunicaWrapperGPU"])
    wrapper.token_mapping_meta = space["LoRAKernelMeta"].make(SLOTS, ROWS, "cpu")
    wrapper.lora_config = types.SimpleNamespace(specialize_active_lora=specialize)
    return wrapper


def make_layer(
    released: dict[str, type],
    name: str,
    wrapper: Any,
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
    layer.punica_wrapper = wrapper
    return layer
