"""The GDN patch without an engine: sizes, refusals, the stand-in, the op."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

from overlay import cache_identity, loaded, lowering, ops  # noqa: E402
from overlay.side_work.gemms import gemm_of  # noqa: E402
from overlay.journal import Journal, PatchRecord  # noqa: E402
from overlay.layers import Refused  # noqa: E402
from overlay.side_work.pairs import ADAPTERS, NOTHING_TO_GAIN, Candidate  # noqa: E402
from overlay.patches import gdn  # noqa: E402
from overlay.side_work.plan import DUAL, FUSED, Plan, SizePlan  # noqa: E402
from overlay.settings import Settings  # noqa: E402
from overlay.verdict import APPLY, INERT, Verdict  # noqa: E402
from overlay.verdict.gdn import PACKED_SWITCHES  # noqa: E402

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
    assert (pair.main_size, pair.side_size) == (6144, 32)
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


class Projection(torch.nn.Module):
    """A linear in vLLM's manner, that notes when it is called."""

    def __init__(self, name: str, rows: int, order: list[str], generator: torch.Generator) -> None:
        super().__init__()
        self.name = name
        self.quant_method = unquantized()
        self.weight = torch.nn.Parameter(torch.randn(rows, 16, generator=generator), requires_grad=False)
        self.order = order

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.order.append(self.name)
        return torch.nn.functional.linear(x, self.weight), None


class Layer(torch.nn.Module):
    """A layer with the two projections and a forward of the known shape."""

    def __init__(self, ba_first: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.order: list[str] = []
        self.in_proj_qkvz = Projection("qkvz", 48, self.order, generator)
        self.in_proj_ba = Projection("ba", 6, self.order, generator)
        self.prefix = "model.layers.0.linear_attn"
        self.ba_first = ba_first

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
def record() -> Iterator[PatchRecord]:
    """Where the ops count, which are there for the tests of this file."""
    record, others = PatchRecord(), len(ops._libraries)
    gdn.register_ops(record)
    yield record
    for library in ops._libraries[others:]:
        library._destroy()
    del ops._libraries[others:]


@pytest.fixture(params=[False, True], ids=["qkvz first", "ba first"])
def layer(request: pytest.FixtureRequest, record: PatchRecord) -> Iterator[Layer]:
    made = Layer(request.param)
    setattr(made, gdn.PAIR, gdn.LinearPair(48, 6, Plan("dual", 256), record))
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


@pytest.mark.parametrize("plain", [False, True], ids=["its linears", "plain"])
@pytest.mark.parametrize("one_result", [False, True], ids=["two results", "one result"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_into_one_graph_with_one_op(
    layer: Layer, record: PatchRecord, backend: str, one_result: bool, plain: bool
) -> None:
    """The weights are in the graph beside the op, for stock's calls, where those would need nothing else."""
    getattr(layer, gdn.PAIR).one_result, getattr(layer, gdn.PAIR).plain = one_result, plain
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
    (node,) = [node for node in graph.graph.nodes if "gdn_in_proj" in str(node.target)]
    assert ("_one" in str(node.target)) == one_result
    weights = [weight and weight.meta["example_value"].shape for weight in node.args[1:3]]
    assert weights == ([(48, 16), (6, 16)] if plain else [None, None])
    assert record.calls.fake > fakes
    assert torch.equal(compiled(layer, x[:3]), Layer.forward(layer, x[:3]))


@pytest.mark.parametrize("plain", [False, True], ids=["its linears", "plain"])
def test_the_fake_gives_the_shapes_of_the_real_op(layer: Layer, plain: bool) -> None:
    pair = getattr(layer, gdn.PAIR)
    pair.plain = plain
    tensors = [torch.randn(5, 16), *((layer.in_proj_qkvz.weight, layer.in_proj_ba.weight) if plain else (None, None))]
    name = ops.encode_layer_name(layer.prefix)
    real = torch.ops.vllm_overlay.gdn_in_proj(*tensors, pair.main_size, pair.side_size, name)
    real_one = torch.ops.vllm_overlay.gdn_in_proj_one(*tensors, pair.columns, name)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        fake = torch.ops.vllm_overlay.gdn_in_proj(*fakes, pair.main_size, pair.side_size, name)
        fake_one = torch.ops.vllm_overlay.gdn_in_proj_one(*fakes, pair.columns, name)
    assert [tuple(t.shape) for t in fake] == [tuple(t.shape) for t in real] == [(5, 48), (5, 6)]
    assert [(t.stride(), t.dtype) for t in fake] == [(t.stride(), t.dtype) for t in real]
    assert tuple(fake_one.shape) == tuple(real_one.shape) == (5, 64)
    assert (fake_one.stride(), fake_one.dtype) == (real_one.stride(), real_one.dtype)


def test_the_op_asks_the_layer_and_not_the_weights_beside_it(layer: Layer) -> None:
    """They are there for the graph: a linear can be more than its weight."""
    x, name = torch.randn(5, 16), ops.encode_layer_name(layer.prefix)
    others = torch.full((48, 16), torch.nan), torch.full((6, 16), torch.nan)
    results = torch.ops.vllm_overlay.gdn_in_proj(x, *others, 48, 6, name)
    assert torch.equal(results[0], layer.in_proj_qkvz(x)[0]) and torch.equal(results[1], layer.in_proj_ba(x)[0])
    result = torch.ops.vllm_overlay.gdn_in_proj_one(x, *others, 64, name)
    assert torch.equal(result[:, :48], results[0]) and torch.equal(result[:, 48:54], results[1])


@pytest.mark.parametrize(("op", "lower"), [("gdn_in_proj", gdn.lower_two), ("gdn_in_proj_one", gdn.lower_one)])
def test_inductor_may_lay_out_the_ops_inputs_and_stock_has_calls_for_it(
    record: PatchRecord, op: str, lower: Callable[..., bool]
) -> None:
    """With other tags Inductor makes inputs of eager's strides for it, by another kernel than stock's."""
    found = getattr(torch.ops.vllm_overlay, op)
    assert torch.Tag.flexible_layout in found.default.tags
    assert not {torch.Tag.needs_fixed_stride_order, torch.Tag.needs_exact_strides} & {*found.default.tags}
    assert lowering._lowered[found] == (lower, record)


def test_three_dimensions_get_two_results(layer: Layer) -> None:
    getattr(layer, gdn.PAIR).one_result = True
    x = torch.randn(2, 3, 16)
    assert torch.equal(gdn.overlap_in_projections(Layer.forward)(layer, x), Layer.forward(layer, x))


def test_the_layer_name_is_vllms_opaque_type_where_there_is_one(record: PatchRecord) -> None:
    from vllm.utils import torch_utils

    assert ops.LayerNameType is torch_utils.LayerNameType
    assert "str layer_name" not in str(torch.ops.vllm_overlay.gdn_in_proj.default._schema)


# ---------------------------------------------------------------- the plan, once the weights are there

VERDICT = Verdict(APPLY, "as known", "vllm.gdn", "Layer", ("forward",), takes_slices=True)


GRAPHS, LARGEST = 512, 8192


def worker(ranks: int = 1) -> Any:
    """vLLM's, with what of its configuration is asked for."""
    config = namespace(
        compilation_config=namespace(compile_ranges_endpoints=[LARGEST]),
        parallel_config=namespace(world_size_across_dp=ranks),
    )
    return namespace(vllm_config=config)


def endpoints(of_vllm: Any) -> list[int]:
    found: list[int] = getattr(of_vllm.vllm_config.compilation_config, "compile_ranges_endpoints", [])
    return found


class Deciding:
    """Layers with pairs that wait for their weights, and what `settle` and `split_ranges` are to do with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal = Journal()
        self.record = self.journal.patch(gdn.NAME)
        self.identities: list[tuple[str, tuple[str, ...]]] = []
        self.seen: list[Candidate] = []
        self.above_is_stock: list[bool] = []
        self.endpoints: list[list[int]] = []  #: when a plan was asked for
        self.strict: list[bool] = []  #: when ranges were split
        self.has_ranges = True
        self.settle: Any = lambda candidates: {}
        monkeypatch.setattr(gdn, "journal", self.journal)
        monkeypatch.setattr(gdn.pair_plans, "settle", self._settle)
        monkeypatch.setattr(gdn.lowering, "split_ranges", self._split)
        monkeypatch.setattr(cache_identity, "add", self._add)

    def _settle(
        self, candidates: Any, of_vllm: Any, settings: Settings, record: PatchRecord, above_is_stock: bool
    ) -> dict[str, str]:
        assert record is self.record
        self.seen = candidates
        self.above_is_stock.append(above_is_stock)
        self.endpoints.append(endpoints(of_vllm))
        result: dict[str, str] = self.settle(candidates)
        return result

    def _split(self, compilation: Any, strict: bool) -> bool:
        self.strict.append(strict)
        if self.has_ranges:
            compilation.compile_ranges_endpoints = [GRAPHS, LARGEST]
        return self.has_ranges

    def _add(self, patch: str, detail: Any) -> str:
        self.identities.append((patch, tuple(detail)))
        return f"fingerprint {len(self.identities)}"

    def waiting(self, verdict: Verdict = VERDICT, **settings: Any) -> gdn.Undecided:
        return gdn.Undecided(verdict, self.record, Settings(**settings))

    def add(self, undecided: gdn.Undecided, name: str) -> Layer:
        layer = Layer()
        layer.prefix = name
        setattr(layer, gdn.PAIR, gdn.LinearPair(48, 6, Plan("dual", 256), self.record))
        self.record.patched[name] = {"qkvz": 48, "ba": 6}
        undecided.add(layer)
        return layer


@pytest.fixture
def deciding(monkeypatch: pytest.MonkeyPatch) -> Deciding:
    return Deciding(monkeypatch)


def test_a_layer_with_nothing_to_gain_goes_back_to_stock(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    first, second = deciding.add(undecided, "a"), deciding.add(undecided, "b")
    deciding.settle = lambda candidates: {"b": NOTHING_TO_GAIN}
    undecided.decide(worker())
    assert getattr(first, gdn.PAIR) is not None and getattr(second, gdn.PAIR) is None
    assert list(deciding.record.patched) == ["a"] and deciding.record.refused == {"b": NOTHING_TO_GAIN}
    assert deciding.journal.problems == []
    (one, _) = deciding.seen
    assert (one.layer, one.main, one.side, one.takes_slices) == ("a", first.in_proj_qkvz, first.in_proj_ba, True)
    assert one.pair is getattr(first, gdn.PAIR)


@pytest.mark.parametrize("switch", PACKED_SWITCHES)
@pytest.mark.parametrize(
    ("verdict_says", "switched", "takes"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_slices_only_where_upstream_takes_them(
    deciding: Deciding, switch: str, verdict_says: bool, switched: bool, takes: bool
) -> None:
    """0.28.0 to 0.31.0 and later releases have another name for the way to their own kernel."""
    undecided = deciding.waiting(dataclasses.replace(VERDICT, takes_slices=verdict_says))
    setattr(deciding.add(undecided, "a"), switch, switched)  # the layer is gone by now
    layer = deciding.add(undecided, "b")
    setattr(layer, switch, switched)
    undecided.decide(worker())
    assert [(one.layer, one.takes_slices) for one in deciding.seen] == [("b", takes)]


def test_what_shapes_the_graph_is_in_the_cache_identity(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, name) for name in ("c", "a", "b")]

    def settle(candidates: list[Candidate]) -> dict[str, str]:
        candidates[1].pair.one_result = True
        return {"b": NOTHING_TO_GAIN}

    deciding.settle = settle
    undecided.decide(worker())
    shaping = ("forward", "a=one result", "b=stock", "c=two results", f"ranges=[{GRAPHS}, {LARGEST}]")
    assert deciding.identities == [("gdn", shaping)]
    assert deciding.journal.fingerprint == "fingerprint 1" and len(layers) == 3


def test_strategies_do_not_shape_the_graph(deciding: Deciding) -> None:
    """They are chosen inside the op: another measurement must not make vLLM compile anew."""
    seen = []
    for strategy in (DUAL, FUSED):
        undecided = deciding.waiting()
        layer = deciding.add(undecided, "a")
        getattr(layer, gdn.PAIR).one_result = True
        getattr(layer, gdn.PAIR).plan = SizePlan.of({8: strategy})
        undecided.decide(worker())
        seen.append(deciding.identities[-1])
    assert seen[0] == seen[1]


def test_a_second_model_keeps_the_first_ones_layouts(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    first = deciding.add(undecided, "a")
    undecided.decide(worker())
    second = deciding.add(undecided, "b")
    undecided.decide(worker())
    assert [one.layer for one in deciding.seen] == ["b"], "what is decided stays so"
    assert deciding.identities[-1][1][:3] == ("forward", "a=two results", "b=two results")
    assert first is not second


def test_without_a_layer_nothing_is_done(deciding: Deciding) -> None:
    """A worker without such layers, or one whose class inherits the method."""
    undecided = deciding.waiting()
    other = object()
    undecided.decide(other)
    deciding.add(undecided, "a")  # the layer is gone by now
    undecided.decide(other)
    assert deciding.identities == deciding.strict == deciding.above_is_stock == deciding.journal.problems == []


def fail(candidates: list[Candidate]) -> dict[str, str]:
    candidates[0].pair.plan, candidates[0].pair.one_result = SizePlan.of({8: FUSED}), True
    raise torch.cuda.OutOfMemoryError("no memory for a plan")


def test_a_failure_leaves_all_stock_with_a_warning(deciding: Deciding, caplog: pytest.LogCaptureFixture) -> None:
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, name) for name in ("a", "b")]
    deciding.record.plans.append({"shape": "of another engine"})

    def half_way(candidates: list[Candidate]) -> dict[str, str]:
        deciding.record.plans.append({"shape": "of layers that run stock"})
        return fail(candidates)

    deciding.settle = half_way
    undecided.decide(worker())
    assert [getattr(layer, gdn.PAIR) for layer in layers] == [None, None]
    assert deciding.record.patched == {} and deciding.record.refused == dict.fromkeys(("a", "b"), gdn.UNDECIDED)
    assert deciding.record.plans == [{"shape": "of another engine"}]
    assert deciding.identities == [("gdn", ("forward", "a=stock", "b=stock", f"ranges=[{LARGEST}]"))]
    (problem,) = deciding.journal.problems
    assert "OutOfMemoryError: no memory for a plan" in problem and "runs stock" in problem
    assert [record.levelname for record in caplog.records if "no memory" in record.getMessage()] == ["WARNING"]
    x = torch.randn(5, 16)
    assert torch.equal(gdn.overlap_in_projections(Layer.forward)(layers[0], x), Layer.forward(layers[0], x))


@pytest.mark.parametrize("stock", [True, False])
def test_a_vllm_that_knows_no_ranges_is_left_as_it_is(deciding: Deciding, stock: bool) -> None:
    """A later release may name them otherwise; what is asked of it must not end it."""
    undecided, deciding.has_ranges = deciding.waiting(), False
    layer = deciding.add(undecided, "a")
    deciding.settle = lambda candidates: {"a": NOTHING_TO_GAIN} if stock else {}
    unknown = namespace(vllm_config=namespace(compilation_config=namespace(), parallel_config=namespace()))
    undecided.decide(unknown)
    assert vars(unknown.vllm_config.compilation_config) == {} and deciding.journal.problems == []
    assert (getattr(layer, gdn.PAIR) is None) == stock
    assert deciding.identities[0][1][-1] == "ranges=None"


def test_strict_stops_where_no_plan_can_be_made(deciding: Deciding) -> None:
    undecided = deciding.waiting(strict=True)
    layer = deciding.add(undecided, "a")
    deciding.settle = fail
    with pytest.raises(torch.cuda.OutOfMemoryError):
        undecided.decide(worker())
    assert len(deciding.journal.problems) == 1 and layer is not None


def test_a_layer_that_vllm_cannot_be_asked_about_is_a_failure_like_any_other(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    layer = deciding.add(undecided, "a")
    del layer.in_proj_ba
    undecided.decide(worker())
    assert getattr(layer, gdn.PAIR) is None and "in_proj_ba" in deciding.journal.problems[0]


def test_two_layers_of_one_name_are_both_decided(deciding: Deciding) -> None:
    """A first engine whose loading failed, and whose layers are not gone yet."""
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, "a"), deciding.add(undecided, "a")]
    deciding.settle = lambda candidates: {"a": NOTHING_TO_GAIN}
    undecided.decide(worker())
    assert [getattr(layer, gdn.PAIR) for layer in layers] == [None, None]


# ---------------------------------------------------------------- the ranges, and what is plain


def bias(projection: Any) -> None:
    projection.bias = torch.nn.Parameter(torch.zeros(projection.weight.shape[0]))


def quantized(name: str) -> Callable[[Any], None]:
    def put(projection: Any) -> None:
        projection.quant_method = method_named(name)

    return put


def through_marlin(projection: Any) -> None:
    projection.quant_method = method_named("GPTQMarlinLinearMethod", kernel=marlin(OwnWorkspace))


more_than_a_gemm = pytest.mark.parametrize(
    "spoil",
    [
        bias,
        lambda projection: projection.register_forward_hook(lambda *_: None),
        lambda projection: projection.register_forward_pre_hook(lambda *_: None),
        quantized("Fp8LinearMethod"),
        through_marlin,
    ],
    ids=["bias", "hook", "hook before", "another kernel", "marlin"],
)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("has_ranges", [False, True])
def test_plain_layers_have_stocks_graph_above_the_captured_sizes(
    deciding: Deciding, has_ranges: bool, strict: bool
) -> None:
    """The ranges are split before the plan is made, which goes by whether they could be."""
    deciding.has_ranges = has_ranges
    undecided = deciding.waiting(strict=strict)
    layers = [deciding.add(undecided, name) for name in ("a", "b")]
    undecided.decide(of_vllm := worker())
    assert all(getattr(layer, gdn.PAIR).plain for layer in layers)
    assert deciding.above_is_stock == [has_ranges] and deciding.strict == [strict]
    split = [GRAPHS, LARGEST] if has_ranges else [LARGEST]
    assert deciding.endpoints == [split] and endpoints(of_vllm) == split
    assert deciding.identities[-1][1][1:] == ("a=two results", "b=two results", f"ranges={split}")


@pytest.mark.parametrize("which", ["in_proj_qkvz", "in_proj_ba"])
@more_than_a_gemm
def test_one_linear_that_is_more_than_a_gemm_keeps_the_op_everywhere(
    deciding: Deciding, spoil: Callable[[Any], None], which: str
) -> None:
    """It has no stock calls to give back, and one graph serves every number of tokens."""
    undecided = deciding.waiting()
    layers = {name: deciding.add(undecided, name) for name in ("a", "b", "c")}
    spoil(getattr(layers["b"], which))
    undecided.decide(of_vllm := worker())
    assert [getattr(layer, gdn.PAIR).plain for layer in layers.values()] == [True, False, True]
    assert deciding.above_is_stock == [False] and deciding.strict == []
    assert endpoints(of_vllm) == [LARGEST] and deciding.journal.problems == []
    layouts = ("a=two results", "b=two results of its linears", "c=two results")
    assert deciding.identities[-1][1] == ("forward", *layouts, f"ranges=[{LARGEST}]")


class Adapted(torch.nn.Module):
    """What vLLM puts in a linear's place under LoRA."""

    def __init__(self, base_layer: Projection) -> None:
        super().__init__()
        self.base_layer = base_layer


class Forwarding(Adapted):
    """From 0.29.0 on: every public name that it does not have is its base layer's."""

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        return getattr(self._modules["base_layer"], name)


@pytest.mark.parametrize("kind", [Adapted, Forwarding], ids=["0.19 to 0.28", "0.29 and later"])
def test_linears_with_adapters_are_not_plain_and_no_failure(deciding: Deciding, kind: type[Adapted]) -> None:
    undecided = deciding.waiting()
    layer = deciding.add(undecided, "a")
    for name in ("in_proj_qkvz", "in_proj_ba"):
        setattr(layer, name, kind(getattr(layer, name)))
    deciding.settle = lambda candidates: {one.layer: ADAPTERS for one in candidates}
    undecided.decide(worker())
    assert deciding.journal.problems == [] and deciding.record.refused == {"a": ADAPTERS}
    assert deciding.strict == [], "no range is split for them"


def test_ranges_are_put_back_where_two_stock_layers_have_one_name(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, "a"), deciding.add(undecided, "a")]
    deciding.settle = lambda candidates: {"a": NOTHING_TO_GAIN}
    undecided.decide(of_vllm := worker())
    assert [getattr(layer, gdn.PAIR) for layer in layers] == [None, None] and endpoints(of_vllm) == [LARGEST]


def test_what_is_plain_is_known_when_the_plan_is_made(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, name) for name in ("a", "b")]
    bias(layers[1].in_proj_ba)
    plain: list[bool] = []
    deciding.settle = lambda candidates: plain.extend(one.pair.plain for one in candidates) or {}
    undecided.decide(worker())
    assert plain == [True, False]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("stock", [[], ["a"], ["a", "b"]], ids=["none", "one", "all"])
def test_ranges_are_put_back_where_every_layer_of_a_single_rank_is_stock(
    deciding: Deciding, stock: list[str], ranks: int
) -> None:
    """Another range is another pass through Inductor, and another step to warm up: all ranks have to do it, or none."""
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, name) for name in ("a", "b")]
    deciding.settle = lambda candidates: dict.fromkeys(stock, NOTHING_TO_GAIN)
    undecided.decide(of_vllm := worker(ranks))
    assert [getattr(layer, gdn.PAIR) is None for layer in layers] == [name in stock for name in ("a", "b")]
    back = len(stock) == 2 and ranks == 1
    assert endpoints(of_vllm) == ([LARGEST] if back else [GRAPHS, LARGEST])
    assert deciding.identities[-1][1][-1] == f"ranges={endpoints(of_vllm)}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_after_the_split_is_like_layers_that_are_stock(deciding: Deciding, ranks: int) -> None:
    undecided = deciding.waiting()
    layer = deciding.add(undecided, "a")
    deciding.settle = fail
    undecided.decide(of_vllm := worker(ranks))
    assert getattr(layer, gdn.PAIR) is None
    assert endpoints(of_vllm) == ([LARGEST] if ranks == 1 else [GRAPHS, LARGEST])
    assert deciding.identities[-1][1][-1] == f"ranges={endpoints(of_vllm)}"


@pytest.mark.parametrize("strict", [False, True])
def test_ranges_that_cannot_be_split_leave_all_stock(
    deciding: Deciding, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    def fails(compilation: Any, strict: bool) -> bool:
        compilation.compile_ranges_endpoints = [GRAPHS, LARGEST]
        raise AttributeError("vllm.compilation.backends has no CompilerManager")

    monkeypatch.setattr(lowering, "split_ranges", fails)
    undecided = deciding.waiting(strict=strict)
    layers = [deciding.add(undecided, name) for name in ("a", "b")]
    of_vllm = worker()
    if strict:
        with pytest.raises(AttributeError, match="CompilerManager"):
            undecided.decide(of_vllm)
    else:
        undecided.decide(of_vllm)
        assert [getattr(layer, gdn.PAIR) for layer in layers] == [None, None] and endpoints(of_vllm) == [LARGEST]
        assert deciding.record.refused == dict.fromkeys(("a", "b"), gdn.UNDECIDED)
    (problem,) = deciding.journal.problems
    assert "CompilerManager" in problem and "runs stock" in problem
    assert deciding.above_is_stock == [], "no plan is made"


def test_a_second_model_that_is_stock_leaves_the_first_ones_ranges(deciding: Deciding) -> None:
    undecided, of_vllm = deciding.waiting(), worker()
    first = deciding.add(undecided, "a")
    undecided.decide(of_vllm)
    second = deciding.add(undecided, "b")
    deciding.settle = lambda candidates: {"b": NOTHING_TO_GAIN}
    undecided.decide(of_vllm)
    assert getattr(first, gdn.PAIR) is not None and getattr(second, gdn.PAIR) is None
    assert endpoints(of_vllm) == [GRAPHS, LARGEST]


# ---------------------------------------------------------------- the installation


def platform(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    monkeypatch.setattr(gdn, "current_platform", namespace(is_cuda_alike=lambda: cuda, device_type="made up"))


def module_with(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with a class of vLLM's kind, whose layers fit."""

    class Fitting(torch.nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.prefix = prefix

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = types.ModuleType("vllm.gdn")
    module.Layer = Fitting  # type: ignore[attr-defined]
    monkeypatch.setattr(gdn, "register_ops", lambda record: None)
    return module


def test_a_layer_waits_from_its_making_to_the_end_of_loading(
    deciding: Deciding, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[Any] = []
    monkeypatch.setattr(loaded, "_waiting", waiting)
    platform(monkeypatch, cuda=True)
    module = module_with(monkeypatch)
    pair = gdn.LinearPair(48, 6, Plan("dual", 256), deciding.record)
    refused = [False]

    def make(layer: Any, plan: Plan, record: PatchRecord) -> Any:
        if refused[0]:
            raise Refused("not this one")
        assert (plan, record) == (Plan("dual", 256), deciding.record)
        return pair, {"qkvz": 48, "ba": 6}

    monkeypatch.setattr(gdn, "make_pair", make)
    assert gdn.install(module, VERDICT, Settings()) == VERDICT
    (decide,) = waiting
    layer = module.Layer("a")
    layer.in_proj_qkvz, layer.in_proj_ba = (
        Projection(name, rows, [], torch.Generator()) for name, rows in (("qkvz", 48), ("ba", 6))
    )
    refused[0] = True
    other = module.Layer("b")
    assert getattr(layer, gdn.PAIR) is pair and getattr(other, gdn.PAIR) is None
    decide(worker())
    assert [one.layer for one in deciding.seen] == ["a"], "a layer that was refused waits for nothing"


def test_on_another_device_nothing_waits(deciding: Deciding, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Any] = []
    monkeypatch.setattr(loaded, "_waiting", waiting)
    platform(monkeypatch, cuda=False)
    module = module_with(monkeypatch)
    before = dict(vars(module.Layer))
    found = gdn.install(module, VERDICT, Settings())
    assert (found.state, waiting, dict(vars(module.Layer))) == (INERT, [], before)
    assert "made up" in found.reason
