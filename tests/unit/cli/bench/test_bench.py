"""`python -m overlay bench`: what of it can be tested without an engine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from overlay.cli.app import app
from overlay.cli.bench import (
    closed_loop,
    command,
    compare,
    engines,
    intervals,
    memory,
    plots,
    report,
    servers,
    serving,
    shapes,
)
from overlay.cli.bench.progress import Progress
from overlay.cli.bench.results import Results, different
from overlay.cli.bench.setup import Setup
from overlay.cli.bench.workers import SCRIPT, Worker, WorkerError, halves, in_turn
from overlay.cli.failure import CommandError
from tests.conftest import REPOSITORY
from tests.unit import stub_vllm

LOAD = memory.Load(requests=256, request_tokens=480, prompt=8256, prefill=8192)
GIB = memory.GIB


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "billions", "layers", "qkvz", "ba"),
    [
        ("Qwen3.5-35B-A3B", 34.7, 40, 12288, 64),
        ("Qwen3.5-27B", 26.9, 64, 16384, 96),
        ("Qwen3-Next-80B-A3B", 79.7, 48, 12288, 64),
    ],
)
def test_named_shapes_have_the_published_sizes(name: str, billions: float, layers: int, qkvz: int, ba: int) -> None:
    model = shapes.find(name, None)
    text = model.text
    key = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    value = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    assert (model.layers, 2 * (key + value), 2 * text["linear_num_value_heads"]) == (layers, qkvz, ba)
    assert model.linear_layers() == layers * 3 // 4
    assert memory.parameters(model) / 1e9 == pytest.approx(billions, abs=0.1)


#: DeepSeek-V3's published sizes.
DEEPSEEK = {
    "hidden_size": 7168, "num_hidden_layers": 61, "vocab_size": 129280, "intermediate_size": 18432,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
}  # fmt: skip


def test_latent_attention_has_the_published_size_and_one_narrow_row_a_token() -> None:
    model = shapes.Model("DeepSeek-V3", DEEPSEEK)
    assert memory.parameters(model) / 1e9 == pytest.approx(671.0, abs=0.1)
    dense = model.with_layers(3)
    mlp = 3 * 7168 * 18432
    assert memory.parameters_by_kind(dense)[2] == 3 * mlp
    indexed = shapes.Model("DeepSeek-V3.2", {**DEEPSEEK, "index_n_heads": 64, "index_head_dim": 128})
    more = memory.parameters(indexed) - memory.parameters(model)
    assert more == 61 * (1536 * 64 * 128 + 7168 * (128 + 64))
    load = memory.Load(requests=256, request_tokens=64, prompt=64, prefill=2048)
    rows = 256 * 61 * 64 * memory.CACHE_SLACK * memory.WIDTH
    for ranks in (1, 8):  # no rank has a part of it
        assert memory.cache_bytes(model, load, ranks) == pytest.approx(rows * 576, rel=1e-6)
        assert memory.cache_bytes(indexed, load, ranks) == pytest.approx(rows * 704, rel=1e-6)


def test_fewer_layers_keep_the_pattern() -> None:
    model = shapes.find("Qwen3.5-27B", 8)
    assert model.text["layer_types"] == [*["linear_attention"] * 3, "full_attention"] * 2
    assert model.text["num_hidden_layers"] == model.layers == 8


@pytest.mark.parametrize("layers", [-4, 0, 1, 6])
def test_layers_that_break_the_pattern_are_refused(layers: int) -> None:
    with pytest.raises(CommandError, match=rf"--layers={layers}: .* every 4; allowed are 4 and multiples of it"):
        shapes.find("Qwen3.5-27B", layers)


def test_more_layers_than_any_model_has_are_refused_by_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["bench", "--layers", "1004"])
    assert ended.value.code == 2
    said = capsys.readouterr().err  # the words are those of the installed typer
    assert "--layers" in said and re.search(r"\b1000\b", said)


@pytest.mark.parametrize("nested", [True, False])
def test_an_own_configuration_may_be_a_file_or_its_folder(nested: bool, tmp_path: Path) -> None:
    text = {**shapes.find("tiny", None).text}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text} if nested else text))
    for place in (tmp_path, tmp_path / "config.json"):
        model = shapes.find(str(place), 12)
        assert (model.layers, model.linear_layers(), model.checkpoint) == (12, 9, None)


def test_a_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    shapes.write(tmp_path, shapes.find("tiny", None).config)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 4096)
    model = shapes.find(str(tmp_path), None)
    assert model.folder(tmp_path / "work") == model.tokenizer(tmp_path / "work") == tmp_path
    assert memory.need(model, LOAD).weights == 4096
    with pytest.raises(CommandError, match="its own weights"):
        model.with_layers(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON that can be read"),
        ("[" * 200_000, "nested too deep"),
        ("[]", "a list and no object"),
        ("{}", "num_hidden_layers is None; allowed is a whole number from 1"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers is 0; allowed"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'; allowed is a whole number from 1"),
        ({"hidden_size": float("nan")}, "hidden_size is nan; allowed"),
        ({"vocab_size": None}, "vocab_size is None; allowed"),
        ({"intermediate_size": None}, "intermediate_size is None; allowed"),
        ({"head_dim": "32"}, "head_dim is '32'; allowed is a whole number from 0"),
        ({"num_attention_heads": 65}, "num_attention_heads is 65; allowed is a whole number from 1 to 64"),
        ({"num_experts": 8}, "moe_intermediate_size is None; allowed"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim is None; allowed"),
        ({"linear_conv_kernel_dim": True}, "linear_conv_kernel_dim is True; allowed"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; allowed is a list"),
        ({"quantization_config": []}, "quantization_config is a list of length"),
    ],
)
def test_no_configuration_is_bad_input(content: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    """A file as it is, or what differs from the tiny shape."""
    file = tmp_path / "config.json"
    text = shapes.find("tiny", None).text
    file.write_text(content if isinstance(content, str) else json.dumps({**text, **content}))
    with pytest.raises(CommandError, match=re.escape(message)) as found:
        shapes.find(str(tmp_path), None)
    assert str(file) in str(found.value)


def test_an_unknown_model_names_the_shapes() -> None:
    with pytest.raises(CommandError, match=r"Qwen3\.5-35B-A3B"):
        shapes.find("no-such-model", None)


def test_every_word_of_the_tokenizer_is_a_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(shapes.write_tokenizer(tmp_path, 300) / "tokenizer.json"))
    numbers = [5, 6, 290, 0, 17]
    assert tokenizer.encode(tokenizer.decode(numbers)).ids == numbers


# ---------------------------------------------------------------- memory


def test_the_need_follows_from_the_sizes() -> None:
    """Qwen3.5-35B-A3B, one group of four layers, by hand."""
    model = shapes.find("Qwen3.5-35B-A3B", 4)
    linear = 2048 * (12288 + 64) + 4096 * 2048
    attention = 2048 * (2 * 4096 + 2 * 512) + 4096 * 2048
    experts = 3 * 2048 * 512 * 257 + 2048 * 256
    weights = 2 * 248320 * 2048 + 3 * linear + attention + 4 * experts
    assert memory.need(model, LOAD).weights == 2 * weights
    state = 32 * 128 * 128 * 4 + 3 * (2 * 2048 + 4096) * 2
    page = -(-state // 2048 // 16) * 16 * 2048  # 2048 bytes per token of a key and a value, in blocks of 16 tokens
    assert memory.cache_bytes(model, LOAD) == int(256 * 4 * page * memory.CACHE_SLACK)


def test_two_shards_halve_what_is_split() -> None:
    model = shapes.find("Qwen3.5-27B", 16)
    one, two = memory.need(model, LOAD), memory.need(model, LOAD, tensor_parallel=2)
    assert two.weights == one.weights // 2
    assert two.cache == pytest.approx(one.cache / 2, rel=0.02)
    assert two.total < one.total


@settings(max_examples=50)
@given(free=st.integers(0, 400 * GIB), arms=st.integers(2, 4), name=st.sampled_from(sorted(shapes.SHAPES)))
def test_the_layers_that_would_fit_do_and_more_do_not(free: int, arms: int, name: str) -> None:
    model = shapes.find(name, None)
    layers = memory.largest_layers(model, LOAD, arms, free)
    fits = [
        count
        for count in range(model.pattern, model.layers + 1, model.pattern)
        if arms * memory.need(model.with_layers(count), LOAD).total <= free
    ]
    assert layers == (fits[-1] if fits else None)


def test_too_little_memory_names_the_layers_that_fit() -> None:
    model = shapes.find("Qwen3.5-35B-A3B", 24)
    with pytest.raises(CommandError, match=r"4 engines .* 24 layers .* NVIDIA H200.* --layers 12 would fit"):
        memory.check(model, LOAD, 4, 139 * GIB, "NVIDIA H200")
    with pytest.raises(CommandError, match=r"smaller --batches"):
        memory.check(model, LOAD, 2, 4 * GIB, "a small GPU")
    assert memory.check(model, LOAD, 2, 139 * GIB, "NVIDIA H200").total < 139 * GIB // 2


def test_visible_gpus_are_the_named_ones() -> None:
    found = [(0, "H200", 5), (1, "H200", 6), (2, "H200", 7)]
    assert memory.visible(found, "2,0") == [found[2], found[0]]
    assert memory.visible(found, None) == memory.visible(found, "GPU-abc") == found
    assert memory.visible(found, "") == []


@pytest.mark.parametrize(
    ("shape", "weights", "peak"),
    [({}, 0, 1.7), ({"hidden_size": 1024, "vocab_size": 248320}, 1.0, 3.65)],
    ids=["tiny", "embeddings"],
)
def test_a_process_on_a_cpu_is_estimated_as_it_was_measured(shape: dict[str, int], weights: float, peak: float) -> None:
    """GiB of one worker, vLLM 0.32.0: the peak of its resident memory over a whole run."""
    _, text, layers = shapes.SHAPES["tiny"]
    model = shapes.Model("m", shapes.configuration("qwen3_5", {**text, **shape}, layers))
    need = memory.need(model, memory.Load(requests=16, request_tokens=196, prompt=316, prefill=2048), cpu=True)
    assert need.weights / GIB == pytest.approx(weights, abs=0.05)
    assert peak < need.total / GIB < peak + 0.75


STATISTICS = "anon 5\ninactive_file {0}\ntotal_inactive_file {0}\n"


@pytest.mark.parametrize(
    ("line", "files", "free"),
    [
        ("0::/", {}, 1000),
        ("0::/", {"memory.max": "600", "memory.current": "200"}, 450),
        ("0::/", {"memory.max": "max", "memory.current": "200"}, 1000),
        ("0::/", {"memory.max": "100", "memory.current": "200"}, 0),
        ("0::/", {"memory.max": "1000000", "memory.current": "0"}, 1000),
        ("0::/a/b", {"a/memory.max": "700", "a/memory.current": "100", "a/b/memory.max": "max"}, 650),
        ("0::/of/the/host", {"memory.max": "600", "memory.current": "200"}, 450),
        (
            "3:cpuset:/\n9:memory:/x",
            {"memory/x/memory.limit_in_bytes": "600", "memory/x/memory.usage_in_bytes": "200"},
            450,
        ),
        ("9:memory:/x", {"memory/memory.limit_in_bytes": "600", "memory/memory.usage_in_bytes": "200"}, 450),
        (None, {"memory.max": "600", "memory.current": "200"}, 1000),
    ],
)
def test_a_containers_limit_counts(line: str | None, files: dict[str, str], free: int, tmp_path: Path) -> None:
    """Kilobytes; 50 of what is used are files that the kernel would drop."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1000 kB\n")
    if line is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"{line}\n")
    for name, content in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{int(content) << 10}\n" if content.isdigit() else f"{content}\n")
        (path.parent / "memory.stat").write_text(STATISTICS.format(50 << 10))
    assert memory.free_host_memory(tmp_path) == free << 10


# ---------------------------------------------------------------- what was asked for


@pytest.mark.parametrize("text", ["", "0", "1,x", "-4", "1.5"])
def test_bad_numbers_name_their_option(text: str) -> None:
    with pytest.raises(CommandError, match=r"--batches="):
        command.parse_numbers("--batches", text)


def test_stock_is_always_the_first_arm() -> None:
    assert command.parse_arms("dual, overlay ,stock") == ("stock", "dual", "overlay")
    for text in ("stock", "", "overlay,fast"):
        with pytest.raises(CommandError, match="--arms="):
            command.parse_arms(text)


@pytest.mark.parametrize(
    ("phases", "timeline", "found"),
    [
        (None, False, command.PHASES),
        (None, True, ("tokens", "timeline")),
        ("decode", True, ("decode", "timeline")),
        ("timeline,decode", True, ("timeline", "decode")),
    ],
)
def test_the_timeline_is_one_more_phase(phases: str | None, timeline: bool, found: tuple[str, ...]) -> None:
    assert command.parse_phases(phases, timeline) == found


@pytest.mark.parametrize(
    ("phases", "engines"), [(command.PHASES, 3), (("tokens",), 3), (("serving",), 1), (("serving", "tokens"), 3)]
)
def test_servers_alone_need_not_fit_beside_each_other(phases: tuple[str, ...], engines: int) -> None:
    """40 layers of the 35B in bf16 fit on one card once."""
    assert command.Options(arms=("stock", "overlay", "serial"), phases=phases).alive_at_once == engines


def test_servers_have_room_for_their_clients_and_no_more(machine: dict[str, Any]) -> None:
    """256 running requests are the decode steps', not theirs."""
    machine["gpus"] = [(0, "H200", 139 * GIB)]
    loop = {"concurrency": (1, 32), "layers": 40, "format": "fp8-block", "arms": ("stock", "overlay", "control")}
    servers_alone = command.settle(command.Options(phases=("serving",), **loop))
    assert servers_alone.load.requests == 32 and servers_alone.fits(3)
    with_steps = command.settle(command.Options(phases=("decode", "serving"), memory_check=False, **loop))
    assert with_steps.load.requests == 256
    assert 3 * with_steps.need.total > with_steps.free and with_steps.fits(3), (
        "without the check the user says that they fit"
    )


def test_rates_and_pairs() -> None:
    assert command.parse_rates("4,0.5") == (0.5, 4.0)
    assert command.parse_rates(None) == ()
    assert command.parse_engine(("enforce_eager=true", "dtype=auto")) == {"enforce_eager": True, "dtype": "auto"}
    for text in ("0", "x", "-1"):
        with pytest.raises(CommandError, match="--rates="):
            command.parse_rates(text)
    with pytest.raises(CommandError, match="NAME=VALUE"):
        command.parse_pairs("--env", ("=x",))


def settled(**options: Any) -> command.Settled:
    return command.Settled(
        command.Options(**options),
        shapes.find("tiny", None),
        command.QUICK,
        (1,),
        (8,),
        True,
        LOAD,
        memory.Need(1, (2 << 30) + 1, 1),
        10,
    )


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(CommandError, match="has results already"):
        command.setup_of(settled(out=tmp_path, work=tmp_path))


@pytest.mark.parametrize("option", ["out", "work"])
def test_a_folder_that_cannot_be_made_is_named(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folders = {"out": tmp_path / "out", "work": tmp_path / "work", option: tmp_path / "file" / "folder"}
    with pytest.raises(CommandError, match=rf"--{option}='.*folder' cannot be made: "):
        command.setup_of(settled(**folders))


def test_a_cpus_cache_is_as_large_as_was_counted(tmp_path: Path) -> None:
    """vLLM's CPU build takes whole GiB from its variable, whatever the engine is told."""
    setup = command.setup_of(settled(out=tmp_path / "out", work=tmp_path / "work"))
    assert setup.environment("stock", "run")["VLLM_CPU_KVCACHE_SPACE"] == "3"
    asked = command.setup_of(settled(out=tmp_path / "out", work=tmp_path, variables=("VLLM_CPU_KVCACHE_SPACE=9",)))
    assert asked.environment("overlay", "run")["VLLM_CPU_KVCACHE_SPACE"] == "9"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A machine with a vLLM of a few lines; its GPUs and its free memory can be set."""
    arguments = "class EngineArgs:\n    model: str\n    default_mm_loras: dict\n    max_num_seqs: int\n\n    def f(self) -> None:\n        a: int\n"
    stub_vllm.write(
        tmp_path / "site", {"engine/arg_utils.py": f"{arguments}\nclass AsyncEngineArgs(EngineArgs): ...\n"}
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    found: dict[str, Any] = {"gpus": [], "free": 16 * GIB}
    monkeypatch.setattr(memory, "gpus", lambda: found["gpus"])
    monkeypatch.setattr(memory, "free_host_memory", lambda: found["free"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_without_a_gpu_the_tiny_model_is_the_default(machine: dict[str, Any]) -> None:
    plan = command.settle(command.Options())
    assert (plan.model.name, plan.model.layers, plan.cpu) == ("tiny", 4, True)
    machine["free"] = 64 * GIB
    asked = command.settle(command.Options(model="Qwen3.5-35B-A3B"))
    assert asked.model.name == "Qwen3.5-35B-A3B" and 2 * asked.need.total <= 64 * GIB
    machine["gpus"] = [(0, "H200", 139 * GIB)]
    plan = command.settle(command.Options())
    assert (plan.model.name, plan.cpu) == ("Qwen3.5-35B-A3B", False)


def test_a_machine_without_the_memory_is_told_so(machine: dict[str, Any]) -> None:
    machine["free"] = 4 * GIB
    with pytest.raises(CommandError, match=r"2 engines of tiny with 4 layers need about .* this CPU"):
        command.settle(command.Options())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("foo", "NAME=VALUE"),
        ("foo=1", "no such engine argument"),
        ("max_num_seq=4", "did you mean max_num_seqs"),
        ("a=1", "no such"),
        ("worker_extension_cls=mine.Worker", "bench needs this one itself"),
    ],
)
def test_engine_arguments_are_judged_before_anything_is_made(
    word: str, message: str, machine: dict[str, Any], tmp_path: Path
) -> None:
    options = command.Options(out=tmp_path / "out", work=tmp_path / "work", engine=(word,))
    with pytest.raises(CommandError, match=message):
        command.run(options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()


def test_engine_arguments_of_this_vllm_pass(machine: dict[str, Any]) -> None:
    command.check_engine({"max_num_seqs": 4})


# ---------------------------------------------------------------- stock is stock


def _setup(tmp_path: Path, **changes: Any) -> Setup:
    return Setup(tmp_path / "work", tmp_path / "out", "/site", 100.0, **changes)


def test_arms_differ_by_the_overlay_and_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLMOVERLAY_PLAN", "serial")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    setup = _setup(tmp_path, variables={"VLLM_X": "1"})
    stock, overlay, dual = (setup.environment(arm, arm) for arm in ("stock", "overlay", "dual"))
    own = {"PYTHONPATH", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "VLLMOVERLAY_JOURNAL_DIR"}
    assert {name for name in stock.keys() | overlay.keys() if stock.get(name) != overlay.get(name)} == own
    assert stock["PYTHONPATH"] == "/site" and overlay["PYTHONPATH"] == f"{REPOSITORY}:/site"
    assert dual["VLLMOVERLAY_PLAN"] == "dual" and "VLLMOVERLAY_PLAN" not in overlay
    assert stock["VLLM_X"] == dual["VLLM_X"] == "1"
    control = setup.environment("control", "control")
    own = {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"}
    assert {name for name in stock.keys() | control.keys() if stock.get(name) != control.get(name)} == own


def test_the_overlay_on_pythonpath_does_not_reach_the_engines() -> None:
    environment = {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), "/site", ""))}
    assert command.vllm_folders(environment) == "/site"
    assert command.vllm_folders({}) is None


def test_where_the_overlay_is_installed_stock_is_told_to_leave_it_off(tmp_path: Path) -> None:
    setup = _setup(tmp_path, installed=True)
    assert setup.environment("stock", "run")["VLLMOVERLAY"] == setup.environment("control", "run")["VLLMOVERLAY"] == "0"
    assert "VLLMOVERLAY" not in setup.environment("overlay", "run")


#: Runs a worker's script as Python does, and says at its end what the process could import.
LOOK = """
import importlib.util, json, os, runpy, sys
def look(status):
    found = {name: importlib.util.find_spec(name) for name in names}
    print(json.dumps({name: spec and spec.origin for name, spec in found.items()}), flush=True)
    leave(status)
leave, os._exit = os._exit, look
names, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "commands",
    ["", *sorted((REPOSITORY / "benchmarks" / "gpu").glob("*_worker.py"))],
    ids=lambda path: path and path.stem,
)
def test_a_stock_worker_sees_neither_the_overlay_nor_its_sitecustomize(commands: Path, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    environment = {**_setup(tmp_path).environment("stock", "run"), "BENCH_REPLY_DESCRIPTOR": str(write_end)}
    names = ["overlay", "benchmarks", "sitecustomize", "bench_engine", "weights", "report", "status"]
    script = [SCRIPT, commands] if commands else [SCRIPT]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(names), *map(str, script)],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        pass_fds=(write_end,),
        check=False,
    )
    os.close(read_end)
    os.close(write_end)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bench_engine"] == str(SCRIPT.parent / "bench_engine" / "__init__.py")
    assert found["overlay"] is found["benchmarks"] is found["weights"] is found["report"] is found["status"] is None
    assert not (found["sitecustomize"] or "").startswith(str(REPOSITORY / "sitecustomize"))


def test_an_engines_process_finds_nothing_but_what_it_needs() -> None:
    names = sorted(path.name for path in SCRIPT.parent.iterdir() if path.name != "__pycache__")
    assert names == ["__init__.py", "bench_engine", "run_client.py", "run_worker.py"]


def test_nothing_of_a_workers_own_code_imports_the_overlay() -> None:
    for path in SCRIPT.parent.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.lstrip().startswith(("import overlay", "from overlay"))], path


def test_a_worker_answers_errors_and_ends(tmp_path: Path) -> None:
    worker = Worker("stock", _setup(tmp_path).environment("stock", "run"), tmp_path / "logs" / "stock.log")
    with pytest.raises(WorkerError, match="AttributeError"):
        worker.call("no_such_command", 60.0)
    worker.close()
    worker.close()
    with pytest.raises(WorkerError):
        worker.call("describe", 5.0)


@given(st.sets(st.integers(0, 255), min_size=1))
def test_both_halves_are_all_cores(cores: set[int]) -> None:
    found = halves(cores)
    assert set.union(*found) == cores and sum(map(len, found)) == len(cores)
    assert len(found) == 2 and abs(len(found[0]) - len(found[1])) <= 1 if len(cores) >= 4 else found == [cores]


class Turns:
    """Stands for a Worker: what was asked of it, in the order of all."""

    def __init__(self, side: str, log: list[tuple[str, Any]]) -> None:
        self.side, self.log = side, log

    def move(self, cores: set[int]) -> None:
        self.log.append((self.side, cores))

    def call(self, command: str, limit: float, **arguments: Any) -> str:
        self.log.append((self.side, (command, limit, arguments)))
        return f"{command} of {self.side}"


def test_who_is_first_changes_and_so_do_everybodys_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    log: list[tuple[str, Any]] = []
    workers: Any = {side: Turns(side, log) for side in ("stock", "overlay")}
    asked = ("step", 9.0, {"count": 3})
    for turn, (cores, order) in enumerate([({0, 1}, ("stock", "overlay")), ({2, 3}, ("overlay", "stock"))] * 2):
        log.clear()
        found = in_turn(workers, "step", turn, 9.0, count=3)
        assert found == {"stock": "step of stock", "overlay": "step of overlay"}
        assert log == [("stock", cores), ("overlay", cores), *((side, asked) for side in order)]


def test_all_threads_of_a_worker_and_of_what_it_has_started_are_moved(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core is all there is")
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, threading, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    worker = Worker("stock", dict(os.environ), tmp_path / "log", script)
    try:
        while not (text := (tmp_path / "log").read_text()).endswith("\n"):
            time.sleep(0.01)
        threads = [int(path.name) for pid in (worker._process.pid, int(text)) for path in _tasks(pid)]
        assert len(threads) >= 3
        worker.move({cores[-1]})
        assert {core for thread in threads for core in os.sched_getaffinity(thread)} == {cores[-1]}
        assert sorted(os.sched_getaffinity(0)) == cores
    finally:
        worker.close()


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


# ---------------------------------------------------------------- rows


def test_a_row_has_every_arm_and_the_overlay_against_each() -> None:
    row = engines.paired_row({"stock": [1.0, 2.0], "overlay": [0.9, 1.8], "fused": [0.5, 1.0]})
    assert (row["rounds"], row["stock"], row["ratio"]) == (2, 1.5, pytest.approx(0.9))
    assert row["arms"]["overlay"] == {key: pytest.approx(row[key]) for key in ("ratio", "low", "high")} | {
        "seconds": row["overlay"],
        "interval": "range",
    }
    assert row["arms"]["fused"]["ratio"] == pytest.approx(0.5)
    assert set(row["against"]) == {"fused"} and row["against"]["fused"]["ratio"] == pytest.approx(1.8)


def _answer(*tokens: int, logprobs: str = "a") -> dict[str, Any]:
    return {"tokens": [[token, 7] for token in tokens], "logprobs": logprobs}


def test_benches_in_turn_start_together_and_measure_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    both_start = threading.Barrier(2, timeout=20)
    setups = {name: Setup(tmp_path, tmp_path, None, 100.0, turns=tmp_path / "turns") for name in "ab"}
    for setup in setups.values():
        setup.begin = time.monotonic()

    def bench(name: str) -> None:
        alive = engines.Engines(setups[name], Results(tmp_path / f"{name}.json"), Any)
        alive.start = lambda *given: both_start.wait()  # type: ignore[method-assign]
        alive.close = lambda hurry: said.append(f"{name} closed")  # type: ignore[method-assign]

        def phase() -> None:
            said.append(f"{name} begins")
            time.sleep(0.3)
            said.append(f"{name} ends")

        alive.run({}, True, None, {"decode": phase})

    threads = [threading.Thread(target=bench, args=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    first, second = said[0][0], said[3][0]
    assert said == [f"{name} {what}" for name in (first, second) for what in ("begins", "ends", "closed")]
    waited, did_not = setups[second].remaining(), setups[first].remaining()
    assert waited - did_not > 0.25, "the time of waiting counts as the run's"


def test_the_file_of_turns_has_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--in-turn='.*/nowhere/turns' cannot be used: No such file"):
        command.setup_of(settled(out=tmp_path / "out", work=tmp_path, in_turn=tmp_path / "nowhere" / "turns"))


@pytest.mark.parametrize(("idle", "done"), [(True, ["first", "second", "third"]), (False, ["first", "second"])])
def test_a_phase_that_fails_is_a_problem_and_the_rest_goes_on_while_the_engines_answer(
    idle: bool, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Results(tmp_path / "results.json")
    alive = engines.Engines(_setup(tmp_path), kept, Any)
    said: list[str] = []
    monkeypatch.setattr(alive, "start", lambda *given: None)
    monkeypatch.setattr(alive, "usable", lambda: idle)
    monkeypatch.setattr(alive, "close", lambda hurry: said.append(f"hurry {hurry}"))

    def phase(name: str) -> None:
        said.append(name)
        if name == "second":
            raise WorkerError("no answer")

    alive.run({}, True, None, {name: lambda name=name: phase(name) for name in ("first", "second", "third")})
    assert said == [*done, "hurry False"] and kept.data["problems"] == ["second: no answer"]


def test_different_tokens_are_found_where_stock_repeats_itself() -> None:
    found = {"stock": _answer(1, 2), "overlay": _answer(1, 3, logprobs="b"), "serial": _answer(1, 2)}
    row = {"case": "N=2", "requests": 2, **engines.token_row(found, found["stock"])}
    assert row["arms"]["overlay"]["first_difference"] == {"request": 1, "position": 0, "stock": 2, "other": 3}
    assert (row["different_requests"], row["logprobs_equal"]) == (1, False)
    assert different({"tokens": [row]}) == ["overlay, N=2: 1 of 2 requests"]
    unsteady = {"case": "N=2", "requests": 2, **engines.token_row(found, _answer(5, 6))}
    assert different({"tokens": [unsteady]}) == []
    assert (row["stock_asked"], row["stock_answers"], row["arms"]["overlay"]["one_of_stocks"]) == (2, 1, False)
    often = engines.token_row(found, found["stock"], _answer(5, 6), found["overlay"], _answer(5, 6))
    assert (often["stock_asked"], often["stock_answers"], often["arms"]["overlay"]["one_of_stocks"]) == (5, 3, True)
    console = Console(width=160, file=io.StringIO())
    console.print(report.tokens([{"case": "N=2", "requests": 2, **often}]))
    shown = console.file.getvalue()
    assert "differ, as stock once" in shown and "NO: 3 answers to 5" in shown


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"problems": [], "unfinished": []}, 0),
        ({"problems": [], "unfinished": ["x"]}, 3),
        ({"problems": ["x"], "unfinished": ["x"]}, 1),
    ],
)
def test_exit_status(data: dict[str, Any], expected: int) -> None:
    assert command.status(data) == expected
    row = {"case": "c", "requests": 1, **engines.token_row({"stock": _answer(1), "overlay": _answer(2)}, _answer(1))}
    assert command.status({**data, "tokens": [row]}) == 1


def _run(scale: float) -> dict[str, Any]:
    """What `vllm bench serve --save-detailed` writes, as far as it is read."""
    return {
        "ttfts": [0.1 * scale, 0.2 * scale, 0.0],
        "itls": [[0.01 * scale] * 3, [], []],
        "output_lens": [4, 1, 0],
        "completed": 2,
        "failed": 1,
        "request_throughput": 2.0,
    }


def test_serving_rows_have_medians_percentiles_and_an_interval() -> None:
    samples = {4.0: {"stock": [_run(1.0)] * 3, "overlay": [_run(0.9)] * 3}, 8.0: {"stock": [_run(1.0)], "overlay": []}}
    ttft, tpot = serving.rows_of(samples, ("stock", "overlay"))
    assert (ttft["rate"], ttft["metric"], tpot["metric"]) == (4.0, "ttft", "tpot")
    assert tpot["ratio"] == tpot["low"] == tpot["high"] == pytest.approx(0.9)
    assert ttft["low"] <= ttft["ratio"] <= ttft["high"]
    assert ttft["requests"] == {"stock": 6, "overlay": 6} and ttft["failed"] == {"stock": 3, "overlay": 3}
    assert ttft["stock_p99"] == pytest.approx(0.2)


def test_engine_arguments_become_flags() -> None:
    found = servers.flags(
        {"model": "m", "enable_prefix_caching": False, "language_model_only": True, "seed": 0, "a_b": {"c": [1]}}
    )
    assert found == ["--no-enable-prefix-caching", "--language-model-only", "--seed", "0", "--a-b", '{"c": [1]}']


# ---------------------------------------------------------------- output


@pytest.fixture
def data() -> dict[str, Any]:
    found = {"stock": _answer(1, 2), "overlay": _answer(1, 3), "fused": _answer(1, 2)}
    times = {"stock": [1.0, 1.1, 1.2], "overlay": [0.9, 1.0, 1.1], "fused": [1.2, 1.3, 1.4]}
    start = {
        "vllm": "0.33.0",
        "torch": "2.14",
        "device": "H200",
        "architecture": "A",
        "async_scheduling": True,
        "cudagraph_mode": "FULL",
        "compile_seconds": 20.0,
        "build_seconds": 60.0,
        "import_seconds": 10.0,
        "counters": {"num_inductor_compiles": 25},
    }
    return {
        "overlay": {"version": "0.1.0"},
        "host": {"gpu": "NVIDIA H200, 580, 143771 MiB"},
        "model": {"name": "Qwen3.5-27B", "layers": 8, "linear_attention_layers": 6, "tensor_parallel": 1},
        "pair": {"stock": start, "overlay": start, "fused": start, "weights_equal": True, "started_together": False},
        "tokens": [{"case": "N=2", "requests": 2, **engines.token_row(found, found["stock"])}],
        "decode": [{"requests": count, **engines.paired_row(times)} for count in (1, 8)],
        "first_token": [{"prompt": 100, **engines.paired_row(times)}],
        "serving": {
            "rows": serving.rows_of({4.0: {"stock": [_run(1.0)], "overlay": [_run(0.9)]}}, ("stock", "overlay")),
            "start_seconds": {"stock": 60.0, "overlay": 61.0},
        },
        "problems": [],
        "unfinished": ["decode: out of time"],
    }


def test_processes_on_unequal_cpus_are_named(data: dict[str, Any]) -> None:
    """Else the ratio of a time that waits for the host is taken for the overlay's doing."""
    rounds = range(10)
    data["host_speed"] = {
        "Python": engines.paired_row(
            {"stock": [1.0 for _ in rounds], "overlay": [1.17 for _ in rounds], "fused": [1.004 for _ in rounds]}
        ),
        "kernel launches": engines.paired_row(
            {"stock": [1.0 for _ in rounds], "overlay": [1.0 for _ in rounds], "fused": [0.9 for _ in rounds]}
        ),
    }
    python, launches = [text.plain for text in report.notes(data) if text.plain.startswith("host: ")]
    assert "the same Python took 1.17 of stock's time in the process of overlay (1.17 to 1.17)" in python
    assert "the same kernel launches took 0.90 of stock's time in the process of fused" in launches
    del data["host_speed"]
    assert not any(text.plain.startswith("host: ") for text in report.notes(data))


def test_what_stock_started_twice_differs_by_is_said_and_no_failure(data: dict[str, Any]) -> None:
    found = {"stock": _answer(1, 2), "overlay": _answer(1, 2), "control": _answer(1, 3)}
    data["tokens"] = [{"case": "N=2", "requests": 2, **engines.token_row(found, found["stock"])}]
    assert different(data) == []
    lines = [text.plain for text in report.notes(data)]
    assert "control: stock started twice has other tokens in 1 of 1 cases: N=2" in lines
    found["control"] = _answer(1, 2)
    data["tokens"] = [{"case": "N=2", "requests": 2, **engines.token_row(found, found["stock"])}]
    assert not any("control" in text.plain for text in report.notes(data))


def test_every_table_is_shown_and_kept(data: dict[str, Any], tmp_path: Path) -> None:
    report.show(data, Console(width=120, file=(tmp_path / "terminal").open("w")), tmp_path / "report.txt")
    shown = (tmp_path / "report.txt").read_text()
    for text in ("Qwen3.5-27B, 8 layers", "1 of 2", "fused / stock", "overlay / fused", "TPOT", "out of time"):
        assert text in shown
    assert "TOKENS DIFFER: overlay, N=2: 1 of 2 requests" in shown


@pytest.mark.parametrize("fixed", [(), report.FIXED_KERNELS[:1], report.FIXED_KERNELS])
def test_other_tokens_come_with_what_to_try_before_blaming_the_overlay(
    data: dict[str, Any], fixed: tuple[str, ...]
) -> None:
    data["command"] = ["bench", *(word for one in fixed for word in ("--env", one))]
    said = [text.plain for text in report.notes(data) if "Inductor times block sizes" in text.plain]
    missing = [one for one in report.FIXED_KERNELS if one not in fixed]
    assert bool(said) == bool(missing)
    assert all(f"--env {one}" in said[0] for one in missing) and all(one not in "".join(said) for one in fixed)
    data["tokens"] = []
    assert not any("Inductor times" in text.plain for text in report.notes(data))


def test_a_cpu_says_nothing_about_speed(data: dict[str, Any], tmp_path: Path) -> None:
    data |= {"cpu": True, "host_speed": {"Python": engines.paired_row({"stock": [1.0], "overlay": [1.5]})}}
    report.show(data, Console(width=120, file=(tmp_path / "terminal").open("w")), tmp_path / "report.txt")
    shown = (tmp_path / "report.txt").read_text()
    assert shown.count(report.CPU) == 1
    for text in ("/ stock", "decode step", "first token", "TPOT", "compile s", "host: the same", "faster", "GPU"):
        assert text not in shown
    assert shown.rstrip().endswith(report.CPU)
    assert "greedy tokens" in shown and "TOKENS DIFFER: overlay, N=2: 1 of 2 requests" in shown
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(CommandError, match=r"results\.json is of a CPU, which says nothing about speed"):
        compare.run(tmp_path / "results.json", tmp_path / "results.json", Console())


@given(low=st.floats(0.1, 2.0), width=st.floats(0.0, 1.0), rounds=st.integers(1, 3))
def test_an_interval_that_contains_1_shows_no_difference(low: float, width: float, rounds: int) -> None:
    found = {"ratio": low + width / 2, "low": low, "high": low + width}
    shown = report.outcome(found, rounds)
    assert (shown == report.NO_DIFFERENCE) == (rounds == 1 or low <= 1.0 <= low + width)
    assert shown != report.FASTER or low + width < 1.0


def test_each_arm_has_one_line_of_what_was_shown(data: dict[str, Any]) -> None:
    shown = report.conclusions(data)
    assert shown == [
        "overlay, decode step, N: faster 1, 8",
        "fused, decode step, N: slower 1, 8",
        "overlay, time to first token, prompt: faster 100",
        "fused, time to first token, prompt: slower 100",
        "overlay, servers, TTFT at rate: no difference shown 4",
        "overlay, servers, TPOT at rate: faster 4",
    ]
    data["decode"][1] = {"requests": 8, **engines.paired_row({"stock": [1.0] * 6, "overlay": [0.9] * 3 + [1.1] * 3})}
    assert report.conclusions(data)[0] == "overlay, decode step, N: faster 1; no difference shown 8"


def _ratios(*ratios: tuple[float, float, float], rounds: int = 18) -> list[dict[str, Any]]:
    kind = "bca" if rounds >= intervals.FEWEST else "t"
    names = ("ratio", "low", "high")
    return [{"rounds": rounds, "interval": kind, **dict(zip(names, one, strict=True))} for one in ratios]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (_ratios((0.959, 0.955, 0.964)), "faster by 4.1 % (3.6 to 4.5)"),
        (_ratios((1.012, 1.008, 1.016)), "slower by 1.2 % (0.8 to 1.6)"),
        (_ratios((0.99, 0.97, 1.01)), "no difference shown"),
        (_ratios((0.959, 0.955, 0.964), rounds=4), "faster by 4.1 % (3.6 to 4.5 in 4 rounds)"),
        (_ratios((0.9, 0.9, 0.9), rounds=1), "no difference shown"),
        (_ratios((0.95, 0.95, 0.95), (1 / 0.95, 1 / 0.95, 1 / 0.95)), "no difference shown"),
        (_ratios((0.96, 0.95, 0.97), (0.96, 0.95, 0.97)), "faster by 4.0 % (3.3 to 4.7)"),
    ],
)
def test_the_last_line_is_one_that_a_person_can_repeat(rows: list[dict[str, Any]], said: str) -> None:
    assert report.verdict(rows) == said
    row = [{"requests": 2**index, "arms": {"overlay": one}, **one} for index, one in enumerate(rows)]
    line = report.headline({"decode": row, "first_token": []})
    assert line.startswith(f"overlay, decode step: {said} at N = 1") and ("on average" in line) == (len(rows) > 1)
    assert report.headline({"tokens": []}) == "nothing was timed"


def test_the_last_line_says_how_far_a_second_stock_is_from_the_first() -> None:
    apart = _ratios((0.959, 0.955, 0.964), rounds=4)[0], _ratios((1.005, 1.004, 1.006), rounds=4)[0]
    row = {"requests": 1, **apart[0], "arms": dict(zip(("overlay", "control"), apart, strict=True))}
    said = "overlay, decode step: faster by 4.1 % (3.6 to 4.5 in 4 rounds) at N = 1"
    assert report.headline({"decode": [row]}) == f"{said}; a second stock: slower by 0.5 % (0.4 to 0.6 in 4 rounds)"
    # A size that was not finished takes the verdict from the others no more.
    arms = {arm: {**one, "rounds": 1} for arm, one in row["arms"].items()}
    alone = {"requests": 8, "rounds": 1, "arms": arms}
    assert report.headline({"decode": [row, alone]}).startswith(said + ";")
    assert report.headline({"decode": [alone]}).startswith("overlay, decode step: no difference shown at N = 8")


def test_the_last_line_is_of_what_a_person_asks_for_first(data: dict[str, Any]) -> None:
    """Clients on servers before a bare decode step, and that before arrivals on servers."""
    rows = [{"requests": 4, "metric": metric, **data["decode"][0]} for metric in ("ttft", "tpot")]
    said = report.headline({**data, "concurrency": {"rows": rows}})
    assert said.startswith("overlay, time per output token: faster by ") and said.endswith("at clients = 1")
    assert report.headline(data).startswith("overlay, decode step: faster by ")
    assert report.headline({"serving": data["serving"]}).startswith("overlay, time per output token: ")
    assert report.headline({"serving": data["serving"]}).endswith("at requests/s = 4")
    shown = report.tables(data)[-1]
    assert shown.plain == report.headline(data)


def _loop_run(scale: float, *texts: str) -> dict[str, Any]:
    return {**_run(scale), "answers": list(texts), "failed": 0}


def test_a_closed_loop_is_paired_by_round_and_its_answers_have_a_control(data: dict[str, Any], tmp_path: Path) -> None:
    stock = {0: _loop_run(1.0, "a", "b"), 1: _loop_run(2.0, "a", "b"), 2: _loop_run(9.0, "a", "c")}
    overlay = {0: _loop_run(0.9, "a", "b"), 1: _loop_run(1.8, "x", "b")}
    runs = {1: {"stock": stock, "overlay": overlay}, 4: {"stock": stock, "overlay": {}}}
    tpot, ttft = closed_loop.rows_of(runs)
    assert [(row["requests"], row["metric"], row["rounds"]) for row in (tpot, ttft)] == [(1, "tpot", 2), (1, "ttft", 2)]
    assert tpot["ratio"] == pytest.approx(0.9) and tpot["interval"] == "range"
    answers = closed_loop.answers_of(runs)
    assert answers[0]["arms"] == {
        "stock": {"different": 1, "of": 4, "new": 1, "asked": 6},
        "overlay": {"different": 1, "of": 4, "new": 1, "asked": 4},
    }
    assert set(answers[1]["arms"]) == {"stock"}
    # The arm whose turn never came takes nothing from the others.
    with_control = {1: {**runs[1], "control": {}}}
    assert closed_loop.rows_of(with_control) == [tpot, ttft]
    assert closed_loop.answers_of(with_control) == answers[:1]
    found = {"rows": [tpot, ttft], "answers": answers, "together": False}
    data |= {"concurrency": found, "tokens": []}
    assert different(data) == []  # stock does not repeat itself here
    report.show(data, Console(width=120, file=(tmp_path / "terminal").open("w")), tmp_path / "report.txt")
    shown = (tmp_path / "report.txt").read_text()
    for text in (
        "first round: stock 1 of 4, overlay 1 of 4",
        "in no other round: stock 1 of 6, overlay 1 of 4",
        "one after the other",
        "output token, clients: faster 1",
    ):
        assert text in shown
    pytest.importorskip("matplotlib")
    assert "concurrency.png" in [path.name for path in plots.write(data, tmp_path)]


@pytest.mark.parametrize("clients", [1, 2])
def test_one_client_must_get_stocks_answers(clients: int) -> None:
    """With several clients a batch depends on the moment, so there a difference is shown and fails nothing."""
    same = {turn: _loop_run(1.0, "a", "b") for turn in range(2)}
    other = {turn: _loop_run(1.0, "a", "c") for turn in range(2)}
    answers = closed_loop.answers_of({clients: {"stock": same, "overlay": other, "control": other}})
    said = ["overlay, one client: 2 of 4 answers"] if clients == 1 else []
    assert different({"concurrency": {"answers": answers}}) == said
    once = closed_loop.answers_of({clients: {"stock": {0: same[0]}, "overlay": other}})
    assert different({"concurrency": {"answers": once}}) == []


def test_an_answer_is_new_where_stock_gave_it_in_no_other_round() -> None:
    """Rounds have one of two kinds of batches here, in another order on each side. The overlay's last answer is its own."""
    stock = {0: _loop_run(1.0, "a", "b"), 1: _loop_run(1.0, "A", "B"), 2: _loop_run(1.0, "a", "b")}
    overlay = {0: _loop_run(1.0, "A", "B"), 1: _loop_run(1.0, "a", "b"), 2: _loop_run(1.0, "A", "c")}
    (row,) = closed_loop.answers_of({32: {"stock": stock, "overlay": overlay}})
    assert row["arms"]["overlay"] == {"different": 4, "of": 6, "new": 1, "asked": 6}
    assert row["arms"]["stock"] == {"different": 2, "of": 4, "new": 2, "asked": 6}
    (row,) = closed_loop.answers_of({32: {"stock": {0: stock[0]}, "overlay": overlay}})
    assert row["arms"] == {"stock": {"different": 0, "of": 0}, "overlay": {"different": 4, "of": 6}}


class Moved:
    """A process by name, and the cores that it is on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cores: set[int] = set()

    def move(self, cores: set[int]) -> None:
        self.cores = cores


@pytest.mark.parametrize(
    ("at_once", "warm", "wanted"),
    [
        (False, True, ["start 1", "wait 1", "start 2", "wait 2", "start 3", "wait 3"]),
        (True, False, ["start 1", "wait 1", "start 2", "start 3", "wait 2", "wait 3"]),
        (True, True, ["start 1", "start 2", "start 3", "wait 1", "wait 2", "wait 3"]),
    ],
)
def test_a_cold_triton_cache_is_filled_by_one_server_alone(
    at_once: bool, warm: bool, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Started:
        start_seconds = 0.0

        def __init__(self, arm: str, *_: object) -> None:
            self.arm = arm
            done.append(f"start {arm}")

        def wait(self) -> None:
            self.start_seconds = 1.0
            done.append(f"wait {self.arm}")

        def close(self, hurry: bool) -> None:
            pass

    monkeypatch.setattr(servers, "Server", Started)
    setup = Setup(tmp_path, tmp_path, None, 100.0)
    if warm:
        setup.mark_triton_warm()
    progress: Any = Progress(Console(file=io.StringIO()))
    progress.phase("start", 3)
    results = Results(tmp_path / "results.json", lambda text: None)
    fleet = servers.Fleet(setup, results, progress, {}, tmp_path, None, closed_loop.KEY, at_once)
    with fleet._running("123"):
        assert done == wanted


@pytest.mark.parametrize("together", [True, False])
def test_the_servers_take_turns_and_what_fails_is_a_problem(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[tuple[str, ...]] = []
    asked: list[tuple[str, str, int]] = []

    @contextlib.contextmanager
    def running(_: servers.Fleet, arms: Any) -> Any:
        alive.append(tuple(arms))
        yield {arm: Moved(arm) for arm in arms}

    def one_run(_: servers.Fleet, client: Moved, server: Moved, load: servers.Load, turn: int) -> dict[str, Any]:
        assert client.name == "client" and server.cores == ({2, 3} if turn % 2 else {0, 1})
        assert client.cores == {0, 1, 2, 3} - server.cores
        asked.append((server.name, load.flags[1], turn))
        return {**_loop_run(1.0 if server.name == "stock" else 0.9, "a", "b"), "failed": int(server.name == "overlay")}

    monkeypatch.setattr(servers.Fleet, "_running", running)
    monkeypatch.setattr(servers.Fleet, "_client", lambda _: contextlib.nullcontext(Moved("client")))
    monkeypatch.setattr(servers.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(servers.Fleet, "_run", one_run)
    results = Results(tmp_path / "results.json", lambda text: None)
    loads = [closed_loop.load(clients, 2, 8, 4) for clients in (1, 4)]
    setup = Setup(tmp_path, tmp_path, None, 100.0)
    progress: Any = Progress(Console(file=io.StringIO()))
    fleet = servers.Fleet(setup, results, progress, {}, tmp_path, None, closed_loop.KEY)
    arms = ("stock", "overlay")
    closed_loop.measure(fleet, arms, loads, 2, together)
    assert alive == ([arms] if together else [("stock",), ("overlay",), ("stock",)])
    assert sorted(asked) == sorted((arm, clients, turn) for arm in arms for clients in "14" for turn in (0, 1))
    if together:
        assert [arm for arm, clients, _ in asked if clients == "1"] == ["stock", "overlay", "overlay", "stock"]
    found = results.data["concurrency"]
    assert found["together"] == together and [row["rounds"] for row in found["rows"]] == [2] * 4
    assert all(row["ratio"] == pytest.approx(0.9) for row in found["rows"])
    assert results.data["problems"][0] == "concurrency 1, overlay, round 1: 1 requests have failed"
    setup.budget = 0.0
    closed_loop.measure(fleet, arms, loads, 2, together)
    assert results.data["unfinished"] == [
        f"concurrency: out of time before {'stock, overlay' if together else 'stock'}"
    ]


@given(st.integers(1, 12), st.booleans(), st.lists(st.sampled_from(["overlay", "serial", "control"]), unique=True))
def test_every_arm_has_every_round_once(rounds: int, together: bool, others: list[str]) -> None:
    arms = ["stock", *others]
    schedule = closed_loop.turns(arms, rounds, together)
    for arm in arms:
        assert sorted(turn for alive, some in schedule if arm in alive for turn in some) == list(range(rounds))
    assert together or all(len(alive) == 1 for alive, _ in schedule)


@given(st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(1.0, 1.5), st.floats(1.0, 1.5)), min_size=1, max_size=9))
def test_the_average_of_sizes_that_are_all_faster_is_faster(
    found: list[tuple[float, float, float]],
) -> None:
    """Where every size is shown to be faster, so is the average."""
    rows = _ratios(*((ratio, ratio / below, ratio * above) for ratio, below, above in found))
    said = report.verdict(rows)
    if all(row["high"] < 1.0 for row in rows):
        assert said.startswith("faster by ")
    if all(row["low"] > 1.0 for row in rows):
        assert said.startswith("slower by ")
    if len(rows) == 1:
        assert said.split(" by ")[0] == report.outcome(rows[0])


def test_plots_are_written(data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = plots.write(data, tmp_path)
    assert [path.name for path in written] == ["ratio.png", "serving.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plots.write({"problems": []}, tmp_path) == []


@pytest.mark.parametrize(
    ("places", "slanted"),
    [
        ([1, 2, 4, 8, 32, 64, 128, 256], False),
        ([8, 128, 600, 1000, 1500, 2048, 8192], True),
        ([8, 128], False),
        ([8], False),
        ([], False),
    ],
)
def test_labels_of_an_axis_do_not_meet(places: list[float], slanted: bool) -> None:
    assert plots._crowded(places) == slanted


def test_results_are_on_disk_after_every_step(tmp_path: Path) -> None:
    said: list[str] = []
    results = Results(tmp_path / "results.json", said.append)
    results.put("decode", value=[1])
    results.problem("engine gone")
    results.unfinished("out of time")
    kept = json.loads((tmp_path / "results.json").read_text())
    assert (kept["schema"], kept["decode"], kept["problems"], kept["unfinished"]) == (
        2,
        [1],
        ["engine gone"],
        ["out of time"],
    )
    assert said == ["PROBLEM engine gone", "out of time"]


def test_sigterm_ends_a_run_as_ctrl_c_does() -> None:
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with command._stoppable(), pytest.raises(KeyboardInterrupt):
        wait()


def test_one_run_per_work_folder(tmp_path: Path) -> None:
    with command._alone(tmp_path), pytest.raises(CommandError, match="--work"), command._alone(tmp_path):
        pass
    with command._alone(tmp_path):
        pass


def _cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "overlay", "bench", *arguments],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arms", "stock"), "--arms="),
        (("--model", "/no/such/model"), "neither a named shape"),
        (("--model", "tiny", "--layers", "3"), "multiples"),
        (("--model", "tiny", "--phases", "serving"), "--concurrency or --rates"),
        (("--concurrency", "0,1"), "--concurrency='0,1': allowed are whole numbers from 1 on"),
        (
            ("--model", "Qwen3-Next-80B-A3B", "--layers", "48"),
            "engines of Qwen3-Next-80B-A3B with 48 layers need about",
        ),
        (("--compare", "/no/old.json", "/no/new.json"), "cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    if "--model" in arguments:
        pytest.importorskip("vllm")
    done = _cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_other_commands_load_nothing_of_it() -> None:
    text = "import sys, overlay.cli.app; print([name for name in sys.modules if name.startswith('overlay.cli.bench')])"
    done = subprocess.run([sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
