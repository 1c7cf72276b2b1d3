"""The moment when a process of vLLM begins with its loop."""

from __future__ import annotations

import types

import pytest

from overlay.engine import loops
from overlay.report.journal import journal


def worker_module(**methods: object) -> types.ModuleType:
    module = types.ModuleType("vllm.v1.executor.multiproc_executor")
    vars(module).update(WorkerProc=type("WorkerProc", (), methods))
    return module


def test_the_journal_has_the_name_when_the_loop_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    monkeypatch.setattr(journal, "entered", entered.append)
    module = worker_module(worker_busy_loop=lambda self, cancel=None: (cancel, list(entered)))
    loops.wrap_loops(module)
    assert entered == []
    assert module.WorkerProc().worker_busy_loop(cancel=3) == (3, ["WorkerProc.worker_busy_loop"])


def test_a_module_without_its_loop_stays_as_it_is() -> None:
    module = worker_module()
    loops.wrap_loops(module)
    assert not hasattr(module.WorkerProc, "worker_busy_loop")
