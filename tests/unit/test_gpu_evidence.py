"""What of the GPU evidence (benchmarks/gpu_evidence.py) can be tested without a GPU."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import models, starts, targets, trace
from gpu.run_setup import Setup

from overlay.cli.bench import intervals, results
from overlay.cli.bench.outside.bench_engine import weights

QKVZ, BA = "nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT"


def _kernel(name: str, start: float, duration: float, stream: int) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}


def _step(begin: float, dual: bool, layers: int) -> list[dict[str, Any]]:
    """One decode step: norm, the two projections, convolution, recurrence, output projection, experts."""
    events, now = [], begin
    for _ in range(layers):
        events.append(_kernel("triton_red_fused_norm", now, 3, 7))
        now += 4
        if dual:
            events += [_kernel(BA, now + 0.8, 5, 13), _kernel("splitKreduce_kernel", now + 6.2, 2, 13)]
            events.append(_kernel(QKVZ, now, 17, 7))
            now += 18
        else:
            events += [_kernel(QKVZ, now, 17, 7), _kernel(BA, now + 18, 5, 7)]
            events.append(_kernel("splitKreduce_kernel", now + 23, 2, 7))
            now += 26
        events.append(_kernel("_causal_conv1d_update_kernel", now, 3, 7))
        events.append(_kernel("fused_recurrent_gated_delta_rule_packed_decode_kernel", now + 4, 9, 7))
        events.append(_kernel("nvjet_out_proj", now + 14, 8, 7))
        events += [_kernel("nvjet_router", now + 23, 4, 7), _kernel("nvjet_shared_expert", now + 23.5, 4, 15)]
        events.append(_kernel("fused_moe_kernel", now + 29, 30, 7))
        now += 60
    return events


@pytest.mark.parametrize("dual", [False, True])
def test_projections_are_found_and_their_overlap_measured(dual: bool, tmp_path: Path) -> None:
    events = (
        _step(0, dual, 3) + _step(1000, dual, 3) + [{"ph": "X", "cat": "cpu_op", "name": "gemm", "ts": 0, "dur": 5}]
    )
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = trace.analyse(trace.read_kernels(path), layers_per_step=3)
    assert found["convolutions"] == found["pairs"] == 6
    assert found["pair_kernels"] == [(QKVZ, BA)]
    assert found["overlap_us"] == (5.0 if dual else 0.0)
    assert found["overlapping"] == found["on_two_streams"] == found["ba_inside_qkvz"] == (6 if dual else 0)
    assert [row["span_us"] for row in found["per_layer"]] == [17.0 if dual else 23.0] * 3


def test_a_trace_without_kernels_is_no_proof() -> None:
    assert "overlap_us" not in trace.analyse([], 3)


def test_the_interval_covers_the_median() -> None:
    generator = random.Random(1)
    covered = 0
    for _ in range(60):
        low, high = intervals.bootstrap([generator.gauss(1.0, 0.1) for _ in range(15)])
        covered += low <= 1.0 <= high
    assert covered >= 51


def test_rounds_are_compared_in_pairs() -> None:
    found = intervals.compare([1.0, 2.0, 4.0], [0.9, 1.8, 3.6])
    assert found.ratio == pytest.approx(0.9)
    row = found.as_dict()
    assert (targets.verdict(row, 0.95), targets.verdict(row, 0.85)) == ("met", "above")


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_configurations_have_the_full_layer_shape(architecture: str) -> None:
    content = models.configuration(architecture, 12)
    text = content.get("text_config", content)
    assert text["layer_types"].count("linear_attention") == 9
    assert (text["hidden_size"], text["linear_num_key_heads"], text["linear_num_value_heads"]) == (2048, 16, 32)


def test_the_sides_differ_by_the_overlay_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLMOVERLAY_PLAN", "serial")
    setup = Setup(tmp_path, tmp_path, "/site", 100.0)
    stock, overlay = (setup.environment(side, "run") for side in ("stock", "overlay"))
    different = {name for name in stock.keys() | overlay.keys() if stock.get(name) != overlay.get(name)}
    assert different == {"PYTHONPATH", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "VLLMOVERLAY_JOURNAL_DIR"}
    assert stock["PYTHONPATH"] == "/site"
    assert overlay["PYTHONPATH"] == f"{results.REPOSITORY}:/site"


def test_compile_times_and_artifacts_are_compared() -> None:
    def start(side: str, seconds: float, saved: int) -> dict[str, Any]:
        counters = {"num_compiled_artifacts_saved": saved}
        return {"side": side, "compile_seconds": seconds, "counters": counters, "cache": {"torch_compile_cache": 9}}

    found = starts.summarize_compile([start("stock", 40, 5), start("overlay", 40.4, 5)])
    assert found["ratio"] == pytest.approx(1.01)
    assert found["artifacts_equal"]
    assert not starts.summarize_compile([start("stock", 40, 5), start("overlay", 40, 14)])["artifacts_equal"]


def test_random_gptq_weights_have_mean_zero() -> None:
    """The zero point is 8 and no value is 0: with a mean of -0.5 every token came out the same."""
    torch = pytest.importorskip("torch")
    packed = torch.empty(64, 128, dtype=torch.int32)
    weights.fill(packed, "model.layers.0.mlp.up_proj.qweight", "MergedColumnParallelLinear", 1)
    values = torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)])
    assert int(values.min()) == 1 and int(values.max()) == 15
    assert abs(float(values.float().mean()) - 8) < 0.1


def test_a_stock_that_does_not_repeat_itself_is_reported() -> None:
    def answer(token: int) -> dict[str, Any]:
        return {
            "quantization": "fp8",
            "kernels": [],
            "checksum": "c",
            "tokens": [[[token]]],
            "logprobs": ["x"],
            "journal": [],
        }

    row = starts._compare_quantized("fp8", {"stock": answer(1), "overlay": answer(1), "control": answer(2)})
    assert row["tokens_equal"] is True and row["stock_repeats"] is False
