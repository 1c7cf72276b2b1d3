"""Open pull requests of vLLM that change the GDN forward: the verdict on a source of their shape, and such a layer's run.

The sources are written here from what the pull requests say of themselves; no line is theirs.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from overlay.patches.gdn.verdict import CLASSES, OPT_IN, OPT_IN_UPSTREAM
from overlay.patches.registry import judge
from overlay.verdict import Source, SourceTree, Upstream, Verdict

torch = pytest.importorskip("torch")
from . import gdn_layer  # noqa: E402
from .gdn_layer import HIDDEN, Projection, Run, Shape  # noqa: E402
from .test_gdn_forward import JOIN, PROJECTION, START_LAYER, assert_same_bits  # noqa: E402

pytestmark = pytest.mark.contract

MODULE, CLASS = next(iter(CLASSES.items()))


@dataclasses.dataclass(frozen=True)
class Change:
    """How a class of the pull request's shape begins its `forward_cuda`: it has `mixed` and `ba` afterwards."""

    begins: str
    intercepted: str = "forward_cuda"
    helper: str = ""
    #: What hands `ba` to the core.
    core: str = "b, a = ba.chunk(2, dim=-1)\ntorch.ops.vllm.gdn_attention_core(qkv, b.contiguous(), a.contiguous(), out, self.prefix)"
    modules: tuple[str, ...] = ()
    upstream: Upstream | None = None
    #: Makes a layer one that the change is for.
    switch_on: Callable[[Any], None] | None = None
    #: Which projections such a layer runs then.
    runs: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        lines = [
            *(["", *self.helper.splitlines()] if self.helper else []),
            "def forward(self, states):",
            "    return self._forward_method(states)",
            "def forward_cuda(self, states):",
            *textwrap.indent(self.begins, "    ").splitlines(),
            "    qkv, z = mixed.split([mixed.shape[-1] - self.value_dim, self.value_dim], dim=-1)",
            "    out = torch.zeros((states.shape[0], self.num_v_heads, self.head_v_dim), dtype=states.dtype)",
            *textwrap.indent(self.core, "    ").splitlines(),
            "    result, _ = self.out_proj(self.norm(out, z.reshape(out.shape)).flatten(-2))",
            "    return result",
        ]
        return "\n".join([f"class {CLASS}(LayerBase):", *(f"    {line}" for line in lines), ""])


def fuse_into(name: str) -> Callable[[Any], None]:
    def fuse(layer: Any) -> None:
        sizes = [layer.in_proj_qkvz.output_size_per_partition, layer.in_proj_ba.output_size_per_partition]
        setattr(layer, name, Projection(name, HIDDEN, sum(sizes)))
        layer.sizes, layer.fuses = sizes, True
        del layer.in_proj_qkvz, layer.in_proj_ba

    return fuse


def overlap(layer: Any) -> None:
    layer.input_gemms = True


PAIR = "mixed, _ = self.in_proj_qkvz(states)\nba, _ = self.in_proj_ba(states)"
ELSE = f"else:\n{textwrap.indent(PAIR, '    ')}"
CHANGES = {
    "#56534 and #56530": Change(
        "mixed, ba = self._input_projections(states)",
        intercepted="_input_projections",
        helper=f"def _input_projections(self, states):\n    if getattr(self, 'input_gemms', False):\n"
        f"        return torch.ops.vllm.gdn_input_gemms(states, self.prefix)\n{textwrap.indent(PAIR, '    ')}\n    return mixed, ba",
        modules=(OPT_IN,),
        upstream=OPT_IN_UPSTREAM,
        switch_on=overlap,
        runs=("qkvz", "ba", "out"),
    ),
    "#42746": Change(
        "if getattr(self, 'fuses', False):\n    both, _ = self.in_proj_qkvzba(states)\n"
        f"    mixed, ba = both.split(self.sizes, dim=-1)\n{ELSE}",
        switch_on=fuse_into("in_proj_qkvzba"),
        runs=("in_proj_qkvzba", "out"),
    ),
    "#41457": Change(
        "if hasattr(self, 'in_proj'):\n    both, _ = self.in_proj(states)\n"
        f"    mixed, ba = torch.split(both, self.sizes, dim=-1)\n{ELSE}",
        switch_on=fuse_into("in_proj"),
        runs=("in_proj", "out"),
    ),
    "#51954": Change(
        PAIR,
        core="b, a = ba.chunk(2, dim=-1)\nif states.shape[0] > 3:\n    b, a = b.contiguous(), a.contiguous()\n"
        "torch.ops.vllm.gdn_attention_core(qkv, b, a, out, self.prefix)",
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", CHANGES)


class Changed(SourceTree):
    """A vLLM of which only this is known."""

    def __init__(self, change: Change) -> None:
        super().__init__("")
        self._modules = {MODULE: change.text, **dict.fromkeys(change.modules, "")}

    def has(self, module: str) -> bool:
        return module in self._modules

    def read(self, module: str) -> Source | None:
        return Source(self._modules[module], f"{module}.py") if module in self._modules else None


def verdict(change: Change) -> Verdict:
    return judge("gdn", Changed(change))


@each
def test_the_verdict(name: str) -> None:
    change, found = CHANGES[name], verdict(CHANGES[name])
    assert (found.state, found.methods, found.upstream) == ("apply", (change.intercepted,), change.upstream), found


@pytest.fixture(scope="module")
def patch() -> Iterator[ModuleType]:
    with gdn_layer.overlay_patch() as module:
        yield module


def run(change: Change, patch: ModuleType | None, backend: str | None = None, switched: bool = False) -> Run:
    """Stock, or as the verdict lets the overlay run it."""
    node = gdn_layer.class_of((f"{MODULE}.py", change.text), CLASS)
    released = gdn_layer.compile_class(node, "forward_cuda", f"{MODULE}.py", aiter=True)
    if patch is not None:
        gdn_layer.intercept(patch, released, verdict(change).methods)
    layer = released(Shape(interleaved=False), "forward_cuda")
    record = gdn_layer.attach(patch, layer) if patch is not None and not switched else None
    if switched:
        assert change.switch_on is not None
        change.switch_on(layer)
    return gdn_layer.run(layer, backend, record)


@each
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"], ids=["plain", "eager", "aot_eager"])
def test_the_stand_in_is_seen_whoever_calls_the_method(patch: ModuleType, name: str, backend: str | None) -> None:
    stock, overlaid = run(CHANGES[name], None), run(CHANGES[name], patch, backend)
    assert_same_bits(stock, overlaid)
    assert stock.projections == [["qkvz", "ba", "out"]] * 2
    assert overlaid.projections == [["ba", "qkvz", "out"]] * 2 and overlaid.op_calls == [1, 1]
    if backend is not None:
        ours = [[call for call in graph if call in (START_LAYER, PROJECTION, JOIN)] for graph in overlaid.graphs]
        assert ours and all(graph == [START_LAYER, PROJECTION, JOIN, PROJECTION] for graph in ours)


@pytest.mark.parametrize("name", [name for name, change in CHANGES.items() if change.switch_on])
def test_a_layer_that_the_change_is_for_stays_as_upstream_made_it(patch: ModuleType, name: str) -> None:
    change = CHANGES[name]
    stock, overlaid = run(change, None, switched=True), run(change, patch, switched=True)
    assert_same_bits(stock, overlaid)
    assert overlaid.projections == [list(change.runs)] * 2
