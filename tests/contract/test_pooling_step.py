"""Upstream's own `_pool` of 0.19.0 and 0.19.1 with their own poolers, stock and with the overlay: the same bits, no device sync.

Streams, events and the device are recording fakes: the order of what is done to them is compared with what is right.
"""

from __future__ import annotations

import ast
import contextlib
import pathlib
import threading
import types
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.patches.registry import judge
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings
from overlay.side_work import adoption
from overlay.side_work.adoption import StaysStock

from .released import tree

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
from overlay.patches.pooling import patch as pooling  # noqa: E402

from . import pooling_runner as harness  # noqa: E402
from .pooling_runner import Log, Request, request  # noqa: E402

pytestmark = pytest.mark.contract

VERSIONS = ("0.19.0", "0.19.1")
KINDS = ("last", "mean", "cls", "token")
each_version = pytest.mark.parametrize("version", VERSIONS)
each_kind = pytest.mark.parametrize("kind", KINDS)

STOCK = [("copy", "main"), ("device sync",)]
ASYNCHRONOUS = [("wait", "copy stream", "main"), ("copy", "copy stream"), ("record", "copy stream")]


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    """A fresh record, and a platform with CUDA's name."""
    monkeypatch.setattr(journal, "patches", {})
    monkeypatch.setattr(adoption, "other_device", lambda: None)
    return journal.patch("pooling")


def released(version: str, overlay: bool, text: str | None = None) -> types.ModuleType:
    """A module with the release's runner in it, stock or as the overlay's hook leaves it."""
    folder = pathlib.Path(tree(version).folder)
    module = harness.released_module(harness.path_of(folder), text)
    if overlay:
        found = pooling.install(module, judge("pooling", tree(version)), Settings())
        assert found.state == "apply"
    return module


def parts_of(version: str) -> types.SimpleNamespace:
    return harness.poolers(pathlib.Path(tree(version).folder))


def runner_of(version: str, module: types.ModuleType, kind: str, **options: Any) -> Any:
    parts = parts_of(version)
    return module.GPUModelRunner(parts, harness.make_pooler(parts, kind), **options)


def result_of(output: Any) -> Any:
    return output.get_output() if hasattr(output, "get_output") else output


def same_bits(one: Any, other: Any) -> bool:
    return (
        one.req_ids == other.req_ids
        and one.req_id_to_index == other.req_id_to_index
        and len(one.pooler_output) == len(other.pooler_output)
        and all(
            (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
            for a, b in zip(one.pooler_output, other.pooler_output, strict=True)
        )
    )


Steps = Sequence[Sequence[Request]]


def run(version: str, overlay: bool, kind: str, steps: Steps, **options: Any) -> tuple[list[Any], list[Log], list[Any]]:
    """Per step: the result, the log, and the type of what `_pool` gave."""
    module = released(version, overlay)
    results, logs, kinds = [], [], []
    with harness.recording_cuda(module) as log:
        runner = runner_of(version, module, kind, **options)
        for number, requests in enumerate(steps):
            del log[:]
            output = runner.step(requests, harness.hidden_states(sum(r.scheduled for r in requests), seed=number))
            kinds.append(type(output).__name__)
            results.append(result_of(output))
            logs.append(list(log))
    return results, logs, kinds


WHOLE = [request("a", 5), request("b", 3), request("c", 1)]


@each_version
@each_kind
def test_the_same_bits_without_a_device_sync(version: str, kind: str, record: PatchRecord) -> None:
    stock, stock_logs, stock_types = run(version, False, kind, [WHOLE, WHOLE])
    overlaid, logs, types_ = run(version, True, kind, [WHOLE, WHOLE])
    assert all(same_bits(*pair) for pair in zip(stock, overlaid, strict=True))
    assert all(output.isfinite().all() and output.count_nonzero() for output in stock[0].pooler_output)
    assert not torch.equal(stock[0].pooler_output[0], stock[1].pooler_output[0])
    assert stock_logs == [STOCK, STOCK] and stock_types == ["ModelRunnerOutput"] * 2
    # The stream is made by the first step that needs it, and once.
    assert logs == [[("made", "copy stream"), *ASYNCHRONOUS, ("event sync",)], [*ASYNCHRONOUS, ("event sync",)]]
    assert types_ == ["AsyncGPUPoolingModelRunnerOutput"] * 2
    assert (record.calls.dual_stream, record.calls.serial) == (2, {})
    assert record.patched == {"GPUModelRunner": {"executor": "uni", "rank": 0}}


@each_version
def test_the_result_is_not_waited_for_before_it_is_asked_for(version: str) -> None:
    module = released(version, overlay=True)
    with harness.recording_cuda(module) as log:
        output = runner_of(version, module, "last").step(WHOLE, harness.hidden_states(9))
        assert ("event sync",) not in log
        output.get_output()
    assert log[-1] == ("event sync",)


@each_version
@pytest.mark.parametrize("kind", ["last", "token"])
def test_chunked_prefill(version: str, kind: str, record: PatchRecord) -> None:
    """First nobody has finished, then one, then the other."""
    steps = [
        [request("a", 9, 4), request("b", 12, 4)],
        [request("a", 9, 5, 4), request("b", 12, 4, 4)],
        [request("b", 12, 4, 8)],
    ]
    stock, stock_logs, stock_types = run(version, False, kind, steps)
    overlaid, logs, types_ = run(version, True, kind, steps)
    assert all(same_bits(*pair) for pair in zip(stock, overlaid, strict=True))
    assert [[output is not None for output in step.pooler_output] for step in overlaid] == [
        [False, False],
        [True, False],
        [True],
    ]
    assert stock_logs == [[], STOCK, STOCK] and stock_types == ["ModelRunnerOutput"] * 3
    assert logs == [[("made", "copy stream")], *[[*ASYNCHRONOUS, ("event sync",)]] * 2]
    assert types_ == ["ModelRunnerOutput", *["AsyncGPUPoolingModelRunnerOutput"] * 2]
    assert (record.calls.dual_stream, record.calls.serial) == (2, {pooling.NOTHING_FINISHED: 1})


@each_version
def test_outputs_of_different_sizes_come_as_a_list(version: str) -> None:
    """Requests that ask for different dimensions: the pooler gives a list, which is copied one by one."""
    steps = [[request("a", 5, dimensions=8), request("b", 3), request("c", 4, use_activation=False)]]
    (stock,), _, _ = run(version, False, "last", steps)
    (overlaid,), (log,), _ = run(version, True, "last", steps)
    assert same_bits(stock, overlaid)
    assert [tuple(output.shape) for output in overlaid.pooler_output] == [(8,), (32,), (32,)]
    assert ("device sync",) not in log


@each_version
def test_an_empty_batch(version: str) -> None:
    (stock,), _, _ = run(version, False, "last", [[]])
    (overlaid,), _, (kind,) = run(version, True, "last", [[]])
    assert same_bits(stock, overlaid) and overlaid.pooler_output == [] and kind == "ModelRunnerOutput"


@st.composite
def batches(draw: st.DrawFn) -> list[Request]:
    found = []
    for index in range(draw(st.integers(1, 6))):
        prompt = draw(st.integers(1, 12))
        computed = draw(st.integers(0, prompt - 1))
        scheduled = draw(st.integers(1, prompt - computed))
        dimensions = draw(st.sampled_from([None, None, 4, 16]))
        activation = draw(st.booleans())
        found.append(
            request(f"r{index}", prompt, scheduled, computed, dimensions=dimensions, use_activation=activation)
        )
    return found


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(batches(), min_size=1, max_size=3), kind=st.sampled_from(["last", "token"]))
def test_any_batches(batches: list[list[Request]], kind: str) -> None:
    stock, stock_logs, _ = run("0.19.1", False, kind, batches)
    overlaid, logs, _ = run("0.19.1", True, kind, batches)
    assert all(same_bits(*pair) for pair in zip(stock, overlaid, strict=True))
    for requests, stock_log, log in zip(batches, stock_logs, logs, strict=True):
        finished = any(request.finished for request in requests)
        assert stock_log == (STOCK if finished else [])
        assert [entry for entry in log if entry[0] != "made"] == ([*ASYNCHRONOUS, ("event sync",)] if finished else [])


# --------------------------------------------------------------------------------------------------------------- the flag


@each_version
def test_the_flag_is_true_in_the_pooling_step_only(version: str) -> None:
    module = released(version, overlay=True)
    seen = []
    with harness.recording_cuda(module):
        runner = runner_of(version, module, "last")
        real = runner.model.pooler
        runner.model.pooler = lambda **arguments: (seen.append(runner.use_async_scheduling), real(**arguments))[1]
        assert runner.use_async_scheduling is False
        runner.step(WHOLE, harness.hidden_states(9))
        assert runner.use_async_scheduling is False
    assert seen == [True]


@each_version
def test_the_flag_is_as_before_when_the_pooler_fails(version: str) -> None:
    module = released(version, overlay=True)

    def fails(**arguments: Any) -> None:
        raise ZeroDivisionError

    with harness.recording_cuda(module):
        runner = runner_of(version, module, "last")
        pooler, runner.model.pooler = runner.model.pooler, fails
        with pytest.raises(ZeroDivisionError):
            runner.step(WHOLE, harness.hidden_states(9))
        assert runner.use_async_scheduling is False
        runner.model.pooler = pooler
        assert runner.step(WHOLE, harness.hidden_states(9)).get_output().req_ids == ["a", "b", "c"]


@each_version
def test_the_result_may_be_asked_for_on_another_thread(version: str) -> None:
    """As under async scheduling: what the output holds is its own, and not the runner's."""
    (stock,), _, _ = run(version, False, "last", [WHOLE])
    module = released(version, overlay=True)
    results = []
    with harness.recording_cuda(module):
        output = runner_of(version, module, "last").step(WHOLE, harness.hidden_states(9))
        thread = threading.Thread(target=lambda: results.append(output.get_output()))
        thread.start()
        thread.join()
    assert same_bits(stock, results[0])


# ------------------------------------------------------------------------------------------------- what is left as it was


def stays_stock(version: str, **options: Any) -> Log:
    """The log of one step of a runner that the overlay must not touch; asserts stock's bits."""
    (stock,), (stock_log,), (stock_type,) = run(version, False, "last", [WHOLE], **options)
    (overlaid,), (log,), (kind,) = run(version, True, "last", [WHOLE], **options)
    assert same_bits(stock, overlaid) and (log, kind) == (stock_log, stock_type)
    return log


@each_version
def test_async_scheduling_does_it_itself(version: str, record: PatchRecord) -> None:
    log = stays_stock(version, async_scheduling=True)
    assert log == [*ASYNCHRONOUS, ("event sync",)]
    assert record.patched == {} and record.calls.total() == 0
    assert "async scheduling is on" in record.refused["GPUModelRunner"]


@each_version
def test_a_generating_model_is_no_business_of_the_patch(version: str, record: PatchRecord) -> None:
    stays_stock(version, pooling=False)
    assert record.patched == {} and record.refused == {} and record.calls.total() == 0


class Somebodys:
    """An executor class that a user brings."""


@each_version
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"distributed_executor_backend": Somebodys}, "not known to take an asynchronous output"),
        ({"distributed_executor_backend": "company.executors.Own"}, "not known to take an asynchronous output"),
        (
            {"distributed_executor_backend": "mp", "tensor_parallel_size": 2, "world_size": 2, "rank": 1},
            "takes another rank's output",
        ),
        (
            {"distributed_executor_backend": "ray", "pipeline_parallel_size": 2, "world_size": 2, "rank": 0},
            "another pipeline stage",
        ),
    ],
)
def test_where_nothing_would_wait_for_the_output(
    version: str, options: dict[str, Any], reason: str, record: PatchRecord
) -> None:
    assert stays_stock(version, **options) == STOCK
    assert reason in record.refused["GPUModelRunner"] and record.patched == {}


@each_version
@pytest.mark.parametrize(
    "options",
    [
        {"distributed_executor_backend": "mp"},
        {"distributed_executor_backend": "mp", "tensor_parallel_size": 2, "world_size": 2, "rank": 0},
        {"distributed_executor_backend": "mp", "tensor_parallel_size": 2, "pipeline_parallel_size": 2,
         "world_size": 4, "rank": 2},
        {"distributed_executor_backend": "ray", "tensor_parallel_size": 2, "world_size": 2, "rank": 1},
        {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2, "world_size": 2, "rank": 1},
    ],
)  # fmt: skip
def test_where_the_executor_waits_for_the_output(version: str, options: dict[str, Any], record: PatchRecord) -> None:
    _, (log,), _ = run(version, True, "last", [WHOLE], **options)
    assert ("device sync",) not in log and record.calls.dual_stream == 1


@each_version
@pytest.mark.parametrize(("tensor", "context", "stages"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 1, 2), (1, 1, 3)])
def test_multiproc_takes_the_output_of_the_rank_that_is_adopted(
    version: str, tensor: int, context: int, stages: int
) -> None:
    """Upstream's own word on which rank that is."""
    source = tree(version).read("vllm.v1.executor.multiproc_executor")
    assert source is not None
    (method,) = (node for node in ast.walk(source.parse()) if getattr(node, "name", "") == "_get_output_rank")
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module([method], []), source.path, "exec"), namespace)
    sizes = {
        "tensor_parallel_size": tensor,
        "prefill_context_parallel_size": context,
        "pipeline_parallel_size": stages,
        "world_size": tensor * context * stages,
        "distributed_executor_backend": "mp",
    }
    executor = types.SimpleNamespace(parallel_config=types.SimpleNamespace(**sizes), world_size=sizes["world_size"])
    adopted = []
    for rank in range(sizes["world_size"]):
        parallel = types.SimpleNamespace(**sizes, rank=rank)
        runner = types.SimpleNamespace(
            use_async_scheduling=False, async_output_copy_stream=None, parallel_config=parallel
        )
        with contextlib.suppress(StaysStock):
            adopted.append((pooling.executor_of(runner), rank))
    assert adopted == [("mp", namespace["_get_output_rank"](executor))]


@each_version
def test_what_the_patch_asks_is_there(version: str) -> None:
    """Of the parallel configuration, and of the runner."""
    configuration = tree(version).read("vllm.config.parallel")
    runner = tree(version).read(harness.MODULE)
    assert configuration is not None and runner is not None
    fields = {
        node.target.id
        for node in ast.walk(configuration.parse())
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    asked = {"distributed_executor_backend", "rank", "world_size"}
    assert asked | {f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "prefill_context")} <= fields
    set_by_the_runner = {
        node.attr
        for node in ast.walk(runner.parse())
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    flags = {"is_pooling_model", "use_async_scheduling", "async_output_copy_stream", "parallel_config", "device"}
    assert flags <= set_by_the_runner


@each_version
def test_no_cuda_means_nothing_is_touched(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "other_device", lambda: "cpu")
    module = released(version, overlay=False)
    before = dict(vars(module.GPUModelRunner))
    for pass_through in (False, True):
        found = pooling.install(module, judge("pooling", tree(version)), Settings(serial_pass_through=pass_through))
        assert found.state == "inert" and "cpu" in found.reason
    assert dict(vars(module.GPUModelRunner)) == before


# --------------------------------------------------------------------------------- this file's comparison can fail


def test_a_flag_that_is_read_for_something_else_would_be_noticed_here() -> None:
    """What the verdict calls drift, intercepted all the same: other bits."""
    source = tree("0.19.1").read(harness.MODULE)
    assert source is not None
    text = source.text.replace(
        "        pooling_metadata = self.input_batch.get_pooling_metadata()\n        pooling_metadata.build",
        "        pooling_metadata = self.input_batch.get_pooling_metadata()\n"
        "        hidden_states = hidden_states * (2 if self.use_async_scheduling else 1)\n"
        "        hidden_states[0, 0] += self.use_async_scheduling\n"
        "        pooling_metadata.build",
    )
    assert text != source.text
    (stock,), _, _ = run("0.19.1", False, "mean", [WHOLE])
    module = released("0.19.1", overlay=True, text=text)
    with harness.recording_cuda(module):
        changed = runner_of("0.19.1", module, "mean").step(WHOLE, harness.hidden_states(9)).get_output()
    assert not same_bits(stock, changed)
