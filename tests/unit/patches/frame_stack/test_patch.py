"""vLLM's loops get room for their frames, and the record says which one has it."""

from __future__ import annotations

import platform
import sys
import types

import pytest

from overlay.engine import compile_cache, loops, proof, running_code
from overlay.patches.frame_stack import patch as frame_stack
from overlay.patches.frame_stack import room
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings
from overlay.start import install
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY, INERT

MODULE = "vllm.v1.engine.core"
VERDICT = Verdict(APPLY, "can have room", "vllm.v1", shapes_graph=False, without_layers=True)


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> PatchRecord:
    monkeypatch.setattr(journal, "patches", {})
    monkeypatch.setattr(room, "is_needed", lambda: True)
    monkeypatch.setattr(loops, "_runners", {})
    return journal.patch("frame_stack")


def depth_of_room() -> int:
    """The large frames that this call is above."""
    frame, found = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        found += frame.f_code is room.with_room.__code__
    return found


def engine_core() -> types.ModuleType:
    class EngineCoreProc:
        def run_busy_loop(self, answer: int = 1) -> tuple[int, int]:
            return answer, depth_of_room()

    class DPEngineCoreProc(EngineCoreProc):
        def run_busy_loop(self, answer: int = 2) -> tuple[int, int]:
            return answer, depth_of_room()

    module = types.ModuleType(MODULE)
    vars(module).update(EngineCoreProc=EngineCoreProc, DPEngineCoreProc=DPEngineCoreProc)
    return module


def with_loops_wrapped(module: types.ModuleType) -> types.ModuleType:
    loops.wrap_loops(module)
    return module


def test_each_loop_runs_above_the_frame_and_the_record_says_which(record: PatchRecord) -> None:
    module = with_loops_wrapped(engine_core())
    record.judged(found := frame_stack.install(module, VERDICT, Settings()))
    assert found == VERDICT and (record.verdict, record.reason) == (APPLY, "can have room")
    assert module.EngineCoreProc().run_busy_loop() == (1, 1)
    assert (record.verdict, record.reason) == (APPLY, "EngineCoreProc.run_busy_loop runs above one large frame")
    assert module.DPEngineCoreProc().run_busy_loop(answer=5) == (5, 1)
    assert record.reason.startswith("DPEngineCoreProc.run_busy_loop runs")


def test_a_python_that_does_not_need_it_leaves_the_loops_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_needed", lambda: False)
    module = with_loops_wrapped(engine_core())
    found = frame_stack.install(module, VERDICT, Settings())
    assert found.state == INERT and f"{platform.python_version()} maps no memory" in found.reason
    assert module.EngineCoreProc().run_busy_loop() == (1, 0)


def test_a_module_without_one_of_the_loops_is_left_as_it_is() -> None:
    module = engine_core()
    loop = module.EngineCoreProc.run_busy_loop
    del module.DPEngineCoreProc
    with pytest.raises(AttributeError, match="DPEngineCoreProc"):
        frame_stack.install(module, VERDICT, Settings())
    assert module.EngineCoreProc.run_busy_loop is loop


@pytest.mark.parametrize("needed", [True, False])
def test_it_enters_no_fingerprint_and_asks_nobody_who_has_written_the_loop(
    needed: bool, record: PatchRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for module, name in (
        (compile_cache, "add"),
        (compile_cache, "remove"),
        (running_code, "remember"),
        (proof, "remember"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: asked.append(name))
    monkeypatch.setattr(install, "sources", lambda: types.SimpleNamespace(texts={}))
    monkeypatch.setattr(install.registry, "judge", lambda *_: VERDICT)
    monkeypatch.setattr(room, "is_needed", lambda: needed)
    loaded = engine_core()
    loaded.EngineCoreProc.run_busy_loop = lambda _: ("somebody's", depth_of_room())
    install.install("frame_stack", with_loops_wrapped(loaded), Settings(strict=True))
    assert record.verdict == (APPLY if needed else INERT) and asked == []
    assert loaded.EngineCoreProc().run_busy_loop() == ("somebody's", int(needed))
