"""What follows from a declaration, without an engine: refusals, the stand-in, and what happens when the weights are there."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear  # noqa: E402

from overlay.engine import compile_cache, loaded  # noqa: E402
from overlay.report.journal import OwnJournal, PatchRecord  # noqa: E402
from overlay.settings import Settings  # noqa: E402
from overlay.side_work import adoption, declaration, lowering, ops, pairs, waiting  # noqa: E402
from overlay.side_work.adoption import StaysStock  # noqa: E402
from overlay.side_work.declaration import TwoLinears  # noqa: E402
from overlay.side_work.lowering import NO_CAPTURE  # noqa: E402
from overlay.side_work.pairs import Pair  # noqa: E402
from overlay.side_work.plan import Plan  # noqa: E402
from overlay.side_work.rules import ADAPTERS  # noqa: E402
from overlay.side_work.waiting import PAIR, Waiting  # noqa: E402
from overlay.verdict import Verdict  # noqa: E402
from overlay.vocabulary import APPLY, INERT  # noqa: E402
from tests.unit import side_work_ops  # noqa: E402
from tests.unit.linears import OwnWorkspace, linear, marlin, method_named, unquantized  # noqa: E402

namespace = types.SimpleNamespace
NAME, THRESHOLD, SIDE = "gdn", 256, "in_proj_ba"


def sizes_by_heads(layer: Any) -> dict[str, int]:
    return {"qkvz": layer.heads * 256, "ba": layer.heads * 4}


DECLARED = TwoLinears(NAME, "in_proj_qkvz", SIDE, sizes_by_heads, THRESHOLD)


def configuration(layer: Any, micro_batching: bool = False, captures: bool = True) -> Any:
    return namespace(
        compilation_config=namespace(
            static_forward_context={layer.prefix: layer},
            cudagraph_capture_sizes=[1, 8],
            cudagraph_mode=namespace(name="FULL_AND_PIECEWISE" if captures else "NONE"),
        ),
        parallel_config=namespace(use_ubatching=micro_batching),
    )


def complete_layer(main_method: Any = None) -> Any:
    return namespace(
        prefix="model.layers.0.linear_attn",
        heads=4,
        in_proj_qkvz=linear(1024, main_method or unquantized()),
        in_proj_ba=linear(16, unquantized()),
    )


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what vLLM's current configuration and environment module say."""

    def set_current(config: Any, batch_invariant: bool = False) -> None:
        monkeypatch.setattr(declaration, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(declaration, "envs", namespace(VLLM_BATCH_INVARIANT=batch_invariant))

    return set_current


# ---------------------------------------------------------------- a freshly made layer


@pytest.mark.parametrize("main", [None, method_named("Fp8LinearMethod"), method_named("of tomorrow")])
def test_a_layer_that_fits_has_its_shard_sizes_whatever_main_is(current: Any, main: Any) -> None:
    layer = complete_layer(main)
    current(configuration(layer))
    assert DECLARED.check_new(layer) == {"qkvz": 1024, "ba": 16}


def test_the_modes_that_no_fork_is_safe_in_are_refused(current: Any) -> None:
    layer = complete_layer()
    current(configuration(layer, micro_batching=True))
    with pytest.raises(StaysStock, match="micro-batching"):
        DECLARED.check_new(layer)
    current(configuration(layer), batch_invariant=True)
    with pytest.raises(StaysStock, match="batch-invariant"):
        DECLARED.check_new(layer)


def test_a_layer_that_an_op_could_not_find_is_refused(current: Any) -> None:
    layer = complete_layer()
    config = configuration(layer)
    config.compilation_config.static_forward_context[layer.prefix] = object()
    current(config)
    with pytest.raises(StaysStock, match="not registered"):
        DECLARED.check_new(layer)


def test_a_quantized_side_is_refused(current: Any) -> None:
    layer = complete_layer()
    layer.in_proj_ba.quant_method = method_named("Fp8LinearMethod")
    current(configuration(layer))
    with pytest.raises(StaysStock, match="Fp8LinearMethod is not on the allowlist"):
        DECLARED.check_new(layer)


# ---------------------------------------------------------------- the stand-in


def projection(kind: type, rows: int, hidden: int = 16, method: Any = None) -> Any:
    """One of vLLM's linears, made without its `__init__`, which asks for a process group."""
    made = object.__new__(kind)
    torch.nn.Module.__init__(made)
    generator = torch.Generator().manual_seed(rows)
    made.weight = torch.nn.Parameter(torch.randn(rows, hidden, generator=generator), requires_grad=False)
    made.quant_method = method or unquantized()
    made.input_size, made.params_dtype, made.output_size_per_partition = hidden, torch.float32, rows
    made.bias, made.gather_output = None, False
    made.forward_calls = []
    return made


class Main(torch.nn.Module):
    """A linear in vLLM's manner; it notes its calls."""

    def __init__(self, rows: int, order: list[str], name: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rows)
        self.weight = torch.nn.Parameter(torch.randn(rows, 16, generator=generator), requires_grad=False)
        self.input_size, self.params_dtype, self.output_size_per_partition = 16, torch.float32, rows
        self.quant_method, self.order, self.name = method_named("Fp8LinearMethod"), order, name

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.order.append(self.name)
        return torch.nn.functional.linear(x, self.weight), None


class Layer(torch.nn.Module):
    """A layer with the two projections and a forward of the known shape."""

    def __init__(self, ba_first: bool = False, prefix: str = "model.layers.0.linear_attn") -> None:
        super().__init__()
        self.order: list[str] = []
        self.in_proj_qkvz = Main(48, self.order, "qkvz")
        self.in_proj_ba = Main(6, self.order, "ba")
        self.prefix = prefix
        self.ba_first = ba_first

    def scale(self) -> float:
        return 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ba_first:
            ba, _ = self.in_proj_ba(x)
            qkvz, _ = self.in_proj_qkvz(x)
        else:
            qkvz, _ = self.in_proj_qkvz(x)
            ba, _ = self.in_proj_ba(x)
        return torch.cat((qkvz * self.scale(), ba), dim=-1)


def pair_of(layer: Layer, plain: bool) -> Pair:
    return Pair(layer.prefix, layer.in_proj_qkvz, layer.in_proj_ba, 48, 6, "FP8", str(plain), "weight", plain)


@pytest.fixture(scope="module", autouse=True)
def defined() -> None:
    side_work_ops.define()


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    record = PatchRecord()
    planned = ops.PlannedPair(Plan("dual", 256), record)
    monkeypatch.setattr(ops, "planned", {pair_of(Layer(), plain).name: planned for plain in (True, False)})
    return record


@pytest.fixture(params=[False, True], ids=["qkvz first", "ba first"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layer:
    made = Layer(request.param)
    setattr(made, PAIR, pair_of(made, plain=True))
    monkeypatch.setattr(ops, "get_forward_context", lambda: namespace(no_compile_layers={made.prefix: made}))
    return made


either = pytest.mark.parametrize("plain", [True, False], ids=["a plain side", "a side that is called"])


@either
def test_the_stand_in_gives_upstreams_result_and_counts(layer: Layer, record: PatchRecord, plain: bool) -> None:
    setattr(layer, PAIR, pair_of(layer, plain))
    x = torch.randn(5, 16)
    expected = Layer.forward(layer, x)
    layer.order.clear()
    assert torch.equal(DECLARED.intercept(Layer.forward)(layer, x), expected)
    assert record.calls.serial == {ops.PASS_THROUGH: 1}
    assert layer.order == (["qkvz"] if plain else ["ba", "qkvz"]), "main is called as always"


@either
def test_start_is_gated_by_mains_weight_and_join_keeps_the_input(
    layer: Layer, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """A gate of another tensor gives start no place before main; the input's memory has to stay until the join."""
    setattr(layer, PAIR, pair_of(layer, plain))
    given: dict[str, tuple[Any, ...]] = {}
    for name in ("start", "start_layer", "join"):
        op = getattr(torch.ops.vllm_overlay, name)
        monkeypatch.setattr(
            torch.ops.vllm_overlay, name, lambda *args, op=op, name=name: (given.update({name: args}), op(*args))[1]
        )
    x = torch.randn(5, 16)
    DECLARED.intercept(Layer.forward)(layer, x)
    main, side, name = layer.in_proj_qkvz.weight, layer.in_proj_ba.weight, pair_of(layer, plain).name
    assert list(given) == ["start" if plain else "start_layer", "join"]
    if plain:
        of_x, weight, gate, *rest = given["start"]
        assert of_x is x and weight is side and gate is main and rest == [6, name]
    else:
        of_x, gate, *rest = given["start_layer"]
        assert of_x is x and gate is main and rest[:3] == [6, SIDE, name]
    assert given["join"][2] is x


def test_a_layer_without_a_pair_runs_stock(layer: Layer, record: PatchRecord) -> None:
    setattr(layer, PAIR, None)
    x = torch.randn(5, 16)
    assert torch.equal(DECLARED.intercept(Layer.forward)(layer, x), Layer.forward(layer, x))
    assert record.calls.total() == 0


@either
def test_an_op_without_a_plan_gives_the_right_result(layer: Layer, plain: bool) -> None:
    """A graph from yesterday's cache may name a pair that today's process does not know."""
    setattr(layer, PAIR, pair_of(layer, plain))
    x = torch.randn(5, 16)
    assert ops.planned == {} or pair_of(layer, plain).name not in ops.planned
    assert torch.equal(DECLARED.intercept(Layer.forward)(layer, x), Layer.forward(layer, x))


@either
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_into_one_graph(layer: Layer, record: PatchRecord, backend: str, plain: bool) -> None:
    setattr(layer, PAIR, pair_of(layer, plain))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(DECLARED.intercept(Layer.forward), backend=keep, fullgraph=True, dynamic=True)
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(compiled(layer, x), Layer.forward(layer, x))
        assert torch.equal(compiled(layer, x[:3]), Layer.forward(layer, x[:3]))
    graph = graphs[0]
    called = [str(node.target) for node in graph.graph.nodes if "vllm_overlay" in str(node.target)]
    assert called == ["vllm_overlay.start" if plain else "vllm_overlay.start_layer", "vllm_overlay.join"]
    assert record.calls.fake > 0


@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_the_fake_gives_the_shapes_of_the_real_op(layer: Layer, leading: tuple[int, ...]) -> None:
    x, weight, gate = torch.randn(*leading, 16), layer.in_proj_ba.weight, layer.in_proj_qkvz.weight
    name = ops.encode_layer_name(layer.prefix)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, weight, gate)]
        fake = [
            torch.ops.vllm_overlay.start(*fakes, 6, "a pair"),
            torch.ops.vllm_overlay.start_layer(fakes[0], fakes[2], 6, "in_proj_ba", "a pair", name),
        ]
    real = [
        torch.ops.vllm_overlay.start(x, weight, gate, 6, "a pair"),
        torch.ops.vllm_overlay.start_layer(x, gate, 6, "in_proj_ba", "a pair", name),
    ]
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_inductor_may_lay_out_the_ops_inputs() -> None:
    """With other tags Inductor makes inputs of eager's strides for it, by another kernel than stock's."""
    for op in ("start", "start_layer", "join"):
        tags = getattr(torch.ops.vllm_overlay, op).default.tags
        assert torch.Tag.flexible_layout in tags
        assert not {torch.Tag.needs_fixed_stride_order, torch.Tag.needs_exact_strides} & {*tags}
    # Other patches' ops may be there as well. A side that is called has no stock call in the graph to give back.
    lowered = {*lowering._above} & {f"vllm_overlay.{op}" for op in ("start", "start_layer", "join")}
    assert lowered == {"vllm_overlay.start", "vllm_overlay.join"}


def test_the_layer_name_is_vllms_opaque_type_where_there_is_one() -> None:
    from vllm.utils import torch_utils

    assert ops.LayerNameType is torch_utils.LayerNameType
    assert "str layer_name" not in str(torch.ops.vllm_overlay.start_layer.default._schema)


# ---------------------------------------------------------------- a layer that has its weights


def loaded_layer(prefix: str = "a") -> Any:
    made = Layer(prefix=prefix)
    made.in_proj_ba = projection(MergedColumnParallelLinear, 6)
    return made


def hook(side: Any) -> None:
    side.register_forward_hook(lambda *_: None)


def hook_before(side: Any) -> None:
    side.register_forward_pre_hook(lambda *_: None)


class Theirs(ColumnParallelLinear):
    """A plugin's linear."""


SPOILED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a bias": (lambda layer: setattr(layer.in_proj_ba, "bias", torch.nn.Parameter(torch.zeros(6))), "bias"),
    "a hook": (lambda layer: hook(layer.in_proj_ba), "hook"),
    "a hook before": (lambda layer: hook_before(layer.in_proj_ba), "hook"),
    "a forward of its own": (lambda layer: setattr(layer.in_proj_ba, "forward", lambda x: (x, None)), "hook"),
    "gathered": (lambda layer: setattr(layer.in_proj_ba, "gather_output", True), "gathers"),
    "another class": (lambda layer: setattr(layer, "in_proj_ba", projection(Theirs, 6)), "Theirs"),
    "something else": (lambda layer: setattr(layer, "in_proj_ba", torch.nn.Linear(16, 6)), "Linear of torch"),
    "another kernel": (
        lambda layer: setattr(layer.in_proj_ba, "quant_method", method_named("Fp8LinearMethod")),
        "allowlist",
    ),
    "another shape": (lambda layer: setattr(layer, "in_proj_ba", projection(ColumnParallelLinear, 7)), "the shape"),
    "adapters on the side": (lambda layer: setattr(layer.in_proj_ba, "base_layer", torch.nn.Identity()), ADAPTERS),
    "adapters on main": (lambda layer: setattr(layer.in_proj_qkvz, "base_layer", torch.nn.Identity()), ADAPTERS),
    "no weight": (lambda layer: delattr(layer.in_proj_qkvz, "weight"), "without a parameter"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_layer_whose_side_is_more_than_its_gemm_is_refused(name: str) -> None:
    layer = loaded_layer()
    spoil, reason = SPOILED[name]
    spoil(layer)
    with pytest.raises(StaysStock, match=reason):
        DECLARED.pair_of(layer, configuration(layer), {"qkvz": 48, "ba": 6})


def test_the_pair_of_a_layer_names_its_kernels_and_its_gate() -> None:
    layer = loaded_layer()
    layer.in_proj_qkvz.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    pair = DECLARED.pair_of(layer, configuration(layer), {"qkvz": 48, "ba": 6})
    assert pair.plain and pair.gate == "weight"
    assert pair.name == "16 to 48 (Fp8LinearMethod) + 6 (default_unquantized_gemm), torch.float32"


@pytest.mark.parametrize("activations", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_side_that_is_called_needs_a_main_that_reads_its_input_as_it_is(activations: torch.dtype) -> None:
    """Beside any other main the side has to be torch's GEMM: Inductor would round main's input otherwise than in stock."""
    layer, sizes = loaded_layer(), {"qkvz": 48, "ba": 6}
    layer.in_proj_ba.quant_method = method_named("GPTQMarlinLinearMethod", kernel=marlin(OwnWorkspace))
    with pytest.raises(StaysStock, match="Fp8LinearMethod may quantize its input"):
        DECLARED.pair_of(layer, configuration(layer), sizes)
    kernel = type("MacheteLinearKernel", (type("MPLinearKernel", (), {}),), {"config": namespace(act_type=activations)})
    layer.in_proj_qkvz.quant_method = method_named("GPTQMarlinLinearMethod", kernel=kernel())
    if activations.itemsize == 2:
        assert not DECLARED.pair_of(layer, configuration(layer), sizes).plain
    else:
        with pytest.raises(StaysStock, match="MacheteLinearKernel may quantize its input"):
            DECLARED.pair_of(layer, configuration(layer), sizes)


def test_on_a_gpu_without_graphs_there_is_nothing_to_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = loaded_layer()
    without = configuration(layer, captures=False)
    assert DECLARED.pair_of(layer, without, {"qkvz": 48, "ba": 6}) is not None, (
        "a CPU runs serially, to show the whole path"
    )
    cuda = namespace(device=namespace(type="cuda"))
    monkeypatch.setattr(layer.in_proj_ba, "parameters", lambda: iter([cuda]))
    with pytest.raises(StaysStock, match=NO_CAPTURE):
        DECLARED.pair_of(layer, without, {"qkvz": 48, "ba": 6})


VERDICT = Verdict(APPLY, "as known", "vllm.gdn", "Layer", ("forward",))
SIZES = {"qkvz": 48, "ba": 6}


def worker(layer: Any, ranks: int = 1) -> Any:
    config = configuration(layer)
    config.parallel_config.world_size_across_dp = ranks
    config.compilation_config.compile_ranges_endpoints = [8192]
    return namespace(vllm_config=config)


class Deciding:
    """Layers that wait for their weights, with stand-ins for what measures and splits ranges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal = OwnJournal()
        self.record = self.journal.patch(NAME)
        self.identities: list[tuple[str, ...]] = []
        self.settled: list[list[str]] = []
        self.split: list[int] = []  #: ranges of how many layers' models
        self.fails: Exception | None = None
        for module in (declaration, waiting, adoption):
            monkeypatch.setattr(module, "journal", self.journal)
        monkeypatch.setattr(pairs, "settle", self._settle)
        monkeypatch.setattr(lowering, "split_ranges", self._split)
        monkeypatch.setattr(compile_cache, "_shapes", {})
        monkeypatch.setattr(compile_cache, "_enter", self._enter)

    def _settle(self, found: Any, of_vllm: Any, settings: Settings, record: PatchRecord, default: Plan) -> None:
        assert record is self.record and default == Plan("dual", THRESHOLD)
        self.settled.append([pair.layer for pair in found])
        if self.fails:
            record.plans.append({"shape": "of layers that run stock"})
            raise self.fails

    def _enter(self) -> None:
        self.identities.append(tuple(f"{name}={shape}" for name, shape in sorted(compile_cache._shapes[NAME].items())))

    def _split(self, config: Any, strict: bool) -> bool:
        self.split.append(1)
        config.compilation_config.compile_ranges_endpoints = [8, 8192]
        return True

    def waiting(self, strict: bool = False, verdict: Verdict = VERDICT) -> Waiting[Any, Pair]:
        return DECLARED.waiting(verdict, Settings(strict=strict))

    def add(self, undecided: Waiting[Any, Pair], prefix: str) -> Any:
        layer = loaded_layer(prefix)
        undecided.adopt(layer, prefix, lambda: (SIZES, SIZES))
        assert getattr(layer, PAIR) is None and self.record.patched[prefix] == SIZES
        return layer


@pytest.fixture
def deciding(monkeypatch: pytest.MonkeyPatch) -> Deciding:
    return Deciding(monkeypatch)


def test_ops_that_could_not_be_defined_are_missing_for_the_next_patch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def register(name: str, *_: Any) -> object:
        asked.append(name)
        if name == "join":
            raise ValueError("not on this vLLM")
        return object()

    monkeypatch.setattr(ops, "_defined", False)
    monkeypatch.setattr(ops, "register", register)
    monkeypatch.setattr(lowering, "register", lambda *_, **__: None)
    for _ in range(2):
        with pytest.raises(ValueError, match="not on this vLLM"):
            ops.define(declares_writes=False)
    assert asked.count("join") == 2 and not ops._defined


def test_every_waiting_layer_gets_its_pair_once(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    first, second = deciding.add(undecided, "a"), deciding.add(undecided, "b")
    undecided.decide(worker(first))
    undecided.decide(worker(first))
    assert deciding.settled == [["a", "b"]] and deciding.split == [1]
    assert getattr(first, PAIR).layer == "a" and getattr(second, PAIR).layer == "b"
    assert set(deciding.record.patched) == {"a", "b"} and deciding.record.refused == {}


def test_a_refused_layer_stays_stock_with_its_reason(deciding: Deciding) -> None:
    undecided = deciding.waiting()
    first, second = deciding.add(undecided, "a"), deciding.add(undecided, "b")
    hook(second.in_proj_ba)
    undecided.decide(worker(first))
    assert deciding.settled == [["a"]] and getattr(second, PAIR) is None
    assert deciding.record.refused == {"b": "the side has a hook"} and set(deciding.record.patched) == {"a"}
    assert deciding.journal.problems == [], "known, and no problem"


def test_what_shapes_the_graph_is_in_the_compile_caches_key(deciding: Deciding) -> None:
    """Which layers have a pair, of which name, by which gate; the ranges. What was measured is not."""
    undecided = deciding.waiting()
    first, second = deciding.add(undecided, "a"), deciding.add(undecided, "b")
    hook(second.in_proj_ba)
    undecided.decide(worker(first))
    (detail,) = deciding.identities
    assert detail == (f"a={getattr(first, PAIR).name} by weight", "b=stock", "ranges=[8, 8192]")
    third = deciding.add(undecided, "c")
    undecided.decide(worker(third))
    assert [part for part in deciding.identities[-1] if part[:2] in ("a=", "b=", "c=")][:2] == [*detail[:2]]


def test_without_a_layer_nothing_is_done(deciding: Deciding) -> None:
    deciding.waiting().decide(namespace())
    assert deciding.identities == deciding.settled == deciding.split == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranges_are_split_for_all_ranks_alike(deciding: Deciding, ranks: int) -> None:
    """A rank whose layers are all stock splits them too: other ranges are other warm-up steps, and the others would wait."""
    undecided = deciding.waiting()
    layer = deciding.add(undecided, "a")
    hook(layer.in_proj_ba)
    undecided.decide(worker(layer, ranks))
    assert len(deciding.split) == (0 if ranks == 1 else 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_patch_that_no_compiled_graph_shows_splits_no_range_and_enters_no_key(deciding: Deciding, ranks: int) -> None:
    """Its method runs inside an op of vLLM's. Another range would be another warm-up step and another compilation for nothing."""
    undecided = deciding.waiting(verdict=dataclasses.replace(VERDICT, shapes_graph=False))
    layer = deciding.add(undecided, "a")
    undecided.decide(worker(layer, ranks))
    assert getattr(layer, PAIR).layer == "a" and deciding.settled == [["a"]]
    assert deciding.split == deciding.identities == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_that_fails_on_one_rank_alone_does_not_change_its_ranges(deciding: Deciding, ranks: int) -> None:
    """An error may be this rank's own, and the others split their ranges."""
    undecided, layer = deciding.waiting(), loaded_layer("a")

    def broken() -> Any:
        raise KeyError("heads")

    undecided.adopt(layer, "a", broken)
    undecided.decide(worker(layer, ranks))
    assert len(deciding.split) == (0 if ranks == 1 else 1)
    undecided.decide(namespace())  # nothing is left over for a second engine


def test_a_failure_leaves_all_stock_with_a_warning(deciding: Deciding, caplog: pytest.LogCaptureFixture) -> None:
    undecided = deciding.waiting()
    layers = [deciding.add(undecided, name) for name in ("a", "b")]
    deciding.fails = torch.cuda.OutOfMemoryError("no memory for a plan")
    deciding.record.plans.append({"shape": "of another engine"})
    undecided.decide(worker(layers[0]))
    assert [getattr(layer, PAIR) for layer in layers] == [None, None] and deciding.record.patched == {}
    assert deciding.record.refused == dict.fromkeys(("a", "b"), waiting.FAILED)
    assert deciding.record.plans == [{"shape": "of another engine"}]
    assert deciding.identities[-1][:2] == ("a=stock", "b=stock")
    (problem,) = deciding.journal.problems
    assert "OutOfMemoryError: no memory for a plan" in problem and "runs stock" in problem
    assert [one.levelname for one in caplog.records if "no memory" in one.getMessage()] == ["WARNING"]


def test_strict_stops_where_no_plan_can_be_made(deciding: Deciding) -> None:
    undecided = deciding.waiting(strict=True)
    layer = deciding.add(undecided, "a")
    deciding.fails = torch.cuda.OutOfMemoryError("no memory for a plan")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        undecided.decide(worker(layer))
    assert len(deciding.journal.problems) == 1


def test_two_layers_of_one_name_are_both_decided(deciding: Deciding) -> None:
    """A first engine whose loading failed, and whose layers are not gone yet."""
    undecided = deciding.waiting()
    first, second = deciding.add(undecided, "a"), deciding.add(undecided, "a")
    undecided.decide(worker(first))
    assert getattr(first, PAIR) is not getattr(second, PAIR) is not None


# ---------------------------------------------------------------- the installation


def platform(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    monkeypatch.setattr(adoption, "other_device", lambda: None if cuda else "made up")


def module_with_a_class() -> types.ModuleType:
    """A module with a class of vLLM's kind."""

    class Fitting(torch.nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.prefix = prefix

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    module = types.ModuleType("vllm.gdn")
    module.Layer = Fitting  # type: ignore[attr-defined]
    return module


def test_a_layer_waits_from_its_making_to_the_end_of_loading(
    deciding: Deciding, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[Any] = []
    monkeypatch.setattr(loaded, "_waiting", waiting)
    platform(monkeypatch, cuda=True)
    module = module_with_a_class()

    def check(_: TwoLinears, layer: Any) -> dict[str, int]:
        if layer.prefix == "b":
            raise StaysStock("not this one")
        return SIZES

    monkeypatch.setattr(TwoLinears, "check_new", check)
    assert DECLARED.install(module, VERDICT, Settings()) == VERDICT
    (decide,) = waiting
    layer, other = module.Layer("a"), module.Layer("b")
    layer.in_proj_qkvz, layer.in_proj_ba = Main(48, [], "qkvz"), projection(MergedColumnParallelLinear, 6)
    assert getattr(layer, PAIR) is None and getattr(other, PAIR) is None
    decide(worker(layer))
    assert deciding.settled == [["a"]], "a layer that was refused waits for nothing"
    assert getattr(layer, PAIR).layer == "a" and deciding.record.refused == {"b": "not this one"}


def test_on_another_device_nothing_waits(deciding: Deciding, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Any] = []
    monkeypatch.setattr(loaded, "_waiting", waiting)
    platform(monkeypatch, cuda=False)
    module = module_with_a_class()
    before = dict(vars(module.Layer))
    found = DECLARED.install(module, VERDICT, Settings())
    assert (found.state, waiting, dict(vars(module.Layer))) == (INERT, [], before)
    assert "made up" in found.reason
