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
from overlay.settings import Settings  # noqa: E402
from overlay.side_work.plan import NOT_CAPTURING, Plan  # noqa: E402
from overlay.side_work.streams import ParallelRegion  # noqa: E402
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
        with pytest.raises(KeyError, match="2 LoRA layers have the name shared, and none is of this engine"):
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


# ------------------------------------------------------------------------------------------------ upstream's calls, replayed


class LoraKernelMeta:
    """What upstream's metadata gives its kernels: the adapter of each token, and some that are the same for all sizes."""

    def __init__(self, adapters: list[int]) -> None:
        self.token_lora_mapping = torch.tensor(adapters, dtype=torch.int32)
        self.same = [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
        self.no_lora_flag_cpu = torch.tensor([False])
        self.asked: list[int] = []

    def meta_args(self, tokens: int, specialize: bool) -> tuple[torch.Tensor, ...]:
        self.asked.append(tokens)
        views = (self.token_lora_mapping[:tokens], self.token_lora_mapping[:tokens])
        return (*views, *self.same[:3], self.no_lora_flag_cpu, self.same[3])


class PunicaOfOps:
    """A punica wrapper in the shape of upstream's for a GPU, which gives its work to vLLM's two ops."""

    def __init__(self, adapters: list[int]) -> None:
        self.token_mapping_meta = LoraKernelMeta(adapters)

    def add_lora_linear(
        self, y: Any, x: torch.Tensor, a: Any, b: Any, scale: float, slices: Any, **kwargs: Any
    ) -> None:
        buffer = torch.empty((len(slices), x.size(0), b[0].size(-1)), dtype=torch.float32, device=x.device)
        self.add_shrink(buffer, x, a, scale)
        self.add_expand(y, buffer, b, slices)

    def add_shrink(self, buffer: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        x = x.view(-1, x.shape[-1])
        torch.ops.vllm.lora_shrink(x, a, buffer, *self.token_mapping_meta.meta_args(x.size(0), False), scale)

    def add_expand(self, y: torch.Tensor, buffer: torch.Tensor, b: Any, slices: Any) -> None:
        given = self.token_mapping_meta.meta_args(buffer.size(1), False)
        torch.ops.vllm.lora_expand(buffer, b, y.view(-1, y.shape[-1]), *given, offset_start=0, add_inputs=True)


class ScalesTwice(PunicaOfOps):
    def add_shrink(self, buffer: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        super().add_shrink(buffer, x * 2, a, scale)


class ShrinksTwice(PunicaOfOps):
    def add_shrink(self, buffer: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        super().add_shrink(buffer, x, a, scale)
        super().add_shrink(buffer, x, a, scale)


class OtherBuffer(PunicaOfOps):
    def add_shrink(self, buffer: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        super().add_shrink(buffer.transpose(0, 1).contiguous(), x, a, scale)


class AsksForMore(PunicaOfOps):
    def add_expand(self, y: torch.Tensor, buffer: torch.Tensor, b: Any, slices: Any) -> None:
        self.token_mapping_meta.meta_args(buffer.size(1) + 1, False)
        super().add_expand(y, buffer, b, slices)


class CallsAnotherOp(PunicaOfOps):
    def add_shrink(self, buffer: torch.Tensor, x: torch.Tensor, a: Any, scale: float) -> None:
        super().add_shrink(buffer, torch.ops.overlay_test.gathered(x), a, scale)


class MethodLayer(BaseLinearLayerWithLoRA):
    """Goes to the base layer's method, as upstream's layers do."""

    def _apply_sync(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        output: torch.Tensor = self.base_layer.quant_method.apply(self.base_layer, x, bias)
        self.punica_wrapper.add_lora_linear(
            output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
        )
        return output


class TwoGemms(MethodLayer):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.base_layer.quant_method.apply(self.base_layer, x, bias)
        return super().apply(x, bias)


class OtherInput(MethodLayer):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(x + 1, bias)


class ForgetsBias(MethodLayer):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(x, None)


class CopiesItsOutput(MethodLayer):
    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().apply(x, bias).clone()


class Method:
    def apply(self, base: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, base.weight, bias)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Upstream's ops computing on a CPU, and how each call came: through the dispatcher ("op"), or not ("function")."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    found: list[str] = []

    def made(way: str) -> tuple[Any, Any]:
        def shrink(  # type: ignore[no-untyped-def]
            inputs,
            lora_a_weights,
            output_tensor,
            token_lora_mapping,
            token_indices_sorted_by_lora_ids,
            num_tokens_per_lora,
            lora_token_start_loc,
            lora_ids,
            no_lora_flag_cpu,
            num_active_loras,
            scaling,
        ):
            found.append(way)
            assert len(token_lora_mapping) == len(inputs)
            output_tensor[0] = scaling * inputs @ lora_a_weights[0][0, 0].t()

        def expand(  # type: ignore[no-untyped-def]
            inputs,
            lora_b_weights,
            output_tensor,
            token_lora_mapping,
            token_indices_sorted_by_lora_ids,
            num_tokens_per_lora,
            lora_token_start_loc,
            lora_ids,
            no_lora_flag_cpu,
            num_active_loras,
            offset_start=0,
            add_inputs=False,
        ):
            found.append(way)
            assert add_inputs and offset_start == 0 and len(token_lora_mapping) == len(output_tensor)
            output_tensor += inputs[0] @ lora_b_weights[0][0, 0].t()

        return shrink, expand

    by_function, by_op = made("function"), made("op")
    monkeypatch.setattr(lora_shrink_op, "_lora_shrink", by_function[0])
    monkeypatch.setattr(lora_expand_op, "_lora_expand", by_function[1])
    library = torch.library.Library("vllm", "IMPL")
    library.impl("lora_shrink", by_op[0], "CPU", allow_override=True)
    library.impl("lora_expand", by_op[1], "CPU", allow_override=True)
    mine = torch.library.Library("overlay_test", "DEF")
    mine.define("gathered(Tensor x) -> Tensor")
    mine.impl("gathered", lambda x: x + 0, "CPU")
    yield found
    mine._destroy()
    library._destroy()


def with_ops(
    record: PatchRecord, layer_class: type = MethodLayer, punica: type = PunicaOfOps, **options: Any
) -> tuple[Any, lora_linear.LinearOverlap]:
    layer: Any = layer_class(**options)
    layer.base_layer.quant_method = type("UnquantizedLinearMethod", (Method,), {})()
    layer.set_mapping(punica([0] * 64))
    originals = {layer_class: layer_class.__dict__["apply"]} if "apply" in vars(layer_class) else ORIGINALS
    overlap = lora_linear.LinearOverlap(layer, layer.base_layer.prefix, 8, next(iter(originals.values())), PLAN, record)
    return layer, overlap


def test_after_the_first_call_only_what_upstream_came_to_runs(ways: list[str], record: PatchRecord) -> None:
    layer, overlap = with_ops(record)
    stock, _ = with_ops(record)
    stock.load_state_dict(layer.state_dict())
    stock.lora_a_stacked, stock.lora_b_stacked = layer.lora_a_stacked, layer.lora_b_stacked
    for tokens in (5, 1, 5, 64):
        x = torch.randn(tokens, 4)
        expected = stock.apply(x)
        ways.clear()
        assert torch.equal(overlap.apply(x, None), expected)
        assert ways == ["function", "function"]


def test_learning_computes_nothing_and_leaves_the_layer_alone(ways: list[str], record: PatchRecord) -> None:
    layer, _ = with_ops(record)
    before = dict(layer.__dict__), dict(layer.base_layer.__dict__), dict(layer.punica_wrapper.__dict__)
    method = layer.base_layer.quant_method
    method.apply = lambda *given: pytest.fail("the base layer's method was called")
    replay = lora_linear.learn(layer, ORIGINALS[BaseLinearLayerWithLoRA], torch.randn(5, 4), None)
    assert ways == []
    assert before == (dict(layer.__dict__), dict(layer.base_layer.__dict__), dict(layer.punica_wrapper.__dict__))
    assert (replay.buffer_rank, replay.buffer_type) == (2, torch.float32)
    assert (replay.shrink.rest, replay.expand.rest) == ((1.0,), (0, True))


def test_the_metadata_is_asked_for_once_per_size_by_all_layers(ways: list[str], record: PatchRecord) -> None:
    first, of_first = with_ops(record)
    second, of_second = with_ops(record)
    second.punica_wrapper = first.punica_wrapper
    x = torch.randn(5, 4)
    for overlap in (of_first, of_second):
        overlap.apply(x, None)
    asked = first.punica_wrapper.token_mapping_meta.asked
    asked.clear()
    for tokens in (7, 7, 3, 7):
        for overlap in (of_first, of_second):
            overlap.apply(torch.randn(tokens, 4), None)
    assert asked == [7, 3, 7]


def test_two_engines_have_metadata_of_their_own(ways: list[str], record: PatchRecord) -> None:
    layers = [with_ops(record) for _ in range(2)]
    for _, overlap in layers:
        overlap.apply(torch.randn(5, 4), None)
    one, other = (overlap._replay for _, overlap in layers)
    assert one is not None and other is not None
    assert one.metadata is not other.metadata
    assert one.metadata.source is layers[0][0].punica_wrapper.token_mapping_meta


@pytest.mark.parametrize(
    ("layer_class", "punica", "reason"),
    [
        (TwoGemms, PunicaOfOps, "does not compute the base layer once"),
        (OtherInput, PunicaOfOps, "gives the base layer other arguments"),
        (ForgetsBias, PunicaOfOps, "gives the base layer other arguments"),
        (CopiesItsOutput, PunicaOfOps, "something else than the base layer's output"),
        (BaseLinearLayerWithLoRA, PunicaOfOps, "does not compute the base layer once"),
        (MethodLayer, Punica, "does not call lora_shrink and lora_expand once each"),
        (MethodLayer, ShrinksTwice, "does not call lora_shrink and lora_expand once each"),
        (MethodLayer, ScalesTwice, "lora_shrink is given something else"),
        (MethodLayer, OtherBuffer, "the buffer between shrink and expand has another shape"),
        (MethodLayer, AsksForMore, "depends on more than the number of tokens"),
        (MethodLayer, CallsAnotherOp, "it calls overlay_test::gathered"),
    ],
)
def test_other_calls_than_those_are_left_to_upstream(
    ways: list[str], record: PatchRecord, layer_class: type, punica: type, reason: str
) -> None:
    layer, overlap = with_ops(record, layer_class, PunicaOfOps)
    if punica is Punica:
        layer.set_mapping(Punica())
        layer.punica_wrapper.token_mapping_meta.meta_args = None
    else:
        layer.set_mapping(punica([0] * 64))
    x, bias = torch.randn(1, 4), torch.randn(8)
    with pytest.raises(lora_linear.Unlearnable, match=reason):
        lora_linear.learn(layer, overlap._original, x, bias)
    assert torch.equal(overlap.apply(x, bias), overlap._original(layer, x, bias))
    assert overlap._replay is None


def test_three_dimensions_are_left_to_upstream(ways: list[str], record: PatchRecord) -> None:
    layer, overlap = with_ops(record)
    with pytest.raises(lora_linear.Unlearnable, match="3 dimensions"):
        lora_linear.learn(layer, overlap._original, torch.randn(1, 5, 4), None)


def test_the_punica_wrapper_of_a_cpu_is_left_to_upstream(ways: list[str], record: PatchRecord) -> None:
    layer, overlap = with_ops(record)
    del layer.punica_wrapper.token_mapping_meta
    with pytest.raises(lora_linear.Unlearnable, match="PunicaOfOps is not the wrapper of a GPU's kernels"):
        lora_linear.learn(layer, overlap._original, torch.randn(5, 4), None)


@pytest.mark.parametrize("changed", ["lora_a_stacked", "lora_b_stacked", "token_mapping_meta", "bias"])
def test_a_layer_that_has_changed_since_goes_through_upstreams_apply(
    ways: list[str], record: PatchRecord, changed: str
) -> None:
    layer, overlap = with_ops(record)
    x, bias = torch.randn(5, 4), None
    overlap.apply(x, None)
    if changed == "token_mapping_meta":
        layer.punica_wrapper.token_mapping_meta = LoraKernelMeta([0] * 64)
    elif changed == "bias":
        bias = torch.randn(8)
    else:
        setattr(layer, changed, tuple(weight * 2 for weight in getattr(layer, changed)))
    ways.clear()
    assert torch.equal(overlap.apply(x, bias), overlap._original(layer, x, bias))
    assert ways == ["op"] * 4


def test_a_function_with_other_parameters_than_the_op_is_not_called(
    ways: list[str], record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    monkeypatch.setattr(lora_shrink_op, "_lora_shrink", lambda inputs, weights: pytest.fail("called"))
    monkeypatch.delattr(lora_expand_op, "_lora_expand")
    layer, overlap = with_ops(record)
    x = torch.randn(5, 4)
    assert torch.equal(overlap.apply(x, None), overlap._original(layer, x, None))
    assert overlap._replay is not None
    assert ways == ["op"] * 4


def test_an_error_while_learning_is_a_problem_and_changes_no_result(
    ways: list[str], record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal()
    monkeypatch.setattr(lora_linear, "journal", journal)
    _, overlap = with_ops(record)
    monkeypatch.setattr(LoraKernelMeta, "meta_args", lambda self, tokens, specialize: self.gone)
    monkeypatch.setattr(PunicaOfOps, "add_shrink", lambda self, *given: self.token_mapping_meta.meta_args(1, False))
    with pytest.raises(AttributeError, match="gone"):
        overlap.apply(torch.randn(5, 4), None)  # upstream's own error, and ours before it
    (problem,) = journal.problems
    assert "model.layers.0.o_proj runs upstream's apply" in problem and "gone" in problem


def test_nothing_is_learned_during_a_capture(
    ways: list[str], record: PatchRecord, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a captured call forks, what was learned is not used."""
    layer, overlap = with_ops(record)
    monkeypatch.setattr(overlap, "_reason_for_serial", lambda layer, x: lora_linear.BEFORE_CAPTURE)
    x = torch.randn(5, 4)
    overlap.apply(x, None)
    assert not overlap._learned and ways == ["op", "op"]
    monkeypatch.setattr(overlap, "_reason_for_serial", lambda layer, x: NOT_CAPTURING)
    overlap.apply(x, None)
    assert overlap._learned
    forked(overlap, monkeypatch)
    expected, forks = overlap._original(layer, x, None), record.calls.dual_stream
    ways.clear()
    assert torch.equal(overlap.apply(x, None), expected)
    assert record.calls.dual_stream == forks + 1
    assert ways == ["op", "op"]


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
