"""Finds the vLLM that a command is asked about: the installed one, an unpacked one, a wheel, or a release by number or
"latest".
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from overlay.cli.failure import CommandError
from overlay.patches.registry import WITNESSES
from overlay.verdict import Source, SourceTree, decoded, kind_of

LATEST = "latest"
ALLOWED = "allowed are a folder that holds vllm/, the vllm folder itself, a wheel file of vLLM, a version number such as 0.33.0, and latest"
#: Every vLLM has the sources of these. What has less is another package, half a copy, or byte code alone.
MARKS = ("vllm", "vllm.version", "vllm.envs", *WITNESSES)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Vllm:
    """A vLLM whose sources can be read. `kind` is "installed", "tree", "wheel" or "release"; `version` None if unknown."""

    kind: str
    path: str
    version: str | None
    tree: SourceTree

    def relative(self, where: str | None) -> str:
        """A verdict's ``file:line`` without the part that is the same for all of them."""
        return (where or "").removeprefix(self.tree.folder).lstrip("/")


class WheelTree(SourceTree):
    """The sources of a vLLM that is still packed."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._wheel = self._readable(lambda: zipfile.ZipFile(path))
        self._names = frozenset(self._wheel.namelist())

    def _paths(self, module: str) -> tuple[str, str]:
        base = module.replace(".", "/")
        return f"{base}.py", f"{base}/__init__.py"

    def has(self, module: str) -> bool:
        return any(name in self._names for name in self._paths(module))

    def read(self, module: str) -> Source | None:
        for name in self._paths(module):
            if name in self._names:
                path = f"{self.folder}/{name}"
                return Source(decoded(self._readable(lambda name=name: self._wheel.read(name)), path), path)  # type: ignore[misc]
        return None

    def _readable(self, read: Callable[[], Result]) -> Result:
        """zipfile has half a dozen kinds of exceptions for a damaged archive; for a reader they are one."""
        try:
            return read()
        except Exception as error:
            raise CommandError(
                f"the wheel {self.folder} cannot be read ({type(error).__name__}: {error}); fetch it again; {ALLOWED}"
            ) from error


def find(given: str | None, cache: Path | None) -> Vllm:
    """The vLLM that `given` names, None for the installed one. `cache` is the folder for fetched releases, None for the
    user's own. Raises CommandError, with what is allowed."""
    if given is None:
        return _installed()
    path = read(lambda: os.path.abspath(os.path.expanduser(given)), given)
    kind = read(lambda: kind_of(path), path) if given else 0
    if stat.S_ISDIR(kind):
        return _unpacked(given, path)
    if stat.S_ISREG(kind):
        tree = WheelTree(path)
        missing = _missing(tree)
        if missing is not None:
            raise CommandError(f"--vllm={given!r} is not a wheel of vLLM: it has no {missing}; {ALLOWED}")
        return Vllm("wheel", path, _version(tree), tree)
    if given == LATEST:
        from overlay.cli import releases

        return release(releases.latest(), cache)
    if not re.match(r"v?\d", given) or "/" in given or given.endswith(".whl"):
        raise CommandError(f"--vllm={given!r} is neither a folder, nor a file, nor a version number; {ALLOWED}")
    return release(given, cache)


def release(version: str, cache: Path | None) -> Vllm:
    """A release by its number, fetched unless it is in the cache."""
    from overlay.cli import releases

    folder = releases.fetch([version], cache or releases.user_cache())[0]
    return of_release(folder)


def of_release(folder: Path) -> Vllm:
    """A fetched release; its folder is named after it."""
    tree = SourceTree(folder)
    missing = _missing(tree)
    if missing is not None:
        raise CommandError(
            f"{folder} is not a whole vLLM: it has no {missing}; remove that folder, and the release is fetched again"
        )
    return Vllm("release", str(folder), folder.name, tree)


def _installed() -> Vllm:
    """The vLLM that this Python would import. Asking for its spec executes nothing of it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError) as error:
        raise CommandError(f"the installed vLLM cannot be found ({error}); name one with --vllm: {ALLOWED}") from error
    if spec is None or spec.origin is None:
        raise CommandError(f"no vLLM is installed in this Python; name one with --vllm: {ALLOWED}")
    package = os.path.dirname(os.path.abspath(spec.origin))
    tree = SourceTree(os.path.dirname(package))
    missing = _missing(tree)
    if missing is not None:
        raise CommandError(
            f"{package} is what this Python imports as vllm, and it is not a whole vLLM with its sources: "
            f"it has no {missing}; name one with --vllm: {ALLOWED}"
        )
    return Vllm("installed", package, _version(tree), tree)


def _unpacked(given: str, path: str) -> Vllm:
    holds_one = read(lambda: kind_of(os.path.join(path, "vllm")), path)
    tree = SourceTree(os.path.dirname(path) if os.path.basename(path) == "vllm" and not holds_one else path)
    missing = _missing(tree)
    if missing is not None:
        raise CommandError(f"--vllm={given!r} is a folder without a whole vLLM: it has no {missing}; {ALLOWED}")
    return Vllm("tree", os.path.join(tree.folder, "vllm"), _version(tree), tree)


def _missing(tree: SourceTree) -> str | None:
    """The first file that every vLLM has and this one lacks. Raises CommandError where nobody can tell."""
    for module in MARKS:
        if not read(lambda module=module: tree.has(module), tree.folder):  # type: ignore[misc]
            return f"{module.replace('.', '/')}{'/__init__' if module == MARKS[0] else ''}.py"
    return None


def _version(tree: SourceTree) -> str | None:
    """What the build wrote down, without executing it; a checkout that was never built has nothing."""
    source = read(lambda: tree.read("vllm._version"), tree.folder)
    found = re.search(r"""^__version__ = .*['"]([^'"\n]+)['"]$""", source.text, re.MULTILINE) if source else None
    return found.group(1) if found else None


def read(look: Callable[[], Result], path: str) -> Result:
    """`look` at sources. Raises CommandError where a file is there, or may be, and is no readable Python text."""
    try:
        return look()
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, a NUL
        raise CommandError(f"the vLLM in {path} cannot be read: {type(error).__name__}: {error}") from error
