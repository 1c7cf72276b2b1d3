"""The order of start, main and join in the code that Inductor generates, for every way in which main can be quantized.

Three layers of norm, start, main, join and a core op, as in a model. The tests read the sequence of calls in the generated
code. The kernels beside the two ops have to be those of the same model without them, by name and text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._inductor import config, lowering
from torch._inductor.utils import run_and_get_code

vllm = pytest.importorskip("vllm")


from tests.unit import side_work_ops  # noqa: E402

TOKENS, HIDDEN, MAIN, SIDE, LAYERS = 4, 128, 256, 8, 3
Main = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """Ops of a model: a quantization that is an op (block FP8), and a core that writes to its last argument."""
    side_work_ops.define()
    library = torch.library.Library("overlay_order_test", "FRAGMENT")
    library.define("quantize(Tensor x) -> (Tensor, Tensor)", tags=(torch.Tag.flexible_layout,))
    library.impl("quantize", lambda x: (x.to(torch.float16), x.abs().amax(-1, keepdim=True)), "CPU")
    torch.library.register_fake(
        "overlay_order_test::quantize", lambda x: (x.to(torch.float16), x.new_empty(x.shape[0], 1)), lib=library
    )
    library.define("scaled_mm(Tensor x, Tensor scale, Tensor weight) -> Tensor", tags=(torch.Tag.flexible_layout,))
    library.impl(
        "scaled_mm", lambda x, scale, weight: torch.nn.functional.linear(x.float(), weight.float()) * scale, "CPU"
    )
    torch.library.register_fake(
        "overlay_order_test::scaled_mm",
        lambda x, scale, weight: scale.new_empty(x.shape[0], weight.shape[0]),
        lib=library,
    )
    library.define("core(Tensor main, Tensor side, Tensor(a!) out) -> ()")
    library.impl("core", _core, "CPU")
    torch.library.register_fake("overlay_order_test::core", lambda main, side, out: None, lib=library)
    yield
    library._destroy()


def _core(main: torch.Tensor, side: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(main[:, : out.shape[1]] * side[:, :1])


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def quantized_by_an_op(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As block FP8: the quantization is an op of its own, and the GEMM another."""
    return torch.ops.overlay_order_test.scaled_mm(*torch.ops.overlay_order_test.quantize(x), weight)


def quantized_by_pointwise_code(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As static FP8: Inductor makes one kernel of the norm and the quantization."""
    values = (x * 3.0).clamp(-448, 448).to(torch.float16)
    return torch.nn.functional.linear(values.float(), weight)


def quantized_by_token(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As dynamic FP8 by token: pointwise code that reads its input twice, and a GEMM that is an op of vLLM's."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 448
    quantized = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return torch.ops.overlay_order_test.scaled_mm(quantized, scale, weight)


@contextlib.contextmanager
def unused_inductor() -> Iterator[None]:
    """Inductor as it is in a new process. It treats the inputs of an op otherwise once it has seen the op."""
    seen, known = set(lowering.needs_realized_inputs), dict(lowering.lowerings)
    for op in [op for op in known if str(op).startswith(("vllm", "overlay_order_test"))]:
        del lowering.lowerings[op]
        lowering.needs_realized_inputs.discard(op)
    try:
        yield
    finally:
        for kept, before in ((lowering.needs_realized_inputs, seen), (lowering.lowerings, known)):
            kept.clear()
            kept.update(before)


#: Every way in which main may be quantized.
MAINS = (plain, quantized_by_an_op, quantized_by_pointwise_code, quantized_by_token)


def pair(
    main: Main, x: torch.Tensor, qkvz: torch.Tensor, ba: torch.Tensor, with_ops: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Main's result and the side's, by start and join or as in stock."""
    if not with_ops:
        return main(x, qkvz), torch.nn.functional.linear(x, ba)
    side = torch.ops.vllm_overlay.start(x, ba, qkvz, ba.shape[0], "toy")
    large = main(x, qkvz)
    torch.ops.vllm_overlay.join(side, large, x)
    return large, side


def model(main: Main, with_ops: bool) -> Callable[..., torch.Tensor]:
    def forward(hidden: torch.Tensor, layers: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        for norm, qkvz, ba, out in layers:
            hidden = hidden * 1.5
            values = hidden.float()
            x = (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * norm).to(hidden.dtype)
            large, side = pair(main, x, qkvz, ba, with_ops)
            result = torch.zeros(x.shape[0], 64, dtype=x.dtype)
            torch.ops.overlay_order_test.core(large, side, result)
            hidden = result @ out
        return hidden

    return forward


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int = HIDDEN) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(dtype)

    layers = [(torch.full((HIDDEN,), 1.1), matrix(MAIN), matrix(SIDE), matrix(64)) for _ in range(LAYERS)]
    return matrix(TOKENS), layers


def compiled(main: Main, with_ops: bool, v2: bool) -> tuple[torch.Tensor, str]:
    torch._dynamo.reset()
    # A difference in rounding shows where the model's type rounds.
    given = inputs(torch.bfloat16 if main is quantized_by_token else torch.float32)
    settings = {"enable_auto_functionalized_v2": v2, "fx_graph_cache": False}
    with config.patch(settings), torch.no_grad(), unused_inductor():
        result, code = run_and_get_code(torch.compile(model(main, with_ops), fullgraph=True), *given)
    return result, code[0]


CALL = re.compile(
    r"^ +(?:\w+ = )?(?:"
    r"torch\.ops\.(?:vllm_overlay|overlay_order_test)\.(\w+)\.default\("
    r"|extern_kernels\.(\w+)\("
    r"|(cpp_fused_\w+)\("
    r"|\S*(clone|copy_)\()",
    re.MULTILINE,
)


def calls(code: str) -> list[str]:
    """The calls of the generated code in their order: names of ops, of library kernels, and of Inductor's own."""
    body = code.split("def call(")[1].split("def benchmark_compiled_module", maxsplit=1)[0]
    return [next(filter(None, match.groups())) for match in CALL.finditer(body)]


def texts(code: str) -> list[str]:
    """The texts of Inductor's own kernels."""
    return sorted(re.findall(r"async_compile\.cpp_pybinding\(.*?\n'{3}\)", code, re.DOTALL))


@pytest.mark.parametrize("v2", [False, True], ids=["as vLLM sets it", "as torch sets it"])
@pytest.mark.parametrize("main", MAINS)
def test_start_comes_before_main_and_join_after_it(main: Main, v2: bool) -> None:
    expected, stock = compiled(main, False, v2)
    result, code = compiled(main, True, v2)
    assert torch.equal(result, expected)
    order = calls(code)
    # The second GEMM of a layer is the output's.
    quantize = ["quantize"] if main is quantized_by_an_op else []
    marks = [name.split("_")[-1].replace("addmm", "mm") for name in order if not name.startswith("cpp_fused")]
    assert marks == ["start", *quantize, "mm", "join", "core", "mm"] * LAYERS
    # Nothing of main runs before start: it comes directly after the kernel that makes its input.
    assert all(order[place - 1].startswith("cpp_fused") for place, name in enumerate(order) if name == "start")
    # Beside the two ops there is what stock has, less the side's GEMM: no clone, and no kernel that was torn in two.
    left = calls(stock)
    for _ in range(LAYERS):
        left.remove("mm")
    assert sorted(name for name in order if name not in ("start", "join")) == sorted(left)
    assert texts(stock) and texts(code) == texts(stock)


def test_the_ops_declare_the_writes_that_give_the_order() -> None:
    """The declarations are what the order stands on: start writes to main's weight, join to the side result."""
    schemas = {
        name: str(getattr(torch.ops.vllm_overlay, name).default._schema) for name in ("start", "start_layer", "join")
    }
    assert "Tensor(a2!) gate" in schemas["start"]
    assert "Tensor(a1!) gate" in schemas["start_layer"]
    assert (
        "Tensor(a0!) result" in schemas["join"] and "Tensor main" in schemas["join"] and "Tensor x" in schemas["join"]
    )
