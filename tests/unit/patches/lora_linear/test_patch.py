"""The LoRA patch without an engine: which layers it takes, the traced `apply`, the op, and what `install` does with a package."""

from __future__ import annotations

import dataclasses
import functools
import gc
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

pytest.importorskip("vllm")

from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op  # noqa: F401 - vLLM registers its two ops there

from overlay.engine import compile_cache, loaded
from overlay.patches.lora_linear import patch as lora_linear
from overlay.report.journal import OwnJournal, PatchRecord
from overlay.settings import Settings
from overlay.side_work import adoption, insertion, lane, lowering, ops
from overlay.side_work.adoption import StaysStock
from overlay.side_work.lowering import NO_CAPTURE
from overlay.side_work.plan import Plan
from overlay.side_work.waiting import FAILED
from overlay.verdict import Upstream, Verdict
from tests.unit import side_work_ops
from tests.unit.side_work import test_order as order

namespace = types.SimpleNamespace
SHARDED_WORDS = "fully_sharded_loras isn't compatible with dual-stream LoRA"
FEATURES, COLUMNS, RANK, TOKENS, ROWS = 128, 256, 4, 5, 64
NAME = "model.layers.0.o_proj"

# ------------------------------------------------------------------------------------------------ a vLLM of a few lines

#: Upstream's ops, globals of the wrapper's module. The patch replaces the first one.
lora_shrink, lora_expand = torch.ops.vllm.lora_shrink, torch.ops.vllm.lora_expand


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Upstream's two ops computing on a CPU; what has been called."""
    found: list[str] = []

    def shrink(x: Any, weights: Any, buffer: Any, *rest: Any) -> None:
        found.append("shrink")
        assert isinstance(weights, list) and len(weights) == len(buffer)
        for piece, weight in zip(buffer, weights, strict=True):
            piece.copy_(rest[-1] * x @ weight[0, 0].t())

    def expand(buffer: Any, weights: Any, output: Any, *rest: Any) -> None:
        found.append("expand")
        for piece, weight in zip(buffer, weights, strict=True):
            output += piece @ weight[0, 0].t()

    monkeypatch.setitem(globals(), "lora_shrink", torch.ops.vllm.lora_shrink)
    library = torch.library.Library("vllm", "IMPL")
    library.impl("lora_shrink", shrink, "CPU", allow_override=True)
    library.impl("lora_expand", expand, "CPU", allow_override=True)
    yield found
    library._destroy()


class Punica:
    """A punica wrapper in the shape of upstream's for a GPU."""

    def __init__(self, no_adapter: bool = False) -> None:
        tensor = torch.zeros(ROWS, dtype=torch.int32)
        self.token_mapping_meta = namespace(mapping=tensor, no_lora_flag_cpu=torch.tensor([no_adapter]))

    def _given(self, tokens: int) -> tuple[torch.Tensor, ...]:
        meta = self.token_mapping_meta
        views = (meta.mapping[:tokens], meta.mapping[:tokens])
        return (*views, meta.mapping, meta.mapping, meta.mapping, meta.no_lora_flag_cpu, meta.mapping)

    def add_lora_linear(self, y: Any, x: torch.Tensor, a: Any, b: Any, scale: float, slices: Any, **named: Any) -> None:
        buffer = torch.empty((len(slices), x.size(0), b[0].size(-1)), dtype=torch.float32, device=x.device)
        self.add_shrink(buffer, x, a, scale, **named)
        self.add_expand(y, buffer, b, slices, add_inputs=True, **named)

    def add_shrink(self, y: torch.Tensor, x: torch.Tensor, a: Any, scale: float, **named: Any) -> None:
        x = x.view(-1, x.shape[-1])
        lora_shrink(x, a, y, *self._given(x.size(0)), scale)

    def add_expand(self, y: torch.Tensor, x: torch.Tensor, b: Any, slices: Any, add_inputs: bool = False) -> None:
        assert add_inputs
        lora_expand(x, b, y.view(-1, y.shape[-1]), *self._given(x.size(1)), offset_start=0, add_inputs=add_inputs)


class CpuPunica:
    """As vLLM's wrapper for a CPU: no metadata, no op, a buffer for each slice."""

    def add_lora_linear(self, y: Any, x: torch.Tensor, a: Any, b: Any, scale: float, slices: Any) -> None:
        buffer = tuple(torch.zeros(x.size(0), b[0].size(-1)) for _ in slices)
        self.add_shrink(buffer, x, a, scale)
        self.add_expand(y, buffer, b, slices, add_inputs=True)

    def add_shrink(self, y: Any, x: torch.Tensor, a: Any, scale: float) -> None:
        for number in range(len(a)):
            y[number].add_(scale * x @ a[number][0, 0].t())

    def add_expand(self, y: torch.Tensor, x: Any, b: Any, slices: Any, add_inputs: bool) -> None:
        for piece, weight in zip(x, b, strict=True):
            y += piece @ weight[0, 0].t()


class ColumnParallelLinear(torch.nn.Module):
    def __init__(self, columns: int, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.weight = torch.nn.Parameter(torch.randn(columns, FEATURES), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.output_size = self.output_size_per_partition = columns
        self.gemm: order.Main = order.plain
        self.quant_method = type("UnquantizedLinearMethod", (), {})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gemm(x, self.weight)


class GateLinear(ColumnParallelLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


class BaseLayerWithLoRA(torch.nn.Module):
    def set_mapping(self, punica_wrapper: Any) -> None:
        self.punica_wrapper = punica_wrapper


class BaseLinearLayerWithLoRA(BaseLayerWithLoRA):
    """A LoRA linear of a few lines: `apply` and one helper, in the shape of upstream's."""

    def __init__(self, columns: int = COLUMNS, prefix: str = NAME, base: type = ColumnParallelLinear) -> None:
        super().__init__()
        self.base_layer = base(columns, prefix)
        self.output_slices = (columns,)
        self.lora_config = namespace(fully_sharded_loras=False)
        self.lora_a_stacked = (torch.randn(1, 1, RANK, FEATURES),)
        self.lora_b_stacked = (torch.randn(1, 1, columns, RANK),)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._apply_sync(x, bias)

    def _apply_sync(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        output = self.base_layer(x) if bias is None else self.base_layer(x) + bias
        rows = output.flatten(0, 1) if output.ndim == 3 else output
        x = x.flatten(0, 1) if x.ndim == 3 else x
        self.punica_wrapper.add_lora_linear(rows, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices)
        return output


class MergedLayer(BaseLinearLayerWithLoRA):
    """Goes to the class above it, as upstream's merged layers do from 0.25.1 on."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(x, bias)


class OtherApply(BaseLinearLayerWithLoRA):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x


class OtherHelper(BaseLinearLayerWithLoRA):
    def _apply_sync(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x


STOCK = BaseLinearLayerWithLoRA.__dict__["apply"]
INTERCEPTED = (BaseLinearLayerWithLoRA,)


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    """Where the ops count."""
    side_work_ops.define()
    found = PatchRecord()
    monkeypatch.setitem(ops.planned, lora_linear.NAME, ops.PlannedPair(Plan("dual", 256), found))
    return found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`engine()` makes an engine the current one, and gives its configuration."""

    def start(micro_batching: bool = False, batch_invariant: bool = False, mode: str = "FULL") -> Any:
        compilation = namespace(
            cudagraph_mode=namespace(name=mode), cudagraph_capture_sizes=[1, 8], compile_ranges_endpoints=[64], mode=3
        )
        config = namespace(
            compilation_config=compilation,
            parallel_config=namespace(use_ubatching=micro_batching),
            model_config=namespace(hf_text_config=namespace(hidden_size=FEATURES)),
        )
        monkeypatch.setattr(lora_linear, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(lora_linear, "is_forward_context_available", lambda: True)
        monkeypatch.setattr(lora_linear, "envs", namespace(VLLM_BATCH_INVARIANT=batch_invariant))
        monkeypatch.setattr(lora_linear, "LINEARS", (ColumnParallelLinear,))
        return config

    return start


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch, engine: Any) -> None:
    engine()
    monkeypatch.setattr(BaseLinearLayerWithLoRA, "apply", lora_linear.overlap_adapters(STOCK))


def adopted(layer: Any, wrapper: Any = None) -> Any:
    layer.set_mapping(wrapper or Punica())
    pair, _ = lora_linear.make_pair(layer, INTERCEPTED)
    setattr(layer, lora_linear.PAIR, pair)
    return layer


# ------------------------------------------------------------------------------------------------ which layers


def test_a_layer_that_fits(engine: Any) -> None:
    engine()
    layer: Any = BaseLinearLayerWithLoRA()
    layer.set_mapping(Punica())
    pair, shown = lora_linear.make_pair(layer, INTERCEPTED)
    assert pair.gate == "weight"
    assert shown == {"output": COLUMNS, "slices": 1, "class": "BaseLinearLayerWithLoRA"}


def test_the_copy_shares_modules_and_parameters_and_has_no_pair(engine: Any) -> None:
    engine()
    layer = adopted(BaseLinearLayerWithLoRA())
    base = getattr(adopted(layer), lora_linear.PAIR).base
    assert type(base) is type(layer) and getattr(base, lora_linear.PAIR) is None
    assert base.base_layer is layer.base_layer and base._modules is layer._modules
    assert [name for name, _ in layer.named_modules()] == ["", "base_layer"]
    base.punica_wrapper.add_lora_linear(torch.zeros(1), add_inputs=True)
    base.punica_wrapper.add_shrink(1)
    base.punica_wrapper.add_expand(1)


def test_slices_that_disagree_with_the_base_layer_name_both(engine: Any) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA(8)
    layer.output_slices = (8, 4)
    with pytest.raises(StaysStock, match="12 columns, but the base layer has 8"):
        lora_linear.make_pair(layer, INTERCEPTED)
    layer.output_slices = (8,)
    del layer.base_layer.output_size_per_partition  # then the whole size counts
    layer.base_layer.output_size = 9
    with pytest.raises(StaysStock, match="8 columns, but the base layer has 9"):
        lora_linear.make_pair(layer, INTERCEPTED)


@pytest.mark.parametrize(
    ("options", "reason"), [({"micro_batching": True}, "DBO"), ({"batch_invariant": True}, "batch-invariant")]
)
def test_modes_that_are_refused(engine: Any, options: dict[str, bool], reason: str) -> None:
    engine(**options)
    with pytest.raises(StaysStock, match=reason):
        lora_linear.check_engine(BaseLinearLayerWithLoRA())


def test_without_a_capture_a_gpu_stays_stock(engine: Any) -> None:
    engine(mode="NONE")
    layer: Any = BaseLinearLayerWithLoRA()
    lora_linear.check_engine(layer)
    layer.lora_a_stacked = (namespace(device=torch.device("cuda")),)
    with pytest.raises(StaysStock, match=NO_CAPTURE):
        lora_linear.check_engine(layer)
    engine()
    lora_linear.check_engine(layer)


def test_fully_sharded_adapters_are_refused_in_upstreams_words(engine: Any) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA()
    layer.lora_config.fully_sharded_loras = True
    with pytest.raises(StaysStock, match=SHARDED_WORDS):
        lora_linear.check_engine(layer)


@pytest.mark.parametrize(
    ("layer_class", "reason"),
    [(OtherApply, "OtherApply has an apply of its own"), (OtherHelper, "OtherHelper has _apply_sync of its own")],
)
def test_classes_that_go_another_way_are_refused(layer_class: type, reason: str) -> None:
    with pytest.raises(StaysStock, match=reason):
        lora_linear.check_class(layer_class, INTERCEPTED)


def test_classes_that_go_to_an_intercepted_one_are_taken() -> None:
    lora_linear.check_class(MergedLayer, INTERCEPTED)
    lora_linear.check_class(OtherApply, (OtherApply, *INTERCEPTED))


def test_a_base_layer_with_its_own_forward_is_refused(engine: Any) -> None:
    engine()
    with pytest.raises(StaysStock, match="GateLinear has a forward of its own"):
        lora_linear.make_pair(BaseLinearLayerWithLoRA(base=GateLinear), INTERCEPTED)


@pytest.mark.parametrize("mode", [0, 1, 3])
@pytest.mark.parametrize("knows_ranges", [False, True])
@pytest.mark.parametrize("quantizes", [False, True])
def test_starts_are_put_in_last_where_vllm_itself_compiles(
    engine: Any, monkeypatch: pytest.MonkeyPatch, mode: int, knows_ranges: bool, quantizes: bool
) -> None:
    """From 0.18 on. Elsewhere a base layer that may quantize its input stays stock, unless nothing is compiled: then nobody rounds."""
    config = engine()
    config.compilation_config.mode = mode
    if not knows_ranges:
        del config.compilation_config.compile_ranges_endpoints
    layer: Any = BaseLinearLayerWithLoRA()
    if quantizes:
        layer.base_layer.quant_method = type("Fp8LinearMethod", (), {})()
    layer.set_mapping(Punica())
    required: list[Any] = []
    monkeypatch.setattr(insertion, "require", lambda *given: required.append(given))
    inserted = mode == 3 and knows_ranges
    if quantizes and mode and not inserted:
        with pytest.raises(
            StaysStock, match="Fp8LinearMethod may quantize its input, and Inductor would round it otherwise"
        ):
            lora_linear.make_pair(layer, INTERCEPTED, config.compilation_config)
    else:
        pair, _ = lora_linear.make_pair(layer, INTERCEPTED, config.compilation_config, strict=True)
        assert pair.shape == "by weight"
    assert bool(required) == inserted
    for op, stock, edit, strict in required:
        assert (str(op), str(stock), strict) == ("vllm_overlay.lora_start", "vllm.lora_shrink", True) and callable(edit)


def test_a_base_layer_without_a_parameter_is_refused(engine: Any) -> None:
    engine()
    layer: Any = BaseLinearLayerWithLoRA()
    layer.base_layer._parameters.clear()
    with pytest.raises(StaysStock, match="without a parameter of its own"):
        lora_linear.make_pair(layer, INTERCEPTED)


def test_a_wrapper_without_upstreams_op_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine()
    layer: Any = BaseLinearLayerWithLoRA()
    layer.set_mapping(Punica())
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "lora_shrink", print)
        with pytest.raises(StaysStock, match="Punica does not shrink by vLLM's own op"):
            lora_linear.make_pair(layer, INTERCEPTED)
    del layer.punica_wrapper.token_mapping_meta
    monkeypatch.setattr(adoption, "other_device", lambda: None)
    with pytest.raises(StaysStock, match="Punica does not shrink by vLLM's own op"):
        lora_linear.make_pair(layer, INTERCEPTED)
    layer.set_mapping(CpuPunica())
    with pytest.raises(StaysStock, match="CpuPunica does not shrink by vLLM's own op"):
        lora_linear.make_pair(layer, INTERCEPTED)


# ------------------------------------------------------------------------------------------------ the op


def test_the_op_takes_what_upstreams_takes_and_the_gate_and_a_name(engine: Any) -> None:
    engine()
    lora_linear.take_over_shrink(Punica())
    lora_linear.take_over_shrink(Punica())  # once per process
    mine, stock = (str(op.default._schema) for op in (torch.ops.vllm_overlay.lora_start, torch.ops.vllm.lora_shrink))
    assert mine.partition("(")[2] == stock.partition("(")[2].replace(") -> ()", ", Tensor(gate!) gate, str name) -> ()")
    assert torch.Tag.flexible_layout in torch.ops.vllm_overlay.lora_start.default.tags


def test_other_callers_get_upstreams_op(engine: Any, kernels: list[str], record: PatchRecord) -> None:
    """The logits' shrink goes through the same global."""
    lora_linear.take_over_shrink(Punica())
    assert lora_shrink is lora_linear.lora_shrink
    buffer = torch.empty(1, TOKENS, RANK)
    x, weight = torch.randn(TOKENS, FEATURES), torch.randn(1, 1, RANK, FEATURES)
    lora_shrink(x, [weight], buffer, *Punica()._given(TOKENS), scaling=2.0)
    assert torch.equal(buffer[0], 2.0 * x @ weight[0, 0].t())
    assert kernels == ["shrink"] and record.calls.total() == 0


class Lane:
    """A lane on a CPU: the order of what happens to it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, result: torch.Tensor, strategy: str, work: Callable[[], Any]) -> None:
        self.calls.append(strategy)
        work()

    def forget(self, result: torch.Tensor) -> None:
        self.calls.append("forget")

    def join(self, result: torch.Tensor) -> None:
        self.calls.append("join")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("dual", ["dual"]), ("dual_main_first", ["dual_main_first"]), ("serial", ["forget"])],
    ids=["side first", "main first", "serial"],
)
def test_start_forks_where_the_plan_says_so(
    patched: None, kernels: list[str], monkeypatch: pytest.MonkeyPatch, strategy: str, expected: list[str]
) -> None:
    found = Lane()
    monkeypatch.setattr(ops, "choose", lambda x, name, idle: (strategy, found))
    layer, x = adopted(MergedLayer()), torch.randn(TOKENS, FEATURES)
    output = layer.apply(x)
    assert found.calls == expected
    assert kernels == ["shrink", "expand"]
    assert torch.equal(output, STOCK(layer, x))


def test_without_an_adapter_nothing_is_forked(patched: None, kernels: list[str], record: PatchRecord) -> None:
    layer, x = adopted(MergedLayer(), Punica(no_adapter=True)), torch.randn(TOKENS, FEATURES)
    layer.apply(x)
    assert record.calls.serial == {lora_linear.NO_ADAPTER: 1} and record.calls.dual_stream == 0
    assert kernels == ["shrink", "expand"]  # upstream's own ops find that there is nothing to do


def test_a_name_without_a_plan_is_computed_serially(patched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of yesterday's cache may name it."""
    monkeypatch.delitem(ops.planned, lora_linear.NAME)
    layer, x = adopted(MergedLayer()), torch.randn(TOKENS, FEATURES)
    assert torch.equal(layer.apply(x), STOCK(layer, x))


# ------------------------------------------------------------------------------------------------ the traced apply


@pytest.mark.parametrize("leading", [(TOKENS,), (1, TOKENS), (2, TOKENS)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("wrapper", [Punica, CpuPunica])
def test_upstreams_bits_and_the_layer_is_left_alone(
    patched: None, record: PatchRecord, wrapper: type, with_bias: bool, leading: tuple[int, ...]
) -> None:
    layer = adopted(MergedLayer(), wrapper())
    assert (getattr(layer, lora_linear.PAIR).gate is None) == (wrapper is CpuPunica)
    before = dict(layer.__dict__), dict(layer.base_layer.__dict__), dict(layer.punica_wrapper.__dict__)
    x, bias = torch.randn(*leading, FEATURES), torch.randn(COLUMNS) if with_bias else None
    expected = STOCK(layer, x, bias)
    assert record.calls.total() == 0
    assert torch.equal(layer.apply(x, bias), expected)
    assert before == (dict(layer.__dict__), dict(layer.base_layer.__dict__), dict(layer.punica_wrapper.__dict__))
    assert record.calls.serial == {"serial pass-through": 1}


@pytest.mark.parametrize("why", ["no forward context", "not taken"])
def test_around_the_ops(patched: None, record: PatchRecord, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    layer, x = adopted(MergedLayer()), torch.randn(TOKENS, FEATURES)
    if why == "not taken":
        setattr(layer, lora_linear.PAIR, None)
    else:
        monkeypatch.setattr(lora_linear, "is_forward_context_available", lambda: False)
    assert torch.equal(layer.apply(x), STOCK(layer, x))
    assert record.calls.total() == 0


def model(layers: list[Any], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = torch.relu(layer.apply(x))[..., :FEATURES]
    return x


def compiled(layers: list[Any], x: torch.Tensor, v2: bool) -> tuple[torch.Tensor, str]:
    torch._dynamo.reset()
    with inductor.patch({"enable_auto_functionalized_v2": v2, "fx_graph_cache": False}), torch.no_grad():
        result, code = run_and_get_code(torch.compile(model, fullgraph=True), layers, x)
    return result, code[0]


@pytest.mark.parametrize("v2", [False, True], ids=["as vLLM sets it", "as torch sets it"])
def test_start_comes_before_the_base_layer_and_join_before_expand(
    patched: None, monkeypatch: pytest.MonkeyPatch, v2: bool
) -> None:
    layers: list[Any] = [adopted(MergedLayer()) for _ in range(3)]
    x = torch.randn(TOKENS, FEATURES)
    with monkeypatch.context() as patch:
        patch.setattr(BaseLinearLayerWithLoRA, "apply", STOCK)
        expected, stock = compiled(layers, x, v2)
    result, code = compiled(layers, x, v2)
    assert torch.equal(result, expected)
    found = calls(code)
    marks = [name for name in found if not name.startswith("cpp_fused")]
    assert marks == ["lora_start", "mm", "join", "lora_expand"] * len(layers)
    # Nothing of the base layer runs before start: it comes directly after the kernel that makes its input.
    assert all(found[place - 1].startswith("cpp_fused") for place, name in enumerate(found) if name == "lora_start")
    # Beside start and join there is what stock has, less its shrink: no clone, and no kernel that was torn in two.
    assert sorted(name for name in found if name not in ("lora_start", "join")) == sorted(
        name for name in calls(stock) if name != "lora_shrink"
    )
    assert order.texts(stock) and order.texts(code) == order.texts(stock)


def test_the_base_layer_reads_what_start_has_written_and_expand_what_join_has(patched: None) -> None:
    """The order does not rest on what comes first in the source: it is in the data, which every pass has to respect."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    def written_by(node: torch.fx.Node) -> list[torch.fx.Node]:
        """What the arguments that an op writes to are after the op, in the order of its schema."""
        users = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        return [users[place] for place in sorted(users) if place > 0]

    layer, x = adopted(MergedLayer()), torch.randn(TOKENS, FEATURES)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, inference_compiler=keep)
    with inductor.patch({"enable_auto_functionalized_v2": False}), torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)([layer], x)
    (graph,) = graphs
    nodes = {str(node.args[0]): node for node in graph.graph.nodes if node.target is auto_functionalized}
    start, join, expand = nodes.values()
    assert list(nodes) == ["vllm_overlay.lora_start.default", "vllm_overlay.join.default", "vllm.lora_expand.default"]
    (gemm,) = (node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default)
    buffer, gate = written_by(start)
    weight = gemm.args[1]
    assert weight is gate or gate in weight.all_input_nodes  # or a transposed view of it
    assert join.kwargs["result"] is buffer and join.kwargs["main"] is gemm
    assert [expand.kwargs["inputs"]] == written_by(join)
    assert join.kwargs["x"] is start.kwargs["inputs"] or join.kwargs["x"] in start.kwargs["inputs"].all_input_nodes


def calls(code: str) -> list[str]:
    """As `test_order.calls`, of the ops of any library."""
    return order.calls(code.replace("torch.ops.vllm.", "torch.ops.vllm_overlay."))


def test_above_the_captured_sizes_it_is_upstreams_graph(
    patched: None, record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[Any] = [adopted(MergedLayer()), adopted(BaseLinearLayerWithLoRA())]
    x = torch.randn(TOKENS, FEATURES)

    def traced() -> torch.fx.GraphModule:
        graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)(layers, x)
        (found,) = graphs
        return found

    def ops_of(module: torch.fx.GraphModule) -> list[Any]:
        found = [node for node in module.graph.nodes if "vllm" in str(node.target)]
        return [(node.target, len(node.args), dict(node.kwargs)) for node in found]

    module = traced()
    assert [str(target) for target, *_ in ops_of(module)] == [
        "vllm_overlay.lora_start", "vllm_overlay.join", "vllm.lora_expand",
    ] * 2  # fmt: skip
    lowered = lowering.edited(module, lowering._above)
    with monkeypatch.context() as patch:
        patch.setattr(BaseLinearLayerWithLoRA, "apply", STOCK)
        patch.setitem(globals(), "lora_shrink", torch.ops.vllm.lora_shrink)
        stock = traced()
    assert ops_of(lowered) == ops_of(stock)
    assert record.calls.lowered == 2
    inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == len([node for node in lowered.graph.nodes if node.op == "placeholder"])


@pytest.mark.parametrize("batch", [(), (1,)])
def test_the_compiler_counts_start(patched: None, record: PatchRecord, batch: tuple[int, ...]) -> None:
    layer, x = adopted(MergedLayer()), torch.randn(TOKENS, *batch, FEATURES)
    torch._dynamo.reset()
    compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (TOKENS, 3):
        assert torch.equal(compiled_model([layer], x[:tokens]), model([layer], x[:tokens]))
    assert record.calls.fake > 0


# ------------------------------------------------------------------------------------------------ install

FOUND = Verdict("apply", "…", "vllm.lora.layers", methods=("base_linear.BaseLinearLayerWithLoRA.apply",))
WITH_SWITCH = dataclasses.replace(FOUND, upstream=Upstream("#35721", False, "VLLM_LORA_ENABLE_DUAL_STREAM=1"))
PASS = Settings(serial_pass_through=True)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, engine: Any) -> Any:
    """A package of LoRA layers that has just been imported, a journal of its own, and `load()`: the model has been loaded."""
    config = engine()
    journal, waiting, entered = OwnJournal(), list[Any](), list[tuple[str, ...]]()
    monkeypatch.setattr(lora_linear, "journal", journal)
    monkeypatch.setattr("overlay.side_work.adoption.journal", journal)
    monkeypatch.setattr("overlay.side_work.waiting.journal", journal)
    monkeypatch.setattr(loaded, "_waiting", waiting)
    monkeypatch.setattr(lowering, "intercept_compiler", lambda strict: None)
    shapes: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(compile_cache, "_shapes", shapes)
    monkeypatch.setattr(
        compile_cache,
        "_enter",
        lambda: entered.append(tuple(f"{name}={shape}" for name, shape in sorted(shapes["lora_linear"].items()))),
    )
    ancestor = type("BaseLayerWithLoRA", (torch.nn.Module,), {"set_mapping": BaseLayerWithLoRA.set_mapping})
    body = {name: value for name, value in BaseLinearLayerWithLoRA.__dict__.items() if name in ("apply", "_apply_sync")}
    linear = type("BaseLinearLayerWithLoRA", (ancestor,), body)

    def load() -> None:
        for decide in waiting:
            decide(namespace(vllm_config=config))

    return namespace(
        base=namespace(BaseLayerWithLoRA=ancestor),
        base_linear=namespace(BaseLinearLayerWithLoRA=linear),
        other=type("LogitsProcessorWithLoRA", (ancestor,), {}),
        journal=journal,
        stock=body["apply"],
        load=load,
        keys=entered,
        compilation=config.compilation_config,
    )


def a_layer_of(package: Any, fully_sharded: bool = False, prefix: str = NAME) -> Any:
    layer = object.__new__(package.base_linear.BaseLinearLayerWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.__dict__.update(vars(BaseLinearLayerWithLoRA(prefix=prefix)))
    layer.lora_config = namespace(fully_sharded_loras=fully_sharded)
    return layer


def test_install_takes_every_linear_when_its_model_has_been_loaded(package: Any) -> None:
    assert lora_linear.install(package, FOUND, PASS) == FOUND
    layer = a_layer_of(package)
    layer.set_mapping(Punica())
    assert getattr(layer, lora_linear.PAIR) is None  # no key in the cache says so yet
    package.load()
    assert getattr(layer, lora_linear.PAIR).gate == "weight"
    assert package.journal.patch("lora_linear").patched == {
        NAME: {"output": COLUMNS, "slices": 1, "class": "BaseLinearLayerWithLoRA"}
    }
    processor = package.other()
    processor.set_mapping(Punica())
    assert not hasattr(processor, lora_linear.PAIR)
    layer.set_mapping(Punica())  # a module that is shared by two names is met twice
    layer.set_mapping(Punica())
    package.load()
    assert getattr(layer, lora_linear.PAIR) is not None


def test_the_key_of_the_compile_cache_says_what_is_patched_and_by_which_gate(package: Any) -> None:
    lora_linear.install(package, FOUND, PASS)
    layers = [a_layer_of(package, prefix=name) for name in ("b", "a", "c")]
    layers[2].output_slices = (1,)  # adopting it has told the key already
    for layer in layers:
        layer.set_mapping(Punica())
    package.load()
    (key,) = package.keys
    assert key == ("a=by weight", "b=by weight", "ranges=[8, 64]")


def test_only_an_engine_with_a_pair_splits_its_ranges(package: Any) -> None:
    """Once for two patches. What is refused is so on all ranks; a failure of one rank alone is `Waiting`'s business."""
    lora_linear.install(package, FOUND, PASS)
    package.load()
    assert package.keys == []  # no LoRA at all
    refused, taken = a_layer_of(package, prefix="a"), a_layer_of(package, prefix="b")
    refused.output_slices = (1,)
    refused.set_mapping(Punica())
    package.load()
    assert package.compilation.compile_ranges_endpoints == [64]
    taken.set_mapping(Punica())
    package.load()
    package.load()
    assert package.compilation.compile_ranges_endpoints == [8, 64]


def test_an_engine_that_is_stock_as_a_whole_keeps_its_ranges(package: Any) -> None:
    lora_linear.install(package, FOUND, PASS)
    layer = a_layer_of(package, fully_sharded=True)
    layer.set_mapping(Punica())
    package.load()
    assert package.compilation.compile_ranges_endpoints == [64]


def test_each_engine_of_a_process_decides_for_itself(package: Any) -> None:
    """A second one has no layers of the first, and ranges for its own alone."""
    lora_linear.install(package, FOUND, PASS)
    first, second = a_layer_of(package, prefix="a"), a_layer_of(package, fully_sharded=True, prefix="b")
    first.set_mapping(Punica())
    package.load()
    package.load()
    assert len(package.keys) == 1
    package.compilation.compile_ranges_endpoints = [64]
    second.set_mapping(Punica())
    package.load()
    assert len(package.keys) == 1 and package.compilation.compile_ranges_endpoints == [64]


@pytest.mark.parametrize("strict", [False, True])
def test_where_deciding_fails_the_layers_are_stock(package: Any, monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    lora_linear.install(package, FOUND, dataclasses.replace(PASS, strict=strict))
    layer = a_layer_of(package)
    layer.set_mapping(Punica())
    monkeypatch.setattr(lowering, "split_ranges", lambda *_: 1 / 0)
    if strict:
        with pytest.raises(ZeroDivisionError):
            package.load()
        return
    package.load()
    assert getattr(layer, lora_linear.PAIR) is None
    record = package.journal.patch("lora_linear")
    assert record.patched == {} and record.refused == {NAME: FAILED}
    assert package.keys[-1] == (f"{NAME}=stock", "ranges=[64]")
    assert "ZeroDivisionError" in package.journal.problems[0]


def test_a_layer_that_is_gone_is_not_kept(package: Any) -> None:
    lora_linear.install(package, FOUND, PASS)
    a_layer_of(package).set_mapping(Punica())
    gc.collect()
    package.load()
    assert package.keys == []


def test_on_a_gpu_the_lane_is_used_once_before_vllm_sizes_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    found, device = Lane(), torch.device("cpu")
    first_use = functools.partial(lora_linear._first_use, device)
    monkeypatch.setattr(lane, "prepare", lambda device: found)
    lane.use_once(device, first_use)
    assert found.calls == ["dual", "join"]
    monkeypatch.setattr(lane, "prepare", lambda device: None)
    lane.use_once(device, first_use)
    assert found.calls == ["dual", "join"]


@pytest.mark.parametrize(("slices", "prepared"), [((COLUMNS,), 1), ((1,), 0)], ids=["a pair", "all stock"])
def test_the_lane_is_used_once_when_a_model_with_a_pair_has_been_loaded(
    package: Any, monkeypatch: pytest.MonkeyPatch, slices: tuple[int, ...], prepared: int
) -> None:
    """Not before, and not during a capture."""
    lanes: list[Lane] = []
    monkeypatch.setattr(lane, "prepare", lambda device: lanes.append(Lane()) or lanes[-1])
    lora_linear.install(package, FOUND, PASS)
    layers = [a_layer_of(package, prefix=prefix) for prefix in ("a", "b")]
    for layer in layers:
        layer.lora_a_stacked = (namespace(is_cuda=True, device=torch.device("cpu"), shape=(1, 1, RANK, FEATURES)),)
        layer.output_slices = slices
        layer.set_mapping(Punica())
    assert lanes == []
    package.load()
    assert [found.calls for found in lanes] == [["dual", "join"]] * prepared


@pytest.mark.parametrize(
    ("settings", "rank", "plan"),
    [
        ({}, 8, Plan("dual", 256)),
        ({}, 16, Plan("dual", 256)),
        ({}, 32, Plan("dual", 64)),
        ({"token_threshold": 7}, 64, Plan("dual", 7)),
        ({"token_threshold": 512}, 64, Plan("dual", 512)),
        ({"plan": "serial"}, 16, Plan("serial", 256)),
    ],
)
def test_the_plan_is_that_of_the_rank_unless_settings_say_another(
    package: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], rank: int, plan: Plan
) -> None:
    monkeypatch.setattr(ops, "planned", {})
    lora_linear.install(package, FOUND, dataclasses.replace(PASS, **settings))
    layer = a_layer_of(package)
    layer.lora_a_stacked = (torch.zeros(4, 1, rank, FEATURES),)
    layer.set_mapping(Punica())
    assert ops.planned == {}
    package.load()
    assert ops.planned[lora_linear.NAME].plan == plan
    assert ops.planned[lora_linear.NAME].record is package.journal.patch("lora_linear")


def test_without_cuda_it_is_inert_and_changes_nothing(package: Any) -> None:
    found = lora_linear.install(package, FOUND, Settings())
    assert found.state == "inert" and "dual CUDA streams" in found.reason and "cpu" in found.reason
    assert package.base_linear.BaseLinearLayerWithLoRA.apply is package.stock
    assert not hasattr(package.base_linear.BaseLinearLayerWithLoRA, lora_linear.PAIR)


def test_where_upstreams_switch_is_set_it_steps_aside(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear, "envs", namespace(VLLM_LORA_ENABLE_DUAL_STREAM=True))
    found = lora_linear.install(package, WITH_SWITCH, PASS)
    assert found.state == "landed" and "VLLM_LORA_ENABLE_DUAL_STREAM is set" in found.reason
    assert package.base_linear.BaseLinearLayerWithLoRA.apply is package.stock


def test_a_switch_that_is_off_is_no_reason_to_step_aside(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear, "envs", namespace(VLLM_LORA_ENABLE_DUAL_STREAM=False))
    assert lora_linear.install(package, WITH_SWITCH, PASS).state == "apply"


def test_fully_sharded_adapters_are_said_once(package: Any) -> None:
    lora_linear.install(package, FOUND, PASS)
    for _ in range(3):
        layer = a_layer_of(package, fully_sharded=True)
        layer.set_mapping(Punica())
        package.load()
        assert getattr(layer, lora_linear.PAIR) is None
        assert layer.punica_wrapper is not None
    (problem,) = package.journal.problems
    assert SHARDED_WORDS in problem
    assert package.journal.patch("lora_linear").patched == {}


def test_fully_sharded_adapters_under_strict_stop_the_start(package: Any) -> None:
    lora_linear.install(package, FOUND, dataclasses.replace(PASS, strict=True))
    with pytest.raises(ValueError, match=SHARDED_WORDS):
        a_layer_of(package, fully_sharded=True).set_mapping(Punica())
