"""The verdict by data flow, against what a run of the code shows: no `apply` may be wrong, and what is harmless applies.

Classes are generated as text, with branches, helpers, aliases, writes and ways out. One runs twice for each way that its
conditions can go: as it is, and as the overlay runs it. There a side may read its input until it is joined, and nobody
may read its result before.
"""

from __future__ import annotations

import collections
import itertools
import re
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.verdict import Source, SourceTree, Verdict, data_flow
from overlay.verdict.data_flow import Pair
from overlay.vocabulary import APPLY, DRIFTED, LANDED

CLASSES = {"vllm.new": "Layer", "vllm.old": "OldLayer"}
PAIR = Pair("main", ("side",), ("forward",), never=("hasattr(self, 'split')",))
#: The same with the side in a child of the layer, which the layer may lack.
PAIR_OF_CHILD = Pair("main", ("child.side",), ("forward",), always=("self.child is not None",))


class Memory(SourceTree):
    """Modules by name."""

    def __init__(self, **modules: str) -> None:
        super().__init__("")
        self._modules = {f"vllm.{name}": text for name, text in modules.items()}

    def has(self, module: str) -> bool:
        return module in self._modules

    def read(self, module: str) -> Source | None:
        return Source(self._modules[module], f"{module}.py") if module in self._modules else None


def judged(text: str, pair: Pair = PAIR) -> Verdict:
    found = data_flow.judge(Memory(new=text), CLASSES, pair, "one after the other")
    assert found is not None
    return found


# ---------------------------------------------------------------- a world in which a run shows what is wrong


class Wrong(AssertionError):
    """The overlay's run does what no kernel forgives."""


class Storage:
    def __init__(self, value: float, ready: bool = True) -> None:
        self.value, self.ready = value, ready


class Tensor:
    """One number in a storage that views share."""

    shape = (1,)

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @property
    def value(self) -> float:
        if not self.storage.ready:
            raise Wrong("a side's result is read before the join")
        return self.storage.value

    def dim(self) -> int:
        return 1

    def view(self, *_: int) -> Tensor:
        return Tensor(self.storage)

    def contiguous(self) -> Tensor:
        return self

    def clone(self) -> Tensor:
        return Tensor(Storage(self.value))

    def __mul__(self, other: float) -> Tensor:
        return Tensor(Storage(self.value * other))

    def mul_(self, other: float) -> Tensor:
        self.storage.value = self.value * other
        return self

    def __iadd__(self, other: float) -> Tensor:
        self.storage.value = self.value + other
        return self

    def __getitem__(self, _: Any) -> Tensor:
        return self.view()

    def __setitem__(self, _: Any, value: float) -> None:
        self.storage.value = self.value * 0 + value


class Left(Exception):
    pass


class Linear:
    def __init__(self, factor: float, ran: list[str], name: str) -> None:
        self._factor, self._ran, self._name = factor, ran, name

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        self._ran.append(self._name)
        return Tensor(Storage(x.value * self._factor + 1)), None


class StandIn:
    """The layer as gdn's stand-in shows it. The side reads its input when it is joined, as late as a stream may."""

    def __init__(self, layer: Any) -> None:
        self.__dict__.update(layer=layer, result=None, given=None, at_start=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def _started(self, x: Tensor) -> Tensor:
        if self.result is None:
            self.__dict__.update(result=Tensor(Storage(0, ready=False)), given=x, at_start=x.value)
        return self.result  # type: ignore[no-any-return]

    def main(self, x: Tensor) -> tuple[Tensor, None]:
        side = self._started(x)
        result = self.layer.main(x)
        if not side.storage.ready:
            if self.given.value != self.at_start:
                raise Wrong("the input is written to while the side reads it")
            side.storage.value, side.storage.ready = self.layer.side(self.given)[0].value, True
        return result  # type: ignore[no-any-return]

    def side(self, x: Tensor) -> tuple[Tensor, None]:
        return self._started(x), None


class Child:
    """A child of the layer, which has the side."""

    def __init__(self, side: Callable[[Tensor], Any]) -> None:
        self.side = side


class StandInWithChild(StandIn):
    """The same for a layer whose side is in a child."""

    def __init__(self, layer: Any) -> None:
        super().__init__(types.SimpleNamespace(main=layer.main, side=layer.child.side, a=layer.a, b=layer.b))
        self.__dict__.update(child=Child(self.side))


def with_stand_in(original: Callable[..., Any]) -> Callable[..., Any]:
    def method(layer: Any, *args: Any) -> Any:
        stand_in = StandInWithChild(layer) if hasattr(layer, "child") else StandIn(layer)
        result = original(stand_in, *args)
        if stand_in.result is not None and not stand_in.result.storage.ready:
            raise Wrong("a side is never joined")
        return result

    return method


class Torch:
    @staticmethod
    def zeros(_: int) -> Tensor:
        return Tensor(Storage(0))


class Scope:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def write(x: Tensor) -> None:
    x.mul_(5)


def seen(text: str, intercepted: tuple[str, ...], conditions: tuple[bool, ...]) -> tuple[Any, ...]:
    """What a run gives, or how it leaves; how often each linear ran; and the value of the input afterwards."""
    names: dict[str, Any] = {"Left": Left, "torch": Torch, "scope": Scope, "write": write}
    exec(compile(text, "generated", "exec"), names)
    layer_class = names["Layer"]
    for name in intercepted:
        setattr(layer_class, name, with_stand_in(vars(layer_class)[name]))
    layer, ran = layer_class(), list[str]()
    layer.main, side, layer.a, layer.b = Linear(3, ran, "main"), Linear(7, ran, "side"), *conditions
    if "self.child" in text:
        layer.child = Child(side)
    else:
        layer.side = side
    x = Tensor(Storage(2))
    try:
        result = [getattr(value, "value", value) for value in layer.forward(x)]
    except Left:
        result = ["left"]
    return result, sorted(ran), x.value


# ---------------------------------------------------------------- classes

NAMES = st.sampled_from(["x", "y", "z"])
CONDITIONS = ("self.a", "self.b")


@st.composite
def anything(draw: st.DrawFn) -> str:
    """A statement, of those that are harmless anywhere and those that are not."""
    one, other = draw(NAMES), draw(NAMES)
    kinds = [
        [f"n = {one}.shape", "n = torch.zeros(3)", f"assert {one}.dim() == 1", f"n = {one}[0]", "n = q.view(-1) * 2"],
        [f"{one} = {other}", f"{one} = {other}", f"{one} = {other}.contiguous()", f"{one} = {other}.view(-1)"],
        [f"{one} = {other} * 2", f"{one} = {other}.clone()", f"{one}, {other} = {other}, {one}", "y = z = x"],
        [f"{one}.mul_(2)", f"{one}[0] = 5", f"{one} += 1", f"write({one})", "change()"],
        ["n = r * 2", "n = r", "r = r.contiguous()", "write(r)"],
        [
            f"if ({one} := {other} * 2) is None: pass",
            f"n = ({one} := {other}.clone())",
            f"for {one} in ({other} * 3,): pass",
        ],
        [f"with scope(): {one} = {other} * 2", f"[({one} := {other} * 2) for _ in range(2)]"],
        ["if self.a: raise Left", "if self.b: return q, r, x, y, z", "return q, r, x, y, z"],
    ]
    return draw(st.sampled_from(draw(st.sampled_from(kinds))))


def indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines] or ["    pass"]


@st.composite
def calls(draw: st.DrawFn, depth: int = 0) -> list[str]:
    """Some of the calls of the two linears, with anything between, on one or several ways."""
    given = draw(NAMES)
    main, side = f"q, _ = self.main({given})", f"r, _ = self.side({draw(st.sampled_from([given, given, given, 'x']))})"
    between = draw(st.lists(anything(), max_size=2))
    form = draw(st.integers(0, 9 if depth < 2 else 4))
    if form < 3:
        return [main, *between, side]
    if form < 5:
        return [side, *between, main]
    test = draw(st.sampled_from(CONDITIONS))
    if form == 5:
        return [f"if {test}:", *indented(draw(calls(depth + 1))), "else:", *indented(draw(calls(depth + 1)))]
    if form == 6:
        return [f"if {test}:", *indented(draw(calls(depth + 1))), *between]
    if form == 7:
        return [main, *between, f"if {test}:", *indented([side]), "else:", *indented([*between, side])]
    if form == 8:
        return [side, f"if {test}:", *indented(between), main]
    return [draw(st.sampled_from([main, side])), *between, *draw(calls(depth + 1))]


@st.composite
def bodies(draw: st.DrawFn, helper: bool) -> list[str]:
    """A method's body: names for the input, anything, the calls or a helper that makes them, anything."""
    before = draw(st.lists(anything(), max_size=2))
    if draw(st.booleans()):
        one, other = draw(NAMES), draw(NAMES)
        before += [f"if {draw(st.sampled_from(CONDITIONS))}: {one} = {other}", f"else: {one} = {draw(NAMES)}"]
    if draw(st.integers(0, 5)) == 0:
        before = ["def change():", "    nonlocal x", "    x = x * 2", *before]
    else:
        before = ["def change(): write(x)", *before]
    made = [f"q, r, *_ = self.project({draw(NAMES)})"] if helper and draw(st.booleans()) else draw(calls())
    after = draw(st.lists(anything(), max_size=2))
    return ["q = r = n = y = x", "z = x * 11", *before, *made, *after, "return q, r, x, y, z"]


@st.composite
def classes(draw: st.DrawFn) -> str:
    forward, project = draw(bodies(helper=True)), draw(bodies(helper=False))
    methods = ["def forward(self, x):", *indented(forward), "def project(self, x):", *indented(project)]
    return "\n".join(["class Layer:", *indented(methods)])


def check_one(text: str, pair: Pair = PAIR) -> str:
    """Compare the verdict on a class with what its runs show; gives the verdict's state."""
    found = judged(text, pair)
    if found.state == APPLY:
        for conditions in itertools.product((True, False), repeat=2):
            stock = seen(text, (), conditions)
            overlaid = seen(text, found.methods, conditions)
            assert stock == overlaid, f"{conditions}\n{text}"
    return found.state


def in_child(text: str) -> str:
    """A class whose side is in a child; results are taken by [0] instead of being unpacked."""
    text = re.sub(r"r, _ = self\.side\((\w)\)", r"r = self.child.side(\1)[0]", text).replace(
        "self.side", "self.child.side"
    )
    return re.sub(r"q, _ = self\.main\((\w)\)", r"q = self.main(\1)[0]", text)


def check_many(examples: int, pair: Pair = PAIR) -> collections.Counter[str]:
    """The states of the verdicts on generated classes. Raises AssertionError where one is wrong."""
    states: collections.Counter[str] = collections.Counter()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(classes())
    def check(text: str) -> None:
        states[check_one(text if pair is PAIR else in_child(text), pair)] += 1

    check()
    return states


@pytest.mark.parametrize("pair", [PAIR, PAIR_OF_CHILD], ids=["a side of the layer", "a side in a child"])
def test_no_apply_is_wrong(pair: Pair) -> None:
    states = check_many(150, pair)
    assert states[APPLY] > 30 and states[DRIFTED] > 30, states


def test_a_wrong_apply_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look at what lies between, the same classes show it."""
    monkeypatch.setattr(data_flow, "_disturbs", lambda *_: None)
    with pytest.raises(AssertionError):
        check_many(150)


def layer(*body: str, project: tuple[str, ...] = ("pass",), change: str = "write(x)") -> str:
    forward = ["q = r = n = y = x", "z = x * 11", f"def change(): {change}", *body, "return q, r, x, y, z"]
    methods = ["def forward(self, x):", *indented(list(forward)), "def project(self, x):", *indented(list(project))]
    return "\n".join(["class Layer:", *indented(methods)])


MAIN, SIDE = "q, _ = self.main(x)", "r, _ = self.side(x)"
#: Where a run shows that the stand-in may not run the code, and why the verdict says so.
WRONG = {
    "a write between": ((MAIN, "x.mul_(2)", SIDE), "may change"),
    "a write through another name": (("y = x", MAIN, "y += 1", SIDE), "may change"),
    "a write through a view": (("y = x.view(-1)", MAIN, "y[0] = 5", SIDE), "may change"),
    "a write by a call": ((MAIN, "write(x)", SIDE), "may change"),
    "a write by a closure": ((MAIN, "change()", SIDE), "may change"),
    "a write under a condition": ((MAIN, "if self.a: x.mul_(2)", SIDE), "may change"),
    "a write while the side runs": ((SIDE, "x.mul_(2)", MAIN), "may change"),
    "another object": ((MAIN, "x = x * 2", SIDE), "another input"),
    "another object under a condition": (("if self.a: y = z", MAIN, "r, _ = self.side(y)"), "another input"),
    "another object under one of two conditions": (
        ("if self.a: y = z", "x = y", "y = z", "if self.b: y = x", "q, _ = self.main(y)", SIDE), "another input",
    ),
    "another object by either of two conditions": (
        ("p = x", "if self.a: y = z", "if self.b: p = z", "q, _ = self.main(y)", "r, _ = self.side(p)"), "another input",
    ),
    "another object in an exchange": ((MAIN, "x, z = z, x", SIDE), "another input"),
    "another object in a condition": (("y = x", "if (x := x * 2) is None: pass", "q, _ = self.main(y)", SIDE), "another input"),
    "another object in an expression": (("y = x", "n = (x := x * 2)", "q, _ = self.main(y)", SIDE), "another input"),
    "another object in a loop": (("y = x", "for x in (z * 2,): pass", "q, _ = self.main(y)", SIDE), "another input"),
    "another object by with": (("y = x", "with scope(): x = z * 2", "q, _ = self.main(y)", SIDE), "another input"),
    "the result of main": ((MAIN, "r, _ = self.side(q)"), "another input"),
    "the side's result used": ((SIDE, "n = r * 2", MAIN), "before main"),
    "the side's result used on one way": ((SIDE, "if self.a:", "    n = r * 2", MAIN), "before main"),
    "the side's result called": ((SIDE, "n = r.clone()", MAIN), "before main"),
    "a side without main on one way": ((SIDE, "if self.a:", f"    {MAIN}"), "leave"),
    "a side without main at the end": (("if self.a:", f"    {SIDE}", "else:", f"    {MAIN}", f"    {SIDE}"), "leave"),
    "a side without main, and a way out": (("if self.a:", f"    {SIDE}", "    return q, r, x, y, z", MAIN, SIDE), "leave"),
    "the pair twice": ((MAIN, SIDE, "x = x * 2", MAIN, SIDE), "twice"),
    "the pair twice on one way": (("if self.a:", f"    {MAIN}", f"    {SIDE}", "x = x * 2", MAIN, SIDE), "twice"),
    "the pair in a loop": (("for _ in range(2):", "    x = x * 2", f"    {MAIN}", f"    {SIDE}"), "plainly"),
    "the side in a lambda": ((MAIN, "x = x * 2", "r = (lambda: self.side(x))()[0]", SIDE), "plainly"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_drifts_would_be_wrong(name: str) -> None:
    body, reason = WRONG[name]
    text = layer(*body)
    found = judged(text)
    assert found.state == DRIFTED and reason in found.reason and found.methods == (), found
    place, _, line = str(found.where).rpartition(":")
    assert place == "vllm.new.py" and 0 < int(line) <= text.count("\n") + 1

    def differs(conditions: tuple[bool, bool]) -> bool:
        try:
            return seen(text, (), conditions) != seen(text, ("forward",), conditions)
        except Wrong:
            return True

    assert any(map(differs, itertools.product((True, False), repeat=2)))


#: What may be done with the child between the calls or elsewhere, and whether the verdict lets it be.
WITH_CHILD = {
    "asked for what it has": ("n = self.child.width", APPLY),
    "compared with None": ("n = self.child is None", APPLY),
    "called": ("n = self.child(x)", DRIFTED),
    "under another name": ("n = self.child", DRIFTED),
    "handed out": ("write(self.child)", DRIFTED),
    "compared with something else": ("n = self.child is not x", DRIFTED),
    "by getattr": ("n = getattr(self, 'child')", DRIFTED),
    "in a list": ("n = [self.child]", DRIFTED),
    "given another side": ("self.child.side = x", DRIFTED),
    "replaced": ("self.child = x", DRIFTED),
    "its side not called": ("n = self.child.side.weight", DRIFTED),
    "its side once more": ("n = self.child.side(x)[0]", DRIFTED),
}
CHILDS_SIDE = "r = self.child.side(x)[0]"


@pytest.mark.parametrize("name", WITH_CHILD)
def test_a_child_with_a_side_is_only_read_from(name: str) -> None:
    statement, state = WITH_CHILD[name]
    for body in ((MAIN, CHILDS_SIDE, statement), (statement, MAIN, CHILDS_SIDE)):
        found = judged(layer(*body), PAIR_OF_CHILD)
        assert found.state == state, (body, found)


def test_a_branch_that_the_layer_always_enters_is_known_by_its_test() -> None:
    """Without the child there is nothing to overlap, and then the stand-in does not run."""
    body = ("q = self.main(x)[0]", "if self.child is not None:", f"    {CHILDS_SIDE}", "else:", "    r = write(x)")
    assert judged(layer(*body), PAIR_OF_CHILD).state == APPLY
    assert check_one(layer(*body), PAIR_OF_CHILD) == APPLY
    for test in ("self.child", "self.a", "self.child is not None and self.a", "not self.child is None"):
        other = layer(body[0], f"if {test}:", *body[2:])
        assert judged(other, PAIR_OF_CHILD).state == DRIFTED, test


@pytest.mark.parametrize("part", ["[0]", "[1]", "[-1]", "[:1]", ".result", ""])
def test_only_the_first_part_of_what_a_linear_gives_may_be_named(part: str) -> None:
    expected = APPLY if part == "[0]" else DRIFTED
    assert judged(layer(f"q = self.main(x){part}", SIDE)).state == expected
    assert judged(layer(MAIN, f"r = self.side(x){part}")).state == expected


def test_upstreams_own_helper_for_parallel_work_is_found_where_it_gets_all_linears() -> None:
    def at(*body: str) -> bool:
        return judged(layer(*body), PAIR_OF_CHILD).state == LANDED

    both = "lambda: self.main(x), lambda: self.child.side(x)"
    assert at(f"q, r = maybe_execute_in_parallel({both}, self.events)")
    assert at(f"q, r = streams.execute_in_parallel({both})")
    assert not at("q, r = execute_in_parallel(lambda: self.main(x), lambda: self.side(x))")
    assert not at(f"q, r = both({both})")


#: What upstream may do at any time: none of it is a reason to step back.
HARMLESS = {
    "as it is": (MAIN, SIDE),
    "the side first": (SIDE, MAIN),
    "work on main's result between": (MAIN, "n = q.view(-1).contiguous() * 2", SIDE),
    "a tensor made between": (SIDE, "n = torch.zeros(3)", MAIN),
    "the input asked between": (MAIN, "n = x.shape[0]", "assert x.dim() == 1 and len(x.shape)", SIDE),
    "the input read into another name between": (MAIN, "n = x * 2", SIDE),
    "the input under another name": ("y = x", MAIN, "r, _ = self.side(y)"),
    "the input under another name between": (MAIN, "y = x", "r, _ = self.side(y)"),
    "the input made by a condition": ("if self.a:", "    x = x.contiguous()", "else:", "    x = z", MAIN, SIDE),
    "two names by one condition": (
        "p = x", "if self.a:", "    p = y = z", "else:", "    p = y = z * 2", "q, _ = self.main(p)", "r, _ = self.side(p)",
    ),
    "a way out for another case before": ("if self.a:", "    return q, r, x, y, z", MAIN, SIDE),
    "both in each of two branches": ("if self.a:", f"    {MAIN}", f"    {SIDE}", "else:", f"    {SIDE}", f"    {MAIN}"),
    "both in one of two branches": ("if self.a:", "    q = r = z", "else:", f"    {SIDE}", f"    {MAIN}"),
    "the side in each of two branches": (MAIN, "if self.a:", f"    {SIDE}", "else:", "    n = q * 2", f"    {SIDE}"),
    "writes around": ("write(x)", MAIN, SIDE, "x.mul_(2)", "write(r)"),
    "a loop elsewhere": ("for n in range(2):", "    write(x)", MAIN, SIDE),
    "the side's result read and written after": (SIDE, MAIN, "r = r.contiguous()", "write(r)"),
    "a branch that no such layer enters": ("if hasattr(self, 'split'):", f"    {SIDE}", "else:", f"    {MAIN}", f"    {SIDE}"),
}  # fmt: skip


@pytest.mark.parametrize("helper", [False, True], ids=["in forward", "in a helper"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_applies_and_is(name: str, helper: bool) -> None:
    body = HARMLESS[name]
    if helper:  # nobody but the helper is intercepted: whoever calls it has the real layer
        project = ("q = r = n = y = x", "z = x * 11", *body, "return q, r, x, y, z")
        text = layer("write(x)", "q, r, x, *_ = self.project(x)", "n = self.project(z)", "write(r)", project=project)
    else:
        text = layer(*body)
    found = judged(text)
    assert (found.state, found.methods) == (APPLY, ("project" if helper else "forward",)), found
    assert check_one(text) == APPLY
    line = text.splitlines()[int(str(found.where).rpartition(":")[2]) - 1]
    assert line.strip().startswith(f"def {found.methods[0]}(")


def of(*methods: str) -> str:
    return "\n".join(["class Layer:", *indented([line for method in methods for line in method.splitlines()])])


def method(*body: str, name: str = "forward", before: str = "") -> str:
    return "\n".join([*([before] if before else []), f"def {name}(self, x):", *indented(list(body))])


PAIR_CALLED = method(MAIN, SIDE, "return q, r", name="project")
#: By what is wrong, a class and the reason.
DRIFTING = {
    "no class": ("class Other: pass", "no class Layer"),
    "two classes": (f"{of(method(MAIN, SIDE))}\n{of(method(MAIN, SIDE))}", "bound again"),
    "changed later": (f"{of(method(MAIN, SIDE))}\nLayer.forward = None", "changed"),
    "no entry": (of(PAIR_CALLED), "none of the methods forward"),
    "a helper that nobody calls": (of(PAIR_CALLED, method("return x")), "leads to no method"),
    "a helper for one of them": (
        of(method("return self.q(x), self.r(x)"), method(MAIN, "return q", name="q"), method(SIDE, "return r", name="r")),
        "leads to no method",
    ),
    "a helper for one of them, the other outside": (
        of(method(MAIN, "return q, self.r(x)"), method(SIDE, "return r", name="r")), "does not call side",
    ),
    "a helper of another class": (of(method("return self.inner.project(x)"), PAIR_CALLED), "leads to no method"),
    "a decorated helper": (of(method("return self.project(x)"), f"@other\n{PAIR_CALLED}"), "not one plain"),
    "a helper that is a class method": (of(method("return self.project(x)"), f"@classmethod\n{PAIR_CALLED}"), "not one plain"),
    "a helper with two definitions": (
        of(method("return self.project(x)"), "if True:\n    def project(self, x): return x", PAIR_CALLED), "not one plain",
    ),
    "a helper that keeps itself": (
        of(method("return self.project(x)"), method("keep(self)", MAIN, SIDE, name="project")), "hands out self",
    ),
    "a helper that writes to the layer": (
        of(method("return self.project(x)"), method(MAIN, SIDE, "self.last = q", name="project")), "stores to it",
    ),
    "a helper that may write between": (
        of(method("return self.project(x)"), method(MAIN, "self.norm(x)", SIDE, name="project")), "may change",
    ),
    "an input that others may exchange": (
        of(method("def other():", "    nonlocal x", "    x = 1", "y = x", "other()", "q, _ = self.main(y)", SIDE)),
        "not the method's own",
    ),
    "an input of the module": (of(method("q, _ = self.main(states)", "r, _ = self.side(states)")), "not the method's own"),
    "no Python": ("class Layer:\n    def (", "not readable as Python"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRIFTING)
def test_drift_of_a_class(name: str) -> None:
    text, reason = DRIFTING[name]
    found = judged(text)
    assert (found.state, found.methods) == (DRIFTED, ()) and reason in found.reason, found


def test_a_module_of_the_layer_may_not_be_converted_between() -> None:
    """`float` of a tensor makes another one; `float` of a module writes to its parameters."""
    for owner, state in ("q", APPLY), ("self.norm", DRIFTED), ("norm", DRIFTED):
        assert judged(layer(MAIN, f"n = {owner}.float()", SIDE)).state == state
    assert judged(layer(MAIN, "n = torch.zeros(3, out=x)", SIDE)).state == DRIFTED
    assert judged(layer("len = write", MAIN, "len(x)", SIDE)).state == DRIFTED


def test_an_entry_that_does_not_name_the_pair_may_be_anything() -> None:
    more = Pair("main", ("side",), ("forward", "forward_other"))
    other = method("return x", name="forward_other", before="@other")
    assert judged(of(method(MAIN, SIDE), other), more).methods == ("forward",)
    twice = judged(of(method(MAIN, SIDE), other, other), more)
    assert "forward_other has not one plain definition" in twice.reason


def test_the_first_module_that_is_there_is_judged() -> None:
    old = of(method(MAIN, SIDE)).replace("Layer", "OldLayer")
    found = data_flow.judge(Memory(old=old), CLASSES, PAIR, "why")
    assert found and (found.state, found.reason, found.module, found.class_name) == (
        APPLY,
        "why",
        "vllm.old",
        "OldLayer",
    )
    assert data_flow.judge(Memory(), CLASSES, PAIR, "why") is None
    both = data_flow.judge(Memory(old=old, new="class Layer: pass"), CLASSES, PAIR, "why")
    assert both and both.module == "vllm.new"


def test_each_of_several_sides_is_called_once_on_the_input() -> None:
    two = Pair("main", ("side", "other"), ("forward",))
    other = "n, _ = self.other(x)"
    for order in itertools.permutations((MAIN, SIDE, other)):
        assert judged(layer(*order), two).state == APPLY
    for body in (
        (MAIN, SIDE),
        (MAIN, SIDE, other, SIDE),
        (MAIN, SIDE, "write(x)", other),
        (SIDE, "y = r * 2", MAIN, other),
    ):
        assert judged(layer(*body), two).state == DRIFTED


def test_what_upstream_does_itself_is_seen_in_helpers_too() -> None:
    text = of(method("return self.project(x)"), method("return torch.ops.both_at_once(x)", name="project"))
    found = judged(text, replace(PAIR, upstream_op="both_at_once"))
    assert (found.state, found.where) == (LANDED, "vllm.new.py:5")
    assert found.reason == "upstream overlaps main and side in project"
    assert judged(text).state == DRIFTED
