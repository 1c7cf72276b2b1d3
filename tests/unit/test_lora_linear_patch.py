"""The LoRA patch without an engine: which layers it takes, when it forks, the op, and what `install` does with a package."""

from __future__ import annotations

import dataclasses
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

vllm = pytest.importorskip("vllm")

from overlay import ops  # noqa: E402
from overlay.journal import Journal, PatchRecord  # noqa: E402
from overlay.layers import Refused  # noqa: E402
from overlay.patches import lora_linear  # noqa: E402
from overlay.plan import NOT_CAPTURING, Plan  # noqa: E402
from overlay.settings import Settings  # noqa: E402
from overlay.streams import ParallelRegion  # noqa: E402
from overlay.verdict import Upstream, Verdict  # noqa: E402

namespace = types.SimpleNamespace
PLAN = Plan("dual", 256)
SHARDED_WORDS = "fully_sharded_loras isn't compatible with dual-stream LoRA"


class BaseLayerWithLoRA(torch.nn.Module):
    def set_mapping(self, punica_wrapper: Any) -> None:
        self.punica_wrapper = punica_wrapper


class BaseLinearLayerWithLoRA(BaseLayerWithLoRA):
    """A LoRA linear of a few lines: `apply` and one helper, in the shape of upstream's."""

    def __init__(self, columns: int = 8, prefix: str = "model.layers.0.o_proj", base: type | None = None) -> None:
        super().__init__()
        self.base_layer = (base or ColumnParallelLinear)(columns, prefix)
        self.output_slices = (columns,)
        self.lora_config = namespace(fully_sharded_loras=False)
        self.lora_a_stacked = (torch.randn(1, 1, 2, 4),)
        self.lora_b_stacked = (torch.randn(1, 1, columns, 2),)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._apply_sync(x, bias)

    def _apply_sync(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        output = self.base_layer(x) if bias is None else self.base_layer(x) + bias
        rows = output.flatten(0, -2)
        self.punica_wrapper.add_lora_linear(
            rows, x.flatten(0, -2), self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return output


class MergedLayer(BaseLinearLayerWithLoRA):
    """Goes to the class above it, as upstream's merged layers do from 0.25.1 on."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(x, bias)


class OtherApply(BaseLinearLayerWithLoRA):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x


class OtherHelper(BaseLinearLayerWithLoRA):
    def _apply_sync(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x


class CopyingLayer(BaseLinearLayerWithLoRA):
    """Returns another tensor than the one that was to be added to; the verdict would not let it through."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(x, bias).clone()


class ColumnParallelLinear(torch.nn.Module):
    def __init__(self, columns: int, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.weight = torch.nn.Parameter(torch.randn(columns, 4), requires_grad=False)
        self.output_size = self.output_size_per_partition = columns
        self.quant_method = type("UnquantizedLinearMethod", (), {})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class GateLinear(ColumnParallelLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).double()


class Punica:
    def __init__(self, no_adapter: bool = False) -> None:
        self.token_mapping_meta = namespace(no_lora_flag_cpu=torch.tensor([no_adapter]))
        self.calls: list[str] = []

    def add_lora_linear(
        self, y: Any, x: torch.Tensor, a: Any, b: Any, scale: float, slices: Any, **kwargs: Any
    ) -> None:
        buffer = x.new_empty((len(slices), x.shape[0], b[0].shape[-1]))
        self.add_shrink(buffer, x, a, scale, **kwargs)
        self.add_expand(y, buffer, b, slices, add_inputs=True, **kwargs)

    def add_shrink(self, buffer: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        self.calls.append("shrink")
        buffer[0] = scale * x @ a[0][0, 0].t()

    def add_expand(self, y: torch.Tensor, buffer: torch.Tensor, b: Any, slices: Any, add_inputs: bool) -> None:
        self.calls.append("expand")
        assert add_inputs
        y += buffer[0] @ b[0][0, 0].t()


ORIGINALS = {BaseLinearLayerWithLoRA: BaseLinearLayerWithLoRA.__dict__["apply"]}


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
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`engine()` makes an engine the current one: the dict of its static forward context."""

    def start(micro_batching: bool = False, batch_invariant: bool = False) -> dict[str, Any]:
        context: dict[str, Any] = {}
        config = namespace(
            compilation_config=namespace(static_forward_context=context),
            parallel_config=namespace(use_ubatching=micro_batching),
        )
        monkeypatch.setattr(lora_linear, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(lora_linear, "get_forward_context", lambda: namespace(no_compile_layers=context))
        monkeypatch.setattr(lora_linear, "is_forward_context_available", lambda: True)
        monkeypatch.setattr(lora_linear, "envs", namespace(VLLM_BATCH_INVARIANT=batch_invariant))
        monkeypatch.setattr(lora_linear, "LINEARS", (ColumnParallelLinear,))
        return context

    return start


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, original in ORIGINALS.items():
        monkeypatch.setattr(owner, "apply", lora_linear.overlap_adapters(original))


def adopted(layer: Any, record: PatchRecord, no_adapter: bool = False) -> lora_linear.LinearOverlap:
    layer.set_mapping(Punica(no_adapter))
    overlap, _ = lora_linear.make_overlap(layer, ORIGINALS, PLAN, record)
    setattr(layer, lora_linear.OVERLAP, overlap)
    return overlap


# ------------------------------------------------------------------------------------------------ which layers


def test_a_layer_that_fits(engine: Any) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA(8)
    overlap, shown = lora_linear.make_overlap(layer, ORIGINALS, PLAN, PatchRecord())
    assert (overlap.layer_name, overlap.output_size) == ("model.layers.0.o_proj", 8)
    assert shown == {"output": 8, "slices": 1, "class": "BaseLinearLayerWithLoRA"}


def test_slices_that_disagree_with_the_base_layer_name_both(engine: Any) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA(8)
    layer.output_slices = (8, 4)
    with pytest.raises(Refused, match="12 columns, but the base layer has 8"):
        lora_linear.make_overlap(layer, ORIGINALS, PLAN, PatchRecord())


def test_without_a_size_per_shard_the_whole_size_counts() -> None:
    layer: Any = BaseLinearLayerWithLoRA(8)
    del layer.base_layer.output_size_per_partition
    layer.base_layer.output_size = 8
    assert lora_linear.shard_size(layer) == 8


@pytest.mark.parametrize(
    ("options", "reason"), [({"micro_batching": True}, "DBO"), ({"batch_invariant": True}, "batch-invariant")]
)
def test_modes_that_are_refused(engine: Any, options: dict[str, bool], reason: str) -> None:
    engine(**options)
    with pytest.raises(Refused, match=reason):
        lora_linear.make_overlap(BaseLinearLayerWithLoRA(), ORIGINALS, PLAN, PatchRecord())


def test_fully_sharded_adapters_are_refused_in_upstreams_words(engine: Any) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA()
    layer.lora_config.fully_sharded_loras = True
    with pytest.raises(Refused, match=SHARDED_WORDS):
        lora_linear.make_overlap(layer, ORIGINALS, PLAN, PatchRecord())


@pytest.mark.parametrize(
    ("layer_class", "reason"),
    [(OtherApply, "OtherApply has an apply of its own"), (OtherHelper, "OtherHelper has _apply_sync of its own")],
)
def test_classes_that_go_another_way_are_refused(layer_class: type, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        lora_linear.apply_of(layer_class, ORIGINALS)


def test_a_class_that_goes_to_the_one_above_it_is_taken() -> None:
    assert lora_linear.apply_of(MergedLayer, ORIGINALS) is ORIGINALS[BaseLinearLayerWithLoRA]


def test_a_base_layer_with_its_own_forward_is_refused(engine: Any) -> None:
    engine()
    with pytest.raises(Refused, match="GateLinear has a forward of its own"):
        lora_linear.make_overlap(BaseLinearLayerWithLoRA(base=GateLinear), ORIGINALS, PLAN, PatchRecord())


@pytest.mark.parametrize(
    ("method", "scheme", "taken"),
    [
        ("GPTQMarlinLinearMethod", None, True),
        ("CompressedTensorsLinearMethod", "CompressedTensorsWNA16", True),
        ("CompressedTensorsLinearMethod", "CompressedTensorsW8A8Fp8", False),
        ("Fp8LinearMethod", None, False),
        ("SomethingNewLinearMethod", None, False),
    ],
)
def test_linears_that_quantize_the_activation_are_refused(
    engine: Any, method: str, scheme: str | None, taken: bool
) -> None:
    engine()
    layer: Any = BaseLinearLayerWithLoRA()
    layer.base_layer.quant_method = type(method, (), {})()
    layer.base_layer.scheme = type(scheme, (), {})() if scheme else None
    if taken:
        lora_linear.make_overlap(layer, ORIGINALS, PLAN, PatchRecord())
        return
    with pytest.raises(Refused, match=f"{scheme or method} may quantize"):
        lora_linear.make_overlap(layer, ORIGINALS, PLAN, PatchRecord())


# ------------------------------------------------------------------------------------------------ names


def test_layers_of_one_prefix_in_one_engine_get_numbers(engine: Any, record: PatchRecord) -> None:
    engine()
    layers = [BaseLinearLayerWithLoRA(prefix="draft") for _ in range(3)]
    overlaps = [adopted(layer, record) for layer in layers]
    assert [overlap.layer_name for overlap in overlaps] == ["draft", "draft#2", "draft#3"]
    assert [lora_linear.find(overlap.layer_name) for overlap in overlaps] == overlaps


def test_two_engines_have_the_same_names_and_find_their_own(engine: Any, record: PatchRecord) -> None:
    first_context = engine()
    first = BaseLinearLayerWithLoRA(prefix="shared")
    of_first = adopted(first, record)
    engine()
    second = BaseLinearLayerWithLoRA(prefix="shared")
    of_second = adopted(second, record)
    assert of_first.layer_name == of_second.layer_name
    assert lora_linear.find("shared") is of_second
    of_first_engine = namespace(no_compile_layers=first_context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_linear, "get_forward_context", lambda: of_first_engine)
        assert lora_linear.find("shared") is of_first
        patch.setattr(lora_linear, "get_forward_context", lambda: namespace(no_compile_layers={}))
        with pytest.raises(KeyError, match="0 LoRA layers have the name shared"):
            lora_linear.find("shared")


def test_a_layer_that_is_gone_leaves_nothing_behind(engine: Any, record: PatchRecord) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA(prefix="short-lived")
    adopted(layer, record)
    del layer
    gc.collect()
    with pytest.raises(KeyError, match="short-lived"):
        lora_linear.find("short-lived")
    assert adopted(BaseLinearLayerWithLoRA(prefix="short-lived"), record).layer_name == "short-lived"


# ------------------------------------------------------------------------------------------------ when it forks


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Streams that only look like CUDA's: `cuda.capturing` says whether a graph is being captured."""
    state = namespace(capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(ParallelRegion, "prepare", lambda self, device: setattr(self, "_start", object()))
    return state


def on_the_gpu(tokens: int) -> Any:
    return namespace(is_cuda=True, device="cuda:0", shape=torch.Size((tokens, 4)))


def test_a_first_call_during_capture_is_serial(engine: Any, cuda: Any, record: PatchRecord) -> None:
    engine()
    layer = BaseLinearLayerWithLoRA()
    overlap = adopted(layer, record)
    cuda.capturing = True
    assert overlap._reason_for_serial(layer, on_the_gpu(4)) == "no call before the capture"
    assert not overlap.region.prepared


def test_it_forks_while_capturing_with_an_adapter_and_few_tokens(engine: Any, cuda: Any, record: PatchRecord) -> None:
    engine()
    layer: Any = BaseLinearLayerWithLoRA()
    overlap = adopted(layer, record)
    assert overlap._reason_for_serial(layer, on_the_gpu(4)) == NOT_CAPTURING
    cuda.capturing = True
    assert overlap._reason_for_serial(layer, on_the_gpu(256)) is None
    assert overlap._reason_for_serial(layer, on_the_gpu(257)) == "above the token threshold"
    layer.punica_wrapper.token_mapping_meta.no_lora_flag_cpu.fill_(True)
    assert overlap._reason_for_serial(layer, on_the_gpu(4)) == "no adapter active in the batch"
    layer.punica_wrapper.token_mapping_meta.no_lora_flag_cpu.fill_(False)
    assert overlap._reason_for_serial(layer, on_the_gpu(4)) is None


def forked(overlap: lora_linear.LinearOverlap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_reason_for_serial", lambda layer, x: None)
    monkeypatch.setattr(overlap, "region", namespace(run=ParallelRegion(1).run_serially))


def test_forked_it_gives_upstreams_bits_and_leaves_the_layer_alone(
    engine: Any, patched: None, record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine()
    layer: Any = MergedLayer()
    overlap = adopted(layer, record)
    x, bias = torch.randn(5, 4), torch.randn(8)
    expected = ORIGINALS[BaseLinearLayerWithLoRA](layer, x, bias)
    forked(overlap, monkeypatch)
    wrapper, before = layer.punica_wrapper, record.calls.dual_stream
    wrapper.calls.clear()
    assert torch.equal(layer.apply(x, bias), expected)
    assert wrapper.calls == ["shrink", "expand"]
    assert record.calls.dual_stream == before + 1
    assert layer.punica_wrapper is wrapper


def test_an_output_that_was_copied_is_computed_again_serially(
    engine: Any, record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine()
    layer: Any = CopyingLayer()
    original = CopyingLayer.__dict__["apply"]
    layer.set_mapping(Punica())
    originals = {CopyingLayer: original, **ORIGINALS}
    overlap, _ = lora_linear.make_overlap(layer, originals, PLAN, record)
    forked(overlap, monkeypatch)
    x = torch.randn(5, 4)
    before = record.calls.serial.get(lora_linear.COPIED, 0)
    assert torch.equal(overlap.apply(x, None), original(layer, x, None))
    assert record.calls.serial[lora_linear.COPIED] == before + 1


# ------------------------------------------------------------------------------------------------ the op


@pytest.fixture
def layer(engine: Any, patched: None, record: PatchRecord) -> Any:
    engine()
    made = MergedLayer()
    adopted(made, record)
    return made


def test_through_the_op(layer: Any, record: PatchRecord) -> None:
    x = torch.randn(5, 4)
    before = record.calls.serial.get("serial pass-through", 0)
    assert torch.equal(layer.apply(x), ORIGINALS[BaseLinearLayerWithLoRA](layer, x))
    assert record.calls.serial["serial pass-through"] == before + 1


@pytest.mark.parametrize("why", ["no forward context", "not taken"])
def test_around_the_op(layer: Any, record: PatchRecord, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "not taken":
        setattr(layer, lora_linear.OVERLAP, None)
    else:
        monkeypatch.setattr(lora_linear, "is_forward_context_available", lambda: False)
    x, before = torch.randn(5, 4), record.calls.total()
    assert torch.equal(layer.apply(x), ORIGINALS[BaseLinearLayerWithLoRA](layer, x))
    assert record.calls.total() == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("leading", [(5,), (1, 5)], ids=["2-D", "3-D"])
def test_it_compiles_into_one_graph_with_one_op(
    layer: Any, record: PatchRecord, monkeypatch: pytest.MonkeyPatch, backend: str, leading: tuple[int, ...]
) -> None:
    from vllm.forward_context import is_forward_context_available, override_forward_context

    monkeypatch.setattr(lora_linear, "is_forward_context_available", is_forward_context_available)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def forward(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.relu(layer.apply(x * 2, bias))

    fakes = record.calls.fake
    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=keep, fullgraph=True, dynamic=True)
    bias = torch.randn(8)
    with override_forward_context(namespace(no_compile_layers={})):
        for tokens in (5, 3):
            x = torch.randn(*leading[:-1], tokens, 4)
            expected = torch.relu(ORIGINALS[BaseLinearLayerWithLoRA](layer, x * 2, bias))
            assert torch.equal(compiled(x, bias), expected)
    (graph,) = graphs
    assert len([node for node in graph.graph.nodes if "lora_linear" in str(node.target)]) == 1
    assert record.calls.fake > fakes


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4)])
def test_the_fake_gives_the_shape_of_the_real_op(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    name = ops.encode_layer_name(getattr(layer, lora_linear.OVERLAP).layer_name)
    real = torch.ops.vllm_overlay.lora_linear(x, None, 8, name)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ops.vllm_overlay.lora_linear(mode.from_tensor(x), None, 8, name)
    assert fake.shape == real.shape == (*shape[:-1], 8)
    assert fake.dtype == real.dtype


def test_the_layer_name_is_no_str_where_vllm_has_its_own_type(record: PatchRecord) -> None:
    assert "str layer_name" not in str(torch.ops.vllm_overlay.lora_linear.default._schema)


# ------------------------------------------------------------------------------------------------ install

FOUND = Verdict("apply", "…", "vllm.lora.layers", methods=("base_linear.BaseLinearLayerWithLoRA.apply",))
WITH_SWITCH = dataclasses.replace(FOUND, upstream=Upstream("#35721", False, "VLLM_LORA_ENABLE_DUAL_STREAM=1"))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, engine: Any, tmp_path: Any) -> Any:
    """A package of LoRA layers that has just been imported, and a journal of its own."""
    engine()
    journal = Journal()
    monkeypatch.setattr(lora_linear, "journal", journal)
    monkeypatch.setattr("overlay.layers.journal", journal)
    monkeypatch.setattr(lora_linear, "register_op", lambda record: None)
    ancestor = type("BaseLayerWithLoRA", (torch.nn.Module,), {"set_mapping": BaseLayerWithLoRA.set_mapping})
    body = {name: value for name, value in BaseLinearLayerWithLoRA.__dict__.items() if name in ("apply", "_apply_sync")}
    linear = type("BaseLinearLayerWithLoRA", (ancestor,), body)
    other = type("LogitsProcessorWithLoRA", (ancestor,), {})
    return namespace(
        base=namespace(BaseLayerWithLoRA=ancestor),
        base_linear=namespace(BaseLinearLayerWithLoRA=linear),
        other=other,
        journal=journal,
        stock=body["apply"],
    )


def a_layer_of(package: Any, fully_sharded: bool = False) -> Any:
    layer = object.__new__(package.base_linear.BaseLinearLayerWithLoRA)
    torch.nn.Module.__init__(layer)
    for name, value in vars(BaseLinearLayerWithLoRA()).items():
        layer.__dict__[name] = value
    layer.lora_config = namespace(fully_sharded_loras=fully_sharded)
    return layer


def test_install_takes_every_linear_when_it_gets_its_wrapper(package: Any) -> None:
    found = lora_linear.install(package, FOUND, Settings(serial_pass_through=True))
    assert found == FOUND
    layer = a_layer_of(package)
    assert getattr(layer, lora_linear.OVERLAP) is None
    layer.set_mapping(Punica())
    assert isinstance(getattr(layer, lora_linear.OVERLAP), lora_linear.LinearOverlap)
    assert package.journal.patch("lora_linear").patched == {
        "model.layers.0.o_proj": {"output": 8, "slices": 1, "class": "BaseLinearLayerWithLoRA"}
    }
    processor = package.other()
    processor.set_mapping(Punica())
    assert not hasattr(processor, lora_linear.OVERLAP)
    layer.set_mapping(Punica())  # a module that is shared by two names is met twice
    assert getattr(layer, lora_linear.OVERLAP).layer_name == "model.layers.0.o_proj"


def test_a_threshold_that_was_set_counts(package: Any) -> None:
    lora_linear.install(package, FOUND, Settings(serial_pass_through=True, token_threshold=7))
    layer = a_layer_of(package)
    layer.set_mapping(Punica())
    assert getattr(layer, lora_linear.OVERLAP)._plan == Plan("dual", 7)


def test_without_cuda_it_is_inert_and_changes_nothing(package: Any) -> None:
    found = lora_linear.install(package, FOUND, Settings())
    assert found.state == "inert" and "dual CUDA streams" in found.reason and "cpu" in found.reason
    assert package.base_linear.BaseLinearLayerWithLoRA.apply is package.stock
    assert not hasattr(package.base_linear.BaseLinearLayerWithLoRA, lora_linear.OVERLAP)


def test_where_upstreams_switch_is_set_it_steps_aside(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear, "envs", namespace(VLLM_LORA_ENABLE_DUAL_STREAM=True))
    found = lora_linear.install(package, WITH_SWITCH, Settings(serial_pass_through=True))
    assert found.state == "landed" and "VLLM_LORA_ENABLE_DUAL_STREAM is set" in found.reason
    assert package.base_linear.BaseLinearLayerWithLoRA.apply is package.stock


def test_a_switch_that_is_off_is_no_reason_to_step_aside(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear, "envs", namespace(VLLM_LORA_ENABLE_DUAL_STREAM=False))
    assert lora_linear.install(package, WITH_SWITCH, Settings(serial_pass_through=True)).state == "apply"


def test_fully_sharded_adapters_are_said_once(package: Any) -> None:
    lora_linear.install(package, FOUND, Settings(serial_pass_through=True))
    for _ in range(3):
        layer = a_layer_of(package, fully_sharded=True)
        layer.set_mapping(Punica())
        assert getattr(layer, lora_linear.OVERLAP) is None
        assert layer.punica_wrapper is not None
    (problem,) = package.journal.problems
    assert SHARDED_WORDS in problem
    assert package.journal.patch("lora_linear").patched == {}


def test_fully_sharded_adapters_under_strict_stop_the_start(package: Any) -> None:
    lora_linear.install(package, FOUND, Settings(serial_pass_through=True, strict=True))
    with pytest.raises(ValueError, match=SHARDED_WORDS):
        a_layer_of(package, fully_sharded=True).set_mapping(Punica())
