"""The two patches whose code is known by its fingerprints: any change to it is `drifted`, and a change beside it is not."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator

import pytest

from overlay.patches.deepseek_v4 import verdict as deepseek_v4
from overlay.patches.pooling import verdict as pooling
from overlay.patches.registry import judge
from overlay.verdict import Source, SourceTree
from overlay.verdict.known import fingerprint

from .released import ChangedTree, tree

pytestmark = pytest.mark.contract

KNOWN = {"pooling": pooling.KNOWN, "deepseek_v4": deepseek_v4.KNOWN}
#: The releases that each of the two patches applies to.
VERSIONS = {"pooling": ("0.17.1", "0.18.1", "0.19.0", "0.19.1"), "deepseek_v4": ("0.20.0",)}
#: Where the newest of these releases is changed. What differs between them is the table's matter.
PLACES = [
    (patch, module, path) for patch, known in KNOWN.items() for module, functions in known.items() for path in functions
]


#: Changes the lines of a file at one of its functions.
Change = Callable[[list[str], ast.FunctionDef], None]


@functools.cache
def node_at(text: str, path: str) -> ast.FunctionDef:
    """A function by its path, wherever its class is."""
    class_name, _, name = path.rpartition(".")
    nodes: Iterator[ast.AST] = ast.walk(ast.parse(text))
    if class_name:
        (holder,) = (node for node in nodes if isinstance(node, ast.ClassDef) and node.name == class_name)
        nodes = iter(holder.body)
    (found,) = (node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def with_lines(number: int, *added: str) -> Change:
    """Puts lines above a function's header (0) or its first statement (1), as far in as what they stand above."""

    def change(lines: list[str], node: ast.FunctionDef) -> None:
        below = (node, node.body[0])[number]
        lines[below.lineno - 1 : below.lineno - 1] = [" " * below.col_offset + one for one in added]

    return change


def with_header(old: str, new: str) -> Change:
    def change(lines: list[str], node: ast.FunctionDef) -> None:
        assert lines[node.lineno - 1].count(old) == 1
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, new)

    return change


DRIFTING: dict[str, Change] = {
    "a statement more": with_lines(1, "unrelated = 1"),
    "an early return": with_lines(1, "if __debug__:", "    return None"),
    "decorated": with_lines(0, "@traced"),
    "decorated over three lines": with_lines(0, "@traced(", "    1", ")"),
    "defined twice": with_lines(0, "def NAME(*arguments):", "    pass", ""),
    "asynchronous": with_header("def ", "async def "),
    "renamed": with_header("(", "_all("),
    "not Python": with_lines(1, "if if:"),
}
HARMLESS: dict[str, Change] = {
    "a comment": with_lines(1, "# if self.use_async_scheduling: return"),
    "a comment above": with_lines(0, "# NAME was here"),
    "a blank line": with_lines(1, ""),
    "another definition above": with_lines(0, "def NAME_all(*arguments):", "    pass", ""),
}


def changed(patch: str, module: str, path: str, change: Change) -> ChangedTree:
    version = VERSIONS[patch][-1]
    source = tree(version).read(module)
    assert source is not None
    node, lines = node_at(source.text, path), source.text.splitlines()
    change(lines, node)
    text = "\n".join(lines).replace("NAME", node.name) + "\n"
    return ChangedTree(version, module, Source(text, source.path))


@pytest.mark.parametrize("name", DRIFTING)
@pytest.mark.parametrize(("patch", "module", "path"), PLACES)
def test_what_is_not_as_released_is_drifted(patch: str, module: str, path: str, name: str) -> None:
    found = judge(patch, changed(patch, module, path, DRIFTING[name]))
    assert found.state == "drifted" and found.methods == (), found
    assert ("not readable" in found.reason) == (name == "not Python"), found
    if name != "not Python":
        assert path.rpartition(".")[2] in found.reason
    assert found.where is not None
    where, _, line = found.where.rpartition(":")
    assert where.endswith(module.replace(".", "/") + ".py") and int(line) > 0


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize(("patch", "module", "path"), PLACES)
def test_what_changes_nothing_is_applied(patch: str, module: str, path: str, name: str) -> None:
    assert judge(patch, changed(patch, module, path, HARMLESS[name])).state == "apply"


@pytest.mark.parametrize(("patch", "module"), [(patch, module) for patch, known in KNOWN.items() for module in known])
def test_a_module_that_is_gone_is_drifted(patch: str, module: str) -> None:
    class Without(SourceTree):
        def read(self, name: str) -> Source | None:
            return None if name == module else super().read(name)

    found = judge(patch, Without(tree(VERSIONS[patch][0]).folder))
    assert found.state == "drifted" and module in found.reason


@pytest.mark.parametrize("patch", KNOWN)
def test_every_fingerprint_is_that_of_a_release(patch: str) -> None:
    """One that belongs to no release would let through code that nobody has read."""
    found = set()
    for version in VERSIONS[patch]:
        for module, functions in KNOWN[patch].items():
            source = tree(version).read(module)
            assert source is not None
            found |= {(path, fingerprint(node_at(source.text, path))) for path in functions}
    said = {(path, one) for functions in KNOWN[patch].values() for path, many in functions.items() for one in many}
    assert found == said
