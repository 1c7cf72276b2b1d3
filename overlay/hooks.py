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

from overlay import agreement, cache_identity, effect, frame_stack, loaded, log, running, safety, summary, verdict
from overlay import settings as settings_module
from overlay.journal import OFF, REFUSED, journal
from overlay.settings import Settings
from overlay.verdict import Verdict

#: vLLM's own environment module; torch's environment is in place once it has been executed.
ENVIRONMENT_MODULES = ("vllm.env_override", "vllm._environment")
#: The module from which vLLM's /metrics gets its registry.
METRICS_MODULE = "vllm.v1.metrics.prometheus"
NOT_YET = "vllm has not been imported"

_came_by = False


class Drifted(RuntimeError):
    """Under strict: what runs is not of a shape that is known. Has been said already."""


def around_vllm(execute: Callable[[], None]) -> None:
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
        _guarded("sources", lambda module: _after_vllm(module, settings), settings)(sys.modules["vllm"])


def _prepare() -> Settings | None:
    """Settings, log, journal, hooks; None where the overlay stays out of this process."""
    try:
        settings = settings_module.load(os.environ)
        if not settings.enabled:
            return None
        log.hold(settings.log_level)
        safety.check_code(os.path.dirname(__file__))
        _set_hooks(settings)
    except Exception as error:
        log.hold("warning")
        log.logger.warning("overlay: vLLM runs stock: %s: %s", type(error).__name__, error)
        log.give_up()
        if settings_module.strict_was_asked_for(os.environ):
            raise
        return None
    return settings


def _set_hooks(settings: Settings) -> None:
    _fall_back_on_our_wrapt()
    from wrapt import register_post_import_hook

    register_post_import_hook(_guarded("logging", log.release_when_configured, settings), "vllm.logger")
    journal.open(settings.journal_folder)
    for name in ENVIRONMENT_MODULES:
        register_post_import_hook(_guarded("transformers first", _import_transformers, settings), name)
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
            journal.problem(f"{what}: vLLM runs stock here: {type(error).__name__}: {error}")
            if settings.strict:
                raise

    return guarded


def _give_room(module: ModuleType) -> None:
    frame_stack.watch(module, journal.entered)


def _publish_metrics(module: ModuleType) -> None:
    from overlay import metrics

    metrics.publish(module)


def _import_transformers(_: ModuleType) -> None:
    """Complete transformers' module on this thread, before vLLM starts threads that import from it.

    Symptom: ``ImportError: cannot import name … from partially initialized module 'transformers'`` at start, now and
    then. Cause: one thread builds the module while another takes names from it. Upstream: vLLM #40331, taken back by
    #40438. Not before vLLM's environment module: transformers may load torch, and torch reads its environment then.
    """
    if journal.transformers["state"] != NOT_YET:
        return
    before = "transformers" in sys.modules
    start = time.perf_counter()
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        journal.transformers = {"state": "missing"}
        journal.problem(f"transformers cannot be imported, vLLM goes on without it: {error}")
        return
    if before:  # complete now, should another thread have been at it
        journal.transformers = {"state": "was imported before vllm"}
    else:
        journal.transformers = {"state": "imported first", "seconds": round(time.perf_counter() - start, 3)}


def _after_vllm(module: ModuleType, settings: Settings) -> None:
    """vLLM's package is there: note its version, and what can be said of patches without reading a target."""
    journal.vllm_version = getattr(module, "__version__", None)
    if journal.transformers["state"] == NOT_YET:  # a vLLM without an environment module
        _import_transformers(module)
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
        text = f"{patch}: {found.state}, vLLM runs stock here: {found.reason} ({found.where})"
        journal.problem(text)
        if settings.strict:
            raise Drifted(text)
    else:
        intercepted = (
            f"; intercepts {', '.join(map('.'.join, found.intercepted()))}" if found.state == verdict.APPLY else ""
        )
        log.logger.debug("overlay: %s: %s: %s%s", patch, found.state, found.reason, intercepted)
    journal.write()
