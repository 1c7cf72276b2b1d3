"""Code that upstream will not change any more, known by its fingerprints.

A patch for a few old releases needs no questions about what their code may look like: upstream has its own way since. Code
with another fingerprint has been changed by somebody else, and a verdict steps back.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping

from overlay.verdict.cut import cut
from overlay.verdict.model import SourceTree, Verdict
from overlay.verdict.questions import Drift, drifted
from overlay.vocabulary import DRIFTED

#: The fingerprints of functions (``function`` or ``Class.method``), by module. Several, where releases differ in nothing that
#: matters.
Known = Mapping[str, Mapping[str, tuple[str, ...]]]


def unknown(tree: SourceTree, known: Known, module: str, class_name: str) -> Verdict | None:
    """`drifted` for the first function that is not one of the known ones; None if all are. The target is `class_name`."""
    for name, functions in known.items():
        source = tree.read(name)
        if source is None:
            return Verdict(DRIFTED, f"this vLLM has no {name}", module, class_name)
        for path, fingerprints in functions.items():
            try:
                function = cut(source, path)
                if fingerprint(function) not in fingerprints:
                    raise Drift(function, f"{path} is not as released")
            except (Drift, SyntaxError) as error:
                return drifted(error, source.path, module, class_name)
    return None


def fingerprint(node: ast.AST) -> str:
    """A digest of code's structure and names, without comments and layout; the same in every Python."""
    return hashlib.sha256(repr(_structure(node)).encode()).hexdigest()[:16]


def _structure(value: object) -> object:
    if isinstance(value, ast.AST):
        fields = ((name, _structure(part)) for name, part in ast.iter_fields(value) if part not in (None, []))
        return type(value).__name__, *fields
    return [*map(_structure, value)] if isinstance(value, list) else value
