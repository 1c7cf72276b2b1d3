"""Start and join in the code that Inductor makes for an H200 (`tests.unit.gpu_code`): every other kernel is stock's, by its text.

A model's graphs as vLLM splits them: what follows the attention of one layer, to the projections of the next one. The sum of the
residual stream is a second result of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor.fx_passes import post_grad
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("vllm")

from overlay.report.journal import PatchRecord
from overlay.side_work import insertion, locality, lowering, ops
from overlay.side_work.plan import Plan
from overlay.vocabulary import DUAL
from tests.unit import gpu_code
from tests.unit.side_work import test_insertion as by_cpu
from tests.unit.side_work import test_order as order

toy, adapters, as_in_a_new_process = order.toy, by_cpu.adapters, by_cpu.as_in_a_new_process
TOKENS, HIDDEN, INNER, RANK = 8192, 4096, 12288, 64
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rms_norm(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's native one, of a sum."""
    total = hidden.float() + residual.float()
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(weight.dtype) * weight, total.to(hidden.dtype)


def lora(with_ops: bool) -> Callable[..., Any]:
    """Attention's output projection, a dense MLP, and the next layer's QKV projection, each with adapters."""

    def forward(
        attention: torch.Tensor, residual: torch.Tensor, norms: tuple[torch.Tensor, ...], *weights: Weights
    ) -> Any:
        def linear(x: torch.Tensor, place: int) -> torch.Tensor:
            return by_cpu.linear(x, weights[place], norms[2], with_ops).to(x.dtype)

        x, residual = rms_norm(linear(attention.view(TOKENS, HIDDEN), 0), residual, norms[0])
        both = linear(x, 1)
        x = torch.nn.functional.silu(both.narrow(1, 0, INNER)) * both.narrow(1, INNER, INNER)
        x, residual = rms_norm(linear(x, 2), residual, norms[1])
        return linear(x, 3), residual

    return forward


def tensor(*sizes: int) -> torch.Tensor:
    """Under FakeTensorMode: one on a GPU that is not there."""
    return torch.empty(sizes, device="cuda:0", dtype=torch.bfloat16)


def given() -> tuple[Any, ...]:
    """The inputs of a graph with adapters."""
    with FakeTensorMode():

        def weights(inputs: int, outputs: int) -> Weights:
            return tensor(outputs, inputs), tensor(RANK, inputs), tensor(outputs, RANK)

        sizes = ((HIDDEN, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN), (HIDDEN, 6144))
        norms = tensor(HIDDEN), tensor(HIDDEN), tensor(2 * TOKENS)
        return (tensor(TOKENS, 32, 128), tensor(TOKENS, HIDDEN), norms, *(weights(*each) for each in sizes))


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with gpu_code.an_h200():
        yield


def codes(with_ops: bool) -> list[str]:
    """The code of three graphs of a model, one after the other."""
    made = []
    for number in range(3):
        inputs = given()
        traced = gpu_code.trace(lora(with_ops), inputs)

        def compile_graph(graph: torch.fx.GraphModule, inputs: tuple[Any, ...] = inputs) -> str:
            return gpu_code.make(graph, inputs)

        made.append(insertion.compiled(number, traced, traced, compile_graph) if with_ops else compile_graph(traced))
    return made


@pytest.fixture
def stock(gpu: None) -> list[str]:
    with order.unused_inductor():
        return codes(with_ops=False)


def test_every_kernel_is_stocks_and_start_comes_before_the_gemm(
    stock: list[str], adapters: Any, as_in_a_new_process: PatchRecord
) -> None:
    by_cpu.require(adapters)
    ours = codes(with_ops=True)
    assert as_in_a_new_process.calls.lowered == 4, "the first graph keeps stock's calls"
    for our_code, stock_code in zip(ours, stock, strict=True):
        assert gpu_code.kernels(our_code) == gpu_code.kernels(stock_code)
        assert gpu_code.calls(our_code).count("kernel") == gpu_code.calls(stock_code).count("kernel")
    assert gpu_code.calls(ours[0]) == gpu_code.calls(stock[0])
    ops = [call for call in gpu_code.calls(ours[1]) if call != "kernel"]
    assert ops == 4 * ["test_start", "scaled_mm", "join", "expand"]


@pytest.fixture
def moved_as_inductor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `locality`: Inductor's own pass."""
    passes = getattr(post_grad, locality.MOVES)
    while hasattr(passes, "__wrapped__"):
        passes = passes.__wrapped__
    monkeypatch.setattr(post_grad, locality.MOVES, passes)


def test_starts_as_they_are_traced_would_make_other_kernels(
    stock: list[str], adapters: Any, moved_as_inductor_does: None
) -> None:
    """Else putting them in last would be for nothing. That the passes are Inductor's own changes nothing for stock's graph."""
    inputs = given()
    traced = gpu_code.make(gpu_code.trace(lora(with_ops=True), inputs), inputs)
    assert gpu_code.kernels(traced) != gpu_code.kernels(stock[1])


# ------------------------------------------------------------------------------------------------ gdn's start, as it is traced

GDN_HIDDEN, QKVZ, BA, VALUES = 2048, 12288, 64, 4096


def gdn(main: order.Main, with_ops: bool, with_zeros: bool = False) -> Callable[..., Any]:
    """From the recurrence of one layer over its MLP to the projections of the next one."""

    def forward(
        core: torch.Tensor,
        z: torch.Tensor,
        residual: torch.Tensor,
        norms: tuple[torch.Tensor, ...],
        weights: tuple[torch.Tensor, ...],
    ) -> Any:
        out, up, down, qkvz, ba = weights
        values = core.float()
        gated = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * norms[2].float()
        gated = (gated * torch.nn.functional.silu(z.float())).to(core.dtype)
        x, residual = rms_norm(main(gated.view(TOKENS, VALUES), out).to(core.dtype), residual, norms[0])
        both = main(x, up).to(core.dtype)
        x = torch.nn.functional.silu(both.narrow(1, 0, 512)) * both.narrow(1, 512, 512)
        x, residual = rms_norm(main(x, down).to(core.dtype), residual, norms[1])
        large, side = order.pair(main, x, qkvz, ba, with_ops)
        if not with_zeros:
            return large.to(core.dtype), side.narrow(1, 0, 32).clone(), side.narrow(1, 32, 32).clone(), residual
        b, a = side.chunk(2, dim=-1)
        zeros = torch.zeros((x.shape[0], 32, 128), dtype=x.dtype, device=x.device)
        return large.to(core.dtype), b.contiguous(), a.contiguous(), zeros, residual

    return forward


def gdn_inputs() -> tuple[Any, ...]:
    with FakeTensorMode():
        weights = (GDN_HIDDEN, VALUES), (1024, GDN_HIDDEN), (GDN_HIDDEN, 512), (QKVZ, GDN_HIDDEN), (BA, GDN_HIDDEN)
        norms = tensor(GDN_HIDDEN), tensor(GDN_HIDDEN), tensor(128)
        heads = tensor(TOKENS, 32, 128), tensor(TOKENS, 32, 128)
        return (*heads, tensor(TOKENS, GDN_HIDDEN), norms, tuple(tensor(*sizes) for sizes in weights))


def gdn_codes(main: order.Main) -> list[str]:
    """Stock's code, and the code with start."""
    made = []
    for with_ops in (False, True):
        inputs = gdn_inputs()
        with order.unused_inductor():
            made.append(gpu_code.make(gpu_code.trace(gdn(main, with_ops), inputs), inputs))
    return made


@pytest.mark.parametrize("main", order.MAINS)
def test_gdns_start_changes_no_kernel_and_comes_before_main(main: order.Main, toy: None) -> None:
    stock, ours = gdn_codes(main)
    calls = gpu_code.calls(ours)
    assert Counter(calls) == Counter(gpu_code.calls(stock)) - Counter(["mm"]) + Counter(["start", "join"])
    overlapped = calls[calls.index("start") + 1 : calls.index("join")]
    assert overlapped in (["mm"], ["scaled_mm"], ["quantize", "scaled_mm"])
    assert Counter(gpu_code.kernels(ours)) == Counter(gpu_code.kernels(stock))


@pytest.mark.parametrize("main", order.MAINS)
def test_where_inductor_moves_nodes_by_itself_one_kernel_is_another(
    main: order.Main, toy: None, moved_as_inductor_does: None
) -> None:
    """The norm's, which also writes the sum of the residual stream."""
    stock, ours = map(Counter, map(gpu_code.kernels, gdn_codes(main)))
    (changed,) = (ours - stock).elements()
    assert "rsqrt" in changed


# ------------------------------------------------------------------------------------------------ start with what follows it


def traced_by_dynamo(function: Callable[..., Any]) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """A graph as vLLM gets it, and its inputs, for a GPU. It is traced with tensors of a CPU: Dynamo asks more of a GPU than is there."""
    found: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        found.extend((graph, inputs))
        return graph.forward

    with FakeTensorMode() as mode:
        inputs = torch.utils._pytree.tree_map(lambda one: torch.empty(one.shape, dtype=one.dtype), gdn_inputs())
        torch._dynamo.reset()
        torch.compile(function, fullgraph=True, backend=keep)(*inputs)
        graph, given = found
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        graph.recompile()
        assert all(one.fake_mode is mode for one in given)
        return graph, [torch.empty(one.shape, dtype=one.dtype, device="cuda:0") for one in given]


def test_start_takes_what_follows_it_and_leaves_every_other_kernel(toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in graphs for captured sizes alone: the copies of the side's halves and the zeros go, and nothing comes."""
    monkeypatch.setattr(ops, "planned", {"toy": ops.PlannedPair(Plan(DUAL, 256), PatchRecord())})
    made = []
    for with_ops in (False, True):
        graph, inputs = traced_by_dynamo(gdn(order.quantized_by_an_op, with_ops, with_zeros=True))
        graph = lowering.edited(graph, lowering._captured)
        with order.unused_inductor():
            made.append(gpu_code.make(gpu_code.trace(graph, inputs), inputs))
    stock, ours = made
    assert [call for call in gpu_code.calls(ours) if call.startswith(("start", "join"))] == ["start_into", "join_into"]
    assert not Counter(gpu_code.kernels(ours)) - Counter(gpu_code.kernels(stock))
    assert len(gpu_code.kernels(ours)) < len(gpu_code.kernels(stock))
