"""Which strategy wins, which sizes are measured, and how the replays take turns."""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overlay.side_work import measure, streams
from overlay.side_work.measure import ADVANTAGE, FEWEST_LAYERS, MILESTONES, MOST_LAYERS, Measurement, Row, best
from overlay.vocabulary import DUAL, DUAL_MAIN_FIRST, SERIAL

OTHERS = (DUAL, DUAL_MAIN_FIRST)
CPU = torch.device("cpu")

# ---------------------------------------------------------------- the choice

times_of = st.floats(1.0, 100.0)
close_to_one = st.floats(0.98, 1.02)


@given(
    times_of,
    st.dictionaries(st.sampled_from(OTHERS), close_to_one | st.floats(0.1, 10.0), max_size=2),
)
def test_the_choice_is_the_fastest_and_worth_it(serial: float, ratios: dict[str, float]) -> None:
    times = {SERIAL: serial, **{name: serial * ratio for name, ratio in ratios.items()}}
    chosen = best(times)
    fastest = min(times.values())
    if chosen == SERIAL:
        assert fastest > ADVANTAGE * serial
    else:
        assert times[chosen] == fastest <= ADVANTAGE * serial


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({SERIAL: 10.0}, SERIAL),
        ({SERIAL: 10.0, DUAL: 9.91}, SERIAL),
        ({SERIAL: 10.0, DUAL: 9.9}, DUAL),
        ({SERIAL: 10.0, DUAL: 12.0, DUAL_MAIN_FIRST: 11.0}, SERIAL),
        ({SERIAL: 10.0, DUAL: 8.01, DUAL_MAIN_FIRST: 8.0}, DUAL_MAIN_FIRST),
        ({SERIAL: 10.0, DUAL: 9.91, DUAL_MAIN_FIRST: 9.89}, DUAL_MAIN_FIRST),
    ],
)
def test_the_choice(times: dict[str, float], chosen: str) -> None:
    assert best(times) == chosen


# ---------------------------------------------------------------- which sizes

SIZES = st.lists(st.integers(1, 2048), min_size=1, max_size=40)


@given(SIZES)
def test_milestones_are_sizes_and_reach_both_ends(sizes: list[int]) -> None:
    chosen = measure._milestones(sizes)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(sizes)
    assert {min(sizes), max(sizes)} <= set(chosen) and len(chosen) <= len(MILESTONES) + 2
    for milestone in MILESTONES:
        above = [size for size in sizes if size >= milestone]
        assert not above or min(above) in chosen


def test_no_size_has_no_milestone() -> None:
    assert measure._milestones([]) == []


@given(st.dictionaries(st.integers(1, 50), st.sampled_from([SERIAL, *OTHERS]), max_size=8), st.integers(0, 60))
def test_neighbours_count_where_they_agree(strategies: dict[int, str], tokens: int) -> None:
    strategies.pop(tokens, None)
    measured = {size: Row(size, {}, strategy) for size, strategy in strategies.items()}
    below = [strategies[size] for size in sorted(strategies) if size < tokens][-1:]
    above = [strategies[size] for size in sorted(strategies) if size > tokens][:1]
    expected = (below + above)[0] if below + above and len({*below, *above}) == 1 else None
    assert measure._neighbours(tokens, measured) == expected


@pytest.mark.parametrize(
    ("megabytes", "available", "cache", "layers"),
    [
        (48, 30, 60, FEWEST_LAYERS),
        (12, 48, 60, 15),
        (1, 48, 60, MOST_LAYERS),
        (1, 3, 60, 3),
        (48, 1, 60, 1),
        (0, 48, 60, MOST_LAYERS),
        (12, 48, 0, 16),
        (12, 48, None, 16),
    ],
)
def test_as_many_layers_as_leave_the_cache_cold(
    monkeypatch: pytest.MonkeyPatch, megabytes: int, available: int, cache: int | None, layers: int
) -> None:
    properties = types.SimpleNamespace(**({} if cache is None else {"L2_cache_size": cache << 20}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert measure.layers_for(megabytes << 20, available, CPU) == layers


# ---------------------------------------------------------------- rows, with times of our own


class Measured(Measurement):
    """A measurement whose GPU is a table: the strategy that is best at a size."""

    winner: Callable[[int], str]

    def row(self, tokens: int) -> Row:
        self.measured.append(tokens)
        times = {name: 8.0 if name == self.winner(tokens) else 10.0 for name in self.works}
        return Row(tokens, times, best(times))


def nothing(layer: int, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    return ()


def measured(winner: Callable[[int], str]) -> Any:
    measurement: Any = Measured(dict.fromkeys((SERIAL, *OTHERS), nothing), 1, 8, torch.float32, CPU)
    measurement.winner, measurement.measured = winner, []
    return measurement


CAPTURED = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]


def test_sizes_between_different_strategies_are_measured_until_the_border_is_found() -> None:
    measurement = measured(lambda tokens: DUAL_MAIN_FIRST if tokens <= 136 else DUAL if tokens < 400 else SERIAL)
    rows = measurement.rows(CAPTURED, seconds=60)
    assert [row.tokens for row in rows] == CAPTURED
    assert all(
        row.strategy == (DUAL_MAIN_FIRST if row.tokens <= 136 else DUAL if row.tokens < 400 else SERIAL) for row in rows
    )
    assert {136, 144, 384, 400} <= set(measurement.measured)
    assert len(measurement.measured) == len(set(measurement.measured)) < len(CAPTURED) / 2
    assert all(bool(row.microseconds) == (row.tokens in measurement.measured) for row in rows)


def test_out_of_time_the_milestones_are_all_that_is_measured() -> None:
    measurement = measured(lambda tokens: DUAL_MAIN_FIRST if tokens <= 136 else SERIAL)
    rows = measurement.rows(CAPTURED, seconds=0)
    assert measurement.measured == measure._milestones(CAPTURED)
    between = {row.tokens: row.strategy for row in rows if 128 < row.tokens < 192}
    assert set(between.values()) == {SERIAL}, "between two strategies, and not measured"
    assert {row.strategy for row in rows if row.tokens <= 128} == {DUAL_MAIN_FIRST}


def test_the_deadline_is_looked_at_between_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    measurement = measured(
        lambda tokens: (DUAL, SERIAL)[sum(tokens > border for border in (70, 140, 200, 300, 400)) % 2]
    )
    measurement.rows(CAPTURED, seconds=4)  # begins at 0, and looks at 1, 2, 3 and 4
    assert len(measurement.measured) == len(measure._milestones(CAPTURED)) + 3


# ---------------------------------------------------------------- turns


class Replayed:
    """A graph that notes when it is replayed, and takes the time that is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def replay(self) -> None:
        self.log.append(self.name)


class FakeEvent:
    """Its time is the number of the replay before it; the first replay of each graph takes long."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.at = log, -1

    def record(self) -> None:
        self.at = len(self.log)

    def elapsed_time(self, end: FakeEvent) -> float:
        (name,) = self.log[self.at : end.at]
        first = self.log.index(name) == self.at
        return 1000.0 if first else {SERIAL: 0.024, DUAL: 0.016}[name]


def test_replays_take_turns_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(log))
    measurement = Measurement({SERIAL: nothing, DUAL: nothing}, 2, 8, torch.float32, CPU)
    measurement.stream = types.SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
    monkeypatch.setattr(measurement, "_capture", lambda work, inputs: Replayed(next(names), log))
    names = iter([SERIAL, DUAL])
    times = measurement._times(measurement.works, torch.zeros(1, 8))
    assert times == pytest.approx({SERIAL: 12.0, DUAL: 8.0}), "microseconds per layer, without the first replay"
    rounds = [tuple(log[place : place + 2]) for place in range(0, len(log), 2)]
    assert len(rounds) == measure.ROUNDS + 1
    assert all({*one} == {SERIAL, DUAL} for one in rounds)
    assert all(one == tuple(reversed(other)) for one, other in itertools.pairwise(rounds)), "who is first alternates"


def test_no_number_of_torchs_own_generator_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    measurement = Measurement({SERIAL: nothing}, 1, 8, torch.float32, CPU)
    measurement.stream = None  # type: ignore[assignment]
    given: list[torch.Tensor] = []
    monkeypatch.setattr(measurement, "_times", lambda works, inputs: given.append(inputs) or {SERIAL: 1.0})
    state = torch.get_rng_state()
    measurement.row(4)
    assert torch.equal(torch.get_rng_state(), state) and given[0].any()


# ---------------------------------------------------------------- the capture, and what is left behind


class FakeGraph:
    def __init__(self, log: list[Any] | None = None) -> None:
        self.log: list[Any] = [] if log is None else log

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "other threads may call CUDA meanwhile"
        self.log.append(("begin", pool))

    def capture_end(self) -> None:
        self.log.append("end")


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_has_every_layer_once_after_a_call_outside(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """A kernel's first use may allocate. A capture that stays open would spoil everything after it."""
    log: list[Any] = []
    measurement = Measurement({SERIAL: nothing}, 3, 8, torch.float32, CPU)
    measurement.stream = types.SimpleNamespace(synchronize=lambda: log.append("synchronize"))  # type: ignore[assignment]
    measurement._pool = (0, 9)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log))

    def work(layer: int, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        log.append(layer)
        if fails and layer == 1:
            raise RuntimeError("no memory")
        return ()

    with pytest.raises(RuntimeError, match="no memory") if fails else contextlib.nullcontext():
        measurement._capture(work, torch.zeros(1, 8))
    layers = [0, 1] if fails else [0, 1, 2]
    assert log == [0, "synchronize", ("begin", (0, 9)), *layers, "end"]


@pytest.mark.parametrize(
    ("segments", "cleared"),
    [([], 1), ([{"segment_pool_id": (0, 0)}], 1), ([{"segment_pool_id": (0, 0)}, {"segment_pool_id": (0, 3)}], 0)],
    ids=["nothing", "no graph", "another engine's graphs"],
)
def test_work_space_of_captured_graphs_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, segments: list[dict[str, Any]], cleared: int
) -> None:
    """A graph goes on writing to the work space that cuBLAS had for it. torch frees all streams' at once."""
    calls: list[str] = []
    made = types.SimpleNamespace(wait_stream=lambda other: calls.append("wait"))
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(cuda, "current_stream", lambda device=None: "main")
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 9))
    monkeypatch.setattr(cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    monkeypatch.setattr(streams, "unused_stream", lambda device: made)
    with pytest.raises(RuntimeError, match="half way"), Measurement({SERIAL: nothing}, 1, 8, torch.float32, CPU):
        raise RuntimeError("half way")
    assert calls == ["wait", "synchronize", *["clear"] * cleared, "empty"]


# ---------------------------------------------------------------- main's GEMM alone


class Quantizing(torch.nn.Module):
    """A linear that quantizes its input by code of its own, reads a view of its weight, and has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randint(-3, 4, (6, 4)).float(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = (x * 3).round()
        return torch.mm(values, self.weight.t()) + 1


def test_of_main_the_call_that_reads_its_weight_is_measured() -> None:
    main, x = Quantizing(), torch.randn(3, 4)
    with torch.inference_mode():
        gemm = measure.gemm_that_reads(main.weight, lambda: main(x))
        assert torch.equal(gemm(), main(x) - 1), "its quantization and its bias are left out"
        assert "mm" in str(gemm.func)  # type: ignore[attr-defined]


def test_a_main_that_no_op_shows_is_measured_as_a_whole() -> None:
    main, x, other = Quantizing(), torch.randn(3, 4), torch.zeros(1)

    def whole() -> torch.Tensor:
        return main(x)

    assert measure.gemm_that_reads(other, whole) is whole
