"""Reading a method with `ast`: the few questions that the verdicts ask."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from overlay.verdict.model import Verdict
from overlay.vocabulary import DRIFTED

#: What may be asked of a tensor between two uses of it without changing it.
HARMLESS_ATTRIBUTES = frozenset({"shape", "dtype", "device", "size", "dim", "ndim", "numel", "is_cuda", "stride"})

#: What code may consist of that changes no tensor; who asks looks closer at calls and at what is assigned to.
QUIET = (
    ast.Assign, ast.AnnAssign, ast.Assert, ast.Expr, ast.If, ast.Pass,
    ast.Attribute, ast.BinOp, ast.BoolOp, ast.Call, ast.Compare, ast.Constant, ast.IfExp, ast.List, ast.Name, ast.Slice,
    ast.Subscript, ast.Tuple, ast.UnaryOp,
    ast.boolop, ast.cmpop, ast.expr_context, ast.keyword, ast.operator, ast.unaryop,
)  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Drift(Exception):
    """The source is not of the known shape. Carries the line and what differs."""

    def __init__(self, node: ast.AST, what: str) -> None:
        super().__init__(what)
        self.line = getattr(node, "lineno", 0)


def drifted(error: Drift | SyntaxError, path: str, module: str, class_name: str | None = None) -> Verdict:
    """The verdict on a source that is not of the known shape, or no Python at all. `path` is the file of the error."""
    if isinstance(error, SyntaxError):
        reason, line = f"not readable as Python: {error.msg}", error.lineno
    else:
        reason, line = str(error), error.line or 1
    return Verdict(DRIFTED, reason, module, class_name, where=f"{path}:{line}")


def check_self(method: Function, excused: Iterable[ast.AST] = ()) -> None:
    """Raise Drift unless `self` is only read from in a method: a stand-in takes its place. `excused` are nodes that may do more."""
    fine = {id(node.value) for node in ast.walk(method) if attribute_of_self(node) and isinstance(node.ctx, ast.Load)}  # type: ignore[attr-defined]
    fine |= set(map(id, excused))
    for node in ast.walk(method):
        if isinstance(node, ast.Name) and node.id == "self" and id(node) not in fine:
            raise Drift(node, f"{method.name} hands out self, or stores to it")
        if isinstance(node, ast.Name) and node.id in ("super", "__class__"):
            raise Drift(node, f"{method.name} uses {node.id}")


def find_class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def methods_of(class_node: ast.ClassDef) -> dict[str, Function]:
    return {node.name: node for node in class_node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def attribute_of_self(node: ast.AST, path: str | None = None) -> bool:
    """Whether `node` is ``self.<path>``, such as ``linear`` or ``child.linear`` (any one name, where none is given)."""
    holder, _, name = (path or "").rpartition(".")
    if not isinstance(node, ast.Attribute) or (path is not None and node.attr != name):
        return False
    if holder:
        return attribute_of_self(node.value, holder)
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def uses_of(root: ast.AST, path: str) -> list[ast.AST]:
    """Every place in `root` where ``self.<path>`` stands."""
    return [node for node in ast.walk(root) if attribute_of_self(node, path)]


def binders(block: list[ast.stmt], name: str) -> list[ast.AST]:
    """Every node of a module's or a class's own code that binds `name`: a definition, an assignment, an import."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(block)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name):
            if node.id == name and not isinstance(node.ctx, ast.Load):
                found.append(node)
        elif name in (getattr(node, "name", None), getattr(node, "asname", None), getattr(node, "rest", None)):
            found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def written_to_class(tree: ast.Module, class_name: str) -> ast.AST | None:
    """The place where a module's own code sets an attribute of a class after its definition."""
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for node in ast.walk(statement):
            owner: ast.AST | None = None
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                owner = node.value
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and node.args:
                owner = node.args[0]
            if isinstance(owner, ast.Name) and owner.id == class_name:
                return node
    return None


def plain_class(module: ast.Module, name: str) -> ast.ClassDef:
    """A class that is defined once, at the top level, and not changed afterwards. Raises Drift."""
    found = find_class(module, name)
    if found is None:
        raise Drift(ast.Pass(), f"there is no class {name} at the top level")
    others = [binder for binder in binders(module.body, name) if binder is not found]
    changed = next(iter(others), None) or written_to_class(module, name)
    if changed is not None:
        raise Drift(changed, f"{name} is changed or bound again, beside its definition")
    return found


def plain_function(block: list[ast.stmt], name: str) -> ast.FunctionDef:
    """A function that a module's or a class's own code defines once, without decorators, and binds to nothing else."""
    found = binders(block, name)
    if len(found) == 1 and isinstance(found[0], ast.FunctionDef) and not found[0].decorator_list and found[0] in block:
        return found[0]
    raise Drift(found[-1] if found else ast.Pass(), f"{name} has not one plain definition")
