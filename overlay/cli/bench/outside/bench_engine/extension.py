"""What the bench adds to every process that has a model: the engine's, or vLLM's own with tensor parallelism and `vllm serve`.

vLLM imports the class that `worker_extension_cls` names in every worker, before the model is loaded, whether the process
was forked or spawned. That import replaces the dummy loader there, so that the random weights matter.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from . import weights

if os.environ.get(weights.SEED):
    weights.replace_dummy_weights(int(os.environ[weights.SEED]))


class BenchWorker:
    """Becomes a base class of vLLM's worker; its methods can be asked for on every rank."""

    def bench_checksum(self: Any) -> str:
        """The checksum of this rank's weights."""
        return weights.checksum(self.get_model())

    def bench_classes(self: Any, base: str) -> dict[str, int]:
        """How many of this rank's modules have a base class of that name, by their class."""
        found: dict[str, int] = {}
        for module in self.get_model().modules():
            if any(one.__name__ == base for one in type(module).__mro__):
                found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
        return found

    def bench_journal(self: Any) -> dict[str, Any]:
        """The overlay's journal of this rank's process; empty without the overlay."""
        module = sys.modules.get("overlay.report.journal")
        return {} if module is None else dict(module.journal.as_dict())
