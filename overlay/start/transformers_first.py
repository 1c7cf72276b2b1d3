"""Fixes the race over the first import of transformers, which sometimes fails vLLM's start."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import ModuleType

from overlay.report.journal import journal
from overlay.settings import Settings
from overlay.start.guard import guarded

#: Has a function called instead of executing a module. It gets the module, and a function that executes it.
Watch = Callable[[str, Callable[[ModuleType, Callable[[], None]], None]], None]


def see_to_transformers(settings: Settings, watch: Watch) -> None:
    """Make sure that no thread gets a half-built transformers module, whoever imports it first.

    We wait for the import and do not import it ourselves. The import reads the settings of Hugging Face's hub (offline,
    home, endpoint), and a program may set those after ``import vllm``.
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
        guarded("transformers first", lambda module: _complete(module, seconds), settings)(module)

    watch("transformers", around)


def _complete(module: ModuleType, seconds: float) -> None:
    """Make the names of the module in sys.modules available in the one that has just been executed.

    Symptom: now and then, at start, ``ImportError: cannot import name … from partially initialized module 'transformers'``.
    Cause: transformers builds a second, lazy module and puts it into sys.modules. A thread that imports names meanwhile
    waits, and then takes them from the module that it found before it waited. That is the first module, which never gets
    the names. Upstream: vLLM #40331, reverted by #40438.
    """
    lazy = sys.modules.get(module.__name__)
    if lazy is not None and lazy is not module:
        vars(module)["__getattr__"] = lambda name: getattr(lazy, name)
    journal.transformers = {"state": "imported first", "seconds": seconds}
    journal.write()
