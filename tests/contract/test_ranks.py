"""What ranks do together, in every release: which of them may have other compile ranges than the others."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

from overlay.verdict.questions import find_class, methods_of
from tests.contract import released

pytestmark = pytest.mark.contract
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
#: What gives something to another pipeline stage, or waits for it.
BETWEEN_STAGES = re.compile(
    r"get_pp_group\(\)\.(?!is_first_rank\b|is_last_rank\b|ranks\b|world_size\b|rank_in_group\b)\w+"
    r"|get_world_group\(\)\.(?!local_rank\b)\w+"
    r"|pp_handler\.(receive|broadcast\w*)\(|pp_(receive|broadcast)\("
)


def reached(methods: dict[str, ast.FunctionDef], first: str) -> dict[str, str]:
    """The text of a method and of all that it calls on `self`, by name."""
    found: dict[str, str] = {}
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name in methods and name not in found:
            found[name] = ast.unparse(methods[name])
            waiting += re.findall(r"\bself\.(\w+)\(", found[name])
    return found


@pytest.mark.parametrize("module", RUNNERS)
@pytest.mark.parametrize("version", released.SUPPORTED)
def test_a_warm_up_step_waits_for_no_other_pipeline_stage(version: str, module: str) -> None:
    """A stage whose layers are patched has one range more, and so one step more, than a stage without such layers."""
    source = released.tree(version).read(module)
    assert source is not None
    runner = find_class(source.parse(), "GPUModelRunner")
    assert runner is not None
    methods = methods_of(runner)
    step = reached(methods, "_dummy_run")
    assert len(step) > 3, "the step is read"
    found = {name: BETWEEN_STAGES.search(text) for name, text in step.items()}
    assert not any(found.values()), {name: match[0] for name, match in found.items() if match}
    serving = {**reached(methods, "execute_model"), **reached(methods, "sample_tokens")}
    assert any(map(BETWEEN_STAGES.search, serving.values())), "and a step that serves would be found out"


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_ranges_make_warm_up_steps_and_graphs_and_nothing_else(version: str) -> None:
    """Nobody sends them to another rank, or compares them with another rank's."""
    folder = pathlib.Path(released.tree(version).folder) / "vllm"
    readers = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if re.search(r"compile_ranges_endpoints|get_compile_ranges", path.read_text("utf-8"))
    }
    assert readers == {
        "compilation/backends.py",  # a log line
        "compilation/piecewise_backend.py",
        "config/compilation.py",
        "config/vllm.py",
        "v1/worker/gpu_worker.py",
    }


@pytest.mark.parametrize("version", released.SUPPORTED)
def test_an_elastic_engine_has_a_world_of_its_own(version: str) -> None:
    """So the ranks of other engines are not compared with it (`overlay.side_work.adoption.refuse_modes`). All other engines share one."""
    source = released.tree(version).read("vllm.distributed.parallel_state")
    assert source is not None
    (function,) = (
        node
        for node in source.parse().body
        if isinstance(node, ast.FunctionDef) and node.name == "init_distributed_environment"
    )
    (across,) = (
        node
        for node in ast.walk(function)
        if isinstance(node, ast.If)
        and any(ast.unparse(line) == "world_size = parallel_config.world_size_across_dp" for line in node.body)
    )
    assert "data_parallel_size > 1" in ast.unparse(across.test)
    assert ast.unparse(across.test).endswith("and (not enable_elastic_ep)")
