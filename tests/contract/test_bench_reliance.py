"""What the bench takes from vLLM is there in every release from 0.19.0 on: the dummy loader, and the client's flags."""

from __future__ import annotations

import ast
import pathlib

import pytest
from packaging.version import Version

from overlay.cli.bench import closed_loop
from overlay.verdict.questions import find_class, methods_of
from tests import bench_runs
from tests.contract import released

pytestmark = pytest.mark.contract
VERSIONS = [version for version in released.SUPPORTED if Version(version) >= Version("0.19.0")]
POOLED = {"duration": 1.0, "completed": 1, "errors": []}
GENERATED = {"completed": 1, "failed": 0, "generated_texts": ["a"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_random_weights_have_the_loader_that_they_replace(version: str) -> None:
    source = released.tree(version).read("vllm.model_executor.model_loader.dummy_loader")
    assert source is not None
    tree = ast.parse(source.text)
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    loader = find_class(tree, "DummyModelLoader")
    assert "get_layer_tensors" in imported and loader is not None
    methods = methods_of(loader)
    assert [argument.arg for argument in methods["load_weights"].args.args] == ["self", "model", "model_config"]
    assert ("get_layerwise_info" in imported) == ("_process_online_quant_layer" in methods)


@pytest.mark.parametrize("pools", [False, True], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_client_knows_every_flag(version: str, pools: bool, tmp_path: pathlib.Path) -> None:
    load = closed_loop.load(1, 1, 8, 4, pools)
    client, _ = bench_runs.run(tmp_path, load, POOLED if pools else GENERATED, [])
    tree = released.tree(version)
    modules = [tree.read(f"vllm.benchmarks.{name}") for name in ("serve", "datasets", "datasets.datasets")]
    text = "".join(source.text for source in modules if source is not None)
    flags = [word for word in client.arguments if word.startswith("--")]
    assert len(flags) > 10 and [flag for flag in flags if f'"{flag}"' not in text] == []
    functions = tree.read("vllm.benchmarks.lib.endpoint_request_func")
    assert functions is not None and f'"{client.arguments[1]}":' in functions.text
