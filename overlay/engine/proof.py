"""Proof of effect: has the patched code really run?

A patch can be installed and do nothing: a compiled graph comes from elsewhere, a plugin has replaced the patched class, or
the model's layers run other code. So the counters are read once, when vLLM's warm-up is over (the model has run, the graphs
are captured). A patch with patched layers whose op was never called becomes ``ineffective``.

What the warm-up does not run is checked after the first step: pooling, and everything on a CPU, where the warm-up may be
skipped. Later steps run vLLM's own `execute_model` again.

A process can have several engines, one after the other, such as a script that makes two `LLM`. Each is counted separately:
the counters start again with each worker, before it makes a runner or a layer.

The worker's one INFO line (overlay/report/summary.py) also comes at the end of the warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlay.engine import compile_cache
from overlay.report import summary
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings
from overlay.verdict import Verdict, class_at
from overlay.vocabulary import APPLY, INEFFECTIVE

NO_LAYER = "; this model has no such layer"
#: vLLM's workers, and the method that ends their warm-up.
WORKERS = {"vllm.v1.worker.gpu_worker": "Worker", "vllm.v1.worker.cpu_worker": "CPUWorker"}
WARM_UP = "compile_or_warm_up_model"
#: The method that makes their runner, which makes the layers.
BEGIN = "init_device"
STEP = "execute_model"

_installed: dict[str, tuple[ModuleType, dict[str, Any]]] = {}


class Ineffective(RuntimeError):
    """Strict mode only: a patch was applied and has no effect. Already logged."""


def remember(patch: str, module: ModuleType, found: Verdict) -> None:
    """Note the classes that a patch was installed on, to see later whether others have replaced them."""
    names = {class_name for class_name, _ in found.intercepted()}
    _installed[patch] = (module, {name: class_at(module, name) for name in names})


def forget(patch: str) -> None:
    """Forget a patch that was not installed after all."""
    _installed.pop(patch, None)


def prove_after_warm_up(module: ModuleType, settings: Settings, judge: Callable[[str], Verdict]) -> None:
    """Reset the counters when the worker of this module begins, and read them when it has warmed up.

    `judge` gives a patch's verdict on the source, for a target that was not imported.
    """
    import wrapt

    def before_device(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
        journal.begin_engine()
        compile_cache.begin_engine()
        return wrapped(*args, **kwargs)

    def after_warm_up(wrapped: Callable[..., Any], worker: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        _guard(settings, lambda: _after_warm_up(worker, settings, judge))
        return result

    wrapt.wrap_function_wrapper(module, f"{WORKERS[module.__name__]}.{BEGIN}", before_device)
    wrapt.wrap_function_wrapper(module, f"{WORKERS[module.__name__]}.{WARM_UP}", after_warm_up)


def _guard(settings: Settings, look: Callable[[], None]) -> None:
    try:
        look()
    except Ineffective:
        raise
    except Exception as error:
        journal.problem(f"proof of effect: cannot tell: {type(error).__name__}: {error}")
        if settings.strict:
            raise


def _after_warm_up(worker: Any, settings: Settings, judge: Callable[[str], Verdict]) -> None:
    from vllm.platforms import current_platform

    problems = [text for patch, record in journal.patches.items() for text in _replaced(patch, record)]
    later = {}
    for patch, record in journal.patches.items():
        if record.verdict != APPLY or record.calls.total() or record.without_layers:
            continue
        if not record.patched:
            if not record.refused and not record.is_overruled:
                record.overrule(record.verdict, record.reason + NO_LAYER)
        elif record.runs_in_warm_up and current_platform.is_cuda_alike():
            problems.append(_never_ran(patch, record, "warm-up"))
        else:
            later[patch] = record
    if later:
        _look_after_first_step(worker, later, settings)
    try:
        _report(problems, settings)
    finally:
        journal.note_unseen(judge)
        summary.say(journal, removable_is_said_here=not getattr(worker, "rank", 0))
        journal.write()


def _look_after_first_step(worker: Any, waiting: dict[str, PatchRecord], settings: Settings) -> None:
    own = vars(worker)
    if isinstance(own.get(STEP), _FirstStep):  # a second warm-up before the first step
        own[STEP].waiting = waiting
    else:
        own[STEP] = _FirstStep(worker, waiting, settings)


class _FirstStep:
    """Replaces a worker's `execute_model` until a step has run. Then it puts back what was there before."""

    def __init__(self, worker: Any, waiting: dict[str, PatchRecord], settings: Settings) -> None:
        self.waiting = waiting
        self._own = vars(worker)
        self._before = self._own.get(STEP)
        self._execute = getattr(worker, STEP)
        self._settings = settings

    def __call__(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._execute(scheduler_output, *args, **kwargs)
        if self.waiting and scheduler_output.total_num_scheduled_tokens:
            waiting, self.waiting = self.waiting, {}
            self._step_aside()
            silent = [
                _never_ran(patch, record, "a step") for patch, record in waiting.items() if not record.calls.total()
            ]
            _guard(self._settings, lambda: _report(silent, self._settings))
        return result

    def _step_aside(self) -> None:
        if self._own.get(STEP) is not self:  # other code has wrapped this one meanwhile
            return
        if self._before is None:
            del self._own[STEP]  # now the class's own method is found again
        else:
            self._own[STEP] = self._before


def _never_ran(patch: str, record: PatchRecord, when: str) -> str:
    record.overrule(INEFFECTIVE, f"{len(record.patched)} layers are patched, and after {when} their op has never run")
    return f"{patch}: {INEFFECTIVE}: {record.reason}"


def _replaced(patch: str, record: PatchRecord) -> list[str]:
    """One line for each class that is no longer the patched one: a plugin has replaced it, or the module was reloaded."""
    module, classes = _installed.get(patch, (None, {}))
    found = []
    for name, patched in classes.items():
        current = class_at(module, name)
        if current is not patched:
            owner = getattr(current, "__module__", None)
            by = f"one of {owner}" if owner != patched.__module__ else "another one of the same module (a reload?)"
            found.append(f"{patch}: {patched.__module__}.{name} is {by} since it was patched; its layers are stock")
    if found and not record.patched:
        record.overrule(INEFFECTIVE, found[0].removeprefix(f"{patch}: "))
    return found


def _report(problems: list[str], settings: Settings) -> None:
    for text in problems:
        journal.problem(text)
    if problems and settings.strict:
        raise Ineffective("; ".join(problems))
