"""Engine runs for the tests: each distinct run happens once in a session, and its result is shared."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from devtools import demo, servers
from overlay.report import journal_reader as journal_files
from tests.conftest import REPOSITORY

RUN_SECONDS = 300.0
#: A test starts up to three engines that no other test has started yet, on cores that have other work.
TEST_SECONDS = 900.0
PASS_THROUGH = {"VLLMOVERLAY_SERIAL_PASS_THROUGH": "1", "VLLMOVERLAY_STRICT": "1"}
#: The engine in the process that asks for it, tensor parallelism's other ones forked. Each process that vLLM starts anew
#: imports for twelve seconds; where nothing but tokens and layers is asked for, nobody needs to wait for that.
FEW_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork"}
#: With the overlay, and compiled, this model's engines have the processes that vLLM gives them.
ALL_PROCESSES = "qwen3_5_text"


#: Files that want the same engines. Their tests run in one process. Each other file stays in one process as well.
SHARING = ("test_ray_engine.py", "test_gdn_engine.py")
#: The files that take longest come first, so that no worker is left with one of them at the end.
LONGEST = (*SHARING, "test_soak_engine.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        item.add_marker(pytest.mark.timeout(TEST_SECONDS))
        item.add_marker(pytest.mark.xdist_group("sharing" if item.path.name in SHARING else item.path.name))


#: What vLLM has found out about models, from the last run. It asks a process of its own about each, some seconds every time.
_known_models: list[pathlib.Path] = []


@dataclass(frozen=True)
class Run:
    """What one offline engine answered, and what its processes wrote of themselves."""

    answers: dict[str, Any]
    journals: list[journal_files.Journal]
    log: str
    seconds: float
    returncode: int = 0

    @property
    def workers(self) -> list[journal_files.Journal]:
        """The processes that hold layers."""
        return [journal for journal in self.journals if journal.layers]

    def calls(self) -> int:
        return sum(journal.calls for journal in self.journals)

    def fake_calls(self) -> int:
        return sum(patch.fake_calls for journal in self.journals for patch in journal.patches)


@pytest.fixture(scope="session")
def model() -> Callable[[str], pathlib.Path]:
    """The folder of a tiny model by name; on first use it is made, or made anew where its recipe has changed."""

    @functools.cache
    def build(name: str) -> pathlib.Path:
        demo.make_models([name])
        return demo.MODELS_FOLDER / name

    return build


def run_offline(
    python: str, request: dict[str, Any], environment: dict[str, str], folder: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """offline.py in a process of its own; its answers are in `folder`/answers.json."""
    return subprocess.run(
        [python, str(REPOSITORY / "tests" / "engine" / "offline.py"), json.dumps(request), "answers.json"],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )


def run_engine(
    model: pathlib.Path,
    folder: pathlib.Path,
    *,
    overlay: bool,
    compiled: bool = False,
    tensor_parallel_size: int = 1,
    adapters: Sequence[pathlib.Path] = (),
    behind: pathlib.Path | None = None,
    options: dict[str, Any] | None = None,
    may_fail: bool = False,
    **settings: str,
) -> Run:
    """One offline engine in processes of its own, stock or with the overlay by PYTHONPATH alone.

    With two `adapters` it plays the scenario in which adapters come and go. `behind` is a folder that comes after the overlay's on PYTHONPATH.
    `options` are the engine's own. A run that fails is an error unless it `may_fail`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "model": str(model),
        "compiled": compiled,
        "tensor_parallel_size": tensor_parallel_size,
        "adapters": [str(adapter) for adapter in adapters],
        "options": options or {},
    }
    extra = {**servers.cpu_environment(), **settings}
    base = {**os.environ, "PYTHONPATH": str(behind)} if behind else os.environ
    environment = servers.environment(overlay, folder, base, extra)
    infos = pathlib.Path(environment["VLLM_CACHE_ROOT"]) / "modelinfos"
    if not infos.exists() and _known_models:
        shutil.copytree(_known_models[-1], infos, dirs_exist_ok=True)
    started = time.monotonic()
    result = run_offline(sys.executable, request, environment, folder)
    if infos.exists():
        _known_models[:] = [infos]
    (folder / "engine.log").write_text(result.stdout)
    if not may_fail:
        assert result.returncode == 0, f"the engine failed, {folder}/engine.log ends:\n{result.stdout[-3000:]}"
    written = folder / "answers.json"
    return Run(
        answers=json.loads(written.read_text()) if written.exists() else {},
        journals=journal_files.read(folder / "journals"),
        log=result.stdout,
        seconds=time.monotonic() - started,
        returncode=result.returncode,
    )


@pytest.fixture(scope="session")
def engine(model: Callable[[str], pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`engine(name, overlay=…, compiled=…, …)`: the run of a tiny model; the same arguments give the same run."""
    runs: dict[tuple[Any, ...], Run] = {}

    def get(name: str, *, overlay: bool, compiled: bool = False, tensor_parallel_size: int = 1) -> Run:
        key = (name, overlay, compiled, tensor_parallel_size)
        if key not in runs:
            runs[key] = run_engine(
                model(name),
                tmp_path_factory.mktemp("engine"),
                overlay=overlay,
                compiled=compiled,
                tensor_parallel_size=tensor_parallel_size,
                **(PASS_THROUGH if overlay else {}),
                **({} if overlay and compiled and name == ALL_PROCESSES else FEW_PROCESSES),
            )
        return runs[key]

    return get
