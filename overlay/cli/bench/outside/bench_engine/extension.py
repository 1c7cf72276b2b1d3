"""Random weights in vLLM's own worker processes: tensor parallelism and `vllm serve`.

vLLM imports the class that `worker_extension_cls` names in every worker, before the model is loaded, whether the process
was forked or spawned. That import is the point: it replaces the dummy loader there.
"""

from __future__ import annotations

import os
from typing import Any

from . import weights

WEIGHT_SEED = "BENCH_WEIGHT_SEED"
NAME = "bench_engine.extension.BenchWorker"

if os.environ.get(WEIGHT_SEED):
    weights.replace_dummy_weights(int(os.environ[WEIGHT_SEED]))


class BenchWorker:
    """Becomes a base class of vLLM's worker; its methods can be asked for on every rank."""

    def bench_checksum(self: Any) -> str:
        """The checksum of this rank's weights."""
        return weights.checksum(self.get_model())
