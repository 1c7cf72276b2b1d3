"""A compiled graph's identity in vLLM's compile cache.

vLLM's cache key knows nothing of a monkey patch: a warm cache of an unpatched run is loaded with the patch installed and
the op is never called; and the reverse. vLLM hashes every entry of ``vllm.envs.environment_variables``, in JIT and in AOT
mode, so a fingerprint goes in there (seen in 0.20.0 and 0.33.0: ``compile_factors``).

A process in which nothing is applied adds no entry, and shares its cache with stock vLLM.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable

ENTRY = "VLLMOVERLAY_FINGERPRINT"

_applied: dict[str, str] = {}


def add(patch: str, detail: Iterable[str]) -> str | None:
    """Enter an applied patch with what of it shapes the graph; gives the fingerprint of all patches so far."""
    _applied[patch] = " ".join(detail)
    return _enter()


def remove(patch: str) -> str | None:
    """Take a patch out that was not applied after all; None when none is left."""
    _applied.pop(patch, None)
    return _enter()


def _enter() -> str | None:
    entries = sys.modules["vllm.envs"].environment_variables
    if not _applied:
        entries.pop(ENTRY, None)
        return None
    current = _fingerprint()
    entries[ENTRY] = lambda: current
    return current


def _fingerprint() -> str:
    """A hash of the patches that are applied in this process and of the overlay's own source."""
    digest = hashlib.sha256(source_hash().encode())
    for patch, detail in sorted(_applied.items()):
        digest.update(f"\0{patch}\0{detail}".encode())
    return digest.hexdigest()[:16]


def source_hash() -> str:
    """Over every .py file of the overlay but its command line's: a changed op body or shape is another graph."""
    digest = hashlib.sha256()
    folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.isdir(folder):  # in a zip: the hash of nothing would be the same for every version
        raise OSError(f"{folder} is not a folder")
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "cli")
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(parent, name)
                digest.update(os.path.relpath(path, folder).encode())
                with open(path, "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()
