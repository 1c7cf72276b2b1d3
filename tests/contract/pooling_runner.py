"""Upstream's own pooling step in a stub of a runner: `_pool` and its asynchronous output, compiled from a released file.

The poolers, the pooling metadata and the late interaction are the release's own modules; what they import from the rest of
vLLM is the vLLM that is installed. Nothing of upstream is kept here, and nothing of the overlay is repeated.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch

from overlay.patches.pooling import verdict

#: The runner's method that waits for the whole device.
SYNC = "_sync_device"

MODULE = verdict.MODULE
HIDDEN = 32
#: What is the release's own: a package with all below it, or one module.
OWN_PACKAGES = ("vllm.model_executor.layers.pooler", "vllm.v1.pool")
OWN_MODULES = ("vllm.v1.worker.gpu.pool.late_interaction_runner",)
#: What the release's modules import, loaded before they take their places: this has to find its own version's poolers.
INSTALLED = (
    "vllm.config.pooler",
    "vllm.model_executor.models.adapters",
    "vllm.pooling_params",
    "vllm.v1.outputs",
    "vllm.v1.worker.gpu.pool",
)


def is_own(name: str) -> bool:
    return name in OWN_MODULES or any(name == own or name.startswith(f"{own}.") for own in OWN_PACKAGES)


class ReleasedFinder(importlib.abc.MetaPathFinder):
    """Finds the release's own modules in its folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not is_own(name):
            return None
        base = self.folder.joinpath(*name.split("."))
        package = base / "__init__.py"
        file = package if package.is_file() else base.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file)


@functools.cache
def poolers(folder: pathlib.Path) -> types.SimpleNamespace:
    """The release's own poolers and what its `_pool` hands them."""
    for name in INSTALLED:
        importlib.import_module(name)
    finder = ReleasedFinder(folder)
    installed = {name: sys.modules.pop(name) for name in list(sys.modules) if is_own(name)}
    sys.meta_path.insert(0, finder)
    try:
        modules = {
            short: importlib.import_module(name)
            for short, name in (
                ("sequence", "vllm.model_executor.layers.pooler.seqwise"),
                ("tokens", "vllm.model_executor.layers.pooler.tokwise"),
                ("token_methods", "vllm.model_executor.layers.pooler.tokwise.methods"),
                ("activations", "vllm.model_executor.layers.pooler.activations"),
                ("metadata", "vllm.v1.pool.metadata"),
                ("late_interaction", "vllm.v1.worker.gpu.pool.late_interaction_runner"),
            )
        }
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if is_own(name)]:
            del sys.modules[name]
        sys.modules.update(installed)
        for name in (*OWN_PACKAGES, *OWN_MODULES):
            parent, _, child = name.rpartition(".")
            if name in installed:
                setattr(sys.modules[parent], child, installed[name])
            elif hasattr(sys.modules[parent], child):
                delattr(sys.modules[parent], child)
    for module in modules.values():
        assert str(module.__file__).startswith(str(folder)), f"{module} is not the release's"
    return types.SimpleNamespace(**modules)


class RunnerBase:
    """What `_pool` reads of a runner. The class that is made of a release derives from it."""

    def __init__(
        self,
        parts: types.SimpleNamespace,
        pooler: Any,
        *,
        device: str = "cpu",
        async_scheduling: bool = False,
        pooling: bool = True,
        **parallel: Any,
    ) -> None:
        one = dict(tensor_parallel_size=1, pipeline_parallel_size=1, prefill_context_parallel_size=1, world_size=1)
        settings = {**one, "rank": 0, "distributed_executor_backend": "uni", **parallel}
        self.parallel_config = types.SimpleNamespace(**settings)
        self.is_pooling_model = pooling
        self.use_async_scheduling = async_scheduling
        self.async_output_copy_stream: Any = torch.cuda.Stream() if async_scheduling else None
        self.device = torch.device(device)
        self.model = types.SimpleNamespace(pooler=pooler)
        self.late_interaction_runner = parts.late_interaction.LateInteractionRunner()
        self._parts = parts
        self._states: dict[str, Any] = {}

    def step(self, requests: Sequence[Request], hidden_states: torch.Tensor) -> Any:
        """One step: upstream's `_pool` for these requests. `hidden_states` is (tokens and padding, hidden)."""
        device, count = self.device, len(requests)
        scheduled = numpy.array([request.scheduled for request in requests], dtype=numpy.int32)
        starts = torch.zeros(count + 1, dtype=torch.int64)
        torch.cumsum(torch.from_numpy(scheduled), dim=0, out=starts[1:])
        # As vLLM's own input preparation: no synchronisation that would be counted as the step's.
        on_device = starts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else starts
        self.query_start_loc = types.SimpleNamespace(gpu=on_device)
        self.optimistic_seq_lens_cpu = torch.tensor([r.computed + r.scheduled for r in requests], dtype=torch.int32)
        names = [request.name for request in requests]
        parameters = [request.parameters for request in requests]
        metadata = self._parts.metadata
        self.input_batch = types.SimpleNamespace(
            num_reqs=count,
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            pooling_params={request.name: request.parameters for request in requests},
            get_pooling_metadata=lambda: metadata.PoolingMetadata(
                prompt_lens=torch.tensor([r.prompt for r in requests], dtype=torch.int32),
                prompt_token_ids=None,
                prompt_token_ids_cpu=None,
                pooling_params=parameters,
                pooling_states=[self._states.setdefault(name, metadata.PoolingStates()) for name in names],
            ),
        )
        return self._pool(hidden_states, int(scheduled.sum()), scheduled, None)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Request:
    """Of a prompt of so many tokens, `computed` were in earlier steps and `scheduled` are in this one."""

    name: str
    prompt: int
    scheduled: int
    computed: int = 0
    parameters: Any = field(default=None, compare=False)

    @property
    def finished(self) -> bool:
        return self.computed + self.scheduled == self.prompt


def request(name: str, prompt: int, scheduled: int | None = None, computed: int = 0, **parameters: Any) -> Request:
    from vllm.pooling_params import PoolingParams

    values = {"task": "embed", "use_activation": True, **parameters}
    return Request(name, prompt, prompt if scheduled is None else scheduled, computed, PoolingParams(**values))


def released_module(path: pathlib.Path, text: str | None = None) -> types.ModuleType:
    """A module with upstream's pooling step out of a released file, or out of a changed text of it."""
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

    module = types.ModuleType(MODULE)
    vars(module).update(
        AsyncModelRunnerOutput=AsyncModelRunnerOutput,
        ModelRunnerOutput=ModelRunnerOutput,
        RunnerBase=RunnerBase,
        VllmModelForPooling=object,
        cast=lambda kind, value: value,
        torch=torch,
    )
    wanted: list[ast.stmt] = []
    for node in ast.parse(path.read_text("utf-8") if text is None else text).body:
        name = getattr(node, "name", "")
        if name in (verdict.COPY, verdict.OUTPUT):
            wanted.append(node)
        elif isinstance(node, ast.ClassDef) and name == verdict.RUNNER:
            node.bases = [ast.Name("RunnerBase", ast.Load())]
            node.body = [item for item in node.body if getattr(item, "name", "") in (verdict.METHOD, SYNC)]
            wanted.append(node)
    assert [getattr(node, "name", "") for node in wanted] == [verdict.COPY, verdict.OUTPUT, verdict.RUNNER]
    tree = ast.fix_missing_locations(ast.Module(wanted, []))
    # This file's own `from __future__ import annotations` holds for what it compiles: names of types are not looked up.
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def path_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.joinpath(*MODULE.split(".")).with_suffix(".py")


# -------------------------------------------------------------------------------------------------------- kinds of pooler


def make_pooler(parts: types.SimpleNamespace, kind: str) -> Any:
    """A pooler of the release: ``last``, ``mean`` and ``cls`` give one tensor, ``token`` a list with None in it."""
    if kind == "token":
        chunked = types.SimpleNamespace(scheduler_config=types.SimpleNamespace(enable_chunked_prefill=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts.token_methods, "get_current_vllm_config", lambda: chunked)
            pooling = parts.token_methods.AllPool()
        head = parts.tokens.TokenEmbeddingPoolerHead(activation=parts.activations.PoolerNormalize())
        return parts.tokens.TokenPooler(pooling=pooling, head=head)
    pooling = parts.sequence.get_seq_pooling_method(kind.upper())
    head = parts.sequence.EmbeddingPoolerHead(head_dtype=torch.float32, activation=parts.activations.PoolerNormalize())
    return parts.sequence.SequencePooler(pooling=pooling, head=head)


def hidden_states(tokens: int, seed: int = 0, hidden: int = HIDDEN) -> torch.Tensor:
    """(tokens, hidden) bfloat16, as a model gives them: with some rows of padding behind."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens + 3, hidden, generator=generator).to(torch.bfloat16)


# ------------------------------------------------------------------------------------------- CUDA as far as a step uses it

Log = list[tuple[str, ...]]


@contextlib.contextmanager
def recording_cuda(module: types.ModuleType) -> Iterator[Log]:
    """Recording fakes in the place of streams, events and the device; the arithmetic is the CPU's."""
    log: Log = []

    class Stream:
        def __init__(self, device: Any = None, name: str = "copy stream") -> None:
            self.name = name
            if name != "main":
                log.append(("made", name))

        def wait_stream(self, other: Stream) -> None:
            log.append(("wait", self.name, other.name))

    main = Stream(name="main")
    current = [main]

    class Event:
        def record(self) -> None:
            log.append(("record", current[-1].name))

        def synchronize(self) -> None:
            log.append(("event sync",))

    @contextlib.contextmanager
    def switch(stream: Stream) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    copy = getattr(module, verdict.COPY)

    def recorded_copy(*args: Any, **kwargs: Any) -> Any:
        log.append(("copy", current[-1].name))
        return copy(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda: current[-1])
        patch.setattr(torch.cuda, "stream", switch)
        patch.setattr(torch, "Event", Event)
        patch.setattr(torch.accelerator, "synchronize", lambda: log.append(("device sync",)))
        patch.setattr(module, verdict.COPY, recorded_copy)
        yield log
