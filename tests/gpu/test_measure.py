"""``check --measure`` on a real GPU with the installed vLLM: pairs of its own linears, in three formats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
    pytest.mark.timeout(600),
]
pytest.importorskip("vllm")

from overlay.cli import check, checkpoint, measured, vllms  # noqa: E402
from overlay.cli.bench import shapes  # noqa: E402
from overlay.vocabulary import APPLY, SERIAL, STRATEGIES  # noqa: E402

#: Building the layers and measuring one shape, after vLLM has been imported.
SECONDS_PER_SHAPE = 5.0


@pytest.mark.parametrize(("form", "shards"), [("bf16", 1), ("fp8-block", 4), ("w4", 1)])
def test_a_pair_is_measured_at_every_size(
    form: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")  # it would compile for minutes
    shapes.write(tmp_path, shapes.find("Qwen3.5-35B-A3B", None).with_format(form).configuration)
    vllm = vllms.find(None, None)
    verdicts = check.judge(vllm)
    if verdicts["gdn"].state != APPLY:
        pytest.skip(f"gdn is {verdicts['gdn'].state} in this vLLM")
    found = measured.measure(checkpoint.judge(str(tmp_path), verdicts, check._sources(vllm), shards, lora=False))
    (group,) = (one for one in found.groups if one.measured is not None)
    told = json.loads(json.dumps(group.measured))
    assert told["device"] == torch.cuda.get_device_name() and told["bytes_per_second"] > 1e11
    if form == "w4" and "stock" in told:  # which kernel takes 4-bit weights is the GPU's
        assert "is not on the allowlist" in told["stock"] or "quantize its input" in told["stock"]
        return
    sizes = dict(group.sizes)
    assert told["pair"].startswith(f"{sizes['hidden']} to {sizes['qkvz']} (") and told["seconds"] < SECONDS_PER_SHAPE
    assert [row["tokens"] for row in told["rows"]] == sorted({row["tokens"] for row in told["rows"]})
    assert {1, 8, 64} <= {row["tokens"] for row in told["rows"]}
    for row in told["rows"]:
        times = row["us"]
        assert row["strategy"] in times and {SERIAL, row["strategy"]} <= set(times) <= set(STRATEGIES)
        assert all(0 < time < math.inf for time in times.values())
        assert row["gain_us"] >= 0 and (row["gain_us"] == 0) == (row["strategy"] == SERIAL)
        if row["tokens"] <= measured.MOST_TOKENS:
            least, most = row["step_percent"]
            assert 0 <= least <= most < 100
