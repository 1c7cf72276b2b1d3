"""Upstream's own `apply` of LoRA linears, release by release, with and without the overlay: the same bits."""

from __future__ import annotations

import itertools
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
from overlay.plan import Plan
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
