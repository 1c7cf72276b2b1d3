"""What of the z overlap experiment (benchmarks/gpu/z_overlap.py) can be tested without a GPU."""

from __future__ import annotations

import ast
import inspect
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import z_overlap

RELEASES = REPOSITORY / ".cache" / "releases"
#: Release, kernel, the file that defines it.
KERNELS = [
    ("0.20.0", "causal_conv1d_update", "model_executor/layers/mamba/ops/causal_conv1d.py"),
    ("0.33.0", "causal_conv1d_update", "model_executor/layers/mamba/ops/causal_conv1d.py"),
    *(
        (release, kernel, f"{folder}/{name}.py")
        for release, folder in (
            ("0.20.0", "model_executor/layers/fla/ops"),
            ("0.33.0", "third_party/flash_linear_attention/ops"),
        )
        for kernel, name in (
            ("fused_recurrent_gated_delta_rule_packed_decode", "fused_recurrent"),
            ("fused_sigmoid_gating_delta_rule_update", "fused_sigmoid_gating"),
            ("rmsnorm_fn", "layernorm_guard"),
        )
    ),
]


def signature_in(path: Path, name: str) -> inspect.Signature:
    """The signature of a function in a source file that cannot be imported here."""
    text = path.read_text()
    found = ast.parse(text[text.index(f"def {name}(") :].split("\n\n\n")[0]).body[0]
    assert isinstance(found, ast.FunctionDef)
    required = len(found.args.args) - len(found.args.defaults)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(argument.arg, kind, default=inspect.Parameter.empty if index < required else None)
            for index, argument in enumerate(found.args.args)
        ]
    )


class Recorder:
    """In the place of a kernel of vLLM: binds every call to the signature of the release's source."""

    def __init__(self, signature: inspect.Signature, result: Any) -> None:
        self.signature, self.result = signature, result
        self.bound: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.bound = self.signature.bind(*args, **kwargs).arguments
        return self.result


@pytest.mark.contract
@pytest.mark.parametrize(("release", "kernel", "path"), KERNELS)
def test_kernels_are_called_as_the_release_defines_them(
    release: str, kernel: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RELEASES / release / "vllm" / path
    if not source.is_file():
        pytest.skip(f"the sources of vLLM {release} are not here")
    heads, width = 2, 8
    recorder = Recorder(signature_in(source, kernel), (torch.ones(1, 3, heads, width), None))
    linear_attention = SimpleNamespace(__name__="ops", **{kernel: recorder})
    monkeypatch.setattr(z_overlap, "_linear_attention_ops", lambda: (linear_attention, True))
    mixed, gates = torch.randn(3, 4 * width), torch.randn(2, 3, heads)
    state, out, slots = torch.randn(4, heads, width, width), torch.zeros(3, 1, heads, width), torch.arange(1, 4)
    recurrence = (mixed, gates[1], gates[0], torch.zeros(heads), torch.zeros(heads), state, out, slots)
    if kernel == "causal_conv1d_update":
        module = SimpleNamespace(causal_conv1d_update=recorder)
        monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.mamba.ops.causal_conv1d", module)
        z_overlap.vllm_convolution()(mixed, state, mixed, slots)
        assert recorder.bound["x"] is mixed and recorder.bound["conv_state_indices"] is slots
        assert recorder.bound["bias"] is None and recorder.bound["activation"] == "silu"
    elif kernel == "rmsnorm_fn":
        monkeypatch.setattr(z_overlap.importlib, "import_module", lambda name: linear_attention)
        monkeypatch.setattr(z_overlap.torch, "ones", lambda *size, **_: torch.zeros(*size))
        z_overlap.vllm_triton_norm()(out, state)
        assert recorder.bound["z"] is state and recorder.bound["norm_before_gate"]
    else:
        packed = kernel.endswith("packed_decode")
        make = z_overlap.vllm_packed_recurrence if packed else z_overlap.vllm_unpacked_recurrence
        make()(*recurrence)
        assert recorder.bound["a"] is recurrence[1] and recorder.bound["initial_state"] is state
        if not packed:
            assert recorder.bound["cu_seqlens"].tolist() == [0, 1, 2, 3]
            assert recorder.bound["q"].shape == (1, 3, 1, width) and recorder.bound["v"].shape == (1, 3, heads, width)
            assert bool((out == 1).all())


def test_shapes_have_the_columns_of_the_models() -> None:
    found = {shape.name: (shape.hidden, shape.qkv + shape.z, shape.z, shape.ba) for shape in z_overlap.SHAPES}
    assert found == {
        "35b-tp1": (2048, 12288, 4096, 64),
        "35b-tp4": (2048, 3072, 1024, 16),
        "27b-tp1": (5120, 16384, 6144, 96),
    }


def test_weights_that_the_rest_of_a_layer_reads() -> None:
    dense = z_overlap.Mlp(intermediate=10)
    assert dense.weight_bytes(4, tokens=1, shards=1) == dense.weight_bytes(4, tokens=64, shards=1) == 2 * 3 * 4 * 10
    mixture = z_overlap.Mlp(intermediate=10, experts=8, chosen=2, shared=5)
    # One token: two experts, the shared one, the router, which is on every shard.
    assert mixture.weight_bytes(4, tokens=1, shards=1) == pytest.approx(2 * 4 * (3 * (2 * 10 + 5) + 8))
    assert mixture.weight_bytes(4, tokens=10_000, shards=2) == pytest.approx(2 * 4 * (3 * (8 * 10 + 5) / 2 + 8))


def test_stand_ins_compute_what_the_papers_say() -> None:
    torch.manual_seed(0)
    state = torch.zeros(3, 4, 3)
    weight, steps = torch.randn(4, 4), torch.randn(6, 1, 4)
    slots = torch.tensor([2], dtype=torch.int32)
    outputs = torch.cat([z_overlap.plain_convolution(x, state, weight, slots) for x in steps])
    padded = torch.nn.functional.pad(steps[:, 0].T, (3, 0))
    expected = torch.nn.functional.conv1d(padded[None], weight[:, None], groups=4)[0].T
    torch.testing.assert_close(outputs, torch.nn.functional.silu(expected))
    assert bool((state[:2] == 0).all())

    # Without decay and with a full correction, a value stored under a key is read back with that key as the query.
    memory, out = torch.randn(2, 1, 4, 4), torch.zeros(1, 1, 1, 4)
    key, value, never = torch.tensor([1.0, 0, 0, 0]), torch.randn(4), torch.full((1, 1), -100.0)
    mixed = torch.cat((key, key, value))[None]
    z_overlap.plain_recurrence(mixed, never, -never, torch.zeros(1), torch.zeros(1), memory, out, torch.tensor([1]))
    torch.testing.assert_close(out.flatten(), value / 2)
    torch.testing.assert_close(memory[1, 0, :, 0], value)


@pytest.mark.parametrize(("count", "edge"), [(5, 0), (6, 0), (9, 1), (30, 9)])
def test_interval_of_the_median_is_the_known_pair_of_order_statistics(count: int, edge: int) -> None:
    values = [float(index) for index in range(count)]
    random.Random(0).shuffle(values)
    assert z_overlap.interval(values) == ((count - 1) / 2, float(edge), float(count - 1 - edge))


def _row(candidate: float, tokens: int = 8) -> dict[str, Any]:
    ratio = {name: [1.0, 1.0, 1.0] for name in z_overlap.ARRANGEMENTS}
    ratio |= {"z_after": [candidate, candidate - 0.01, candidate + 0.01], "z_omitted": [0.8, 0.8, 0.8]}
    return {"tokens": tokens, "us": {"dual": 40.0}, "ratio": ratio}


def test_gain_of_a_step_takes_the_best_candidate_over_the_time_of_a_layer() -> None:
    shape = z_overlap.SHAPES[0]
    gain = z_overlap.step_gain(shape, _row(0.9), {("35b-tp1", 8): (200.0, "given")})
    # 4 of 40 us in three of four layers of 200 us.
    assert gain["best"] == "z_after" and gain["layer_us_from"] == "given"
    assert gain["step_gain_percent"] == 1.5 and gain["step_gain_interval"] == [1.35, 1.65]
    assert gain["step_gain_bound_percent"] == 3.0
    assert gain["pays_below_layer_us"] == 100.0


def test_without_a_time_of_the_layer_the_gain_is_an_upper_bound() -> None:
    shape = z_overlap.SHAPES[1]
    gain = z_overlap.step_gain(shape, _row(0.9), {})
    rest = shape.mlp.weight_bytes(shape.hidden, 8, 1) / z_overlap.PEAK_BYTES
    assert gain["layer_us_from"] == "lower bound" and gain["layer_us"] == pytest.approx(30.0 + rest, abs=0.1)
    assert gain["step_gain_percent"] == pytest.approx(100 * 3.0 / (30.0 + rest), abs=0.01)


def test_times_of_layers_come_from_the_results_unless_given() -> None:
    times = z_overlap.layer_times("0.20.0", {("35b-tp1", 8): 150.0, ("35b-tp4", 1): 60.0})
    assert times["35b-tp1", 8] == (150.0, "given") and times["35b-tp4", 1] == (60.0, "given")
    microseconds, source = times["35b-tp1", 16]
    assert source == "engine" and 200 < microseconds < 300  # a step of 6.2 ms over 24 layers
    assert z_overlap.layer_times("9.9.9", {}) == {}


def test_step_times_are_read_with_and_without_a_shape() -> None:
    assert z_overlap.step_times("1=155,35b-tp4/8=80.5") == {("35b-tp1", 1): 155.0, ("35b-tp4", 8): 80.5}
    for wrong in ("8", "x/8=1", "=5", "8=fast"):
        with pytest.raises(ValueError, match=r"wanted|could not convert"):
            z_overlap.step_times(wrong)


def _run(name: str, lanes: Any) -> torch.Tensor:
    torch.manual_seed(0)
    shape = z_overlap.TINY[0]
    layer = z_overlap.Layer(shape, 4, torch.device("cpu"), torch.float32)
    z_overlap.reset([layer])
    x, spare = torch.randn(3, shape.hidden), torch.randn(3, shape.z)
    slots = torch.arange(1, 4, dtype=torch.int32)
    return z_overlap.stage(layer, x, slots, spare, z_overlap.ARRANGEMENTS[name], lanes, z_overlap.Kernels())


@pytest.mark.parametrize("name", z_overlap.ARRANGEMENTS)
def test_every_arrangement_waits_for_what_it_needs_and_gives_the_same(name: str) -> None:
    lanes = z_overlap.CheckedLanes()
    result = _run(name, lanes)
    how = z_overlap.ARRANGEMENTS[name]
    assert ("main" if how.z is None else how.z, "z") in lanes.order and (how.ba, "ba") in lanes.order
    if how.after_qkv:
        assert lanes.order.index((z_overlap.MAIN, "qkv")) < lanes.order.index((how.z, "z"))
    if name == z_overlap.BOUND:
        assert not torch.allclose(result, _run(z_overlap.REFERENCE, z_overlap.CheckedLanes()))
    else:
        torch.testing.assert_close(result, _run(z_overlap.REFERENCE, z_overlap.CheckedLanes()))


@pytest.mark.parametrize("name", ["dual", *z_overlap.CANDIDATES])
def test_a_missing_wait_is_seen(name: str) -> None:
    class Careless(z_overlap.CheckedLanes):
        """Leaves out the one wait whose number it is given."""

        def __init__(self, left_out: int) -> None:
            super().__init__()
            self.left_out, self.waits = left_out, 0

        def wait(self, lane: str, mark: frozenset[str]) -> None:
            self.waits += 1
            if self.waits != self.left_out:
                super().wait(lane, mark)

    counted = Careless(0)
    _run(name, counted)
    seen = 0
    for left_out in range(1, counted.waits + 1):
        try:
            _run(name, Careless(left_out))
        except RuntimeError:
            seen += 1
    # z that follows ba on one stream needs no fork of its own, whatever it waits for.
    assert seen == counted.waits - (name in ("z_beside", "z_after"))


def test_dry_run_writes_every_row(tmp_path: Path) -> None:
    out = tmp_path / "z.json"
    assert z_overlap.main(["--dry-run", "--out", str(out), "--layers", "2", "--tokens", "1,5"]) == 0
    found = json.loads(out.read_text())
    assert found["complete"] and [row["tokens"] for row in found["rows"]] == [1, 5]
    for row in found["rows"]:
        assert row["finite"] and set(row["against_serial"]) == {"dual", "dual_split", *z_overlap.CANDIDATES}
        assert all(entry["largest"] < 1e-4 for entry in row["against_serial"].values())


def test_table_leaves_out_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    row = {**_row(0.9), "shape": "35b-tp1", "finite": True, "gemm_bits_equal": {"qkv": True, "z": False}}
    row["us"] = {name: 40.0 for name in z_overlap.ARRANGEMENTS if name != "z_beside"}
    del row["ratio"]["z_beside"]
    row["against_serial"] = {name: {"layers_different": 2} for name in z_overlap.CANDIDATES}
    row["step"] = z_overlap.step_gain(z_overlap.SHAPES[0], row, {("35b-tp1", 8): (200.0, "engine")})
    z_overlap.print_table([row, {"shape": "27b-tp1", "tokens": 1, "error": "RuntimeError: no"}])
    text = capsys.readouterr().out
    assert "failed" in text and "PROBLEM 27b-tp1 N=1: RuntimeError: no" in text
    assert "1.50" in text and "engine" in text
    assert "gain of 3.0 % or more: nowhere" in text and "bound of 3.0 % or more: 35b-tp1 N=8" in text
