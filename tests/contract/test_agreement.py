"""Where the ranks compare themselves, in every release: in its world, and before the worker makes a runner or a layer."""

from __future__ import annotations

import ast

import pytest

from overlay.engine.proof import WORKERS
from overlay.engine.ranks import JOINS_WORLD
from overlay.verdict.questions import find_class, methods_of
from tests.contract import released

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_every_worker_joins_its_world_by_one_function_before_it_makes_its_runner(version: str) -> None:
    for module, class_name in WORKERS.items():
        source = released.tree(version).read(module)
        assert source is not None
        tree = source.parse()
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        names.update(alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)
        assert JOINS_WORLD in names, f"vLLM {version}: {module} has no {JOINS_WORLD}"
        worker = find_class(tree, class_name)
        assert worker is not None
        calls = [
            (node.lineno, ast.unparse(node.func))
            for node in ast.walk(methods_of(worker)["init_device"])
            if isinstance(node, ast.Call)
        ]
        (joined,) = [line for line, name in calls if name == JOINS_WORLD]
        runners = [line for line, name in calls if "ModelRunner" in name or "model_runner" in name]
        assert runners and min(runners) > joined, f"vLLM {version}: {module} makes its runner before its world"
