"""Which plan a loaded model's pairs get: by the setting, by what was measured, or by what is on disk."""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from overlay.report.journal import PatchRecord
from overlay.settings import Settings
from overlay.side_work import lane, ops, pairs
from overlay.side_work.measure import Row, best
from overlay.side_work.pairs import Pair
from overlay.side_work.plan import ABOVE_THRESHOLD, Plan, SizePlan
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL
from tests.unit.fake_cuda import fake_cuda

namespace = types.SimpleNamespace
SIZES = [1, 2, 4, 8, 16, 32]
FIXED = Plan("dual", 256)


class Linear(torch.nn.Module):
    """A linear in vLLM's manner; whole numbers, whose sums are the same in every order."""

    def __init__(self, hidden: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randint(-4, 5, (columns, hidden)).float(), requires_grad=False)
        self.input_size, self.params_dtype = hidden, torch.float32

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def layers(count: int = 3, hidden: int = 16, kind: str = "Fp8LinearMethod", plain: bool = True) -> list[Pair]:
    return [
        Pair(f"layers.{index}", Linear(hidden, 24), Linear(hidden, 8), 24, 8, kind, "a GEMM", "weight", plain)
        for index in range(count)
    ]


def worker(sizes: Sequence[int] = tuple(SIZES), mode: str = "FULL_AND_PIECEWISE", rank: int = 0, draft: int = 0) -> Any:
    config = namespace(
        compilation_config=namespace(cudagraph_capture_sizes=list(sizes), cudagraph_mode=namespace(name=mode)),
        speculative_config=namespace(num_speculative_tokens=draft) if draft else None,
    )
    return namespace(vllm_config=config, rank=rank)


def usual(sizes: Sequence[int]) -> list[Row]:
    """What a GPU could say: two streams gain up to 16 tokens."""
    rows = []
    for tokens in sizes:
        times = {SERIAL: 10.0, DUAL: 9.0 if tokens <= 16 else 11.0, DUAL_MAIN_FIRST: 9.5 if tokens <= 16 else 10.5}
        rows.append(Row(tokens, times, best(times)))
    return rows


class Gpu:
    """Stands for the GPU: answers measurements, and keeps what was asked and in which order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, list[int]]] = []
        self.order: list[str] = []
        self.answer: Callable[[Sequence[int]], list[Row]] = usual

    def measure(self, group: Sequence[Pair], sizes: Sequence[int]) -> list[Row]:
        self.asked.append((group[0].layer, len(group), list(sizes)))
        self.order.append("measure")
        return self.answer(sizes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(ops, "planned", {})
    monkeypatch.setattr(pairs, "rows_of", made.measure)
    monkeypatch.setattr(lane, "use_once", lambda device, start: made.order.append("lane"))
    monkeypatch.setattr(Pair, "device", torch.device("cuda", 0))
    monkeypatch.setattr(pairs, "_machine", lambda device: {"gpu": "made up"})
    monkeypatch.setattr(pairs, "_folder", lambda: str(tmp_path / "plans"))
    return made


def settle(group: Sequence[Pair], settings: Settings | None = None, **of_worker: Any) -> PatchRecord:
    record = PatchRecord()
    pairs.settle(group, worker(**of_worker), settings or Settings(), record, FIXED)
    return record


def strategies(name: str) -> list[str]:
    plan = ops.planned[name].plan
    assert isinstance(plan, SizePlan)
    return [plan.strategies[tokens] for tokens in SIZES]


# ---------------------------------------------------------------- the settings


def test_auto_takes_what_was_measured(gpu: Gpu) -> None:
    group = layers()
    record = settle(group)
    assert strategies(group[0].name) == [DUAL] * 5 + [SERIAL]
    assert gpu.asked == [("layers.0", 3, SIZES)]
    (plan,) = record.plans
    assert (plan["layers"], plan["source"], plan["shape"]["hidden"]) == (3, "measured", 16)
    assert ops.planned[group[0].name].record is record


@pytest.mark.parametrize("plan", ["dual", "serial"])
def test_a_fixed_plan_measures_nothing(gpu: Gpu, plan: str) -> None:
    group = layers()
    assert settle(group, Settings(plan=plan)).plans == [] and gpu.asked == []
    assert ops.planned[group[0].name].plan is FIXED


def test_a_token_threshold_ends_what_is_measured(gpu: Gpu) -> None:
    group = layers()
    settle(group, Settings(token_threshold=4))
    assert gpu.asked[0][2] == [1, 2, 4]
    assert ops.planned[group[0].name].plan.reason_for_serial(5) == ABOVE_THRESHOLD


def test_layers_that_are_on_no_gpu_have_the_fixed_plan(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "device", torch.device("cpu"))
    group = layers()
    settle(group)
    assert gpu.order == [] and ops.planned[group[0].name].plan is FIXED


@pytest.mark.parametrize("plan", ["auto", "dual", "serial"])
def test_the_lanes_memory_is_taken_after_the_measurements(gpu: Gpu, plan: str) -> None:
    """Measuring gives the workspaces of all streams back. What remains has to be there when vLLM sizes its KV cache."""
    settle([*layers(2), *layers(2, hidden=32)], Settings(plan=plan))
    assert gpu.order == ["measure"] * (2 if plan == "auto" else 0) + ["lane", "lane"]


def test_where_nothing_is_captured_no_size_is_measured() -> None:
    assert pairs.captured_sizes(worker(mode="NONE").vllm_config, Settings()) == []


# ---------------------------------------------------------------- shapes


def test_layers_of_one_shape_and_kind_share_a_plan(gpu: Gpu) -> None:
    groups = [layers(2), layers(3, hidden=32), layers(1, kind="UnquantizedLinearMethod")]
    record = settle([pair for group in groups for pair in group])
    assert [count for _, count, _ in gpu.asked] == [2, 3, 1]
    assert len(ops.planned) == len(record.plans) == 3
    assert len({group[0].name for group in groups}) == 3


@given(st.sets(st.integers(1, 512), min_size=1, max_size=20), st.integers(0, 7), st.none() | st.integers(0, 600))
def test_with_speculation_the_rounded_sizes_are_there_too(sizes: set[int], draft: int, limit: int | None) -> None:
    """vLLM rounds sizes up to whole requests, and drops what is then above the largest, after this has been settled."""
    found = pairs.captured_sizes(worker(sorted(sizes), draft=draft).vllm_config, Settings(token_threshold=limit))
    step = draft + 1
    rounded = {-(-size // step) * step for size in sizes}
    expected = sizes | {size for size in rounded if size <= max(sizes)}
    assert found == sorted(size for size in expected if limit is None or size <= limit)


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("strategy", [SERIAL, DUAL, DUAL_MAIN_FIRST])
def test_a_measured_pair_gives_serials_results(plain: bool, strategy: str) -> None:
    (pair,) = layers(1, plain=plain)
    x = torch.randint(-4, 5, (3, 16)).float()
    with fake_cuda():
        found = lane.prepare(torch.device("cuda:0"))
        assert found is not None
        main, side = pairs.run_pair(pair, lambda: pair.main(x)[0], x, strategy, found)
    assert torch.equal(main, pair.main(x)[0]) and torch.equal(side, pair.side(x)[0])


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("sizes", "has_lane"), [(SIZES, True), ([], True), (SIZES, False)])
def test_what_is_measured(monkeypatch: pytest.MonkeyPatch, plain: bool, sizes: list[int], has_lane: bool) -> None:
    """Serial beside all that a pair can do, on layers whose weights are another each, enough of them for a cold cache."""
    asked: list[Any] = []

    class Measurement:
        def __init__(self, works: Any, count: int, *given: Any) -> None:
            asked.append((dict(works), count, given))

        def __enter__(self) -> Measurement:
            return self

        def __exit__(self, *_: object) -> None: ...

        def rows(self, sizes: Sequence[int], seconds: float) -> list[Row]:
            return usual(sizes)

    def two_layers(weight_bytes: int, available: int, device: torch.device) -> int:
        assert (weight_bytes, available) == ((24 + 8) * 16 * 4, 3)
        return 2

    monkeypatch.setattr(pairs, "Measurement", Measurement)
    monkeypatch.setattr(pairs.measure, "layers_for", two_layers)
    with fake_cuda() as cuda:
        if not has_lane:
            monkeypatch.setattr(lane, "prepare", lambda device: None)
        group = layers(3, plain=plain)
        assert pairs.rows_of(group, sizes) == (usual(sizes) if has_lane else [])
        if not (sizes and has_lane):
            assert asked == []
            return
        ((works, count, given),) = asked
        assert set(works) == ({SERIAL, DUAL, DUAL_MAIN_FIRST} if plain else {SERIAL, DUAL})
        *about, prepare = given
        assert count == 2 and about == [16, torch.float32, torch.device("cpu")]
        x = torch.randint(-4, 5, (3, 16)).float()
        prepare(x)
        for strategy, work in works.items():
            for number in range(count):
                del cuda.log[:]
                main, side = work(number, x)
                assert torch.equal(main, group[number].main(x)[0]) and torch.equal(side, group[number].side(x)[0])
                assert bool(cuda.log) == (strategy != SERIAL)


@pytest.mark.parametrize("plain", [True, False])
def test_the_lane_is_used_once_before_a_capture(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair,) = layers(1, plain=plain)
    with fake_cuda() as cuda:
        lane.use_once(pair.device, functools.partial(pairs._first_use, pair))
        waits = [entry for entry in cuda.log if entry[0] == "wait"]
    assert [who for _, who, _ in waits] == ["aux0", "main"], "forked once, and joined"


# ---------------------------------------------------------------- the disk


def plans_in(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return sorted((tmp_path / "plans").glob("*"))


def test_the_next_start_reads_the_plan(gpu: Gpu, tmp_path: pathlib.Path) -> None:
    group = layers()
    settle(group)
    first = strategies(group[0].name)
    assert settle(layers()).plans[0]["source"] == "read"
    assert len(gpu.asked) == 1 == len(plans_in(tmp_path)) and strategies(group[0].name) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(pairs, "_machine", lambda device: {"gpu": "another"}),
        lambda patch: patch.setattr(pairs.journal, "vllm_version", "9.9.9"),
        lambda patch: patch.setattr(pairs.compile_cache, "source_hash", lambda: "another overlay"),
    ],
    ids=["another GPU", "another vLLM", "another overlay"],
)
def test_another_machine_or_program_measures_anew(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, change: Callable[[Any], None]
) -> None:
    settle(layers())
    change(monkeypatch)
    settle(layers())
    assert len(gpu.asked) == 2 and len(plans_in(tmp_path)) == 2


BF16, FP16 = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
REDUCTIONS = {BF16: True, FP16: True}
#: Parts of the key, by torch's names for them.
OF_THE_GPU = {"gpu": "name", "multiprocessors": "multi_processor_count", "memory": "total_memory"}
PROPERTIES: dict[str, Any] = {"name": "a GPU", "multi_processor_count": 132, "total_memory": 1}
MACHINE: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("driver", lambda patch: patch.setattr(pairs, "_driver", lambda: "another")),
    ("cublas", lambda patch: patch.setattr(pairs, "_cublas", lambda: "another")),
    ("matmul", lambda patch: patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")),
    ("matmul", lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")),
    ("matmul", lambda patch: patch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "cublaslt")),
    ("matmul", lambda patch: patch.setattr(torch.backends.cuda, "matmul", namespace(**REDUCTIONS | {BF16: False}))),
    ("matmul", lambda patch: patch.setattr(torch.backends.cuda, "matmul", namespace(**REDUCTIONS | {FP16: False}))),
    ("torch", lambda patch: patch.setattr(torch, "__version__", "9.9.9")),
    ("cuda", lambda patch: patch.setattr(torch.version, "cuda", "99.9")),
    *((part, lambda patch, name=name: patch.setitem(PROPERTIES, name, 2)) for part, name in OF_THE_GPU.items()),
]


@pytest.mark.parametrize(("part", "change"), MACHINE)
def test_the_machine_has_everything_by_which_a_kernel_is_chosen(
    monkeypatch: pytest.MonkeyPatch, part: str, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: namespace(**PROPERTIES))
    monkeypatch.setattr(torch.backends.cuda, "matmul", namespace(**REDUCTIONS))
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "cublas")
    device = torch.device("cuda:0")
    before = pairs._machine(device)
    change(monkeypatch)
    after = pairs._machine(device)
    assert {name for name in before if before[name] != after[name]} == {part}


@pytest.mark.parametrize("content", [b"{", None], ids=["spoiled", "another's sizes"])
def test_a_file_that_cannot_be_used_is_measured_anew_with_the_reason(
    gpu: Gpu, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    settle(layers())
    (path,) = plans_in(tmp_path)
    if content is None:
        whole = json.loads(path.read_bytes())
        content = json.dumps({**whole, "rows": whole["rows"][:-1]}).encode()
    path.write_bytes(content)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "vllm.overlay"):
        assert settle(layers()).plans[0]["source"] == "measured" and len(gpu.asked) == 2
    (said,) = [one for one in caplog.records if "measuring anew" in one.getMessage()]
    assert str(path) in said.getMessage() and said.levelno == logging.INFO
    assert settle(layers()).plans[0]["source"] == "read", "the good plan has taken its place"


def test_a_folder_that_cannot_be_written_costs_a_line(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pairs, "_folder", lambda: str(tmp_path / "file" / "plans"))
    with caplog.at_level(logging.DEBUG, "vllm.overlay"):
        settle(layers())
    assert [one.getMessage() for one in caplog.records if "is not kept" in one.getMessage()]
    assert not [one for one in caplog.records if one.levelno > logging.INFO]


def test_the_folder_is_beside_vllms_own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert pairs._folder() == os.path.join(tmp_path, "auxstream_overlay")


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_speaks_for_all(gpu: Gpu, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, rank: int) -> None:
    level = logging.INFO if rank == 0 else logging.DEBUG
    with caplog.at_level(logging.DEBUG, "vllm.overlay"):
        settle(layers(), rank=rank)
        plans_in(tmp_path)[0].write_text("{")
        settle(layers(), rank=rank)
    said = [one for one in caplog.records if one.name == "vllm.overlay"]
    assert len(said) == 3 and {one.levelno for one in said} == {level}
    assert "plan for 3 layers of 16 to 24 (Fp8LinearMethod) + 8 (a GEMM)" in said[0].getMessage()


def test_the_table() -> None:
    rows = [
        Row(1, {SERIAL: 10.0, DUAL: 9.04, DUAL_MAIN_FIRST: 8.0}, DUAL_MAIN_FIRST),
        Row(128, {SERIAL: 120.0, DUAL: 99.96}, DUAL),
        Row(136, {}, DUAL),
        Row(512, {SERIAL: 300.0, DUAL: 310.0, DUAL_MAIN_FIRST: 320.0}, SERIAL),
    ]
    assert pairs.table("2048 to 12288 + 64", 30, rows, "measured in 1.2 s").splitlines() == [
        "plan for 30 layers of 2048 to 12288 + 64, measured in 1.2 s, µs per layer:",
        "tokens  serial   dual  dual_main_first             plan",
        "     1    10.0    9.0              8.0  dual_main_first",
        "   128   120.0  100.0                              dual",
        "   512   300.0  310.0            320.0           serial",
    ]
    assert (
        pairs.table("a shape", 1, [Row(8, {}, SERIAL)], "read in 0.0 s").splitlines()[0].startswith("plan for 1 layers")
    )
