"""The race over the first import of transformers, which vLLM loses now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import ModuleType

from overlay.report.journal import journal
from overlay.settings import Settings
from overlay.start.guard import guarded

#: Has a function called in the place of executing a module: with the module, and with what executes it.
Watch = Callable[[str, Callable[[ModuleType, Callable[[], None]], None]], None]


def see_to_transformers(settings: Settings, watch: Watch) -> None:
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
        guarded("transformers first", lambda module: _complete(module, seconds), settings)(module)

    watch("transformers", around)


def _complete(module: ModuleType, seconds: float) -> None:
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
