"""The patch. The docstring of `overlay.patches.pooling` tells its story."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import wrapt
from vllm.v1.outputs import AsyncModelRunnerOutput

from overlay.report.journal import journal
from overlay.settings import Settings
from overlay.side_work.adoption import StaysStock, adopt, inert_without_cuda
from overlay.verdict import Verdict

NAME = "pooling"
#: vLLM's own executors. Each knows the asynchronous output; a user's own class may not.
EXECUTORS = ("uni", "mp", "ray", "external_launcher")
NOTHING_FINISHED = "no request of the step has finished"
#: The attribute of a runner: whether its `_pool` is to give the asynchronous output.
ADOPTED = "_overlay_gives_asynchronous_output"


def executor_of(runner: Any) -> str:
    """The name of the executor that will ask for this runner's result at once. Raises StaysStock if none does.

    Raises AttributeError if the runner lacks the flag that the patch sets, or the stream that it makes.
    """
    if {"use_async_scheduling", "async_output_copy_stream"} - set(vars(runner)):
        raise AttributeError("the runner has no flag or no copy stream of its own")
    if runner.use_async_scheduling:
        raise StaysStock("async scheduling is on: vLLM gives the asynchronous output itself")
    parallel = runner.parallel_config
    executor = parallel.distributed_executor_backend
    if executor not in EXECUTORS:
        raise StaysStock(f"executor {executor!r} is not known to take an asynchronous output")
    ranks_of_a_stage = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    first_of_the_last_stage = parallel.world_size - ranks_of_a_stage
    if parallel.pipeline_parallel_size > 1 and parallel.rank < first_of_the_last_stage:
        raise StaysStock("the pooler runs in another pipeline stage")
    if executor == "mp" and parallel.rank != first_of_the_last_stage:
        raise StaysStock("the executor takes another rank's output, and nothing would wait for this one's")
    return str(executor)


def install(module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
    """Intercept the runner of `verdict` in a module that has just been executed. Returns the verdict that holds here."""
    inert = inert_without_cuda(verdict, serial_pass_through=False)
    if inert is not None:
        return inert
    target = getattr(module, verdict.class_name or "")
    record = journal.patch(NAME)
    record.runs_in_warm_up = False  # vLLM's warm-up runs the pooler, but not `_pool`

    def after_init(wrapped: Callable[..., None], runner: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        if runner.is_pooling_model:
            found = adopt(NAME, record, type(runner).__name__, lambda: describe(runner), settings)
            setattr(runner, ADOPTED, found is not None)

    def describe(runner: Any) -> tuple[str, dict[str, Any]]:
        executor = executor_of(runner)
        return executor, {"executor": executor, "rank": runner.parallel_config.rank}

    def pool(wrapped: Callable[..., Any], runner: Any, args: Any, kwargs: Any) -> Any:
        if not getattr(runner, ADOPTED, False):
            return wrapped(*args, **kwargs)
        if runner.async_output_copy_stream is None:
            runner.async_output_copy_stream = torch.cuda.Stream(device=runner.device)
        before, runner.use_async_scheduling = runner.use_async_scheduling, True
        try:
            output = wrapped(*args, **kwargs)
        finally:
            runner.use_async_scheduling = before
        if isinstance(output, AsyncModelRunnerOutput):
            record.calls.dual_stream += 1
        else:
            record.calls.count_serial(NOTHING_FINISHED)
        return output

    wrapt.wrap_function_wrapper(target, "_pool", pool)
    # Last, because `_pool` acts like upstream's for a runner that has not been adopted.
    wrapt.wrap_function_wrapper(target, "__init__", after_init)
    return verdict
