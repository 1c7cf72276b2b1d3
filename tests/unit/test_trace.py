"""Reading a profiler trace (benchmarks/gpu/trace.py), on made-up kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import trace

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
