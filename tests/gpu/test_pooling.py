"""Upstream's own pooling step of 0.19.x on a real GPU, stock and with the overlay: same bits, and what is synchronised.

The vLLM that is installed may be any: the step and its poolers come out of the sources of a release, from the folder that
`devtools.releases` keeps, or from ``OVERLAY_TEST_RELEASES`` (a folder with ``0.19.1/vllm/…`` in it) where that is not there.
"""

from __future__ import annotations

import gc
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none here"),
]

VERSIONS = ("0.19.0", "0.19.1")
SYNCHRONISATIONS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
STEPS = 10
#: Requests, tokens of each, hidden size. The last one is 32768 tokens of an 8192 wide model, 512 MiB of hidden states.
SETTINGS = {"small": (8, 32, 1024), "large": (256, 128, 8192)}


def folder_of(version: str) -> pathlib.Path:
    root = pathlib.Path(os.environ.get("OVERLAY_TEST_RELEASES", REPOSITORY / ".cache" / "releases"))
    if not (root / version / "vllm").is_dir():
        pytest.skip(f"no sources of vLLM {version} in {root}; set OVERLAY_TEST_RELEASES to a folder that has them")
    return root / version


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def step_of(version: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The two sides' runners, made by the kind of the pooler."""
    pytest.importorskip("vllm", reason="the poolers import from an installed vLLM")
    from overlay.patches.pooling import patch as pooling
    from overlay.patches.registry import judge
    from overlay.report.journal import journal
    from overlay.settings import Settings
    from overlay.verdict import SourceTree
    from tests.contract import pooling_runner as harness

    monkeypatch.setattr(journal, "patches", {})
    folder = folder_of(version)
    parts = harness.poolers(folder)
    stock, overlay = (harness.released_module(harness.path_of(folder)) for _ in range(2))
    found = pooling.install(overlay, judge("pooling", SourceTree(folder)), Settings())
    assert found.state == "apply"

    def make(module: types.ModuleType, kind: str) -> Any:
        return module.GPUModelRunner(parts, harness.make_pooler(parts, kind), device="cuda")

    yield types.SimpleNamespace(
        stock=lambda kind: make(stock, kind),
        overlay=lambda kind: make(overlay, kind),
        request=harness.request,
        calls=journal.patch("pooling").calls,
    )
    gc.collect()
    torch.cuda.empty_cache()


def result_of(output: Any) -> Any:
    return output.get_output() if hasattr(output, "get_output") else output


def hidden_states(requests: list[Any], hidden: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    tokens = sum(request.scheduled for request in requests)
    return torch.randn(tokens, hidden, generator=generator, device="cuda", dtype=torch.bfloat16)


def assert_same_bits(one: Any, other: Any) -> None:
    assert one.req_ids == other.req_ids and len(one.pooler_output) == len(other.pooler_output)
    for mine, theirs in zip(one.pooler_output, other.pooler_output, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.device.type == "cpu" and mine.isfinite().all() and mine.count_nonzero()
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def batch_of(step_of: types.SimpleNamespace, kind: str) -> list[list[Any]]:
    """Steps with whole prompts; for the poolers that allow it, with prompts in pieces as well."""
    request = step_of.request
    whole = [request(f"w{index}", 5 + index) for index in range(6)]
    if kind in ("mean", "cls"):
        return [whole, whole[:1]]
    return [
        [request("a", 9, 4), request("b", 12, 4)],
        [request("a", 9, 5, 4), request("b", 12, 4, 4), *whole],
        [request("b", 12, 4, 8), *whole[:2]],
    ]


@pytest.mark.parametrize("kind", ["last", "mean", "cls", "token"])
def test_the_same_bits(step_of: types.SimpleNamespace, kind: str) -> None:
    stock, overlay = step_of.stock(kind), step_of.overlay(kind)
    steps = batch_of(step_of, kind)
    assert overlay.async_output_copy_stream is None
    for number, requests in enumerate(steps):
        states = hidden_states(requests, 1024, number)
        expected = result_of(stock.step(requests, states))
        found = result_of(overlay.step(requests, states))
        assert_same_bits(found, expected)
    finished = [any(request.finished for request in requests) for requests in steps]
    assert step_of.calls.dual_stream == sum(finished)
    assert overlay.async_output_copy_stream not in (None, torch.cuda.current_stream())
    assert stock.async_output_copy_stream is None and not overlay.use_async_scheduling


def test_the_copy_waits_for_a_late_pooler_and_the_host_does_not(step_of: types.SimpleNamespace) -> None:
    """The pooler's result is made long after `_pool` has returned. A copy that did not wait would bring what was there before."""
    stock, overlay = step_of.stock("last"), step_of.overlay("last")
    requests = [step_of.request(f"r{index}", 16) for index in range(8)]

    def late(pooler: Any) -> Any:
        def run(**arguments: Any) -> Any:
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            return pooler(**arguments)

        return run

    # What is made on first use would synchronise: the stream, kernels, blocks of memory. Pinned blocks for several
    # results, because the last one is still held when the next is copied.
    warm = [result_of(side.step(requests, hidden_states(requests, 1024, 99))) for side in (stock, overlay) * 3]
    del warm
    overlay.model.pooler, stock.model.pooler = late(overlay.model.pooler), late(stock.model.pooler)
    for number in range(5):
        states = hidden_states(requests, 1024, number)
        torch.cuda.synchronize()
        output = overlay.step(requests, states)
        assert not output.async_copy_ready_event.query(), "the host has waited for the GPU"
        found = output.get_output()
        expected = result_of(stock.step(requests, states))
        assert torch.cuda.current_stream().query(), "stock does wait"
        assert_same_bits(found, expected)


def test_many_steps_whose_memory_is_used_again(step_of: types.SimpleNamespace) -> None:
    """The next step's tensors take the freed blocks of the last one's."""
    stock, overlay = step_of.stock("mean"), step_of.overlay("mean")
    for number in range(100):
        requests = [step_of.request(f"r{index}", 1 + (number + index) % 7) for index in range(1 + number % 9)]
        found = result_of(overlay.step(requests, hidden_states(requests, 512, number)))
        noise = [torch.full_like(hidden_states(requests, 512, number), 93) for _ in range(3)]
        expected = result_of(stock.step(requests, hidden_states(requests, 512, number)))
        del noise
        assert_same_bits(found, expected)
    assert step_of.calls.dual_stream == 100


def synchronisations(work: Any, times: int) -> dict[str, int]:
    """How often the CUDA runtime was asked to synchronise while `work` ran, by function."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(times):
            work()
    names = [event.name for event in profile.events()]
    return {name: names.count(name) for name in SYNCHRONISATIONS}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["last", "token"])
def test_synchronisations_per_step(
    step_of: types.SimpleNamespace, version: str, kind: str, setting: str, record_property: Any
) -> None:
    """Stock synchronises the device once a step; with the overlay an event is waited for, and nothing else is added."""
    count, tokens, hidden = SETTINGS[setting]
    requests = [step_of.request(f"r{index}", tokens) for index in range(count)]
    states = hidden_states(requests, hidden, 0)
    found: dict[str, dict[str, float]] = {}
    for side in ("stock", "overlay"):
        runner = getattr(step_of, side)(kind)
        step = lambda runner=runner: result_of(runner.step(requests, states))  # noqa: E731
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        # What the profiler adds at its begin and end is in both counts.
        few, many = synchronisations(step, 1), synchronisations(step, 1 + STEPS)
        found[side] = {name: (many[name] - few[name]) / STEPS for name in SYNCHRONISATIONS}
    record_property(f"{version} {kind} {setting}", found)
    print(f"\nvLLM {version}, pooler {kind}, {setting} ({count} x {tokens} tokens, hidden {hidden}): {found}")
    stock, overlay = found["stock"], found["overlay"]
    assert stock["cudaDeviceSynchronize"] == 1 and overlay["cudaDeviceSynchronize"] == 0
    assert overlay["cudaStreamSynchronize"] == stock["cudaStreamSynchronize"]
    assert overlay["cudaEventSynchronize"] == stock["cudaEventSynchronize"] + 1
