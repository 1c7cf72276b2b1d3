"""Upstream's own forward of every release, with the stand-in and without: the same bits, and the side starts before main.

The method is made from the release's text. What needs a GPU in it (norms, rope, the attention) is a short function of all
that it is given, so a result that is read too early or not at all shows in the output.
"""

from __future__ import annotations

import ast
import pathlib
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("vllm")

from overlay.patches.dsa.patch import PROJECTIONS
from overlay.report.journal import PatchRecord
from overlay.side_work import ops
from overlay.side_work.pairs import Pair
from overlay.side_work.plan import PASS_THROUGH, Plan
from overlay.side_work.waiting import PAIR
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST
from tests.unit.lanes import NotingLane

from .released import tree
from .test_dsa_verdict import WHERE, method

pytestmark = pytest.mark.contract

HIDDEN, Q_LORA, KV_LORA, ROPE, NOPE, HEADS, KEY, INDEX_HEADS = 32, 24, 16, 8, 12, 2, 16, 4


def mixed(*given: Any, **named: Any) -> torch.Tensor:
    """One number per token out of all tensors that have a row per token."""
    tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor) and value.dim() > 1]
    assert tensors
    return sum(value.float().flatten(1).mean(-1, keepdim=True) * (1 + index) for index, value in enumerate(tensors))  # type: ignore[return-value]


def fused_norm_rope(positions: Any, q_c: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
    results = {name for name in named if name.endswith("_out")}
    value = mixed(q_c, *given, **{name: tensor for name, tensor in named.items() if name not in results})
    for name in results:
        if isinstance(named[name], torch.Tensor):
            named[name].copy_(value.expand_as(named[name]))
    return q_c * value


def fused_q(*given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mixed(*given), mixed(*given) * 2, mixed(*given) * 3


def attend(*given: Any, **named: Any) -> None:
    *inputs, output = given
    output.copy_(mixed(*inputs).expand_as(output))


class Linear(torch.nn.Module):
    """A linear in vLLM's manner; it notes its calls."""

    def __init__(self, name: str, columns: int, rows: int, order: list[str]) -> None:
        super().__init__()
        values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        self.weight = torch.nn.Parameter(values, requires_grad=False)
        self.name, self.order, self.input_size, self.params_dtype = name, order, columns, torch.float32

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.order.append(self.name)
        return torch.nn.functional.linear(x, self.weight), None


class Asked:
    """Whatever else a release asks of a layer or its indexer is something that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == PAIR:
            raise AttributeError(name)
        return mock.MagicMock(name=name)


class Layer(Asked):
    def __init__(self, indexer: bool = True) -> None:
        self.order: list[str] = []
        self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim = Q_LORA, KV_LORA, ROPE
        self.qk_nope_head_dim, self.qk_head_dim, self.v_head_dim, self.num_local_heads = NOPE, NOPE + ROPE, NOPE, HEADS
        self.layer_name, self.skip_topk, self.use_pcp, self.hisparse_cache = "a", False, False, None
        self.fused_qkv_a_proj = Linear("main", HIDDEN, Q_LORA + KV_LORA + ROPE, self.order)
        self.q_b_proj = Linear("q_b", Q_LORA, HEADS * (NOPE + ROPE), self.order)
        self.o_proj = Linear("o", HEADS * NOPE, HIDDEN, self.order)
        self.W_UK_T = torch.randn(HEADS, NOPE, KV_LORA, generator=torch.Generator().manual_seed(1))
        self.indexer = None
        if indexer:
            self.indexer = Asked()
            self.indexer.head_dim, self.indexer.n_head, self.indexer.softmax_scale = KEY, INDEX_HEADS, 0.5
            self.indexer.wk_weights_proj = Linear("side", HIDDEN, KEY + INDEX_HEADS, self.order)
            self.indexer.wq_b = Linear("wq_b", Q_LORA, KEY * INDEX_HEADS, self.order)

    def _should_prepare_mqa_query(self, *_: Any) -> bool:
        return True

    _sparse_indexer_and_attn = _fused_attention = staticmethod(attend)


def forward_of(version: str) -> Callable[..., torch.Tensor]:
    """The method of this release, in a module that has what it calls."""
    node = method(version, "forward")
    node.returns = None
    for argument in node.args.args:
        argument.annotation = None
    context = types.SimpleNamespace(slot_mapping={}, attn_metadata=None, cudagraph_runtime_mode=None)
    names: dict[str, Any] = {
        "torch": torch,
        "get_forward_context": lambda: context,
        "get_attention_context": lambda name: (None, None, None, None),
        "fused_norm_rope": fused_norm_rope,
        "fused_q": fused_q,
    }
    path = pathlib.Path(tree(version).folder, "vllm", WHERE[version].partition(":")[0])
    exec(compile(ast.Module([node], []), str(path), "exec"), names)
    found: Callable[..., torch.Tensor] = names["forward"]
    return found


def paired(record: PatchRecord, monkeypatch: pytest.MonkeyPatch) -> Layer:
    layer = Layer()
    assert layer.indexer is not None
    side = layer.indexer.wk_weights_proj
    sizes = PROJECTIONS.sizes_by_heads(layer)
    assert [*sizes.values()] == [len(layer.fused_qkv_a_proj.weight), len(side.weight)]
    pair = Pair("a", layer.fused_qkv_a_proj, side, *sizes.values(), "FP8", "bf16", "weight", True, traced=False)
    monkeypatch.setattr(ops, "planned", {pair.name: ops.PlannedPair(Plan(DUAL, 256), record)})
    setattr(layer, PAIR, pair)
    return layer


def run(forward: Callable[..., torch.Tensor], layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    layer.order.clear()
    result = forward(layer, torch.arange(len(x)), x)
    return result, list(layer.order)


X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
each_release = pytest.mark.parametrize("version", WHERE)
REST = ["q_b", "wq_b", "o"]


@each_release
@pytest.mark.parametrize("strategy", [DUAL, DUAL_MAIN_FIRST])
def test_a_fork_has_stocks_bits(version: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, forward = paired(PatchRecord(), monkeypatch), forward_of(version)
    wanted, order = run(forward, layer, X)
    calls = [name for name in order if name not in REST]
    assert calls == ["main", "side"] and wanted.isfinite().all() and wanted.unique().numel() > len(X)
    object.__setattr__(getattr(layer, PAIR), "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(ops, "choose", lambda *_: (strategy, NotingLane(layer.order)))
    found, order = run(PROJECTIONS.intercept(forward, traced=False), layer, X)
    assert torch.equal(found, wanted)
    # The side is a GEMM of its weight here, so the linear itself is not called.
    assert [name for name in order if name not in REST] == ["start", "main", "join"]


@each_release
def test_the_output_shows_what_the_side_gives(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    layer, forward = paired(PatchRecord(), monkeypatch), forward_of(version)
    wanted, _ = run(forward, layer, X)
    assert layer.indexer is not None
    layer.indexer.wk_weights_proj.weight.data[0] += 1
    assert not torch.equal(run(forward, layer, X)[0], wanted)


@each_release
def test_without_a_fork_the_calls_are_stocks(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = PatchRecord()
    layer, forward = paired(record, monkeypatch), forward_of(version)
    wanted = run(forward, layer, X)
    found = run(PROJECTIONS.intercept(forward, traced=False), layer, X)
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert record.calls.serial == {PASS_THROUGH: 1}


@each_release
def test_a_layer_that_has_no_indexer_or_skips_it_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = PatchRecord()
    forward = forward_of(version)
    skipping, without = paired(record, monkeypatch), Layer(indexer=False)
    skipping.skip_topk = True
    for layer in (skipping, without):
        wanted = run(forward, layer, X)
        found = run(PROJECTIONS.intercept(forward, traced=False), layer, X)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1] and "side" not in found[1]
    assert record.calls.total() == 0
