"""The GDN layer of a released vLLM, small enough to run here: upstream's methods, surroundings of our own.

The methods are compiled from the release's file with its name and line numbers, so that a traceback shows upstream's
lines. What they call outside their class is replaced: linears, norm, and the attention core's custom ops.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from .released import releases, tree

torch = pytest.importorskip("torch")

HIDDEN = 16
#: The attribute that holds a layer's pair: `overlay.side_work.waiting.PAIR`, which needs vLLM.
PAIR = "_overlay_pair"
START, START_LAYER, JOIN = "start", "start_layer", "join"

# ---------------------------------------------------------------------------------------------- the surroundings

#: Which projections ran since the last `clear()`. Filled where the weight is used, so a compiled run counts too.
ran: list[str] = []


@torch.library.custom_op("vllm_contract::projection", mutates_args=())
def _projection(states: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    ran.append(name)
    return states @ weight.t()


@_projection.register_fake
def _(states: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    return states.new_empty((*states.shape[:-1], weight.shape[0]))


@torch.library.custom_op("vllm_contract::core", mutates_args=("out",))
def _core(mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
    """Some function of every element of its inputs: an exchanged or stale input shows in the result."""
    tokens, heads, dimension = out.shape
    value = mixed_qkv[:, -heads * dimension :].reshape(out.shape)
    gate, decay = b.reshape(tokens, heads, 1), a.reshape(tokens, heads, 1)
    out.copy_(value * gate + decay + mixed_qkv.sum(-1).reshape(tokens, 1, 1))


@torch.library.custom_op("vllm_contract::core_from_packed", mutates_args=("z", "out"))
def _core_from_packed(qkvz: torch.Tensor, ba: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> None:
    _, heads, dimension = out.shape
    z.copy_(qkvz[:, -heads * dimension :].reshape(z.shape))
    b, a = ba.chunk(2, dim=-1)
    _core(qkvz[:, : -heads * dimension], b.contiguous(), a.contiguous(), out)


class UpstreamOps:
    """Stands where upstream's methods say `torch.ops.vllm`; the signatures are those of all supported releases."""

    @staticmethod
    def gdn_attention_core(
        first: torch.Tensor,
        second: torch.Tensor,
        third: torch.Tensor,
        core_attn_out: torch.Tensor,
        layer_name: object,
        fast_kernel: bool = False,
        use_aiter: bool = False,
    ) -> None:
        if fast_kernel or use_aiter:
            torch.ops.vllm_contract.core_from_packed(first, second, third, core_attn_out)
        else:
            torch.ops.vllm_contract.core(first, second, third, core_attn_out)

    @staticmethod
    def gdn_input_gemms(states: torch.Tensor, layer_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What vLLM #56530 adds: both projections in one op, which finds their layer by its name."""
        from vllm.forward_context import get_forward_context

        layer: Any = get_forward_context().no_compile_layers[layer_name]
        return layer.in_proj_qkvz(states)[0], layer.in_proj_ba(states)[0]

    qwen_gdn_attention_core = gdn_attention_core
    cpu_gdn_attention_core = gdn_attention_core

    @staticmethod
    def qwen_gdn_attention_core_fused_norm_packed(
        mixed_qkvz: torch.Tensor, ba: torch.Tensor, core_attn_out: torch.Tensor, layer_name: object
    ) -> None:
        z = torch.empty_like(core_attn_out)
        torch.ops.vllm_contract.core_from_packed(mixed_qkvz, ba, z, core_attn_out)


class Projection(torch.nn.Module):
    """A linear layer as vLLM's: gives (result, bias) and knows its size per tensor-parallel shard."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.name = name
        self.output_size_per_partition = outputs
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs, dtype=torch.bfloat16))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.vllm_contract.projection(states, self.weight, self.name), None


class GatedNorm(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size, dtype=torch.bfloat16))

    def forward(self, states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normal = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normal * self.weight * torch.nn.functional.silu(gate)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the real layer's `__init__` decides before the method runs."""

    interleaved: bool
    tp_size: int = 1
    #: 0.22 and later keep `in_proj_ba` whole on every rank for some quantizations.
    replicated_ba: bool = False
    #: 0.28 and later hand both results packed to one kernel.
    fused_core: bool = False
    #: ROCm's fast kernel; without it `forward_hip` calls `forward_cuda`.
    aiter: bool = True
    #: 0.19 and 0.20 under LoRA: separate `in_proj_qkv` and `in_proj_z`.
    split_projections: bool = False

    def __str__(self) -> str:
        words = ["interleaved" if self.interleaved else "flat"]
        words += [f"tp{self.tp_size}"] if self.tp_size > 1 else []
        words += [field for field in ("replicated_ba", "fused_core", "split_projections") if getattr(self, field)]
        return "+".join([*words, *([] if self.aiter else ["no_aiter"])])


class LayerBase(torch.nn.Module):
    """The attributes that upstream's methods read. Each released class is derived from it."""

    def __init__(self, shape: Shape, method: str) -> None:
        super().__init__()
        torch.manual_seed(20)
        self.prefix = "model.layers.3.linear_attn"
        self.tp_size, self.tp_rank = shape.tp_size, shape.tp_size - 1
        self.num_k_heads, self.num_v_heads, self.head_k_dim, self.head_v_dim = 4, 8, 6, 10
        self.key_dim = self.num_k_heads * self.head_k_dim
        self.value_dim = self.num_v_heads * self.head_v_dim
        self.gqa_interleaved_layout = shape.interleaved
        self.disable_tp_for_ba_proj = shape.replicated_ba
        self.enable_fused_gdn_decode = self.enable_fused_gdn_spec_decode = shape.fused_core
        qkv_size, z_size = (2 * self.key_dim + self.value_dim) // self.tp_size, self.value_dim // self.tp_size
        ba_size = 2 * self.num_v_heads // (1 if shape.replicated_ba else self.tp_size)
        if shape.split_projections:
            self.in_proj_qkv = Projection("qkv", HIDDEN, qkv_size)
            self.in_proj_z = Projection("z", HIDDEN, z_size)
        else:
            self.in_proj_qkvz = Projection("qkvz", HIDDEN, qkv_size + z_size)
        self.in_proj_ba = Projection("ba", HIDDEN, ba_size)
        self.norm = GatedNorm(self.head_v_dim)
        self.out_proj = Projection("out", z_size, HIDDEN)
        self._forward_method = None if method == "forward" else getattr(self, method)


# ---------------------------------------------------------------------------------------------- the released class


class _OpsOfOurOwn(ast.NodeTransformer):
    """`torch.ops.vllm` → `upstream_ops`."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node) == "torch.ops.vllm":
            return ast.copy_location(ast.Name("upstream_ops", ast.Load()), node)
        return node


def needed_methods(class_node: ast.ClassDef, first: str) -> list[ast.FunctionDef]:
    """`forward`, the method under test, and every method that they reach through `self`."""
    methods = {item.name: item for item in class_node.body if isinstance(item, ast.FunctionDef)}
    needed, waiting = set(), ["forward", first]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in needed:
            needed.add(name)
            waiting += [node.attr for node in ast.walk(methods[name]) if isinstance(node, ast.Attribute)]
    return [methods[name] for name in methods if name in needed]


def compile_class(class_node: ast.ClassDef, method: str, path: str, aiter: bool) -> type[LayerBase]:
    """The released class with the methods under test on top of `LayerBase`, in a module of its own."""
    body: list[ast.stmt] = [_OpsOfOurOwn().visit(copy.deepcopy(item)) for item in needed_methods(class_node, method)]
    code = ast.ClassDef(
        name=class_node.name,
        bases=[ast.Name("LayerBase", ast.Load())],
        keywords=[],
        body=body,
        decorator_list=[],
        type_params=[],
    )
    ast.copy_location(code, class_node)
    module = types.ModuleType(f"released_gdn_{len(_modules)}")
    module.__dict__.update(
        torch=torch,
        LayerBase=LayerBase,
        rearrange=rearrange,
        upstream_ops=UpstreamOps,
        _encode_layer_name=str,
        GDN_AITER_TRITON_AVAILABLE=aiter,
    )
    # Dynamo finds a function's globals by the name of its module.
    sys.modules[module.__name__] = module
    _modules.append(module.__name__)
    program = ast.fix_missing_locations(ast.Module(body=[code], type_ignores=[]))
    annotations_stay_text = __future__.annotations.compiler_flag
    exec(compile(program, path, "exec", flags=annotations_stay_text), module.__dict__)
    released = module.__dict__[class_node.name]
    assert isinstance(released, type)
    return released


_modules: list[str] = []


def forget_modules() -> None:
    while _modules:
        sys.modules.pop(_modules.pop(), None)


def rearrange(tensor: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """The two patterns of the forwards; einops is not worth a dependency."""
    if pattern in ("l p d -> l (p d)", "... h d -> ... (h d)"):
        return tensor.flatten(-2)
    raise NotImplementedError(pattern)


# ---------------------------------------------------------------------------------------------- the overlay


def _stand_in_for_vllm() -> dict[str, types.ModuleType]:
    """The modules of vLLM that overlay/patches/gdn/patch.py imports, for a Python that has torch only.

    The custom op's registration and the layer name's type are upstream's own, taken from a release's sources.
    """
    names = (
        "vllm",
        "vllm.envs",
        "vllm.config",
        "vllm.forward_context",
        "vllm.model_executor",
        "vllm.model_executor.layers",
        "vllm.model_executor.layers.linear",
        "vllm.model_executor.layers.utils",
        "vllm.platforms",
        "vllm.utils",
        "vllm.utils.torch_utils",
    )
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    current: list[Any] = [None]

    @contextlib.contextmanager
    def override_forward_context(context: Any) -> Iterator[None]:
        current[0] = context
        try:
            yield
        finally:
            current[0] = None

    modules["vllm.envs"].__dict__.update(VLLM_USE_LAYERNAME=True, VLLM_BATCH_INVARIANT=False)
    modules["vllm.config"].__dict__.update(get_current_vllm_config=None)
    modules["vllm.forward_context"].__dict__.update(
        get_forward_context=lambda: current[0], override_forward_context=override_forward_context
    )
    linears = ("ColumnParallelLinear", "MergedColumnParallelLinear", "ReplicatedLinear")
    modules["vllm.model_executor.layers.linear"].__dict__.update({name: type(name, (), {}) for name in linears})
    modules["vllm.model_executor.layers.utils"].__dict__.update(dispatch_unquantized_gemm=None)
    modules["vllm.platforms"].__dict__.update(current_platform=types.SimpleNamespace(dispatch_key="CPU"))
    modules["vllm.utils.torch_utils"].__dict__.update(
        torch=torch,
        envs=modules["vllm.envs"],
        Library=torch.library.Library,
        infer_schema=torch.library.infer_schema,
        HAS_OPAQUE_TYPE=importlib.util.find_spec("torch._library.opaque_object") is not None,
        TYPE_CHECKING=False,
    )
    return modules


#: Top-level code of vllm/utils/torch_utils.py that the stand-in runs, by what it defines or mentions.
_LAYER_NAME_CODE = (
    "_USE_LAYERNAME",
    "OpaqueBase",
    "LayerName",
    "register_opaque_type",
    "LayerNameType",
    "_resolve_layer_name",
    "_encode_layer_name",
    "direct_register_custom_op",
)


def _run_layer_name_code(module: types.ModuleType) -> None:
    source = tree("0.32.0").read("vllm.utils.torch_utils")
    assert source is not None
    body = [statement for statement in source.parse().body if _defines(statement) & set(_LAYER_NAME_CODE)]
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(body, []), source.path, "exec", flags=flags), module.__dict__)


def _defines(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.name for node in ast.walk(statement) if isinstance(node, ast.alias)}


@contextlib.contextmanager
def overlay_patch() -> Iterator[types.ModuleType]:
    """overlay.patches.gdn.patch with its ops defined, on the installed vLLM or, where there is none, on stand-ins."""
    stand_ins = {} if importlib.util.find_spec("vllm") else _stand_in_for_vllm()
    sys.modules.update(stand_ins)
    if stand_ins:
        _run_layer_name_code(stand_ins["vllm.utils.torch_utils"])
    try:
        patch = importlib.import_module("overlay.patches.gdn.patch")
        importlib.import_module("overlay.side_work.ops").define(declares_writes=True)
        yield patch
    finally:
        forget_modules()
        if stand_ins:
            ours = [name for name in sys.modules if name.startswith(("overlay.patches.", "overlay.side_work."))]
            for name in [*stand_ins, *ours]:
                sys.modules.pop(name, None)


def intercept(patch: types.ModuleType, released: type[LayerBase], methods: tuple[str, ...] | None = None) -> None:
    """What the overlay does to the class, before any instance exists: to these methods of a verdict, or to the released
    forwards that have both projections. Which those are, test_gdn_verdict pins."""
    forwards = ("forward", "forward_cuda", "forward_hip", "forward_cpu") if methods is None else methods
    for name in forwards:
        method = released.__dict__.get(name)
        if method is not None and {"in_proj_qkvz", "in_proj_ba"} <= set(method.__code__.co_names):
            setattr(released, name, patch.PROJECTIONS.intercept(released.__dict__[name]))


def attach(patch: types.ModuleType, layer: LayerBase, plain: bool = False) -> Any:
    """What the overlay does to an instance; gives the record in which its ops' calls are counted.

    A `plain` side is a GEMM of its weight, which start runs; else start calls the projection.
    """
    from overlay.report.journal import PatchRecord
    from overlay.side_work import ops
    from overlay.side_work.pairs import Pair
    from overlay.side_work.plan import Plan

    qkvz, ba = patch.PROJECTIONS.sizes(layer).values()
    layer.in_proj_qkvz.input_size = HIDDEN
    pair = Pair(layer.prefix, layer.in_proj_qkvz, layer.in_proj_ba, qkvz, ba, "main", "side", "weight", plain)
    record = PatchRecord()
    ops.planned[pair.name] = ops.PlannedPair(Plan("dual", 256), record)
    setattr(layer, PAIR, pair)
    return record


# ---------------------------------------------------------------------------------------------- running


@dataclasses.dataclass
class Run:
    """What a layer gave for each input, and what happened meanwhile."""

    outputs: list[torch.Tensor] = dataclasses.field(default_factory=list)
    projections: list[list[str]] = dataclasses.field(default_factory=list)
    op_calls: list[int] = dataclasses.field(default_factory=list)
    graphs: list[list[str]] = dataclasses.field(default_factory=list)


def inputs() -> list[torch.Tensor]:
    """Two batches of different size: a compiled layer must take both with one graph, as vLLM asks of it."""
    torch.manual_seed(7)
    return [torch.randn(tokens, HIDDEN, dtype=torch.bfloat16) for tokens in (5, 3)]


def run(layer: LayerBase, backend: str | None, record: Any = None) -> Run:
    """Calls a layer for each of `inputs()`, plainly or compiled as one graph."""
    from vllm.forward_context import override_forward_context

    result = Run()

    def record_graph(graph_module: Any, example_inputs: Any) -> Any:
        calls = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
        result.graphs.append([str(target).removesuffix(".default") for target in calls])
        assert backend is not None
        return torch._dynamo.lookup_backend(backend)(graph_module, example_inputs)

    call: Any = layer
    if backend is not None:
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, backend=record_graph)
    takes_output = "output" in inspect.signature(type(layer).forward).parameters
    context = types.SimpleNamespace(no_compile_layers={layer.prefix: layer})
    with torch.no_grad(), override_forward_context(context):  # type: ignore[arg-type]
        for states in inputs():
            ran.clear()
            before = record.calls.total() if record is not None else 0
            given = states.clone()
            if backend is not None:
                torch._dynamo.mark_dynamic(given, 0)
            if takes_output:
                output = torch.zeros_like(given)
                if backend is not None:
                    torch._dynamo.mark_dynamic(output, 0)
                call(given, output)
            else:
                output = call(given)
            assert torch.equal(given, states), "the layer changed its input"
            result.outputs.append(output)
            result.projections.append(list(ran))
            result.op_calls.append(record.calls.total() - before if record is not None else 0)
    return result


def class_of(path_and_text: tuple[str, str], class_name: str) -> ast.ClassDef:
    path, text = path_and_text
    for node in ast.parse(text, path).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    raise LookupError(f"no class {class_name} in {path}")


__all__ = ["Run", "Shape", "attach", "class_of", "compile_class", "intercept", "overlay_patch", "releases", "run"]
