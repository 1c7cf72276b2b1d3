"""Where things are and how an engine is started: folders, environment variables, engine arguments, time left."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.results import CONTROL, REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

STOCK, OVERLAY = "stock", "overlay"
#: Further arms: the overlay with this value of VLLMOVERLAY_PLAN.
PLANS = ("auto", "dual", "serial")
ARMS = (STOCK, OVERLAY, *PLANS, CONTROL)
WITH_OVERLAY = (OVERLAY, *PLANS)


#: What vLLM is told where there is no FlashInfer: environment variables, and `additional_config`.
NO_FLASHINFER, NO_FLASHINFER_CONFIG = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}, {"gdn_prefill_backend": "triton"}


def has_flashinfer() -> bool:
    """Whether this Python has FlashInfer."""
    return importlib.util.find_spec("flashinfer") is not None


def shared_triton(folder: Path) -> dict[str, str]:
    """With these variables all processes run the Triton kernels that the first one has chosen."""
    return {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_CACHE_AUTOTUNING": "1"}


def numbers(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers."""
    return tuple(int(part) for part in text.split(",") if part)


@dataclass
class Setup:
    """The choices of one run."""

    work: Path
    out: Path
    #: Folders with vLLM, as in PYTHONPATH; None where it is installed.
    site: str | None
    #: Seconds after which no further step is begun.
    budget: float
    cpu: bool = False
    #: Generated tokens per request where tokens are compared.
    tokens: int = 32
    capture_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    arms: tuple[str, ...] = (STOCK, OVERLAY)
    #: For all arms.
    variables: dict[str, str] = field(default_factory=dict)
    overlay_environment: dict[str, str] = field(default_factory=dict)
    #: For one arm alone, by its name.
    arm_variables: dict[str, dict[str, str]] = field(default_factory=dict)
    #: The file of `--in-turn`.
    turns: Path | None = None
    #: Whether FlashInfer can be used; vLLM has to be told where it cannot.
    flashinfer: bool = False
    #: Whether the overlay is installed in this Python: then stock has to be told to leave it off.
    installed: bool = False
    begin: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def remaining(self) -> float:
        return self.budget - self.elapsed()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[Callable[[], None]]:
        """Beside other runs with the same `turns` that start engines. From a call of what this gives on, alone, to measure.

        Waiting takes no time of this run's.
        """
        if self.turns is None:
            yield lambda: None
            return
        with self.turns.open("a") as file:

            def wait_for(lock: int) -> None:
                before = time.monotonic()
                fcntl.flock(file, lock)
                self.begin += time.monotonic() - before

            wait_for(fcntl.LOCK_SH)
            yield lambda: wait_for(fcntl.LOCK_EX)

    def journal_folder(self, run: str) -> Path:
        return self.work / "journals" / run

    def cache_root(self, arm: str) -> Path:
        """An arm's own compile cache; Triton's is shared, so that all arms run the same kernels."""
        return self.work / f"vllm-{arm}"

    def environment(
        self, arm: str, run: str, cache_root: Path | None = None, beside: Iterable[Path] = ()
    ) -> dict[str, str]:
        """An arm's environment. With the overlay it differs by PYTHONPATH and the overlay's settings, and nothing else.

        `run` names the folder of its journals; `beside` are folders that come last on PYTHONPATH, of any arm.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("VLLMOVERLAY", "VLLM_")) and name != "PYTHONPATH"
        }
        path = [self.site] if self.site else []
        root = cache_root or self.cache_root(arm)
        environment = {
            **kept,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(root),
            "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
            **shared_triton(self.work),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        if not self.flashinfer:
            environment |= NO_FLASHINFER
        if self.cpu:
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"}
        if arm not in WITH_OVERLAY:
            environment |= {"VLLMOVERLAY": "0"} if self.installed else {}
        else:
            path.insert(0, str(REPOSITORY))
            folder = self.journal_folder(run)
            folder.mkdir(parents=True, exist_ok=True)
            environment |= {"VLLMOVERLAY_JOURNAL_DIR": str(folder), **self.overlay_environment}
            if arm in PLANS:
                environment["VLLMOVERLAY_PLAN"] = arm
        path += [str(folder) for folder in beside]
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(path)
        return {**environment, **self.variables, **self.arm_variables.get(arm, {})}

    def arguments(self, model: Path, language_only: bool, **changes: Any) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, the same for all arms. `language_only`: the model could also see, and need not."""
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
            "compilation_config": {"cudagraph_capture_sizes": list(self.capture_sizes)},
        }
        if not self.flashinfer:
            arguments["additional_config"] = dict(NO_FLASHINFER_CONFIG)
        if language_only:
            arguments["language_model_only"] = True
        if self.cpu:
            arguments |= {"max_model_len": 1024, "max_num_batched_tokens": 1024, "max_num_seqs": 8}
            arguments["kv_cache_memory_bytes"] = 256 << 20
            arguments.pop("additional_config", None)
        return {**arguments, **changes}

    # ---- Triton's cache

    def _marker(self) -> Path:
        return self.work / "triton" / "autotuned"

    def triton_is_warm(self) -> bool:
        """Whether Triton's kernels have been autotuned by an arm before. A CPU has no Triton."""
        return self.cpu or self._marker().exists()

    def start_in_order(
        self, arms: Iterable[str], together: bool, start: Callable[[str], object], wait: Callable[[str], object]
    ) -> None:
        """Start arms and wait for them: one after the other, or all at once. Where Triton's cache is cold, the first one fills it alone,
        for its autotuning must not run twice at once. `wait` marks it as warm."""
        late = []
        for arm in arms:
            start(arm)
            if together and self.triton_is_warm():
                late.append(arm)
            else:
                wait(arm)
        for arm in late:
            wait(arm)

    def mark_triton_warm(self) -> None:
        self._marker().parent.mkdir(parents=True, exist_ok=True)
        self._marker().touch()
