"""The worker process of the DeepSeek-V4 evidence: `EngineWorker` with that model's weights. Run by its path."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder has modules by the names of others'; its parent is the one to look in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpu import deepseek_model

if __name__ == "__main__":
    from bench_engine import weights, worker

    weights.fill = deepseek_model.fill
    worker.main()
