"""Where things are and how the two sides are started: folders, environment variables, engine arguments, time left."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpu import models
from gpu.results import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

SIDES = ("stock", "overlay")


def numbers(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers."""
    return tuple(int(part) for part in text.split(",") if part)


@dataclass
class Setup:
    """The choices of one run."""

    work: Path
    out: Path
    site: str | None
    architecture: str
    layers: int
    budget: float
    cpu: bool = False
    tokens: int = 32
    capture_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    overlay_environment: dict[str, str] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def remaining(self) -> float:
        return self.budget - self.elapsed()

    def gdn_layers(self) -> int:
        return models.layer_types(self.layers).count("linear_attention")

    def architectures(self) -> list[str]:
        """What to try: the released model's own architecture, then the older one that is known to run."""
        if self.architecture != "auto":
            return [self.architecture]
        return ["qwen3_5_moe", "qwen3_next"]

    def model_folder(
        self, architecture: str, layers: int | None = None, quantization: Any = None, name: str = ""
    ) -> Path:
        content = models.configuration(architecture, layers or self.layers, self.cpu, quantization)
        return models.write(self.work / "models" / (name or architecture), content)

    def journal_folder(self, run: str) -> Path:
        return self.work / "journals" / run

    def environment(self, side: str, run: str, cache_root: Path | None = None) -> dict[str, str]:
        """A side's environment: the overlay differs by its folder on PYTHONPATH and its settings, nothing else."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("VLLMOVERLAY", "VLLM_")) and name != "PYTHONPATH"
        }
        path = [self.site] if self.site else []
        environment = {
            **kept,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_CACHE_ROOT": str(cache_root or self.work / f"vllm-{side}"),
            "TORCHINDUCTOR_CACHE_DIR": str((cache_root or self.work / f"vllm-{side}") / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TRITON_CACHE_AUTOTUNING": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if self.cpu:
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}
        if side == "overlay":
            path.insert(0, str(REPOSITORY))
            folder = self.journal_folder(run)
            folder.mkdir(parents=True, exist_ok=True)
            environment |= {"VLLMOVERLAY_JOURNAL_DIR": str(folder), **self.overlay_environment}
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(path)
        return environment

    def engine(self, model: Path, architecture: str, **changes: Any) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, the same for both sides."""
        arguments: dict[str, Any] = {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 9216,
            "max_num_batched_tokens": 8192,
            "max_num_seqs": 256,
            "gpu_memory_utilization": 0.4,
            "kv_cache_memory_bytes": 16 << 30,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "seed": 0,
            "additional_config": {"gdn_prefill_backend": "triton"},
            "compilation_config": {"cudagraph_capture_sizes": list(self.capture_sizes)},
        }
        if architecture in ("qwen3_5_moe", "qwen3_5"):
            arguments["language_model_only"] = True
        if self.cpu:
            arguments |= {"max_model_len": 1024, "max_num_batched_tokens": 1024, "max_num_seqs": 8}
            arguments["kv_cache_memory_bytes"] = 256 << 20
            del arguments["additional_config"]
        return {**arguments, **changes}

    # ---- Triton's cache

    def _marker(self) -> Path:
        return self.work / "triton" / "autotuned"

    def triton_is_warm(self) -> bool:
        return self._marker().exists()

    def mark_triton_warm(self) -> None:
        self._marker().parent.mkdir(parents=True, exist_ok=True)
        self._marker().touch()
