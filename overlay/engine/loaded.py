"""The moment when a worker has loaded its model and vLLM has not traced yet.

A patch that has to see the weights before it can decide (overlay.side_work.waiting) is called then. Its decision can still
shape the graph that vLLM traces later, and that graph's key in the compile cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlay.engine.proof import WORKERS

_waiting: list[Callable[[Any], None]] = []


def when_loaded(decide: Callable[[Any], None]) -> None:
    """Have `decide` called with each worker of this process that has loaded its model.

    Anything that `decide` raises stops vLLM, so it handles everything else itself.
    """
    _waiting.append(decide)


def decide_after_load(module: ModuleType) -> None:
    """Call everything that waits, after each `load_model` of this module's worker."""
    import wrapt

    def after_load(wrapped: Callable[..., Any], worker: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        before = _allocated_bytes()
        for decide in _waiting:
            decide(worker)
        _count_as_the_models(worker, _allocated_bytes() - before)
        return result

    wrapt.wrap_function_wrapper(module, f"{WORKERS[module.__name__]}.load_model", after_load)


def _allocated_bytes() -> int:
    """The bytes that torch has allocated on this worker's GPU; 0 if the worker uses none."""
    torch: Any = sys.modules.get("torch")
    return int(torch.cuda.memory_allocated()) if torch is not None and torch.cuda.is_initialized() else 0


def _count_as_the_models(worker: Any, taken: int) -> None:
    """Add the `taken` bytes (the workspace of the auxiliary stream) to the model's memory.

    vLLM sizes its KV cache by that number. From 0.27 on it asks the device instead, and this changes one log line only.
    """
    runner: Any = getattr(worker, "model_runner", None)
    if taken > 0 and hasattr(runner, "model_memory_usage"):
        runner.model_memory_usage += taken
