"""What start takes over from the graph: copies of the side's parts, and zeros. Everything else stays where it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

pytest.importorskip("vllm")

from overlay.report.journal import PatchRecord
from overlay.side_work import lowering, ops
from overlay.side_work.plan import Plan
from overlay.vocabulary import DUAL
from tests.unit import side_work_ops

HIDDEN, MAIN, SIDE, OUT, NAME = 64, 96, 8, 32, "followers"
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def core() -> Iterator[None]:
    """An attention core as vLLM's: it writes to its last argument, and reads it where a model does not."""
    side_work_ops.define()
    library = torch.library.Library("overlay_followers_test", "FRAGMENT")
    library.define("core(Tensor main, Tensor b, Tensor a, Tensor(o!) out) -> ()")

    def write(main: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
        assert b.is_contiguous() and a.is_contiguous() and not out.any()
        out.add_(main[:, :OUT] * b[:, :1] + a[:, -1:])

    library.impl("core", write, "CPU")
    torch.library.register_fake("overlay_followers_test::core", lambda main, b, a, out: None, lib=library)
    yield
    library._destroy()


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    record = PatchRecord()
    monkeypatch.setattr(ops, "planned", {NAME: ops.PlannedPair(Plan(DUAL, 256), record)})
    return record


def zeros(x: torch.Tensor, **keywords: Any) -> torch.Tensor:
    return torch.zeros((x.shape[0], OUT), **({"dtype": x.dtype, "device": x.device} | keywords))


def usual(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    """As in Qwen's GDN layers since vLLM 0.19.0."""
    b, a = side.chunk(2, dim=-1)
    out = zeros(x)
    return b.contiguous(), a.contiguous(), out


def by_position(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    b, a = side.chunk(2, 1)
    return b.contiguous(), a.contiguous(), zeros(x)


def packed(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    """As where a kernel takes the result as it is: there is nothing to copy."""
    return side, side, zeros(x)


def halves_twice(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    b, a = side.chunk(2, dim=-1)
    return b.contiguous(), a.contiguous() + b.sum(), zeros(x)


def read_whole_too(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    b, a = side.chunk(2, dim=-1)
    return b.contiguous() * side.sum(), a.contiguous(), zeros(x)


def sliced(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    """As where the side is replicated, and a rank takes its columns."""
    b, a = side.chunk(2, dim=-1)
    return b[:, :2].contiguous(), a[:, :2].contiguous(), zeros(x)


def by_rows(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    rows = side.chunk(1, dim=0)[0].contiguous()
    return rows, rows, zeros(x)


def three_parts(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    """8 columns do not divide by 3."""
    b, a, _ = side.chunk(3, dim=-1)
    return b.contiguous(), a.contiguous(), zeros(x)


def four_parts(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    """A part's row has 8 bytes, so not every part would lie where memory of its own does."""
    b, a, c, d = side.chunk(4, dim=-1)
    return b.contiguous() + c.contiguous(), a.contiguous() + d.contiguous(), zeros(x)


def other_zeros(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    return side, side, zeros(x, dtype=torch.float64).to(x.dtype)


def zeros_from_main(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    """Their size is known after main only."""
    return side, side, torch.zeros((main.nonzero().shape[0] * 0 + x.shape[0], OUT), dtype=x.dtype, device=x.device)


def nothing(side: torch.Tensor, x: torch.Tensor, main: torch.Tensor) -> Parts:
    return side, side, torch.full((x.shape[0], OUT), 0.0)


#: By what follows: how many buffers start fills, and in how many parts the side's result lies in the first.
CASES: dict[Callable[..., Parts], tuple[int, int]] = {
    usual: (2, 2),
    by_position: (2, 2),
    packed: (2, 1),
    halves_twice: (2, 1),
    read_whole_too: (2, 1),
    sliced: (2, 1),
    by_rows: (2, 1),
    three_parts: (2, 1),
    four_parts: (2, 1),
    other_zeros: (0, 0),
    nothing: (0, 0),
}


def model(follow: Callable[..., Parts], with_ops: bool) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, layers: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        for qkvz, ba, out in layers:
            x = torch.nn.functional.silu(x) * 1.5
            if with_ops:
                side = torch.ops.vllm_overlay.start(x, ba, qkvz, SIDE, NAME)
                main = torch.nn.functional.linear(x, qkvz)
                torch.ops.vllm_overlay.join(side, main, x)
            else:
                main = torch.nn.functional.linear(x, qkvz)
                side = torch.nn.functional.linear(x, ba)
            b, a, result = follow(side, x, main)
            torch.ops.overlay_followers_test.core(main, b, a, result)
            x = result @ out
        return x

    return forward


def inputs(tokens: int = 5, layers: int = 2) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((MAIN, HIDDEN), (SIDE, HIDDEN), (OUT, HIDDEN))
    made = [tuple(torch.randn(*size, generator=generator) for size in sizes) for _ in range(layers)]
    return torch.randn(tokens, HIDDEN, generator=generator), made


def into(graph: torch.fx.GraphModule) -> list[tuple[int, int]]:
    """Of every `start_into` of a graph: how many buffers it fills, and the parts of the first."""
    target = torch.ops.vllm_overlay.start_into
    found = [node.args[2] for node in graph.graph.nodes if node.target is target]
    return [(len(results), results[0].args[1][0]) for results in found]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("follow", CASES, ids=lambda follow: follow.__name__)
def test_start_takes_what_follows_from_its_result_alone(
    follow: Callable[..., Parts], tokens: int, record: PatchRecord
) -> None:
    given, graphs = inputs(tokens), []

    def backend(traced: torch.fx.GraphModule, _: Any) -> Any:
        before = str(traced.graph)
        graphs.append(lowering.edited(traced, lowering._captured))
        assert str(traced.graph) == before
        return graphs[0]

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model(follow, True), backend=backend, fullgraph=True, dynamic=True)(*given)
        assert torch.equal(result, model(follow, False)(*given))
    (graph,) = graphs
    assert into(graph) == ([CASES[follow]] * 2 if CASES[follow][0] else [])
    assert record.calls.total() == 2
    left = [str(node.target) for node in graph.graph.nodes]
    assert left.count("vllm_overlay.start") == (0 if CASES[follow][0] else 2)
    if follow is usual:
        assert not {"chunk", "contiguous", "vllm_overlay.join"} & set(left)


def test_zeros_whose_size_is_not_known_yet_stay(record: PatchRecord) -> None:
    """`nonzero` gives a size that only a run knows; without fullgraph's limits Dynamo captures it as a symbol."""
    graphs = []

    def backend(traced: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(lowering.edited(traced, lowering._captured))
        return graphs[-1]

    torch._dynamo.reset()
    given = inputs(layers=1)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        result = torch.compile(model(zeros_from_main, True), backend=backend, fullgraph=True)(*given)
        assert torch.equal(result, model(zeros_from_main, False)(*given))
    assert [into(graph) for graph in graphs] == [[]]


CALL = re.compile(
    r"torch\.ops\.(?:vllm_overlay|overlay_followers_test)\.(\w+)\.default\(|extern_kernels\.(\w+)\(|(cpp_fused_\w+)\(|(clone|copy_)\("
)


@pytest.mark.parametrize("v2", [False, True], ids=["as vLLM sets it", "as torch sets it"])
def test_inductor_adds_nothing(v2: bool, record: PatchRecord) -> None:
    """In Inductor's code start comes before main and join after it. What start fills is not copied again."""
    given = inputs()

    def backend(traced: torch.fx.GraphModule, examples: Any) -> Any:
        return compile_fx(lowering.edited(traced, lowering._captured), examples)

    torch._dynamo.reset()
    with config.patch({"enable_auto_functionalized_v2": v2, "fx_graph_cache": False}), torch.no_grad():
        result, code = run_and_get_code(torch.compile(model(usual, True), backend=backend, fullgraph=True), *given)
    assert torch.equal(result, model(usual, False)(*given))
    body = code[0].split("def call(")[1].split("def benchmark_compiled_module", maxsplit=1)[0]
    order = [next(filter(None, match.groups())) for match in CALL.finditer(body)]
    marks = ["fused" if name.startswith("cpp_fused") else name for name in order]
    assert marks == ["fused", "start_into", "mm", "join_into", "core", "mm"] * 2


def test_the_buffers_are_declared_as_written() -> None:
    start, join = (str(getattr(torch.ops.vllm_overlay, name).default._schema) for name in ("start_into", "join_into"))
    assert "Tensor(a2!)[] results" in start and "Tensor(a3!) gate" in start
    assert "Tensor(a0!)[] results" in join and "Tensor main" in join and "Tensor x" in join
