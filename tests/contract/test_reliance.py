"""Everything else that the GDN patch takes from vLLM is there in every release: imports, attributes, signatures.

A name that is gone would not break vLLM (the hook is guarded), but it would switch the patch off.
"""

from __future__ import annotations

import ast
import pathlib

import pytest
from packaging.version import Version

from overlay.verdict.shapes import find_class, methods_of
from tests.conftest import REPOSITORY
from tests.contract import released

pytestmark = pytest.mark.contract
PATCH = REPOSITORY / "overlay" / "patches" / "gdn.py"


def imports_of_vllm() -> list[tuple[str, str]]:
    """(module, name) of every import from vLLM in the patch."""
    found = []
    for node in ast.parse(PATCH.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def parsed(version: str, module: str) -> ast.Module:
    source = released.tree(version).read(module)
    assert source is not None, f"vLLM {version} has no module {module}"
    return source.parse()


def class_of(tree: ast.Module, name: str) -> ast.ClassDef:
    found = find_class(tree, name)
    assert found is not None, f"no class {name}"
    return found


def names_in(node: ast.AST) -> set[str]:
    """Every name that a module or class binds at its own level, in whatever way."""
    found: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            found.add(child.name)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            found.add(child.id)
        elif isinstance(child, ast.alias):
            found.add(child.asname or child.name)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            found.add(child.attr)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            found.add(child.value)  # names that vLLM's packages serve lazily
    return found


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize(("module", "name"), imports_of_vllm())
def test_what_the_patch_imports_is_there(version: str, module: str, name: str) -> None:
    tree = released.tree(version)
    assert tree.has(f"{module}.{name}") or name in names_in(parsed(version, module))


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("vllm.config.parallel", "ParallelConfig", "use_ubatching"),
        ("vllm.config.compilation", "CompilationConfig", "static_forward_context"),
        ("vllm.forward_context", "ForwardContext", "no_compile_layers"),
        ("vllm.model_executor.layers.linear", "ColumnParallelLinear", "output_size_per_partition"),
        ("vllm.model_executor.layers.linear", "LinearBase", "quant_method"),
    ],
)
def test_the_attributes_that_the_patch_reads_are_there(version: str, module: str, owner: str, name: str) -> None:
    assert name in names_in(class_of(parsed(version, module), owner))


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_the_layer_has_what_the_sizes_are_checked_against(version: str) -> None:
    verdict = released.verdict(version)
    assert verdict.module is not None and verdict.class_name is not None
    bound = names_in(methods_of(class_of(parsed(version, verdict.module), verdict.class_name))["__init__"])
    base = released.tree(version).read("vllm.model_executor.layers.mamba.gdn.base")
    if base is not None:
        bound |= names_in(base.parse())
    assert {"prefix", "tp_size", "key_dim", "value_dim", "num_v_heads", "in_proj_qkvz", "in_proj_ba"} <= bound
    if verdict.module.endswith("qwen_gdn_linear_attn"):
        assert "disable_tp_for_ba_proj" in names_in(parsed(version, verdict.module)) | bound


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_the_op_can_be_registered_and_the_cache_salted(version: str) -> None:
    utilities = parsed(version, "vllm.utils.torch_utils")
    register = next(
        node
        for node in ast.walk(utilities)
        if isinstance(node, ast.FunctionDef) and node.name == "direct_register_custom_op"
    )
    arguments = {argument.arg for argument in (*register.args.args, *register.args.kwonlyargs)}
    assert {"op_name", "op_func", "mutates_args", "fake_impl", "target_lib"} <= arguments
    with_layer_name = Version(version) >= Version("0.20.0")
    names = {"LayerNameType", "_encode_layer_name", "_resolve_layer_name"}
    assert (names <= names_in(utilities)) == with_layer_name
    environment = parsed(version, "vllm.envs")
    factors = next(
        node for node in environment.body if isinstance(node, ast.FunctionDef) and node.name == "compile_factors"
    )
    assert any(isinstance(node, ast.Name) and node.id == "environment_variables" for node in ast.walk(factors))


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_marlin_makes_a_workspace_per_layer_up_to_0_30_0(version: str) -> None:
    """DESIGN counted on it everywhere; vLLM 0.31.0 and later share one, and two Marlin GEMMs at once would race."""
    folder = pathlib.Path(released.tree(version).folder)
    (path,) = folder.rglob("mixed_precision/marlin.py")
    kernel = class_of(ast.parse(path.read_text()), "MarlinLinearKernel")
    method = methods_of(kernel)["process_weights_after_loading"]
    mentioned = {node.id for node in ast.walk(method) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)
    }
    own = {"workspace", "marlin_make_workspace_new"} <= mentioned
    assert own == (Version(version) < Version("0.31.0"))
