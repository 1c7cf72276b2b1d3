"""From the first ``import vllm`` of a process to installed patches.

Every hook is guarded (`overlay.start.guard`). By default a failure leaves vLLM stock, and one WARNING says why. Under
strict the exception stops vLLM before it serves.
"""

from __future__ import annotations

import functools
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
    """The first ``import vllm`` of this process: read the settings, set the hooks, execute vLLM, and judge patches without
    a target.

    `importlib.reload(vllm)` also calls this; the hooks are already registered. `watch` is that of overlay/bootstrap.py.
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
    """Settings, log, journal and hooks. None if the overlay does nothing in this process."""
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
    fall_back_on_our_wrapt()
    from wrapt import register_post_import_hook

    def when_imported(module_name: str, what: str, hook: Callable[[ModuleType], None]) -> None:
        register_post_import_hook(guarded(what, hook, settings), module_name)

    when_imported("vllm.logger", "logging", log.release_when_configured)
    journal.open(settings.journal_folder)
    see_to_transformers(settings, watch)
    for patch, module_names in registry.TARGET_MODULES.items():
        record = journal.patch(patch)
        if patch not in settings.patches:
            record.conclude(OFF, "switched off")
            continue
        for module_name in module_names:
            when_imported(module_name, patch, functools.partial(install, patch, settings=settings))
    when_imported(METRICS_MODULE, "metrics", _publish_metrics)
    for name in proof.WORKERS:
        when_imported(name, "agreement of the ranks", lambda module: ranks.compare_when_joined(module, settings))
        when_imported(name, "proof of effect", lambda module: proof.prove_after_warm_up(module, settings, judge))
        when_imported(name, "loaded models", loaded.decide_after_load)
    for name in loops.LOOPS if settings.patches else ():
        when_imported(name, "loops", loops.wrap_loops)


def fall_back_on_our_wrapt() -> None:
    """The bundle has a folder with wrapt, for an environment that has none. An installed wrapt is used instead."""
    fallback = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(overlay.__file__))), "fallback")
    if importlib.util.find_spec("wrapt") is None and os.path.isdir(fallback):
        sys.path.append(fallback)


def _publish_metrics(module: ModuleType) -> None:
    from overlay.report import metrics

    metrics.publish(module)


def _after_vllm(module: ModuleType, settings: Settings) -> None:
    """vLLM's package has been executed: note its version, and conclude the patches that have no target in this vLLM."""
    journal.vllm_version = getattr(module, "__version__", None)
    tree = sources()
    for patch, module_names in registry.TARGET_MODULES.items():
        record = journal.patch(patch)
        if record.verdict == OFF or any(tree.has(name) for name in module_names):
            continue
        conclude(patch, registry.judge(patch, tree), settings)
    summary.say_armed(journal.vllm_version)
    journal.write()
