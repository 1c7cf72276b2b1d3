"""A real vLLM that pools, on the CPU: upstream's own `_pool` runs, the embeddings are stock's, and nothing is wrapped.

The vLLM here has the asynchronous output itself (``landed``). The step of the releases that have it not is under contract,
because their engine does not run here.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from devtools import servers
from overlay.report import journal_reader
from tests.conftest import REPOSITORY
from tests.engine.conftest import FEW_PROCESSES

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Embedded:
    answers: dict[str, list[list[float]]]
    journals: list[journal_reader.Journal]
    log: str


def embed(model: pathlib.Path, folder: pathlib.Path, overlay: bool) -> Embedded:
    """One offline engine that embeds, in a process of its own."""
    settings = {**servers.cpu_environment(), **FEW_PROCESSES, **({"VLLMOVERLAY_STRICT": "1"} if overlay else {})}
    result = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "tests" / "engine" / "offline.py"),
            json.dumps({"model": str(model), "embed": True}),
            "answers.json",
        ],
        env=servers.environment(overlay, folder, os.environ, settings),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    (folder / "engine.log").write_text(result.stdout)
    assert result.returncode == 0, f"the engine failed, {folder}/engine.log ends:\n{result.stdout[-3000:]}"
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return Embedded(answers, journal_reader.read(folder / "journals"), result.stdout)


@pytest.fixture(scope="module")
def both(model: Callable[[str], pathlib.Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedded, Embedded]:
    """Stock, and with the overlay."""
    tiny = model("qwen3")
    stock, overlay = (embed(tiny, tmp_path_factory.mktemp("embed"), side) for side in (False, True))
    return stock, overlay


def test_the_embeddings_are_stocks(both: tuple[Embedded, Embedded]) -> None:
    stock, overlay = both
    assert overlay.answers == stock.answers
    first, second, third = stock.answers["together"]
    assert all(math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-3) for vector in (first, second, third))
    assert first != second and second != third, "embeddings that do not differ would compare equal to anything"


def test_the_journal_says_landed_and_nothing_is_wrapped(both: tuple[Embedded, Embedded]) -> None:
    _, overlay = both
    records = [journal.raw["patches"]["pooling"] for journal in overlay.journals]
    seen = [record for record in records if record["module"]]
    assert seen, "no process imported the runner"
    for record in seen:
        assert record["verdict"] == "landed", record
        assert record["layers"] == {"patched": {}, "refused": {}}
        assert not any(record["calls"].values()), record
        assert record["methods"] == []
    assert {journal.raw["fingerprint"] for journal in overlay.journals} == {None}, "stock's compile cache is shared"
    assert "pooling: landed" in overlay.log
    assert not [problem for journal in overlay.journals for problem in journal.problems]
