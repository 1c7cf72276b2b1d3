"""Verdicts: what a patch may do with a vLLM, read from that vLLM's source. This package knows no patch."""

from __future__ import annotations

from overlay.verdict.model import (
    Source,
    SourceTree,
    Upstream,
    Verdict,
    class_at,
    decoded,
    kind_of,
)

__all__ = [
    "Source",
    "SourceTree",
    "Upstream",
    "Verdict",
    "class_at",
    "decoded",
    "kind_of",
]
