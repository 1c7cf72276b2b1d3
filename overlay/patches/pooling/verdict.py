"""The verdict for pooling: does one flag alone decide whether `_pool` gives the asynchronous output?

That is so up to vLLM 0.19, whose code is known by its fingerprints: `_pool` itself, the output that copies on a stream of its
own, and the executors. Each executor checks the type of what it gets. One that does not would send an object that holds CUDA
events.
"""

from __future__ import annotations

import ast

from overlay.verdict.cut import cut
from overlay.verdict.known import Known, unknown
from overlay.verdict.model import SourceTree, Upstream, Verdict, Witness, without_target
from overlay.verdict.questions import Drift, drifted, uses_of
from overlay.vocabulary import APPLY, LANDED

MODULE = "vllm.v1.worker.gpu_model_runner"
MODULES = (MODULE,)
#: The module that makes the runner.
WITNESS = Witness("vllm.v1.worker.gpu_worker", "def init_worker_distributed_environment(", "gpu_model_runner")
RUNNER, METHOD = "GPUModelRunner", "_pool"
#: Upstream's own class. It copies on a stream of its own, and whoever asks for the result waits for an event.
OUTPUT = "AsyncGPUPoolingModelRunnerOutput"
#: The function by which it copies. `_pool` calls it itself where the flag is false.
COPY = "_copy_pooler_output_to_cpu"
#: The flag that `_pool` reads. The patch makes it true during a call.
FLAG = "use_async_scheduling"
KNOWN: Known = {
    MODULE: {
        # 0.17.1, then 0.18, then 0.19: they pool in other ways, and end alike.
        f"{RUNNER}.{METHOD}": ("3a4cacc812785c75", "c058748354e57915", "e24c609f1aefaf22"),
        f"{OUTPUT}.__init__": ("5aa4926a7f463f5a",),
        f"{OUTPUT}.get_output": ("e3f5e5b6a8db29e6",),
        COPY: ("69950a37761c6741",),
    },
    "vllm.v1.executor.uniproc_executor": {"UniProcExecutor.collective_rpc": ("241ba2357ef49bae",)},
    "vllm.v1.executor.multiproc_executor": {"WorkerProc.enqueue_output": ("4ad6d4409e0ed665",)},
    "vllm.v1.executor.ray_utils": {"RayWorkerWrapper.execute_model_ray": ("fec13ef37927775d",)},
}


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    source = tree.read(MODULE)
    if source is None:
        lost = f"this vLLM has a V1 model runner for GPUs, but it is not in {MODULE}"
        return without_target(tree, WITNESS, absent="this vLLM has no V1 model runner for GPUs", lost=lost)
    try:
        pool = cut(source, f"{RUNNER}.{METHOD}")
        where = f"{source.path}:{pool.lineno}"
        if not uses_of(pool, FLAG):
            _check_landed(pool)
            reason = f"upstream's {METHOD} gives the asynchronous output on every CUDA-like device"
            return Verdict(LANDED, reason, MODULE, RUNNER, where=where, upstream=Upstream("#39113", True))
    except (Drift, SyntaxError) as error:
        return drifted(error, source.path, MODULE, RUNNER)
    reason = f"without async scheduling {METHOD} synchronises the whole device after its copy"
    applies = Verdict(APPLY, reason, MODULE, RUNNER, (METHOD,), where=where, shapes_graph=False)
    return unknown(tree, KNOWN, MODULE, RUNNER) or applies


def _check_landed(pool: ast.stmt) -> None:
    """Raise Drift unless the method ends with the asynchronous output, and only other platforms return earlier."""
    if not isinstance(pool, ast.FunctionDef) or pool.decorator_list:
        raise Drift(pool, f"{METHOD} is no plain method")
    if not _gives_the_output(pool.body[-1]):
        raise Drift(pool.body[-1], f"{METHOD} neither asks for {FLAG} nor ends with {OUTPUT}")
    for statement in pool.body[:-1]:
        leaves = next((node for node in ast.walk(statement) if isinstance(node, ast.Return)), None)
        test = statement.test if isinstance(statement, ast.If) else None
        if leaves and (test is None or not (_is_other_platform(test) or _is_of_locals(test))):
            raise Drift(leaves, f"{METHOD} returns something else under a condition that is not known")


def _gives_the_output(statement: ast.stmt) -> bool:
    """Whether a statement returns a call of upstream's class."""
    value = statement.value if isinstance(statement, ast.Return) else None
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") == OUTPUT


def _is_other_platform(test: ast.expr) -> bool:
    """Whether a test is ``not ….is_cuda_alike()``."""
    called = test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else None
    return isinstance(called, ast.Call) and getattr(called.func, "attr", "") == "is_cuda_alike"


def _is_of_locals(test: ast.expr) -> bool:
    """Whether a condition is about this step's own values, such as: no request has finished."""
    return not any(isinstance(node, ast.Attribute) for node in ast.walk(test))
