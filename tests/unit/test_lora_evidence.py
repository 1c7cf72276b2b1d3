"""What of the LoRA evidence (benchmarks/lora_evidence.py) can be tested without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import lora_evidence
from gpu import lora_engines, lora_model, lora_report, lora_trace, trace
from gpu.run_setup import Setup

from overlay.cli.bench import report
from overlay.cli.bench.results import Results

GEMM, SHRINK, EXPAND = "nvjet_tst_128x8_64x12_2x1_v_bz_TNT", "_lora_shrink_kernel", "_lora_expand_kernel"
ATTENTION = "void cutlass::device_kernel<flash::FlashAttnFwdSm90>"


def _kernel(name: str, start: float, duration: float, stream: int) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def _trace(dual: bool, linears: int) -> list[dict[str, Any]]:
    """Linears of 20 us with LoRA kernels of 4 and 6 us, and an attention kernel after each."""
    events, now = [], 0.0
    for _ in range(linears):
        begin, stream = (now + 1, 13) if dual else (now + 20, 7)
        events += [_kernel(GEMM, now, 20, 7), _kernel(SHRINK, begin, 4, stream), _kernel(EXPAND, begin + 4, 6, stream)]
        now += 30
        events.append(_kernel(ATTENTION, now, 5, 7))
        now += 5
    return events


@pytest.mark.parametrize("dual", [False, True])
def test_the_share_of_lora_time_next_to_gemms(dual: bool) -> None:
    found = lora_trace.analyse(trace.kernels_of(_trace(dual, 8)), steps=2)
    assert found["lora_kernels_per_step"] == 8
    assert (found["lora_us_per_step"], found["gemm_us_per_step"]) == (40.0, 80.0)
    assert found["hidden_share"] == (1.0 if dual else 0.0)
    assert found["lora_streams"] == ([13] if dual else [7]) and found["gemm_streams"] == [7]
    assert found["busy_us_per_step"] == (100.0 if dual else 140.0)


def test_lora_kernels_half_under_a_gemm_and_next_to_attention_count_half() -> None:
    events = [_kernel(GEMM, 0, 10, 7), _kernel(SHRINK, 8, 4, 13), _kernel(ATTENTION, 10, 10, 7)]
    assert lora_trace.analyse(trace.kernels_of(events), 1)["hidden_share"] == pytest.approx(0.5)


def test_a_trace_without_lora_kernels_has_no_share() -> None:
    assert lora_trace.analyse([], 1)["hidden_share"] is None


def _row(upstream: tuple[float, float, float], overlay: tuple[float, float, float], both: float) -> dict[str, Any]:
    def found(values: tuple[float, float, float]) -> dict[str, float]:
        return dict(zip(("ratio", "low", "high"), values, strict=True))

    return {"upstream": found(upstream), "overlay": found(overlay), "both": found((both, both - 0.01, both + 0.01))}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (_row((0.97, 0.96, 0.98), (0.93, 0.92, 0.94), 0.96), (True, "met", False, False)),
        (_row((0.97, 0.96, 0.98), (0.955, 0.945, 0.96), 0.98), (True, "within", False, False)),
        (_row((0.97, 0.96, 0.98), (0.97, 0.96, 0.98), 1.00), (True, "missed", False, False)),
        (_row((0.99, 0.97, 1.01), (0.99, 0.98, 1.01), 1.00), (False, None, False, False)),
        (_row((0.90, 0.89, 0.91), (1.02, 1.01, 1.03), 1.13), (True, "missed", True, True)),
    ],
)
def test_the_goal(row: dict[str, Any], expected: tuple[bool, str | None, bool, bool]) -> None:
    found = lora_engines.goal(row)
    keys = ("upstream_gains", "target", "slower_than_stock", "slower_than_upstream")
    assert tuple(found[key] for key in keys) == expected


def test_decode_rows_compare_the_three_sides_round_by_round() -> None:
    sides = {"stock": [1.0, 2.0, 3.0], "upstream": [0.98, 1.96, 2.94], "overlay": [0.9, 1.8, 2.7]}
    (row,) = lora_engines.decode_rows({"rank 8|4": sides, "rank 8|8": {side: [] for side in sides}})
    assert (row["group"], row["requests"], row["rounds"]) == ("rank 8", 4, 3)
    assert row["overlay"]["ratio"] == pytest.approx(0.9) and row["upstream"]["ratio"] == pytest.approx(0.98)
    assert row["both"]["ratio"] == pytest.approx(0.9 / 0.98)
    assert row["stock_seconds"] == 2.0 and row["target"] == "met"


def test_without_upstreams_side_there_is_a_ratio_to_stock_only() -> None:
    (row,) = lora_engines.decode_rows({"mixed|2": {"stock": [1.0], "overlay": [1.1]}})
    assert "upstream" not in row and "both" not in row and row["slower_than_stock"]


def _answer(*tokens: int, logprobs: str = "a") -> dict[str, Any]:
    return {"tokens": [[token] for token in tokens], "logprobs": logprobs}


def test_different_tokens_are_a_fault_where_stock_repeats_itself() -> None:
    found = {"stock": _answer(1, 2), "upstream": _answer(1, 2), "overlay": _answer(1, 3)}
    row = lora_engines.token_row("case", found, [_answer(1, 2)])
    assert row["sides"]["overlay"]["different_requests"] == 1 and row["sides"]["upstream"]["different_requests"] == 0
    assert lora_engines.token_faults(row) == ["the overlay's tokens differ in 1 of 2 requests"]


def test_equal_tokens_with_other_log_probabilities_are_a_fault_too() -> None:
    row = lora_engines.token_row("case", {"stock": _answer(1), "overlay": _answer(1, logprobs="b")}, [_answer(1)])
    assert lora_engines.token_faults(row) == ["the overlay's log probabilities differ"]


def test_a_stock_that_does_not_repeat_itself_proves_nothing() -> None:
    found = {"stock": _answer(1), "overlay": _answer(2)}
    row = lora_engines.token_row("case", found, [_answer(1), _answer(1, logprobs="b")])
    assert (row["stock_repeats_tokens"], row["stock_repeats_logprobs"]) == (2, 1)
    assert lora_engines.token_faults(row) == []


def _patch(patched: int, dual_stream: int, serial: dict[str, int] | None = None) -> dict[str, Any]:
    layers = {"patched": {str(index): {} for index in range(patched)}, "refused": {"x": "a reason"}}
    calls = {"fake": 1, "dual_stream": dual_stream, "serial": serial or {}}
    return {"verdict": "apply", "reason": "", "layers": layers, "calls": calls}


def test_an_overlay_that_did_nothing_is_reported() -> None:
    assert lora_engines.journal_faults(_patch(8, 16), 8, cpu=False) == []
    assert "NOTHING WAS PATCHED" in lora_engines.journal_faults(None, 8, cpu=False)[0]
    assert "7 of 8 LoRA linears patched, refused: a reason" in lora_engines.journal_faults(_patch(7, 16), 8, False)[0]
    assert "NO CALL ON TWO STREAMS" in lora_engines.journal_faults(_patch(8, 0), 8, cpu=False)[0]
    assert lora_engines.journal_faults(_patch(8, 0, {"serial pass-through": 4}), 8, cpu=True) == []
    assert lora_engines.journal_faults(_patch(8, 0), 8, cpu=True)


def test_serial_calls_that_should_not_be_are_named_in_the_overlays_words() -> None:
    source = (REPOSITORY / "overlay" / "side_work" / "ops.py").read_text()
    for reason in lora_engines.UNWANTED:
        assert f'"{reason}"' in source
        assert lora_engines.journal_faults(_patch(8, 16, {reason: 3}), 8, cpu=False) == [f"3 serial calls: {reason}"]


@pytest.fixture
def engines(tmp_path: Path) -> Callable[[bool], lora_engines.LoraEngines]:
    def make(cpu: bool) -> lora_engines.LoraEngines:
        setup = Setup(tmp_path, tmp_path, "/site", 100.0, cpu=cpu, layers=2)
        return lora_engines.LoraEngines(setup, Results(tmp_path / "lora.json"), (8, 16), 16, 64)

    return make


def test_the_sides_differ_by_the_switch_and_by_the_overlay_alone(
    engines: Callable[[bool], lora_engines.LoraEngines], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lora_engines.SWITCH, "1")  # of the caller: not for any side
    sides = engines(False)
    stock, upstream, overlay = (sides.environment(side) for side in sides.sides)

    def different(other: dict[str, str]) -> set[str]:
        return {name for name in stock.keys() | other.keys() if stock.get(name) != other.get(name)}

    caches = {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"}
    assert different(upstream) == {lora_engines.SWITCH, *caches}
    assert different(overlay) == {"PYTHONPATH", "VLLMOVERLAY_JOURNAL_DIR", *caches}
    assert len({environment["VLLM_CACHE_ROOT"] for environment in (stock, upstream, overlay)}) == 3


def test_upstreams_switch_is_left_out_off_cuda(engines: Callable[[bool], lora_engines.LoraEngines]) -> None:
    assert engines(True).sides == ("stock", "overlay")
    assert engines(True).environment("overlay")[lora_engines.PASS_THROUGH] == "1"


def test_there_is_a_slot_for_every_adapter_and_one_more(engines: Callable[[bool], lora_engines.LoraEngines]) -> None:
    arguments = engines(False).engine(Path("/model"))
    assert (arguments["max_loras"], arguments["max_lora_rank"], arguments["enable_lora"]) == (3, 16, True)
    assert "additional_config" not in arguments


def test_the_model_has_the_shape_of_qwen3_8b() -> None:
    sizes = {name.rpartition(".")[2]: rest for name, *rest in lora_model.projections(lora_model.configuration(1))}
    assert sizes == {
        "q_proj": [4096, 4096],
        "k_proj": [4096, 1024],
        "v_proj": [4096, 1024],
        "o_proj": [4096, 4096],
        "gate_proj": [4096, 12288],
        "up_proj": [4096, 12288],
        "down_proj": [12288, 4096],
    }


@pytest.mark.parametrize(("block", "split"), [(256, 64), (32, 8)])
def test_a_repeatable_adapter_gives_each_row_to_one_thread_block(block: int, split: int) -> None:
    """The two ways in which vLLM's shrink kernel splits features: blocks of this size, dealt out in turn."""
    torch = pytest.importorskip("torch")
    for inputs in (4096, 12288):
        values = lora_model.lora_a(64, inputs, False, torch.Generator().manual_seed(1))
        owners = (torch.arange(inputs) // block) % split
        for row in values:
            assert len(set(owners[row != 0].tolist())) == 1 and int((row != 0).sum()) == lora_model.BLOCK
        assert len({int(row.nonzero()[0]) // 32 for row in values}) > 16  # not all in the same place
    dense = lora_model.lora_a(8, 4096, True, torch.Generator().manual_seed(1))
    assert int((dense != 0).sum()) == 8 * 4096


def test_adapters_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    config = lora_model.configuration(2, tiny=True)
    folder = lora_model.write_adapter(tmp_path, config, 8, False, 3)
    tensors = safetensors.load_file(str(folder / "adapter_model.safetensors"))
    assert len(tensors) == 2 * 7 * 2
    first = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    second = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    assert first.shape == (8, config["intermediate_size"]) and second.shape == (config["hidden_size"], 8)
    assert first.dtype == torch.bfloat16
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 8 and "down_proj" in settings["target_modules"]
    other = lora_model.write_adapter(tmp_path, config, 8, False, 4)
    assert other != folder
    assert (other / "adapter_model.safetensors").read_bytes() != (folder / "adapter_model.safetensors").read_bytes()


def test_thresholds_are_the_largest_sizes_before_the_first_slower_one() -> None:
    pytest.importorskip("torch")
    from gpu import lora_micro

    assert lora_micro.not_slower_up_to({1: 0.8, 64: 1.005, 128: 1.05, 256: 0.9}) == 64
    assert lora_micro.not_slower_up_to({1: 1.2, 2: 0.9}) == 0
    rows = [
        {"shards": 1, "rank": 16, "linear": linear, "tokens": tokens, "serial": 10.0, "dual": dual}
        for linear, times in (("o", (8.0, 9.0, 11.0)), ("down", (8.0, 9.0, 9.5)))
        for tokens, dual in zip((1, 64, 128), times, strict=True)
    ]
    (found,) = lora_micro.thresholds(rows)
    assert found["linears"] == {"o": 64, "down": 128}
    assert found["ratio"][128] == pytest.approx(20.5 / 20.0) and found["layer"] == 64
    (found,) = lora_micro.thresholds(rows[:-1])  # the layer's sum needs all of its linears
    assert 128 not in found["ratio"]


def test_micro_runs_the_overlays_own_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    import torch
    from gpu import lora_micro
    from vllm.forward_context import override_forward_context

    from overlay.patches import lora_linear
    from overlay.side_work import ops

    monkeypatch.setattr(lora_linear, "take_over_shrink", lambda wrapper: None)
    monkeypatch.setattr(lora_linear, "Gated", lambda weights, gate: weights)
    monkeypatch.setattr(ops, "pairs", {})

    class Punica:
        def add_lora_linear(self, output: Any, x: Any, first: Any, second: Any, _scale: float, slices: Any) -> None:
            buffer = x.new_empty(len(slices), x.shape[0], second[0].shape[-1])
            self.add_shrink(buffer, x, first)
            self.add_expand(output, buffer, second)

        def add_shrink(self, buffer: Any, x: Any, weights: Any) -> None:
            buffer.copy_(torch.stack([x @ weight[0, 0].T for weight in weights]))

        def add_expand(self, output: Any, buffer: Any, weights: Any) -> None:
            parts = [piece @ weight[0, 0].T for piece, weight in zip(buffer, weights, strict=True)]
            output.add_(torch.cat(parts, dim=1))

    layer = lora_micro.LoraLinear(64, (32, 16), 8, Punica(), torch.device("cpu"))
    apply, _ = lora_micro.overlap([layer])
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with override_forward_context(object()):
        assert torch.equal(apply(layer, x), lora_micro.serial(layer, x, None))


def test_every_table_is_printed(tmp_path: Path) -> None:
    sides = {"stock": [1.0, 2.0], "upstream": [0.98, 1.96], "overlay": [1.1, 2.2]}
    answers = {side: _answer(1, 2) for side in sides}
    traced = {"requests": 8, "rank": 16, "mean": 0.002, **lora_trace.analyse(trace.kernels_of(_trace(True, 4)), 1)}
    micro = {"shards": 1, "rank": 16, "linear": "o", "tokens": 8, "gemm": 7.0, "serial": 12.0, "dual": 8.0}
    data = {
        "tokens": [lora_engines.token_row("mixed, N=2", answers, [answers["stock"]])],
        "decode": lora_engines.decode_rows({"rank 8|4": sides}),
        "prefill": [{"prompt": 128, **lora_engines.ratios(sides)}],
        "trace": {"overlay": traced},
        "micro": {
            "torch": "2.11",
            "rows": [{**micro, "different": 0, "on_two_streams": True}],
            "threshold": [{"shards": 1, "rank": 16, "linears": {"o": 8}, "layer": 8, "ratio": {"8": 0.667}}],
        },
        "problems": ["overlay: NO CALL ON TWO STREAMS"],
    }
    target = tmp_path / "report.txt"
    report.show(data, report.wide_console(), target, lora_report.tables)
    shown = target.read_text()
    for text in ("mixed, N=2", "1.100 (1.100..1.100)", "STOCK, UPSTREAM", "0.667", "PROBLEM overlay: NO CALL ON TWO"):
        assert text in shown


def test_the_cpu_run_is_small() -> None:
    options = lora_evidence.parse(["run", "--out", "/out", "--cpu"])
    assert max(options.batches) <= 4 and max(options.prompts) <= 512 and options.layers == 2
    assert options.max_lora_rank == 64 and options.trace_rank == 16
    with pytest.raises(SystemExit):
        lora_evidence.parse(["run", "--out", "/out", "--ranks", "8"])
