"""The pooling patch without an engine and without released sources: which runner it takes, and what it leaves behind."""

from __future__ import annotations

import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from overlay.engine import compile_cache, proof  # noqa: E402
from overlay.patches.pooling import patch as pooling  # noqa: E402
from overlay.report.journal import Calls, PatchRecord, journal  # noqa: E402
from overlay.settings import Settings  # noqa: E402
from overlay.side_work import adoption  # noqa: E402
from overlay.side_work.adoption import StaysStock  # noqa: E402
from overlay.start import install  # noqa: E402
from overlay.verdict import Verdict  # noqa: E402
from overlay.vocabulary import APPLY  # noqa: E402
from tests.unit.fake_cuda import check_makes_nothing  # noqa: E402

MODULE = "vllm.v1.worker.gpu_model_runner"
VERDICT = Verdict(APPLY, "", MODULE, "GPUModelRunner", ("_pool",), shapes_graph=False)
#: A runner of the known shape: one flag that decides what `_pool` gives.
RUNNER = """
class GPUModelRunner:
    def __init__(self, output, pooling=True, flag=False, **parallel):
        self.output = output
        self.is_pooling_model = pooling
        self.use_async_scheduling = flag
        self.async_output_copy_stream = None
        self.device = "cuda:0"
        self.parallel_config = types.SimpleNamespace(**{**ONE, **parallel})

    def _pool(self, *args, **kwargs):
        self.saw = self.use_async_scheduling, args, kwargs
        return self.output
"""
ONE = dict(
    distributed_executor_backend="uni",
    rank=0,
    world_size=1,
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    prefill_context_parallel_size=1,
)


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    monkeypatch.setattr(journal, "patches", {})
    monkeypatch.setattr(journal, "problems", [])
    monkeypatch.setattr(journal, "fingerprint", None)
    monkeypatch.setattr(proof, "_installed", {})
    monkeypatch.setattr(adoption, "other_device", lambda: None)
    return journal.patch("pooling")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that were made, by the device they were made for."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or f"stream {len(made)}")
    return made


def module_with_runner() -> types.ModuleType:
    module = types.ModuleType(MODULE)
    vars(module).update(types=types, ONE=ONE)
    exec(RUNNER, vars(module))
    return module


def installed(strict: bool = False) -> Any:
    module = module_with_runner()
    assert pooling.install(module, VERDICT, Settings(strict=strict)).state == APPLY
    return module.GPUModelRunner


def asynchronous() -> Any:
    class Output(pooling.AsyncModelRunnerOutput):  # type: ignore[misc]
        def get_output(self) -> None: ...

    return Output()


def test_nothing_is_made_before_the_first_step(streams: list[Any], record: PatchRecord) -> None:
    runner = installed()(asynchronous())
    assert streams == [] and runner.async_output_copy_stream is None
    assert record.patched == {"GPUModelRunner": {"executor": "uni", "rank": 0}}, "there before the first step"
    assert record.runs_in_warm_up is False
    for _ in range(2):
        assert runner._pool(1, name=2) is runner.output
    assert streams == ["cuda:0"] and runner.async_output_copy_stream == "stream 1"
    assert runner.saw == (True, (1,), {"name": 2}) and runner.use_async_scheduling is False
    assert record.calls == Calls(dual_stream=2)


def test_a_step_in_which_nobody_finished_is_counted_with_its_reason(streams: list[Any], record: PatchRecord) -> None:
    runner = installed()(object())
    assert runner._pool() is runner.output
    assert record.calls == Calls(serial={pooling.NOTHING_FINISHED: 1})


def test_two_runners_have_streams_of_their_own(streams: list[Any]) -> None:
    kind = installed()
    one, two = kind(asynchronous()), kind(asynchronous())
    one._pool()
    two._pool()
    assert one.async_output_copy_stream != two.async_output_copy_stream


def test_importing_the_patch_makes_no_stream_and_no_cuda_context() -> None:
    check_makes_nothing("import overlay.patches.pooling.patch")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("attribute", ["use_async_scheduling", "async_output_copy_stream"])
def test_a_runner_without_the_flag_or_the_stream_stays_stock(
    attribute: str, strict: bool, streams: list[Any], record: PatchRecord
) -> None:
    """Were the flag a property one day, setting it would fail in every step."""
    module = module_with_runner()
    kind = module.GPUModelRunner
    initialise = kind.__init__

    def changed(self: Any, *args: Any) -> None:
        initialise(self, *args)
        delattr(self, attribute)

    kind.__init__ = changed
    setattr(kind, attribute, None)
    pooling.install(module, VERDICT, Settings(strict=strict))
    if strict:
        with pytest.raises(AttributeError, match="no flag"):
            kind(asynchronous())
        return
    runner = kind(asynchronous())
    runner._pool()
    assert not runner.saw[0] and streams == [] and record.patched == {} and record.calls.total() == 0
    assert "no flag" in record.refused["GPUModelRunner"] and len(journal.problems) == 1


def namespace(**parallel: Any) -> Any:
    return types.SimpleNamespace(
        use_async_scheduling=False,
        async_output_copy_stream=None,
        parallel_config=types.SimpleNamespace(**{**ONE, **parallel}),
    )


@given(tensor=st.integers(1, 4), context=st.integers(1, 2), stages=st.integers(1, 3), data=st.data())
def test_of_multiprocs_workers_the_one_whose_output_is_taken(
    tensor: int, context: int, stages: int, data: st.DataObject
) -> None:
    """Ranks are laid out stage by stage; the executor takes the first of the last stage."""
    world = tensor * context * stages
    rank = data.draw(st.integers(0, world - 1))
    runner = namespace(
        distributed_executor_backend="mp",
        rank=rank,
        world_size=world,
        tensor_parallel_size=tensor,
        prefill_context_parallel_size=context,
        pipeline_parallel_size=stages,
    )
    if rank == (stages - 1) * tensor * context:
        assert pooling.executor_of(runner) == "mp"
    else:
        with pytest.raises(StaysStock):
            pooling.executor_of(runner)


@pytest.mark.parametrize("executor", ["uni", "ray", "external_launcher"])
def test_every_worker_of_the_last_stage_waits_for_its_own_output(executor: str) -> None:
    for rank in (0, 1):
        runner = namespace(distributed_executor_backend=executor, rank=rank, world_size=2, tensor_parallel_size=2)
        assert pooling.executor_of(runner) == executor


def test_the_compile_cache_is_shared_with_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled graph shows this patch; a key of its own would make every start with it a cold one."""
    entered: list[str] = []
    monkeypatch.setattr(compile_cache, "add", lambda patch, detail: entered.append(patch))
    module = module_with_runner()
    found = install._install_judged("pooling", module, VERDICT, Settings())
    assert found.state == APPLY and entered == [] and journal.fingerprint is None
    assert proof._installed["pooling"] == (module, {"GPUModelRunner": module.GPUModelRunner})
