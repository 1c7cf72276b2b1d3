"""A pair whose method Dynamo does not trace, and whose side is in a child of the layer: plain calls, in a capture alone."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from overlay.engine import loaded
from overlay.report.journal import OwnJournal, PatchRecord
from overlay.settings import Settings
from overlay.side_work import adoption, declaration, ops, pairs, waiting
from overlay.side_work.declaration import TwoLinears
from overlay.side_work.pairs import Pair
from overlay.side_work.plan import NOT_CAPTURING, PASS_THROUGH, Plan
from overlay.side_work.waiting import PAIR
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY, DUAL, DUAL_MAIN_FIRST, SERIAL
from tests.unit import side_work_ops
from tests.unit.lanes import NotingLane
from tests.unit.linears import method_named, unquantized

namespace = types.SimpleNamespace
HIDDEN, MAIN, SIDE = 16, 48, 6
DECLARED = TwoLinears(
    "dsa", "main", "child.side", lambda layer: {"main": MAIN, "side": layer.child.width}, 256,
    name="layer_name", calls_side=lambda layer: not layer.skips,
)  # fmt: skip


class Linear(torch.nn.Module):
    """A linear in vLLM's manner; it notes its calls."""

    def __init__(self, rows: int, order: list[str], name: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rows)
        self.weight = torch.nn.Parameter(torch.randn(rows, HIDDEN, generator=generator), requires_grad=False)
        self.input_size, self.params_dtype, self.output_size_per_partition = HIDDEN, torch.float32, rows
        self.quant_method = unquantized() if name == "side" else method_named("Fp8LinearMethod")
        self.order, self.name, self.fails = order, name, False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.order.append(self.name)
        if self.fails:
            raise RuntimeError("the real error")
        return torch.nn.functional.linear(x, self.weight), None


class Child(torch.nn.Module):
    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.side, self.width, self.other = Linear(SIDE, order, "side"), SIDE, torch.nn.Identity()


class Layer(torch.nn.Module):
    """A layer of the shape of DeepSeek-V3.2's attention."""

    def __init__(self, layer_name: str = "a", child: bool = True, side_first: bool = False) -> None:
        super().__init__()
        self.order: list[str] = []
        self.layer_name, self.skips, self.side_first = layer_name, False, side_first
        self.main = Linear(MAIN, self.order, "main")
        self.child = Child(self.order) if child else None
        self.selves: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.selves.append(self)
        if self.side_first:
            assert self.child is not None
            side = self.child.side(x)[0]
            main = self.main(x)[0]
        else:
            main = self.main(x)[0]
            if self.child is not None and not self.skips:
                side = self.child.side(x)[0][:, : self.child.width]
            else:
                side = torch.zeros(x.shape[0], SIDE)
        if self.child is not None:
            side = self.child.other(side)
        return torch.cat((main, side), dim=-1)


def pair_of(layer: Any, plain: bool = True) -> Pair:
    return Pair(
        layer.layer_name, layer.main, layer.child.side, MAIN, SIDE, "FP8", "bf16", "weight", plain, traced=False
    )


PATCHED = DECLARED.intercept(Layer.forward, traced=False)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    made = PatchRecord()
    monkeypatch.setattr(ops, "planned", {pair_of(Layer()).name: ops.PlannedPair(Plan(DUAL, 256), made)})
    return made


@pytest.fixture(params=[False, True], ids=["main first", "side first"])
def layer(request: pytest.FixtureRequest, record: PatchRecord) -> Layer:
    made = Layer(side_first=request.param)
    setattr(made, PAIR, pair_of(made))
    return made


def as_on_a_gpu(layer: Any, monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    object.__setattr__(getattr(layer, PAIR), "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)


def forks(monkeypatch: pytest.MonkeyPatch, order: list[str], strategy: str = DUAL) -> None:
    monkeypatch.setattr(ops, "choose", lambda *_: (strategy, NotingLane(order)))


def expected(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    result = Layer.forward(layer, x)
    layer.order.clear()
    layer.selves.clear()
    return result


X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_without_a_fork_the_order_is_stocks(layer: Layer, record: PatchRecord) -> None:
    wanted = expected(layer, X)
    assert torch.equal(PATCHED(layer, X), wanted)
    assert layer.order == (["side", "main"] if layer.side_first else ["main", "side"])
    assert record.calls.serial == {PASS_THROUGH: 1} and record.calls.dual_stream == 0


@pytest.mark.parametrize("plain", [True, False], ids=["a plain side", "a side that is called"])
@pytest.mark.parametrize("strategy", [DUAL, DUAL_MAIN_FIRST])
def test_in_a_capture_the_side_starts_before_main_and_main_is_joined(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, strategy: str, plain: bool
) -> None:
    setattr(layer, PAIR, pair_of(layer, plain))
    as_on_a_gpu(layer, monkeypatch, capturing=True)
    wanted = expected(layer, X)
    forks(monkeypatch, layer.order, strategy)
    assert torch.equal(PATCHED(layer, X), wanted)
    # A plain side is a GEMM of its weight; otherwise the linear itself is called, once.
    assert layer.order == ["start", *([] if plain else ["side"]), "main", "join"]


def test_a_serial_plan_is_stock_in_a_capture(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(layer, monkeypatch, capturing=True)
    wanted = expected(layer, X)
    forks(monkeypatch, layer.order, SERIAL)
    assert torch.equal(PATCHED(layer, X), wanted)
    assert sorted(layer.order) == ["main", "side"]


def test_outside_a_capture_the_real_layer_runs(
    layer: Layer, record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attribute of a stand-in would cost the host time, in a step that waits for the host."""
    as_on_a_gpu(layer, monkeypatch, capturing=False)
    wanted = expected(layer, X)
    assert torch.equal(PATCHED(layer, X), wanted)
    assert layer.selves == [layer] and record.calls.serial == {NOT_CAPTURING: 1}


def test_a_layer_that_skips_the_side_runs_as_it_is(record: PatchRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter's layers skip it from step to step, by an attribute that vLLM sets."""
    layer = Layer()
    setattr(layer, PAIR, pair_of(layer))
    as_on_a_gpu(layer, monkeypatch, capturing=True)
    forks(monkeypatch, layer.order)
    for skips, order in ((True, ["main"]), (False, ["start", "main", "join"]), (True, ["main"])):
        layer.skips = skips
        layer.order.clear()
        wanted = expected(layer, X)
        assert torch.equal(PATCHED(layer, X), wanted) and layer.order == order


def test_a_layer_without_a_pair_runs_as_it_is(record: PatchRecord) -> None:
    for layer in (Layer(child=False), Layer()):
        setattr(layer, PAIR, None)
        assert torch.equal(PATCHED(layer, X), Layer.forward(layer, X))
        assert layer.selves == [layer, layer] and record.calls.total() == 0


def test_a_failure_of_main_is_joined_before_it_goes_on(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(layer, monkeypatch, capturing=True)
    forks(monkeypatch, layer.order)
    layer.main.fails = True
    with pytest.raises(RuntimeError, match="the real error"):
        PATCHED(layer, X)
    assert layer.order == ["start", "main", "join"]


def test_whoever_compiles_the_model_after_all_gets_stock(layer: Layer, record: PatchRecord) -> None:
    layer.selves = namespace(append=lambda _: None)  # type: ignore[assignment]
    torch._dynamo.reset()
    compiled = torch.compile(PATCHED, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(layer, X), Layer.forward(layer, X))
    assert record.calls.total() == 0


def test_all_of_main_is_measured_because_all_of_it_lies_between_start_and_join() -> None:
    layer = Layer()
    whole = pairs._between_start_and_join(pair_of(layer), X)
    whole()
    assert layer.order == ["main"]
    traced = Pair("a", layer.main, layer.child.side, MAIN, SIDE, "FP8", "bf16", "weight", True)  # type: ignore[union-attr]
    layer.order.clear()
    alone = pairs._between_start_and_join(traced, X)
    assert layer.order == ["main"], "once, to find the GEMM that is measured alone"
    alone()
    assert layer.order == ["main"]
    assert pair_of(layer).name == f"{traced.name}, not compiled", "so it has a plan of its own"


@pytest.mark.parametrize(("plain", "op"), [(True, "start"), (False, "start_layer")])
def test_a_side_in_a_child_may_also_be_traced(monkeypatch: pytest.MonkeyPatch, plain: bool, op: str) -> None:
    """The same declaration for a model that is compiled: the ops, in one graph."""
    side_work_ops.define()
    layer = Layer()
    layer.prefix, layer.selves = "a", namespace(append=lambda _: None)  # type: ignore[assignment]
    setattr(layer, PAIR, Pair("a", layer.main, layer.child.side, MAIN, SIDE, "FP8", "bf16", "weight", plain))  # type: ignore[union-attr]
    monkeypatch.setattr(ops, "get_forward_context", lambda: namespace(no_compile_layers={"a": layer}))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(DECLARED.intercept(Layer.forward), backend=keep, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(layer, X), Layer.forward(layer, X))
    called = [str(node.target) for node in graphs[0].graph.nodes if "vllm_overlay" in str(node.target)]
    assert called == [f"vllm_overlay.{op}", "vllm_overlay.join"]


# ---------------------------------------------------------------- the installation


VERDICT = Verdict(APPLY, "as known", "vllm.dsa", "Layer", ("forward",), shapes_graph=False)


class Installed:
    """The declaration on a class of its own, on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal = OwnJournal()
        self.record = self.journal.patch("dsa")
        self.waiting: list[Any] = []
        self.context: dict[str, Any] = {}
        for module in (declaration, waiting, adoption):
            monkeypatch.setattr(module, "journal", self.journal)
        monkeypatch.setattr(loaded, "_waiting", self.waiting)
        monkeypatch.setattr(ops, "planned", {})
        monkeypatch.setattr(declaration, "envs", namespace(VLLM_BATCH_INVARIANT=False))
        self.config = namespace(
            compilation_config=namespace(
                static_forward_context=self.context,
                cudagraph_capture_sizes=[1, 8],
                cudagraph_mode=namespace(name="FULL_AND_PIECEWISE"),
            ),
            parallel_config=namespace(use_ubatching=False, world_size_across_dp=1),
        )
        monkeypatch.setattr(declaration, "get_current_vllm_config", lambda: self.config)
        context = self.context

        class Target(Layer):
            def __init__(self, layer_name: str, child: bool = True) -> None:
                super().__init__(layer_name, child)
                context[layer_name] = self
                if self.child is not None:
                    self.child.side = side_of_vllm()

            forward = Layer.forward

        self.target = Target
        self.module = types.ModuleType("vllm.dsa")
        self.module.Layer = Target  # type: ignore[attr-defined]
        DECLARED.install(self.module, VERDICT, Settings(serial_pass_through=True))

    def load(self) -> None:
        for decide in self.waiting:
            decide(namespace(vllm_config=self.config, rank=0))


def side_of_vllm() -> Any:
    made = object.__new__(MergedColumnParallelLinear)
    torch.nn.Module.__init__(made)
    made.weight = torch.nn.Parameter(torch.randn(SIDE, HIDDEN), requires_grad=False)
    made.quant_method, made.bias, made.gather_output, made.return_bias = unquantized(), None, False, True
    made.input_size, made.params_dtype, made.output_size_per_partition = HIDDEN, torch.float32, SIDE
    return made


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    monkeypatch.setattr(adoption, "other_device", lambda: "made up")
    return Installed(monkeypatch)


def test_a_layer_is_known_by_its_own_name(installed: Installed) -> None:
    layer = installed.target("model.layers.0.self_attn.attn")
    installed.load()
    assert installed.record.patched == {"model.layers.0.self_attn.attn": {"main": MAIN, "side": SIDE}}
    pair = getattr(layer, PAIR)
    assert pair.layer == "model.layers.0.self_attn.attn" and not pair.traced and not pair.on_gpu


def test_a_layer_without_the_child_is_neither_patched_nor_refused(installed: Installed) -> None:
    layer = installed.target("a", child=False)
    installed.load()
    assert getattr(layer, PAIR) is None
    assert installed.record.patched == installed.record.refused == {}


@pytest.mark.parametrize(("field", "named"), [("name", "renamed"), ("side", "renamed.side")])
def test_a_layer_without_an_attribute_that_is_read_stays_stock(installed: Installed, field: str, named: str) -> None:
    """The verdict reads the methods that run, and not the one that makes the layer."""

    class Renamed(Layer):
        def __init__(self) -> None:
            super().__init__("a", True)
            installed.context["a"] = self

        forward = Layer.forward

    module = types.ModuleType("vllm.dsa")
    module.Layer = Renamed  # type: ignore[attr-defined]
    declared = dataclasses.replace(DECLARED, **{field: named})  # type: ignore[arg-type]
    declared.install(module, VERDICT, Settings(serial_pass_through=True))
    layer = Renamed()
    assert getattr(layer, PAIR) is None
    ((name, reason),) = installed.record.refused.items()
    assert name == ("Renamed" if field == "name" else "a") and "'renamed'" in reason
    assert any("'renamed'" in problem for problem in installed.journal.problems)


def test_a_class_with_a_method_of_its_own_stays_stock(installed: Installed) -> None:
    """As ROCm's: its layers would never run what was intercepted."""

    class Derived(installed.target):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Same(installed.target):  # type: ignore[misc, name-defined]
        pass

    Derived("a")
    same = Same("b")
    installed.load()
    assert set(installed.record.patched) == {"b"} and getattr(same, PAIR) is not None
    (reason,) = installed.record.refused.values()
    assert "Derived" in reason and "forward of its own" in reason
    assert installed.journal.problems == [], "known, and no problem"


def test_a_side_without_a_tuple_is_refused(installed: Installed) -> None:
    layer = installed.target("a")
    layer.child.side.return_bias = False
    installed.load()
    assert installed.record.refused == {"a": "the side gives its result alone, without a bias"}
