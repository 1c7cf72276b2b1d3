"""Upstream's own `apply` of LoRA linears, release by release, with and without the overlay: the same bits.

The layers, the GPU's punica wrapper and its metadata are the release's. The two LoRA ops are those of the installed vLLM, which
compute on a CPU here.
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op  # noqa: F401 - vLLM registers its two ops there

from overlay.patches.lora_linear import patch as lora_linear
from overlay.patches.registry import judge
from overlay.report.journal import PatchRecord
from overlay.side_work import ops
from overlay.side_work.adoption import StaysStock
from overlay.side_work.plan import Plan

from . import lora_layers
from .lora_layers import CLASSES, COLUMN, FEATURES, MERGED, METADATA_FILE, REPLICATED, ROW, Kernels, punica_of
from .released import EXPECTED, tree

pytestmark = pytest.mark.contract

TOKENS = 6
#: Steps of other sizes and other adapters, as an engine has them.
STEPS = ([-1, 0, 1, -1, 2, 1], [0, 0], [-1, -1, -1, -1], [2, 1, 0, -1, 1, 2, 0], [1, 2, 0, 0, 1, 1, -1])
#: One release for each form that the layers and the wrapper have had.
FORMS = ("0.19.1", "0.20.0", "0.24.0", "0.33.0")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Kernels]:
    made = Kernels()
    library = torch.library.Library("vllm", "IMPL")
    library.impl("lora_shrink", made.shrink, "CPU", allow_override=True)
    library.impl("lora_expand", made.expand, "CPU", allow_override=True)
    yield made
    library._destroy()


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    """Where the ops count, in an engine that is running."""
    ops.define(declares_writes=True)
    found = PatchRecord()
    monkeypatch.setitem(ops.planned, lora_linear.NAME, ops.PlannedPair(Plan("dual", 256), found))
    monkeypatch.setattr(lora_linear, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(lora_linear, "LINEARS", (lora_layers.Linear,))
    return found


def intercept(version: str, released: dict[str, type]) -> tuple[type, ...]:
    """What `install` does to the classes that the verdict names."""
    targets = [released[path.rpartition(".")[2]] for path, _ in judge("lora_linear", tree(version)).intercepted()]
    for target in targets:
        target.apply = lora_linear.overlap_adapters(target.__dict__["apply"])  # type: ignore[attr-defined]
    return tuple(targets)


def both(
    version: str, name: str, linear: Callable[[int, str], lora_layers.Linear] = lora_layers.Linear, tp_size: int = 1
) -> tuple[Any, Any]:
    """A layer as released, and one with the overlay."""
    released, patched = (lora_layers.classes_of(version, tp_size) for _ in range(2))
    stock, layer = (
        lora_layers.make_layer(classes, name, punica_of(version), linear, tp_size) for classes in (released, patched)
    )
    pair, _ = lora_linear.make_pair(layer, intercept(version, patched))
    setattr(layer, lora_linear.PAIR, pair)
    return stock, layer


def next_step(adapters: list[int], *layers: Any) -> None:
    """What the engine does with the adapters of a step before the model runs."""
    for layer in layers:
        layer.punica_wrapper.token_mapping_meta.prepare_tensors(torch.tensor(adapters))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Negative and positive zeros are equal as numbers."""
    return tensor.view(torch.int16)


def given(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(7)).bfloat16()


def base_only(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    base: torch.Tensor = layer.base_layer.quant_method.apply(layer.base_layer, x, bias)
    return base


@pytest.mark.parametrize("version", EXPECTED)
def test_every_release_has_one_of_the_known_forms(version: str) -> None:
    assert lora_layers.shape_of(version) in [lora_layers.shape_of(form) for form in FORMS]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("version", EXPECTED)
def test_same_bits(version: str, name: str, with_bias: bool, record: PatchRecord, kernels: Kernels) -> None:
    stock, layer = both(version, name)
    bias = torch.randn(20).bfloat16() if with_bias else None
    layer.base_layer.bias = stock.base_layer.bias = bias
    for step, adapters in enumerate(STEPS, start=1):
        next_step(adapters, stock, layer)
        x = given(len(adapters))
        expected = stock.apply(x, bias)
        kernels.calls.clear()
        gemms = layer.base_layer.quant_method.calls
        found = layer.apply(x.clone(), bias)
        assert torch.equal(bits(found), bits(expected))
        assert found.shape == expected.shape == (len(adapters), 20)
        assert kernels.calls == ["shrink", "expand"]
        assert layer.base_layer.quant_method.calls - gemms == 1
        assert sum(record.calls.serial.values()) == step, "start was not called"
        adds = any(adapter >= 0 for adapter in adapters)
        assert adds == bool((expected != base_only(stock, x, bias)).any()), "the test shows nothing"


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("version", FORMS)
def test_a_batch_dimension(version: str, name: str, record: PatchRecord, kernels: Kernels) -> None:
    """As Transformers' models have it."""
    stock, layer = both(version, name)
    next_step(STEPS[0], stock, layer)
    x = given().unsqueeze(0)
    found, expected = layer.apply(x, None), stock.apply(x, None)
    assert torch.equal(bits(found), bits(expected)) and found.shape == expected.shape == (1, TOKENS, 20)
    assert sum(record.calls.serial.values()) == 1 and kernels.calls == ["shrink", "expand"] * 2


@pytest.mark.parametrize("specialize", [False, True])
@pytest.mark.parametrize("version", FORMS)
def test_layers_of_one_wrapper(version: str, specialize: bool) -> None:
    released, patched = lora_layers.classes_of(version), lora_layers.classes_of(version)
    targets = intercept(version, patched)
    wrapper = punica_of(version, specialize)
    x = given()
    for name in CLASSES:
        layer = lora_layers.make_layer(patched, name, wrapper)
        setattr(layer, lora_linear.PAIR, lora_linear.make_pair(layer, targets)[0])
        stock = lora_layers.make_layer(released, name, punica_of(version, specialize))
        next_step(STEPS[0], stock, layer)
        assert torch.equal(bits(layer.apply(x)), bits(stock.apply(x)))


@pytest.mark.parametrize("version", FORMS)
def test_merged_layers_of_two_shards(version: str) -> None:
    """Up to 0.24.0 upstream gathers the shrunk activations between shrink and expand, which reads the first rank's only."""
    stock, layer = both(version, MERGED, tp_size=2)
    next_step(STEPS[0], stock, layer)
    x = given()
    assert torch.equal(bits(layer.apply(x, None)), bits(stock.apply(x, None)))


CALL = re.compile(
    r"^ +(?:\w+ = )?(?:torch\.ops\.\w+\.(\w+)\.default\(|extern_kernels\.(\w+)\(|(cpp_fused)_\w+\(|\S*(clone|copy_)\()",
    re.MULTILINE,
)


@pytest.mark.parametrize("version", FORMS)
def test_compiled_start_comes_before_the_base_layer_and_join_before_expand(version: str, record: PatchRecord) -> None:
    """One graph of all classes, by Dynamo without a break and by Inductor as vLLM sets it."""
    stock, layers = zip(*(both(version, name) for name in CLASSES), strict=True)
    next_step(STEPS[0], *stock, *layers)

    def model(layers: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = torch.relu(layer.apply(x * 2, None))[:, :FEATURES]
        return x

    def compiled(layers: tuple[Any, ...]) -> tuple[torch.Tensor, list[str]]:
        torch._dynamo.reset()
        with inductor.patch({"enable_auto_functionalized_v2": False, "fx_graph_cache": False}), torch.no_grad():
            result, code = run_and_get_code(torch.compile(model, fullgraph=True), layers, given())
        body = code[0].split("def call(")[1].split("def benchmark_compiled_module", maxsplit=1)[0]
        return result, [next(filter(None, match.groups())) for match in CALL.finditer(body)]

    expected, without = compiled(stock)
    found, calls = compiled(layers)
    assert torch.equal(bits(found), bits(expected))
    # The base layer is a GEMM and a kernel that changes some of its columns.
    assert calls == ["cpp_fused", *["lora_start", "mm", "cpp_fused", "join", "lora_expand", "cpp_fused"] * len(CLASSES)]
    assert sorted(call for call in calls if call not in ("lora_start", "join")) == sorted(
        call for call in without if call not in ("lora_shrink", "zeros")
    )
    assert record.calls.fake > 0


@pytest.mark.parametrize("name", [MERGED, REPLICATED])
@pytest.mark.parametrize("version", FORMS)
def test_a_base_layer_with_its_own_forward_stays_stock(version: str, name: str) -> None:
    with pytest.raises(StaysStock, match="has a forward of its own"):
        both(version, name, lora_layers.LinearWithItsOwnForward)


@pytest.mark.parametrize("version", EXPECTED)
def test_sharded_classes_are_refused_by_class(version: str) -> None:
    released = lora_layers.classes_of(version)
    targets = intercept(version, released)
    sharded = [name for name in released if name.endswith("ShardedLoRA")]
    assert len(sharded) >= 5
    for name in sharded:
        with pytest.raises(StaysStock, match="has an apply of its own"):
            lora_linear.check_class(released[name], targets)
    for name in (COLUMN, ROW, MERGED, REPLICATED):
        lora_linear.check_class(released[name], targets)


@pytest.mark.parametrize("version", EXPECTED)
def test_the_tensors_of_the_metadata_stay_the_same(version: str) -> None:
    """Upstream writes into them: what a captured graph reads is what a later step has written."""
    source = pathlib.Path(tree(version).folder, "vllm", "lora", *METADATA_FILE).read_text("utf-8")
    written = [
        target
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    ]
    assert [ast.unparse(target) for target in written] == []


@pytest.mark.parametrize("version", EXPECTED)
def test_upstreams_op_has_the_arguments_that_start_is_made_of(version: str) -> None:
    """Start's schema is that of the op; without defaults, after which no argument could follow that has none."""
    source = pathlib.Path(tree(version).folder, "vllm", "lora", "ops", "triton_ops", "lora_shrink_op.py").read_text(
        "utf-8"
    )
    (function,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "_lora_shrink"
    )
    names = [argument.arg for argument in function.args.args]
    assert names[:3] == ["inputs", "lora_a_weights", "output_tensor"] and "no_lora_flag_cpu" in names
    assert not function.args.defaults
    assert 'mutates_args=["output_tensor"]' in source
    wrapper = pathlib.Path(tree(version).folder, "vllm", "lora", "punica_wrapper", "punica_gpu.py").read_text("utf-8")
    assert re.search(r"triton_ops import \([^)]*\blora_shrink\b", wrapper)
