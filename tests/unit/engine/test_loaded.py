"""The moment between the weights and the first trace."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import types
from typing import Any

import pytest

from overlay.engine import loaded, proof


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "_waiting", [])


class Worker:
    def __init__(self) -> None:
        self.weights: str | None = None

    def load_model(self, weights: str, *, dummy: bool = False) -> str:
        if weights == "none":
            raise FileNotFoundError(weights)
        self.weights = weights
        return f"loaded {weights}, {dummy}"


def module_of(name: str, worker: type) -> types.ModuleType:
    module = types.ModuleType(name)
    setattr(module, proof.WORKERS[name], type(worker.__name__, (worker,), dict(vars(worker))))
    return module


@pytest.mark.parametrize("name", proof.WORKERS)
def test_who_waits_is_called_when_the_weights_are_there(name: str) -> None:
    module = module_of(name, Worker)
    loaded.decide_after_load(module)
    seen: list[Any] = []
    loaded.when_loaded(lambda worker: seen.append(("first", worker.weights)))
    loaded.when_loaded(lambda worker: seen.append(("second", worker.weights)))
    worker = getattr(module, proof.WORKERS[name])()
    assert seen == []
    assert worker.load_model("real", dummy=True) == "loaded real, True"
    assert seen == [("first", "real"), ("second", "real")]
    worker.load_model("other")
    assert seen[2:] == [("first", "other"), ("second", "other")]


def test_nobody_is_called_for_a_model_that_was_not_loaded() -> None:
    name = next(iter(proof.WORKERS))
    module = module_of(name, Worker)
    loaded.decide_after_load(module)
    seen: list[Any] = []
    loaded.when_loaded(seen.append)
    with pytest.raises(FileNotFoundError):
        getattr(module, proof.WORKERS[name])().load_model("none")
    assert seen == []


def test_what_strict_raises_reaches_the_worker() -> None:
    name = next(iter(proof.WORKERS))
    module = module_of(name, Worker)
    loaded.decide_after_load(module)

    def stop(worker: Any) -> None:
        raise RuntimeError("strict")

    loaded.when_loaded(stop)
    with pytest.raises(RuntimeError, match="strict"):
        getattr(module, proof.WORKERS[name])().load_model("real")


def test_a_worker_that_inherits_the_method_calls_who_waits_for_each_class() -> None:
    """vLLM's CPU worker inherits from the GPU's: who waits has to bear a second call with nothing new."""
    gpu, cpu = proof.WORKERS
    first = module_of(gpu, Worker)
    second = types.ModuleType(cpu)
    setattr(second, proof.WORKERS[cpu], type("CPUWorker", (getattr(first, proof.WORKERS[gpu]),), {}))
    loaded.decide_after_load(first)
    loaded.decide_after_load(second)
    seen: list[Any] = []
    loaded.when_loaded(seen.append)
    worker = getattr(second, proof.WORKERS[cpu])()
    worker.load_model("real")
    assert seen == [worker, worker]
    getattr(first, proof.WORKERS[gpu])().load_model("real")
    assert len(seen) == 3


def test_vllms_workers_have_the_method() -> None:
    """Read, not imported: the import takes ten seconds."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    root = pathlib.Path(found.origin).parent
    tree = ast.parse((root / "v1" / "worker" / "gpu_worker.py").read_text("utf-8"))
    (worker,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Worker")
    assert "load_model" in {node.name for node in worker.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("taken", [0, 32 << 20, -(1 << 20)])
def test_what_stays_allocated_counts_as_the_models(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sizes its KV cache by what the model took when it was loaded, and asks for that before this moment."""
    name = next(iter(proof.WORKERS))
    module = module_of(name, Worker)
    loaded.decide_after_load(module)
    allocated = [1 << 30]
    monkeypatch.setattr(loaded, "_allocated_bytes", lambda: allocated[0])
    loaded.when_loaded(lambda worker: allocated.__setitem__(0, allocated[0] + taken))
    worker = getattr(module, proof.WORKERS[name])()
    worker.load_model("real")
    worker.model_runner = types.SimpleNamespace(model_memory_usage=1000)
    worker.load_model("real")
    assert worker.model_runner.model_memory_usage == 1000 + max(taken, 0)


def test_a_process_without_a_gpu_has_allocated_nothing() -> None:
    assert loaded._allocated_bytes() == 0
