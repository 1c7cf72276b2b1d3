"""What the contract tests share: the releases' sources, what is expected of each, and one method of a class as text."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import pathlib
import textwrap
from typing import Any

import pytest

from overlay.patches.registry import judge
from overlay.verdict import Source, SourceTree, Verdict

releases = pytest.importorskip("devtools.releases", reason="devtools' libraries are not installed")

EXPECTED: dict[str, dict[str, Any]] = json.loads(pathlib.Path(__file__).with_name("expected.json").read_text("utf-8"))
#: Methods of the class that its forward methods give the projections' results.
HELPERS = ("fix_query_key_value_ordering", "split_ba")
SUPPORTED: tuple[str, ...] = releases.SUPPORTED


@functools.cache
def tree(version: str) -> SourceTree:
    """A release's sources. Without them and without a network there is nothing to test; on CI that is a failure."""
    try:
        return SourceTree(releases.sources(version))
    except releases.UnreachableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@functools.cache
def verdict(version: str) -> Verdict:
    return judge("gdn", tree(version))


def methods(version: str) -> list[str]:
    """The methods that are to be patched, from the table: collecting the tests must not need the sources."""
    names: list[str] = EXPECTED[version]["gdn"]["methods"]
    return names


@dataclasses.dataclass(frozen=True)
class Method:
    """One method in the source of its module, and the text that may be put in its place."""

    version: str
    name: str

    def __str__(self) -> str:
        return f"{self.version}-{self.name}"

    @property
    def module(self) -> str:
        found = verdict(self.version).module
        assert found is not None
        return found

    @property
    def source(self) -> Source:
        return _forwards_only(self.version)

    @property
    def text(self) -> str:
        """The method's own text, not indented."""
        node, lines = self._node(), self.source.text.splitlines()
        return textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"

    def replaced(self, text: str) -> Source:
        """The module with `text` in the place of the method."""
        node, lines = self._node(), self.source.text.splitlines()
        lines[node.lineno - 1 : node.end_lineno] = textwrap.indent(text, "    ").splitlines()
        return Source("\n".join(lines) + "\n", self.source.path)

    def _node(self) -> ast.FunctionDef:
        return _method_node(self)


@functools.cache
def _forwards_only(version: str) -> Source:
    """The target module with everything blanked but the class, its forward methods and HELPERS; line numbers stay.

    Reading 2,000 lines a thousand times would take minutes; the verdict on the whole file is test_gdn_verdict's matter.
    """
    found = verdict(version)
    assert found.module is not None
    source = tree(version).read(found.module)
    assert source is not None
    lines = source.text.splitlines()

    def blank(node: ast.stmt) -> None:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        last = node.end_lineno or first
        lines[first - 1 : last] = [""] * (last - first + 1)

    for node in source.parse().body:
        if not (isinstance(node, ast.ClassDef) and node.name == found.class_name):
            blank(node)
            continue
        for item in node.body:
            if not (isinstance(item, ast.FunctionDef) and (item.name.startswith("forward") or item.name in HELPERS)):
                blank(item)
    return Source("\n".join(lines) + "\n", source.path)


@functools.cache
def _method_node(method: Method) -> ast.FunctionDef:
    class_name = verdict(method.version).class_name
    for node in method.source.parse().body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == method.name:
                    return item
    raise LookupError(f"no method {method.name} in {class_name} of vLLM {method.version}")


class ChangedTree(SourceTree):
    """A release with one module changed."""

    def __init__(self, version: str, module: str, source: Source) -> None:
        super().__init__(tree(version).folder)
        self._module = module
        self._source = source

    def read(self, module: str) -> Source | None:
        return self._source if module == self._module else super().read(module)
