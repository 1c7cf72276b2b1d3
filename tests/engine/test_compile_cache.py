"""vLLM's compile cache knows the overlay: neither side ever takes what the other one compiled.

One cache folder, separate processes. Stock fills it; the overlay must not take that graph (the op would never run), and
stock must not take the overlay's (it would call an op that does not exist there). With Inductor, because vLLM caches
nothing for the eager backend that the other engine tests use.

vLLM 0.32.0 saves its graph on a CPU, finds it again at the next start, and then cannot load it ('function' object has no
attribute 'finalize_loading'). So the test watches which entry each start reaches for, and takes a load for granted where
vLLM tries one.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable

import pytest

from tests.engine.conftest import FEW_PROCESSES, PASS_THROUGH, Run, run_engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU, and there is none"),
]


def test_one_cache_folder_and_five_starts(model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    shared = {
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "VLLM_CPU_CI_ENV": "0",
        **FEW_PROCESSES,
    }

    def run(name: str, overlay: bool, **more: str) -> Run:
        settings = {**shared, **(PASS_THROUGH if overlay else {}), **more}
        return run_engine(model("qwen3_5_text"), tmp_path / name, overlay=overlay, compiled=True, **settings)

    def entries() -> set[str]:
        return {path.name for path in (cache / "torch_compile_cache" / "torch_aot_compile").iterdir()}

    def reached_for(result: Run) -> set[str]:
        """The entries that a start tried to load, whether that worked or not."""
        lines = [line for line in result.log.splitlines() if "Directly load AOT" in line or "load failure" in line]
        return {entry for entry in entries() if any(entry in line for line in lines)}

    stock = run("stock", False)
    of_stock = entries()
    assert len(of_stock) == 1
    overlay = run("overlay", True)
    of_overlay = entries() - of_stock
    assert reached_for(overlay) == set(), "the overlay took the graph that stock had compiled"
    assert len(of_overlay) == 1
    again = run("again", False)
    assert reached_for(again) == of_stock, "stock does not find its own graph again, so the test shows nothing"
    assert entries() == of_stock | of_overlay

    overlay_again = run("overlay again", True)
    assert reached_for(overlay_again) == of_overlay and entries() == of_stock | of_overlay
    one_off = run("one patch off", True, VLLMOVERLAY_PATCHES="gdn")
    of_one_off = entries() - of_stock - of_overlay
    assert reached_for(one_off) == set() and len(of_one_off) == 1, "a patch switched off has no identity of its own"

    runs = (stock, overlay, again, overlay_again, one_off)
    assert all(result.answers == stock.answers for result in runs)
    assert all(result.fake_calls() > 0 and result.calls() > 0 for result in (overlay, one_off))
    assert overlay_again.calls() > 0
    fingerprints = [
        {journal.raw["fingerprint"] for journal in result.workers} for result in (overlay, overlay_again, one_off)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert all(len(found) == 1 and None not in found for found in fingerprints)
