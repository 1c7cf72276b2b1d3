"""The releases that the contract tests read closely, kept in the repository's own cache.

`make matrix` judges every release of the registry; the tests that run upstream's code take the newest of each minor
release, and every one whose verdict differs from its neighbour's.
"""

from __future__ import annotations

import pathlib

from overlay.cli import releases
from overlay.cli.releases import UnreachableError

__all__ = ["OLDER", "ROOT", "SUPPORTED", "UnreachableError", "sources"]

SUPPORTED: tuple[str, ...] = (
    "0.19.0",
    "0.19.1",
    "0.20.0",
    "0.20.1",
    "0.20.2",
    "0.21.0",
    "0.22.0",
    "0.22.1",
    "0.23.0",
    "0.24.0",
    "0.25.1",
    "0.26.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
    "0.33.0",
)
OLDER: tuple[str, ...] = ("0.17.1", "0.18.1")
ROOT = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "releases"


def sources(version: str) -> pathlib.Path:
    """The folder that holds `vllm/**/*.py` of this release, fetched on first use. Raises UnreachableError."""
    return releases.sources(version, ROOT)
