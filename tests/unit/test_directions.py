"""Imports go down through the rooms of the overlay, and what has to be light stays light. Read from the source, by globs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import PurePath

import pytest

from tests.conftest import REPOSITORY

#: From top to bottom. "" are the doors; "words" the modules beside them that import no room (settings, vocabulary, …).
ROOMS = ("", "start", "patches", "side_work", "engine", "report", "verdict", "words")
OUTSIDE = ("devtools", "benchmarks", "tests")
Imports = dict[str, set[str]]  #: by module: what it imports, as dotted names


def name_of(path: PurePath) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path.relative_to(REPOSITORY)): path for path in (REPOSITORY / "overlay").rglob("*.py")}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            both = {(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names}
            found |= {name if name in FILES else module for name, module in both}
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything that is in no function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_import(child)


TREES = {name: ast.parse(path.read_bytes()) for name, path in FILES.items()}
ALL: Imports = {name: imported(ast.walk(tree)) for name, tree in TREES.items()}
AT_IMPORT: Imports = {name: imported(at_import(tree)) for name, tree in TREES.items()}
SERVED = sorted(name for name in FILES if name.split(".")[1:2] not in (["cli"], ["__main__"]))


def room_of(module: str) -> str:
    first = module.split(".")[1:2]
    if first and first[0] in ROOMS:
        return first[0]
    ours = {name.split(".")[1] for name in ALL[module] if name.startswith("overlay.")}
    return "" if ours & set(ROOMS) else "words"


def patch_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["patches"] and len(parts) > 3 else None


@pytest.mark.parametrize("module", SERVED)
def test_a_module_imports_downwards_and_a_patch_no_other_patch(module: str) -> None:
    for name in ALL[module]:
        assert name.split(".")[0] not in OUTSIDE and not f"{name}.".startswith("overlay.cli."), name
        if name in FILES and name != "overlay":
            assert ROOMS.index(room_of(module)) <= ROOMS.index(room_of(name)), f"{module} climbs to {name}"
            assert patch_of(name) in (None, patch_of(module)) or patch_of(module) is None, name


def test_there_is_no_circle() -> None:
    ours = {module: {name for name in names if name in FILES} for module, names in ALL.items()}
    TopologicalSorter(ours).prepare()


@pytest.mark.parametrize("module", SERVED)
def test_only_patches_and_side_work_import_torch_or_vllm(module: str) -> None:
    """At import, and with whatever they import in their turn."""
    if room_of(module) == "side_work" or module.endswith(".patch"):
        return
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        assert name.split(".")[0] not in ("torch", "vllm"), f"{module} imports {name}"
        if name not in seen:
            seen.add(name)
            waiting += AT_IMPORT.get(name, ())
