"""When a worker has loaded its model: the moment between the weights and the first trace.

A patch that has to see the weights before it can decide (overlay.patches.gdn) is called here. What it decides may still
shape the graph that vLLM traces later, and its key in the compile cache.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlay.effect import WORKERS

_waiting: list[Callable[[Any], None]] = []


def when_loaded(decide: Callable[[Any], None]) -> None:
    """Have `decide` called with each worker of this process that has loaded its model. It lets no exception out that
    should not end vLLM."""
    _waiting.append(decide)


def watch(module: ModuleType) -> None:
    """Call what waits after `load_model` of this module's worker."""
    import wrapt

    def after_load(wrapped: Callable[..., Any], worker: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        for decide in _waiting:
            decide(worker)
        return result

    wrapt.wrap_function_wrapper(module, f"{WORKERS[module.__name__]}.load_model", after_load)
