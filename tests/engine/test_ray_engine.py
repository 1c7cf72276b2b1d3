"""Several nodes: each has an environment of its own, and vLLM's executors put the ranks of one model on them.

Two nodes on one machine, as `ray start` and `vllm serve --nnodes` make them: two raylets (or two launchers), each with its
own PYTHONPATH and its own folder for journals. vLLM's CPU platform names no resource of Ray's, so stock vLLM refuses Ray
there ("current platform cpu does not support ray"); the tests' sitecustomize names one, and the nodes say that they have
it. Nothing else of vLLM is changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from devtools import servers, tiny_models
from overlay.engine import ranks
from overlay.report import journal_reader as journal_files
from tests.engine.conftest import PASS_THROUGH, Run, run_offline

pytestmark = pytest.mark.engine
pytest.importorskip("ray")

Engine = Callable[..., Run]
MODEL = "qwen3_5_text"
NODES = 2
NODE_SECONDS = 60.0
SITE = """
import wrapt


def give_ray_a_resource(module):
    module.CpuPlatform.ray_device_key = "GPU"


def wait_less(module):
    module.DEADLINE_SECONDS = 4.0


wrapt.register_post_import_hook(give_ray_a_resource, "vllm.platforms.cpu")
wrapt.register_post_import_hook(wait_less, "overlay.engine.ranks")
"""


@dataclass(frozen=True)
class Nodes:
    """What each of two nodes has in its environment; the first is where the engine is started."""

    environments: tuple[dict[str, str], dict[str, str]]
    folders: tuple[pathlib.Path, pathlib.Path]

    def journals(self, node: int) -> list[journal_files.Journal]:
        """Those of the node's workers: the processes that were in the world, or have layers."""
        found = journal_files.read(self.folders[node] / "journals")
        return [journal for journal in found if journal.raw["agreement"] or journal.layers]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What all engines here share: the tests' sitecustomize, and what vLLM has found out about the model."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    return folder


def nodes(shared: pathlib.Path, folder: pathlib.Path, overlay: Sequence[bool], **settings: str) -> Nodes:
    environments, folders = [], []
    for node, has_overlay in enumerate(overlay):
        own = folder / f"node-{node}"
        own.mkdir()
        base = {**os.environ, "PYTHONPATH": str(shared / "site")}
        extra = {
            **servers.cpu_environment(),
            **(settings if has_overlay else {}),
            "VLLM_CACHE_ROOT": str(shared / "vllm-cache"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home folder
            "RAY_memory_monitor_refresh_ms": "0",
        }
        environments.append(servers.environment(has_overlay, own, base, extra))
        folders.append(own)
    return Nodes((environments[0], environments[1]), (folders[0], folders[1]))


def engine_on(
    first: dict[str, str], model: pathlib.Path, folder: pathlib.Path, **options: Any
) -> subprocess.CompletedProcess[str]:
    request = {
        "model": str(model),
        "compiled": True,
        "tensor_parallel_size": NODES,
        "options": options,
    }
    result = run_offline(sys.executable, request, first, folder)
    (folder / "engine.log").write_text(result.stdout)
    return result


def answers(result: subprocess.CompletedProcess[str], folder: pathlib.Path) -> dict[str, Any]:
    assert result.returncode == 0, f"the engine failed, {folder}/engine.log ends:\n{result.stdout[-3000:]}"
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


@contextlib.contextmanager
def ray_cluster(both: Nodes) -> Iterator[dict[str, str]]:
    """Two raylets with an accelerator each; gives the environment of a driver on the first. Nothing of it survives."""
    ray = str(pathlib.Path(sys.executable).with_name("ray"))
    port = servers.free_port()
    address = f"127.0.0.1:{port}"
    started: list[subprocess.Popen[bytes]] = []
    # Ray's sockets are in there, and their paths have to be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:

        def start(node: int, *arguments: str) -> None:
            with (both.folders[node] / "ray.log").open("wb") as log:
                process = subprocess.Popen(
                    [ray, "start", "--block", "--num-cpus=1", "--num-gpus=1", "--object-store-memory=80000000",
                     f"--node-ip-address=127.0.0.{node + 1}", *arguments],
                    env={**both.environments[node], "RAY_TMPDIR": place},
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            started.append(process)

        try:
            start(0, "--head", f"--port={port}", f"--temp-dir={place}", "--include-dashboard=false")
            wait_for_port(port, started[0])
            start(1, f"--address={address}")
            yield {**both.environments[0], "RAY_ADDRESS": address, "RAY_TMPDIR": place}
        finally:
            for process in started:
                end_group(process)
            end_those_that_name(place)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + NODE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"no node after {NODE_SECONDS:.0f} s, or it ended with status {process.returncode}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_those_that_name(place: str) -> None:
    """Ray's workers are in groups of their own; each has the cluster's folder on its command line or in its environment."""
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if place.encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


def assert_all_layers_are_patched_on(worker: journal_files.Journal) -> None:
    (gdn,) = (patch for patch in worker.patches if patch.name == "gdn")
    assert len(gdn.layers) == tiny_models.gdn_layers(MODEL) and gdn.calls > 0 and gdn.fake_calls > 0
    assert worker.problems == ()


def assert_all_layers_are_stock_on(worker: journal_files.Journal, reason: str) -> None:
    (gdn,) = (patch for patch in worker.patches if patch.name == "gdn")
    assert gdn.verdict == "apply" and gdn.layers == () and gdn.calls == 0
    assert list(gdn.refused.values()) == [reason] * tiny_models.gdn_layers(MODEL)
    assert worker.problems == (f"every layer stays stock: {reason}",)


def test_the_ranks_of_one_node_agree(engine: Engine) -> None:
    overlay = engine(MODEL, overlay=True, compiled=True, tensor_parallel_size=2)
    found = [journal.raw["agreement"] for journal in overlay.workers]
    assert sorted(found, key=lambda one: one["rank"]) == [
        {"world": 2, "rank": rank, "result": ranks.ALIKE} for rank in range(2)
    ]


def test_every_ray_actor_has_its_journal_and_the_tokens_are_stocks(
    engine: Engine, model: Callable[[str], pathlib.Path], shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    both = nodes(shared, tmp_path, [True, True], **PASS_THROUGH)
    with ray_cluster(both) as driver:
        result = engine_on(driver, model(MODEL), tmp_path, distributed_executor_backend="ray")
    stock = engine(MODEL, overlay=False, compiled=True, tensor_parallel_size=2)
    assert answers(result, tmp_path) == stock.answers
    found = set()
    for node in range(NODES):
        (worker,) = both.journals(node)
        assert_all_layers_are_patched_on(worker)
        assert worker.raw["agreement"]["result"] == ranks.ALIKE
        found.add(worker.raw["agreement"]["rank"])
    assert found == {0, 1}


def test_strict_stops_an_engine_whose_ray_nodes_differ(
    model: Callable[[str], pathlib.Path], shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    both = nodes(shared, tmp_path, [True, False], **PASS_THROUGH)
    with ray_cluster(both) as driver:
        result = engine_on(driver, model(MODEL), tmp_path, distributed_executor_backend="ray")
    assert result.returncode != 0
    assert re.search(r"NotAlike: vLLM stops here, as strict asks: rank [01] runs without the overlay", result.stdout)
    (worker,) = both.journals(0)
    assert all(patch.layers == () and patch.refused == {} for patch in worker.patches), "it came as far as the layers"


def without_ray(both: Nodes, model: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """The answers of an engine on two nodes. The second node is a headless `vllm serve`."""
    port = servers.free_port()
    where = {"nnodes": NODES, "master_addr": "127.0.0.1", "master_port": port}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in where.items()]
    command = [str(pathlib.Path(sys.executable).with_name("vllm")), "serve", str(model), *servers.SMALL_SERVER]
    with (both.folders[1] / "vllm.log").open("wb") as log:
        second = subprocess.Popen(
            [*command, "--headless", "--node-rank=1", f"--tensor-parallel-size={NODES}", *options, "--skip-tokenizer-init"],
            env=both.environments[1], cwd=both.folders[1],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        return answers(engine_on(both.environments[0], model, folder, node_rank=0, **where), folder)
    finally:
        end_group(second)


def test_a_node_without_the_overlay_leaves_all_ranks_stock_with_multiprocessing(
    model: Callable[[str], pathlib.Path], shared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Stock has two nodes as well: on some CPUs one node adds up the ranks' parts in another way, and has other tokens."""
    stock, folder = tmp_path / "stock", tmp_path / "overlay"
    for one in (stock, folder):
        one.mkdir()
    both = nodes(shared, folder, [True, False], VLLMOVERLAY_SERIAL_PASS_THROUGH="1")
    expected = without_ray(nodes(shared, stock, [False, False]), model(MODEL), stock)
    assert without_ray(both, model(MODEL), folder) == expected
    assert not (both.folders[1] / "journals").exists()
    (worker,) = both.journals(0)
    reason = "rank 1 runs without the overlay (no report within 4 s)"
    assert worker.raw["agreement"] == {"world": 2, "rank": 0, "result": reason}
    assert_all_layers_are_stock_on(worker, reason)
    log = (folder / "engine.log").read_text()
    (said,) = [line for line in log.splitlines() if "WARNING" in line and "overlay:" in line]
    assert f"every layer stays stock: {reason}" in said
