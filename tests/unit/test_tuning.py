"""Which strategy wins, which sizes are measured, and numbers that show another order of summation."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay import streams, tuning
from overlay.side_work.plan import DUAL, DUAL_MAIN_FIRST, FUSED, SERIAL
from overlay.side_work.measure import ADVANTAGE, FEWEST_LAYERS, MILESTONES, MOST_LAYERS, TIE, Bench, Row, best, same_bits

OTHERS = (DUAL, DUAL_MAIN_FIRST, FUSED)
CPU = torch.device("cpu")

# ---------------------------------------------------------------- the choice

times_of = st.floats(1.0, 100.0)
close_to_one = st.floats(0.98, 1.02)


@given(
    times_of,
    st.dictionaries(st.sampled_from(OTHERS), close_to_one | st.floats(0.1, 10.0), max_size=3),
)
def test_the_choice_is_worth_it_and_almost_the_fastest(serial: float, ratios: dict[str, float]) -> None:
    times = {SERIAL: serial, **{name: serial * ratio for name, ratio in ratios.items()}}
    chosen = best(times)
    fastest = min(times.values())
    if chosen == SERIAL:
        assert fastest > ADVANTAGE * serial
    else:
        assert times[chosen] <= ADVANTAGE * serial and times[chosen] <= TIE * fastest


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({SERIAL: 10.0}, SERIAL),
        ({SERIAL: 10.0, DUAL: 9.91}, SERIAL),
        ({SERIAL: 10.0, DUAL: 9.9}, DUAL),
        ({SERIAL: 10.0, DUAL: 12.0, FUSED: 11.0}, SERIAL),
        ({SERIAL: 10.0, DUAL: 8.0, FUSED: 8.0}, FUSED),
        ({SERIAL: 10.0, DUAL: 8.0, FUSED: 8.03}, FUSED),
        ({SERIAL: 10.0, DUAL: 8.0, FUSED: 8.05}, DUAL),
        ({SERIAL: 10.0, DUAL: 8.0, DUAL_MAIN_FIRST: 8.0}, DUAL_MAIN_FIRST),
        ({SERIAL: 10.0, DUAL: 9.89, FUSED: 9.91}, DUAL),
        ({SERIAL: 10.0, "three": 8.0, "four": 7.99}, "three"),
    ],
)
def test_ties_go_to_what_needs_least(times: dict[str, float], chosen: str) -> None:
    assert best(times) == chosen


@settings(max_examples=50)
@given(st.permutations([SERIAL, *OTHERS]), st.lists(st.sampled_from([7.0, 7.02, 8.0, 10.0]), min_size=4, max_size=4))
def test_the_order_of_the_measurements_does_not_matter(order: list[str], values: list[float]) -> None:
    times = dict(zip([SERIAL, *OTHERS], values, strict=True))
    assert best({name: times[name] for name in order}) == best(times)


# ---------------------------------------------------------------- which sizes

SIZES = st.lists(st.integers(1, 2048), min_size=1, max_size=40)


@given(SIZES)
def test_milestones_are_sizes_and_reach_both_ends(sizes: list[int]) -> None:
    chosen = tuning._milestones(sizes)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(sizes)
    assert {min(sizes), max(sizes)} <= set(chosen) and len(chosen) <= len(MILESTONES) + 2
    for milestone in MILESTONES:
        above = [size for size in sizes if size >= milestone]
        assert not above or min(above) in chosen


def test_no_size_has_no_milestone() -> None:
    assert tuning._milestones([]) == []


@given(st.dictionaries(st.integers(1, 50), st.sampled_from([SERIAL, DUAL, FUSED]), max_size=8), st.integers(0, 60))
def test_neighbours_count_where_they_agree(strategies: dict[int, str], tokens: int) -> None:
    strategies.pop(tokens, None)
    measured = {size: Row(size, {}, strategy) for size, strategy in strategies.items()}
    below = [strategies[size] for size in sorted(strategies) if size < tokens][-1:]
    above = [strategies[size] for size in sorted(strategies) if size > tokens][:1]
    expected = (below + above)[0] if below + above and len({*below, *above}) == 1 else None
    assert tuning._neighbours(tokens, measured) == expected


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
    assert tuning.layers_for(megabytes << 20, available, CPU) == layers


# ---------------------------------------------------------------- rows, with times of our own


class Measured(Bench):
    """A bench whose GPU is a table: the strategy that is best at a size, and the strategies whose bits differ there."""

    winner: Callable[[int], str]
    differs: Mapping[int, tuple[str, ...]]

    def _inexact(self, tokens: int) -> tuple[str, ...]:
        return self.differs.get(tokens, ())

    def _measure(self, tokens: int, inexact: tuple[str, ...]) -> Row:
        self.measured.append(tokens)
        usable = [name for name in self.works if self.inexact or name not in inexact]
        times = {name: 8.0 if name == self.winner(tokens) else 10.0 for name in usable}
        return Row(tokens, times, best(times), inexact)


def nothing(layer: int, inputs: torch.Tensor) -> Sequence[torch.Tensor]:
    return ()


def measured(
    winner: Callable[[int], str], differs: Mapping[int, tuple[str, ...]] | None = None, inexact: bool = False
) -> Any:
    bench: Any = Measured(dict.fromkeys((SERIAL, *OTHERS), nothing), 1, 8, torch.float32, CPU, inexact)
    bench.winner, bench.differs, bench.measured = winner, differs or {}, []
    return bench


CAPTURED = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]


def test_sizes_between_different_strategies_are_measured_until_the_border_is_found() -> None:
    bench = measured(lambda tokens: FUSED if tokens <= 136 else DUAL if tokens < 400 else SERIAL)
    rows = bench.rows(CAPTURED, seconds=60)
    assert [row.tokens for row in rows] == CAPTURED
    assert all(row.strategy == (FUSED if row.tokens <= 136 else DUAL if row.tokens < 400 else SERIAL) for row in rows)
    assert {136, 144, 384, 400} <= set(bench.measured)
    assert len(bench.measured) == len(set(bench.measured)) < len(CAPTURED) / 2
    assert all(bool(row.microseconds) == (row.tokens in bench.measured) for row in rows)


def test_out_of_time_the_milestones_are_all_that_is_measured() -> None:
    bench = measured(lambda tokens: FUSED if tokens <= 136 else SERIAL)
    rows = bench.rows(CAPTURED, seconds=0)
    assert bench.measured == tuning._milestones(CAPTURED)
    between = {row.tokens: row.strategy for row in rows if 128 < row.tokens < 192}
    assert set(between.values()) == {SERIAL}, "between two strategies, and not measured"
    assert {row.strategy for row in rows if row.tokens <= 128} == {FUSED}


def test_the_deadline_is_looked_at_between_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: float(next(clock)))
    bench = measured(lambda tokens: (DUAL, SERIAL)[sum(tokens > border for border in (70, 140, 200, 300, 400)) % 2])
    bench.rows(CAPTURED, seconds=4)  # begins at 0, and looks at 1, 2, 3 and 4
    assert len(bench.measured) == len(tuning._milestones(CAPTURED)) + 3


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=30),
    st.dictionaries(st.integers(1, 600), st.lists(st.sampled_from(OTHERS), unique=True).map(tuple), max_size=30),
    st.sampled_from([0.0, 60.0]),
    st.sampled_from([SERIAL, *OTHERS]),
)
def test_no_size_gets_a_strategy_whose_bits_differ(
    sizes: list[int], differs: dict[int, tuple[str, ...]], seconds: float, favourite: str
) -> None:
    for row in measured(lambda tokens: favourite, differs).rows(sizes, seconds):
        assert row.strategy not in differs.get(row.tokens, ())
        assert row.inexact == differs.get(row.tokens, ()), "what differs is shown at every size"
    for row in measured(lambda tokens: favourite, differs, inexact=True).rows(sizes, seconds):
        assert row.strategy == favourite


def test_a_size_between_two_of_one_strategy_is_serial_where_its_bits_differ() -> None:
    rows = measured(lambda tokens: FUSED, {40: (FUSED,), 64: (DUAL,)}).rows(CAPTURED, seconds=60)
    found = {row.tokens: row for row in rows}
    assert found[40] == Row(40, {}, SERIAL, (FUSED,)) and found[48] == Row(48, {}, FUSED)
    assert found[64].strategy == FUSED and found[64].inexact == (DUAL,)


# ---------------------------------------------------------------- bits


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Streams of the CPU are none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield


def bench_of(works: Mapping[str, Any], hidden: int = 256, **options: Any) -> Bench:
    bench = Bench(works, 1, hidden, torch.bfloat16, CPU, **options)
    bench.stream = None  # type: ignore[assignment]
    return bench


def cancelling(hidden: int, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the inputs that `_inexact` gives to the works."""
    given: list[torch.Tensor] = []

    def keep(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        given.append(inputs.clone())
        return [inputs]

    with on_the_cpu():
        bench = bench_of({SERIAL: keep}, hidden, cancels=True)
        weights = bench.weights(rows)
        bench._inexact(tokens)
    return weights, given[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(32, 300).map(lambda half: 2 * half), st.integers(1, 40), st.integers(1, 20))
def test_products_cancel_exactly(hidden: int, rows: int, tokens: int) -> None:
    weights, inputs = cancelling(hidden, rows, tokens)
    assert weights.shape == (rows, hidden) and inputs.shape == (tokens, hidden)
    products = inputs.double()[:, None, :] * weights.double()[None, :, :]
    # bf16 has 8 bits: products have 16, in a range that float64 holds.
    assert not products.sum(-1).any()
    assert products.abs().sum(-1).min() > 1.0, "it is the sum that is nothing, not what is added"


def summed(inputs: torch.Tensor, weights: torch.Tensor, parts: int) -> torch.Tensor:
    """A matrix product in float32, added up column by column in so many parts, which are added at the end: what a kernel
    does that splits the sum (split-k)."""
    products = (inputs.float()[:, None, :] * weights.float()[None, :, :]).numpy()
    # numpy's cumulative sum rounds to float32 at each step; torch's adds up in float64.
    sums = [part.cumsum(-1, dtype=np.float32)[..., -1] for part in np.array_split(products, parts, axis=-1)]
    return torch.from_numpy(np.sum(sums, axis=0, dtype=np.float32)).to(torch.bfloat16)


def test_another_order_shows_in_almost_every_result() -> None:
    """Random numbers show it in few: that is why products have to cancel."""
    weights, inputs = cancelling(1024, 24, 4)
    one, two = summed(inputs, weights, 1), summed(inputs, weights, 2)
    assert (one != two).float().mean() > 0.9
    generator = torch.Generator().manual_seed(0)
    inputs, weights = (torch.randn(rows, 1024, generator=generator).bfloat16() for rows in (4, 24))
    assert (summed(inputs, weights, 1) != summed(inputs, weights, 2)).float().mean() < 0.1


def compared(other: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **options: Any) -> tuple[str, ...]:
    """What a bench says of a work beside serial, on weights that cancel."""
    with on_the_cpu():
        bench = bench_of({}, 512, cancels=True, **options)
        weights = bench.weights(8)
        bench.works = {
            SERIAL: lambda layer, inputs: [summed(inputs, weights, 1)],
            "other": lambda layer, inputs: [other(inputs, weights)],
        }
        return bench._inexact(2)


def test_a_strategy_that_adds_in_another_order_is_found() -> None:
    assert compared(lambda inputs, weights: summed(inputs, weights, 1)) == ()
    assert compared(lambda inputs, weights: summed(inputs, weights, 2)) == ("other",)


def one_bit_off(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    result = summed(inputs, weights, 1)
    result.view(torch.int16)[-1, -1] ^= 1
    return result


def test_one_bit_is_enough() -> None:
    assert compared(one_bit_off) == ("other",)


def test_a_kernel_that_varies_by_itself_excuses_those_that_run_the_same() -> None:
    calls = 0

    def varying(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return summed(inputs, weights, 1 + calls % 3)

    def found(same_kernels: tuple[str, ...]) -> tuple[str, ...]:
        with on_the_cpu():
            bench = bench_of({}, 512, cancels=True, same_kernels=same_kernels)
            weights = bench.weights(8)
            works = (SERIAL, DUAL, FUSED)
            bench.works = {name: lambda layer, inputs: [varying(inputs, weights)] for name in works}
            return bench._inexact(2)

    assert found(()) == (DUAL, FUSED)
    assert found((DUAL,)) == (FUSED,)
    assert compared(lambda inputs, weights: summed(inputs, weights, 2), same_kernels=("other",)) == ("other",)


def test_results_of_nothing_but_zeros_prove_nothing() -> None:
    def zeros(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [inputs, inputs * 0]

    with on_the_cpu():
        assert bench_of({SERIAL: zeros, DUAL: zeros, FUSED: zeros})._inexact(4) == (DUAL, FUSED)


def test_without_weights_that_cancel_the_first_layer_is_compared() -> None:
    layers: list[int] = []

    def work(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        layers.append(layer)
        return [inputs]

    with on_the_cpu():
        assert bench_of({SERIAL: work, DUAL: work})._inexact(4) == ()
        assert bench_of({SERIAL: work, DUAL: work}, cancels=True)._inexact(4) == ()
    assert layers == [0, 0, tuning.CANCELLING, tuning.CANCELLING]


def test_sizes_at_which_a_work_is_exact_and_memory_is_found() -> None:
    def other(layer: int, inputs: torch.Tensor) -> list[torch.Tensor]:
        if len(inputs) == 3:
            raise torch.cuda.OutOfMemoryError
        return [inputs if len(inputs) != 2 else -inputs]

    with on_the_cpu():
        bench = bench_of({SERIAL: lambda layer, inputs: [inputs], "other": other})
        assert bench.exact_at("other", [1, 2, 3, 4]) == [1, 4]


def test_no_number_of_torchs_own_generator_is_taken() -> None:
    state = torch.get_rng_state()
    cancelling(64, 3, 2)
    assert torch.equal(torch.get_rng_state(), state)


@given(st.lists(st.floats(width=32), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_bits_are_compared_and_not_values(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype)
    assert same_bits(tensor, tensor.clone()), "NaN is NaN"
    changed = tensor.clone()
    changed.view(tuning.BITS[changed.element_size()])[-1] ^= 1
    assert not same_bits(tensor, changed)


def test_minus_zero_is_not_zero() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


# ---------------------------------------------------------------- what is left behind


class FakeGraph:
    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "other threads may call CUDA meanwhile"

    def capture_end(self) -> None: ...


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
    forgotten: list[Any] = []
    monkeypatch.setattr(streams, "forget", forgotten.append)
    with pytest.raises(RuntimeError, match="half way"), Bench({SERIAL: nothing}, 1, 8, torch.float32, CPU):
        raise RuntimeError("half way")
    assert calls == ["wait", "synchronize", *["clear"] * cleared, "empty"]
    assert forgotten == [made]
