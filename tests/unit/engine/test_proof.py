"""Proof of effect, on a worker of a few lines: what turns ineffective, when, and what strict does then."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("wrapt")

from overlay.engine import proof
from overlay.patches import registry
from overlay.report import journal as journal_module
from overlay.report.journal import OwnJournal, PatchRecord
from overlay.settings import Settings
from overlay.verdict import SourceTree, Verdict
from overlay.vocabulary import APPLY, INEFFECTIVE
from tests.unit import stub_vllm

WORKER_MODULE = "vllm.v1.worker.gpu_worker"
STEP = types.SimpleNamespace(total_num_scheduled_tokens=3)
EMPTY_STEP = types.SimpleNamespace(total_num_scheduled_tokens=0)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> OwnJournal:
    fresh = OwnJournal()
    monkeypatch.setattr(proof, "journal", fresh)
    monkeypatch.setattr(journal_module, "journal", fresh)
    monkeypatch.setattr(proof, "_installed", {})
    return fresh


@pytest.fixture
def make_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, journal: OwnJournal) -> Iterator[Any]:
    """`make_worker(run, cuda, strict)`: a worker whose warm-up and steps call `run`, watched as vLLM's is."""

    def make(
        in_warm_up: Callable[[], object] = lambda: None,
        in_step: Callable[[], object] = lambda: None,
        *,
        cuda: bool = True,
        strict: bool = False,
    ) -> Any:
        class Worker:
            rank = 0

            def init_device(self) -> str:
                return "has a device"

            def compile_or_warm_up_model(self) -> str:
                in_warm_up()
                return "warm"

            def execute_model(self, scheduler_output: Any) -> str:
                in_step()
                return "stepped"

        module = types.ModuleType(WORKER_MODULE)
        module.Worker = Worker  # type: ignore[attr-defined]
        platforms = types.ModuleType("vllm.platforms")
        platforms.current_platform = types.SimpleNamespace(is_cuda_alike=lambda: cuda)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        proof.prove_after_warm_up(
            module, Settings(strict=strict), lambda patch: registry.judge(patch, SourceTree(tmp_path))
        )
        return module.Worker()

    yield make
    assert importlib.import_module("overlay.engine.proof") is proof


def applied(journal: OwnJournal, *layers: str, **changes: Any) -> PatchRecord:
    record = dataclasses.replace(PatchRecord(), verdict=APPLY, reason="one after the other", **changes)
    record.patched.update({layer: {} for layer in layers})
    journal.patches["gdn"] = record
    return record


def ran(record: PatchRecord) -> Callable[[], None]:
    return lambda: record.calls.count_serial("not capturing a CUDA graph")


def test_an_op_that_ran_in_warm_up_is_proven(journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal, "layer.0")
    worker = make_worker(ran(record), strict=True)
    assert worker.compile_or_warm_up_model() == "warm"
    assert record.verdict == APPLY and journal.problems == []
    assert "execute_model" not in vars(worker), "the hot path is upstream's own"


def test_an_op_that_never_ran_in_warm_up_is_ineffective_and_said_once(journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal, "layer.0", "layer.1")
    worker = make_worker()
    worker.compile_or_warm_up_model()
    worker.compile_or_warm_up_model()
    (problem,) = journal.problems
    assert "gdn: ineffective: 2 layers" in problem
    assert record.verdict == INEFFECTIVE
    assert worker.execute_model(STEP) == "stepped"


def test_strict_stops_the_warm_up(journal: OwnJournal, make_worker: Any) -> None:
    applied(journal, "layer.0")
    with pytest.raises(proof.Ineffective, match="never run"):
        make_worker(strict=True).compile_or_warm_up_model()


def test_a_model_without_such_layers_is_no_problem(journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal)
    make_worker(strict=True).compile_or_warm_up_model()
    assert record.verdict == APPLY and "no such layer" in record.reason


def test_a_model_whose_layers_were_all_refused_is_no_problem(journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal)
    record.refused["layer.0"] = "quantization"
    make_worker(strict=True).compile_or_warm_up_model()
    assert record.verdict == APPLY and "no such layer" not in record.reason


def test_a_patch_without_layers_keeps_its_own_reason(journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal, without_layers=True)
    make_worker(strict=True).compile_or_warm_up_model()
    assert (record.verdict, record.reason, record.is_overruled) == (APPLY, "one after the other", False)


@pytest.mark.parametrize("why", ["no CUDA, where warm-up may be skipped", "pooling, which warm-up does not run"])
def test_what_warm_up_does_not_run_is_looked_at_after_the_first_step(
    why: str, journal: OwnJournal, make_worker: Any
) -> None:
    pooling = "pooling" in why
    record = applied(journal, "layer.0", runs_in_warm_up=not pooling)
    worker = make_worker(cuda=pooling)
    worker.compile_or_warm_up_model()
    assert journal.problems == []
    worker.execute_model(EMPTY_STEP)
    assert journal.problems == [] and "execute_model" in vars(worker)
    assert worker.execute_model(STEP) == "stepped"
    assert record.verdict == INEFFECTIVE and len(journal.problems) == 1
    assert "execute_model" not in vars(worker)


def test_a_first_step_that_runs_the_op_is_the_proof(journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal, "layer.0")
    worker = make_worker(in_step=ran(record), cuda=False, strict=True)
    worker.compile_or_warm_up_model()
    assert worker.execute_model(STEP) == "stepped"
    assert record.verdict == APPLY and "execute_model" not in vars(worker)


@pytest.mark.parametrize("wrapped_by_a_tool", ["never", "before", "after", "between"])
@pytest.mark.parametrize("strict", [False, True])
def test_two_warm_ups_before_the_first_step_are_one(
    wrapped_by_a_tool: str, strict: bool, journal: OwnJournal, make_worker: Any
) -> None:
    """Whoever else has put something in the place of the worker's method keeps it."""
    record = applied(journal, "layer.0")
    worker = make_worker(cuda=False, strict=strict)
    seen: list[str] = []

    def wrap(when: str) -> None:
        if when == wrapped_by_a_tool:
            wrapped = worker.execute_model
            worker.execute_model = lambda *given: (seen.append(when), wrapped(*given))[1]

    for when in ("before", "between", "after"):
        wrap(when)
        if when != "after":
            worker.compile_or_warm_up_model()
    assert worker.execute_model(EMPTY_STEP) == "stepped" and journal.problems == []
    with pytest.raises(proof.Ineffective) if strict else contextlib.nullcontext():
        assert worker.execute_model(STEP) == "stepped"
    assert record.verdict == INEFFECTIVE and len(journal.problems) == 1
    assert seen == [wrapped_by_a_tool] * 2 * (wrapped_by_a_tool != "never")
    if not strict:  # else vLLM has ended
        assert worker.execute_model(STEP) == "stepped" and len(journal.problems) == 1
    if wrapped_by_a_tool in ("never", "before"):
        assert not isinstance(vars(worker).get("execute_model"), proof._FirstStep), "the hot path is as it was"


@pytest.mark.parametrize("cuda", [True, False])
def test_an_op_that_was_only_traced_has_not_run(cuda: bool, journal: OwnJournal, make_worker: Any) -> None:
    record = applied(journal, "layer.0")
    record.calls.fake, record.calls.lowered = 3, 2
    worker = make_worker(cuda=cuda)
    worker.compile_or_warm_up_model()
    worker.execute_model(STEP)
    assert record.verdict == INEFFECTIVE and len(journal.problems) == 1


@pytest.mark.parametrize("cuda", [True, False])
def test_a_second_engine_of_the_process_is_counted_for_itself(
    cuda: bool, journal: OwnJournal, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What the first one ran is no proof for the second, and what was wrong with the first is no fault of the third's."""
    record = applied(journal)

    def engine(*layers: str, calls: int) -> str:
        def make_layers() -> None:
            record.patched.update({layer: {} for layer in layers})

        def run() -> None:
            record.calls.dual_stream += calls

        worker = make_worker(run, lambda: None, cuda=cuda)
        assert worker.init_device() == "has a device"
        make_layers()
        caplog.clear()
        with caplog.at_level("INFO", logger="vllm.overlay"):
            worker.compile_or_warm_up_model()
        worker.execute_model(STEP)
        (said,) = summaries(caplog)
        return said.getMessage().partition("gdn: ")[2]

    assert engine("a", "b", calls=2) == "apply, 2 layers patched, op ran 2 times (2 dual stream)"
    assert record.verdict == APPLY
    state = "ineffective" if cuda else "apply"
    assert engine("c", calls=0) == f"{state}, 1 layer patched, op has not run yet"
    assert record.verdict == INEFFECTIVE
    assert engine(calls=0) == "apply, no such layer in this model"
    assert record.reason == f"one after the other{proof.NO_LAYER}"
    assert engine("a", calls=1) == "apply, 1 layer patched, op ran 1 time (1 dual stream)"
    assert (record.verdict, record.reason) == (APPLY, "one after the other")
    assert len(journal.problems) == 1


def test_strict_stops_the_first_step(journal: OwnJournal, make_worker: Any) -> None:
    applied(journal, "layer.0")
    worker = make_worker(cuda=False, strict=True)
    worker.compile_or_warm_up_model()
    with pytest.raises(proof.Ineffective):
        worker.execute_model(STEP)


@pytest.mark.parametrize("owner", ["somebody.plugin", "vllm.layers"])
def test_a_class_that_was_replaced_after_the_patch_is_named(journal: OwnJournal, make_worker: Any, owner: str) -> None:
    record = applied(journal)
    module = types.ModuleType("vllm.layers")
    module.Layer = type("Layer", (), {"__module__": "vllm.layers"})  # type: ignore[attr-defined]
    proof.remember("gdn", module, Verdict(APPLY, "", "vllm.layers", "Layer", ("forward",)))
    make_worker().compile_or_warm_up_model()
    assert journal.problems == []
    record.verdict = APPLY
    module.Layer = type("Layer", (), {"__module__": owner})  # type: ignore[attr-defined]
    make_worker().compile_or_warm_up_model()
    (problem,) = journal.problems
    assert "vllm.layers.Layer" in problem and ("reload" if owner == "vllm.layers" else owner) in problem
    assert record.verdict == INEFFECTIVE
    with pytest.raises(proof.Ineffective):
        make_worker(strict=True).compile_or_warm_up_model()


@pytest.mark.parametrize("strict", [False, True])
def test_a_check_that_fails_is_no_reason_to_stop_unless_strict(
    journal: OwnJournal, make_worker: Any, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr(proof, "_replaced", lambda *_: 1 / 0)
    applied(journal, "layer.0")
    worker = make_worker(strict=strict)
    if strict:
        with pytest.raises(ZeroDivisionError):
            worker.compile_or_warm_up_model()
    else:
        assert worker.compile_or_warm_up_model() == "warm"
    assert "cannot tell" in journal.problems[0]


def summaries(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno == logging.INFO]


def removal_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in summaries(caplog) if "can be removed" in record.getMessage()]


@pytest.mark.parametrize(
    ("states", "removable"),
    [
        (["landed", "absent", "landed"], True),
        (["landed", "off"], True),
        (["landed", "apply"], False),
        (["drifted", "landed"], False),
        (["inert", "landed"], False),
        (["off", "off"], False),
    ],
)
def test_the_overlay_says_when_it_can_be_removed(
    states: list[str], removable: bool, journal: OwnJournal, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for index, state in enumerate(states):
        journal.patches[f"patch{index}"] = PatchRecord(verdict=state)
    with caplog.at_level("INFO", logger="vllm.overlay"):
        make_worker().compile_or_warm_up_model()
    assert len(removal_lines(caplog)) == removable


@pytest.mark.parametrize(
    ("sources", "removable"), [(stub_vllm.NOTHING, True), (None, False)], ids=["whole", "no sources"]
)
def test_targets_that_were_never_imported_count_by_their_source(
    sources: dict[str, str | None] | None,
    removable: bool,
    journal: OwnJournal,
    make_worker: Any,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if sources is not None:
        stub_vllm.write(tmp_path, sources)
    record = journal.patch("gdn")
    with caplog.at_level("INFO", logger="vllm.overlay"):
        make_worker().compile_or_warm_up_model()
    assert ("absent" in record.reason, len(removal_lines(caplog))) == (removable, int(removable))


def test_every_worker_of_a_group_but_the_first_is_silent_about_removal(
    journal: OwnJournal, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    journal.patches["gdn"] = PatchRecord(verdict="landed")
    worker = make_worker()
    type(worker).rank = 1
    with caplog.at_level("INFO", logger="vllm.overlay"):
        worker.compile_or_warm_up_model()
    (summary,) = summaries(caplog)
    assert removal_lines(caplog) == [] and summary.overlay["removable"] is True  # type: ignore[attr-defined]


@pytest.mark.parametrize("strict", [False, True])
def test_a_warm_up_ends_with_one_line_that_knows_what_was_found_in_it(
    strict: bool, journal: OwnJournal, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    applied(journal, "layer.0", "layer.1")
    worker = make_worker(strict=strict)
    with caplog.at_level("INFO", logger="vllm.overlay"), contextlib.suppress(proof.Ineffective):
        worker.compile_or_warm_up_model()
    (summary,) = summaries(caplog)
    assert "gdn: ineffective, 2 layers patched, op has not run yet" in summary.getMessage()
    assert summary.overlay["problems"] == 1  # type: ignore[attr-defined]


def test_where_warm_up_may_be_skipped_the_line_is_still_there_and_says_so(
    journal: OwnJournal, make_worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    record = applied(journal, "layer.0")
    worker = make_worker(in_step=ran(record), cuda=False)
    with caplog.at_level("INFO", logger="vllm.overlay"):
        worker.compile_or_warm_up_model()
        worker.execute_model(STEP)
    (summary,) = summaries(caplog)
    assert "gdn: apply, 1 layer patched, op has not run yet" in summary.getMessage()
