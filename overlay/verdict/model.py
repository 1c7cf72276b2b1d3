"""What a verdict is, and where sources come from. Structure decides, never a version number (nightlies, forks, backports)."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass

APPLY = "apply"  #: the shape is known and there is something to gain
LANDED = "landed"  #: upstream does it
ABSENT = "absent"  #: this vLLM has no such model or class
DRIFTED = "drifted"  #: the shape is not one we know
INERT = "inert"  #: the shape is right, but there is nothing to gain here


@dataclass(frozen=True)
class Upstream:
    """What a vLLM does itself: since which pull request, whether by default, and what to set ("" for nothing)."""

    pull_request: str
    on_by_default: bool
    setting: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a patch may do with one vLLM.

    `where` is ``file:line`` of what differs or of what is patched. `methods` are the names to intercept in `module`: of
    `class_name`, or ``Class.method`` where there are several classes, with ``submodule.`` before it where `module` is a
    package that does not have the class itself; empty unless `state` is "apply" (or "inert").
    `upstream` is there where this vLLM has a way of its own, also one that is off, or that leaves something out.
    `shapes_graph` is false for a patch that no compiled graph can show: it must not split vLLM's compile cache.
    """

    state: str
    reason: str
    module: str | None = None
    class_name: str | None = None
    methods: tuple[str, ...] = ()
    where: str | None = None
    upstream: Upstream | None = None
    shapes_graph: bool = True

    def intercepted(self) -> tuple[tuple[str, str], ...]:
        """The (class, method) pairs of `methods`."""
        pairs = (name.rpartition(".") for name in self.methods)
        return tuple((class_name or self.class_name or "", method) for class_name, _, method in pairs)


def class_at(module: object, path: str) -> object:
    """The class at a dotted path below a module; None where there is none."""
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


@dataclass(frozen=True)
class Source:
    """One module's text, and its path as a reader should see it."""

    text: str
    path: str

    def parse(self) -> ast.Module:
        return ast.parse(self.text, self.path)


class SourceTree:
    """The Python sources of one vLLM: a folder that holds the package folder ``vllm``.

    `texts` has every module that was read, by name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self.texts: dict[str, Source] = {}

    def _paths(self, module: str) -> tuple[str, str]:
        base = os.path.join(self.folder, *module.split("."))
        return f"{base}.py", os.path.join(base, "__init__.py")

    def has(self, module: str) -> bool:
        """Whether this vLLM has a module of that dotted name. One look at the file system, nothing is read."""
        return any(os.path.isfile(path) for path in self._paths(module))

    def read(self, module: str) -> Source | None:
        """The source of a module given by its dotted name, or None where this vLLM has no such module."""
        for path in () if module in self.texts else self._paths(module):
            try:
                with open(path, encoding="utf-8") as file:
                    self.texts[module] = Source(file.read(), path)
                break
            except (FileNotFoundError, NotADirectoryError):
                continue
        return self.texts.get(module)
