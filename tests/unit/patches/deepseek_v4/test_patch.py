"""The DeepSeek-V4 patch without an engine and without a device: sizes, refusals, when it forks, the handover, the way in."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

vllm = pytest.importorskip("vllm")

from overlay.patches.deepseek_v4 import patch as deepseek_v4  # noqa: E402
from overlay.patches.deepseek_v4.patch import Handover, HandoverError, InputGemms  # noqa: E402
from overlay.report.journal import PatchRecord  # noqa: E402
from overlay.settings import Settings  # noqa: E402
from overlay.side_work import adoption  # noqa: E402
from overlay.side_work.adoption import StaysStock  # noqa: E402
from overlay.side_work.plan import ABOVE_THRESHOLD, NOT_CAPTURING, SERIAL_PLAN, Plan  # noqa: E402
from overlay.verdict import Verdict  # noqa: E402
from overlay.vocabulary import APPLY  # noqa: E402

namespace = types.SimpleNamespace


def method_named(name: str, **attributes: Any) -> Any:
    instance = type(name, (), {})()
    vars(instance).update(attributes)
    return instance


def linear(size: int) -> Any:
    def default_unquantized_gemm() -> None: ...

    plain = method_named("UnquantizedLinearMethod", _gemm_impl=default_unquantized_gemm)
    return namespace(output_size=size, output_size_per_partition=size, quant_method=plain, weight=object())


class DeepseekCompressor:
    def __init__(self, size: int) -> None:
        self.fused_wkv_wgate = linear(size)


class DeepseekV4Indexer:
    def __init__(self) -> None:
        self.weights_proj = linear(64)
        self.compressor = DeepseekCompressor(512)


MODULE: Any = namespace(DeepseekCompressor=DeepseekCompressor, DeepseekV4Indexer=DeepseekV4Indexer)


def layer_of(ratio: int) -> Any:
    """A layer with the sizes of DeepSeek-V4-Flash."""
    return namespace(
        layer_name="model.layers.2.attn.deepseek_v4_multi_head_latent_attention",
        q_lora_rank=1024,
        head_dim=512,
        fused_wqa_wkv=linear(1536),
        compressor=DeepseekCompressor(2048 if ratio == 4 else 1024) if ratio > 1 else None,
        indexer=DeepseekV4Indexer() if ratio == 4 else None,
    )


@pytest.fixture
def stage_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Asks for a layer's stage under a configuration of vLLM."""

    def ask(layer: Any, known: bool = True, micro_batching: bool = False, batch_invariant: bool = False) -> Any:
        config = namespace(
            compilation_config=namespace(static_forward_context={layer.layer_name: layer if known else object()}),
            parallel_config=namespace(use_ubatching=micro_batching),
        )
        monkeypatch.setattr(deepseek_v4, "get_current_vllm_config", lambda: config)
        monkeypatch.setattr(deepseek_v4, "envs", namespace(VLLM_BATCH_INVARIANT=batch_invariant))
        plan = Plan("dual", 1024, only_while_capturing=False)
        return deepseek_v4.make_stage(layer, MODULE, no_gemm, Handover(), plan, PatchRecord())

    return ask


def no_gemm(states: Any, weight: Any) -> Any:
    raise AssertionError("nothing is computed while a layer is made")


def test_the_journal_shows_the_columns_of_each_gemm(stage_of: Callable[..., Any]) -> None:
    sizes = {"qr_kv": 1536, "kv_score": 2048, "indexer_weights": 64, "indexer_kv_score": 512}
    assert stage_of(layer_of(4))[1] == {"aux_gemms": 3, **sizes}
    assert stage_of(layer_of(128))[1] == {"aux_gemms": 1, "qr_kv": 1536, "kv_score": 1024}


def test_a_layer_with_one_gemm_is_refused(stage_of: Callable[..., Any]) -> None:
    with pytest.raises(StaysStock, match="only input GEMM"):
        stage_of(layer_of(1))


@pytest.mark.parametrize(
    ("circumstances", "reason"),
    [
        ({"known": False}, "not registered"),
        ({"micro_batching": True}, "DBO"),
        ({"batch_invariant": True}, "batch-invariant"),
    ],
)
@pytest.mark.parametrize("ratio", [4, 128])
def test_circumstances_that_are_refused(
    stage_of: Callable[..., Any], ratio: int, circumstances: dict[str, bool], reason: str
) -> None:
    with pytest.raises(StaysStock, match=reason):
        stage_of(layer_of(ratio), **circumstances)


class Foreign(DeepseekCompressor):
    """A plugin's own compressor, whose forward may do anything."""


@pytest.mark.parametrize("which", ["compressor", "indexer.compressor", "indexer"])
def test_parts_of_somebody_else_are_refused_by_name(stage_of: Callable[..., Any], which: str) -> None:
    layer = layer_of(4)
    if which == "indexer":
        layer.indexer = namespace(compressor=layer.indexer.compressor)
        expected = "indexer is a SimpleNamespace"
    else:
        owner = layer if which == "compressor" else layer.indexer
        owner.compressor = Foreign(8)
        expected = "compressor is a Foreign"
    with pytest.raises(StaysStock, match=expected):
        stage_of(layer)


@pytest.mark.parametrize("which", ["weights_proj", "compressor", "indexer.compressor"])
def test_quantized_work_next_to_the_quantized_gemm_is_refused(stage_of: Callable[..., Any], which: str) -> None:
    layer = layer_of(4)
    parts = {
        "weights_proj": layer.indexer.weights_proj,
        "compressor": layer.compressor.fused_wkv_wgate,
        "indexer.compressor": layer.indexer.compressor.fused_wkv_wgate,
    }
    parts[which].quant_method = method_named("Fp8LinearMethod")
    with pytest.raises(StaysStock, match="Fp8LinearMethod"):
        stage_of(layer)


def test_the_quantization_of_the_first_gemm_does_not_matter(stage_of: Callable[..., Any]) -> None:
    layer = layer_of(4)
    layer.fused_wqa_wkv.quant_method = method_named("Fp8LinearMethod")
    assert stage_of(layer)[1]["aux_gemms"] == 3


def test_a_sharded_first_gemm_is_an_error_that_names_the_sizes(stage_of: Callable[..., Any]) -> None:
    layer = layer_of(4)
    layer.fused_wqa_wkv.output_size_per_partition //= 2
    with pytest.raises(ValueError, match=r"768 columns.* 1024 and 512"):
        stage_of(layer)


# ---------------------------------------------------------------------------------------------- when it forks


class States:
    """A CUDA tensor, as far as the stage asks."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, tokens: int) -> None:
        self.shape = (tokens, 4096)

    def __getitem__(self, rows: slice) -> States:
        return States(len(range(self.shape[0])[rows]))


class Region:
    """Runs serially, but says that it has forked."""

    def __init__(self, slots: int) -> None:
        assert slots == 3
        self.prepared = False
        self.forks: list[int] = []

    def prepare(self, device: torch.device) -> None:
        assert device == States.device
        self.prepared = True

    def run(self, default: Any, auxiliary: list[Any]) -> Any:
        assert self.prepared
        self.forks.append(sum(work is not None for work in auxiliary))
        return default(), tuple(None if work is None else work() for work in auxiliary)


class Layer:
    """A layer whose GEMMs say that they ran, with upstream's way of asking for them."""

    q_lora_rank, head_dim = 2, 3

    def __init__(self, ratio: int) -> None:
        self.ran: list[tuple[str, int]] = []
        self.handover = Handover()
        self.record = PatchRecord()
        self.compressor, self.indexer = DeepseekCompressor(4), DeepseekV4Indexer() if ratio == 4 else None
        self.names = {id(self.compressor.fused_wkv_wgate.weight): "kv_score"}
        if self.indexer is not None:
            self.names[id(self.indexer.compressor.fused_wkv_wgate.weight)] = "indexer_kv_score"
            self.indexer.weights_proj = Projection(self)
        self.asked = deepseek_v4.answering_gemm(self.handover, self.gemm)

    def stage(self, plan: Plan) -> InputGemms:
        return InputGemms(self, self.gemm, self.handover, plan, self.record)  # type: ignore[arg-type]

    def gemm(self, states: Any, weight: Any) -> Any:
        self.ran.append((self.names[id(weight)], states.shape[0]))
        return torch.zeros(1)

    def fused_wqa_wkv(self, states: Any) -> Any:
        self.ran.append(("fused_wqa_wkv", states.shape[0]))
        return torch.arange(states.shape[0] * 5).reshape(-1, 5), None

    def attention_impl(self, states: Any, qr: torch.Tensor, kv: torch.Tensor, positions: Any, out: Any) -> None:
        assert qr.shape == (states.shape[0], 2) and kv.shape == (states.shape[0], 3)
        assert qr[0].tolist() == [0, 1] and kv[0].tolist() == [2, 3, 4]
        self.ran.append(("attention", states.shape[0]))
        if self.indexer is not None:
            self.asked(states, self.indexer.compressor.fused_wkv_wgate.weight)
            self.indexer.weights_proj(states)
        self.asked(states, self.compressor.fused_wkv_wgate.weight)


class Projection:
    def __init__(self, layer: Layer) -> None:
        self.layer, self.quant_method = layer, linear(64).quant_method
        self.forward = self.compute

    def compute(self, states: Any) -> Any:
        self.layer.ran.append(("weights_proj", states.shape[0]))
        return torch.zeros(1), None

    def __call__(self, states: Any) -> Any:
        return self.forward(states)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A device of which only the capture state is known."""
    monkeypatch.setattr(deepseek_v4, "ParallelRegion", Region)
    return lambda capturing: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)


def step(layer: Layer, stage: InputGemms, tokens: int) -> list[tuple[str, int]]:
    layer.ran.clear()
    stage.attend(layer, Layer.attention_impl, States(tokens), None, None)  # type: ignore[arg-type]
    assert layer.handover._waiting == {}
    return list(layer.ran)


AUXILIARY = {4: ["kv_score", "weights_proj", "indexer_kv_score"], 128: ["kv_score"]}
each_ratio = pytest.mark.parametrize("ratio", AUXILIARY)


@each_ratio
@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "capture"])
def test_small_steps_fork_in_a_capture_and_in_eager_pieces(device: Any, ratio: int, capturing: bool) -> None:
    layer = Layer(ratio)
    stage = layer.stage(Plan("dual", 1024, only_while_capturing=False))
    device(False)
    step(layer, stage, 1024)
    device(capturing)
    ran = step(layer, stage, 7)
    assert ran == [(name, 7) for name in ("fused_wqa_wkv", *AUXILIARY[ratio], "attention")]
    assert stage.region.forks == [len(AUXILIARY[ratio])] * 3, "once to warm up, then in both steps"
    assert layer.record.calls.dual_stream == 2


def test_the_indexers_projection_is_taken_over_once(device: Any) -> None:
    """A wrapper around the wrapper at each step would end in a RecursionError, after a thousand steps."""
    layer = Layer(4)
    stage = layer.stage(Plan("dual", 1024, only_while_capturing=False))
    device(False)
    assert layer.indexer is not None
    taken = []
    for tokens in (7, 2048, 7):
        step(layer, stage, tokens)
        taken.append(layer.indexer.weights_proj.forward)
    assert taken[0] != layer.indexer.weights_proj.compute and taken == taken[:1] * 3


@each_ratio
def test_the_first_call_warms_the_streams_up_with_one_row(device: Any, ratio: int) -> None:
    layer = Layer(ratio)
    device(False)
    ran = step(layer, layer.stage(Plan("dual", 1024, only_while_capturing=False)), 8192)
    assert ran[: len(AUXILIARY[ratio])] == [(name, 1) for name in AUXILIARY[ratio]]


@each_ratio
@pytest.mark.parametrize(
    ("plan", "tokens", "reason"),
    [
        (Plan("dual", 1024, only_while_capturing=False), 1025, ABOVE_THRESHOLD),
        (Plan("dual", 0, only_while_capturing=False), 1, ABOVE_THRESHOLD),
        (Plan("serial", 1024, only_while_capturing=False), 5, SERIAL_PLAN),
    ],
)
def test_serial_is_upstreams_own_order(device: Any, ratio: int, plan: Plan, tokens: int, reason: str) -> None:
    """Nothing ahead but the projection: upstream overlaps some of the others in its own way."""
    layer = Layer(ratio)
    stage = layer.stage(plan)
    device(False)
    step(layer, stage, tokens)
    ran = step(layer, stage, tokens)
    last = ["indexer_kv_score", "weights_proj"] if ratio == 4 else []
    assert ran == [(name, tokens) for name in ("fused_wqa_wkv", "attention", *last, "kv_score")]
    assert layer.record.calls.serial == {reason: 2} and layer.record.calls.dual_stream == 0


@each_ratio
def test_a_capture_without_a_step_before_it_is_serial(device: Any, ratio: int) -> None:
    layer = Layer(ratio)
    stage = layer.stage(Plan("dual", 1024, only_while_capturing=False))
    device(True)
    step(layer, stage, 4)
    assert layer.record.calls.serial == {"no call before the capture": 1}
    device(False)
    step(layer, stage, 4)
    device(True)
    step(layer, stage, 4)
    assert layer.record.calls.dual_stream == 2


@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_a_plan_that_forks_in_eager_steps_asks_the_driver_nothing(tokens: int, threshold: int) -> None:
    plan = Plan("dual", threshold, only_while_capturing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.cuda, "is_current_stream_capturing")
        assert (plan.reason_for_serial(tokens) is None) == (tokens <= threshold)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False, raising=False)
        assert Plan("dual", threshold).reason_for_serial(0) == NOT_CAPTURING, "the default asks"


# ---------------------------------------------------------------------------------------------- the handover


def test_a_result_is_there_once() -> None:
    handover, weight, states = Handover(), object(), torch.zeros(1)
    assert handover.take(weight, states) is None
    handover.give(weight, states, "result")
    assert handover.take(object(), states) is None
    assert handover.take(weight, states) == "result"
    assert handover.take(weight, states) is None
    assert handover.withdraw([weight, None]) == 0


def test_a_result_for_another_input_is_an_error_and_gone() -> None:
    handover, weight = Handover(), object()
    handover.give(weight, torch.zeros(1), "result")
    with pytest.raises(HandoverError, match="another input"):
        handover.take(weight, torch.zeros(1))
    assert handover.withdraw([weight]) == 0


def test_only_the_given_owners_are_withdrawn() -> None:
    handover, states = Handover(), torch.zeros(1)
    first, second = object(), object()
    handover.give(first, states, 1)
    handover.give(second, states, 2)
    assert handover.withdraw([first, None, object()]) == 1
    assert handover.take(second, states) == 2


# ---------------------------------------------------------------------------------------------- the way in


@pytest.fixture
def released() -> Iterator[tuple[Any, Any]]:
    """Two modules with the classes and the function that an installer changes."""
    compressors, attention = types.ModuleType("stub_compressors"), types.ModuleType("stub_attention")
    sys.modules[compressors.__name__] = compressors
    home: dict[str, Any] = {"__name__": "vllm.model_executor.layers.utils"}
    exec("def cublas_gemm_bf16_bf16_fp32(x, weight):\n    return 'computed'", home)
    compressors.cublas_gemm_bf16_bf16_fp32 = home["cublas_gemm_bf16_bf16_fp32"]  # type: ignore[attr-defined]
    attention.DeepseekCompressor = type("DeepseekCompressor", (), {"__module__": compressors.__name__})  # type: ignore[attr-defined]
    wrapper = type("Wrapper", (), {"forward": lambda self: 1, "attention_impl": lambda self: 2})
    attention.Wrapper = wrapper  # type: ignore[attr-defined]
    yield attention, compressors
    del sys.modules[compressors.__name__]


VERDICT = Verdict(APPLY, "known", "stub_attention", "Wrapper", ("forward", "attention_impl"))


def state_of(released: tuple[Any, Any]) -> list[Any]:
    attention, compressors = released
    return [dict(vars(attention.Wrapper)), compressors.cublas_gemm_bf16_bf16_fp32]


def test_without_a_device_nothing_is_changed(released: tuple[Any, Any]) -> None:
    before = state_of(released)
    found = deepseek_v4.install(released[0], VERDICT, Settings())
    assert found.state == "inert" and "cpu" in found.reason
    assert state_of(released) == before


def test_somebody_elses_gemm_is_drifted_and_nothing_is_changed(released: tuple[Any, Any]) -> None:
    released[1].cublas_gemm_bf16_bf16_fp32 = no_gemm
    before = state_of(released)
    found = deepseek_v4.install(released[0], VERDICT, Settings(serial_pass_through=True))
    assert (found.state, found.methods) == ("drifted", ())
    assert __name__ in found.reason
    assert state_of(released) == before


def test_what_is_intercepted_is_a_plain_function(released: tuple[Any, Any]) -> None:
    """Dynamo drops a wrapt wrapper around what it traces, without a word."""
    attention, compressors = released
    assert deepseek_v4.install(attention, VERDICT, Settings(serial_pass_through=True)) == VERDICT
    for name in ("forward", "attention_impl"):
        assert type(vars(attention.Wrapper)[name]) is types.FunctionType
    gemm = compressors.cublas_gemm_bf16_bf16_fp32
    assert type(gemm) is types.FunctionType
    assert gemm(torch.zeros(1), object()) == "computed"


@pytest.mark.parametrize(
    ("settings", "mode", "threshold"),
    [(Settings(), "dual", 1024), (Settings(token_threshold=7), "dual", 7), (Settings(plan="serial"), "serial", 1024)],
)
def test_the_plan_is_upstreams_which_forks_in_eager_steps_as_well(
    released: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, settings: Settings, mode: str, threshold: int
) -> None:
    attention, _ = released
    monkeypatch.setattr(adoption, "other_device", lambda: None)
    monkeypatch.setattr(deepseek_v4, "adopt", lambda name, record, layer, make, settings: make())
    monkeypatch.setattr(deepseek_v4, "make_stage", lambda *given: given)
    monkeypatch.setattr(attention.Wrapper, "layer_name", "a layer", raising=False)
    deepseek_v4.install(attention, VERDICT, settings)
    given = getattr(attention.Wrapper(), deepseek_v4.STAGE)
    assert Plan(mode, threshold, only_while_capturing=False) in given


def test_a_layer_without_a_stage_runs_stock(released: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    attention, _ = released
    deepseek_v4.install(attention, VERDICT, Settings(serial_pass_through=True))
    monkeypatch.setattr(deepseek_v4, "adopt", lambda *_: None)
    monkeypatch.setattr(attention.Wrapper, "layer_name", "a layer", raising=False)
    layer = attention.Wrapper()
    assert getattr(layer, deepseek_v4.STAGE) is None
    assert layer.forward() == 1
