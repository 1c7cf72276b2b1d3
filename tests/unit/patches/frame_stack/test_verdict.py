"""The verdict for frame_stack on text: what is a loop, and what is none. Released sources: tests/contract/test_matrix.py."""

from __future__ import annotations

import pathlib

import pytest

from overlay.patches.frame_stack.verdict import judge
from overlay.verdict import SourceTree
from overlay.vocabulary import ABSENT, APPLY, DRIFTED

LOOP = "    def {0}(self):\n        while True:\n            pass\n"
CORE = (
    "class EngineCore:\n    pass\n\n@traced\nclass EngineCoreProc(EngineCore):\n    @traced\n"
    + LOOP.format("run_busy_loop")
    + "\nclass DPEngineCoreProc(EngineCoreProc):\n"
    + LOOP.format("run_busy_loop")
)
WORKER = "class WorkerProc:\n" + LOOP.format("worker_busy_loop") + "\ndef after():\n    pass\n"
CLIENT = "from vllm.v1.engine.core import EngineCoreProc\nclass DPLBAsyncMPClient:\n    pass\n"
WHOLE = {"engine/core.py": CORE, "executor/multiproc_executor.py": WORKER, "engine/core_client.py": CLIENT}


def tree(folder: pathlib.Path, changes: dict[str, str | None]) -> SourceTree:
    for name, text in {**WHOLE, **changes}.items():
        if text is not None:
            path = folder / "vllm" / "v1" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return SourceTree(folder)


def test_all_loops_of_all_modules(tmp_path: pathlib.Path) -> None:
    found = judge(tree(tmp_path, {}))
    assert found.state == APPLY and found.without_layers and not found.shapes_graph
    assert [name.rpartition(".")[2] for name in found.methods] == ["run_busy_loop"] * 2 + ["worker_busy_loop"]
    assert found.where is not None and found.where.endswith("engine/core.py:7")


@pytest.mark.parametrize(
    ("changes", "line", "reason"),
    [
        ({"engine/core.py": CORE.replace("    def run", "    async def run", 1)}, 7, "EngineCoreProc.run_busy_loop is asynchronous"),
        ({"engine/core.py": CORE.replace("while True", "if True", 1)}, 7, "EngineCoreProc.run_busy_loop has no loop"),
        ({"engine/core.py": CORE.replace("def run_busy_loop", "def run", 1)}, 5, "EngineCoreProc.run_busy_loop is defined 0 times"),
        ({"engine/core.py": CORE.replace("class DP", "class Data")}, 1, "DPEngineCoreProc is defined 0 times"),
        ({"engine/core.py": CORE + CORE}, 19, "EngineCoreProc is defined 2 times"),
        ({"engine/core.py": CORE.replace("True:", "True", 1)}, 8, "not readable as Python"),
        ({"executor/multiproc_executor.py": ""}, 1, "WorkerProc is defined 0 times"),
        ({"executor/multiproc_executor.py": None}, 1, "this vLLM has no vllm.v1.executor.multiproc_executor"),
        ({"engine/core.py": None}, 1, "this vLLM has no vllm.v1.engine.core"),
        ({"engine/core.py": None, "executor/multiproc_executor.py": None}, 1, "they are not in vllm.v1.engine.core"),
    ],
)  # fmt: skip
def test_drift_has_a_line_and_a_reason(
    changes: dict[str, str | None], line: int, reason: str, tmp_path: pathlib.Path
) -> None:
    found = judge(tree(tmp_path, changes))
    assert found.state == DRIFTED and found.methods == () and reason in found.reason
    assert found.where is not None and found.where.endswith(f".py:{line}")


def test_a_vllm_whose_client_starts_no_engine_core_has_none(tmp_path: pathlib.Path) -> None:
    changes = dict.fromkeys(WHOLE) | {"engine/core_client.py": CLIENT.partition("\n")[2]}
    changes["engine/core_client.py"] = "import os\n" + str(changes["engine/core_client.py"])
    assert judge(tree(tmp_path, changes)).state == ABSENT
