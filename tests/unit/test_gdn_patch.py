"""The GDN patch without an engine: sizes, refusals, the stand-in, the op."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

from overlay import ops  # noqa: E402
from overlay.gemms import gemm_of  # noqa: E402
from overlay.journal import PatchRecord  # noqa: E402
from overlay.layers import Refused  # noqa: E402
from overlay.patches import gdn  # noqa: E402
from overlay.plan import Plan  # noqa: E402

namespace = types.SimpleNamespace


def linear(size: int, method: Any = None) -> Any:
    return namespace(output_size_per_partition=size, quant_method=method)


def method_named(name: str, **attributes: Any) -> Any:
    instance = type(name, (), {})()
    vars(instance).update(attributes)
    return instance


def unquantized() -> Any:
    def default_unquantized_gemm() -> None: ...

    return method_named("UnquantizedLinearMethod", _gemm_impl=default_unquantized_gemm)


def heads(key_heads: int, value_heads: int, size: int, tp: int, replicated: bool = False) -> Any:
    key_dim, value_dim = key_heads * size, value_heads * size
    return namespace(
        key_dim=key_dim,
        value_dim=value_dim,
        num_v_heads=value_heads,
        tp_size=tp,
        disable_tp_for_ba_proj=replicated,
        in_proj_qkvz=linear(2 * (key_dim + value_dim) // tp),
        in_proj_ba=linear(2 * value_heads // (1 if replicated else tp)),
    )


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    key_heads=st.integers(1, 8),
    group=st.integers(1, 4),
    size=st.sampled_from([32, 64, 128]),
    replicated=st.booleans(),
)
def test_sizes_are_per_shard_and_agree_with_the_heads(
    tp: int, key_heads: int, group: int, size: int, replicated: bool
) -> None:
    layer = heads(key_heads * tp, key_heads * tp * group, size, tp, replicated)
    qkvz, ba = gdn.shard_sizes(layer)
    assert qkvz == 2 * key_heads * size * (1 + group)
    assert ba == 2 * key_heads * group * (tp if replicated else 1)


@pytest.mark.parametrize("which", ["in_proj_qkvz", "in_proj_ba"])
def test_sizes_that_disagree_with_the_heads_name_both(which: str) -> None:
    layer = heads(16, 32, 128, 2)
    getattr(layer, which).output_size_per_partition *= 2
    with pytest.raises(ValueError, match=str(getattr(layer, which).output_size_per_partition)):
        gdn.shard_sizes(layer)


def test_a_repacked_weight_is_never_looked_at() -> None:
    layer = heads(16, 32, 128, 1)
    layer.in_proj_qkvz.weight = torch.empty(128, 24576, dtype=torch.int32)  # a Marlin layout
    assert gdn.shard_sizes(layer) == (12288, 64)


def marlin_make_workspace_new() -> object:
    return object()


class OwnWorkspace:
    def process_weights_after_loading(self, layer: Any) -> None:
        self.workspace = marlin_make_workspace_new()


class HandedWorkspace:
    def process_weights_after_loading(self, layer: Any) -> None:
        self.workspace = layer.shared_workspace


class SharedWorkspace:
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.apply = lambda call: call(workspace=None)


def marlin(base: type) -> Any:
    return type("MarlinLinearKernel", (base,), {})()


def test_the_allowlist_has_torchs_gemm_and_marlin_with_its_own_workspace() -> None:
    assert gemm_of(linear(8, unquantized())) == "default_unquantized_gemm"
    own = method_named("GPTQMarlinLinearMethod", kernel=marlin(OwnWorkspace))
    assert gemm_of(linear(8, own)) == "GPTQMarlinLinearMethod with MarlinLinearKernel"


def cuda_flashinfer_bf16_gemm() -> None: ...


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (method_named("Fp8LinearMethod"), "Fp8LinearMethod is not on the allowlist"),
        (method_named("AutoGPTQLinearMethod", kernel=marlin(SharedWorkspace)), "shares one workspace"),
        (method_named("AutoGPTQLinearMethod", kernel=marlin(HandedWorkspace)), "shares one workspace"),
        (method_named("AutoGPTQLinearMethod", kernel=method_named("MacheteLinearKernel")), "with MacheteLinearKernel"),
        (method_named("UnquantizedLinearMethod", _gemm_impl=cuda_flashinfer_bf16_gemm), "cuda_flashinfer_bf16_gemm"),
    ],
)
def test_everything_else_is_refused_by_name(method: Any, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        gemm_of(linear(8, method))


def configuration(layer: Any, micro_batching: bool = False) -> Any:
    return namespace(
        compilation_config=namespace(static_forward_context={layer.prefix: layer}),
        parallel_config=namespace(use_ubatching=micro_batching),
    )


def complete_layer() -> Any:
    layer = heads(16, 32, 128, 2)
    layer.prefix = "model.layers.0.linear_attn"
    layer.in_proj_qkvz.quant_method = layer.in_proj_ba.quant_method = unquantized()
    return layer


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what vLLM's current configuration and environment module say."""

    def set_current(config: Any, batch_invariant: bool = False) -> None:
        monkeypatch.setattr(gdn, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(gdn, "envs", namespace(VLLM_BATCH_INVARIANT=batch_invariant))

    return set_current


def test_a_layer_that_fits_gets_a_pair_with_its_shard_sizes(current: Any) -> None:
    layer = complete_layer()
    current(configuration(layer))
    pair, shown = gdn.make_pair(layer, Plan("dual", 256), PatchRecord())
    assert (pair.layer_name, pair.qkvz_size, pair.ba_size) == (layer.prefix, 6144, 32)
    assert shown == {"qkvz": 6144, "ba": 32}


def test_micro_batching_is_refused(current: Any) -> None:
    layer = complete_layer()
    current(configuration(layer, micro_batching=True))
    with pytest.raises(Refused, match="DBO"):
        gdn.make_pair(layer, Plan("dual", 256), PatchRecord())


def test_batch_invariant_mode_is_refused(current: Any) -> None:
    layer = complete_layer()
    current(configuration(layer), batch_invariant=True)
    with pytest.raises(Refused, match="batch-invariant"):
        gdn.make_pair(layer, Plan("dual", 256), PatchRecord())


def test_the_split_projections_of_lora_are_refused(current: Any) -> None:
    layer = complete_layer()
    del layer.in_proj_qkvz
    current(configuration(layer))
    with pytest.raises(Refused, match="split for LoRA"):
        gdn.make_pair(layer, Plan("dual", 256), PatchRecord())


def test_a_layer_that_the_op_could_not_find_is_refused(current: Any) -> None:
    layer = complete_layer()
    current(configuration(complete_layer()))
    with pytest.raises(Refused, match="not registered"):
        gdn.make_pair(layer, Plan("dual", 256), PatchRecord())


@pytest.mark.parametrize("which", ["in_proj_qkvz", "in_proj_ba"])
def test_one_quantized_projection_is_enough_to_refuse(current: Any, which: str) -> None:
    layer = complete_layer()
    getattr(layer, which).quant_method = method_named("Fp8LinearMethod")
    current(configuration(layer))
    with pytest.raises(Refused, match="Fp8LinearMethod"):
        gdn.make_pair(layer, Plan("dual", 256), PatchRecord())


class Layer(torch.nn.Module):
    """A layer with the two projections and a forward of the known shape."""

    def __init__(self, ba_first: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.qkvz = torch.nn.Parameter(torch.randn(48, 16, generator=generator))
        self.ba = torch.nn.Parameter(torch.randn(6, 16, generator=generator))
        self.prefix = "model.layers.0.linear_attn"
        self.ba_first = ba_first
        self.order: list[str] = []

    def in_proj_qkvz(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.order.append("qkvz")
        return torch.nn.functional.linear(x, self.qkvz), None

    def in_proj_ba(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.order.append("ba")
        return torch.nn.functional.linear(x, self.ba), None

    def scale(self) -> float:
        return 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ba_first:
            ba, _ = self.in_proj_ba(x)
            qkvz, _ = self.in_proj_qkvz(x)
        else:
            qkvz, _ = self.in_proj_qkvz(x)
            ba, _ = self.in_proj_ba(x)
        return torch.cat((qkvz * self.scale(), ba), dim=-1)


@pytest.fixture(scope="module")
def record() -> PatchRecord:
    record = PatchRecord()
    gdn.register_op(record)
    return record


@pytest.fixture(params=[False, True], ids=["qkvz first", "ba first"])
def layer(request: pytest.FixtureRequest, record: PatchRecord) -> Iterator[Layer]:
    made = Layer(request.param)
    setattr(made, gdn.PAIR, gdn.InProjPair(made.prefix, 48, 6, Plan("dual", 256), record))
    context = namespace(no_compile_layers={made.prefix: made})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdn, "get_forward_context", lambda: context)
        yield made


def test_the_stand_in_gives_upstreams_result_through_the_op(layer: Layer, record: PatchRecord) -> None:
    x = torch.randn(5, 16)
    expected = Layer.forward(layer, x)
    before = record.calls.total()
    patched = gdn.overlap_in_projections(Layer.forward)
    assert torch.equal(patched(layer, x), expected)
    assert record.calls.total() == before + 1
    assert record.calls.serial["serial pass-through"] >= 1


def test_the_serial_order_is_upstreams(layer: Layer) -> None:
    gdn.overlap_in_projections(Layer.forward)(layer, torch.randn(5, 16))
    assert layer.order == ["qkvz", "ba"]


def test_a_layer_without_a_pair_runs_stock(layer: Layer, record: PatchRecord) -> None:
    setattr(layer, gdn.PAIR, None)
    before = record.calls.total()
    x = torch.randn(5, 16)
    assert torch.equal(gdn.overlap_in_projections(Layer.forward)(layer, x), Layer.forward(layer, x))
    assert record.calls.total() == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_into_one_graph_with_one_op(layer: Layer, record: PatchRecord, backend: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    fakes = record.calls.fake
    patched = gdn.overlap_in_projections(Layer.forward)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend=keep, fullgraph=True, dynamic=True)
    x = torch.randn(5, 16)
    assert torch.equal(compiled(layer, x), Layer.forward(layer, x))
    (graph,) = graphs
    ops = [node for node in graph.graph.nodes if "gdn_in_proj" in str(node.target)]
    assert len(ops) == 1
    assert record.calls.fake > fakes
    assert torch.equal(compiled(layer, x[:3]), Layer.forward(layer, x[:3]))


def test_the_fake_gives_the_shapes_of_the_real_op(layer: Layer) -> None:
    pair = getattr(layer, gdn.PAIR)
    x = torch.randn(5, 16)
    name = ops.encode_layer_name(layer.prefix)
    real = torch.ops.vllm_overlay.gdn_in_proj(x, pair.qkvz_size, pair.ba_size, name)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.vllm_overlay.gdn_in_proj(mode.from_tensor(x), pair.qkvz_size, pair.ba_size, name)
    assert [tuple(t.shape) for t in fake] == [tuple(t.shape) for t in real] == [(5, 48), (5, 6)]
    assert [t.dtype for t in fake] == [t.dtype for t in real]


def test_the_layer_name_is_vllms_opaque_type_where_there_is_one() -> None:
    from vllm.utils import torch_utils

    assert ops.LayerNameType is torch_utils.LayerNameType
    assert "str layer_name" not in str(torch.ops.vllm_overlay.gdn_in_proj.default._schema)
