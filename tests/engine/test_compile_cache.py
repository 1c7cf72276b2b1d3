"""vLLM's compile cache knows the overlay: neither side ever loads what the other one compiled.

One cache folder, separate processes: stock fills it, the overlay must not take that graph (the op would never run), and
stock must not take the overlay's (it would call an op that does not exist there). With Inductor, because vLLM caches
nothing for the eager backend that the other engine tests use; stock's second start shows that it does cache here.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import pytest

from tests.engine.conftest import PASS_THROUGH, Run, run_engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU, and there is none"),
]
LOADED = "Directly load AOT compilation"


def test_one_cache_folder_three_runs(model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    shared = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    shared["VLLM_CPU_CI_ENV"] = "0"

    def run(name: str, overlay: bool) -> Run:
        settings = {**shared, **(PASS_THROUGH if overlay else {})}
        return run_engine(model("qwen3_5_text"), tmp_path / name, overlay=overlay, compiled=True, **settings)

    stock, overlay, again = run("stock", False), run("overlay", True), run("again", False)
    assert LOADED not in stock.log and LOADED in again.log, "nothing is cached here, so the test shows nothing"
    assert LOADED not in overlay.log
    assert stock.answers == overlay.answers == again.answers
    assert overlay.fake_calls() > 0, "the overlay loaded the graph that stock had compiled"
    assert overlay.calls() > 0
    assert "gdn_in_proj" not in again.log
    (fingerprint,) = {journal.raw["fingerprint"] for journal in overlay.workers}
    assert fingerprint
