"""Everything else that the overlay takes from vLLM is there in every release: imports, attributes, signatures.

A name that is gone would not break vLLM (the hooks are guarded), but it would switch a patch off.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
from packaging.version import Version

from overlay.engine.loops import LOOPS
from overlay.engine.proof import WARM_UP, WORKERS
from overlay.patches.registry import judge
from overlay.report import log
from overlay.side_work.gemms import MARLIN_WORKSPACE
from overlay.side_work.lowering import VLLM_COMPILE
from overlay.verdict.questions import find_class, methods_of
from overlay.vocabulary import APPLY
from tests.conftest import REPOSITORY
from tests.contract import released

pytestmark = pytest.mark.contract
#: What every patch is built on.
SHARED = (
    "engine/proof",
    "side_work/adoption",
    "side_work/declaration",
    "side_work/gemms",
    "side_work/lowering",
    "side_work/ops",
)


def imports_of_vllm(path: pathlib.Path) -> list[tuple[str, str]]:
    """(module, name) of every import from vLLM in a file of the overlay."""
    return [
        (str(node.module), alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    ]


#: The patches that import something from vLLM themselves. The loops have a test of their own, and declarations are built on what
#: is SHARED.
PATCHES = sorted(
    path.parent.name for path in (REPOSITORY / "overlay" / "patches").glob("*/patch.py") if imports_of_vllm(path)
)


def missing_imports(version: str, path: pathlib.Path) -> list[tuple[str, str]]:
    tree = released.tree(version)
    return [
        (module, name)
        for module, name in imports_of_vllm(path)
        if not tree.has(f"{module}.{name}") and name not in names_in(parsed(version, module))
    ]


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
@pytest.mark.parametrize("patch", PATCHES)
def test_what_a_patch_imports_is_there_where_it_applies(version: str, patch: str) -> None:
    path = REPOSITORY / "overlay" / "patches" / patch / "patch.py"
    if judge(patch, released.tree(version)).state == APPLY:
        assert missing_imports(version, path) == []


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize("name", SHARED)
def test_what_all_patches_are_built_on_is_there(version: str, name: str) -> None:
    path = REPOSITORY / "overlay" / f"{name}.py"
    assert imports_of_vllm(path)
    assert missing_imports(version, path) == []


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize(("module", "worker"), WORKERS.items())
def test_warm_up_ends_and_steps_run_where_the_proof_of_effect_looks(version: str, module: str, worker: str) -> None:
    own = methods_of(class_of(parsed(version, module), worker))
    assert WARM_UP in own
    inherited = methods_of(class_of(parsed(version, "vllm.v1.worker.gpu_worker"), "Worker"))
    step = {**inherited, **own}["execute_model"]
    assert [argument.arg for argument in step.args.args][:2] == ["self", "scheduler_output"]
    output = class_of(parsed(version, "vllm.v1.core.sched.output"), "SchedulerOutput")
    assert "total_num_scheduled_tokens" in names_in(output)


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize(("module", "loops"), LOOPS.items())
def test_processes_spend_their_lives_in_the_loops_that_get_room(
    version: str, module: str, loops: tuple[str, ...]
) -> None:
    tree = parsed(version, module)
    called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")}
    for loop in loops:
        owner, _, method = loop.partition(".")
        found = methods_of(class_of(tree, owner))[method]
        assert isinstance(found, ast.FunctionDef)  # not asynchronous: it would have returned at once
        assert any(isinstance(node, ast.While) for node in ast.walk(found))
        assert method in called


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_vllms_logging_is_configured_at_import_or_by_the_function_that_is_waited_for(version: str) -> None:
    module = parsed(version, "vllm.logger")
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    at_import = {
        getattr(node.value.func, "id", "")
        for node in module.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    }
    assert log.CONFIGURE in functions
    assert log.CONFIGURE in at_import or "configure_logging" in functions


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize("module", ["vllm.compilation.backends", "vllm.compilation.caching"], ids=["JIT", "AOT"])
def test_the_cache_key_is_made_of_the_table_that_the_fingerprint_is_in(version: str, module: str) -> None:
    source = released.tree(version).read(module)
    assert source is not None
    assert re.search(r"^from vllm import .*\benvs\b|^import vllm\.envs as envs", source.text, re.MULTILINE)
    assert "envs.compile_factors()" in source.text


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_a_folder_of_graphs_that_is_set_before_the_backend_runs_is_the_users(version: str) -> None:
    """No layer is made after that, so what a layer finds in `cache_dir` is not vLLM's. vLLM copies what the user gave."""
    setting = re.compile(r"\.cache_dir = (?!\"\")")
    folder = pathlib.Path(released.tree(version).folder) / "vllm"
    found = {
        (path.relative_to(folder).as_posix(), line.strip())
        for place in ("compilation", "config", "engine", "platforms", "v1")
        for path in folder.joinpath(place).rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if setting.search(line) and "compilation_config" in line
    }
    assert found == {("compilation/backends.py", "self.compilation_config.cache_dir = cache_dir")}
    arguments = released.tree(version).read("vllm.engine.arg_utils")
    assert arguments is not None and "compilation_config = copy.deepcopy(self.compilation_config)" in arguments.text


@pytest.mark.parametrize("version", released.SUPPORTED)
@pytest.mark.parametrize(
    ("module", "owner", "name"),
    [
        ("vllm.config.parallel", "ParallelConfig", "use_ubatching"),
        ("vllm.config.compilation", "CompilationConfig", "cache_dir"),
        ("vllm.config.compilation", "CompilationConfig", "static_forward_context"),
        ("vllm.config.compilation", "CompilationConfig", "compile_ranges_endpoints"),
        ("vllm.config.compilation", "CompilationConfig", "cudagraph_capture_sizes"),
        ("vllm.config.compilation", "CompilationConfig", "compile_mm_encoder"),
        ("vllm.config.parallel", "ParallelConfig", "world_size_across_dp"),
        ("vllm.config.parallel", "ParallelConfig", "enable_elastic_ep"),
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
def test_marlins_locks_belong_to_a_layer_or_to_a_stream(version: str) -> None:
    """To a layer up to 0.30.0, to the current stream from 0.31.0 on. Either way two Marlin GEMMs on two streams share none."""
    folder = pathlib.Path(released.tree(version).folder)
    (path,) = folder.rglob("mixed_precision/marlin.py")
    kernel = class_of(ast.parse(path.read_text()), "MarlinLinearKernel")
    mentioned = names_used(methods_of(kernel)["process_weights_after_loading"])
    of_a_layer = mentioned >= MARLIN_WORKSPACE
    functions = {
        node.name: node
        for node in parsed(version, "vllm.model_executor.layers.quantization.utils.marlin_utils").body
        if isinstance(node, ast.FunctionDef)
    }
    of_a_stream = "current_stream" in names_used(functions.get("get_marlin_workspace", ast.Pass()))
    assert (of_a_layer, of_a_stream) == ((True, False) if Version(version) < Version("0.31.0") else (False, True))


def names_used(root: ast.AST) -> set[str]:
    named = {node.id for node in ast.walk(root) if isinstance(node, ast.Name)}
    return named | {node.attr for node in ast.walk(root) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_no_linear_ends_a_segment_of_a_graph(version: str) -> None:
    """Start and join lie around one linear. Neither an op that splits the graph (piecewise graphs, Inductor's partitions) nor an
    eager break (breakable graphs) may be in its code: a fork must be captured together with its join."""
    text = released.tree(version).read("vllm.config.compilation")
    assert text is not None
    splitting = set(re.findall(r'"vllm::(\w+)"', text.text))
    assert {"unified_attention_with_output"} <= splitting
    package = pathlib.Path(released.tree(version).folder, "vllm", "model_executor")
    linears = [package / "layers" / "linear.py", *(package / "layers" / "quantization").rglob("*.py")]
    linears += (package / "kernels" / "linear").rglob("*.py")
    # Attention's own quantization (of its cache) lies beside the linears', and is not called by them.
    texts = {path: path.read_text("utf-8") for path in linears if path.name != "kv_cache.py"}
    assert len(texts) > 30
    for path, source in texts.items():
        calls = set(re.findall(r"torch\.ops\.vllm\.(\w+)", source))
        assert not calls & splitting, path
        assert "eager_break_during_capture" not in source, path


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_a_range_is_compiled_by_the_call_that_is_watched(version: str) -> None:
    manager = methods_of(class_of(parsed(version, "vllm.compilation.backends"), "CompilerManager"))
    named = {argument.arg for argument in manager["compile"].args.args}
    assert {"graph", "compilation_config", "compile_range"} <= named
    calls = [
        node
        for node in ast.walk(parsed(version, "vllm.compilation.piecewise_backend"))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("compiler_manager.compile")
    ]
    assert calls
    assert {"start", "end"} <= names_in(class_of(parsed(version, "vllm.config.utils"), "Range"))
    modes = class_of(parsed(version, "vllm.config.compilation"), "CompilationMode")
    values = {ast.unparse(one.targets[0]): ast.unparse(one.value) for one in modes.body if isinstance(one, ast.Assign)}
    assert values["VLLM_COMPILE"] == str(VLLM_COMPILE)


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_ranges_are_read_from_the_endpoints_when_a_piece_is_compiled(version: str) -> None:
    """So that endpoints that come after loading the model still count."""
    source = released.tree(version).read("vllm.compilation.piecewise_backend")
    assert source is not None and "self.compilation_config.get_compile_ranges()" in source.text
    ranges = methods_of(class_of(parsed(version, "vllm.config.compilation"), "CompilationConfig"))["get_compile_ranges"]
    assert "self.compile_ranges_endpoints" in ast.unparse(ranges)


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_an_op_can_be_given_tags(version: str) -> None:
    functions = {
        node.name: node for node in parsed(version, "vllm.utils.torch_utils").body if isinstance(node, ast.FunctionDef)
    }
    assert "tags" in [argument.arg for argument in functions["direct_register_custom_op"].args.args]


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_the_kv_cache_is_sized_by_what_the_model_took(version: str) -> None:
    """Up to 0.26.0 as a term of its own, which overlay.engine.loaded adds to. Then by what the device has lost since the worker began."""
    source = released.tree(version).read("vllm.v1.worker.gpu_worker")
    assert source is not None and "weights_memory=int(self.model_runner.model_memory_usage)" in source.text
    (profiling,) = (
        ast.unparse(node)
        for node in parsed(version, "vllm.utils.mem_utils").body
        if isinstance(node, ast.FunctionDef) and node.name == "memory_profiling"
    )
    by_the_model = "non_torch_memory + peak_activation_memory + result.weights_memory" in profiling
    by_the_device = "result.before_create.free_memory - result.after_profile.free_memory" in profiling
    assert (by_the_model, by_the_device) == ((True, False) if Version(version) < Version("0.27.0") else (False, True))
