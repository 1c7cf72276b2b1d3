"""The scripts' choices for one run: `Setup` of overlay/cli/bench, and which model it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import models
from overlay.cli.bench import setup, shapes

SIDES = (setup.STOCK, setup.OVERLAY)


@dataclass
class Setup(setup.Setup):
    """`architecture` is one of models.ARCHITECTURES, "auto", or another model's of the script."""

    architecture: str = "auto"
    layers: int = 12

    def gdn_layers(self) -> int:
        return shapes.layer_types(self.layers).count("linear_attention")

    def architectures(self) -> list[str]:
        """What to try: the released model's own architecture, then the older one that is known to run."""
        if self.architecture != "auto":
            return [self.architecture]
        return ["qwen3_5_moe", "qwen3_next"]

    def model_folder(
        self, architecture: str, layers: int | None = None, quantization: Any = None, name: str = ""
    ) -> Path:
        content = models.configuration(architecture, layers or self.layers, self.cpu, quantization)
        return shapes.write(self.work / "models" / (name or architecture), content)

    def engine(self, model: Path, architecture: str, **changes: Any) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, the same for both sides."""
        return self.arguments(model, architecture in ("qwen3_5_moe", "qwen3_5"), **changes)
