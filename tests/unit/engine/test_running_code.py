"""Is what runs what was read? Ways to put other code under a judged name, and vLLM's own ways that are none."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import pathlib
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("wrapt")

import wrapt

from overlay.engine import running_code
from overlay.report.journal import OwnJournal, PatchRecord
from overlay.settings import Settings
from overlay.side_work import adoption
from overlay.verdict import SourceTree, Verdict
from overlay.vocabulary import APPLY, REFUSED

NAME, HELPERS, LATER = "vllm.judged", "vllm.judged_helpers", "vllm.judged_later"
TEXT = '''
import functools
from vllm.judged_helpers import scale

def register(cls):
    cls.registered = True
    return cls

def once(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)
    return wrapper

def helper(value):
    return [one + 1 for one in (value,)][0]

try:
    import no_such_module_anywhere
except ImportError:
    def optional():
        return "without"
else:
    def optional():
        return "with"

def cached(name):
    return name

def enable_cache():
    global cached
    cached = functools.cache(cached)

def traced(value):
    return value

traced = once(traced)

class Base:
    def inherited(self):
        return 1

    def wrapped_by_us(self):
        return 1

class Twice:
    def first(self):
        return 1

class Twice:
    def second(self):
        return 2

if TYPES := None:
    pass
else:
    class Conditional:
        def method(self):
            return 1

@register
class Layer(Base):
    size: int = 1

    def __init__(self):
        self.value = 1

    def forward(self, value):
        """Twice, and one more."""
        return helper(self.prepare(value) * 2)

    def prepare(self, value):
        return self.__hidden(value)

    def __hidden(self, value):
        return (lambda other: other)(value)

    def __init_subclass__(cls):
        pass

    def __new__(cls):
        return object.__new__(cls)

    @staticmethod
    def plain(value):
        return value

    @property
    def weight(self):
        return self.value

    @once
    def decorated(self):
        return 1
'''
FILES = {
    "vllm.judged": TEXT,
    "vllm.judged_helpers": "def scale(value):\n    return value\n",
    "vllm.judged_later": "class Wrapper:\n    def add(self, output):\n        return output\n",
}
FOUND = Verdict(APPLY, "one after the other", NAME, "Layer", ("forward",))


class Site:
    """A folder with the files that were judged, and what of them is imported."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "site"
        self.tree = SourceTree(self.folder)
        self._monkeypatch = monkeypatch
        for name, text in FILES.items():
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
            self.tree.read(name)
        self.run(HELPERS)

    def path(self, name: str = NAME) -> pathlib.Path:
        return self.folder / (name.replace(".", "/") + ".py")

    def run(self, name: str = NAME, path: pathlib.Path | None = None, loader: Any = None) -> types.ModuleType:
        """Import a module by its file, or from another path or by another loader."""
        spec = importlib.util.spec_from_file_location(name, path or self.path(name), loader=loader)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        self._monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    def judged(self, module: types.ModuleType) -> str | None:
        return running_code.remember("patch", module, FOUND, self.tree.texts)


@pytest.fixture
def site(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(running_code, "_judged", {})
    return Site(tmp_path, monkeypatch)


def changed(text: str) -> str:
    return text.replace("* 2", "* 3")


def theirs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a plugin's module would have it."""
    namespace = {"__name__": "somebody.plugin", "function": function, "functools": functools}
    exec("@functools.wraps(function)\ndef wrapper(*arguments):\n    return function(*arguments)", namespace)
    return namespace["wrapper"]  # type: ignore[return-value]


# ------------------------------------------------------------------------- other code from the start


def a_changed_copy(site: Site) -> types.ModuleType:
    copy = site.folder / "copy.py"
    copy.write_text(changed(TEXT))
    return site.run(path=copy)


def the_same_text_elsewhere(site: Site) -> types.ModuleType:
    copy = site.folder / "copy.py"
    copy.write_text(TEXT)
    return site.run(path=copy)


def a_loader_that_changes_the_text(site: Site) -> types.ModuleType:
    class Loader(importlib.machinery.SourceFileLoader):
        def get_data(self, path: str) -> bytes:
            return changed(super().get_data(path).decode()).encode()

        def cache_from_source(self, path: str) -> None: ...

    return site.run(loader=Loader(NAME, str(site.path())))


def byte_code_only(site: Site) -> types.ModuleType:
    import py_compile

    return site.run(path=pathlib.Path(py_compile.compile(str(site.path()), str(site.path()) + "c", doraise=True)))


def byte_code_older_than_the_file(site: Site) -> types.ModuleType:
    """As in an image that was compiled with hashes that nobody checks, where a file is mounted over the source."""
    import py_compile

    site.path().write_text(changed(TEXT))
    py_compile.compile(str(site.path()), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    site.path().write_text(TEXT)
    return site.run()


def a_file_that_was_changed_after_the_import(site: Site) -> types.ModuleType:
    site.path().write_text(changed(TEXT))
    module = site.run()
    site.path().write_text(TEXT)
    return module


FROM_THE_START = {
    a_changed_copy: "copy.py",
    the_same_text_elsewhere: "copy.py",
    a_loader_that_changes_the_text: "Layer.forward runs code that is not in",
    byte_code_only: "judged.pyc",
    byte_code_older_than_the_file: "Layer.forward runs code that is not in",
    a_file_that_was_changed_after_the_import: "Layer.forward runs code that is not in",
}


@pytest.mark.parametrize("way", FROM_THE_START, ids=lambda way: way.__name__)
def test_other_code_from_the_start_is_refused_by_name(way: Callable[[Site], types.ModuleType], site: Site) -> None:
    found = site.judged(way(site))
    assert found is not None and FROM_THE_START[way] in found


# ------------------------------------------------------------------------- other code before a layer is made


def executed_in_the_namespace(module: Any) -> None:
    exec(compile(changed(TEXT), module.__file__, "exec", dont_inherit=True), vars(module))


def executed_in_the_namespace_unchanged(module: Any) -> None:
    exec(compile(TEXT, "<string>", "exec", dont_inherit=True), vars(module))


def a_class_derived_in_the_namespace(module: Any) -> None:
    text = "class Layer(Layer):\n    def forward(self, value):\n        return value\n"
    exec(compile(text, module.__file__, "exec", dont_inherit=True), vars(module))


def a_method_wrapped(module: Any) -> None:
    module.Layer.forward = theirs(module.Layer.forward)


def a_method_wrapped_by_wrapt(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "Layer.forward", theirs(lambda wrapped, *rest: wrapped(*rest[1])))


def a_helper_method_replaced(module: Any) -> None:
    module.Layer.prepare = theirs(module.Layer.prepare)


def a_hidden_method_replaced(module: Any) -> None:
    module.Layer._Layer__hidden = theirs(module.Layer.prepare)


def a_constructor_replaced(module: Any) -> None:
    module.Layer.__init__ = theirs(module.Layer.__init__)


def a_method_removed(module: Any) -> None:
    del module.Layer.prepare


def a_method_added(module: Any) -> None:
    module.Layer.inherited = theirs(module.Base.inherited)


def a_property_added(module: Any) -> None:
    module.Layer.value = property(theirs(module.helper))


def code_put_into_the_function(module: Any) -> None:
    inspect.unwrap(module.Layer.forward).__code__ = (lambda self, value: value).__code__


def a_helper_function_replaced(module: Any) -> None:
    module.helper = theirs(module.helper)


def the_same_code_in_another_namespace(module: Any) -> None:
    module.helper = types.FunctionType(module.helper.__code__, {**vars(module), "__name__": "somebody.plugin"})


def a_base_class_replaced(module: Any) -> None:
    module.Base = type("Base", (), {"__module__": "somebody.plugin"})


def the_class_replaced(module: Any) -> None:
    module.Layer = type("Layer", (module.Layer,), {"__module__": "somebody.plugin"})


def a_class_of_theirs_derived(module: Any) -> None:
    body = {"__module__": "somebody.plugin", "prepare": theirs(module.Layer.prepare)}
    module.registered = type("Theirs", (type("Between", (module.Layer,), {"__module__": NAME}),), body)


def a_class_of_theirs_that_answers_for_attributes(module: Any) -> None:
    body = {"__module__": "somebody.plugin", "__getattr__": lambda self, name: 1}
    module.registered = type("Theirs", (module.Layer,), body)


def the_module_replaced(module: Any) -> None:
    other = types.ModuleType(module.__name__)
    other.__file__ = module.__file__
    exec(compile(changed(TEXT), module.__file__, "exec", dont_inherit=True), vars(other))
    sys.modules[module.__name__] = other


def another_judged_module_replaced(module: Any) -> None:
    sys.modules[HELPERS].scale = theirs(sys.modules[HELPERS].scale)  # type: ignore[attr-defined]


BEFORE_A_LAYER = {
    executed_in_the_namespace: "Layer.forward runs code that is not in",
    executed_in_the_namespace_unchanged: "it says that it is from <string>",
    a_class_derived_in_the_namespace: "Layer.__init__ is gone",
    a_method_wrapped: "Layer.forward has been replaced by somebody.plugin",
    a_method_wrapped_by_wrapt: "Layer.forward has been replaced by somebody.plugin",
    a_helper_method_replaced: "Layer.prepare has been replaced by somebody.plugin",
    a_hidden_method_replaced: "Layer.__hidden has been replaced by somebody.plugin",
    a_constructor_replaced: "Layer.__init__ has been replaced by somebody.plugin",
    a_method_removed: "Layer.prepare is gone",
    a_method_added: "Layer.inherited has been added by somebody.plugin",
    a_property_added: "Layer.value has been added by somebody.plugin",
    code_put_into_the_function: "Layer.forward runs code that is not in",
    a_helper_function_replaced: "helper has been replaced by somebody.plugin",
    the_same_code_in_another_namespace: "helper has been replaced by somebody.plugin",
    a_base_class_replaced: "Base is somebody.plugin's Base",
    a_class_of_theirs_derived: "somebody.plugin.Theirs is derived from Layer and has prepare of its own",
    a_class_of_theirs_that_answers_for_attributes: "somebody.plugin.Theirs is derived from Layer and has __getattr__",
    the_module_replaced: "Layer.forward runs code that is not in",
    another_judged_module_replaced: "scale has been replaced by somebody.plugin",
}


def install(module: Any) -> None:
    """What patches do to a class: plain functions on top of a method, wrapt's wrappers around others, also inherited ones."""
    original = module.Layer.forward
    namespace = {"__name__": "overlay.patches.any", "original": original, "functools": functools}
    exec("@functools.wraps(original)\ndef forward(self, value):\n    return original(self, value)", namespace)
    module.Layer.forward = namespace["forward"]
    exec("def after(wrapped, self, args, kwargs):\n    return wrapped(*args, **kwargs)", namespace)
    for name in ("__init__", "forward", "wrapped_by_us"):
        wrapt.wrap_function_wrapper(module, f"Layer.{name}", namespace["after"])


@pytest.mark.parametrize("installed", [False, True], ids=["at once", "after our patch"])
@pytest.mark.parametrize("way", BEFORE_A_LAYER, ids=lambda way: way.__name__)
def test_other_code_is_refused_by_name(way: Callable[[Any], None], installed: bool, site: Site) -> None:
    module = site.run()
    if installed:
        assert site.judged(module) is None
        install(module)
        assert running_code.stranger("patch") is None
        way(module)
        found = running_code.stranger("patch")
    else:
        way(module)
        found = site.judged(module)
    assert found is not None and BEFORE_A_LAYER[way] in found
    assert running_code.stranger("patch") == found, "a layer that is made later has another fate"


def test_a_class_that_was_replaced_is_refused_at_once_and_its_patched_predecessor_is_left_to_the_proof_of_effect(
    site: Site,
) -> None:
    module = site.run()
    assert site.judged(module) is None
    the_class_replaced(module)
    assert running_code.stranger("patch") is None
    found = site.judged(module)
    assert found is not None and "Layer is somebody.plugin's Layer" in found


def test_a_package_that_offers_another_class_than_its_module_is_refused(site: Site) -> None:
    site.run()
    package: Any = types.ModuleType("vllm")
    package.Layer = type("Layer", (), {"__module__": NAME})
    found = site.judged(package)
    assert found is not None and "Layer is vllm.judged's Layer" in found


def test_who_takes_it_back_has_been_there_all_the_same(site: Site) -> None:
    """Else some layers of a model would be patched, by the chance of when they are made."""
    module: Any = site.run()
    assert site.judged(module) is None
    original = module.Layer.forward
    a_method_wrapped(module)
    found = running_code.stranger("patch")
    module.Layer.forward = original
    assert found is not None and running_code.stranger("patch") == found


def test_a_module_that_is_imported_later_is_compared_then(site: Site) -> None:
    assert site.judged(site.run()) is None
    site.run(LATER).Wrapper.add = theirs(lambda self, output: output)
    found = running_code.stranger("patch")
    assert found is not None and "Wrapper.add has been replaced by somebody.plugin" in found


# ------------------------------------------------------------------------- what is no stranger


def nothing(module: Any) -> None: ...


def warm_functions(module: Any) -> None:
    """CPython rewrites the byte code of what runs often."""
    for _ in range(200):
        module.Layer().forward(1)


def vllms_own_cache(module: Any) -> None:
    module.enable_cache()


def values_that_are_no_code(module: Any) -> None:
    module.SETTING, module.Layer.size, module.Layer.note = 1, 2, "text"


def a_class_of_theirs_that_changes_no_way(module: Any) -> None:
    module.registered = type(
        "Theirs", (module.Layer,), {"__module__": "somebody.plugin", "__init__": lambda self: None}
    )


def vllms_own_subclass(module: Any) -> None:
    module.registered = type("Other", (module.Layer,), {"__module__": NAME, "prepare": lambda self, value: value})


def a_class_that_has_no_one_definition(module: Any) -> None:
    module.Conditional.method = theirs(module.Conditional.method)


def a_reload(module: Any) -> None:
    module.__spec__.loader.exec_module(module)


def a_method_of_ours_that_says_nothing_of_what_it_is_around(module: Any) -> None:
    namespace = {"__name__": "overlay.patches.any"}
    exec("def prepare(self, value):\n    return value", namespace)
    module.Layer.prepare = namespace["prepare"]


def stock_put_back(module: Any) -> None:
    module.Layer.forward = inspect.unwrap(module.Layer.forward)


@pytest.mark.parametrize("installed", [False, True], ids=["at once", "after our patch"])
@pytest.mark.parametrize(
    "way",
    [
        nothing,
        warm_functions,
        vllms_own_cache,
        values_that_are_no_code,
        a_class_of_theirs_that_changes_no_way,
        vllms_own_subclass,
        a_class_that_has_no_one_definition,
        a_reload,
        a_method_of_ours_that_says_nothing_of_what_it_is_around,
        stock_put_back,
    ],
    ids=lambda way: way.__name__,
)
def test_what_vllm_itself_does_is_no_stranger(way: Callable[[Any], None], installed: bool, site: Site) -> None:
    module = site.run()
    assert site.judged(module) is None
    if installed:
        install(module)
    way(module)
    assert running_code.stranger("patch") is None


def test_a_folder_behind_a_link_is_the_same_folder(site: Site, tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(site.folder)
    assert site.judged(site.run(path=tmp_path / "link" / "vllm" / "judged.py")) is None


def test_a_second_look_at_what_has_not_changed_compares_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer asks, and a model has hundreds."""
    assert site.judged(site.run()) is None
    monkeypatch.setattr(running_code._File, "_compare", lambda *_: pytest.fail("compared again"))
    assert running_code.stranger("patch") is None


def test_a_patch_that_has_not_been_judged_has_no_stranger(site: Site) -> None:
    assert running_code.stranger("patch") is None


# ------------------------------------------------------------------------- any text, any change


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A module's text, and the names of its functions and methods; some nested, some with arguments and constants."""
    names: list[str] = []
    lines: list[str] = []

    def function(name: str, indentation: str, first: str) -> None:
        constant = draw(st.one_of(st.integers(-5, 5), st.floats(0, 1), st.sampled_from(["'a'", "None", "(1, 2.0)"])))
        lines.append(f"{indentation}def {name}({first}value=None):")
        if draw(st.booleans()):
            lines.append(f"{indentation}    inner = lambda other: (other, {constant})")
        lines.append(f"{indentation}    return value, {constant}")

    for index in range(draw(st.integers(1, 3))):
        function(f"f{index}", "", "")
        names.append(f"f{index}")
    lines.append("class Layer:")
    for index in range(draw(st.integers(1, 3))):
        function(f"m{index}", "    ", "self, ")
        names.append(f"Layer.m{index}")
    return "\n".join(lines) + "\n", names


class Changed(ast.NodeTransformer):
    """One constant of one function is another one."""

    def __init__(self, path: list[str], pick: int) -> None:
        self._path, self._pick = path, pick

    def visit(self, node: ast.AST) -> Any:
        if self._path and getattr(node, "name", None) == self._path[0]:
            self._path.pop(0)
            if not self._path:
                body = ast.Module(node.body, [])  # type: ignore[attr-defined]
                constants = [one for one in ast.walk(body) if isinstance(one, ast.Constant)]
                constant = constants[self._pick % len(constants)]
                constant.value = "another"
                return node
        return self.generic_visit(node)


@given(program=programs(), data=st.data())
def test_any_function_whose_code_differs_is_found_and_no_other(
    program: tuple[str, list[str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text, names = program
    target = data.draw(st.sampled_from(names))
    other = Changed(target.split("."), data.draw(st.integers(0, 3))).visit(ast.parse(text))
    path = tmp_path_factory.getbasetemp() / "vllm_any.py"
    path.write_text(text)
    tree = SourceTree(path.parent)
    tree.read("vllm_any")
    verdict = Verdict(APPLY, "", "vllm_any", "Layer", ("m0",))

    def judged(program: Any) -> str | None:
        module = types.ModuleType("vllm_any")
        module.__file__ = str(path)
        sys.modules["vllm_any"] = module
        try:
            exec(compile(program, str(path), "exec", dont_inherit=True), vars(module))
            return running_code.remember("any", module, verdict, tree.texts)
        finally:
            del sys.modules["vllm_any"], running_code._judged["any"]

    assert judged(text) is None
    assert (judged(other) or "").startswith(f"{target} runs code that is not in")


# ------------------------------------------------------------------------- the layer's fate


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnJournal]:
    fresh = OwnJournal()
    monkeypatch.setattr(adoption, "journal", fresh)
    monkeypatch.setattr(adoption.ranks, "reason_for_stock", lambda _: None)
    return fresh


def adopt(record: PatchRecord, name: str, *, strict: bool = False) -> object:
    return adoption.adopt("patch", record, name, lambda: (name, {}), Settings(strict=strict))


def test_a_layer_that_is_made_after_a_method_was_replaced_is_refused(site: Site, journal: OwnJournal) -> None:
    module, record = site.run(), PatchRecord(verdict=APPLY)
    assert site.judged(module) is None
    a_method_wrapped(module)
    assert adopt(record, "layer.0") is None and adopt(record, "layer.1") is None
    reason = "Layer.forward has been replaced by somebody.plugin"
    assert record.refused == {"layer.0": reason, "layer.1": reason} and record.patched == {}
    assert (record.verdict, record.reason) == (REFUSED, reason)
    assert journal.problems == [f"patch: refused, vLLM runs stock here: {reason}"]


@pytest.mark.parametrize("first", ["replaced before", "replaced after"])
def test_strict_stops_at_a_method_that_was_replaced_and_says_so(first: str, site: Site, journal: OwnJournal) -> None:
    module, record = site.run(), PatchRecord(verdict=APPLY)
    assert site.judged(module) is None
    if first == "replaced after":
        assert adopt(record, "layer.0", strict=True) == "layer.0"
    a_method_wrapped(module)
    with pytest.raises(running_code.Replaced, match=r"somebody\.plugin"):
        adopt(record, "layer.1", strict=True)
    reason = "Layer.forward has been replaced by somebody.plugin"
    assert journal.problems == [f"patch: refused, vLLM stops here, as strict asks: {reason}"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_that_cannot_be_taken_stays_stock_and_strict_stops(
    strict: bool, site: Site, journal: OwnJournal
) -> None:
    site.judged(site.run())
    record = PatchRecord(verdict=APPLY)

    def make() -> tuple[None, dict[str, Any]]:
        raise KeyError("heads")

    for name in ("layer.0", "layer.1"):
        with pytest.raises(KeyError, match="heads") if strict else contextlib.nullcontext():
            assert adoption.adopt("patch", record, name, make, Settings(strict=strict)) is None
    assert record.refused == dict.fromkeys(("layer.0", "layer.1"), "KeyError: 'heads'") and record.patched == {}
    said = "vLLM stops here, as strict asks: layer layer.0" if strict else "layer layer.0 stays stock"
    assert journal.problems == [f"patch: {said}: KeyError: 'heads'"]


def test_a_comparison_that_fails_costs_the_patch_and_no_layer(
    site: Site, journal: OwnJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = PatchRecord(verdict=APPLY)
    monkeypatch.setattr(running_code, "stranger", lambda _: 1 / 0)
    assert adopt(record, "layer.0") is None
    assert "cannot tell what runs: ZeroDivisionError" in record.refused["layer.0"] and len(journal.problems) == 1


def test_layers_that_were_patched_before_stay_in_the_record(site: Site, journal: OwnJournal) -> None:
    module, record = site.run(), PatchRecord(verdict=APPLY)
    assert site.judged(module) is None
    assert adopt(record, "layer.0") == "layer.0"
    a_method_wrapped(module)
    assert adopt(record, "layer.1") is None
    assert record.verdict == APPLY and list(record.patched) == ["layer.0"]
    assert "the layers from here on stay stock" in journal.problems[0]


def test_the_text_is_python_that_does_what_it_says(site: Site) -> None:
    """Else the table above would show nothing."""
    module: Any = site.run()
    assert module.Layer().forward(1) == 3 and module.optional() == "without" and module.Layer().decorated() == 1
    assert textwrap.dedent(TEXT) == TEXT
