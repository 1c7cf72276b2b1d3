"""Upstream's own `apply` of LoRA linears, release by release, with and without the overlay: the same bits."""

from __future__ import annotations
import __future__

import ast
import functools
import itertools
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch

from overlay import ops
from overlay.journal import PatchRecord
from overlay.layers import Refused
from overlay.patches import lora_linear
from overlay.side_work.plan import Plan
from overlay.verdict import judge

from . import lora_layers
from .lora_layers import CLASSES, COLUMN, FEATURES, MERGED, REPLICATED, ROW
from .released import EXPECTED, tree

pytestmark = pytest.mark.contract

TOKENS = 6
BATCHES = {"no adapter": [-1] * TOKENS, "one adapter": [0] * TOKENS, "mixed, three ranks": [-1, 0, 1, -1, 2, 1]}
SHAPES = {"2-D": (TOKENS, FEATURES), "3-D": (1, TOKENS, FEATURES)}


class AuxiliaryFirst:
    """A parallel region on a CPU: the same work in the order in which `ParallelRegion.run` launches it."""

    prepared = True

    def run(self, default: Any, auxiliary: list[Any]) -> tuple[Any, tuple[Any, ...]]:
        results = tuple(work() for work in auxiliary)
        return default(), results


@pytest.fixture(scope="module")
def record() -> Iterator[PatchRecord]:
    """Where the op counts, which is there as long as this module's tests run."""
    record = PatchRecord()
    kept = len(ops._libraries)
    lora_linear.register_op(record)
    yield record
    for library in ops._libraries[kept:]:
        library._destroy()
    del ops._libraries[kept:]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The static forward context of an engine that is running."""
    layers: dict[str, Any] = {}
    config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=layers),
        parallel_config=types.SimpleNamespace(use_ubatching=False),
    )
    forward_context = types.SimpleNamespace(no_compile_layers=layers)
    monkeypatch.setattr(lora_linear, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(lora_linear, "get_forward_context", lambda: forward_context)
    monkeypatch.setattr(lora_linear, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(lora_linear, "envs", types.SimpleNamespace(VLLM_BATCH_INVARIANT=False))
    monkeypatch.setattr(lora_linear, "LINEARS", (lora_layers.Linear,))
    return layers


def intercept(version: str, released: dict[str, type]) -> dict[type, Any]:
    """What `install` does to the classes that the verdict names."""
    originals: dict[type, Any] = {}
    for path, _ in judge("lora_linear", tree(version)).intercepted():
        target = released[path.rpartition(".")[2]]
        originals[target] = target.__dict__["apply"]
        target.apply = lora_linear.overlap_adapters(originals[target])  # type: ignore[attr-defined]
    return originals


def attach(layer: Any, originals: dict[type, Any], record: PatchRecord) -> lora_linear.LinearOverlap:
    overlap, _ = lora_linear.make_overlap(layer, originals, Plan("dual", 256), record)
    setattr(layer, lora_linear.OVERLAP, overlap)
    return overlap


def fork(overlap: lora_linear.LinearOverlap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a layer take the way of a captured graph."""
    monkeypatch.setattr(overlap, "_reason_for_serial", lambda layer, x: None)
    monkeypatch.setattr(overlap, "region", AuxiliaryFirst())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Negative and positive zeros are equal as numbers."""
    return tensor.view(torch.int16)


def given(shape: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(SHAPES[shape], generator=generator).bfloat16()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("version", EXPECTED)
def test_same_bits(
    version: str, name: str, batch: str, record: PatchRecord, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = lora_layers.make_layer(lora_layers.classes_of(version), name, BATCHES[batch])
    released = lora_layers.classes_of(version)
    layer = lora_layers.make_layer(released, name, BATCHES[batch])
    overlap = attach(layer, intercept(version, released), record)
    for shape, with_bias in itertools.product(SHAPES, (False, True)):
        x = given(shape)
        bias = torch.randn(20).bfloat16() if with_bias else None
        layer.base_layer.bias = stock.base_layer.bias = bias
        expected = stock.apply(x, bias)
        for forked in (False, True):
            with monkeypatch.context() as patch:
                if forked:
                    fork(overlap, patch)
                before, gemms = record.calls.dual_stream, layer.base_layer.quant_method.calls
                found = layer.apply(x.clone(), bias)
                assert torch.equal(bits(found), bits(expected))
                assert found.shape == expected.shape == (*x.shape[:-1], 20)
                assert record.calls.dual_stream - before == forked
                assert layer.base_layer.quant_method.calls - gemms == 1
    changed = (BATCHES[batch] != BATCHES["no adapter"]) == bool((expected != bias_only(stock, x, bias)).any())
    assert changed, "the adapters make no difference, so the test shows nothing"


def bias_only(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    base: torch.Tensor = layer.base_layer.quant_method.apply(layer.base_layer, x, bias)
    return base


@pytest.mark.parametrize("version", ["0.20.0", "0.24.0", "0.33.0"])
def test_merged_layers_of_two_shards(
    version: str, record: PatchRecord, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 0.24.0 upstream gathers the shrunk activations between shrink and expand; the collective stays where it is."""
    batch = BATCHES["mixed, three ranks"]
    stock = lora_layers.make_layer(lora_layers.classes_of(version, 2), MERGED, batch, tp_size=2)
    released = lora_layers.classes_of(version, 2)
    layer = lora_layers.make_layer(released, MERGED, batch, tp_size=2)
    fork(attach(layer, intercept(version, released), record), monkeypatch)
    x = given("2-D")
    assert torch.equal(bits(layer.apply(x, None)), bits(stock.apply(x, None)))


@pytest.mark.parametrize("name", [MERGED, REPLICATED])
@pytest.mark.parametrize("version", ["0.20.0", "0.24.0", "0.25.1", "0.33.0"])
def test_a_base_layer_with_its_own_forward_stays_stock(
    version: str, name: str, record: PatchRecord, context: Any
) -> None:
    released = lora_layers.classes_of(version)
    layer = lora_layers.make_layer(released, name, [0] * TOKENS, lora_layers.LinearWithItsOwnForward)
    with pytest.raises(Refused, match="has a forward of its own"):
        attach(layer, intercept(version, released), record)
    stock = lora_layers.make_layer(
        lora_layers.classes_of(version), name, [0] * TOKENS, lora_layers.LinearWithItsOwnForward
    )
    before = record.calls.total()
    setattr(layer, lora_linear.OVERLAP, None)
    assert torch.equal(layer.apply(given("2-D")), stock.apply(given("2-D")))
    assert record.calls.total() == before


@pytest.mark.parametrize("version", EXPECTED)
def test_sharded_classes_are_refused_by_class(version: str, record: PatchRecord, context: Any) -> None:
    released = lora_layers.classes_of(version)
    originals = intercept(version, released)
    sharded = [name for name in released if name.endswith("ShardedLoRA")]
    assert len(sharded) >= 5
    for name in sharded:
        with pytest.raises(Refused, match="has an apply of its own"):
            lora_linear.apply_of(released[name], originals)
    for name in (COLUMN, ROW, MERGED, REPLICATED):
        assert lora_linear.apply_of(released[name], originals) in originals.values()


# ------------------------------------------------------------------------------------------- upstream's calls, replayed

PUNICA_FILE = ("lora", "punica_wrapper", "punica_gpu.py")
METADATA_FILE = ("lora", "ops", "triton_ops", "lora_kernel_metadata.py")
SLOTS, ROWS = 3, 16


class Kernels:
    """Upstream's two LoRA ops on a CPU: its names and arguments; computed and rounded as its Triton kernels do.

    `ways` has a word for each call: "op" where it came through torch's dispatcher, "function" where it did not.
    """

    def __init__(self) -> None:
        self.ways: list[str] = []

    def shrink(
        self, way: str, inputs: Any, weights: Any, output: Any, adapters: Any, no_lora: Any, scaling: float
    ) -> None:
        self.ways.append(way)
        assert isinstance(weights, list) and len(adapters) == len(inputs) == output.shape[1]
        if no_lora.item():
            return
        output.zero_()
        for token, adapter in enumerate(adapters.tolist()):
            for piece, weight in enumerate(weights):
                if adapter >= 0:
                    output[piece, token] = (weight[adapter, 0].float() @ inputs[token].float()) * scaling

    def expand(
        self, way: str, inputs: Any, weights: Any, output: Any, adapters: Any, no_lora: Any, start: int, add: bool
    ) -> None:
        self.ways.append(way)
        assert isinstance(weights, list) and len(adapters) == inputs.shape[1] == len(output) and add
        if no_lora.item():
            return
        for token, adapter in enumerate(adapters.tolist()):
            column = start
            for piece, weight in enumerate(weights):
                columns, rank = weight.shape[2:]  # a gathered buffer is wider than the rank
                if adapter >= 0:
                    product = weight[adapter, 0].float() @ inputs[piece, token, :rank].to(weight.dtype).float()
                    output[token, column : column + columns] += product.to(weight.dtype)
                column += columns


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """The ops that the installed vLLM has registered, and the functions behind them, computing on a CPU."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    made = Kernels()

    def shrink_by(way: str) -> Any:
        def lora_shrink(
            inputs: Any,
            lora_a_weights: Any,
            output_tensor: Any,
            token_lora_mapping: Any,
            token_indices_sorted_by_lora_ids: Any,
            num_tokens_per_lora: Any,
            lora_token_start_loc: Any,
            lora_ids: Any,
            no_lora_flag_cpu: Any,
            num_active_loras: Any,
            scaling: float,
        ) -> None:
            made.shrink(way, inputs, lora_a_weights, output_tensor, token_lora_mapping, no_lora_flag_cpu, scaling)

        return lora_shrink

    def expand_by(way: str) -> Any:
        def lora_expand(
            inputs: Any,
            lora_b_weights: Any,
            output_tensor: Any,
            token_lora_mapping: Any,
            token_indices_sorted_by_lora_ids: Any,
            num_tokens_per_lora: Any,
            lora_token_start_loc: Any,
            lora_ids: Any,
            no_lora_flag_cpu: Any,
            num_active_loras: Any,
            offset_start: int = 0,
            add_inputs: bool = False,
        ) -> None:
            given = (token_lora_mapping, no_lora_flag_cpu, offset_start, add_inputs)
            made.expand(way, inputs, lora_b_weights, output_tensor, *given)

        return lora_expand

    monkeypatch.setattr(lora_shrink_op, "_lora_shrink", shrink_by("function"))
    monkeypatch.setattr(lora_expand_op, "_lora_expand", expand_by("function"))
    library = torch.library.Library("vllm", "IMPL")
    library.impl("lora_shrink", shrink_by("op"), "CPU", allow_override=True)
    library.impl("lora_expand", expand_by("op"), "CPU", allow_override=True)
    yield made
    library._destroy()


@functools.cache
def punica_code(version: str) -> tuple[Any, Any]:
    """A release's GPU punica wrapper, its methods for linears only; and the metadata of its kernels."""
    folder = pathlib.Path(tree(version).folder, "vllm")
    path = folder.joinpath(*PUNICA_FILE)
    (wrapper,) = (
        statement
        for statement in ast.parse(path.read_text("utf-8"), str(path)).body
        if isinstance(statement, ast.ClassDef) and statement.name == "PunicaWrapperGPU"
    )
    wanted = {"add_shrink", "add_expand", "add_lora_linear"}
    wrapper.body = [item for item in wrapper.body if isinstance(item, ast.FunctionDef) and item.name in wanted]
    assert len(wrapper.body) == len(wanted)
    wrapper.bases, wrapper.decorator_list = [], []
    flags = __future__.annotations.compiler_flag
    metadata = folder.joinpath(*METADATA_FILE)
    return (
        compile(ast.fix_missing_locations(ast.Module([wrapper], [])), str(path), "exec", flags=flags),
        compile(metadata.read_text("utf-8"), str(metadata), "exec"),
    )


def punica_of(version: str, specialize: bool = False) -> Any:
    """A release's GPU punica wrapper on a CPU; it calls the ops of the installed vLLM."""
    wrapper_code, metadata_code = punica_code(version)
    ops_of_vllm = {"lora_shrink": torch.ops.vllm.lora_shrink, "lora_expand": torch.ops.vllm.lora_expand}
    space: dict[str, Any] = {"__name__": __name__, "torch": torch, **ops_of_vllm}
    exec(metadata_code, space)
    exec(wrapper_code, space)
    wrapper = object.__new__(space["PunicaWrapperGPU"])
    wrapper.token_mapping_meta = space["LoRAKernelMeta"].make(SLOTS, ROWS, "cpu")
    wrapper.lora_config = types.SimpleNamespace(specialize_active_lora=specialize)
    return wrapper


def next_step(layers: list[Any], adapters: list[int]) -> None:
    """What the engine does with the adapters of a step before the model runs."""
    for layer in layers:
        layer.punica_wrapper.token_mapping_meta.prepare_tensors(torch.tensor(adapters))


STEPS = ([-1, 0, 1, -1, 2, 1], [0, 0], [-1, -1, -1, -1], [2, 1, 0, -1, 1, 2, 0], [1, 2, 0, 0, 1, 1, -1])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("version", EXPECTED)
def test_replayed_calls_give_the_same_bits(
    version: str, name: str, with_bias: bool, record: PatchRecord, context: Any, kernels: Kernels
) -> None:
    """Steps of other sizes and other adapters, as an engine has them: every one is replayed after the first has been learned."""
    stock = lora_layers.make_layer(lora_layers.classes_of(version), name, [])
    released = lora_layers.classes_of(version)
    layer = lora_layers.make_layer(released, name, [])
    stock.punica_wrapper, layer.punica_wrapper = punica_of(version), punica_of(version)
    overlap = attach(layer, intercept(version, released), record)
    bias = torch.randn(20).bfloat16() if with_bias else None
    layer.base_layer.bias = stock.base_layer.bias = bias
    generator = torch.Generator().manual_seed(7)
    for adapters in STEPS:
        next_step([stock, layer], adapters)
        x = torch.randn(len(adapters), FEATURES, generator=generator).bfloat16()
        expected = stock.apply(x, bias)
        kernels.ways.clear()
        gemms = layer.base_layer.quant_method.calls
        found = layer.apply(x.clone(), bias)
        assert torch.equal(bits(found), bits(expected))
        assert found.shape == expected.shape
        assert kernels.ways == ["function", "function"]
        assert layer.base_layer.quant_method.calls - gemms == 1
        adds = any(adapter >= 0 for adapter in adapters)
        assert adds == bool((expected != bias_only(stock, x, bias)).any())
    assert overlap._replay is not None


@pytest.mark.parametrize("version", EXPECTED)
def test_a_batch_dimension_goes_through_upstreams_apply(
    version: str, record: PatchRecord, context: Any, kernels: Kernels
) -> None:
    released = lora_layers.classes_of(version)
    layer = lora_layers.make_layer(released, ROW, [])
    layer.punica_wrapper = punica_of(version)
    attach(layer, intercept(version, released), record)
    next_step([layer], [0] * TOKENS)
    flat = layer.apply(given("2-D"), None)
    kernels.ways.clear()
    assert torch.equal(bits(layer.apply(given("2-D").unsqueeze(0), None)), bits(flat.unsqueeze(0)))
    assert kernels.ways == ["op", "op"]


@pytest.mark.parametrize("specialize", [False, True])
@pytest.mark.parametrize("version", EXPECTED)
def test_layers_share_the_metadata_of_a_step(
    version: str, specialize: bool, record: PatchRecord, context: Any, kernels: Kernels
) -> None:
    """And it is what upstream's own `meta_args` gives for that step."""
    released = lora_layers.classes_of(version)
    originals = intercept(version, released)
    layers = [lora_layers.make_layer(released, name, []) for name in (MERGED, ROW)]
    layers[0].punica_wrapper = layers[1].punica_wrapper = wrapper = punica_of(version, specialize)
    replays = []
    next_step(layers, [0] * TOKENS)
    for layer in layers:
        overlap = attach(layer, originals, record)
        layer.apply(given("2-D"), None)
        replays.append(overlap._replay)
    assert replays[0].metadata is replays[1].metadata
    for tokens in (TOKENS, 2, ROWS):
        expected = wrapper.token_mapping_meta.meta_args(tokens, specialize)
        found = replays[0].metadata.arguments(tokens)
        assert [lora_linear._same(*pair) for pair in zip(found, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("version", ["0.20.0", "0.24.0", "0.33.0"])
def test_what_is_sharded_with_a_collective_is_not_replayed(
    version: str, record: PatchRecord, context: Any, kernels: Kernels
) -> None:
    """Up to 0.24.0 merged layers gather between shrink and expand; the op for it is not one of torch's own."""
    released = lora_layers.classes_of(version, 2)
    globals_of_apply = released[MERGED].apply.__globals__  # type: ignore[attr-defined]
    library = torch.library.Library("overlay_test", "DEF")
    library.define("gather(Tensor x) -> Tensor")
    library.impl("gather", lambda x: torch.cat([x, x], dim=-1), "CPU")
    globals_of_apply["tensor_model_parallel_all_gather"] = torch.ops.overlay_test.gather
    layer = lora_layers.make_layer(released, MERGED, [], tp_size=2)
    layer.punica_wrapper = punica_of(version)
    overlap = attach(layer, intercept(version, released), record)
    next_step([layer], [0] * TOKENS)
    layer.apply(given("2-D"), None)
    assert (overlap._replay is None) == (version != "0.33.0")
    assert kernels.ways[-2:] == (["function"] * 2 if version == "0.33.0" else ["op"] * 2)
    library._destroy()


@pytest.mark.parametrize("version", EXPECTED)
def test_the_tensors_of_the_metadata_stay_the_same(version: str) -> None:
    """Upstream writes into them; a tensor in the place of another would leave the kept views behind."""
    source = pathlib.Path(tree(version).folder, "vllm", *METADATA_FILE).read_text("utf-8")
    written = [
        target
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    ]
    assert [ast.unparse(target) for target in written] == []
