"""vLLM's compile cache knows the overlay: neither side ever takes what the other one compiled.

One cache folder, separate processes. Stock fills it; the overlay must not take that graph (the op would never run), and
stock must not take the overlay's (it would call an op that does not exist there). The folder can be vLLM's own, which a hash
names, or one that the user has named, by which vLLM takes whatever graph lies there. With Inductor, because vLLM caches
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

pytestmark = pytest.mark.engine
MODEL = "qwen3_5_text"


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU, and there is none")
def test_one_cache_folder_and_four_starts(model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    shared = {
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "VLLM_CPU_CI_ENV": "0",
        **FEW_PROCESSES,
    }

    def run(name: str, overlay: bool) -> Run:
        settings = {**shared, **(PASS_THROUGH if overlay else {})}
        return run_engine(model(MODEL), tmp_path / name, overlay=overlay, compiled=True, **settings)

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
    assert all(result.answers == stock.answers for result in (overlay, again, overlay_again))
    assert overlay.fake_calls() > 0 and overlay.calls() > 0 and overlay_again.calls() > 0
    fingerprints = [{journal.raw["fingerprint"] for journal in result.workers} for result in (overlay, overlay_again)]
    assert fingerprints[0] == fingerprints[1] and len(fingerprints[0]) == 1 and None not in fingerprints[0]


#: vLLM compiles piece by piece on a GPU alone. So that mode is put back, with a compiler that keeps its graphs and takes them
#: back, as Inductor does in minutes. What decides which graph is taken is vLLM's.
PIECE_BY_PIECE = """
import os
from wrapt import register_post_import_hook

def put_mode_back(module):
    update = module.CpuPlatform.check_and_update_config
    def check_and_update_config(config):
        update(config)
        config.compilation_config.mode = type(config.compilation_config.mode).VLLM_COMPILE
        config.compilation_config.compile_sizes = []
    module.CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)

def keep_graphs(module):
    from functools import partial
    from torch.fx.graph_module import _forward_from_src
    def initialize_cache(self, cache_dir, disable_cache=False, prefix=""):
        self.folder = cache_dir
    def compile(self, graph, example_inputs, compiler_config, compile_range, key=None):
        with open(os.path.join(self.folder, key), "w") as file:
            file.write(graph.code)
        return graph, (key, file.name)
    def load(self, handle, graph, example_inputs, graph_index, compile_range):
        with open(handle[1]) as file:
            return partial(_forward_from_src(file.read(), graph.graph.python_code("self").globals), graph)
    for function in (initialize_cache, compile, load):
        setattr(module.EagerAdaptor, function.__name__, function)

register_post_import_hook(put_mode_back, "vllm.platforms.cpu")
register_post_import_hook(keep_graphs, "vllm.compilation.compiler_interface")
"""


def test_a_folder_of_the_users_own_never_has_a_graph_with_our_op(
    model: Callable[[str], pathlib.Path], engine: Callable[..., Run], tmp_path: pathlib.Path
) -> None:
    """With the overlay, then without it: the second start takes the graph of the first, as no hash names the folder."""
    own, behind = tmp_path / "own", tmp_path / "behind"
    behind.mkdir()
    (behind / "sitecustomize.py").write_text(PIECE_BY_PIECE)

    def run(name: str, overlay: bool) -> Run:
        return run_engine(
            model(MODEL),
            tmp_path / name,
            overlay=overlay,
            compiled=True,
            behind=behind,
            options={"compilation_config": {"cache_dir": str(own)}},
            VLLM_CACHE_ROOT=str(tmp_path / "cache"),
            **FEW_PROCESSES,
            **(PASS_THROUGH if overlay else {}),
        )

    overlay = run("overlay", True)
    stock = run("stock", False)
    assert "Cache the graph" in overlay.log and "Directly load the compiled graph" in stock.log
    assert overlay.answers == stock.answers == engine(MODEL, overlay=False).answers
    (graph,) = own.rglob("computation_graph.py")
    assert "vllm_overlay" not in graph.read_text()
    assert overlay.calls() == 0
    reasons = {reason for journal in overlay.journals for patch in journal.patches for reason in patch.refused.values()}
    assert reasons and all("cache_dir" in reason for reason in reasons)
