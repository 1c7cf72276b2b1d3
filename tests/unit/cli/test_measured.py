"""``check --measure``: the model of a step against recorded ones, what is printed, and every way to fail. No vLLM runs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from typer.testing import CliRunner, Result

from overlay.cli import checkpoint, measured, vllms
from overlay.cli.app import app
from overlay.cli.bench import formats, memory, shapes
from overlay.cli.bench.workers import WorkerError
from overlay.cli.failure import CommandError
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY, DUAL, PATCH_NAMES, SERIAL, STRATEGIES
from tests.unit.cli.test_checkpoint import JUNK

APPLIES = {name: Verdict(APPLY, "the shape is known") for name in PATCH_NAMES}
TEXTS = {name: shapes.find(name, None).text for name in shapes.SHAPES}
RECORDED = sorted(REPOSITORY.glob("benchmarks/results/h200-vllm-0.33.0-f*/**/results.json"))
H200 = {"device": "NVIDIA H200", "bytes_per_second": 4.0e12}


def judged(folder: Path, content: object, shards: int = 1) -> checkpoint.Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    names = " ".join(f'"{one}"' for one in ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration"))
    return checkpoint.judge(str(folder), APPLIES, lambda _: names, shards, lora=False)


# ---------------------------------------------------------------- the model of a step


def recorded_layers(folder: Path) -> Iterator[tuple[str, dict[str, Any], tuple[int, int], int, float]]:
    """Name, text of a single layer without a head, bits, tokens, and microseconds of stock's timeline."""
    for file in RECORDED:
        content = json.loads(file.read_text())
        model = shapes.Model("m", content["model"]["config"])
        (group, *_) = judged(folder, model.config).groups
        text = {**model.text, "num_hidden_layers": 1, "layer_types": ["linear_attention"], "vocab_size": 0}
        for row in content.get("timeline", ()):
            segment = row["arms"].get("stock", {}).get("segment")
            if segment is not None and group.shape is not None:
                yield str(file), text, group.shape.bits, row["requests"], segment["median"]


@pytest.mark.parametrize("terabytes", [3.9, 4.2, 4.4])
def test_every_recorded_layer_lies_within_the_model(tmp_path: Path, terabytes: float) -> None:
    """So the two numbers of BEYOND_US are those of the records, whatever of these a copy of that GPU had."""
    seen = set()
    for name, text, bits, tokens, microseconds in recorded_layers(tmp_path / "m"):
        least, most = measured.step_us(text, bits, tokens, 1, terabytes * 1e12)
        assert least <= microseconds <= most, (name, tokens, least, microseconds, most)
        seen.add((bits, tokens))
    assert {tokens for _, tokens in seen} == {1, 8, measured.MOST_TOKENS}
    assert {bits for bits, _ in seen} == {(16, 16), (8, 8), (8, 4), (16, 4), (4, 4)}


@given(
    name=st.sampled_from(sorted(TEXTS)),
    bits=st.tuples(st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16])),
    tokens=st.integers(1, 512),
)
def test_a_step_reads_more_with_more_tokens_and_never_more_than_there_is(
    name: str, bits: tuple[int, int], tokens: int
) -> None:
    text = TEXTS[name]
    one, more = (measured.step_bytes(text, bits, count, 1) for count in (tokens, tokens + 1))
    assert 0 < one < more
    assert math.isclose(measured.step_bytes(text, bits, tokens, 4) * 4, one)
    model = shapes.Model("", text)
    states = 2 * tokens * model.linear_layers() * memory.state_bytes(text)
    head, projections, feed_forward = memory.parameters_by_kind(model)
    assert one - states <= head * 2 + (projections * bits[0] + feed_forward * bits[1]) / 8
    least, most = measured.step_us(text, bits, tokens, 1, 4e12)
    assert one / 4e12 * 1e6 < least < most


def test_one_token_reads_the_experts_that_it_chooses() -> None:
    """Of the 35B in bf16: 3.0 of 35 billion weights are active, 0.5 of them the embedding that is not read."""
    read = measured.step_bytes(TEXTS["Qwen3.5-35B-A3B"], (16, 16), 1, 1) / 2
    assert 2.3e9 < read < 3.1e9


@pytest.mark.parametrize("form", formats.FORMATS)
def test_the_widths_are_the_formats(form: str, tmp_path: Path) -> None:
    (group, *_) = judged(tmp_path, dict(shapes.find("Qwen3.5-35B-A3B", 4).with_format(form).configuration)).groups
    kind = formats.FORMATS[form]
    assert group.shape is not None
    assert group.shape.bits == (round(kind.projections * 8 - 0.1), round(kind.feed_forward * 8 - 0.1))


@pytest.mark.parametrize(("shape", "parts"), [("Qwen3.5-35B-A3B", 4), ("tiny", 4)])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_built_is_a_shard(shape: str, parts: int, shards: int, tmp_path: Path) -> None:
    """vLLM's own linears have these columns: `tests/engine/test_measure_engine.py`."""
    (group, *_) = judged(tmp_path, shapes.find(shape, 8).config, shards).groups
    text, built = TEXTS[shape], group.shape
    assert built is not None and len(built.layers) == group.layers == 6 and len(built.main) == parts
    assert built.layers[3] == "language_model.model.layers.4.linear_attn"
    assert dict(group.sizes) == {"hidden": built.hidden, "qkvz": sum(built.main), "ba": sum(built.side)}
    assert built.side == (text["linear_num_value_heads"] // shards,) * 2


# ---------------------------------------------------------------- the command


class Vllm:
    """Stands for the process: answers `measure` with the rows that it has, and keeps what was asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked, self.machine = answer, [], dict(H200)

    def call(self, command: str, **asked: Any) -> Any:
        self.asked.append((command, asked))
        if isinstance(self.answer, Exception):
            raise self.answer
        return json.loads(json.dumps(self.answer))

    @contextlib.contextmanager
    def opened(self, _: checkpoint.Checkpoint) -> Iterator[tuple[Any, dict[str, Any]]]:
        yield self, self.machine


def rows(*sizes: int) -> dict[str, Any]:
    each = [{"tokens": size, "us": {SERIAL: 12.0, DUAL: 12.0 - 3.5}, "strategy": DUAL} for size in sizes]
    return {"pair": "2048 to 12288 (A) + 64 (B), torch.bfloat16", "seconds": 2.25, "rows": each}


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(memory, "gpus", lambda: [(0, "NVIDIA H200", 1 << 37)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    registry = stub_vllm.FILES[stub_vllm.REGISTRY].replace("{", '{"Qwen3_5MoeForConditionalGeneration": ("a", "b"), ')
    stub_vllm.write(tmp_path, {stub_vllm.REGISTRY: registry}, transformers=None)
    monkeypatch.setattr(vllms, "_installed", lambda: vllms.find(str(tmp_path), None))
    content = shapes.find("Qwen3.5-35B-A3B", 40).with_format("fp8-block").configuration
    (tmp_path / "config.json").write_text(json.dumps(content))

    def command(vllm: Vllm, *arguments: str) -> Result:
        monkeypatch.setattr(measured, "opened", vllm.opened)
        return CliRunner().invoke(app, ["check", "--model", str(tmp_path), "--measure", *arguments])

    return command


def test_the_table_has_gains_per_layer_and_per_step(run: Run) -> None:
    result = run(Vllm(rows(1, 2, 24, 64, 128)))
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if "measured on this" in line)
    assert line.endswith("NVIDIA H200 in 2.2 s with random weights: 2048 to 12288 (A) + 64 (B), torch.bfloat16")
    table = [line.split() for line in result.stdout.splitlines() if DUAL in line.split()]
    assert [row[0] for row in table] == ["1", "2", "64", "128"]  # 24 is in --json
    assert table[0][1:6] == ["12.0", "8.5", DUAL, "3.5", "105.0"]
    (least, to, most), nothing = table[0][6:], table[3][6:]
    assert to == "to" and 0 < float(least) < float(most) < 10 and nothing == []
    assert "4.00 TB/s" in result.stdout and "all-reduces" not in result.stdout


def test_json_has_every_size_under_its_group(run: Run) -> None:
    vllm = Vllm(rows(1, 24, 64, 65))
    content = json.loads(run(vllm, "--tp", "2", "--json").stdout)["model"]
    (group,) = (one for one in content["groups"] if "measured" in one)
    (command, asked), *others = vllm.asked
    assert (command, asked["patch"], len(asked["layers"]), others) == ("measure", "gdn", group["layers"], [])
    assert (sum(asked["main"]), sum(asked["side"])) == (group["sizes"]["qkvz"], group["sizes"]["ba"])
    found = group["measured"]
    assert (found["device"], found["bytes_per_second"], found["seconds"]) == ("NVIDIA H200", 4.0e12, 2.25)
    assert [row["tokens"] for row in found["rows"]] == [1, 24, 64, 65]
    for row in found["rows"]:
        assert (row["gain_us"], row["step_gain_us"]) == (3.5, 3.5 * group["layers"])
        assert (row["step_percent"] is None) == (row["tokens"] > measured.MOST_TOKENS)
    (first, last) = (found["rows"][index]["step_percent"] for index in (0, 2))
    assert 0 < last[0] < first[0] < first[1] and last[1] < first[1]


@given(
    microseconds=st.dictionaries(st.sampled_from(STRATEGIES), st.floats(0.1, 1e4), min_size=1),
    layers=st.integers(1, 100),
    tokens=st.integers(1, 600),
)
def test_the_gain_is_that_of_the_plan_and_its_interval_is_in_order(
    microseconds: dict[str, float], layers: int, tokens: int
) -> None:
    times = {SERIAL: 50.0, **microseconds}
    strategy = min(times, key=lambda name: times[name])
    answer = {"pair": "", "seconds": 1.0, "rows": [{"tokens": tokens, "us": times, "strategy": strategy}]}
    text = TEXTS["Qwen3.5-35B-A3B"]
    shape = checkpoint.Shape(("a",), 2048, (1,), (1,), (8, 8))
    group = checkpoint.Group("gdn", layers, APPLY, "", shape=shape)
    found = checkpoint.Checkpoint(
        checkpoint.Configuration(Path("x"), {**text, "num_hidden_layers": layers, "layer_types": None}),
        "",
        "",
        1,
        (),
        (),
    )
    (row,) = measured._of_group(found, group, Vllm(answer), H200)["rows"]
    assert row["gain_us"] >= 0 and math.isclose(row["gain_us"], times[SERIAL] - times[strategy], abs_tol=0.01)
    assert math.isclose(row["step_gain_us"], row["gain_us"] * layers, abs_tol=0.1)
    if row["step_percent"] is not None:
        least, most = row["step_percent"]
        assert 0 <= least <= most and all(map(math.isfinite, (least, most)))


def test_layers_that_stay_stock_on_this_gpu_have_their_reason(run: Run) -> None:
    reason = "quantization method AutoGPTQLinearMethod with MacheteLinearKernel is not on the allowlist"
    result = run(Vllm({"stock": reason}))
    assert result.exit_code == 0 and f"its 30 layers stay stock on this NVIDIA H200: {reason}" in result.stdout
    (group, *_) = json.loads(run(Vllm({"stock": reason}), "--json").stdout)["model"]["groups"]
    assert group["measured"] == {**H200, "stock": reason}


def test_a_checkpoint_without_such_layers_needs_no_vllm(run: Run, tmp_path: Path) -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    vllm = Vllm(rows(1))
    result = run(vllm)
    assert result.exit_code == 0 and "nothing to measure" in result.stdout and vllm.asked == []
    assert "measured" not in run(vllm, "--json").stdout


# ---------------------------------------------------------------- every way to fail


def one_line(result: Result, status: int) -> str:
    """Nothing else is printed."""
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    return str(line)


def test_without_a_gpu_nothing_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = Vllm(rows(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--measure needs an NVIDIA GPU, and none is visible here" in one_line(run(vllm), 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(memory, "gpus", list)
    assert "--measure needs an NVIDIA GPU" in one_line(run(vllm, "--json"), 2)
    assert vllm.asked == []


def test_a_torch_without_cuda_is_as_no_gpu(run: Run) -> None:
    vllm = Vllm(rows(1))
    vllm.machine["device"] = None
    assert "this Python's torch sees none" in one_line(run(vllm), 2)


def test_another_vllm_cannot_be_measured(run: Run, tmp_path: Path) -> None:
    assert f"does not go with --vllm={str(tmp_path)!r}" in one_line(run(Vllm(rows(1)), "--vllm", str(tmp_path)), 2)


def test_no_vllm_is_said_before_anything_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise CommandError("no vLLM is installed in this Python")

    monkeypatch.setattr(vllms, "_installed", none)
    assert "no vLLM is installed in this Python" in one_line(run(Vllm(rows(1))), 2)


def test_a_failure_inside_vllm_is_its_reason_and_status_1(run: Run) -> None:
    said = one_line(run(Vllm(WorkerError("vLLM: measure: ValueError: no kernel (log: /tmp/x)"))), 1)
    assert said == "error: --measure: vLLM: measure: ValueError: no kernel (log: /tmp/x)"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["vocab_size", "num_experts_per_tok", "moe_intermediate_size", "head_dim"]), junk=JUNK)
def test_sizes_that_are_none_are_one_message(key: str, junk: Any, tmp_path: Path) -> None:
    """They are asked before vLLM is started."""
    content = dict(shapes.find("Qwen3.5-35B-A3B", 4).config)
    content["text_config"] = {**content["text_config"], key: junk}
    found = judged(tmp_path, content)
    (shape,) = (group.shape for group in found.groups if group.shape is not None)
    with contextlib.suppress(CommandError):
        measured._check_sizes(found, shape)
        least, most = measured.step_us(found.config.text, shape.bits, measured.MOST_TOKENS, 1, 4e12)
        assert least <= most


# ---------------------------------------------------------------- the process


def test_a_process_that_ends_leaves_one_line_and_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(tmp_path / "m", shapes.find("tiny", 4).config)
    commands = tmp_path / "commands.py"
    commands.write_text("print('the last words\\nof it', flush=True)\nraise SystemExit(3)\n")
    monkeypatch.setattr(measured, "COMMANDS", commands)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(WorkerError) as caught, measured.opened(found):
        raise AssertionError("it has not answered")
    said = str(caught.value)
    assert "ended with status 3 the last words of it (log: " in said and "\n" not in said
    assert "the last words" in Path(said.rpartition("log: ")[2].rstrip(")")).read_text()
