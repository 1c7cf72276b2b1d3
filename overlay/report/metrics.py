"""What the overlay does, on the ``/metrics`` that vLLM's API server has already.

- ``vllm_overlay_info{version,vllm,fingerprint}``: 1
- ``vllm_overlay_patch_state{process,patch,state}``: 1 for the state that the patch has in the process
- ``vllm_overlay_layers{process,patch,state="patched"|"refused"}``: a number of layers
- ``vllm_overlay_calls_total{process,patch,kind,strategy}``: calls of the op; `kind` is ``dual_stream``, ``fused`` or
  ``serial``, to add up by; `strategy` is the same with the reason, ``serial: <why>``
- ``vllm_overlay_tuning_seconds{process,patch,source="measured"|"read"}``: what the plans took at start

`process` is what vLLM calls the process (``VllmWorker-0``, ``EngineCore_DP0``), not its number: a restart makes no new
series. Inside a CUDA graph a call is counted when it is captured, and a replay calls nothing.

The counters live in the workers and the route in the API server, so a scrape reads the workers' journals: nothing is sent
between processes, nothing happens unless somebody scrapes, and the numbers are about a second old.
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
    """Add the overlay's metrics to every registry that is shown on the route from now on.

    One API server shows the registry that vLLM's function gives out. With several, the library that makes the route
    (prometheus_fastapi_instrumentator) makes a registry per scrape instead, and gives it to prometheus_client's collector
    of all processes; so that one is waited for, too.
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
    """Once per registry; one that will not have it stays as it is."""
    try:
        if registry not in _shown:
            _shown.add(registry)
            registry.register(Collector())
    except Exception as error:
        journal.problem(f"metrics: not on /metrics: {type(error).__name__}: {error}")


class Collector:
    """A custom collector of prometheus_client: asked at each scrape, and never the reason that one fails."""

    def __init__(self) -> None:
        self._failed = False

    def describe(self) -> list[Any]:
        """The names, so that a registry can tell what is whose without reading a file."""
        return _families([])

    def collect(self) -> list[Any]:
        try:
            journal.write()  # this process may have no thread that does it
            return _families(of_this_server(journal.folder))
        except Exception as error:
            if not self._failed:
                self._failed = True
                journal.problem(f"metrics: /metrics says nothing of the overlay: {type(error).__name__}: {error}")
            return []


def of_this_server(folder: str | None) -> list[reader.Journal]:
    """The journals of the living processes that belong to this process's server, in the order of their start.

    What links the processes of a server is who started whom. The environment would not do: everything that a launcher
    starts has the same. From this process the way goes up to the first whose descendants run an engine: vLLM's additional
    API servers are siblings of theirs, but the servers that a supervisor or a launcher starts have one each. It does not
    go above or below into a server that somebody has started as a program of its own.
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
    """The process and those that it descends from, up to the one that somebody has started as a program of its own."""
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
    """prometheus_client's metric families of these journals; processes of one name are added up."""
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
    # A process that holds no layers has imported another part of vLLM, and so has another fingerprint.
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
    """Short, and something that can be encoded: one label that cannot would take the whole page down."""
    return text.encode("utf-8", "replace").decode()[:_LONGEST_LABEL]
