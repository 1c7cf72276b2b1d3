"""Reading a method with `ast`: the few questions that the verdicts ask."""

from __future__ import annotations

import ast
from collections.abc import Iterator

#: What may be asked of a tensor between two uses of it without changing it.
HARMLESS_ATTRIBUTES = frozenset({"shape", "dtype", "device", "size", "dim", "ndim", "numel", "is_cuda", "stride"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Drift(Exception):
    """The source is not of the known shape. Carries the line and what differs."""

    def __init__(self, node: ast.AST, what: str) -> None:
        super().__init__(what)
        self.line = getattr(node, "lineno", 0)


def find_class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def methods_of(class_node: ast.ClassDef) -> dict[str, Function]:
    return {node.name: node for node in class_node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def attribute_of_self(node: ast.AST, name: str | None = None) -> bool:
    """Whether `node` is ``self.<name>`` (of any name, where none is given)."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and (name is None or node.attr == name)
    )


def uses_of(root: ast.AST, attribute: str) -> list[ast.AST]:
    """Every place in `root` where ``self.<attribute>`` stands."""
    return [node for node in ast.walk(root) if attribute_of_self(node, attribute)]


def paths_to_statements(function: Function) -> Iterator[tuple[list[tuple[ast.stmt, str]], list[ast.stmt]]]:
    """Every statement list of a function that only ``if`` leads to, with the (if, arm) pairs on the way there."""

    def walk(
        block: list[ast.stmt], path: list[tuple[ast.stmt, str]]
    ) -> Iterator[tuple[list[tuple[ast.stmt, str]], list[ast.stmt]]]:
        yield path, block
        for statement in block:
            if isinstance(statement, ast.If):
                yield from walk(statement.body, [*path, (statement, "body")])
                yield from walk(statement.orelse, [*path, (statement, "orelse")])

    yield from walk(function.body, [])


def changes_or_hands_out(statement: ast.stmt, name: str) -> ast.AST | None:
    """The node by which a statement could rebind or change the tensor `name`, or give it to code that could."""
    harmless = {
        id(node.value)
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and node.attr in HARMLESS_ATTRIBUTES
        and isinstance(node.value, ast.Name)
    }
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and node.id == name and id(node) not in harmless:
            return node
        if isinstance(node, (ast.Global, ast.Nonlocal)) and name in node.names:
            return node
    return None
