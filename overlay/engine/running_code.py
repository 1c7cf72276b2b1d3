"""Is the code that runs the code that was read? A verdict judges the text of files, and other code can run under the same
names.

Symptom: an import hook executes a changed copy of a vLLM module, a tool executes text in a module's namespace, a plugin
replaces a method, or Python uses bytecode that is older than its file. The verdict on the file says ``apply``, and the
patched layer ignores what the other tool changed.

Fix: every module that a verdict has read is compiled again from the text that was read. Its functions and classes have to
be that code, from that file. This is checked at once, and again when a layer is made, because a plugin may come in between
and some of these modules are imported later.

Two things are not checked. A function that has decorators in vLLM's own text is whatever they return; no verdict relies on
such a function. A name that vLLM's own text binds twice, or under a condition, has no single definition.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from inspect import CO_OPTIMIZED
from types import CodeType, FunctionType, ModuleType

from overlay.verdict import Source, Verdict, class_at
from overlay.verdict.questions import binders

#: Methods that give a class attributes that it does not have.
_ATTRIBUTE_HOOKS = frozenset({"__getattr__", "__getattribute__"})
#: Names that Python itself puts into every class.
_PYTHONS_OWN = frozenset({"__dict__", "__weakref__"})

_OURS = "overlay."

Namespace = Mapping[str, object]
#: A namespace, a name in it, its value, the function in that value, and the function's code.
Look = tuple[Namespace, str, object, object, object]

_judged: dict[str, _Judged] = {}


class Replaced(RuntimeError):
    """Strict mode only: other code runs than was judged. Already logged."""


def remember(patch: str, module: ModuleType, found: Verdict, texts: Mapping[str, Source]) -> str | None:
    """Note what a patch's verdict on `module` was read from: `texts`, by module. Returns what `stranger` returns."""
    _judged[patch] = _Judged(module, found, texts)
    return stranger(patch)


def stranger(patch: str) -> str | None:
    """What other code runs in the place of the code that a patch's verdict has read, and whose. None if there is none."""
    judged = _judged.get(patch)
    return judged.stranger() if judged is not None else None


class _Judged:
    """The modules that one verdict was read from, and the classes to intercept."""

    def __init__(self, module: ModuleType, found: Verdict, texts: Mapping[str, Source]) -> None:
        self._module = module
        self._intercepted = found.intercepted()
        self._layers: dict[str, type] = {}
        self._files = {name: _File(name, text) for name, text in texts.items()}
        self._found: str | None = None

    def stranger(self) -> str | None:
        """The first difference that is found. It stays, so that a layer that is made later is treated alike."""
        if self._found is None:
            self._found = next(self._strangers(), None)
        return self._found

    def _strangers(self) -> Iterator[str]:
        for file in self._files.values():
            yield from file.differences()
        for class_name, method in self._intercepted:
            layer = self._layers.get(class_name)
            if layer is None:
                found = class_at(self._module, class_name)
                file_of_class = self._files.get(getattr(found, "__module__", ""))
                if not isinstance(found, type) or file_of_class is None or not file_of_class.holds(found):
                    owner, name = getattr(found, "__module__", None), getattr(found, "__qualname__", found)
                    yield f"{class_name} is {owner}'s {name}"
                    continue
                layer = self._layers[class_name] = found
            file = self._files[layer.__module__]
            yield from file.additions(layer)
            yield from _overridden(layer, class_name, method)


class _File:
    """One module of vLLM: what its file compiles to, and what was there at the last check without a difference."""

    def __init__(self, name: str, source: Source) -> None:
        self._name = name
        self._source = source
        self._lines = source.text.split("\n")
        self._path = os.path.realpath(source.path)
        self._seen: list[Look] = []

    @functools.cached_property
    def _code(self) -> CodeType:
        return compile(self._source.text, self._source.path, "exec", dont_inherit=True)

    def differences(self) -> Iterator[str]:
        """One line for each name that does not run what the file says. Nothing while the module has not been imported."""
        module = sys.modules.get(self._name)
        if module is None or (self._seen and all(map(_is_unchanged, self._seen))):
            return
        file = getattr(module, "__file__", None)
        if not self._is_this_file(file):
            yield f"{self._name} runs from {file}, and the verdict was read from {self._source.path}"
            return
        seen: list[Look] = [(sys.modules, self._name, module, None, None)]
        found = False
        for difference in self._compare(vars(module), self._code, "", seen):
            found = True
            yield difference
        if not found:
            self._seen = seen

    def _compare(self, namespace: Namespace, code: CodeType, prefix: str, seen: list[Look]) -> Iterator[str]:
        """Compare a module's or class's namespace with the code that made it. Adds to `seen` what was compared."""
        for name, definitions in _definitions(code).items():
            key = _mangled(name, prefix)
            label = prefix + name
            seen.append(_look(namespace, key))
            value = namespace.get(key)
            if definitions[0].co_flags & CO_OPTIMIZED:
                if not self._runs(value, definitions) and self._is_settled(label, definitions):
                    yield self._replaced(label, value)
            elif issubclass(type(value), type) and value.__module__ == self._name:
                if len(definitions) == 1:
                    yield from self._compare(vars(value), definitions[0], f"{label}.", seen)
            elif self._is_settled(label, definitions):
                yield f"{label} is {getattr(value, '__module__', None)}'s {getattr(value, '__qualname__', value)}"

    def _runs(self, value: object, definitions: list[CodeType]) -> bool:
        """Whether a value is a function of this module, from this file, with the code of one of the definitions."""
        function = _without_ours(value)
        if _owner_of(function).startswith(_OURS):  # it does not show what it wraps; the first look saw that
            return True
        return (
            type(function) is FunctionType  # isinstance would believe a wrapper
            and function.__globals__ is vars(sys.modules[self._name])
            and function.__code__ in definitions  # code objects are equal by content, except for the file's name
            and self._is_this_file(function.__code__.co_filename)
        )

    def _replaced(self, label: str, value: object) -> str:
        function = _without_ours(value)
        owner = _owner_of(function)
        if function is None:
            return f"{label} is gone"
        if owner != self._name:
            return f"{label} has been replaced by {owner}"
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        return f"{label} runs code that is not in {self._source.path}; it says that it is from {file}"

    def _is_settled(self, label: str, definitions: list[CodeType]) -> bool:
        """Whether the file's text alone decides what a name is: its definitions are undecorated and unconditional, and
        nothing else binds it.
        """
        if any(self._lines[code.co_firstlineno - 1].lstrip().startswith("@") for code in definitions):
            return False
        *classes, name = label.split(".")
        tree = self._source.parse()  # slower than compiling, so only after a difference
        body = tree.body
        for class_name in classes:
            body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name), [])
        bound = binders(body, name)
        bound_by_functions = not classes and any(
            isinstance(node, ast.Global) and name in node.names for node in ast.walk(tree)
        )
        return bool(bound) and all(node in body for node in bound) and not bound_by_functions

    def holds(self, layer: type) -> bool:
        """Whether this module has the class at its top level."""
        return vars(sys.modules[self._name]).get(layer.__qualname__) is layer

    def additions(self, layer: type) -> Iterator[str]:
        """One line for each method of one of this module's classes that is not in the class's text."""
        definition = _definitions(self._code)[layer.__qualname__][-1]
        for name in sorted(set(vars(layer)) - set(definition.co_names) - _PYTHONS_OWN):
            value = vars(layer)[name]
            owner = _owner_of(getattr(value, "fget", None) or getattr(value, "__func__", value))
            if hasattr(type(value), "__get__") and not owner.startswith(_OURS):
                yield f"{layer.__qualname__}.{name} has been added by {owner}"

    def _is_this_file(self, path: object) -> bool:
        return isinstance(path, str) and (path == self._source.path or os.path.realpath(path) == self._path)


def _look(namespace: Namespace, name: str) -> Look:
    value = namespace.get(name)
    function = _without_ours(value)
    return namespace, name, value, function, getattr(function, "__code__", None)


def _is_unchanged(look: Look) -> bool:
    namespace, name, value, function, code = look
    return namespace.get(name) is value and getattr(function, "__code__", None) is code


def _definitions(code: CodeType) -> dict[str, list[CodeType]]:
    """The functions and classes that a module's or class's own code defines, by name."""
    found: dict[str, list[CodeType]] = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and not constant.co_name.startswith("<"):  # lambdas and comprehensions
            found.setdefault(constant.co_name, []).append(constant)
    return found


def _mangled(name: str, prefix: str) -> str:
    """The name under which a class keeps a method. `prefix` is empty, or ends with the class's name and a dot."""
    if not prefix or not name.startswith("__") or name.endswith("__"):
        return name
    return f"_{prefix.split('.')[-2].lstrip('_')}{name}"


def _overridden(layer: type, class_name: str, method: str) -> Iterator[str]:
    """One line for each foreign class that is derived from a layer's class and overrides `method`, or a name that it uses.

    The patches know vLLM's own subclasses.
    """
    code = getattr(_without_ours(vars(layer).get(method)), "__code__", None)
    names = {method, *getattr(code, "co_names", ())} | _ATTRIBUTE_HOOKS
    waiting: list[type] = [layer]
    while waiting:
        known: list[type] = waiting.pop().__subclasses__()
        for derived in known:
            waiting.append(derived)
            own = sorted(names & set(vars(derived)))
            if own and not derived.__module__.startswith("vllm."):
                theirs = f"{derived.__module__}.{derived.__qualname__}"
                yield f"{theirs} is derived from {class_name} and has {', '.join(own)} of its own"


def _without_ours(value: object) -> object:
    """A value without the overlay's own wrappers, and without the staticmethod or classmethod around a function."""
    while True:
        if type(value) in (staticmethod, classmethod):
            value = value.__func__  # type: ignore[attr-defined]
        elif _owner_of(value).startswith(_OURS) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


def _owner_of(function: object) -> str:
    """The module whose code runs when `function` is called. Not `__module__`, because functools.wraps copies that."""
    wrapper = getattr(function, "_self_wrapper", None)  # wrapt's
    if wrapper is not None:
        function = wrapper
    name = getattr(function, "__globals__", {}).get("__name__")
    return str(name or type(function).__module__)
