"""What of the LoRA evidence (benchmarks/lora_evidence.py) can be tested without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lora_evidence
from benchmarks.gpu import driver, lora_engines, lora_model, lora_report, lora_trace
from overlay.cli.bench import engines, plots, report, results
from overlay.cli.bench.setup import Setup
from overlay.cli.bench.timeline import Kernel
from overlay.cli.failure import CommandError
from tests.conftest import REPOSITORY

GEMM, SHRINK, EXPAND = "nvjet_tst_128x8_64x12_2x1_v_bz_TNT", "_lora_shrink_kernel", "_lora_expand_kernel"
ATTENTION = "void cutlass::device_kernel<flash::FlashAttnFwdSm90>"


def _kernel(name: str, start: float, duration: float, stream: int) -> Kernel:
    return Kernel(name, str(stream), start, duration)


def _trace(dual: bool, linears: int) -> list[Kernel]:
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
    found = lora_trace.analyse(_trace(dual, 8), steps=2)
    assert found["lora_kernels_per_step"] == 8
    assert (found["lora_us_per_step"], found["gemm_us_per_step"]) == (40.0, 80.0)
    assert found["hidden_share"] == (1.0 if dual else 0.0)
    assert found["lora_streams"] == (["13"] if dual else ["7"]) and found["gemm_streams"] == ["7"]
    assert found["busy_us_per_step"] == (100.0 if dual else 140.0)


def test_lora_kernels_half_under_a_gemm_and_next_to_attention_count_half() -> None:
    events = [_kernel(GEMM, 0, 10, 7), _kernel(SHRINK, 8, 4, 13), _kernel(ATTENTION, 10, 10, 7)]
    assert lora_trace.analyse(events, 1)["hidden_share"] == pytest.approx(0.5)


def test_a_trace_without_lora_kernels_has_no_share() -> None:
    assert lora_trace.analyse([], 1)["hidden_share"] is None


Interval = tuple[float, float, float]


@pytest.mark.parametrize(
    ("upstream", "overlay", "expected"),
    [
        ((0.97, 0.96, 0.98), (0.93, 0.92, 0.94), "met"),
        ((0.97, 0.96, 0.98), (0.955, 0.945, 0.96), "within"),
        ((0.97, 0.96, 0.98), (0.97, 0.96, 0.98), "missed"),
        ((0.99, 0.97, 1.01), (0.99, 0.98, 1.01), None),
        ((0.90, 0.89, 0.91), (1.02, 1.01, 1.03), "missed"),
        (None, (0.93, 0.92, 0.94), None),
    ],
)
def test_the_goal(upstream: Interval | None, overlay: Interval, expected: str | None) -> None:
    found = {"upstream": upstream, "overlay": overlay}
    arms = {arm: dict(zip(("ratio", "low", "high"), values, strict=True)) for arm, values in found.items() if values}
    assert lora_engines.goal({"arms": arms}) == expected


def _answer(*tokens: int, logprobs: str = "a") -> dict[str, Any]:
    return {"tokens": [[token] for token in tokens], "logprobs": logprobs}


def _case(found: dict[str, Any], *again: dict[str, Any]) -> dict[str, Any]:
    return {"case": "case", "requests": 2, **engines.token_row(found, *(again or (found["stock"],)))}


def test_upstreams_switch_need_not_have_stocks_tokens_and_the_overlay_must() -> None:
    row = _case({"stock": _answer(1, 2), "upstream": _answer(1, 3), "overlay": _answer(1, 2)})
    assert results.different({"tokens": [row]}) == []
    row = _case({"stock": _answer(1, 2), "upstream": _answer(1, 2), "overlay": _answer(1, 3)})
    assert results.different({"tokens": [row]}) == ["overlay, case: 1 of 2 requests"]


def test_equal_tokens_with_other_log_probabilities_are_a_fault_too() -> None:
    row = _case({"stock": _answer(1), "overlay": _answer(1, logprobs="b")})
    assert lora_engines.token_faults(row) == ["case: the overlay's log probabilities differ"]
    row = _case({"stock": _answer(1), "overlay": _answer(1, logprobs="b"), "control": _answer(1, logprobs="c")})
    assert lora_engines.token_faults(row) == [], "stock started twice differs as well"


def test_a_stock_that_does_not_repeat_itself_proves_nothing() -> None:
    found = {"stock": _answer(1), "overlay": _answer(2, logprobs="c")}
    row = _case(found, _answer(1), _answer(1, logprobs="b"))
    assert (row["stock_repeats_itself"], row["stock_repeats_logprobs"]) == (True, False)
    assert lora_engines.token_faults(row) == []
    row = _case(found, _answer(1), _answer(3))
    assert results.different({"tokens": [row]}) == []


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


def options_of(folder: Path, *words: str) -> Any:
    given = ["run", "--out", str(folder), "--work", str(folder), "--site", "/site", "--ranks", "8,16", *words]
    return lora_evidence.parse(given)


def test_the_arms_differ_by_the_switch_and_by_the_overlay_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lora_engines.SWITCH, "1")  # of the caller: not for any arm
    setup = lora_engines.setup_of(options_of(tmp_path))
    assert setup.arms == ("stock", "upstream", "overlay")
    stock, upstream, overlay = (setup.environment(arm, "run") for arm in setup.arms)

    def different(other: dict[str, str]) -> set[str]:
        return {name for name in stock.keys() | other.keys() if stock.get(name) != other.get(name)}

    caches = {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"}
    assert different(upstream) == {lora_engines.SWITCH, *caches}
    assert different(overlay) == {"PYTHONPATH", "VLLMOVERLAY_JOURNAL_DIR", *caches}
    assert len({environment["VLLM_CACHE_ROOT"] for environment in (stock, upstream, overlay)}) == 3
    assert lora_engines.setup_of(options_of(tmp_path, "--control")).arms == ("stock", "upstream", "control", "overlay")


def test_upstreams_switch_is_left_out_off_cuda(tmp_path: Path) -> None:
    setup = lora_engines.setup_of(options_of(tmp_path, "--cpu"))
    assert setup.arms == ("stock", "overlay")
    assert setup.environment("overlay", "run")[lora_engines.PASS_THROUGH] == "1"


def test_there_is_a_slot_for_every_adapter_and_one_more(tmp_path: Path) -> None:
    options = options_of(tmp_path, "--uncompiled", "--engine", "block_size=32")
    arguments = lora_engines.engine_arguments(lora_engines.setup_of(options), options, Path("/model"))
    assert (arguments["max_loras"], arguments["max_lora_rank"], arguments["enable_lora"]) == (3, 16, True)
    assert arguments["max_num_seqs"] == 64 and arguments["block_size"] == 32
    assert "additional_config" not in arguments
    assert arguments["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 32, 64]


def test_the_format_is_in_the_configuration(tmp_path: Path) -> None:
    config = lora_engines.configuration(options_of(tmp_path, "--format", "fp8-block"))
    assert config["quantization_config"]["quant_method"] == "fp8" and config["hidden_size"] == 4096


class Engines(lora_engines.LoraEngines):
    """Every arm gives the same answers, which follow from what was asked. `deaf`: as if adapters changed nothing."""

    deaf = False

    def all(self, command: str, turn: int = 0, **asked: Any) -> dict[str, Any]:
        self.asked.append((command, asked))
        return {arm: self._answer(command, **asked) for arm in ("stock", "overlay")}

    def _answer(self, command: str, **asked: Any) -> Any:
        if command == "decode_steps":
            return {"mean": 0.01, "median": 0.01}
        if command == "kernels":
            return {"names": [GEMM, SHRINK], "kernels": [[0, 7, 0.0, 10.0], [1, 13, 2.0, 4.0]]}
        adapters = asked.get("adapters", ("churn",))
        return _answer(*(hash((asked.get("seed"), not self.deaf and adapter)) for adapter in adapters))


class Asked:
    """Stands for the worker of stock, which repeats itself."""

    def __init__(self, alive: Engines) -> None:
        self.alive = alive

    def call(self, command: str, **asked: Any) -> Any:
        return self.alive._answer(command, **asked)


def alive_in(folder: Path, *words: str) -> Engines:
    options = options_of(folder, "--batches", "1,2", "--other-batches", "1,2", "--prompts", "8,128", *words)
    options.phases = ("tokens", "decode", "trace")
    setup = lora_engines.setup_of(options)
    found = Engines(setup, results.Results(folder / "lora.json"), Quiet(), options)
    found.asked, found.paths = [], {"late": "/late", "dense": "/dense"}
    found.workers = {"stock": Asked(found), "overlay": None}
    return found


class Quiet:
    def phase(self, *_: object) -> None: ...

    def step(self, *_: object) -> None: ...


def test_every_case_is_compared_and_every_row_measured(tmp_path: Path) -> None:
    alive = alive_in(tmp_path)
    alive.compare_tokens()
    alive.compare_decode()
    alive.trace()
    data = alive.results.data
    assert data["problems"] == data["unfinished"] == []
    cases = [row["case"] for row in data["tokens"]]
    assert "rank 16, N=2" in cases and "mixed, N=1" not in cases and "rank 16, prompt 128" in cases
    assert cases[-1] == "values everywhere (atomics), N=2" and len(set(cases)) == len(cases)
    assert [command for command, _ in alive.asked].count("churn") == 1
    rows = [(row["group"], row["requests"]) for row in data["decode"]]
    groups = ("no adapter", "rank 8", "rank 16")
    assert rows == [*((group, count) for group in groups for count in (1, 2)), ("mixed", 2)]
    begun = [asked for command, asked in alive.asked if command == "decode_begin"]
    assert begun[-1]["adapters"] == (None, "rank 8", "rank 16") and "group" not in begun[-1]
    assert data["trace"]["overlay"]["hidden_share"] == 1.0


def test_adapters_that_change_nothing_are_a_problem(tmp_path: Path) -> None:
    alive = alive_in(tmp_path)
    alive.deaf = True
    alive.compare_tokens()
    assert "tokens, rank 8, N=1: the adapters change nothing" in alive.results.data["problems"]


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
    from benchmarks.gpu import lora_micro

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
    from vllm.forward_context import override_forward_context

    from benchmarks.gpu import lora_micro
    from overlay.patches.lora_linear import patch as lora_linear
    from overlay.side_work import ops

    monkeypatch.setattr(lora_linear, "take_over_shrink", lambda wrapper: None)
    monkeypatch.setattr(lora_linear, "Gated", lambda weights, gate: weights)
    monkeypatch.setattr(ops, "planned", {})

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
    traced = {"requests": 8, "rank": 16, **lora_trace.analyse(_trace(True, 4), 1)}
    micro = {"shards": 1, "rank": 16, "linear": "o", "tokens": 8, "gemm": 7.0, "serial": 12.0, "dual": 8.0}
    data = {
        "states": {"overlay": {"linears": 4, "classes": {"A": 4}, "switch": False}},
        "tokens": [_case(answers)],
        "decode": [{"group": "rank 8", "adapters": ["rank 8"], "requests": 4, **engines.paired_row(sides)}],
        "first_token": [{"prompt": 128, **engines.paired_row(sides)}],
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
    for text in (
        "rank 8, 5 % faster than stock where upstream's switch gains: missed at N=4",
        "overlay, decode step, N: slower rank 8, 4",
        "1.100 [1.100..1.100]",
        "0.667",
        "PROBLEM overlay: NO CALL ON TWO",
    ):
        assert text in shown
    assert plots.write(data, tmp_path) == [tmp_path / "ratio.png"]


def test_a_part_that_runs_alone_gives_what_it_wrote_or_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path, tmp_path, str(tmp_path), 100.0)
    kept = results.Results(tmp_path / "lora.json")
    module = tmp_path / "alone.py"
    module.write_text("import sys; open(sys.argv[1], 'w').write('{\"seconds\": ' + sys.argv[2] + '}')")
    assert driver.run_alone(setup, kept, "alone", 2.5) == kept.data["micro"] == {"seconds": 2.5}
    module.write_text("")
    assert driver.run_alone(setup, kept, "alone", 2.5) == {} and "too few" in kept.data["unfinished"][0]
    module.write_text("raise SystemExit('out of memory')")
    assert driver.run_alone(setup, kept, "alone", 2.5) == {}
    assert "out of memory" in kept.data["problems"][0]


def test_results_of_the_earlier_scripts_name_their_reader(tmp_path: Path) -> None:
    kept = results.Results(tmp_path / "lora.json")
    driver.show([kept.path], lora_report.tables)
    kept.put("engines", value={})
    with pytest.raises(CommandError, match="commit 16d5be8"):
        driver.show([kept.path], lora_report.tables)
    earlier = REPOSITORY / "benchmarks" / "results" / "h200-vllm-0.20.0-lora" / "lora.json"
    with pytest.raises(CommandError, match="commit 16d5be8"):
        driver.show([earlier], lora_report.tables)


def test_bad_input_is_one_message_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(tmp_path, "--phases", "decode,dance")
    assert driver.main(options, lora_evidence.run, lora_evidence.PHASES, lora_report.tables) == 2
    assert "error: --phases='decode,dance': allowed are tokens, prefill" in capsys.readouterr().err


def test_the_cpu_run_is_small() -> None:
    options = lora_evidence.parse(["run", "--out", "/out", "--cpu"])
    assert max(options.batches) <= 4 and max(options.prompts) <= 512 and options.layers == 2
    assert options.max_lora_rank == 64 and options.trace_rank == 16
    with pytest.raises(SystemExit):
        lora_evidence.parse(["run", "--out", "/out", "--ranks", "8"])
