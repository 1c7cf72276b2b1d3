"""A compiled graph's identity in vLLM's compile cache.

vLLM's cache key knows nothing of a monkey patch: a warm cache of an unpatched run is loaded with the patch installed and
the op is never called; and the reverse. vLLM hashes every entry of ``vllm.envs.environment_variables``, in JIT and in AOT
mode, so a fingerprint goes in there (seen in 0.20.0 and 0.33.0: ``compile_factors``). Layers that stay stock count, too: the
next start may patch them.

A process in which nothing is applied adds no entry, and shares its cache with stock vLLM. In a ``cache_dir`` of the user's
own vLLM takes whatever graph is there, so every layer stays stock (`overlay.side_work.adoption.refuse_modes`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable

import overlay
from overlay.report.journal import journal

ENTRY = "VLLMOVERLAY_FINGERPRINT"

_applied: dict[str, str] = {}
#: The layers of each patch that stay stock.
_stock: dict[str, set[str]] = {}
_source = ""


def add(patch: str, detail: Iterable[str]) -> None:
    """Enter an applied patch, with what of it shapes the graph."""
    global _source
    _source = source_hash()
    _applied[patch] = " ".join(detail)
    _enter()


def note_layer(patch: str, layer_name: str, *, stock: bool) -> None:
    """A layer has been made, and is patched or stays `stock`."""
    layers = _stock.setdefault(patch, set())
    if patch in _applied and stock != (layer_name in layers):
        (layers.add if stock else layers.remove)(layer_name)
        _enter()


def remove(patch: str) -> None:
    """Take a patch out that was not applied after all."""
    _applied.pop(patch, None)
    _enter()


def _enter() -> None:
    """Put the fingerprint where vLLM reads it and where people read it. Nobody else does. Without a patch there is none."""
    entries = sys.modules["vllm.envs"].environment_variables
    current = _fingerprint() if _applied else None
    if current is None:
        entries.pop(ENTRY, None)
    else:
        entries[ENTRY] = lambda: current
    journal.fingerprint = current


def _fingerprint() -> str:
    """A hash of the patches that are applied in this process, without which layers, and of the overlay's own source."""
    digest = hashlib.sha256(_source.encode())
    for patch, detail in sorted(_applied.items()):
        digest.update("\0".join(("", patch, detail, *sorted(_stock.get(patch, ())))).encode())
    return digest.hexdigest()[:16]


def source_hash() -> str:
    """Over every .py file of the overlay but its command line's: a changed op body or shape is another graph."""
    digest = hashlib.sha256()
    folder = os.path.dirname(os.path.abspath(overlay.__file__))
    if not os.path.isdir(folder):  # in a zip: the hash of nothing would be the same for every version
        raise OSError(f"{folder} is not a folder")
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "cli")
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.endswith(".py") and os.path.isfile(path):  # an editor's lock is a link to nowhere
                digest.update(os.path.relpath(path, folder).encode())
                with open(path, "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()
