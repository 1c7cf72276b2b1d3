"""Start and join in the code that Inductor makes for an H200 (`tests.unit.gpu_code`): every other kernel is stock's, by its text.

A model's graphs as vLLM splits them: what follows the attention of one layer, to the projections of the next one. The sum of the
residual stream is a second result of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("vllm")

from overlay.report.journal import PatchRecord
from overlay.side_work import insertion
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


def given() -> tuple[Any, ...]:
    """The inputs of a graph, on a GPU that is not there."""
    with FakeTensorMode():

        def tensor(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, device="cuda:0", dtype=torch.bfloat16)

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


def test_starts_as_they_are_traced_make_other_kernels(stock: list[str], adapters: Any) -> None:
    """Else putting them in last would be for nothing."""
    inputs = given()
    traced = gpu_code.make(gpu_code.trace(lora(with_ops=True), inputs), inputs)
    assert gpu_code.kernels(traced) != gpu_code.kernels(stock[1])
