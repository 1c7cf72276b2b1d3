"""Stock's graph above the captured sizes: through vLLM's own compilation (its backend, its ranges, Inductor), on a CPU."""

from __future__ import annotations

import contextlib
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from torch.nn.functional import linear
from vllm.compilation import backends
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from overlay import lowering
from overlay.journal import Journal, PatchRecord
from overlay.pair import LinearPair
from overlay.patches import gdn
from overlay.side_work.plan import DUAL, Plan

HIDDEN, MAIN, SIDE, LAYERS = 64, 96, 16, 2
CAPTURED, LARGEST = 8, 64


class Projection(torch.nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, HIDDEN) / HIDDEN**0.5, requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return linear(inputs, self.weight), None


class Layer(torch.nn.Module):
    """A norm, the two projections, and what takes their results apart."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.in_proj_qkvz, self.in_proj_ba = Projection(MAIN), Projection(SIDE)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.rms_norm(inputs, (HIDDEN,))
        qkvz, _ = self.in_proj_qkvz(hidden)
        ba, _ = self.in_proj_ba(hidden)
        return qkvz[:, :HIDDEN] * torch.sigmoid(ba.sum(-1, keepdim=True)) + qkvz[:, MAIN - HIDDEN :]


@pytest.fixture(scope="module")
def record() -> PatchRecord:
    record = PatchRecord()
    gdn.register_ops(record)
    return record


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    fresh = Journal()
    monkeypatch.setattr(lowering, "journal", fresh)
    return fresh


@pytest.fixture(autouse=True)
def watched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test wraps vLLM's compilation itself, and leaves it as it was."""
    monkeypatch.setattr(lowering, "_watched", False)
    monkeypatch.setattr(backends.CompilerManager, "compile", backends.CompilerManager.compile)


def configuration(endpoints: list[int] | None = None, **changes: Any) -> VllmConfig:
    config = VllmConfig()
    compilation = config.compilation_config
    compilation.mode, compilation.backend = 3, "inductor"  # not what vLLM has for a CPU, but all of it works there
    compilation.cudagraph_capture_sizes = [1, 2, 4, CAPTURED]
    compilation.compile_ranges_endpoints = [LARGEST] if endpoints is None else endpoints
    compilation.splitting_ops, compilation.compile_sizes = [], []
    vars(compilation).update(changes)
    return config


def split(compilation: Any, strict: bool, mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> bool:
    """With CUDA graphs for as long as it takes: a CPU has none to compile for."""
    before, compilation.cudagraph_mode = compilation.cudagraph_mode, mode
    try:
        return lowering.split_ranges(compilation, strict)
    finally:
        compilation.cudagraph_mode = before


class Compiled:
    """A model of some layers, compiled by vLLM, and what it was compiled from and to."""

    def __init__(self, config: VllmConfig, record: PatchRecord | None, one_result: bool = False, plain: bool = True):
        self.config, self.record = config, record
        self.graphs: dict[int, torch.fx.GraphModule] = {}  #: by the first number of tokens of their range
        self.code: list[str] = []

        @support_torch_compile(dynamic_arg_dims={"inputs": 0})
        class Model(torch.nn.Module):
            def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
                super().__init__()
                torch.manual_seed(0)
                self.layers = torch.nn.ModuleList(Layer(f"layers.{index}") for index in range(LAYERS))

            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    inputs = layer(inputs)
                return inputs

        with set_current_vllm_config(config):
            self.model = Model(vllm_config=config)
        for layer in self.model.layers:
            config.compilation_config.static_forward_context[layer.prefix] = layer
            if record is not None:
                pair = LinearPair(MAIN, SIDE, Plan(DUAL, 256), record)
                pair.plain, pair.one_result = plain, one_result
                setattr(layer, gdn.PAIR, pair)
                layer.forward = types.MethodType(gdn.overlap_in_projections(Layer.forward), layer)

    def __call__(self, tokens: int) -> torch.Tensor:
        inputs = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with (
            set_current_vllm_config(self.config),
            set_forward_context(None, self.config),
            torch.inference_mode(),
            self._kept(),
        ):
            return self.model(inputs)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        from torch._inductor.graph import GraphLowering

        compile_graph = backends.InductorStandaloneAdaptor.compile

        def keep(adaptor: Any, graph: Any, inputs: Any, config: Any, compile_range: Any, key: Any = None) -> Any:
            self.graphs[compile_range.start] = graph
            return compile_graph(adaptor, graph, inputs, config, compile_range, key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.InductorStandaloneAdaptor, "compile", keep)
            patch.setattr(GraphLowering, "save_output_code", self.code.append)
            yield

    def calls(self, start: int) -> list[str]:
        """What the graph of a range calls, in order."""
        nodes = self.graphs[start].graph.nodes
        return [f"{node.target} {node.args[1:]}" for node in nodes if node.op == "call_function"]

    def kernels(self) -> set[str]:
        """Name and text of every kernel that Inductor made."""
        found = re.findall(r"(\w+) = async_compile\.cpp_pybinding\((.*?)'''\)", "\n".join(self.code), re.DOTALL)
        return {name + text for name, text in found}


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Compiled:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    torch._dynamo.reset()
    compiled = Compiled(configuration(), None)
    compiled(LARGEST)
    return compiled


@pytest.mark.parametrize("one_result", [False, True], ids=["two results", "one result"])
def test_above_the_captured_sizes_the_graph_is_stocks(
    stock: Compiled, record: PatchRecord, journal: Journal, one_result: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {tokens: stock(tokens) for tokens in (LARGEST, CAPTURED + 1, CAPTURED, 1)}
    config = configuration()
    assert split(config.compilation_config, strict=True)
    assert config.compilation_config.compile_ranges_endpoints == [CAPTURED, LARGEST]
    lowered = record.calls.lowered
    torch._dynamo.reset()
    overlay = Compiled(config, record, one_result)
    for tokens, result in expected.items():
        before = record.calls.total()
        assert torch.equal(overlay(tokens), result), tokens
        assert record.calls.total() - before == (LAYERS if tokens <= CAPTURED else 0), tokens
    assert record.calls.lowered == lowered + LAYERS and journal.problems == []
    op = "gdn_in_proj_one" if one_result else "gdn_in_proj"
    assert sum(f"{op}" in call for call in overlay.calls(1)) == LAYERS
    above = overlay.calls(CAPTURED + 1)
    assert not any("gdn_in_proj" in call for call in above)
    if not one_result:
        assert [call.split()[0] for call in above] == [call.split()[0] for call in stock.calls(1)]
        assert overlay.kernels() == stock.kernels(), "the same kernels under the same names, below and above"


def test_one_result_is_written_in_place_above(record: PatchRecord, stock: Compiled) -> None:
    """The two GEMMs write into their part of the one tensor; nothing is copied together."""
    config = configuration()
    split(config.compilation_config, strict=True)
    torch._dynamo.reset()
    overlay = Compiled(config, record, one_result=True)
    overlay(LARGEST)
    (above,) = [code for code in overlay.code if "extern_kernels.mm(" in code and "gdn_in_proj" not in code]
    assert above.count("extern_kernels.mm(") == 2 * LAYERS
    for rows, first in ((MAIN, 0), (SIDE, MAIN)):
        parts = rf"= reinterpret_tensor\(\w+, \(\w+, {rows}\), \({MAIN + SIDE}, 1\), {first}\)"
        assert len(re.findall(parts, above)) == LAYERS
    assert "fused_cat" not in above


def test_linears_that_are_more_than_their_weights_keep_the_op(record: PatchRecord, stock: Compiled) -> None:
    config = configuration()
    split(config.compilation_config, strict=True)
    torch._dynamo.reset()
    overlay = Compiled(config, record, plain=False)
    before, lowered = record.calls.total(), record.calls.lowered
    assert torch.equal(overlay(LARGEST), stock(LARGEST))
    assert (record.calls.total() - before, record.calls.lowered - lowered) == (LAYERS, 0)


def test_columns_that_only_align_keep_the_op() -> None:
    """The leftover columns would have to be filled by a kernel of their own."""
    graph, node = graph_with_one(columns=112)
    assert not gdn.lower_one(graph, node) and node in graph.nodes
    graph, node = graph_with_one(columns=104)
    assert gdn.lower_one(graph, node) and node not in graph.nodes


def graph_with_one(columns: int) -> tuple[torch.fx.Graph, torch.fx.Node]:
    graph = torch.fx.Graph()
    inputs, qkvz, ba, name = (graph.placeholder(name) for name in ("inputs", "qkvz", "ba", "name"))
    qkvz.meta["example_value"], ba.meta["example_value"] = torch.empty(96, HIDDEN), torch.empty(8, HIDDEN)
    node = graph.call_function(torch.ops.vllm_overlay.gdn_in_proj_one, (inputs, qkvz, ba, columns, name))
    graph.output(node)
    return graph, node


def test_results_that_are_not_taken_apart_keep_the_op(record: PatchRecord) -> None:
    graph = torch.fx.Graph()
    inputs, qkvz, ba, name = (graph.placeholder(name) for name in ("inputs", "qkvz", "ba", "name"))
    node = graph.call_function(torch.ops.vllm_overlay.gdn_in_proj, (inputs, qkvz, ba, 96, 8, name))
    graph.output(node)
    assert not gdn.lower_two(graph, node)
    assert [one.op for one in graph.nodes] == ["placeholder"] * 4 + ["call_function", "output"]


def refuse(graph: torch.fx.Graph, node: torch.fx.Node) -> bool:
    raise KeyError("no such thing")


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_that_cannot_be_lowered_keeps_its_ops(
    strict: bool, record: PatchRecord, journal: Journal, stock: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "_lowered", {torch.ops.vllm_overlay.gdn_in_proj: (refuse, record)})
    config = configuration()
    split(config.compilation_config, strict)
    torch._dynamo.reset()
    overlay = Compiled(config, record)
    if strict:
        with pytest.raises(Exception, match="no such thing"):
            overlay(LARGEST)
    else:
        before = record.calls.total()
        assert torch.equal(overlay(LARGEST), stock(LARGEST))
        assert record.calls.total() == before + LAYERS
    assert journal.problems == ["lowering: graphs above the captured sizes keep their ops: KeyError: 'no such thing'"]


@pytest.mark.parametrize(
    ("changes", "endpoints"),
    [
        ({"mode": 1}, [LARGEST]),
        ({"mode": None}, [LARGEST]),
        ({"cudagraph_capture_sizes": []}, [LARGEST]),
        ({"cudagraph_capture_sizes": None}, [LARGEST]),
        ({"compile_ranges_endpoints": None}, None),
        ({"compile_mm_encoder": True}, [LARGEST]),
    ],
    ids=[
        "no ranges in this mode",
        "no mode",
        "nothing captured",
        "no sizes",
        "no endpoints",
        "an encoder",
    ],
)
def test_where_vllm_has_no_ranges_nothing_is_changed(changes: dict[str, Any], endpoints: Any) -> None:
    config = configuration(**changes)
    assert not split(config.compilation_config, strict=False)
    assert config.compilation_config.compile_ranges_endpoints == endpoints


def test_where_no_graph_is_captured_nothing_is_changed() -> None:
    compilation = configuration().compilation_config
    assert not split(compilation, strict=False, mode=CUDAGraphMode.NONE)
    assert compilation.compile_ranges_endpoints == [LARGEST]


def test_endpoints_that_are_there_stay(record: PatchRecord) -> None:
    config = configuration([4, 32, LARGEST]).compilation_config
    assert split(config, strict=False) and split(config, strict=False)
    assert config.compile_ranges_endpoints == [4, CAPTURED, 32, LARGEST]
    all_captured = configuration([CAPTURED]).compilation_config
    assert split(all_captured, strict=False) and all_captured.compile_ranges_endpoints == [CAPTURED]


def test_a_graph_without_an_op_is_left_as_it_is(record: PatchRecord) -> None:
    module = torch.fx.symbolic_trace(lambda inputs: inputs + 1)
    assert lowering.lower(module) is module


def test_what_was_traced_is_not_changed(record: PatchRecord) -> None:
    """vLLM compiles the same graph for the other ranges as well, and keeps it."""
    graph, _ = graph_with_one(columns=104)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    before = module.code
    assert "gdn_in_proj" not in lowering.lower(module).code
    assert module.code == before
