"""What a scrape shows: the journals of this server's living processes, and never an error."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.report import journal_reader as reader
from overlay.report import metrics, process_identity
from overlay.report.journal import OwnJournal
from overlay.report.process_identity import Identity
from overlay.start import import_hooks
from tests.conftest import journal_name

prometheus_client = pytest.importorskip("prometheus_client")
multiprocess = pytest.importorskip("prometheus_client.multiprocess")

GDN = {
    "verdict": "apply",
    "layers": {"patched": {"a": {}, "b": {}}, "refused": {"c": "quantized"}},
    "calls": {"fake": 9, "dual_stream": 5, "serial": {"above the token threshold": 3}},
}
#: With plans: of two shapes measured, and of a third read.
PLANNED = {
    **GDN,
    "calls": {"fake": 9, "dual_stream": 5, "fused": 7, "serial": {}},
    "plans": [
        {"shape": {}, "layers": 1, "source": "measured", "seconds": 1.25, "rows": []},
        {"shape": {}, "layers": 1, "source": "measured", "seconds": 0.5, "rows": []},
        {"shape": {}, "layers": 1, "source": "read", "seconds": 0.125, "rows": []},
    ],
}


@pytest.fixture
def process() -> Iterator[Callable[[], int]]:
    """Starts processes that live as long as the test, for journals to belong to."""
    started = []

    def start() -> int:
        started.append(subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE))
        return started[-1].pid

    yield start
    for child in started:
        child.kill()
        child.wait()
        if child.stdin:
            child.stdin.close()


@pytest.fixture
def own(journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> OwnJournal:
    """This process's journal, in a folder of the test's own."""
    fresh = OwnJournal()
    fresh.open(str(journal_folder))
    monkeypatch.setattr(metrics, "journal", fresh)
    return fresh


def write(folder: pathlib.Path, pid: int, parent: int, role: str, **fields: Any) -> None:
    """The journal of a process that runs."""
    (folder / journal_name(pid)).write_text(json.dumps(raw(pid, parent, role, **fields)))


def raw(pid: int, parent: int, role: str, **fields: Any) -> dict[str, Any]:
    return {"schema": 1, "pid": pid, "parent": parent, "role": role, "started": time.time(), **fields}


def family(*members: tuple[int, int, str, dict[str, Any]]) -> dict[int, reader.OwnJournal]:
    """Living processes by number, in the order of their start: number, parent, role, and further fields."""
    journals = [reader.parse(raw(pid, parent, role, **fields)) for pid, parent, role, fields in members]
    return {
        one.process_id: dataclasses.replace(one, alive=True, identity=Identity(one.process_id, start, 1, "boot"))
        for start, one in enumerate(journals)
    }


def page(registry: Any = None) -> str:
    if registry is None:
        registry = prometheus_client.CollectorRegistry(auto_describe=True)
        registry.register(metrics.Collector())
    text: str = prometheus_client.generate_latest(registry).decode()
    return text


def samples(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_numbers_of_a_server(
    journal_folder: pathlib.Path, own: OwnJournal, process: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, worker, other = process(), process(), process()
    build = {"overlay": "0.1.0", "vllm": "0.33.0"}
    write(journal_folder, engine, os.getpid(), "EngineCore", patches={"gdn": {"verdict": "not seen"}}, **build)
    write(journal_folder, worker, engine, "VllmWorker-0", patches={"gdn": GDN}, fingerprint="abc", **build)
    write(journal_folder, other, 1, "VllmWorker-9", patches={"gdn": GDN}, fingerprint="another server's", **build)
    gone = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    write(journal_folder, gone.pid, os.getpid(), "VllmWorker-0", patches={"gdn": GDN}, fingerprint="old", **build)
    gone.communicate()
    assert samples(page()) == [
        'vllm_overlay_info{fingerprint="abc",version="0.1.0",vllm="0.33.0"} 1.0',
        'vllm_overlay_patch_state{patch="gdn",process="EngineCore",state="not seen"} 1.0',
        'vllm_overlay_patch_state{patch="gdn",process="VllmWorker-0",state="apply"} 1.0',
        'vllm_overlay_layers{patch="gdn",process="VllmWorker-0",state="patched"} 2.0',
        'vllm_overlay_layers{patch="gdn",process="VllmWorker-0",state="refused"} 1.0',
        'vllm_overlay_calls_total{kind="dual_stream",patch="gdn",process="VllmWorker-0",strategy="dual_stream"} 5.0',
        'vllm_overlay_calls_total{kind="serial",patch="gdn",process="VllmWorker-0",strategy="serial: above the token threshold"} 3.0',
    ]


def test_calls_by_one_gemm_and_what_plans_took(
    journal_folder: pathlib.Path, own: OwnJournal, process: Callable[[], int]
) -> None:
    for _ in range(2):
        write(journal_folder, process(), os.getpid(), "VllmWorker-0", patches={"gdn": PLANNED})
    text = page()
    found = [line for line in samples(text) if "_calls_total{" in line or "tuning" in line]
    assert found == [
        'vllm_overlay_calls_total{kind="dual_stream",patch="gdn",process="VllmWorker-0",strategy="dual_stream"} 10.0',
        'vllm_overlay_calls_total{kind="fused",patch="gdn",process="VllmWorker-0",strategy="fused"} 14.0',
        'vllm_overlay_tuning_seconds{patch="gdn",process="VllmWorker-0",source="measured"} 3.5',
        'vllm_overlay_tuning_seconds{patch="gdn",process="VllmWorker-0",source="read"} 0.25',
    ]
    assert "# TYPE vllm_overlay_tuning_seconds gauge" in text


ENGINE: dict[str, Any] = {"loop": "EngineCoreProc.run_busy_loop"}
NO_ENGINE: dict[str, Any] = {}
LAYERS = {"patches": {"gdn": GDN}}


@pytest.mark.parametrize(
    ("asked", "expected", "members"),
    [
        pytest.param(
            2, {2, 3}, [(1, 0, "Main", LAYERS), (2, 1, "APIServer", NO_ENGINE), (3, 2, "EngineCore", ENGINE)],
            id="whoever started the server is not part of it",
        ),
        pytest.param(
            3, {2, 3, 4, 5, 6},
            [
                (2, 1, "APIServer", NO_ENGINE), (3, 2, "ApiServer_0", NO_ENGINE), (4, 2, "ApiServer_1", NO_ENGINE),
                (5, 2, "EngineCore_DP0", ENGINE), (6, 5, "VllmWorker-0", ENGINE),
            ],
            id="one of several API servers speaks for all: the engine is its sibling",
        ),
        pytest.param(
            2, {2, 4},
            [
                (1, 0, "APIServer", NO_ENGINE), (2, 1, "APIServer_DPRank_0", NO_ENGINE),
                (3, 1, "APIServer_DPRank_1", NO_ENGINE), (4, 2, "EngineCore_DP0", ENGINE), (5, 3, "EngineCore_DP1", ENGINE),
            ],
            id="the servers of vLLM's supervisor have an engine and a /metrics each",
        ),
        pytest.param(
            2, {2}, [(1, 0, "Main", NO_ENGINE), (2, 1, "Process-1", LAYERS), (3, 1, "Process-2", LAYERS)],
            id="servers that somebody's program has started, with the engine inside",
        ),
        pytest.param(
            1, {1, 2}, [
                (1, 0, "APIServer", NO_ENGINE), (2, 1, "EngineCore", ENGINE),
                (3, 1, "APIServer", NO_ENGINE), (4, 3, "EngineCore", ENGINE),
            ],
            id="process 1 of a container is the parent of every orphan, another server among them",
        ),
        pytest.param(
            3, {3, 4}, [(2, 3, "EngineCore", ENGINE), (3, 0, "APIServer", NO_ENGINE), (4, 3, "EngineCore", ENGINE)],
            id="a process that is older than its parent had another, whose number was given out again",
        ),
        pytest.param(
            1, {1, 2}, [(1, 2, "a", NO_ENGINE), (2, 1, "b", NO_ENGINE)],
            id="parents in a circle end",
        ),
        pytest.param(1, {1}, [(1, 0, "APIServer", NO_ENGINE)], id="engines on other nodes"),
        pytest.param(1, set(), [(2, 1, "EngineCore", ENGINE)], id="a process without a journal"),
    ],
)  # fmt: skip
def test_who_belongs_to_a_server(
    asked: int, expected: set[int], members: list[tuple[int, int, str, dict[str, Any]]]
) -> None:
    assert {one.process_id for one in metrics._server_of(asked, family(*members))} == expected


def test_a_process_of_another_container_or_of_another_time_is_not_shown(
    journal_folder: pathlib.Path, own: OwnJournal, process: Callable[[], int]
) -> None:
    """Both would be children of this server's by number."""
    number = process()
    write(journal_folder, number, os.getpid(), "VllmWorker-0", patches={"gdn": GDN})
    shown = samples(page())
    assert 'process="VllmWorker-0"' in "".join(shown)
    here = process_identity.from_name(journal_name(number))
    assert here is not None
    for other in (here._replace(namespace=here.namespace + 1), here._replace(start=here.start - 1)):
        content = raw(number, os.getpid(), "VllmWorker-9", patches={"gdn": GDN})
        (journal_folder / process_identity.file_name(other)).write_text(json.dumps(content))
    assert samples(page()) == shown


def test_processes_of_one_name_are_added_up(
    journal_folder: pathlib.Path, own: OwnJournal, process: Callable[[], int]
) -> None:
    for _ in range(2):
        write(journal_folder, process(), os.getpid(), "EngineCore", patches={"gdn": GDN})
    text = page()
    assert (
        'vllm_overlay_calls_total{kind="dual_stream",patch="gdn",process="EngineCore",strategy="dual_stream"} 10.0'
        in text
    )
    for state, layers in (("patched", 4.0), ("refused", 2.0)):
        assert f'vllm_overlay_layers{{patch="gdn",process="EngineCore",state="{state}"}} {layers}' in text
    assert text.count("vllm_overlay_patch_state{") == 1


def test_a_process_without_a_journal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "journal", OwnJournal())
    assert samples(page()) == []


def test_a_journal_that_vanished_is_back_at_the_next_scrape(own: OwnJournal, journal_folder: pathlib.Path) -> None:
    before = samples(page())
    (path,) = journal_folder.iterdir()
    path.unlink()
    assert samples(page()) == before != []


def test_a_failure_costs_one_warning_and_no_scrape(
    own: OwnJournal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(metrics.Collector())
    prometheus_client.Gauge("vllms_own", "", registry=registry).set(7)
    monkeypatch.setattr(reader, "load", lambda *_: 1 / 0)
    assert samples(page(registry)) == ["vllms_own 7.0"] == samples(page(registry))
    assert len([record for record in caplog.records if "/metrics" in record.getMessage()]) == 1


VALUES = st.none() | st.integers() | st.text(st.characters(), max_size=5) | st.just("\ud800") | st.just('a"\n\\')
JOURNALS = st.lists(
    st.fixed_dictionaries({
        "role": VALUES, "vllm": VALUES, "overlay": VALUES, "fingerprint": VALUES,
        "patches": st.dictionaries(st.text(max_size=3), st.fixed_dictionaries({
            "verdict": VALUES,
            "layers": st.fixed_dictionaries({"patched": st.dictionaries(st.text(max_size=3), VALUES, max_size=2)}),
            "calls": st.fixed_dictionaries({
                "dual_stream": VALUES, "fused": VALUES, "serial": st.dictionaries(st.text(max_size=200), VALUES, max_size=3),
            }),
            "plans": VALUES | st.lists(VALUES | st.fixed_dictionaries({
                "source": VALUES | st.text(max_size=200), "seconds": VALUES | st.floats(), "shape": VALUES, "rows": VALUES,
            }), max_size=3),
        }), max_size=3),
    }),
    max_size=4,
)  # fmt: skip


@settings(max_examples=200)
@given(JOURNALS)
def test_whatever_a_journal_holds_the_page_can_be_parsed(raws: list[dict[str, Any]]) -> None:
    """No sample twice, nothing that cannot be encoded, no label without an end."""
    parser = pytest.importorskip("prometheus_client.parser")
    journals = [reader.parse(raw) for raw in raws]

    class Given:
        def collect(self) -> list[Any]:
            return metrics._families(journals)

    registry = prometheus_client.CollectorRegistry()
    registry.register(Given())
    text = page(registry)
    found = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(found) == len(set(found))
    assert all(len(value) <= 120 for _, labels in found for _, value in labels)


# ---------------------------------------------------------------- the way into vLLM's registry


def vllm_module(registry: Callable[[], Any]) -> types.ModuleType:
    module = types.ModuleType(import_hooks.METRICS_MODULE)
    module.get_prometheus_registry = registry  # type: ignore[attr-defined]
    return module


@pytest.fixture(autouse=True)
def restore_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = multiprocess.MultiProcessCollector
    monkeypatch.setattr(collector, "__init__", collector.__init__)


def test_one_registry_gets_it_once_and_a_new_one_each_time(
    own: OwnJournal, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    single = prometheus_client.CollectorRegistry(auto_describe=True)
    module = vllm_module(lambda: single)
    metrics.publish(module)
    assert module.get_prometheus_registry() is single and module.get_prometheus_registry() is single
    assert page(single).count("# TYPE vllm_overlay_info gauge") == 1

    # Both wrappers at once: vLLM's function in multiprocess mode.
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def make() -> Any:
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return registry

    module = vllm_module(make)
    metrics.publish(module)
    first, second = module.get_prometheus_registry(), module.get_prometheus_registry()
    assert first is not second
    assert all(page(one).count("# TYPE vllm_overlay_info gauge") == 1 for one in (first, second))


def test_the_registry_that_the_route_makes_for_one_scrape(
    own: OwnJournal, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Through the real library, as vLLM uses it: its route does not show the registry that it was given."""
    fastapi, client = pytest.importorskip("fastapi"), pytest.importorskip("fastapi.testclient")
    instrumentator = pytest.importorskip("prometheus_fastapi_instrumentator")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics.publish(vllm_module(lambda: None))
    app = fastapi.FastAPI()
    instrumentator.Instrumentator(registry=prometheus_client.CollectorRegistry()).expose(app)
    for _ in range(2):
        answer = client.TestClient(app).get("/metrics")
        assert answer.status_code == 200 and answer.text.count("# TYPE vllm_overlay_info gauge") == 1


def test_a_scrape_of_chosen_names(own: OwnJournal) -> None:
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    metrics.publish(module := vllm_module(lambda: registry))
    module.get_prometheus_registry()
    assert "vllm_overlay_info{" in page(registry.restricted_registry(["vllm_overlay_info"]))


def test_a_registry_that_will_not_have_it_stays_vllms(own: OwnJournal, caplog: pytest.LogCaptureFixture) -> None:
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    prometheus_client.Gauge("vllm_overlay_layers", "somebody else's", registry=registry).set(3)
    metrics.publish(module := vllm_module(lambda: registry))
    for _ in range(2):
        assert module.get_prometheus_registry() is registry
    assert samples(page(registry)) == ["vllm_overlay_layers 3.0"]
    assert len([record for record in caplog.records if "not on /metrics" in record.getMessage()]) == 1


def test_a_vllm_without_the_function_says_so(own: OwnJournal) -> None:
    metrics.publish(types.ModuleType(import_hooks.METRICS_MODULE))
    assert len(own.problems) == 1 and import_hooks.METRICS_MODULE in own.problems[0]
