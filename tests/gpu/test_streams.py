"""Fork and join on a real GPU: overlap, capture and replay, the life of what auxiliary streams allocate, failures.

Delays are kernels that spin, so an order that is missing shows as a wrong value, not as luck.
"""

from __future__ import annotations

import gc
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from overlay.side_work import streams
from overlay.side_work.streams import ParallelRegion
from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]

#: Cycles of a spinning kernel: about 5 and 25 ms at 2 GHz.
SHORT, LONG = 10_000_000, 50_000_000
#: Elements of 4 bytes: a block of the allocator's pool for large ones.
SIZE = 2**20
DEVICE = torch.device("cuda", 0)

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def empty_allocator() -> Iterator[None]:
    """Nothing runs, and no block is left that an allocation could take instead of the one under test."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.synchronize()


def prepared(slots: int) -> ParallelRegion:
    region = ParallelRegion(slots)
    region.prepare(DEVICE)
    return region


def nothing() -> None:
    """A default callable that leaves the main stream alone."""


def sleep(cycles: int) -> Callable[[], None]:
    return lambda: torch.cuda._sleep(cycles)


def filled(value: float) -> Tensor:
    return torch.full((SIZE,), value, device=DEVICE)


def milliseconds(work: Callable[[], Any]) -> float:
    """GPU time on the current stream, the shortest of three."""
    found = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return min(found)


def captured(work: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `work`, which has run once before, and what it gave while it was captured."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result


# ---------------------------------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize("pattern", [(True,), (True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
def test_the_callables_overlap(pattern: tuple[bool, ...], in_graph: bool) -> None:
    """Each spins on one thread of the GPU. Side by side they take the time of one, serially the time of all."""
    auxiliary = [sleep(SHORT) if used else None for used in pattern]
    found = []
    # Two streams may share one of the GPU's eight hardware queues, which makes them serial: then others are tried.
    for main in (torch.cuda.current_stream(), *(torch.cuda.Stream(DEVICE) for _ in range(3))):
        with torch.cuda.stream(main):
            region = prepared(len(pattern))
            torch.cuda._sleep(LONG)  # the clock goes up

            def time_of(run: Callable[..., Any]) -> float:
                work = lambda: run(sleep(SHORT), auxiliary)  # noqa: E731
                return milliseconds(captured(work)[0].replay if in_graph else work)

            one = milliseconds(sleep(SHORT))
            parallel, serial = time_of(region.run), time_of(region.run_serially)
        assert serial > 0.9 * (1 + sum(pattern)) * one
        found.append((parallel, serial, one))
        if parallel < 1.3 * one:
            return
    pytest.fail(f"no overlap; side by side, serially and alone it took (ms): {found}")


# ---------------------------------------------------------------------------------------------------- capture and replay


@pytest.mark.parametrize("pattern", list(itertools.product([False, True], repeat=3)), ids=str)
def test_replays_with_changing_inputs(pattern: tuple[bool, ...]) -> None:
    """Every slot starts late and the input changes under every replay: a missing wait would show another input's values."""
    region = prepared(3)
    source = torch.zeros(SIZE, device=DEVICE)

    def late(factor: float) -> Callable[[], Tensor]:
        def work() -> Tensor:
            torch.cuda._sleep(SHORT // 10)
            return source * factor

        return work

    def step() -> Tensor:
        source.add_(1)  # what the fork has to wait for
        default, results = region.run(
            lambda: source * 2, [late(3.0 + slot) if used else None for slot, used in enumerate(pattern)]
        )
        assert [result is not None for result in results] == list(pattern)
        total = default.clone()
        for result in results:
            if result is not None:
                total += result
        source.zero_()  # what the join has to come before
        return total

    graph, total = captured(step)
    factor = 2 + sum(3 + slot for slot, used in enumerate(pattern) if used)
    for number in range(20):
        source.fill_(number)
        graph.replay()
        found = total.unique().tolist()
        assert found == [(number + 1.0) * factor]


def test_replay_and_eager_take_turns() -> None:
    """A captured region may also run eagerly: its events then belong to both."""
    region = prepared(1)
    source = torch.zeros(SIZE, device=DEVICE)

    def step() -> Tensor:
        default, (side,) = region.run(lambda: source + 1, [lambda: source * 5])
        return default + side

    graph, result = captured(step)
    for number in range(1, 11):
        source.fill_(number)
        graph.replay()
        eager = step()
        assert result.unique().tolist() == eager.unique().tolist() == [number * 6.0 + 1]


# ------------------------------------------------------------------------------------- the life of what a slot allocates


def write_consume_write(produce: Callable[[float], Tensor], sink: Tensor) -> tuple[int, int, Tensor]:
    """17 is produced and a late consumer copies it; its last reference goes, and 93 is produced in the same size."""
    first = produce(17.0)
    address = first.data_ptr()
    torch.cuda._sleep(LONG)
    sink.copy_(first)
    del first
    second = produce(93.0)
    return address, second.data_ptr(), second


def test_a_freed_result_is_not_overwritten_before_it_was_read() -> None:
    region = prepared(1)
    sink = torch.zeros(SIZE, device=DEVICE)
    filled(0.0)  # loads the kernel
    torch.cuda.synchronize()
    before, after, second = write_consume_write(lambda value: region.run(nothing, [lambda: filled(value)])[1][0], sink)
    torch.cuda.synchronize()
    assert before == after, "the allocator has not used the block again, so this shows nothing"
    assert sink.unique().tolist() == [17.0] and second.unique().tolist() == [93.0]


def test_without_the_start_event_it_would_be() -> None:
    """The same with a join but no wait at the fork: this is what the test above looks for."""
    sink = torch.zeros(SIZE, device=DEVICE)
    for _ in range(8):  # one of them has a hardware queue of its own
        stream = torch.cuda.Stream(DEVICE)

        def produce(value: float, stream: torch.cuda.Stream = stream) -> Tensor:
            with torch.cuda.stream(stream):
                made = filled(value)
            torch.cuda.current_stream().wait_stream(stream)
            return made

        produce(0.0)
        torch.cuda.synchronize()
        before, after, _ = write_consume_write(produce, sink)
        torch.cuda.synchronize()
        assert before == after
        if sink.unique().tolist() == [93.0]:
            return
    pytest.fail("a race that has to be lost was won eight times: the delay is no delay here")


def test_a_freed_result_in_a_graph() -> None:
    region = prepared(1)
    sink = torch.zeros(SIZE, device=DEVICE)
    addresses: list[tuple[int, int]] = []

    def step() -> Tensor:
        before, after, second = write_consume_write(
            lambda value: region.run(nothing, [lambda: filled(value)])[1][0], sink
        )
        addresses.append((before, after))
        return second

    graph, second = captured(step)
    assert addresses[-1][0] == addresses[-1][1], "the graph's pool has not used the block again"
    for _ in range(3):
        sink.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert sink.unique().tolist() == [17.0] and second.unique().tolist() == [93.0]


def test_many_slots_and_layers_that_use_each_others_blocks() -> None:
    """Twenty layers share three auxiliary streams; every result dies at once, and every block is taken again."""
    regions = [prepared(3) for _ in range(20)]
    state = torch.zeros(SIZE, device=DEVICE)

    def forward(run_of: Callable[[ParallelRegion], Callable[..., Any]]) -> Tensor:
        current = state + 1
        for number, region in enumerate(regions):
            here = current
            main, sides = run_of(region)(
                lambda here=here: here * 1.01,
                [lambda here=here, slot=slot: torch.sin(here + slot) for slot in range(3)],
            )
            if number % 5 == 0:
                torch.cuda._sleep(SHORT // 20)
            current = main + sides[0] * sides[1] - sides[2]
        return current

    graph, result = captured(lambda: forward(lambda region: region.run))
    for number in range(20):
        state.fill_(number / 7)
        expected = forward(lambda region: region.run_serially)
        graph.replay()
        eager = forward(lambda region: region.run)
        assert torch.equal(result, expected) and torch.equal(eager, expected)
        assert expected.isfinite().all()


# --------------------------------------------------------------------------------- two runners, and a target with a drafter


def test_two_runners_with_main_streams_of_their_own() -> None:
    """What one runner has freed and its main stream not yet read must not be written by the other's auxiliary work."""
    mains = [torch.cuda.Stream(DEVICE) for _ in range(2)]
    regions = []
    for main in mains:
        with torch.cuda.stream(main):
            regions.append(prepared(1))
            filled(0.0)
    assert regions[0]._auxiliary_streams[0] != regions[1]._auxiliary_streams[0]
    assert not {stream for region in regions for stream in region._auxiliary_streams} & set(mains)
    torch.cuda.synchronize()
    sinks = [torch.zeros(5, SIZE, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    for round_ in range(5):
        for number, (main, region, sink) in enumerate(zip(mains, regions, sinks, strict=True)):
            with torch.cuda.stream(main):
                value = 100.0 * number + round_
                _, (made,) = region.run(nothing, [lambda value=value: filled(value)])
                torch.cuda._sleep(SHORT)
                sink[round_].copy_(made)
                del made
    for main in mains:
        main.synchronize()
    for number, sink in enumerate(sinks):
        expected = [100.0 * number + round_ for round_ in range(5)]
        assert sink.amin(dim=1).tolist() == sink.amax(dim=1).tolist() == expected


def test_target_and_drafter_in_graphs_that_share_a_pool() -> None:
    """As in speculative decoding: one main stream, two models, their graphs from one memory pool, replayed in turn."""
    target_region, draft_region = prepared(2), prepared(1)
    assert draft_region._auxiliary_streams[0] == target_region._auxiliary_streams[0]
    tokens = torch.zeros(SIZE, device=DEVICE)

    def late_product(factor: float) -> Callable[[], Tensor]:
        def work() -> Tensor:
            torch.cuda._sleep(SHORT // 10)
            return tokens * factor

        return work

    def target() -> Tensor:
        main, (one, two) = target_region.run(lambda: tokens + 1, [late_product(2), late_product(4)])
        return main + one + two

    def drafter() -> Tensor:
        main, (one,) = draft_region.run(lambda: tokens - 1, [late_product(8)])
        return main + one

    pool = torch.cuda.graph_pool_handle()
    target_graph, target_result = captured(target, pool)
    draft_graph, draft_result = captured(drafter, pool)
    for number in range(1, 16):
        tokens.fill_(number)
        target_graph.replay()
        verified = target_result.clone()
        for _ in range(3):
            draft_graph.replay()
        drafted = draft_result.clone()
        assert verified.unique().tolist() == [7.0 * number + 1] and drafted.unique().tolist() == [9.0 * number - 1]


# ---------------------------------------------------------------------------------------------------------------- failures


def fails() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("failing", ["default", 0, 1, 2], ids=str)
def test_a_failure_during_a_capture_leaves_no_dangling_fork(failing: Any) -> None:
    """The capture goes on, ends, and the graph replays what had been launched."""
    region = prepared(3)
    values = torch.ones(3, SIZE, device=DEVICE)

    def add(slot: int) -> Callable[[], None]:
        def work() -> None:
            torch.cuda._sleep(SHORT // 10)
            values[slot].add_(1)

        return work

    region.run(nothing, [add(slot) for slot in range(3)])
    values.mul_(1).fill_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ZeroDivisionError):
            region.run(
                fails if failing == "default" else nothing,
                [fails if failing == slot else add(slot) for slot in range(3)],
            )
        values.mul_(10)
    graph.replay()
    torch.cuda.synchronize()
    launched = range(3) if failing == "default" else range(failing)
    assert values[:, 0].tolist() == [20.0 if slot in launched else 10.0 for slot in range(3)]
    assert torch.equal(values, values[:, :1].expand(-1, SIZE))
    result, results = region.run(lambda: 1, [lambda: 2, None, lambda: 3])
    assert (result, results) == (1, (2, None, 3)), "the region can be used again"


def test_preparing_inside_a_capture_is_refused_and_spoils_nothing() -> None:
    region = ParallelRegion(slots=1)
    values = torch.ones(8, device=DEVICE)
    values.mul_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
            region.prepare(DEVICE)
        values.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert values.tolist() == [2.0] * 8 and not region.prepared


def test_streams_are_not_made_without_end() -> None:
    """torch has 32 streams per device and hands them out in turn: regions share theirs."""
    before = len(streams._streams)
    regions = [prepared(2) for _ in range(100)]
    assert len(streams._streams) <= before + 2
    assert len({stream for region in regions for stream in region._auxiliary_streams}) == 2


# --------------------------------------------------------------------------------------------------------------- sanitizer

CHECKED = """
import torch
from overlay.side_work.streams import ParallelRegion

device = torch.device("cuda", 0)
region = ParallelRegion(slots=3)
region.prepare(device)
source = torch.arange(4096, device=device, dtype=torch.float32)

def step():
    main, sides = region.run(lambda: source * 2, [lambda: source + 1, None, lambda: source.sum()])
    return main + sides[0] + sides[2]

expected = step()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = step()
for _ in range(3):
    graph.replay()
torch.cuda.synchronize()
assert torch.equal(result, expected)
print("checked")
"""


def test_under_compute_sanitizer() -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    paths = [str(REPOSITORY), str(pathlib.Path(torch.__file__).parents[1])]
    environment = {**os.environ, "VLLMOVERLAY": "0", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "3"]
    done = subprocess.run(
        [*command, sys.executable, "-c", CHECKED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0 and "checked" in done.stdout, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
