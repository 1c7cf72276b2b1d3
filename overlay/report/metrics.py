"""The overlay's metrics, on the ``/metrics`` that vLLM's API server already has.

- ``vllm_overlay_info{version,vllm,fingerprint}``: 1
- ``vllm_overlay_patch_state{process,patch,state}``: 1 for the state that the patch has in the process
- ``vllm_overlay_layers{process,patch,state="patched"|"refused"}``: a number of layers
- ``vllm_overlay_calls_total{process,patch,kind,strategy}``: calls of the op. `kind` is ``dual_stream``, ``fused`` or
  ``serial``, for sums. `strategy` is the same, but ``serial: <why>`` has the reason
- ``vllm_overlay_tuning_seconds{process,patch,source="measured"|"read"}``: seconds that the plans took at start

`process` is vLLM's name for the process (``VllmWorker-0``, ``EngineCore_DP0``), not its number, so a restart makes no new
series. A call inside a CUDA graph is counted when the graph is captured; a replay makes no call.

The counters live in the workers and the route in the API server, so a scrape reads the workers' journals. Nothing is sent
between processes, nothing happens without a scrape, and the numbers are about a second old.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from overlay import __version__
from overlay.report import journal_reader as reader
from overlay.report import process_identity
from overlay.report.journal import journal
from overlay.vocabulary import API_SERVER, MAIN, SERIAL

#: The function that decides which registry the route shows, in import_hooks.METRICS_MODULE (vLLM 0.17.1 to 0.33.0).
_GIVES_REGISTRY = "get_prometheus_registry"
_LONGEST_LABEL = 120

_shown: weakref.WeakSet[Any] = weakref.WeakSet()


def publish(module: ModuleType) -> None:
    """Add the overlay's metrics to every registry that the route shows from now on.

    One API server shows the registry that vLLM's function returns. With several, the library that makes the route
    (prometheus_fastapi_instrumentator) makes a registry per scrape instead, and gives it to prometheus_client's collector
    of all processes. So that collector is wrapped too.
    """
    import wrapt
    from prometheus_client import multiprocess

    if not hasattr(module, _GIVES_REGISTRY):
        journal.problem(
            f"metrics: this vLLM has no {module.__name__}.{_GIVES_REGISTRY}; /metrics says nothing of the overlay"
        )
        return

    def give(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any) -> Any:
        registry = wrapped(*args, **kwargs)
        _show(registry)
        return registry

    def collect_all(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        registry = args[0] if args else kwargs.get("registry")
        if registry is not None:
            _show(registry)

    wrapt.wrap_function_wrapper(module, _GIVES_REGISTRY, give)
    wrapt.wrap_function_wrapper(multiprocess, "MultiProcessCollector.__init__", collect_all)


def _show(registry: Any) -> None:
    """Add the metrics once per registry. A registry that refuses them stays as it is."""
    try:
        if registry not in _shown:
            _shown.add(registry)
            registry.register(Collector())
    except Exception as error:
        journal.problem(f"metrics: not on /metrics: {type(error).__name__}: {error}")


class Collector:
    """A custom collector of prometheus_client. Each scrape calls it, and it never makes a scrape fail."""

    def __init__(self) -> None:
        self._failed = False

    def describe(self) -> list[Any]:
        """The names of the metrics. With them a registry need not call `collect`, which reads files."""
        return _families([])

    def collect(self) -> list[Any]:
        try:
            journal.write()  # this process may have no thread that writes it
            return _families(of_this_server(journal.folder))
        except Exception as error:
            if not self._failed:
                self._failed = True
                journal.problem(f"metrics: /metrics says nothing of the overlay: {type(error).__name__}: {error}")
            return []


def of_this_server(folder: str | None) -> list[reader.Journal]:
    """The journals of the living processes that belong to this process's server, in the order of their start.

    Processes of a server are found by who started whom. The environment would not do, because everything that a launcher
    starts has the same one. The search goes from this process up to the first process whose descendants run an engine.
    vLLM's additional API servers are siblings of the engines, but each server that a supervisor or a launcher starts has an
    engine of its own. The search enters no server, above or below, that was started as a program of its own.
    """
    if folder is None:
        return []
    here = process_identity.own()
    found, _ = reader.load(Path(folder), lambda name: process_identity.runs_beside(name, here))
    return _server_of(os.getpid(), {one.process_id: one for one in found if one.alive})


def _server_of(process_id: int, living: dict[int, reader.Journal]) -> list[reader.Journal]:
    lines = {number: _line(one, living) for number, one in living.items()}
    tree: list[reader.Journal] = []
    for top in lines.get(process_id, ()):
        tree = [one for number, one in living.items() if top in lines[number]]
        if any(map(_runs_an_engine, tree)):
            break
    return tree


def _line(one: reader.Journal, living: dict[int, reader.Journal]) -> list[int]:
    """The process and its ancestors, up to the first one that was started as a program of its own."""
    line = [one.process_id]
    while one.role not in (API_SERVER, MAIN) and one.parent in living:
        parent = living[one.parent]
        given_out_again = parent.identity and one.identity and parent.identity.start > one.identity.start
        if given_out_again or parent.process_id in line:
            break
        line.append(parent.process_id)
        one = parent
    return line


def _runs_an_engine(one: reader.Journal) -> bool:
    return bool(one.raw.get("loop")) or any(patch.layers or patch.refused for patch in one.patches)


def _families(journals: list[reader.Journal]) -> list[Any]:
    """prometheus_client's metric families of these journals. Processes of one name are added up."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    info = InfoMetricFamily("vllm_overlay", "The overlay in this server, and the fingerprint of what it applied.")
    states = GaugeMetricFamily(
        "vllm_overlay_patch_state", "1 for the state of a patch in a process.", labels=["process", "patch", "state"]
    )
    layers = GaugeMetricFamily(
        "vllm_overlay_layers", "Layers that are patched, or left stock.", labels=["process", "patch", "state"]
    )
    calls = CounterMetricFamily(
        "vllm_overlay_calls", "Calls of a patch's op by strategy.", labels=["process", "patch", "kind", "strategy"]
    )
    tuning = GaugeMetricFamily(
        "vllm_overlay_tuning_seconds", "What the plans took at start.", labels=["process", "patch", "source"]
    )
    # A process without layers has imported other parts of vLLM, and so has another fingerprint.
    telling = [one for one in journals if one.layers] or journals[:1]
    builds = {(one.overlay or __version__, one.vllm or "", one.fingerprint or "") for one in telling}
    for version, vllm, fingerprint in sorted(builds):
        info.add_metric([], {"version": _label(version), "vllm": _label(vllm), "fingerprint": _label(fingerprint)})
    state_values: dict[tuple[str, str, str], float] = {}
    layer_values: dict[tuple[str, str, str], float] = defaultdict(float)
    call_values: dict[tuple[str, str, str, str], float] = defaultdict(float)
    tuning_values: dict[tuple[str, str, str], float] = defaultdict(float)
    for one in journals:
        role = _label(one.role)
        for patch in one.patches:
            name = _label(patch.name)
            state_values[role, name, _label(patch.verdict)] = 1.0
            if patch.layers or patch.refused:
                layer_values[role, name, "patched"] += len(patch.layers)
                layer_values[role, name, "refused"] += len(patch.refused)
                call_values[role, name, "dual_stream", "dual_stream"] += patch.dual_stream_calls
            if patch.fused_calls:
                call_values[role, name, "fused", "fused"] += patch.fused_calls
            for plan in patch.plans:
                tuning_values[role, name, _label(plan.source)] += plan.seconds
            for reason, count in patch.serial_calls.items():
                call_values[role, name, SERIAL, _label(f"{SERIAL}: {reason}")] += count
    families = ((states, state_values), (layers, layer_values), (calls, call_values), (tuning, tuning_values))
    for family, values in families:
        for labels, value in values.items():
            family.add_metric(labels, value)
    return [info, states, layers, calls, tuning]


def _label(text: str) -> str:
    """A short label that can be encoded. One that cannot would make the whole page fail."""
    return text.encode("utf-8", "replace").decode()[:_LONGEST_LABEL]
