"""The overlay's part of the key of vLLM's compile cache.

vLLM's key does not know about a monkey patch. A patched process would load a graph that an unpatched one has cached, and
never call the op; and the reverse. vLLM hashes every entry of ``vllm.envs.environment_variables``, in JIT and in AOT mode,
so the overlay adds a fingerprint there (seen in 0.20.0 and 0.33.0: ``compile_factors``). It covers stock layers too,
because the next start may patch them.

A process in which nothing is applied adds no entry, and shares its cache with stock vLLM. If the user sets ``cache_dir``,
vLLM takes any graph that is there, so every layer stays stock (`overlay.side_work.adoption.refuse_modes`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping

import overlay
from overlay.report.journal import journal

ENTRY = "VLLMOVERLAY_FINGERPRINT"

_applied: dict[str, str] = {}
#: By patch, of this engine: what shapes the graphs of its loaded models, by layer; and the layers that stay stock.
_shapes: dict[str, dict[str, str]] = {}
_stock: dict[str, set[str]] = {}


def add(patch: str, detail: Iterable[str]) -> None:
    """Add an applied patch to the fingerprint. `detail` is what of the patch shapes every graph."""
    _applied[patch] = " ".join(detail)
    _enter()


def note_shapes(patch: str, shapes: Mapping[str, str]) -> None:
    """Note what shapes the graph of a model that has been loaded, by layer. This engine's earlier models still count."""
    _shapes.setdefault(patch, {}).update(shapes)
    _enter()


def note_layer(patch: str, layer_name: str, *, stock: bool) -> None:
    """Note that a layer was made, and whether it stays `stock`."""
    layers = _stock.setdefault(patch, set())
    if patch in _applied and stock != (layer_name in layers):
        (layers.add if stock else layers.remove)(layer_name)
        _enter()


def remove(patch: str) -> None:
    """Remove a patch that was not applied after all."""
    _applied.pop(patch, None)
    _enter()


def begin_engine() -> None:
    """A new engine of this process begins: forget the layers of the last one, so that the key is that of an engine alone."""
    _shapes.clear()
    _stock.clear()
    if _applied:
        _enter()


def _enter() -> None:
    """Write the fingerprint to vLLM's table and to the journal. Nothing else writes it. Without a patch there is none."""
    entries = sys.modules["vllm.envs"].environment_variables
    current = _fingerprint() if _applied else None
    if current is None:
        entries.pop(ENTRY, None)
    else:
        entries[ENTRY] = lambda: current
    journal.fingerprint = current


def _fingerprint() -> str:
    """A hash of the overlay's source, of the patches that are applied in this process, and of the layers that stay stock."""
    digest = hashlib.sha256(source_hash().encode())
    for patch, detail in sorted(_applied.items()):
        shapes = (f"{layer_name}={shape}" for layer_name, shape in sorted(_shapes.get(patch, {}).items()))
        digest.update("\0".join(("", patch, detail, *shapes, *sorted(_stock.get(patch, ())))).encode())
    return digest.hexdigest()[:16]


@functools.cache
def source_hash() -> str:
    """A hash of every .py file of the overlay except the command line's. A changed op body or shape makes another graph.

    The first call, before the first patch is imported, decides for the process: files that change later are not what runs.
    """
    digest = hashlib.sha256()
    folder = os.path.dirname(os.path.abspath(overlay.__file__))
    if not os.path.isdir(folder):  # in a zip: the hash of no file would be the same for every version
        raise OSError(f"{folder} is not a folder")
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "cli")
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.endswith(".py") and os.path.isfile(path):  # an editor's lock is a link that leads nowhere
                digest.update(os.path.relpath(path, folder).encode())
                with open(path, "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()
