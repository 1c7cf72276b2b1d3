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
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from torch.nn.functional import linear
from vllm.compilation import backends
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from overlay.report.journal import OwnJournal, PatchRecord
from overlay.side_work import lowering, ops
from overlay.side_work.declaration import TwoLinears
from overlay.side_work.pairs import Pair
from overlay.side_work.plan import Plan
from overlay.side_work.waiting import PAIR
from overlay.vocabulary import DUAL
from tests.unit import side_work_ops

HIDDEN, MAIN, SIDE, LAYERS = 64, 96, 16, 2
CAPTURED, LARGEST = 8, 64
DECLARED = TwoLinears("a patch", "in_proj_qkvz", "in_proj_ba", lambda layer: {"main": MAIN, "side": SIDE}, 256)


class Projection(torch.nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, HIDDEN) / HIDDEN**0.5, requires_grad=False)
        self.input_size, self.params_dtype = HIDDEN, torch.float32

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


class FollowedLayer(Layer):
    """A layer that copies the halves of its side's result, as Qwen's do."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.rms_norm(inputs, (HIDDEN,))
        qkvz, _ = self.in_proj_qkvz(hidden)
        ba, _ = self.in_proj_ba(hidden)
        b, a = ba.chunk(2, dim=-1)
        out = torch.zeros((hidden.shape[0], HIDDEN), dtype=hidden.dtype, device=hidden.device)
        return out + qkvz[:, :HIDDEN] * b.contiguous()[:, :1] + a.contiguous()[:, :1]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    """Where the ops count. One pair of a plain side, and one whose side is more than a GEMM."""
    side_work_ops.define()
    record = PatchRecord()
    planned = ops.PlannedPair(Plan(DUAL, 256), record)
    monkeypatch.setattr(ops, "planned", {pair_of(Layer(""), plain).name: planned for plain in (True, False)})
    return record


def pair_of(layer: Layer, plain: bool) -> Pair:
    kind = "torch" if plain else "another"
    return Pair(layer.prefix, layer.in_proj_qkvz, layer.in_proj_ba, MAIN, SIDE, "a GEMM", kind, "weight", plain)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> OwnJournal:
    fresh = OwnJournal()
    monkeypatch.setattr(lowering, "journal", fresh)
    return fresh


@pytest.fixture(autouse=True, scope="module")
def kernels_of_a_gpu() -> Iterator[None]:
    library = side_work_ops.define_missing_kernels()
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def watched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test wraps vLLM's compilation itself, and leaves it as it was."""
    monkeypatch.setattr(lowering, "_intercepted", False)
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


def split(
    compilation: Any,
    strict: bool,
    mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
    hidden: int | None = HIDDEN,
) -> bool:
    """With CUDA graphs for as long as it takes: a CPU has none to compile for."""
    before, compilation.cudagraph_mode = compilation.cudagraph_mode, mode
    text = types.SimpleNamespace() if hidden is None else types.SimpleNamespace(hidden_size=hidden)
    model = types.SimpleNamespace(hf_text_config=text)
    try:
        return lowering.split_ranges(types.SimpleNamespace(compilation_config=compilation, model_config=model), strict)
    finally:
        compilation.cudagraph_mode = before


class Compiled:
    """A model of some layers, compiled by vLLM, and what it was compiled from and to."""

    def __init__(
        self, config: VllmConfig, record: PatchRecord | None, plain: bool = True, layer_class: type[Layer] = Layer
    ):
        self.config, self.record = config, record
        self.graphs: dict[int, torch.fx.GraphModule] = {}  #: by the first number of tokens of their range
        self.code: list[str] = []

        @support_torch_compile(dynamic_arg_dims={"inputs": 0})
        class Model(torch.nn.Module):
            def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
                super().__init__()
                torch.manual_seed(0)
                self.layers = torch.nn.ModuleList(layer_class(f"layers.{index}") for index in range(LAYERS))

            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    inputs = layer(inputs)
                return inputs

        with set_current_vllm_config(config):
            self.model = Model(vllm_config=config)
        for layer in self.model.layers:
            config.compilation_config.static_forward_context[layer.prefix] = layer
            if record is not None:
                setattr(layer, PAIR, pair_of(layer, plain))
                layer.forward = types.MethodType(DECLARED.intercept(layer_class.forward), layer)

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


def test_above_the_captured_sizes_the_graph_is_stocks(
    stock: Compiled, record: PatchRecord, journal: OwnJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {tokens: stock(tokens) for tokens in (LARGEST, CAPTURED + 1, CAPTURED, 1)}
    config = configuration()
    assert split(config.compilation_config, strict=True)
    assert config.compilation_config.compile_ranges_endpoints == [CAPTURED, LARGEST]
    torch._dynamo.reset()
    overlay = Compiled(config, record)
    for tokens, result in expected.items():
        before = record.calls.total()
        assert torch.equal(overlay(tokens), result), tokens
        assert record.calls.total() - before == (LAYERS if tokens <= CAPTURED else 0), tokens
    assert record.calls.lowered == LAYERS and journal.problems == []
    below, above = overlay.calls(1), overlay.calls(CAPTURED + 1)
    for op in ("start", "join"):
        assert sum(f"vllm_overlay.{op}" in call for call in below) == LAYERS
    assert not any("vllm_overlay" in call for call in above)
    # The side is launched first here; stock calls it second. All else is as in stock, in stock's order.
    assert sorted(call.split()[0] for call in above) == sorted(call.split()[0] for call in stock.calls(1))
    assert overlay.kernels() == stock.kernels(), "the same kernels under the same names, below and above"


def test_a_side_that_is_more_than_its_weight_keeps_the_op(record: PatchRecord, stock: Compiled) -> None:
    """It has no stock calls to give back. Its join goes: nothing is forked above the captured sizes."""
    config = configuration()
    split(config.compilation_config, strict=True)
    torch._dynamo.reset()
    overlay = Compiled(config, record, plain=False)
    assert torch.equal(overlay(LARGEST), stock(LARGEST))
    assert (record.calls.total(), record.calls.lowered) == (LAYERS, 0)
    above = overlay.calls(CAPTURED + 1)
    assert [sum(f"vllm_overlay.{op}" in call for call in above) for op in ("start_layer", "join")] == [LAYERS, 0]


def test_start_takes_what_follows_in_the_graphs_that_are_captured(
    record: PatchRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    runs = []
    for made in (None, record):
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / str(made is None)))
        config = configuration()
        split(config.compilation_config, strict=True)
        torch._dynamo.reset()
        runs.append(Compiled(config, made, layer_class=FollowedLayer))
    stock, overlay = runs
    for tokens in (LARGEST, CAPTURED, 1):
        assert torch.equal(overlay(tokens), stock(tokens)), tokens
    for tokens, count in ((1, LAYERS), (CAPTURED + 1, 0)):
        for op in ("start_into", "join_into"):
            assert sum(f"vllm_overlay.{op}" in call for call in overlay.calls(tokens)) == count
    assert not any("zeros" in call for call in overlay.calls(1))


def refuse(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    raise KeyError("no such thing")


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_that_cannot_be_lowered_keeps_its_ops(
    strict: bool, record: PatchRecord, journal: OwnJournal, stock: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "_above", {"vllm_overlay.start": refuse})
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
    said = "vLLM stops here, as strict asks" if strict else "graphs keep their ops as they were traced"
    assert journal.problems == [f"lowering: {said}: KeyError: 'no such thing'"]


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


@pytest.mark.parametrize(
    ("hidden", "splits"), [(1024, True), (2048, True), (2049, False), (5120, False), (None, False)]
)
def test_a_model_whose_norms_have_two_orders_keeps_its_one_range(hidden: int | None, splits: bool) -> None:
    """A range of its own would be timed at other sizes than stock's, and could add up in another order."""
    compilation = configuration().compilation_config
    assert split(compilation, strict=False, hidden=hidden) == splits
    assert compilation.compile_ranges_endpoints == ([CAPTURED, LARGEST] if splits else [LARGEST])


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
    more_is_captured = configuration([4]).compilation_config
    assert split(more_is_captured, strict=False) and more_is_captured.compile_ranges_endpoints == [4]


@given(st.lists(st.integers(1, 24), min_size=1, max_size=4), st.lists(st.integers(1, 24), min_size=1, max_size=4))
def test_no_range_of_one_size_comes_about(captured: list[int], endpoints: list[int]) -> None:
    """vLLM compiles such a range with static shapes, and tunes it: other kernels than stock's, with other bits."""
    config = CompilationConfig()
    config.mode, config.cudagraph_mode = 3, CUDAGraphMode.FULL
    config.cudagraph_capture_sizes, config.compile_ranges_endpoints = captured, sorted(endpoints)
    before = config.get_compile_ranges()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "intercept_compiler", lambda strict: None)
        assert split(config, strict=False, mode=CUDAGraphMode.FULL)
    after = config.get_compile_ranges()
    assert [one for one in after if one.is_single_size()] == [one for one in before if one.is_single_size()]
    largest = max(captured)
    assert set(after) == set(before) or {one.end for one in after} - {one.end for one in before} == {largest}


@given(st.integers(1, 64), st.integers(0, 64), st.lists(st.integers(1, 64), max_size=4))
def test_a_graph_is_edited_for_its_range(start: int, more: int, captured: list[int]) -> None:
    """A graph that serves captured sizes and larger ones stays as it was traced."""
    kept: Any = object()
    of_vllm = types.SimpleNamespace(cudagraph_capture_sizes=captured)
    compiled = types.SimpleNamespace(start=start, end=start + more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "edited", lambda graph, edits: edits)
        found = lowering._for_range(kept, compiled, of_vllm)
    limit = max(captured, default=0)
    expected = lowering._above if start > limit else lowering._captured if start + more <= limit else kept
    assert found is expected


def test_graphs_are_compiled_by_whoever_has_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything else that vLLM has given, and after the edits for the range."""
    given: list[Any] = []

    def compile_graph(self: Any, graph: Any, example: Any, compilation_config: Any, compile_range: Any) -> str:
        given.append((graph, example, compile_range.start))
        return f"compiled {graph}"

    monkeypatch.setattr(backends.CompilerManager, "compile", compile_graph)
    monkeypatch.setattr(lowering, "_compile", None)
    monkeypatch.setattr(lowering, "edited", lambda graph, edits: f"{graph}, edited")
    lowering.intercept_compiler(strict=True)
    manager = object.__new__(backends.CompilerManager)
    of_vllm, tokens = types.SimpleNamespace(cudagraph_capture_sizes=[8]), types.SimpleNamespace(start=9, end=64)
    assert manager.compile("a graph", 1, of_vllm, compile_range=tokens) == "compiled a graph, edited"
    lowering.compile_by(lambda number, traced, graph, compile_one: compile_one(f"{traced} as {graph} and more"))
    assert manager.compile("a graph", 1, of_vllm, tokens) == "compiled a graph as a graph, edited and more"
    assert given == [("a graph, edited", 1, 9), ("a graph as a graph, edited and more", 1, 9)]


def test_a_graph_without_an_op_is_left_as_it_is(record: PatchRecord) -> None:
    module = torch.fx.symbolic_trace(lambda inputs: inputs + 1)
    assert lowering.edited(module, lowering._above) is module


def test_what_was_traced_is_not_changed(record: PatchRecord) -> None:
    """vLLM compiles the same graph for the other ranges as well, and keeps it."""
    graph = torch.fx.Graph()
    x, weight, gate = (graph.placeholder(name) for name in ("x", "weight", "gate"))
    node = graph.call_function(torch.ops.vllm_overlay.start, (x, weight, gate, 8, "of yesterday"))
    graph.call_function(torch.ops.vllm_overlay.join, (node, x, x, weight, "of yesterday"))
    graph.output(node)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    module.meta["of vLLM"] = 1
    before = str(module.graph)
    lowered = lowering.edited(module, lowering._above)
    assert "vllm_overlay" not in lowered.code and str(module.graph) == before
    assert lowered.meta == {"of vLLM": 1}
    values = torch.randn(3, HIDDEN), torch.randn(8, HIDDEN)
    assert torch.equal(lowered(*values, values[1]), linear(*values))
