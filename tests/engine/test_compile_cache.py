"""vLLM's compile cache knows the overlay: neither side ever loads what the other one compiled.

One cache folder, separate processes, Inductor: stock fills it, the overlay must not take that graph (the op would never
run), and stock must not take the overlay's (it would call an op that does not exist there).
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from tests.engine.conftest import PASS_THROUGH, Run, run_engine

pytestmark = pytest.mark.engine


def test_one_cache_folder_three_runs(model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    shared = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}

    def run(name: str, overlay: bool) -> Run:
        settings = {**shared, **(PASS_THROUGH if overlay else {})}
        return run_engine(model("qwen3_5_text"), tmp_path / name, overlay=overlay, compiled=True, **settings)

    stock, overlay, again = run("stock", False), run("overlay", True), run("again", False)
    assert stock.answers == overlay.answers == again.answers
    assert overlay.fake_calls() > 0, "the overlay loaded the graph that stock had compiled"
    assert overlay.calls() > 0
    assert "gdn_in_proj" not in again.log
    (fingerprint,) = {journal.raw["fingerprint"] for journal in overlay.workers}
    assert fingerprint
