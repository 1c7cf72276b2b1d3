"""Is what runs what was read, on the text of every release: upstream's own functions are recognised, others are named.

A release's module cannot be imported here (another torch, no GPU). So its functions are made from its file, without what
is evaluated when they are defined: decorators, base classes, defaults, annotations. None of that is in their code.
"""

from __future__ import annotations

import ast
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from overlay.engine import running_code
from overlay.patches.registry import TARGET_MODULES, judge
from overlay.verdict import Source, SourceTree
from overlay.vocabulary import APPLY
from tests.conftest import REPOSITORY
from tests.contract import released

pytestmark = pytest.mark.contract

#: What the verdicts rely on beside the intercepted methods: (end of the module's name, name in it), where a release has it.
RELIED_ON = {
    "gdn": (("linear_attn", "QwenGatedDeltaNetAttention.split_ba"), ("linear_attn", "GatedDeltaNetAttention.__init__")),
    "deepseek_v4": (
        ("attention", "deepseek_v4_attention"),
        ("attention", "DeepseekV4Indexer.forward"),
        ("compressor", "DeepseekCompressor.forward"),
        ("multi_stream_utils", "maybe_execute_in_parallel"),
    ),
    "dsa": (
        ("attention", "DeepseekV32Attention.__init__"),
        ("attention", "DeepseekV32Indexer.__init__"),
    ),
    "lora_linear": (
        ("layers.base", "BaseLayerWithLoRA.set_mapping"),
        ("base_linear", "BaseLinearLayerWithLoRA._apply_sync"),
        ("punica_gpu", "PunicaWrapperGPU.add_lora_linear"),
        ("column_parallel_linear", "_mcp_apply"),
    ),
    "pooling": (
        ("gpu_model_runner", "_copy_pooler_output_to_cpu"),
        ("gpu_model_runner", "AsyncGPUPoolingModelRunnerOutput.get_output"),
        ("uniproc_executor", "UniProcExecutor.collective_rpc"),
    ),
}


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from outside_functions(child)


class Bare(ast.NodeTransformer):
    """Definitions alone, at the top level of a module and of its classes."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        imports = [one for one in outside_functions(node) if isinstance(one, (ast.Import, ast.ImportFrom))]
        future = [one for one in imports if getattr(one, "module", "") == "__future__"]
        # Never run, but there: the compiler makes other code for what is called on an imported name.
        never = ast.If(ast.Constant(False), [one for one in imports if one not in future] or [ast.Pass()], [])
        node.body = [*future, never, *self._definitions(node.body)]
        return ast.fix_missing_locations(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.bases, node.keywords, node.decorator_list = [], [], []
        node.body = self._definitions(node.body) or [ast.copy_location(ast.Pass(), node)]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Any:
        given, node.decorator_list, node.returns = node.args, [], None
        none = ast.copy_location(ast.Constant(None), node)
        given.defaults = [none for _ in given.defaults]
        given.kw_defaults = [default and none for default in given.kw_defaults]
        for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if argument is not None:
                argument.annotation = None
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def _definitions(self, body: list[ast.stmt]) -> list[Any]:
        kept = [one for one in body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        return [self.visit(one) for one in kept]


def run(name: str, source: Source) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__ = source.path
    exec(compile(Bare().visit(source.parse()), source.path, "exec", dont_inherit=True), vars(module))
    return module


class Running:
    """The modules that a verdict was read from, as they would run."""

    def __init__(self, version: str, patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tree = SourceTree(released.tree(version).folder)
        self.found = judge(patch, self.tree)
        assert self.found.state == APPLY and self.found.module is not None
        self.modules = {name: run(name, source) for name, source in self.tree.texts.items()}
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        self.target = self.modules.get(self.found.module) or types.ModuleType(self.found.module)
        for name, module in self.modules.items():
            if name.startswith(f"{self.found.module}."):  # lora_linear's target is the package
                setattr(self.target, name.rpartition(".")[2], module)
        monkeypatch.setattr(running_code, "_judged", {})

    def stranger(self) -> str | None:
        return running_code.remember("patch", self.target, self.found, self.tree.texts)

    def relied_on(self, patch: str) -> Iterator[tuple[Any, str]]:
        """(class or module, name) of every function that has to be upstream's, of this release."""
        for class_name, method in self.found.intercepted():
            yield running_code.class_at(self.target, class_name), method
        for end, label in RELIED_ON[patch]:
            path, _, name = label.rpartition(".")
            for module in (module for module_name, module in self.modules.items() if module_name.endswith(end)):
                owner = running_code.class_at(module, path) if path else module
                if owner is not None and name in vars(owner):
                    yield owner, name


EXPECTED = json.loads((REPOSITORY / "docs" / "expected-verdicts.json").read_text("utf-8"))
CASES = [
    (version, patch)
    for patch in RELIED_ON
    for version in (*released.releases.OLDER, *released.SUPPORTED)
    if EXPECTED[version][patch]["verdict"] == APPLY
]


def test_all_patches_rely_on_what_they_have_read_but_one_that_says_so() -> None:
    tree = SourceTree(released.tree(released.SUPPORTED[-1]).folder)
    without = [patch for patch in TARGET_MODULES if judge(patch, tree).without_layers]
    assert without == ["frame_stack"] and set(RELIED_ON) == set(TARGET_MODULES) - set(without)


@pytest.mark.parametrize(("version", "patch"), CASES)
def test_upstreams_own_code_is_no_stranger_and_any_other_is(
    version: str, patch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Running(version, patch, monkeypatch)
    assert release.stranger() is None
    relied_on = list(release.relied_on(patch))
    assert len(relied_on) > len(release.found.intercepted())
    for owner, name in relied_on:
        original = vars(owner)[name]
        namespace: dict[str, Any] = {"__name__": "somebody.plugin"}
        exec("def theirs(*arguments, **named): ...", namespace)
        setattr(owner, name, namespace["theirs"])
        found = release.stranger()
        assert found is not None and f"{name} has been replaced by somebody.plugin" in found
        setattr(owner, name, original)
    assert release.stranger() is None
