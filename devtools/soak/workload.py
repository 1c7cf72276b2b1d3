"""What a soak's servers serve, and how they are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from devtools.servers import ROOT, ServerError
from devtools.soak.checkpoint import SEEDS, Recipe, adapter_of, tokenizer_of
from overlay.cli.bench.setup import NO_FLASHINFER, NO_FLASHINFER_CONFIG, has_flashinfer, shared_triton

RANKS = (8, 16, 4)
#: Every linear layer of these models that takes adapters, but gdn's two projections: with adapters on those gdn leaves its layers
#: stock. vLLM knows the option from 0.19.0 on.
TARGETS = ("qkv_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj")
KV_CACHE_BYTES = 3 << 30
#: What is done to an engine between two spells of load.
INTERFERENCES = SLEEP, WEIGHTS = ("sleep", "weights")


@dataclass(frozen=True)
class Workload:
    """Two checkpoints of one recipe with different weights, and adapters for them."""

    recipe: Recipe
    folder: Path
    ranks: tuple[int, ...] = RANKS
    interferences: tuple[str, ...] = INTERFERENCES

    def _checkpoint(self, seed: int) -> Path:
        recipe = self.recipe
        name = recipe.shape.strip("/").replace("/", "-")  # it may be a configuration's path
        return self.folder / f"{name}-{recipe.layers}-layers-{recipe.format}-{seed}"

    @property
    def model(self) -> Path:
        """What is served."""
        return self._checkpoint(SEEDS[0])

    @property
    def other(self) -> Path:
        """What is loaded now and then."""
        return self._checkpoint(SEEDS[1])

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters' folders, by the names under which they are served."""
        return {f"rank-{rank}": adapter_of(self.model, self.recipe, rank) for rank in self.ranks}

    @property
    def patches(self) -> tuple[str, ...]:
        """The patches that have something to do here."""
        return ("gdn", "lora_linear") if self.ranks else ("gdn",)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of a prompt: a few, and more than vLLM takes in one step, so that prefills come in pieces beside decodes."""
        return (3, 400) if self.recipe.shape == "tiny" else (3, 100, 700, 2000)

    def make(self) -> None:
        """Make what is not there yet, in processes of their own: this one has no use for torch, and the servers have for its memory.

        Raises ServerError where it cannot be made.
        """
        recipe = self.recipe
        environment = {**os.environ, "VLLMOVERLAY": "0", "HF_HUB_OFFLINE": "1"}

        def make(seed: int) -> None:
            command = [sys.executable, "-m", "devtools.soak.checkpoint", str(self._checkpoint(seed))]
            command += ["--seed", str(seed), "--shape", recipe.shape, "--layers", str(recipe.layers)]
            command += ["--format", recipe.format]
            for rank in self.ranks if seed == SEEDS[0] else ():
                command += ["--rank", str(rank)]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ServerError(f"the checkpoint could not be made:\n{done.stdout}{done.stderr}")

        with ThreadPoolExecutor(len(SEEDS)) as pool:
            list(pool.map(make, SEEDS))

    def arguments(self, on_gpu: bool) -> list[str]:
        """Of `vllm serve`: prompts longer than a step, more requests than a step has room for, a slot for each adapter."""
        longest = max(self.prompt_lengths)
        step = longest * 5 // 8
        found = [
            *("--tokenizer", str(tokenizer_of(self.model, self.recipe))),
            *("--max-model-len", str(longest + 112)),
            *("--max-num-batched-tokens", str(step)),
            *("--max-num-seqs", "4" if self.recipe.shape == "tiny" else "12"),
            "--language-model-only",
            # A prompt that was seen before would be computed in other pieces, and round differently.
            "--no-enable-prefix-caching",
            *("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}'),
        ]
        if self.ranks:
            found += ["--enable-lora", "--lora-target-modules", *TARGETS]
            # One more than there are adapters: vLLM 0.32.0 on a CPU gives a base request whatever is in the last slot.
            found += ["--max-loras", str(len(self.ranks) + 1), "--max-lora-rank", str(max(*self.ranks, 8))]
            found += ["--lora-modules", *(f"{name}={path}" for name, path in self.adapters.items())]
        if on_gpu:
            found += ["--enable-sleep-mode", "--gpu-memory-utilization", "0.15"]
            found += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
            if not has_flashinfer():
                found += ["--additional-config", json.dumps(NO_FLASHINFER_CONFIG)]
        return found


def gpu_environment(folder: Path) -> dict[str, str]:
    """With this two servers run the same kernels: Triton's choices are shared, and Inductor has none that it would measure."""
    return {
        **shared_triton(folder),
        **({} if has_flashinfer() else NO_FLASHINFER),
        "TORCHINDUCTOR_DYNAMIC_SCALE_RBLOCK": "0",
        "TORCHINDUCTOR_FORCE_FILTER_REDUCTION_CONFIGS": "1",
    }
