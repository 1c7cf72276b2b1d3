"""From the first ``import vllm`` of a process to installed patches.

Every hook is guarded: an exception in a hook would fail the import of vLLM's module. The default is fail-open, vLLM runs
stock and one WARNING says why; under strict the exception goes on and stops vLLM before it serves.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

import overlay
from overlay import settings as settings_module
from overlay.engine import loaded, loops, proof, ranks
from overlay.patches import registry
from overlay.report import log, summary
from overlay.report.journal import journal
from overlay.settings import Settings
from overlay.start import own_code
from overlay.start.guard import guarded
from overlay.start.install import conclude, install, judge, sources
from overlay.start.transformers_first import Watch, see_to_transformers
from overlay.vocabulary import OFF

#: The module from which vLLM's /metrics gets its registry.
METRICS_MODULE = "vllm.v1.metrics.prometheus"

_came_by = False


def around_vllm(module: ModuleType, execute: Callable[[], None], watch: Watch) -> None:
    """The first ``import vllm`` of this process: settings and hooks, vLLM itself, then what can be said of it.

    `importlib.reload(vllm)` also calls this; the hooks are already registered. `watch` is the door's (overlay/bootstrap.py).
    """
    global _came_by
    if _came_by:
        execute()
        return
    _came_by = True
    settings = _prepare(watch)
    execute()
    if settings is not None:
        guarded("sources", lambda module: _after_vllm(module, settings), settings)(module)


def _prepare(watch: Watch) -> Settings | None:
    """Settings, log, journal, hooks; None where the overlay stays out of this process."""
    try:
        settings = settings_module.load(os.environ)
        if not settings.enabled:
            return None
        log.hold(settings.log_level)
        for line in settings.retired:
            log.logger.warning("overlay: %s", line)
        own_code.check_code(os.path.dirname(overlay.__file__))
        _set_hooks(settings, watch)
    except Exception as error:
        strict = settings_module.strict_was_asked_for(os.environ)
        log.hold("warning")
        log.logger.warning("overlay: %s: %s: %s", settings_module.outcome(strict), type(error).__name__, error)
        log.give_up()
        if strict:
            raise
        return None
    return settings


def _set_hooks(settings: Settings, watch: Watch) -> None:
    _fall_back_on_our_wrapt()
    from wrapt import register_post_import_hook

    register_post_import_hook(guarded("logging", log.release_when_configured, settings), "vllm.logger")
    journal.open(settings.journal_folder)
    see_to_transformers(settings, watch)
    for patch, module_names in registry.TARGET_MODULES.items():
        record = journal.patch(patch)
        if patch not in settings.patches:
            record.conclude(OFF, "switched off")
            continue
        for module_name in module_names:
            hook = guarded(patch, lambda module, patch=patch: install(patch, module, settings), settings)  # type: ignore[misc]
            register_post_import_hook(hook, module_name)
    register_post_import_hook(guarded("metrics", _publish_metrics, settings), METRICS_MODULE)
    for module_name in proof.WORKERS:
        hook = guarded("agreement of the ranks", lambda module: ranks.compare_when_joined(module, settings), settings)
        register_post_import_hook(hook, module_name)
        hook = guarded("proof of effect", lambda module: proof.prove_after_warm_up(module, settings, judge), settings)
        register_post_import_hook(hook, module_name)
        register_post_import_hook(guarded("loaded models", loaded.decide_after_load, settings), module_name)
    for module_name in loops.LOOPS if settings.patches else ():
        register_post_import_hook(guarded("loops", loops.wrap_loops, settings), module_name)


def _fall_back_on_our_wrapt() -> None:
    """The bundle brings wrapt in a folder of its own, for an environment that has none; one that is there stays."""
    fallback = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(overlay.__file__))), "fallback")
    if importlib.util.find_spec("wrapt") is None and os.path.isdir(fallback):
        sys.path.append(fallback)


def _publish_metrics(module: ModuleType) -> None:
    from overlay.report import metrics

    metrics.publish(module)


def _after_vllm(module: ModuleType, settings: Settings) -> None:
    """vLLM's package is there: note its version, and what can be said of patches without reading a target."""
    journal.vllm_version = getattr(module, "__version__", None)
    tree = sources()
    for patch, module_names in registry.TARGET_MODULES.items():
        record = journal.patch(patch)
        if record.verdict == OFF or any(tree.has(name) for name in module_names):
            continue
        conclude(patch, registry.judge(patch, tree), settings)
    summary.say_armed(journal.vllm_version)
    journal.write()
