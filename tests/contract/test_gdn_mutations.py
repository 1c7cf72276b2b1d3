"""The verdict on changes that upstream has not made yet: what it must refuse, and what it must not be upset by.

A verdict that lets one of the drifting changes through would give wrong tokens in a vLLM of next month; one that
refuses a harmless change would switch the patch off for a comment.
"""

from __future__ import annotations

import ast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.patches.registry import judge
from overlay.verdict import Source, Verdict

from . import mutations
from .released import ChangedTree, Method, methods, releases, tree, verdict

pytestmark = pytest.mark.contract

VERSIONS = ("0.19.1", "0.20.2", "0.22.1", "0.26.0", "0.33.0")
PRIMARY = [Method(version, methods(version)[0]) for version in VERSIONS]
METHODS = [*PRIMARY, Method("0.22.1", "forward_hip"), Method("0.33.0", "forward_hip"), Method("0.33.0", "forward_cpu")]

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_primary = pytest.mark.parametrize("method", PRIMARY, ids=str)


def judged(method: Method, source: Source) -> Verdict:
    return judge("gdn", ChangedTree(method.version, method.module, source))


def judged_text(method: Method, text: str) -> Verdict:
    return judged(method, method.replaced(text))


def assert_drifted(method: Method, found: Verdict) -> None:
    """Refused, with a place that a person can open and a reason to read there."""
    assert found.state == "drifted", found
    assert found.methods == ()
    assert found.reason
    assert found.where is not None
    path, _, line = found.where.rpartition(":")
    assert path == method.source.path
    assert int(line) > 0


@each_method
def test_the_method_as_released(method: Method) -> None:
    """The machinery of these tests changes nothing by itself."""
    assert judged_text(method, method.text) == verdict(method.version)


@each_method
@pytest.mark.parametrize("name", mutations.DRIFTING)
def test_drift_in_the_pair(method: Method, name: str) -> None:
    text = mutations.replace_pair(method.text, mutations.DRIFTING[name])
    ast.parse(text)  # a change that is not Python would drift for the wrong reason
    found = judged_text(method, text)
    if mutations.names_a_projection(text) or method in PRIMARY:
        assert_drifted(method, found)
    else:  # a method that is there for other devices and has no projections any more is simply not ours
        assert found.state == "apply"
        assert method.name not in found.methods


@each_method
@pytest.mark.parametrize("name", mutations.DRIFTING_OF_THE_METHOD)
def test_drift_of_the_method(method: Method, name: str) -> None:
    assert_drifted(method, judged_text(method, mutations.DRIFTING_OF_THE_METHOD[name](method.text)))


@each_method
@pytest.mark.parametrize("name", mutations.HARMLESS)
def test_harmless_around_the_pair(method: Method, name: str) -> None:
    found = judged_text(method, mutations.replace_pair(method.text, mutations.HARMLESS[name]))
    assert (found.state, found.methods) == ("apply", verdict(method.version).methods), found


@each_method
@pytest.mark.parametrize("name", mutations.HARMLESS_TO_THE_METHOD)
def test_harmless_to_the_method(method: Method, name: str) -> None:
    found = judged_text(method, mutations.HARMLESS_TO_THE_METHOD[name](method.text))
    assert (found.state, found.methods) == ("apply", verdict(method.version).methods), found


@each_primary
@pytest.mark.parametrize("name", mutations.LANDED)
def test_upstreams_own_overlap(method: Method, name: str) -> None:
    found = judged_text(method, mutations.replace_pair(method.text, mutations.LANDED[name]))
    assert found.state == "landed", found
    assert found.methods == ()


# --------------------------------------------------------------------------------------- outside the method


@each_primary
def test_the_class_renamed(method: Method) -> None:
    class_name = verdict(method.version).class_name
    assert class_name is not None
    text = method.source.text.replace(f"class {class_name}(", f"class {class_name}V2(")
    assert_drifted(method, judged(method, Source(text, method.source.path)))


@each_primary
def test_the_class_wrapped_after_its_definition(method: Method) -> None:
    class_name = verdict(method.version).class_name
    text = f"{method.source.text}\n{class_name} = instrumented({class_name})\n"
    assert_drifted(method, judged(method, Source(text, method.source.path)))


@each_primary
def test_the_method_replaced_after_the_class(method: Method) -> None:
    class_name = verdict(method.version).class_name
    line = f"{class_name}.{method.name} = torch.compiler.disable({class_name}.{method.name})"
    assert_drifted(method, judged(method, Source(f"{method.source.text}\n{line}\n", method.source.path)))


@each_primary
def test_the_class_under_a_condition(method: Method) -> None:
    """Which of several definitions runs cannot be read."""
    class_name = verdict(method.version).class_name
    tree_of_module = method.source.parse()
    for index, node in enumerate(tree_of_module.body):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            condition = ast.parse("torch.cuda.is_available()", mode="eval").body
            tree_of_module.body[index] = ast.If(test=condition, body=[node], orelse=[])
    text = ast.unparse(ast.fix_missing_locations(tree_of_module))
    assert_drifted(method, judged(method, Source(text, method.source.path)))


@each_primary
def test_the_method_renamed(method: Method) -> None:
    assert_drifted(method, judged_text(method, method.text.replace(f"def {method.name}(", "def forward_gpu(", 1)))


@each_primary
def test_the_method_gone(method: Method) -> None:
    assert_drifted(method, judged_text(method, "pass"))


@each_primary
def test_the_class_empty(method: Method) -> None:
    class_name = verdict(method.version).class_name
    assert_drifted(method, judged(method, Source(f"class {class_name}:\n    pass\n", method.source.path)))


@each_primary
def test_another_class_and_method_added(method: Method) -> None:
    """Subclasses, other classes and helpers beside the method are no business of the verdict."""
    class_name = verdict(method.version).class_name
    beside = "def extra(self, states):\n    return self.in_proj_ba(states), self.in_proj_qkvz.weight\n"
    below = f"\n\nclass Another({class_name}):\n    def extra(self, states):\n        return self.in_proj_ba(states)\n"
    changed = method.replaced(f"{method.text}\n{beside}")
    found = judged(method, Source(changed.text + below, changed.path))
    assert (found.state, found.methods) == ("apply", verdict(method.version).methods), found


@pytest.mark.parametrize("version", ["0.19.1", "0.20.2"])
def test_the_branch_for_split_projections_is_known_by_its_test(version: str) -> None:
    """0.19 and 0.20 call `in_proj_ba` a second time under `hasattr(self, "in_proj_qkv")`, and only that excuses it."""
    method = Method(version, methods(version)[0])
    text = method.text.replace('if hasattr(self, "in_proj_qkv"):', "if self.split:")
    assert text != method.text
    assert_drifted(method, judged_text(method, text))


@pytest.mark.parametrize("version", ["0.19.1", "0.20.2"])
def test_without_the_branch_for_split_projections(version: str) -> None:
    """0.21 took that branch away; doing the same to 0.20 is harmless."""
    method = Method(version, methods(version)[0])
    tree_of_method = ast.parse(method.text)
    for node in ast.walk(tree_of_method):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for index, statement in enumerate(body):
                if isinstance(statement, ast.If) and "in_proj_qkv'" in ast.unparse(statement.test):
                    body[index : index + 1] = statement.orelse
    text = ast.unparse(tree_of_method)
    assert "in_proj_z" not in text
    found = judged_text(method, text)
    assert (found.state, found.methods) == ("apply", verdict(version).methods)


# --------------------------------------------------------------------------------------- many changes at once

lines = st.lists(st.sampled_from(mutations.UNRELATED), max_size=3)
text_changes = st.lists(st.sampled_from(list(mutations.HARMLESS_TO_THE_METHOD)), max_size=4)


@st.composite
def harmlessly_changed(draw: st.DrawFn) -> tuple[Method, str]:
    """A method with random harmless changes, one on top of the other."""
    method = draw(st.sampled_from(METHODS))
    text = mutations.surround_pair(method.text, draw(lines), draw(lines), draw(lines), draw(st.booleans()))
    for name in draw(text_changes):
        text = mutations.HARMLESS_TO_THE_METHOD[name](text)
    return method, text


many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@many
@given(harmlessly_changed())
def test_many_harmless_changes(changed: tuple[Method, str]) -> None:
    method, text = changed
    found = judged_text(method, text)
    assert (found.state, found.methods) == ("apply", verdict(method.version).methods), f"{found}\n{text}"


@many
@given(harmlessly_changed(), st.sampled_from(list(mutations.DRIFTING)))
def test_drift_among_harmless_changes(changed: tuple[Method, str], name: str) -> None:
    """A harmless change does not hide one that is not."""
    method, text = changed
    drifted = mutations.replace_pair(text, mutations.DRIFTING[name])
    if not mutations.names_a_projection(drifted) and method not in PRIMARY:
        return  # no longer ours: see test_drift_in_the_pair
    found = judged_text(method, drifted)
    assert found.state == "drifted", f"{found}\n{drifted}"


def test_the_list_is_broad() -> None:
    """The judge's promise is only as good as this list; a shrunk list would pass in silence."""
    assert len(mutations.DRIFTING) + len(mutations.DRIFTING_OF_THE_METHOD) > 90
    assert len(mutations.HARMLESS) + len(mutations.HARMLESS_TO_THE_METHOD) > 40
    assert set(VERSIONS) <= set(releases.SUPPORTED)
    assert all(tree(version).read(verdict(version).module or "") for version in VERSIONS)
