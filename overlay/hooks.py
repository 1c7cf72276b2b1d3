"""From the first ``import vllm`` of a process to installed patches.

Every hook is guarded: an exception in a hook would fail the import of vLLM's module. The default is fail-open, vLLM runs
stock and one WARNING says why; under strict the exception goes on and stops vLLM before it serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from overlay import (
    agreement,
    bootstrap,
    cache_identity,
    effect,
    frame_stack,
    loaded,
    log,
    running,
    safety,
    summary,
    verdict,
)
from overlay import settings as settings_module
from overlay.journal import OFF, REFUSED, journal
from overlay.settings import Settings
from overlay.verdict import Verdict

#: The module from which vLLM's /metrics gets its registry.
METRICS_MODULE = "vllm.v1.metrics.prometheus"

_came_by = False


class Drifted(RuntimeError):
    """Under strict: what runs is not of a shape that is known. Has been said already."""


def around_vllm(module: ModuleType, execute: Callable[[], None]) -> None:
    """The first ``import vllm`` of this process: settings and hooks, vLLM itself, then what can be said of it.

    A reload of vLLM comes by here again, and has its hooks already.
    """
    global _came_by
    if _came_by:
        execute()
        return
    _came_by = True
    settings = _prepare()
    execute()
    if settings is not None:
        _guarded("sources", lambda module: _after_vllm(module, settings), settings)(module)


def _prepare() -> Settings | None:
    """Settings, log, journal, hooks; None where the overlay stays out of this process."""
    try:
        settings = settings_module.load(os.environ)
        if not settings.enabled:
            return None
        log.hold(settings.log_level)
        for line in settings.retired:
            log.logger.warning("overlay: %s", line)
        safety.check_code(os.path.dirname(__file__))
        _set_hooks(settings)
    except Exception as error:
        strict = settings_module.strict_was_asked_for(os.environ)
        log.hold("warning")
        log.logger.warning("overlay: %s: %s: %s", settings_module.outcome(strict), type(error).__name__, error)
        log.give_up()
        if strict:
            raise
        return None
    return settings


def _set_hooks(settings: Settings) -> None:
    _fall_back_on_our_wrapt()
    from wrapt import register_post_import_hook

    register_post_import_hook(_guarded("logging", log.release_when_configured, settings), "vllm.logger")
    journal.open(settings.journal_folder)
    _watch_transformers(settings)
    for patch, module_names in verdict.TARGET_MODULES.items():
        record = journal.patch(patch)
        if patch not in settings.patches:
            record.verdict, record.reason = OFF, "switched off"
            continue
        for module_name in module_names:
            hook = _guarded(patch, lambda module, patch=patch: _patch(patch, module, settings), settings)  # type: ignore[misc]
            register_post_import_hook(hook, module_name)
    register_post_import_hook(_guarded("metrics", _publish_metrics, settings), METRICS_MODULE)
    for module_name in effect.WORKERS:
        hook = _guarded("agreement of the ranks", lambda module: agreement.watch(module, settings), settings)
        register_post_import_hook(hook, module_name)
        hook = _guarded("proof of effect", lambda module: effect.watch(module, settings, _sources), settings)
        register_post_import_hook(hook, module_name)
        register_post_import_hook(_guarded("loaded models", loaded.watch, settings), module_name)
    for module_name in frame_stack.LOOPS if settings.patches else ():
        register_post_import_hook(_guarded("frame stack", _give_room, settings), module_name)


def _fall_back_on_our_wrapt() -> None:
    """The bundle brings wrapt in a folder of its own, for an environment that has none; one that is there stays."""
    fallback = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "fallback")
    if importlib.util.find_spec("wrapt") is None and os.path.isdir(fallback):
        sys.path.append(fallback)


def _guarded(what: str, hook: Callable[[ModuleType], None], settings: Settings) -> Callable[[ModuleType], None]:
    """A hook that cannot fail vLLM's import, unless strict asks for that."""

    def guarded(module: ModuleType) -> None:
        try:
            hook(module)
        except Drifted:
            raise
        except Exception as error:
            journal.problem(f"{what}: {settings_module.outcome(settings.strict)}: {type(error).__name__}: {error}")
            if settings.strict:
                raise

    return guarded


def _give_room(module: ModuleType) -> None:
    frame_stack.watch(module, journal.entered)


def _publish_metrics(module: ModuleType) -> None:
    from overlay import metrics

    metrics.publish(module)


def _watch_transformers(settings: Settings) -> None:
    """Whoever imports transformers first, on whichever thread: nobody else gets a module that is half of it.

    It is watched, and not imported by us: the import reads the settings of Hugging Face's hub (offline, home, endpoint), which
    a program may make after ``import vllm``. Importing it before anybody else would be too early for them.
    """
    if "transformers" in sys.modules:
        import transformers  # noqa: F401 - complete when this returns, should another thread be at it

        journal.transformers = {"state": "was imported before vllm"}
        return
    journal.transformers = {"state": "has not been imported"}

    def around(module: ModuleType, execute: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            execute()
        except ImportError:
            journal.transformers = {"state": "missing"}
            raise
        seconds = round(time.perf_counter() - start, 3)
        _guarded("transformers first", lambda module: _complete_transformers(module, seconds), settings)(module)

    bootstrap.watch("transformers", around)


def _complete_transformers(module: ModuleType, seconds: float) -> None:
    """Give the module that has been executed the names of the one that it has put in its place.

    Symptom: ``ImportError: cannot import name … from partially initialized module 'transformers'`` at start, now and
    then. Cause: transformers builds a second, lazy module and puts that into sys.modules. A thread that imports names
    meanwhile waits, and then takes them from the module that it found before it waited: the first one, which never gets
    them. Upstream: vLLM #40331, taken back by #40438.
    """
    lazy = sys.modules.get(module.__name__)
    if lazy is not None and lazy is not module:
        vars(module)["__getattr__"] = lambda name: getattr(lazy, name)
    journal.transformers = {"state": "imported first", "seconds": seconds}
    journal.write()


def _after_vllm(module: ModuleType, settings: Settings) -> None:
    """vLLM's package is there: note its version, and what can be said of patches without reading a target."""
    journal.vllm_version = getattr(module, "__version__", None)
    tree = _sources()
    for patch, module_names in verdict.TARGET_MODULES.items():
        record = journal.patch(patch)
        if record.verdict == OFF or any(tree.has(name) for name in module_names):
            continue
        _settle(patch, verdict.judge(patch, tree), settings)
    summary.say_armed(journal.vllm_version)
    journal.write()


def _patch(patch: str, module: ModuleType, settings: Settings) -> None:
    """A target module has just been executed: judge its source, and install the patch if the verdict is apply."""
    tree = _sources()
    found = verdict.judge(patch, tree)
    if found.module != module.__name__:
        return
    if found.state == verdict.APPLY:
        stranger = running.remember(patch, module, found, tree.texts)
        if stranger is None:
            found = _install(patch, module, found, settings)
        else:
            found = replace(found, state=REFUSED, reason=stranger)
    _settle(patch, found, settings)


def _install(patch: str, module: ModuleType, found: Verdict, settings: Settings) -> Verdict:
    """The compile cache's key first: a patch without it could be given a graph that was compiled without the patch."""
    effect.remember(patch, module, found)
    if found.shapes_graph:
        journal.fingerprint = cache_identity.add(patch, found.methods)
    installed = False
    try:
        installer = importlib.import_module(f"overlay.patches.{patch}")
        found = installer.install(module, found, settings)
        installed = found.state == verdict.APPLY
    finally:
        if not installed:
            journal.fingerprint = cache_identity.remove(patch)
            effect.forget(patch)
    return found


def _sources() -> verdict.SourceTree:
    """The sources of the vLLM that is being imported."""
    package = os.path.abspath(sys.modules["vllm"].__file__ or "")
    return verdict.SourceTree(os.path.dirname(os.path.dirname(package)))


def _settle(patch: str, found: Verdict, settings: Settings) -> None:
    """A patch's verdict in this process is final: keep it. A shape that is not known is a problem, fatal under strict."""
    record = journal.patch(patch)
    record.verdict, record.reason, record.module, record.methods = (
        found.state,
        found.reason,
        found.module,
        found.methods,
    )
    if found.state in (verdict.DRIFTED, REFUSED):
        text = f"{patch}: {found.state}, {settings_module.outcome(settings.strict)}: {found.reason} ({found.where})"
        journal.problem(text)
        if settings.strict:
            raise Drifted(text)
    else:
        intercepted = (
            f"; intercepts {', '.join(map('.'.join, found.intercepted()))}" if found.state == verdict.APPLY else ""
        )
        log.logger.debug("overlay: %s: %s: %s%s", patch, found.state, found.reason, intercepted)
    journal.write()
