"""DeepSeek-V4's attention as vLLM 0.20.0 has it, with and without the overlay: same bits, each GEMM once, nothing left over."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from overlay.patches.deepseek_v4 import patch as deepseek_v4  # noqa: E402
from overlay.report.journal import PatchRecord  # noqa: E402

from . import deepseek_v4_layer as v4  # noqa: E402
from .deepseek_v4_layer import Run  # noqa: E402

pytestmark = pytest.mark.contract

each_kind = pytest.mark.parametrize("kind", v4.KINDS)
with_stage = pytest.mark.parametrize("kind", [kind for kind, ratio in v4.KINDS.items() if ratio > 1])
#: The input GEMMs of each kind, in upstream's order when it runs them one after the other.
INPUT_GEMMS = {
    "sliding window": ["fused_wqa_wkv"],
    "compressor": ["fused_wqa_wkv", "2.kv.kv_score"],
    "compressor and indexer": ["fused_wqa_wkv", "2.kv.kv_score", "weights_proj", "2.indexer.kv_score"],
}


@pytest.fixture
def modules() -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    yield from v4.released_modules()


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    """What the overlay keeps of this test; vLLM's current configuration is the layer's own."""
    record = PatchRecord()
    monkeypatch.setitem(deepseek_v4.journal.patches, deepseek_v4.NAME, record)
    monkeypatch.setattr(deepseek_v4, "get_current_vllm_config", v4.configuration)
    return record


def stock_and_overlaid(modules: Any, kind: str) -> tuple[Any, Any, Any]:
    """Two layers of the same weights, and what the overlay has said of the second one's class."""
    stock = v4.make_layer(kind)
    found = v4.install(deepseek_v4, modules[0])
    return stock, v4.make_layer(kind), found


def assert_same(stock: Run, overlaid: Run) -> None:
    assert torch.equal(stock.output, overlaid.output)
    order = [sorted(enumerate(run.seen), key=lambda item: (item[1][0], item[0])) for run in (stock, overlaid)]
    assert [name for _, (name, _) in order[0]] == [name for _, (name, _) in order[1]]
    for (_, (name, expected)), (_, (_, found)) in zip(*order, strict=True):
        assert torch.equal(expected, found), name


@each_kind
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dummy", [False, True], ids=["step", "dummy run"])
def test_same_bits_and_each_gemm_once(modules: Any, record: PatchRecord, kind: str, tokens: int, dummy: bool) -> None:
    stock_layer, layer, found = stock_and_overlaid(modules, kind)
    assert found.state == "apply"
    stock, overlaid = v4.run(stock_layer, tokens=tokens, dummy=dummy), v4.run(layer, tokens=tokens, dummy=dummy)
    assert_same(stock, overlaid)
    assert dummy or stock.output.count_nonzero() > stock.output.numel() / 2
    assert sorted(overlaid.ran) == sorted(stock.ran)
    assert {name: overlaid.ran.count(name) for name in INPUT_GEMMS[kind]} == dict.fromkeys(INPUT_GEMMS[kind], 1)
    if kind == "sliding window":
        assert record.calls.total() == 0
        assert "only input GEMM" in record.refused[layer.layer_name]
    else:
        assert record.calls.serial == {"serial pass-through": 1}
        assert overlaid.ran[: len(INPUT_GEMMS[kind])] == INPUT_GEMMS[kind], "all of them first"


@with_stage
def test_what_was_seen_covers_every_result(modules: Any, record: PatchRecord, kind: str) -> None:
    """The comparison above can only fail where a result is looked at: each of them is."""
    _, layer, _ = stock_and_overlaid(modules, kind)
    names = [name for name, _ in v4.run(layer).seen]
    assert names.count("kv_score") == 2 * (2 if layer.indexer is not None else 1)
    assert names.count("attention") == names.count("kv insert") == 2
    assert ("indexer weights" in names) == (layer.indexer is not None)


def compiled(layer: Any, backend: str) -> tuple[Any, list[Any]]:
    """A layer as one graph for every number of tokens, and the list that the graph will be put into."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=keep), graphs


def calls_in(graph: Any, name: str) -> list[Any]:
    called = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    return [node for node in called if name in str(node.target)]


@with_stage
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_with_a_placeholder_of_no_rows(modules: Any, record: PatchRecord, kind: str, backend: str) -> None:
    stock_layer, layer, _ = stock_and_overlaid(modules, kind)
    runs: list[list[Run]] = []
    for one, gemms, rows in ((stock_layer, 2, None), (layer, 1, 0)):
        call, graphs = compiled(one, backend)
        runs.append([v4.run(one, call, tokens=tokens) for tokens in (5, 3)])
        (graph,) = graphs
        assert len(calls_in(graph, "linear")) == gemms, "fused_wqa_wkv belongs to the graph of a stock layer only"
        (op,) = calls_in(graph, "deepseek_v4_attention")
        shapes = [node.meta["example_value"].shape for node in op.args[1:3]]
        assert [shape[1] for shape in shapes] == [v4.Q_LORA, v4.HEAD]
        assert all((shape[0] == 0) == (rows == 0) for shape in shapes)
    for stock, overlaid in zip(*runs, strict=True):
        assert_same(stock, overlaid)
    assert record.calls.total() == 2


@with_stage
@pytest.mark.parametrize("where", ["fused_wqa_wkv", "mla_attn", "wq_b", "compressor"])
def test_an_exception_leaves_nothing_behind(modules: Any, record: PatchRecord, kind: str, where: str) -> None:
    stock_layer, layer, _ = stock_and_overlaid(modules, kind)
    part = getattr(layer, where)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a kernel failed")

    part.forward = fail
    with pytest.raises(ZeroDivisionError):
        v4.run(layer)
    del part.forward
    assert handover_of(layer)._waiting == {}
    assert_same(v4.run(stock_layer), v4.run(layer))


def handover_of(layer: Any) -> Any:
    return getattr(layer, deepseek_v4.STAGE)._handover


@with_stage
def test_a_result_that_nobody_takes_is_an_error(modules: Any, record: PatchRecord, kind: str) -> None:
    _, layer, _ = stock_and_overlaid(modules, kind)
    layer.compressor.forward = lambda *_: None
    with pytest.raises(deepseek_v4.HandoverError, match="have not been asked for"):
        v4.run(layer)
    assert handover_of(layer)._waiting == {}


def test_another_input_than_the_one_computed_from_is_an_error(modules: Any, record: PatchRecord) -> None:
    _, layer, _ = stock_and_overlaid(modules, "compressor and indexer")
    stock_forward = type(layer.indexer).forward
    layer.indexer.forward = lambda states, *rest: stock_forward(layer.indexer, states * 2, *rest)
    with pytest.raises(deepseek_v4.HandoverError, match="another input"):
        v4.run(layer)
    assert handover_of(layer)._waiting == {}


def test_layers_do_not_share_results(modules: Any, record: PatchRecord) -> None:
    kind = "compressor and indexer"
    stock = [v4.make_layer(kind, number) for number in (2, 4)]
    v4.install(deepseek_v4, modules[0])
    layers = [v4.make_layer(kind, number) for number in (2, 4)]
    for stock_layer, layer in zip(stock, layers, strict=True):
        assert_same(v4.run(stock_layer), v4.run(layer))
    assert not torch.equal(v4.run(layers[0]).output, v4.run(layers[1]).output)
    assert len(record.patched) == 2


@with_stage
def test_no_tokens_are_left_to_upstream(modules: Any, record: PatchRecord, kind: str) -> None:
    _, layer, _ = stock_and_overlaid(modules, kind)
    v4.context["forward"] = types.SimpleNamespace(attn_metadata=None)
    given: list[torch.Size] = []
    original = layer.wq_b.forward
    layer.wq_b.forward = lambda states: given.append(states.shape) or original(states)
    modules[0].fused_q_kv_rmsnorm = lambda qr, kv, *_: (qr, kv)
    layer.attention_impl(
        torch.empty(0, v4.HIDDEN, dtype=torch.bfloat16),
        torch.empty(0, v4.Q_LORA, dtype=torch.bfloat16),
        torch.empty(0, v4.HEAD, dtype=torch.bfloat16),
        torch.empty(0),
        torch.empty(0, v4.PADDED, v4.HEAD, dtype=torch.bfloat16),
    )
    assert given == [(0, v4.Q_LORA)]
    assert record.calls.total() == 0


def test_what_vllm_does_with_a_piece_that_gives_no_rows() -> None:
    """PIECEWISE capture makes weak references to a piece's outputs; one without elements must be left alone."""
    from .released import tree

    source = tree(v4.VERSION).read("vllm.utils.torch_utils")
    assert source is not None
    body = source.text.split("def weak_ref_tensor(", 1)[1].split("\ndef ", 1)[0]
    assert "tensor.numel() > 0" in body
