"""The attention of vLLM 0.20.0's DeepSeek-V4, small enough to run here: upstream's methods, surroundings of our own.

As in `gdn_layer`: forward, attention_impl, the op's function, the indexer's and the compressor's forward are compiled from
the release's files. Linears, norms, caches and kernels are replaced; each replacement keeps what it was given, so that
a missing, exchanged or stale tensor shows even where the output would not.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

import pytest

from overlay.patches.registry import judge
from overlay.settings import Settings

from .released import tree

torch = pytest.importorskip("torch")

VERSION = "0.20.0"
ATTENTION, COMPRESSOR = (
    "vllm.model_executor.layers.deepseek_v4_attention",
    "vllm.model_executor.layers.deepseek_compressor",
)
STREAMS = "vllm.utils.multi_stream_utils"
HIDDEN, Q_LORA, HEAD, HEADS, PADDED, GROUPS, O_LORA, INDEX_HEADS, INDEX_HEAD = 16, 8, 6, 2, 4, 2, 3, 5, 4
KINDS = {"sliding window": 1, "compressor": 128, "compressor and indexer": 4}

#: The GEMMs that ran since the last `clear()`, in order.
ran: list[str] = []
#: What the replaced kernels and caches were given.
seen: list[tuple[str, torch.Tensor]] = []
#: Whether upstream's metadata is there; without it a step is a dummy run.
context: dict[str, Any] = {}


class UnquantizedLinearMethod:
    """By this name the overlay knows a plain linear."""

    def __init__(self) -> None:
        def default_unquantized_gemm() -> None: ...

        self._gemm_impl = default_unquantized_gemm


class Linear(torch.nn.Module):
    """A linear as vLLM's; `weight` is what the compressor's GEMM takes."""

    def __init__(self, name: str, inputs: int, outputs: int, return_bias: bool = True) -> None:
        super().__init__()
        self.name, self.return_bias = name, return_bias
        self.output_size = self.output_size_per_partition = outputs
        self.quant_method = UnquantizedLinearMethod()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs, dtype=torch.bfloat16))

    def forward(self, states: torch.Tensor) -> Any:
        result = torch.ops.vllm_contract_v4.linear(states, self.weight, self.name)
        return (result, None) if self.return_bias else result


def released_function(name: str) -> Any:
    """A function of the released module that is there when it is called."""

    def call(*given: Any) -> Any:
        return getattr(context["attention"], name)(*given)

    return call


def _registered() -> None:
    """The replaced linear and upstream's op, as ops that Dynamo does not look into."""
    library = torch.library.Library("vllm_contract_v4", "DEF")
    library.define("linear(Tensor states, Tensor weight, str name) -> Tensor")
    library.define(
        "deepseek_v4_attention(Tensor hidden_states, Tensor qr, Tensor kv, Tensor positions, Tensor(a!) out, str name) -> ()"
    )

    def linear(states: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
        ran.append(name)
        return states @ weight.t()

    library.impl("linear", linear, "CPU")
    library.impl("linear", lambda states, weight, name: states.new_empty((states.shape[0], weight.shape[0])), "Meta")
    library.impl("deepseek_v4_attention", released_function("deepseek_v4_attention"), "CPU")
    library.impl("deepseek_v4_attention", released_function("deepseek_v4_attention_fake"), "Meta")
    _libraries.append(library)


_libraries: list[Any] = []
_registered()


class UpstreamOps:
    """Stands where upstream's forward says `torch.ops.vllm`."""

    deepseek_v4_attention = staticmethod(torch.ops.vllm_contract_v4.deepseek_v4_attention)

    @staticmethod
    def deepseek_v4_fp8_einsum(states: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
        rest[1].copy_(torch.einsum("tgd,gdo->tgo", states.float(), weight.float()) * scale.float())


# ---------------------------------------------------------------------------------------------- the surroundings


def keep(name: str, *tensors: torch.Tensor | None) -> None:
    seen.extend((name, tensor.clone()) for tensor in tensors if tensor is not None)


class Kernel:
    """A Triton kernel that only keeps the tensors of its first arguments."""

    def __init__(self, name: str, tensors: tuple[int, ...]) -> None:
        self.name, self.tensors = name, tensors

    def __getitem__(self, grid: object) -> Any:
        def launch(*arguments: Any, **_: Any) -> None:
            keep(self.name, *[arguments[index] for index in self.tensors])

        return launch


def normed(qr: torch.Tensor, kv: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert qr.shape[0] == kv.shape[0] > 0, "the placeholder has come through to the norm"
    return qr * 0.5, kv * 0.25


def quantized_query(
    positions: torch.Tensor, q: torch.Tensor, cache: Any, weights: torch.Tensor, *_: Any, **__: Any
) -> Any:
    keep("indexer weights", weights)
    return q * 2, weights * positions[:, None]


def without_rope(o: torch.Tensor, positions: torch.Tensor, *_: Any, n_groups: int, **__: Any) -> Any:
    grouped = o.reshape(o.shape[0], n_groups, -1)
    return grouped, (positions.reshape(-1, 1, 1) + 1).to(o.dtype)


class LayerBase(torch.nn.Module):
    """Upstream's wrapper after its `__init__`, for one kind of layer."""

    def __init__(self, ratio: int, number: int = 2) -> None:
        super().__init__()
        torch.manual_seed(20 + number)
        attention, compressor = context["attention"], context["compressor"]
        self.layer_name = f"model.layers.{number}.attn.deepseek_v4_multi_head_latent_attention"
        self.q_lora_rank, self.head_dim, self.padded_heads, self.n_local_heads = Q_LORA, HEAD, PADDED, HEADS
        self.n_local_groups, self.nope_head_dim, self.rope_head_dim, self.o_lora_rank = GROUPS, 4, 2, O_LORA
        self.eps, self._tma_aligned_scales, self._einsum_recipe, self.aux_stream = 1e-6, False, (1, 1, 1), None
        self.ln_events = [None, None]
        self.rotary_emb = self.indexer_rotary_emb = types.SimpleNamespace(cos_sin_cache=torch.ones(1, 2))
        self.q_norm, self.kv_norm = torch.nn.LayerNorm(Q_LORA), torch.nn.LayerNorm(HEAD)
        self.fused_wqa_wkv = Linear("fused_wqa_wkv", HIDDEN, Q_LORA + HEAD)
        self.wq_b = Linear("wq_b", Q_LORA, HEADS * HEAD, return_bias=False)
        self.wo_a = Linear("wo_a", HEADS * HEAD // GROUPS, O_LORA)
        self.wo_a.weight_scale_inv = torch.ones(1)
        self.wo_a.weight = torch.nn.Parameter(torch.randn(GROUPS, HEADS * HEAD // GROUPS, O_LORA))
        self.wo_b = Linear("wo_b", GROUPS * O_LORA, HIDDEN, return_bias=False)
        self.compressor = compressor.DeepseekCompressor(f"{number}.kv", HEAD, ratio) if ratio > 1 else None
        self.indexer = attention.DeepseekV4Indexer(number) if ratio == 4 else None
        self.mla_attn = MainAttention(ratio)
        context["layers"][self.layer_name] = self

    def _fused_qnorm_rope_kv_insert(self, q: torch.Tensor, kv: torch.Tensor, positions: Any, metadata: Any) -> None:
        keep("kv insert", q, kv)


class MainAttention(torch.nn.Module):
    compress_ratio, max_model_len, window_size, max_num_batched_tokens = 1, 8, 2, 4

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.compress_ratio = ratio

    def forward(self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
        keep("attention", q, kv)
        output.copy_(q * kv[:, None, :].sum(-1, keepdim=True))


class IndexerBase(torch.nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.n_head, self.head_dim, self.softmax_scale, self.use_fp4_kv = INDEX_HEADS, INDEX_HEAD, 0.5, False
        self.wq_b = Linear("indexer wq_b", Q_LORA, INDEX_HEADS * INDEX_HEAD)
        self.weights_proj = Linear("weights_proj", HIDDEN, INDEX_HEADS)
        self.compressor = context["compressor"].DeepseekCompressor(f"{number}.indexer", INDEX_HEAD, 4)

    def indexer_op(self, hidden_states: torch.Tensor, q: torch.Tensor, k: Any, weights: torch.Tensor) -> torch.Tensor:
        keep("indexer op", hidden_states, q, weights)
        return q


class CompressorBase(torch.nn.Module):
    def __init__(self, name: str, head_dim: int, ratio: int) -> None:
        super().__init__()
        self.name, self.head_dim, self.compress_ratio, self.overlap = name, head_dim, ratio, ratio == 4
        self.coff = 1 + self.overlap
        self.rope_head_dim, self.rms_norm_eps, self.k_cache_prefix = 2, 1e-6, f"{name}.cache"
        self._quant_block = self._token_stride = self._scale_dim = self._num_warps = 1
        self.ape = torch.zeros(1, 1)
        self.fused_wkv_wgate = Linear(f"{name}.kv_score", HIDDEN, 2 * self.coff * head_dim, return_bias=False)
        self.fused_wkv_wgate.weight.gemm = f"{name}.kv_score"  # type: ignore[attr-defined]
        self.norm = torch.nn.LayerNorm(head_dim)
        self.state_cache = types.SimpleNamespace(prefix=f"{name}.state", kv_cache=torch.zeros(1, 1, 4))
        self._fused_kernel = Kernel(f"{name} compress", ())
        self._static_forward_context = {self.k_cache_prefix: types.SimpleNamespace(kv_cache=torch.zeros(1, 1, 1))}


GEMM_SOURCE = """
def cublas_gemm_bf16_bf16_fp32(x, weight):
    return count(x, weight)
"""


def kv_score_gemm() -> Any:
    """A GEMM that says which weight it ran for, with vLLM's own module as its home."""

    def count(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ran.append(weight.gemm)  # type: ignore[attr-defined]
        return x.float() @ weight.float().t()

    home: dict[str, Any] = {"__name__": "vllm.model_executor.layers.utils", "count": count}
    exec(GEMM_SOURCE, home)
    return home["cublas_gemm_bf16_bf16_fp32"]


# ---------------------------------------------------------------------------------------------- the released code


class _OpsOfOurOwn(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node) == "torch.ops.vllm":
            return ast.copy_location(ast.Name("upstream_ops", ast.Load()), node)
        return node


def _compiled(module: types.ModuleType, name: str, wanted: dict[str, tuple[str, tuple[str, ...]] | None]) -> None:
    """Put top-level functions (None) and methods (base class, names) of a released module into `module`."""
    source = tree(VERSION).read(name)
    assert source is not None
    body: list[ast.stmt] = []
    for node in copy.deepcopy(source.parse().body):
        chosen = wanted.get(getattr(node, "name", ""), False)
        if chosen is False:
            continue
        if chosen is not None:
            assert isinstance(node, ast.ClassDef)
            base, methods = chosen  # type: ignore[misc]
            node.bases, node.decorator_list = [ast.Name(base, ast.Load())], []
            node.body = [item for item in node.body if getattr(item, "name", "") in methods]
            assert len(node.body) == len(methods)
        body.append(_OpsOfOurOwn().visit(node))
    assert len(body) == len(wanted)
    program = ast.fix_missing_locations(ast.Module(body, []))
    flags = __future__.annotations.compiler_flag
    exec(compile(program, source.path, "exec", flags=flags), module.__dict__)


def released_modules() -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    """Upstream's two modules with the code under test; fresh ones, because the overlay changes them."""
    streams = types.ModuleType("released_streams")
    streams.__dict__.update(torch=torch)
    _compiled(streams, STREAMS, {"maybe_execute_in_parallel": None})
    compressor = types.ModuleType("released_compressor")
    compressor.__dict__.update(
        torch=torch,
        cast=cast,
        Any=Any,
        CompressorMetadata=object,
        CompressorBase=CompressorBase,
        cublas_gemm_bf16_bf16_fp32=kv_score_gemm(),
        get_forward_context=lambda: context["forward"],
        _save_partial_states_kernel=Kernel("kv_score", (0, 2)),
        triton=types.SimpleNamespace(next_power_of_2=lambda number: number),
    )
    _compiled(compressor, COMPRESSOR, {"DeepseekCompressor": ("CompressorBase", ("forward",))})
    attention = types.ModuleType("released_attention")
    attention.__dict__.update(
        torch=torch,
        cast=cast,
        F=torch.nn.functional,
        LayerBase=LayerBase,
        IndexerBase=IndexerBase,
        DeepseekCompressor=compressor.DeepseekCompressor,
        upstream_ops=UpstreamOps,
        PREFILL_CHUNK_SIZE=4,
        maybe_execute_in_parallel=streams.maybe_execute_in_parallel,
        get_forward_context=lambda: context["forward"],
        current_workspace_manager=lambda: types.SimpleNamespace(get_simultaneous=lambda *_: None),
        fused_q_kv_rmsnorm=normed,
        fused_inv_rope_fp8_quant=without_rope,
        fused_indexer_q_rope_quant=quantized_query,
    )
    for module in (compressor, attention):
        sys.modules[module.__name__] = module  # Dynamo finds a function's globals by the name of its module
    context.update(attention=attention, compressor=compressor, layers={})
    _compiled(
        attention,
        ATTENTION,
        {
            "DeepseekV4MultiHeadLatentAttentionWrapper": ("LayerBase", ("forward", "attention_impl")),
            "DeepseekV4Indexer": ("IndexerBase", ("forward",)),
            "deepseek_v4_attention": None,
            "deepseek_v4_attention_fake": None,
        },
    )
    yield attention, compressor
    for module in (compressor, attention):
        del sys.modules[module.__name__]
    context.clear()


# ---------------------------------------------------------------------------------------------- running


def configuration(micro_batching: bool = False) -> Any:
    """vLLM's current configuration, in which the layers are registered that have been made so far."""
    return types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=context["layers"]),
        parallel_config=types.SimpleNamespace(use_ubatching=micro_batching),
    )


def install(patch: types.ModuleType, attention: types.ModuleType, **changes: Any) -> Any:
    """The overlay's own way in, allowed on a CPU."""
    settings = Settings(serial_pass_through=True, journal_folder="", **changes)
    return patch.install(attention, judge("deepseek_v4", tree(VERSION)), settings)


class Anything(dict[str, Any]):
    """Metadata for whoever asks."""

    def __missing__(self, key: str) -> Any:
        slots = types.SimpleNamespace(shape=(context["tokens"],))
        return types.SimpleNamespace(
            token_to_req_indices=None, slot_mapping=slots, block_table=torch.zeros(1, 1), block_size=1
        )


def make_layer(kind: str, number: int = 2) -> Any:
    return context["attention"].DeepseekV4MultiHeadLatentAttentionWrapper(KINDS[kind], number)


@dataclasses.dataclass
class Run:
    output: torch.Tensor
    ran: list[str]
    seen: list[tuple[str, torch.Tensor]]


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.arange(tokens), torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.bfloat16)


def run(layer: Any, call: Any = None, tokens: int = 5, dummy: bool = False) -> Run:
    """One step of a layer, plainly or through `call`."""
    positions, hidden_states = inputs(tokens)
    ran.clear()
    seen.clear()
    context["tokens"] = tokens
    metadata = None if dummy else Anything()
    context["forward"] = types.SimpleNamespace(attn_metadata=metadata, no_compile_layers={layer.layer_name: layer})
    with torch.no_grad():
        output = (layer if call is None else call)(positions, hidden_states)
    return Run(output, list(ran), list(seen))
