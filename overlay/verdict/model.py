"""What a verdict is, and where sources come from. Structure decides, never a version number (nightlies, forks, backports)."""

from __future__ import annotations

import ast
import errno
import os
import re
import stat
from dataclasses import dataclass
from importlib.util import decode_source

from overlay.vocabulary import ABSENT, DRIFTED


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
    `without_layers` is true for a patch that runs what it intercepts as it is, whoever has written that: it has neither layers
    nor an op whose calls are counted, and what runs need not be what was read.
    """

    state: str
    reason: str
    module: str | None = None
    class_name: str | None = None
    methods: tuple[str, ...] = ()
    where: str | None = None
    upstream: Upstream | None = None
    shapes_graph: bool = True
    without_layers: bool = False

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


def kind_of(path: str) -> int:
    """The kind of file at a path (`st_mode`), 0 for none.

    Raises OSError where nobody can tell: what lies in a closed folder is not absent, though os.path.isfile says so.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def decoded(content: bytes, path: str) -> str:
    """A source file's text as Python reads it, with a byte order mark or a coding line. Raises ValueError with the path."""
    try:
        if b"\0" in content:  # Python itself says so at one time or another, by its version
            raise ValueError("it has null bytes")
        return decode_source(content)
    except (SyntaxError, ValueError) as error:  # SyntaxError: an encoding that does not exist
        raise ValueError(f"{path} is no Python text: {error}") from error


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
        """Whether this vLLM has a module of that dotted name. One look at the file system, nothing is read.

        Raises OSError where nobody can tell.
        """
        return any(stat.S_ISREG(kind_of(path)) for path in self._paths(module))

    def read(self, module: str) -> Source | None:
        """The source of a module given by its dotted name, or None where this vLLM has no such module.

        Raises OSError or ValueError, with the path, where it has one that cannot be read.
        """
        for path in () if module in self.texts else self._paths(module):
            kind = kind_of(path)
            if not kind:
                continue
            if not stat.S_ISREG(kind):  # a pipe would never end
                raise OSError(errno.EINVAL, "not a regular file", path)
            with open(path, "rb") as file:
                self.texts[module] = Source(decoded(file.read(), path), path)
            break
        return self.texts.get(module)


@dataclass(frozen=True)
class Witness:
    """A module of every vLLM that names a patch's target, if that vLLM has the target.

    A folder without the target may be half a copy, or hold byte code alone. Only a witness that is there, whole, and does
    not name the target says that this vLLM has none. `last` is a definition that every vLLM has in the witness behind all
    such names: without it the witness itself is half a file.
    """

    module: str
    last: str
    names: str  #: a regular expression


def in_model_registry(names: str) -> Witness:
    """vLLM's table of all models as the witness."""
    return Witness("vllm.model_executor.models.registry", "ModelRegistry =", names)


def without_target(tree: SourceTree, witness: Witness, *, absent: str, lost: str) -> Verdict:
    """The verdict where none of a patch's modules is there.

    `absent` is the reason where the witness does not name the target either, `lost` the reason where it does.
    """
    source = tree.read(witness.module)
    if source is None:
        return Verdict(DRIFTED, f"{witness.module} has no source here, so nobody can tell what this vLLM has")
    if f"\n{witness.last}" not in source.text:
        reason = f"{witness.module} ends too early, so nobody can tell what this vLLM has"
        return Verdict(DRIFTED, reason, where=f"{source.path}:1")
    named = re.search(witness.names, source.text)
    if named is None:
        return Verdict(ABSENT, absent)
    line = source.text.count("\n", 0, named.start()) + 1
    return Verdict(DRIFTED, lost, where=f"{source.path}:{line}")
