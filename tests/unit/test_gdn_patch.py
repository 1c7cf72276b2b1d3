"""The GDN patch without an engine: sizes, refusals, the stand-in, the op."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

from overlay import cache_identity, loaded, ops  # noqa: E402
from overlay.gemms import gemm_of  # noqa: E402
from overlay.journal import Journal, PatchRecord  # noqa: E402
from overlay.layers import Refused  # noqa: E402
from overlay.pair_plans import NOTHING_TO_GAIN, Candidate  # noqa: E402
from overlay.patches import gdn  # noqa: E402
from overlay.plan import DUAL, FUSED, Plan, SizePlan  # noqa: E402
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
def record() -> PatchRecord:
    record = PatchRecord()
    gdn.register_ops(record)
    return record


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


@pytest.mark.parametrize("one_result", [False, True], ids=["two results", "one result"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_into_one_graph_with_one_op(
    layer: Layer, record: PatchRecord, backend: str, one_result: bool
) -> None:
    getattr(layer, gdn.PAIR).one_result = one_result
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
    targets = [str(node.target) for node in graph.graph.nodes if "gdn_in_proj" in str(node.target)]
    assert [("_one" in target) for target in targets] == [one_result]
    assert record.calls.fake > fakes
    assert torch.equal(compiled(layer, x[:3]), Layer.forward(layer, x[:3]))


def test_the_fake_gives_the_shapes_of_the_real_op(layer: Layer) -> None:
    pair = getattr(layer, gdn.PAIR)
    x = torch.randn(5, 16)
    name = ops.encode_layer_name(layer.prefix)
    real = torch.ops.vllm_overlay.gdn_in_proj(x, pair.main_size, pair.side_size, name)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.vllm_overlay.gdn_in_proj(mode.from_tensor(x), pair.main_size, pair.side_size, name)
    assert [tuple(t.shape) for t in fake] == [tuple(t.shape) for t in real] == [(5, 48), (5, 6)]
    assert [t.dtype for t in fake] == [t.dtype for t in real]
    real = torch.ops.vllm_overlay.gdn_in_proj_one(x, pair.columns, name)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.vllm_overlay.gdn_in_proj_one(mode.from_tensor(x), pair.columns, name)
    assert tuple(fake.shape) == tuple(real.shape) == (5, 64)
    assert (fake.stride(), fake.dtype) == (real.stride(), real.dtype)


def test_three_dimensions_get_two_results(layer: Layer) -> None:
    getattr(layer, gdn.PAIR).one_result = True
    x = torch.randn(2, 3, 16)
    assert torch.equal(gdn.overlap_in_projections(Layer.forward)(layer, x), Layer.forward(layer, x))


def test_the_layer_name_is_vllms_opaque_type_where_there_is_one() -> None:
    from vllm.utils import torch_utils

    assert ops.LayerNameType is torch_utils.LayerNameType
    assert "str layer_name" not in str(torch.ops.vllm_overlay.gdn_in_proj.default._schema)


# ---------------------------------------------------------------- the plan, once the weights are there

VERDICT = Verdict(APPLY, "as known", "vllm.gdn", "Layer", ("forward",), takes_slices=True)


class Deciding:
    """Layers with pairs that wait for their weights, and what `settle` is to do with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.journal = Journal()
        self.record = self.journal.patch(gdn.NAME)
        self.identities: list[tuple[str, tuple[str, ...]]] = []
        self.seen: list[Candidate] = []
        self.settle: Any = lambda candidates: {}
        monkeypatch.setattr(gdn, "journal", self.journal)
        monkeypatch.setattr(gdn.pair_plans, "settle", self._settle)
        monkeypatch.setattr(cache_identity, "add", self._add)

    def _settle(self, candidates: Any, worker: Any, settings: Settings, record: PatchRecord) -> dict[str, str]:
        assert worker == "worker" and record is self.record
        self.seen = candidates
        result: dict[str, str] = self.settle(candidates)
        return result

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
    undecided.decide("worker")
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
    undecided.decide("worker")
    assert [(one.layer, one.takes_slices) for one in deciding.seen] == [("b", takes)]


def test_what_shapes_the_graph_is_in_the_cache_identity(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, name) for name in ("c", "a", "b")]

    def settle(candidates: list[Candidate]) -> dict[str, str]:
        candidates[1].pair.one_result = True
        return {"b": NOTHING_TO_GAIN}

    deciding.settle = settle
    undecided.decide("worker")
    assert deciding.identities == [("gdn", ("forward", "a=one result", "b=stock", "c=two results"))]
    assert deciding.journal.fingerprint == "fingerprint 1" and len(layers) == 3


def test_strategies_do_not_shape_the_graph(deciding: Deciding) -> None:
    """They are chosen inside the op: another measurement must not make vLLM compile anew."""
    seen = []
    for strategy in (DUAL, FUSED):
        undecided = deciding.waiting()
        layer = deciding.add(undecided, "a")
        getattr(layer, gdn.PAIR).one_result = True
        getattr(layer, gdn.PAIR).plan = SizePlan.of({8: strategy})
        undecided.decide("worker")
        seen.append(deciding.identities[-1])
    assert seen[0] == seen[1]


def test_a_second_model_keeps_the_first_ones_layouts(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    first = deciding.add(undecided, "a")
    undecided.decide("worker")
    second = deciding.add(undecided, "b")
    undecided.decide("worker")
    assert [one.layer for one in deciding.seen] == ["b"], "what is decided stays so"
    assert deciding.identities[-1][1] == ("forward", "a=two results", "b=two results")
    undecided.decide("worker")
    assert len(deciding.identities) == 2, "a worker without such layers, or one whose class inherits the method"
    assert first is not second


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
    undecided.decide("worker")
    assert [getattr(layer, gdn.PAIR) for layer in layers] == [None, None]
    assert deciding.record.patched == {} and deciding.record.refused == dict.fromkeys(("a", "b"), gdn.UNDECIDED)
    assert deciding.record.plans == [{"shape": "of another engine"}]
    assert deciding.identities == [("gdn", ("forward", "a=stock", "b=stock"))]
    (problem,) = deciding.journal.problems
    assert "OutOfMemoryError: no memory for a plan" in problem and "runs stock" in problem
    assert [record.levelname for record in caplog.records if "no memory" in record.getMessage()] == ["WARNING"]
    x = torch.randn(5, 16)
    assert torch.equal(gdn.overlap_in_projections(Layer.forward)(layers[0], x), Layer.forward(layers[0], x))


def test_strict_stops_where_no_plan_can_be_made(deciding: Deciding) -> None:
    undecided = deciding.waiting(strict=True)
    layer = deciding.add(undecided, "a")
    deciding.settle = fail
    with pytest.raises(torch.cuda.OutOfMemoryError):
        undecided.decide("worker")
    assert len(deciding.journal.problems) == 1 and layer is not None


def test_a_layer_that_vllm_cannot_be_asked_about_is_a_failure_like_any_other(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    layer = deciding.add(undecided, "a")
    del layer.in_proj_ba
    undecided.decide("worker")
    assert getattr(layer, gdn.PAIR) is None and "in_proj_ba" in deciding.journal.problems[0]


def test_two_layers_of_one_name_are_both_decided(deciding: Deciding) -> None:
    """A first engine whose loading failed, and whose layers are not gone yet."""
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, "a"), deciding.add(undecided, "a")]
    deciding.settle = lambda candidates: {"a": NOTHING_TO_GAIN}
    undecided.decide("worker")
    assert [getattr(layer, gdn.PAIR) for layer in layers] == [None, None]


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
    layer.in_proj_qkvz, layer.in_proj_ba = Projection("qkvz", 48, [], torch.Generator()), torch.nn.Identity()
    refused[0] = True
    other = module.Layer("b")
    assert getattr(layer, gdn.PAIR) is pair and getattr(other, gdn.PAIR) is None
    decide("worker")
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
