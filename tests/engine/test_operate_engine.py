"""What an operator relies on, in a real vLLM: the second door, and what a server says of the overlay on /metrics."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from devtools import journals, plugin_metadata, servers, tiny_models
from devtools.soak import load
from tests.conftest import REPOSITORY
from tests.engine.conftest import FEW_PROCESSES, PASS_THROUGH, Run, run_engine

pytestmark = pytest.mark.engine

MODEL = "qwen3_5_text"
SERVED = "qwen3_5"
LAYERS = tiny_models.gdn_layers(MODEL)


@pytest.fixture
def mounted(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that holds the package and its metadata, and no sitecustomize.py."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    (folder / "overlay").symlink_to(REPOSITORY / "overlay")
    plugin_metadata.write(REPOSITORY, folder)
    return folder


@pytest.mark.parametrize("door", ["the plugin", "both doors"])
def test_through_the_plugin_the_engine_is_patched_once(
    door: str,
    mounted: pathlib.Path,
    engine: Callable[..., Run],
    model: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    run = run_engine(
        model(MODEL),
        tmp_path / "run",
        overlay=door == "both doors",
        behind=mounted,
        **PASS_THROUGH,
        **FEW_PROCESSES,
        VLLMOVERLAY_PATCHES="gdn",
        VLLMOVERLAY_JOURNAL_DIR=str(tmp_path / "run" / "journals"),
    )
    assert run.answers == engine(MODEL, overlay=False).answers
    (main,) = run.workers
    assert main.layers == LAYERS and main.calls > 0 and not main.problems
    processes = [journal.process_id for journal in run.journals]
    assert len(processes) == len(set(processes))
    # The process that vLLM asks about a model keeps its log to itself.
    assert run.log.count("gdn: apply, ") == 1
    # Which door was the first to open.
    assert main.transformers == ("was imported before vllm" if door == "the plugin" else "imported first")


@pytest.mark.parametrize(
    ("allowed", "armed"), [(None, True), ("lora_filesystem_resolver,auxstream_overlay", True), ("another", False)]
)
def test_the_allowlist_of_vllm_decides(
    mounted: pathlib.Path, tmp_path: pathlib.Path, allowed: str | None, armed: bool
) -> None:
    extra = {} if allowed is None else {"VLLM_PLUGINS": allowed}
    base = {**os.environ, "PYTHONPATH": str(mounted)}
    code = """
import sys
from vllm.plugins import load_general_plugins
before = "overlay.start.import_hooks" in sys.modules
load_general_plugins()
print(before, "overlay.start.import_hooks" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=servers.environment(False, tmp_path, base, {**servers.cpu_environment(), **extra}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-2:] == ["False", str(armed)]


Samples = dict[tuple[str, ...], float]


def scrape(server: servers.Server) -> dict[str, Samples]:
    """The overlay's samples on /metrics: by name, then by the values of their labels."""
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    assert "vllm:num_requests_running" in page, "vLLM's own metrics have to stay"
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("vllm_overlay"):
                of_name = found.setdefault(sample.name, {})
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                assert labels not in of_name, "the same sample twice: Prometheus drops the page"
                of_name[labels] = sample.value
    return found


def overlay_records(log_path: pathlib.Path) -> list[dict[str, Any]]:
    """The overlay's lines of a server that logs JSON, in order; a line of it that is not JSON is an error."""
    mentioned = [line for line in log_path.read_text().splitlines() if "vllm.overlay" in line or '"overlay"' in line]
    found: list[dict[str, Any]] = [json.loads(line) for line in mentioned]
    assert {record["name"] for record in found} == {"vllm.overlay"}
    assert "overlay: " not in "".join(line for line in log_path.read_text().splitlines() if line not in mentioned)
    return found


def endure(server: servers.Server) -> None:
    """Some seconds of a soak: requests from several clients, some of whom hang up; then the same answers as before."""
    stop = threading.Event()
    pool = load.make_pool([], lengths=(3, 40), per_length=3)
    margins: dict[str, load.Margins] = {}
    before = load.alone(server, pool, stop, margins)
    reference = {name: tokens for name, tokens in before.items() if not isinstance(tokens, str)}
    assert len(reference) == len(pool), before
    tally = load.Tally()
    # With this seed the clients' first requests are of all three kinds, so a slow machine meets them as well.
    load.put_load(server, pool, reference, margins, tally, seconds=5, clients=4, seed=2, stop=stop)
    assert not tally.errors and set(tally.sent) == set(load.WEIGHTS)
    assert load.wait_until_idle(server, stop) == 0
    assert load.alone(server, pool, stop) == before


@pytest.mark.parametrize("api_servers", [1, 2])
def test_a_server_says_on_metrics_what_its_journals_say(
    api_servers: int, model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """With one API server vLLM's registry is prometheus_client's own; with two it is made anew, in multiprocess mode."""
    arguments = (*tiny_models.serve_arguments(SERVED), "--enforce-eager", "--logging-config.formatter", "json")
    if api_servers > 1:
        arguments += ("--api-server-count", str(api_servers))
    with servers.serve(
        sys.executable,
        model(SERVED),
        overlay=True,
        folder=tmp_path / "server",
        env={**servers.cpu_environment(), **PASS_THROUGH},
        args=arguments,
    ) as server:
        before = scrape(server)["vllm_overlay_calls_total"]
        server.client().completions.create(model=servers.MODEL_NAME, prompt="Hello world", max_tokens=5, temperature=0)
        written = server.journals()
        found = scrape(server)
        assert scrape(server) == found, "a scrape changes nothing"
        if api_servers == 1:
            endure(server)
    assert journals.why_without_effect(written, tiny_models.gdn_layers(SERVED)) is None
    (worker,) = [journal for journal in written if journal.layers]

    assert list(found["vllm_overlay_info"]) == [(worker.fingerprint, worker.overlay, worker.vllm)]
    (gdn,) = [patch for patch in worker.patches if patch.name == "gdn"]
    assert found["vllm_overlay_layers"]["gdn", worker.role, "patched"] == len(gdn.layers) > 0
    assert found["vllm_overlay_layers"]["gdn", worker.role, "refused"] == len(gdn.refused)
    calls = found["vllm_overlay_calls_total"]
    assert calls["dual_stream", "gdn", worker.role, "dual_stream"] == gdn.dual_stream_calls
    for reason, count in gdn.serial_calls.items():
        assert calls["serial", "gdn", worker.role, f"serial: {reason}"] == count
    assert sum(calls.values()) == sum(journal.calls for journal in written) > sum(before.values())

    said = overlay_records(server.log_path)
    assert [record["overlay"]["event"] for record in said] == ["armed", "summary"], "one line of a process each"
    armed, summary = said
    assert armed["levelname"] == summary["levelname"] == "INFO"
    assert (armed["process"], summary["process"]) == (server.process.pid, worker.process_id)
    facts = summary["overlay"]
    assert (facts["version"], facts["vllm"], facts["fingerprint"]) == (
        worker.overlay,
        worker.vllm,
        worker.fingerprint,
    )
    assert facts["problems"] == 0 and not facts["removable"]
    assert facts["patches"].keys() == {patch.name for patch in worker.patches}
    assert facts["patches"]["gdn"]["layers_patched"] == len(gdn.layers)
    assert facts["patches"]["gdn"]["layers_refused"] == {} and facts["patches"]["pooling"]["state"] == "landed"
    assert f"gdn: apply, {len(gdn.layers)} layers patched, op " in summary["message"]
    states = found["vllm_overlay_patch_state"]
    assert set(states.values()) == {1.0}
    assert states["gdn", worker.role, "apply"] == 1.0
    # Label names in order: patch, process, state. The process that vLLM asks about a model has ended.
    roles = {process for _, process, _ in states}
    assert worker.role in roles and "APIServer" in roles and "ModelRegistryProbe" not in roles
    assert sum(role.startswith("ApiServer") for role in roles) == (api_servers if api_servers > 1 else 0)
