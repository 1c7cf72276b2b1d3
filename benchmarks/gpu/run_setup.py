"""The scripts' choices for one run: `Setup` of overlay/cli/bench, and how many layers."""

from __future__ import annotations

from dataclasses import dataclass

from overlay.cli.bench import setup


@dataclass
class Setup(setup.Setup):
    layers: int = 12
