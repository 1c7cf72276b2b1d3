"""May the sides of a `Pair` run beside its main? Follows their input through the methods of a class.

The method that makes all the calls is intercepted. It runs with a stand-in for `self`, which starts the side at the first of
the calls and joins when main returns. Whoever calls this method has the real layer, so a helper method needs nothing more.

The result is upstream's if, on every way through the method:

- main and each side are called once, or none of them is;
- they are given one object. It is followed through other names and through branches;
- between the first and the last call nothing writes to anything, calls what might write or break the segment of a CUDA
  graph, or leaves the method. A tensor may have more names, so what is not known to be harmless counts;
- nothing reads the result of a side that has been started and not joined;
- nothing but the calls can reach a linear that belongs to a child of the layer: the child is not handed out.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from overlay.verdict.model import SourceTree, Verdict
from overlay.verdict.questions import (
    HARMLESS_ATTRIBUTES,
    QUIET,
    Drift,
    Function,
    attribute_of_self,
    binders,
    check_self,
    drifted,
    methods_of,
    plain_class,
    plain_function,
    uses_of,
)
from overlay.vocabulary import APPLY, LANDED

#: Methods of a tensor that give another tensor and write nothing.
READING = frozenset({
    "chunk", "clone", "contiguous", "expand", "flatten", "float", "narrow", "permute", "reshape", "split", "squeeze", "t",
    "to", "transpose", "unbind", "unflatten", "unsqueeze", "view",
})  # fmt: skip
#: What torch makes new tensors with.
MAKING = frozenset({"empty", "empty_like", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like"})
ASKING = frozenset({"hasattr", "isinstance", "len"})


@dataclass(frozen=True)
class Pair:
    """Linears of a layer that read one input: attributes of it (``linear``) or of a child (``child.linear``).

    A call is ``result, bias = self.<linear>(<input>)`` or ``result = self.<linear>(<input>)[0]``.
    """

    main: str
    sides: tuple[str, ...]
    #: The methods that run the layer, those of them that are there. The first one has to lead to the calls.
    entries: tuple[str, ...]
    #: Tests, as source text, of branches that a layer with this pair never enters, and of those that it always enters.
    #: What they ask has to be true whenever the stand-in runs.
    never: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    #: An op of upstream's own that does what the patch does, if there has been one.
    upstream_op: str = ""

    @property
    def all(self) -> tuple[str, ...]:
        return (self.main, *self.sides)

    @property
    def names(self) -> frozenset[str]:
        """The linears' own names, without the children that they belong to."""
        return frozenset(path.rpartition(".")[2] for path in self.all)

    @property
    def children(self) -> frozenset[str]:
        """The children that linears belong to."""
        return frozenset(path.rpartition(".")[0] for path in self.all) - {""}


def judge(
    tree: SourceTree,
    classes: Mapping[str, str],
    pair: Pair,
    reason: str,
) -> Verdict | None:
    """The verdict on the first of `classes` (class name by module) that this vLLM has a module of; None without any.

    `reason` is said where the patch applies.
    """
    found = next(((module, source) for module in classes if (source := tree.read(module))), None)
    if found is None:
        return None
    module, source = found
    class_name = classes[module]
    try:
        class_node = plain_class(source.parse(), class_name)
        methods = methods_of(class_node)
        reached = _reached(pair.entries, methods)
        if not reached:
            raise Drift(class_node, f"{class_name} has none of the methods {', '.join(pair.entries)}")
        for method in reached.values():
            at = _landed(method, pair)
            if at is not None:
                said = f"upstream overlaps {' and '.join(pair.all)} in {method.name}"
                return Verdict(LANDED, said, module, class_name, where=f"{source.path}:{at.lineno}")
        intercepted = [method for method in reached.values() if _concerns(method, pair)]
        for name in pair.entries:
            for binder in binders(class_node.body, name):
                if binder is not methods.get(name):
                    raise Drift(binder, f"{name} has not one plain definition")
        for method in intercepted:
            _Ways(plain_function(class_node.body, method.name), pair).check()
        first = next(iter(reached.values()))
        if not any(method in intercepted for method in _reached((first.name,), methods).values()):
            raise Drift(first, f"{first.name} leads to no method that calls {' and '.join(pair.all)}")
    except (Drift, SyntaxError) as error:
        return drifted(error, source.path, module, class_name)
    where = f"{source.path}:{intercepted[0].lineno}"
    return Verdict(APPLY, reason, module, class_name, tuple(method.name for method in intercepted), where=where)


def _reached(entries: Iterable[str], methods: Mapping[str, Function]) -> dict[str, Function]:
    """The entries that are there, and all methods that they name, by name."""
    found: dict[str, Function] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop(0)
        if name in methods and name not in found:
            found[name] = methods[name]
            waiting += [node.attr for node in ast.walk(methods[name]) if attribute_of_self(node)]  # type: ignore[attr-defined]
    return found


def _concerns(method: Function, pair: Pair) -> bool:
    """Whether a method is to be intercepted: an entry that names one of the linears, or a helper that calls them all."""
    if method.name in pair.entries:
        return any(getattr(node, "attr", None) in pair.names for node in ast.walk(method))
    called = {getattr(node.func, "attr", None) for node in ast.walk(method) if isinstance(node, ast.Call)}
    return called.issuperset(pair.names)


def _landed(method: Function, pair: Pair) -> ast.expr | None:
    """Where a method overlaps the linears itself: by upstream's op, or by its `execute_in_parallel` (or one with a longer name)."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and pair.upstream_op and node.attr == pair.upstream_op:
            return node
        if isinstance(node, ast.Call) and _runs_in_parallel(node, pair):
            return node
    return None


def _runs_in_parallel(call: ast.Call, pair: Pair) -> bool:
    given = (any(uses_of(argument, linear) for argument in call.args) for linear in pair.all)
    return ast.unparse(call.func).endswith("execute_in_parallel") and all(given)


@dataclass(frozen=True)
class _Calls:
    """Which of the linears have been called on a way through a method."""

    called: frozenset[str] = frozenset()
    given: int = 0  #: the number of the input
    unfinished: frozenset[str] = frozenset()  #: names of results that may not be read yet


@dataclass(frozen=True)
class _State:
    """A place in a method: the object that each name stands for, as a number, and the calls on every way to it."""

    names: Mapping[str, int]
    calls: frozenset[_Calls]


class _Ways:
    """All ways through a method."""

    def __init__(self, method: Function, pair: Pair) -> None:
        self._method = method
        self._pair = pair
        self._number = itertools.count().__next__
        nodes = list(ast.walk(method))
        #: Names that other code can give to something else at any time.
        self._shared = {name for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}

    def check(self) -> None:
        """Raise Drift unless the stand-in may run the method."""
        method = self._method
        asked = [node.args[0] for node in ast.walk(method) if self._asks_for_another(node)]  # type: ignore[attr-defined]
        check_self(method, excused=asked)
        self._check_children()
        for attribute in self._pair.all:
            if not any(
                isinstance(node, ast.Call) and attribute_of_self(node.func, attribute) for node in ast.walk(method)
            ):
                raise Drift(method, f"{method.name} does not call {attribute}")
        names = [node.arg for node in ast.walk(method.args) if isinstance(node, ast.arg)]
        end = self._block(method.body, _State({name: self._number() for name in names}, frozenset({_Calls()})))
        if end is not None and self._begun(end):
            raise Drift(method, f"{method.name} may end before it has called {' and '.join(self._pair.all)}")

    def _asks_for_another(self, node: ast.AST) -> bool:
        """``hasattr(self, "…")``, or ``getattr(self, "…")`` of anything but these linears and their children."""
        if not isinstance(node, ast.Call) or len(node.args) < 2:
            return False
        function, attribute = getattr(node.func, "id", ""), getattr(node.args[1], "value", None)
        ours = {path.partition(".")[0] for path in self._pair.all}
        known = isinstance(attribute, str) and (function == "hasattr" or attribute not in ours)
        return known and function in ("hasattr", "getattr")

    def _check_children(self) -> None:
        """Raise Drift unless the children with linears are only read from, or compared with None: stand-ins take their places."""
        fine = set()
        for node in ast.walk(self._method):
            match node:
                case (
                    ast.Attribute(value=asked, ctx=ast.Load())
                    | ast.Compare(left=asked, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)])
                ):
                    fine.add(id(asked))
        for child in self._pair.children:
            for use in uses_of(self._method, child):
                if id(use) not in fine:
                    raise Drift(use, f"{self._method.name} hands out {child}, or stores to it")

    def _begun(self, state: _State) -> list[_Calls]:
        """The ways on which some of the linears have been called, and others have not."""
        return [calls for calls in state.calls if 0 < len(calls.called) < len(self._pair.all)]

    def _block(self, block: list[ast.stmt], state: _State | None) -> _State | None:
        """The state behind a block; None where nothing goes on."""
        for statement in block:
            state = self._statement(statement, state) if state is not None else None
        return state

    def _statement(self, statement: ast.stmt, state: _State) -> _State | None:
        if isinstance(statement, ast.If):
            self._check_other(statement.test, state)
            state = self._bind(statement.test, state)
            test = ast.unparse(statement.test)
            return self._either(
                None if test in self._pair.never else self._block(statement.body, state),
                None if test in self._pair.always else self._block(statement.orelse, state),
            )
        call = self._call(statement)
        if call is not None:
            state = self._after(*call, statement, state)
        else:
            self._check_other(statement, state)
            if isinstance(statement, (ast.Return, ast.Raise)):
                return None
        return self._bind(statement, state)

    def _bind(self, node: ast.AST, state: _State) -> _State:
        """The state behind code that gives names to objects: one that is known, where a name gets the object of another."""
        names = {name: self._number() for name in _bound(node)}
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name() as value):
                given = self._given(value, state)
                names[name] = names[name] if given is None else given
        return replace(state, names={**state.names, **names})

    def _either(self, one: _State | None, other: _State | None) -> _State | None:
        """The state where two ways meet."""
        if one is None or other is None:
            return one or other
        # Names that were the same object on either way still are; two `if` may go different ways.
        merged: dict[tuple[int | None, int | None], int] = {}
        names = {}
        for name in one.names.keys() | other.names.keys():
            number, another = one.names.get(name), other.names.get(name)
            if number is None or number != another:
                number = merged.setdefault((number, another), self._number())
            names[name] = number
        return _State(names, one.calls | other.calls)

    def _given(self, value: ast.Name, state: _State) -> int | None:
        """The number of what a name stands for; None for a name that is not the method's alone."""
        return None if value.id in self._shared else state.names.get(value.id)

    def _call(self, statement: ast.stmt) -> tuple[ast.Call, str] | None:
        """The call of a linear and which one, where the statement unpacks the result into two names, or names its first part."""
        match statement:
            case (
                ast.Assign(targets=[ast.Tuple(elts=[ast.Name(), ast.Name()])], value=ast.Call() as call)
                | ast.Assign(
                    targets=[ast.Name()], value=ast.Subscript(value=ast.Call() as call, slice=ast.Constant(value=0))
                )
            ):
                linear = next((path for path in self._pair.all if attribute_of_self(call.func, path)), None)
                if (
                    linear is not None
                    and len(call.args) == 1
                    and isinstance(call.args[0], ast.Name)
                    and not call.keywords
                ):
                    return call, linear
        return None

    def _after(self, call: ast.Call, attribute: str, statement: ast.stmt, state: _State) -> _State:
        """The state behind the call of one of the linears."""
        given = self._given(call.args[0], state)  # type: ignore[arg-type]
        if given is None:
            raise Drift(call, f"{attribute} is given something that is not the method's own")
        after = set()
        for calls in state.calls:
            if attribute in calls.called:
                raise Drift(call, f"{self._method.name} may call {attribute} twice")
            if calls.called and given != calls.given:
                raise Drift(call, f"{attribute} is given another input than {' and '.join(sorted(calls.called))}")
            called = calls.called | {attribute}
            unfinished = calls.unfinished | _bound(statement) if self._pair.main not in called else frozenset()
            after.add(_Calls(called, given, unfinished))
        return replace(state, calls=frozenset(after))

    def _check_other(self, node: ast.AST, state: _State) -> None:
        """Raise Drift where code that is none of the calls does something that it may not do here."""
        name = self._method.name
        for attribute in self._pair.all:
            for use in uses_of(node, attribute):
                what = f"{name} does not call {attribute} plainly: on a name, for two names or with [0], under nothing but if"
                raise Drift(use, what)
        begun = self._begun(state)
        if not begun:
            return
        disturbing = _disturbs(node, state.names)
        if disturbing is not None:
            raise Drift(disturbing, f"{name} may change the input or leave between {' and '.join(self._pair.all)}")
        unfinished = frozenset().union(*(calls.unfinished for calls in begun))
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in unfinished:
                raise Drift(part, f"{name} uses {part.id}, a result of a side, before {self._pair.main}")


def _disturbs(root: ast.AST, names: Mapping[str, int]) -> ast.AST | None:
    """The node by which code could write to something, run what nobody has read, or leave the method."""
    for node in ast.walk(root):
        if not isinstance(node, QUIET):
            return node
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            return node
        if isinstance(node, ast.Call) and not _is_harmless(node, names):
            return node
    return None


def _is_harmless(call: ast.Call, names: Mapping[str, int]) -> bool:
    """Whether a call is known to write nothing. `names` are the method's own, which no builtin or module has."""
    if isinstance(call.func, ast.Name):
        return call.func.id in ASKING and call.func.id not in names
    if not isinstance(call.func, ast.Attribute) or any(keyword.arg in (None, "out") for keyword in call.keywords):
        return False
    owner, attribute = call.func.value, call.func.attr
    if attribute in HARMLESS_ATTRIBUTES:
        return True
    if isinstance(owner, ast.Name) and owner.id == "torch" and "torch" not in names:
        return attribute in MAKING
    # A module's methods of these names write to it, so the owner has to be a local result, or made of one.
    while isinstance(owner, (ast.Attribute, ast.Subscript, ast.Call)):
        owner = owner.func if isinstance(owner, ast.Call) else owner.value
    return attribute in READING and isinstance(owner, ast.Name) and owner.id != "self" and owner.id in names


def _bound(root: ast.AST) -> frozenset[str]:
    """Every name that code may bind or delete."""
    found = set()
    for node in ast.walk(root):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        for name in (getattr(node, field, None) for field in ("name", "asname", "rest")):  # of imports, patterns, …
            if isinstance(name, str):
                found.add(name.partition(".")[0])
    return frozenset(found)
