"""A side beside a main that Inductor quantizes for: bits and kernels of stock, through Inductor, on a CPU.

Models of a norm, a base layer that quantizes its input by token, and adapters: shrink into a buffer, expand into the output. Each
of a model's graphs is compiled for itself, in order, as vLLM compiles the pieces of a model.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor import compile_fx as compile_fx_module
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code

pytest.importorskip("vllm")

from vllm.compilation import backends
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from overlay.report.journal import PatchRecord
from overlay.side_work import insertion, ops
from overlay.side_work import lowering as edits
from overlay.side_work.plan import Plan
from overlay.vocabulary import DUAL
from tests.unit import side_work_ops
from tests.unit.side_work import test_lowering as by_vllm
from tests.unit.side_work import test_order as order

HIDDEN, RANK, TOKENS, NAME = 128, 4, 4, "pair"
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
toy = order.toy


@pytest.fixture(scope="module", autouse=True)
def adapters(toy: None) -> Iterator[Any]:
    """Upstream's shrink and expand, and start for that shrink. Gives the edit that puts shrink back."""
    library = torch.library.Library("overlay_order_test", "FRAGMENT")
    for name, schema, run in (
        ("shrink", "(Tensor x, Tensor[] a, Tensor(a!) buffer, Tensor mapping) -> ()", _shrink),
        ("expand", "(Tensor buffer, Tensor b, Tensor(a!) out) -> ()", _expand),
        ("norm_into", "(Tensor(a!) out, Tensor values, Tensor weight) -> ()", _norm_into),
        ("norm_in_place", "(Tensor weight, *, Tensor(a!) values) -> ()", _norm_in_place),
    ):
        library.define(f"{name}{schema}")
        library.impl(name, run, "CPU")
        torch.library.register_fake(f"overlay_order_test::{name}", lambda *given, **named: None, lib=library)
    before = dict(edits._above)
    edit = ops.define_start_of(torch.ops.overlay_order_test.shrink, "test_start", lambda given: None)
    ours = ops._libraries.pop()
    yield edit
    edits._above.clear()
    edits._above.update(before)
    for one in (library, ours):
        one._destroy()


def _shrink(x: torch.Tensor, a: list[torch.Tensor], buffer: torch.Tensor, mapping: torch.Tensor) -> None:
    buffer.copy_(x.float() @ a[0].float().t())


def _expand(buffer: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    out.add_((buffer @ b.float().t()).to(out.dtype))


def _norm_into(out: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> None:
    out.copy_(rms_norm(values, weight))


def _norm_in_place(weight: torch.Tensor, *, values: torch.Tensor) -> None:
    values.copy_(rms_norm(values, weight))


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch, adapters: Any) -> Iterator[PatchRecord]:
    record = PatchRecord()
    monkeypatch.setattr(ops, "planned", {NAME: ops.PlannedPair(Plan(DUAL, 256), record)})
    for name, value in (("_known", {}), ("_known_before", {}), ("_found", [])):
        monkeypatch.setattr(insertion, name, value)
    monkeypatch.setattr(edits, "_compile", None)
    monkeypatch.setattr(edits, "_intercepted", False)
    monkeypatch.setattr(backends.CompilerManager, "compile", backends.CompilerManager.compile)
    passes = getattr(compile_fx_module, insertion.PASSES)  # another test may have wrapped it
    monkeypatch.setattr(compile_fx_module, insertion.PASSES, getattr(passes, "__wrapped__", passes))
    with order.unused_inductor():
        yield record


def require(edit: Any, strict: bool = True) -> None:
    insertion.require(torch.ops.vllm_overlay.test_start, torch.ops.overlay_order_test.shrink, edit, strict)


def rms_norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    values = values.float()
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def into_a_buffer(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As vLLM's own norms and attention."""
    out = torch.empty_like(values)
    torch.ops.overlay_order_test.norm_into(out, values, weight)
    return out


def into_the_gemm_s_result(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As FlashInfer's all-reduce with its norm, which is on by default on several Hopper GPUs."""
    out = torch.mm(values, values.t() @ values)
    torch.ops.overlay_order_test.norm_in_place(weight, values=out)
    return out


def through_a_view(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Written to in another shape than it is read in."""
    out = torch.mm(values, values.t() @ values)
    torch.ops.overlay_order_test.norm_in_place(weight, values=out.view(2, -1, HIDDEN))
    return out.view(-1, HIDDEN)


def by_vllms_kernel(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As vLLM's own norm (up to 0.20 `custom_ops`, from 0.21 on `ir_op_priority`): its last pass has it write into a GEMM's result."""
    out = torch.mm(values, values.t() @ values)
    torch.ops._C.fused_add_rms_norm(out, values * 1, weight.to(values.dtype), 1e-6)
    return out


def activation(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reads one value. Inductor keeps it in registers, whoever reads it later."""
    return torch.nn.functional.relu(values.float()) * 1.1


def linear(x: torch.Tensor, weights: tuple[torch.Tensor, ...], mapping: torch.Tensor, with_ops: bool) -> torch.Tensor:
    """As vLLM's: what shrink writes to, and a part of a mapping for as many tokens as there are, are made just before shrink."""
    base, a, b = weights
    if with_ops:
        buffer = torch.empty(x.shape[0], RANK)
        torch.ops.vllm_overlay.test_start(x, [a], buffer, mapping.narrow(0, 0, x.shape[0]), base, NAME)
    out = order.quantized_by_token(x, base)
    if with_ops:
        torch.ops.vllm_overlay.join(buffer, out, x)
    else:
        buffer = torch.empty(x.shape[0], RANK)
        torch.ops.overlay_order_test.shrink(x, [a], buffer, mapping.narrow(0, 0, x.shape[0]))
    torch.ops.overlay_order_test.expand(buffer, b, out)
    return out


def layer(made_by: Norm, with_ops: bool) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, norm: torch.Tensor, *weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for one in weights:
            x = made_by(hidden, norm).to(hidden.dtype)
            hidden = hidden + linear(x, one, norm, with_ops).to(hidden.dtype)
        return hidden

    return forward


def run(made_by: Norm, with_ops: bool, *, above: bool | None = None) -> tuple[torch.Tensor, list[str]]:
    """The result of a model of three graphs with two linears each, and the code of each graph.

    `above`: each graph is compiled for two ranges, and the one above the captured sizes runs, or else the other one.
    """
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).bfloat16()

    def weights() -> tuple[torch.Tensor, ...]:
        return matrix(HIDDEN, HIDDEN), matrix(RANK, HIDDEN), matrix(HIDDEN, RANK)

    hidden, codes = matrix(TOKENS, HIDDEN), []
    settings = {"enable_auto_functionalized_v2": False, "fx_graph_cache": False}  # the first one as vLLM sets it
    with config.patch(settings), torch.no_grad():
        for number in range(3):

            def backend(traced: Any, example: Any, number: int = number) -> Any:
                if not with_ops:
                    return compile_fx(traced, example)
                ranges = [traced] if above is None else [traced, edits.edited(traced, edits._above)]
                made = [
                    insertion.compiled(number, traced, one, lambda graph: compile_fx(graph, example)) for one in ranges
                ]
                return made[bool(above)]

            function = torch.compile(layer(made_by, with_ops), fullgraph=True, backend=backend)
            hidden, code = run_and_get_code(function, hidden, torch.full((HIDDEN,), 1.1), weights(), weights())
            # A graph that could not be lowered gives none. The range above is compiled last.
            codes.append(code[-2] if above is False else code[-1])
            torch._dynamo.reset()
    return hidden, codes


def stock(made_by: Norm) -> tuple[torch.Tensor, list[str]]:
    with order.unused_inductor():
        return run(made_by, with_ops=False)


def forks(code: str) -> bool:
    return "vllm_overlay.test_start" in code


def test_the_first_graph_has_stocks_calls_and_every_graph_stocks_kernels(
    adapters: Any, as_in_a_new_process: PatchRecord
) -> None:
    expected, plain = stock(rms_norm)
    require(adapters)
    result, codes = run(rms_norm, with_ops=True)
    assert torch.equal(result, expected)
    assert [forks(code) for code in codes] == [False, True, True]
    assert "vllm_overlay.join" not in codes[0]
    # Before the kernel that quantizes if norm and quantization are two kernels, and before main's GEMM always.
    overlapped = ["test_start", "scaled_mm", "join", "expand"]
    assert [call for call in order.calls(codes[1]) if not call.startswith("cpp_fused")] == 2 * overlapped
    for ours, theirs in zip(codes, plain, strict=True):
        assert order.texts(ours) and order.texts(ours) == order.texts(theirs)
    assert as_in_a_new_process.calls.lowered == 2


@pytest.mark.parametrize("made_by", [into_a_buffer, into_the_gemm_s_result, through_a_view])
def test_start_comes_behind_what_writes_its_input_in_place(adapters: Any, made_by: Norm) -> None:
    expected, plain = stock(made_by)
    require(adapters)
    result, codes = run(made_by, with_ops=True)
    assert expected.isfinite().all() and torch.equal(result, expected)
    assert [forks(code) for code in codes] == [False, True, True]
    for code in codes[1:]:
        found = [
            call for call in order.calls(code) if call in ("norm_into", "norm_in_place", "test_start", "scaled_mm")
        ]
        norm = "norm_into" if made_by is into_a_buffer else "norm_in_place"
        assert found == 2 * [norm, "test_start", "scaled_mm"]
    for ours, theirs in zip(codes, plain, strict=True):
        assert order.texts(ours) == order.texts(theirs)


@pytest.mark.parametrize("above", [False, True])
def test_a_graph_for_a_second_range_is_compiled_as_if_it_were_the_first(adapters: Any, above: bool) -> None:
    """In stock there is one range. Inductor must not know more by the first range's graph."""
    expected, plain = stock(rms_norm)
    require(adapters)
    result, codes = run(rms_norm, with_ops=True, above=above)
    assert torch.equal(result, expected)
    assert [forks(code) for code in codes] == [False, not above, not above]
    for ours, theirs in zip(codes, plain, strict=True):
        assert order.texts(ours) == order.texts(theirs)


def test_stocks_first_graph_is_another_one_than_its_later_ones() -> None:
    """Else the rule about the first graph would be for nothing."""
    _, codes = stock(rms_norm)
    assert order.texts(codes[0]) != order.texts(codes[1]) == order.texts(codes[2])


def test_without_the_rules_the_bits_differ(adapters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = stock(rms_norm)
    monkeypatch.setattr(insertion, "compiled", lambda number, traced, graph, compile_graph: compile_graph(graph))
    result, codes = run(rms_norm, with_ops=True)
    assert all(map(forks, codes)) and not torch.equal(result, expected)


def test_an_input_that_stays_in_registers_is_left_to_stock(adapters: Any, as_in_a_new_process: PatchRecord) -> None:
    expected, plain = stock(activation)
    require(adapters)
    result, codes = run(activation, with_ops=True)
    assert torch.equal(result, expected)
    assert not any(map(forks, codes)) and as_in_a_new_process.calls.lowered == 6
    for ours, theirs in zip(codes, plain, strict=True):
        assert order.texts(ours) == order.texts(theirs)


def test_another_failure_of_a_compilation_is_its_own(adapters: Any) -> None:
    require(adapters)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.vllm_overlay.test_start, (x, [x], x, x, x, NAME))
    graph.output(x)
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    seen: list[str] = []

    def fail(edited: torch.fx.GraphModule) -> None:
        seen.append(edited.code)
        raise RuntimeError("a compiler's own")

    for number in range(2):  # the first graph, and a later one
        with pytest.raises(RuntimeError, match="a compiler's own"):
            insertion.compiled(number, module, module, fail)
    assert ["shrink" in code and "test_start" not in code for code in seen] == [True, True]


@pytest.mark.parametrize("strict", [False, True])
def test_a_place_that_is_not_found_leaves_stocks_calls_and_says_so(
    adapters: Any, strict: bool, monkeypatch: pytest.MonkeyPatch, as_in_a_new_process: PatchRecord
) -> None:
    expected, plain = stock(rms_norm)
    problems: list[str] = []
    monkeypatch.setattr(insertion.journal, "problem", problems.append)
    monkeypatch.setattr(insertion, "_needed_after", lambda place, call: 1 / 0)
    require(adapters, strict)
    if strict:
        with pytest.raises(Exception, match="ZeroDivisionError"):
            run(rms_norm, with_ops=True)
        return
    result, codes = run(rms_norm, with_ops=True)
    assert torch.equal(result, expected) and not any(map(forks, codes))
    assert as_in_a_new_process.calls.lowered == 6 and len(problems) == 2
    assert "ZeroDivisionError: division by zero" in problems[0]
    for ours, theirs in zip(codes, plain, strict=True):
        assert order.texts(ours) == order.texts(theirs)


def test_other_graphs_are_left_alone(adapters: Any) -> None:
    require(adapters)
    module = torch.fx.symbolic_trace(lambda x: x + 1)
    given: list[Any] = []
    insertion.compiled(0, module, module, given.append)
    assert given == [module] and insertion._known_before == {}


# ------------------------------------------------------------------------------------------------ by vLLM's own compilation


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = ((HIDDEN, HIDDEN), (RANK, HIDDEN), (HIDDEN, RANK))
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(size).bfloat16(), requires_grad=False) for size in sizes
        )


def run_by_vllm(
    made_by: Norm, with_ops: bool, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, list[str]]:
    """As `run`, in one model that vLLM splits at an op of its own, with its graph passes."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(folder))
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    torch._dynamo.reset()
    configuration = by_vllm.configuration()
    configuration.compilation_config.splitting_ops = ["overlay_order_test::core"]

    @support_torch_compile(dynamic_arg_dims={"inputs": 0})
    class Model(torch.nn.Module):
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
            self.norm = torch.nn.Parameter(torch.full((HIDDEN,), 1.1), requires_grad=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            for one in self.layers:
                x = made_by(inputs, self.norm).to(inputs.dtype)
                large = linear(x, tuple(one.weights), self.norm, with_ops)
                result = torch.zeros(x.shape[0], HIDDEN, dtype=torch.float32)
                torch.ops.overlay_order_test.core(large, large, result)
                inputs = inputs + result.to(inputs.dtype)
            return inputs

    codes: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", codes.append)
    with set_current_vllm_config(configuration):
        model = Model(vllm_config=configuration)
        inputs = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
        with set_forward_context(None, configuration), torch.inference_mode(), config.patch(fx_graph_cache=False):
            return model(inputs), codes


@pytest.mark.parametrize("made_by", [rms_norm, by_vllms_kernel])
def test_vllms_own_compilation_has_stocks_bits_and_kernels(
    made_by: Norm, adapters: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = side_work_ops.define_missing_kernels()
    try:
        with order.unused_inductor():
            expected, plain = run_by_vllm(made_by, False, tmp_path / "stock", monkeypatch)
        require(adapters)
        result, codes = run_by_vllm(made_by, True, tmp_path / "overlay", monkeypatch)
    finally:
        library._destroy()
    assert expected.isfinite().all() and torch.equal(result, expected)
    assert [forks(code) for code in codes if "test_start" in code or "shrink" in code] == [False, True, True]
    for ours, theirs in zip(codes, plain, strict=True):
        assert order.texts(ours) == order.texts(theirs)
