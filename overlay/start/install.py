"""From a patch's target module, which has just been executed, to a verdict in the journal."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from types import ModuleType

from overlay.engine import compile_cache, proof, running_code
from overlay.patches import registry
from overlay.report.journal import journal
from overlay.report.log import logger
from overlay.settings import Settings, outcome
from overlay.start.guard import Drifted
from overlay.verdict import SourceTree, Verdict
from overlay.vocabulary import APPLY, DRIFTED, REFUSED


def install(patch: str, module: ModuleType, settings: Settings) -> None:
    """Judge the source of a target module that has just been executed, and install the patch if it applies."""
    tree = sources()
    found = registry.judge(patch, tree)
    if found.module != module.__name__ and not (found.module and module.__name__.startswith(f"{found.module}.")):
        return  # the verdict is about another one of the patch's modules
    if found.state == APPLY:
        stranger = None if found.without_layers else running_code.remember(patch, module, found, tree.texts)
        if stranger is None:
            found = _install_judged(patch, module, found, settings)
        else:
            found = replace(found, state=REFUSED, reason=stranger)
    conclude(patch, found, settings)


def _install_judged(patch: str, module: ModuleType, found: Verdict, settings: Settings) -> Verdict:
    """Install the patch. The key of the compile cache changes first, or vLLM could load a graph compiled without the patch."""
    if not found.without_layers:
        proof.remember(patch, module, found)
    if found.shapes_graph:
        compile_cache.add(patch, found.methods)
    installed = False
    try:
        installer = importlib.import_module(f"overlay.patches.{patch}.patch")
        found = installer.install(module, found, settings)
        installed = found.state == APPLY
    finally:
        if not installed:
            if found.shapes_graph:
                compile_cache.remove(patch)
            proof.forget(patch)
    return found


def conclude(patch: str, found: Verdict, settings: Settings) -> None:
    """Record the final verdict on a patch in this process. Drifted and refused are problems, and fatal under strict."""
    journal.patch(patch).judged(found)
    if found.state in (DRIFTED, REFUSED):
        text = f"{patch}: {found.state}, {outcome(settings.strict)}: {found.reason} ({found.where})"
        journal.problem(text)
        if settings.strict:
            raise Drifted(text)
    else:
        intercepted = f"; intercepts {', '.join(map('.'.join, found.intercepted()))}" if found.state == APPLY else ""
        logger.debug("overlay: %s: %s: %s%s", patch, found.state, found.reason, intercepted)
    journal.write()


def judge(patch: str) -> Verdict:
    """The verdict of a patch on the vLLM that is being imported."""
    return registry.judge(patch, sources())


def sources() -> SourceTree:
    """The sources of the vLLM that is being imported."""
    package = os.path.abspath(sys.modules["vllm"].__file__ or "")
    return SourceTree(os.path.dirname(os.path.dirname(package)))
