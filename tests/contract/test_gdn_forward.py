"""Upstream's own forwards, release by release, with and without the overlay: the same bits, and start and join where they belong.

The bodies come out of the released files when the test runs. Each runs three times: plainly, and compiled as one graph
with the backends `eager` (what Dynamo makes of it) and `aot_eager` (after functionalization as well).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import ModuleType

import pytest

from . import mutations
from .released import SUPPORTED, Method, methods, tree, verdict

torch = pytest.importorskip("torch")
from . import gdn_layer  # noqa: E402
from .gdn_layer import Run, Shape  # noqa: E402

pytestmark = pytest.mark.contract

PROJECTION = "vllm_contract.projection"
START, START_LAYER, JOIN = (f"vllm_overlay.{name}" for name in (gdn_layer.START, gdn_layer.START_LAYER, gdn_layer.JOIN))


@pytest.fixture(scope="module")
def patch() -> Iterator[ModuleType]:
    _runs.clear()
    with gdn_layer.overlay_patch() as module:
        yield module
    _runs.clear()


def shapes_of(version: str, method: str) -> list[Shape]:
    """Both layouts, and what else the release can make of a layer before this method runs."""
    number = tuple(int(part) for part in version.split("."))
    shapes = [Shape(interleaved) for interleaved in (True, False)]
    shapes.append(Shape(interleaved=False, tp_size=2))
    if method == "forward_hip":
        shapes.append(Shape(interleaved=True, aiter=False))
    if method == "forward_cuda" and number >= (0, 22):
        shapes.append(Shape(interleaved=False, tp_size=2, replicated_ba=True))
    if method == "forward_cuda" and number >= (0, 28):
        shapes.append(Shape(interleaved=True, fused_core=True))
    return shapes


def backends_of(shape: Shape) -> tuple[str | None, ...]:
    """The two layouts run in every way; of the rarer shapes the compiled run that goes furthest is enough."""
    usual = shape in (Shape(interleaved=True), Shape(interleaved=False))
    return (None, "eager", "aot_eager") if usual else (None, "aot_eager")


CASES = [
    pytest.param(version, method, shape, backend, id=f"{version}-{method}-{shape}-{backend or 'plain'}")
    for version in SUPPORTED
    for method in methods(version)
    for shape in shapes_of(version, method)
    for backend in backends_of(shape)
]


@functools.cache
def released_class(version: str) -> tuple[ast.ClassDef, str]:
    found = verdict(version)
    assert found.module is not None
    assert found.class_name is not None
    source = tree(version).read(found.module)
    assert source is not None
    return gdn_layer.class_of((source.path, source.text), found.class_name), source.path


# Releases often share a body to the letter; each distinct one is run once. The key is the code itself.
_runs: dict[tuple[str, str, Shape, str | None, bool, bool], Run] = {}


def run_released(
    patch: ModuleType | None,
    node: ast.ClassDef,
    path: str,
    method: str,
    shape: Shape,
    backend: str | None = None,
    plain: bool = False,
) -> Run:
    """A layer as released, or with the overlay where its patch module is given."""
    code = "\n".join(ast.dump(item) for item in gdn_layer.needed_methods(node, method))
    key = (code, method, shape, backend, patch is not None, plain)
    if key not in _runs:
        released = gdn_layer.compile_class(node, method, path, shape.aiter)
        record = None
        if patch is not None:
            gdn_layer.intercept(patch, released)
        layer = released(shape, method)
        if patch is not None:
            record = gdn_layer.attach(patch, layer, plain)
        _runs[key] = gdn_layer.run(layer, backend, record)
    return _runs[key]


def assert_same_bits(stock: Run, overlaid: Run) -> None:
    assert len(stock.outputs) == len(overlaid.outputs) == 2
    for expected, found in zip(stock.outputs, overlaid.outputs, strict=True):
        assert expected.isfinite().all()
        assert expected.count_nonzero() > expected.numel() / 2, "a result of zeros would compare equal to anything"
        assert torch.equal(expected, found)


@pytest.mark.parametrize(("version", "method", "shape", "backend"), CASES)
def test_same_bits_around_main(patch: ModuleType, version: str, method: str, shape: Shape, backend: str | None) -> None:
    """Main stays in the graph, between start and join, and is called once. A plain side is start's own GEMM."""
    node, path = released_class(version)
    stock = run_released(None, node, path, method, shape)
    plain = backend == "aot_eager"
    overlaid = run_released(patch, node, path, method, shape, backend, plain)
    assert_same_bits(stock, overlaid)
    assert stock.projections == [["qkvz", "ba", "out"]] * 2
    assert overlaid.projections == [["qkvz", "out"] if plain else ["ba", "qkvz", "out"]] * 2
    assert overlaid.op_calls == [1, 1]
    if backend is not None:
        (graph,) = overlaid.graphs
        start = START if plain else START_LAYER
        calls = [call for call in graph if call in (start, PROJECTION, JOIN)]
        assert calls == [start, PROJECTION, JOIN, PROJECTION], "the last one is out_proj"


def test_the_rarer_shapes_take_their_branches() -> None:
    """A branch that is not entered would be compared with itself: each of these changes what is computed."""
    for version, method, rare in (
        ("0.33.0", "forward_cuda", Shape(interleaved=True, fused_core=True)),
        ("0.28.0", "forward_cuda", Shape(interleaved=True, fused_core=True)),
        ("0.33.0", "forward_hip", Shape(interleaved=True, aiter=False)),
    ):
        node, path = released_class(version)
        rare_run = run_released(None, node, path, method, rare)
        usual_run = run_released(None, node, path, method, Shape(rare.interleaved))
        assert not torch.equal(rare_run.outputs[0], usual_run.outputs[0])


@pytest.mark.parametrize("backend", [None, "eager"], ids=["plain", "eager"])
@pytest.mark.parametrize("version", ["0.19.1", "0.20.2", "0.26.0", "0.33.0"])
@pytest.mark.parametrize("refused", [True, False], ids=["refused", "made before"])
def test_a_layer_without_a_pair_stays_stock(
    patch: ModuleType, version: str, refused: bool, backend: str | None
) -> None:
    """Refused layers have None in the pair's place, and layers made before the overlay came have nothing at all."""
    node, path = released_class(version)
    method, shape = methods(version)[0], Shape(interleaved=True)
    released = gdn_layer.compile_class(node, method, path, shape.aiter)
    gdn_layer.intercept(patch, released)
    layer = released(shape, method)
    if refused:
        setattr(layer, gdn_layer.PAIR, None)
    result = gdn_layer.run(layer, backend)
    assert_same_bits(run_released(None, node, path, method, shape), result)
    assert result.projections == [["qkvz", "ba", "out"]] * 2
    assert not any({START, START_LAYER, JOIN} & {*graph} for graph in result.graphs)


@pytest.mark.parametrize("backend", [None, "eager"], ids=["plain", "eager"])
@pytest.mark.parametrize("version", ["0.19.1", "0.20.2"])
def test_split_projections_stay_stock(patch: ModuleType, version: str, backend: str | None) -> None:
    """0.19 and 0.20 under LoRA: there is no `in_proj_qkvz`, and `in_proj_ba` runs in another branch."""
    node, path = released_class(version)
    method, shape = methods(version)[0], Shape(interleaved=False, split_projections=True)
    released = gdn_layer.compile_class(node, method, path, shape.aiter)
    gdn_layer.intercept(patch, released)
    layer = released(shape, method)
    setattr(layer, gdn_layer.PAIR, None)
    result = gdn_layer.run(layer, backend)
    assert_same_bits(run_released(None, node, path, method, shape), result)
    assert result.projections == [["qkv", "ba", "z", "out"]] * 2


# ----------------------------------------------------------------------------- the verdict's promises, put to the test


def changed_class(method: Method, text: str) -> tuple[ast.ClassDef, str]:
    source = method.replaced(text)
    whole, path = released_class(method.version)
    changed = gdn_layer.class_of((source.path, source.text), whole.name)
    names = {item.name for item in changed.body if isinstance(item, ast.FunctionDef)}
    others = [item for item in whole.body if isinstance(item, ast.FunctionDef) and item.name not in names]
    changed.body = [*changed.body, *others]
    return changed, path


HARMLESS = {
    **{name: functools.partial(mutations.replace_pair, template=code) for name, code in mutations.HARMLESS.items()},
    **mutations.HARMLESS_TO_THE_METHOD,
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("version", ["0.19.1", "0.33.0"])
def test_what_is_called_harmless_is(patch: ModuleType, version: str, name: str) -> None:
    """The changes that the verdict must not be upset by do run with the overlay and give upstream's bits."""
    method = Method(version, methods(version)[0])
    node, path = changed_class(method, HARMLESS[name](method.text))
    stock = run_released(None, node, path, method.name, Shape(interleaved=False))
    overlaid = run_released(patch, node, path, method.name, Shape(interleaved=False))
    assert_same_bits(stock, overlaid)
    assert overlaid.op_calls == [1, 1]
    assert [sorted(names) for names in overlaid.projections] == [["ba", "out", "qkvz"]] * 2


WRONG = (
    "input rebound between",
    "alias changed in place between",
    "view augmented between",
    "input changed by a closure between",
    "ba given a walrus",
    "ba called again for another input",
)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_called_drift_would_be_noticed_here(patch: ModuleType, name: str) -> None:
    """Intercepted all the same, these give other bits or run differently: this file's comparison can fail."""
    method = Method("0.33.0", "forward_cuda")
    text = mutations.replace_pair(method.text, mutations.DRIFTING[name])
    text = text.replace("num_tokens = hidden_states.size(0)", "hidden_states = hidden_states.clone(); num_tokens = 5")
    text = text.replace("num_tokens = 5", "num_tokens = hidden_states.size(0)")
    node, path = changed_class(method, text)
    stock = run_released(None, node, path, method.name, Shape(interleaved=False))
    overlaid = run_released(patch, node, path, method.name, Shape(interleaved=False))
    same = all(torch.equal(*pair) for pair in zip(stock.outputs, overlaid.outputs, strict=True))
    assert not same or overlaid.projections != stock.projections


def test_a_dropped_interception_would_be_noticed_here(patch: ModuleType) -> None:
    """Dynamo can drop a wrapper without a word; then the op is in no graph and its counter stands still."""
    node, path = released_class("0.33.0")
    layer = gdn_layer.compile_class(node, "forward_cuda", path, aiter=True)(Shape(interleaved=False), "forward_cuda")
    record = gdn_layer.attach(patch, layer)
    result = gdn_layer.run(layer, "eager", record)
    assert result.op_calls == [0, 0]
    (graph,) = result.graphs
    assert not {START, START_LAYER, JOIN} & {*graph}
    assert graph.count(PROJECTION) == 3
