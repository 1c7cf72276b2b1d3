"""Faults in a real vLLM: under the default it serves stock and correct, under strict it stops before it serves.

A fault is a few lines in a sitecustomize.py behind the overlay's folder. The overlay hands on to it, so it runs in every
process of vLLM right after arming, and can break any stage of what comes later. The engine lives in one process here; the
forked engine has a test of its own below.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from devtools import servers, tiny_models
from overlay.report import journal_reader as journal_files
from tests.conftest import REPOSITORY
from tests.engine.conftest import FEW_PROCESSES, PASS_THROUGH, Run, run_engine

pytestmark = pytest.mark.engine

MODEL = "qwen3_5_text"
LAYERS = tiny_models.gdn_layers(MODEL)
GDN = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
CLASS = "QwenGatedDeltaNetAttention"

#: Common to all faults: `broken` raises, `when(name, action)` acts right after a module has been executed.
PREAMBLE = """
import sys
def broken(*arguments, **named):
    raise RuntimeError("injected fault")
def when(name, action):
    from wrapt import register_post_import_hook
    register_post_import_hook(action, name)
"""


@dataclass(frozen=True)
class Fault:
    """`code` breaks something; `said` stands in the WARNING, if any; `fatal` says whether strict stops for it."""

    code: str
    said: str
    fatal: bool = True
    #: Whether the GDN layers are patched all the same.
    patched: bool = False
    #: Whether stock vLLM gives other tokens by it.
    changes_tokens: bool = False
    environment: tuple[tuple[str, str], ...] = ()


#: A stage of the way in raises.
RAISING = {
    "the settings": Fault("import overlay.settings as s; s.load = broken", "injected fault"),
    "the hooks": Fault("import overlay.start.import_hooks as h; h._set_hooks = broken", "injected fault"),
    "wrapt is missing": Fault("sys.modules['wrapt'] = None", "wrapt"),
    "the journal": Fault("import overlay.report.journal as j; j.OwnJournal.open = broken", "injected fault"),
    "transformers first": Fault(
        "import overlay.start.transformers_first as t; t._complete = broken", "transformers first", patched=True
    ),
    "after vllm": Fault("import overlay.start.import_hooks as h; h._after_vllm = broken", "sources", patched=True),
    "the verdict": Fault("import overlay.patches.registry as r; r.judge = broken", "injected fault"),
    "the fingerprint": Fault("import overlay.engine.compile_cache as c; c.add = broken", "gdn"),
    "the patch's import": Fault("sys.modules['overlay.patches.gdn.patch'] = None", "gdn"),
    "the patch's op": Fault("when('overlay.side_work.ops', lambda ops: setattr(ops, 'register', broken))", "gdn"),
    "a layer": Fault(
        "when('overlay.side_work.declaration', lambda found: setattr(found.TwoLinears, 'pair_of', broken))",
        "injected fault",
    ),
    "the proof of effect": Fault("import overlay.engine.proof as e; e._after_warm_up = broken", "proof", patched=True),
}

#: Somebody else has been at vLLM.
OTHERS = {
    "another overlay patched the method": Fault(
        f"""
        import functools
        def patch(module):
            original = module.{CLASS}.forward_cuda
            @functools.wraps(original)
            def forward_cuda(self, *arguments, **named):
                return original(self, *arguments, **named)
            module.{CLASS}.forward_cuda = forward_cuda
        when({GDN!r}, patch)
        """,
        "forward_cuda has been replaced by sitecustomize",
    ),
    "a plugin replaced the class before": Fault(
        f"""
        def replace(module):
            module.{CLASS} = type({CLASS!r}, (module.{CLASS},), {{"__module__": "somebody.plugin"}})
        when({GDN!r}, replace)
        """,
        "somebody.plugin",
    ),
    "a plugin replaced the class after": Fault(
        f"""
        def replace(model):
            layer = sys.modules[{GDN!r}]
            layer.{CLASS} = model.{CLASS} = type(
                "Theirs", (layer.{CLASS},), {{"__module__": "somebody.plugin", "__init__": layer.{CLASS}.__init__}}
            )
        when("vllm.model_executor.models.qwen3_next", lambda model: replace(model))
        when("vllm.model_executor.models.qwen3_5", lambda model: replace(model))
        """,
        "somebody.plugin",
        patched=True,
    ),
    "an import hook runs a changed copy of the module": Fault(
        f"""
        import importlib.util, os, tempfile
        class Hook:
            def find_spec(self, name, path=None, target=None):
                if name != {GDN!r}:
                    return None
                original = os.path.join(path[0], name.rpartition(".")[2] + ".py")
                with open(original) as file:
                    text = file.read().replace("in_proj_ba(hidden_states)", "in_proj_ba(hidden_states * 2)")
                copy = os.path.join(tempfile.mkdtemp(), "copy.py")
                with open(copy, "w") as file:
                    file.write(text)
                return importlib.util.spec_from_file_location(name, copy)
        sys.meta_path.insert(0, Hook())
        """,
        "copy.py",
        changes_tokens=True,
    ),
    "a plugin changes a method before the layers are made": Fault(
        f"""
        def change(model):
            layer = getattr(sys.modules[{GDN!r}], {CLASS!r})
            original = layer.forward_cpu
            layer.forward_cpu = lambda *arguments: original(*arguments)
        when("vllm.model_executor.models.qwen3_next", change)
        """,
        "forward_cpu has been replaced by sitecustomize",
    ),
    "a plugin registers a class that is derived from the layer's": Fault(
        f"""
        def register(module):
            layer = getattr(module, {CLASS!r})
            class Theirs(layer):
                def forward_cpu(self, *arguments):
                    return super().forward_cpu(*arguments)
            layer.register_oot(Theirs, layer.__name__)
        when({GDN!r}, register)
        """,
        "sitecustomize.register.<locals>.Theirs is derived from",
    ),
    "the layers go around the op": Fault(
        f"""
        def around(module):
            forwards = {{name: value for name, value in vars(module.{CLASS}).items() if name.startswith("forward")}}
            when("vllm.model_executor.models.qwen3_next", lambda _: [
                setattr(module.{CLASS}, name, value) for name, value in forwards.items()
            ])
        when({GDN!r}, around)
        """,
        "ineffective",
        patched=True,
    ),
}

#: Unusual, but nothing is broken: all layers are patched, and nothing is said.
HARMLESS = {
    "vllm was reloaded": Fault(
        """
        import importlib
        when("vllm.model_executor.models.registry", lambda _: importlib.reload(sys.modules["vllm"]))
        """,
        "",
        fatal=False,
        patched=True,
    ),
    # vLLM cannot execute this module twice, with or without the overlay: its ops would be registered twice.
    "a reload of the patched module failed half-way": Fault(
        f"""
        import importlib
        def reload(model):
            try:
                importlib.reload(sys.modules[{GDN!r}])
            except AssertionError as error:
                assert "Duplicate op name" in str(error)
            else:
                raise SystemExit("reload works after all: test it")
        when("vllm.model_executor.models.qwen3_next", reload)
        """,
        "",
        fatal=False,
        patched=True,
    ),
    "armed a second time, as a plugin would": Fault(
        """
        from overlay.bootstrap import arm
        arm()
        when("vllm.plugins", lambda _: arm())
        """,
        "",
        fatal=False,
        patched=True,
    ),
}

#: The journal's folder. Never fatal: at most it costs the journal and one WARNING.
FOLDER = {
    "the journal folder has outlived containers, and the clock is wrong": Fault(
        """
        import os, time
        folder, number = os.environ["VLLMOVERLAY_JOURNAL_DIR"], os.getpid()
        os.makedirs(folder, mode=0o700, exist_ok=True)
        strange = "9" * 200, chr(0xB2), number
        for name in (f"{number}-5-4026531836-{'0' * 12}", *(f"{one}-1700000000" for one in strange)):
            with open(os.path.join(folder, name + ".json"), "w") as file:
                file.write('{"pid": 1, "schema": 1}')
            os.utime(file.name, (1, 1))
        real = time.time
        time.time = lambda: real() - 7200
        """,
        "",
        fatal=False,
        patched=True,
    ),
    "the journal folder cannot be made": Fault(
        "", "no journal", fatal=False, patched=True, environment=(("VLLMOVERLAY_JOURNAL_DIR", "/proc/overlay"),)
    ),
    "the disk is full": Fault(
        """
        import errno, tempfile
        make = tempfile.mkstemp
        def full(*arguments, prefix=None, **named):
            if prefix == ".journal-":
                raise OSError(errno.ENOSPC, "No space left on device")
            return make(*arguments, prefix=prefix, **named)
        tempfile.mkstemp = full
        """,
        "No space left",
        fatal=False,
        patched=True,
    ),
}

FAULTS = {**RAISING, **OTHERS, **HARMLESS, **FOLDER}


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """vLLM's own cache of what it found out about models: nothing here compiles, so it may be shared."""
    return tmp_path_factory.mktemp("vllm-cache")


def attempt(
    fault: Fault,
    model: pathlib.Path,
    folder: pathlib.Path,
    cache: pathlib.Path,
    *,
    overlay: bool = True,
    strict: bool = False,
) -> Run:
    behind = folder / "behind"
    behind.mkdir(parents=True)
    (behind / "sitecustomize.py").write_text(PREAMBLE + textwrap.dedent(fault.code))
    ours = {**PASS_THROUGH, "VLLMOVERLAY_PATCHES": "gdn", "VLLMOVERLAY_STRICT": "1" if strict else "0"}
    settings = {
        **(ours if overlay else {}),
        **FEW_PROCESSES,
        "VLLM_CACHE_ROOT": str(cache),
        **dict(fault.environment),
    }
    return run_engine(model, folder, overlay=overlay, behind=behind, may_fail=True, **settings)


def overlay_warnings(run: Run) -> list[str]:
    """The overlay's lines of the engine's own process, not those of the process that vLLM asks about a model."""
    return [line for line in run.log.splitlines() if "overlay:" in line and "WARNING" in line]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_vllm_stock_and_stops_it_under_strict(
    name: str,
    engine: Callable[..., Run],
    model: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
    shared_cache: pathlib.Path,
) -> None:
    fault, stock = FAULTS[name], engine(MODEL, overlay=False)
    # What is not fatal has one arm: strict adds ways to stop and takes none away, so what serves there serves by default.
    arms: dict[str, dict[str, bool]] = {"strict": {"strict": True}}
    if fault.fatal:
        arms["default"] = {}
    if fault.changes_tokens:
        arms["stock"] = {"overlay": False}
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda arm: attempt(fault, model(MODEL), tmp_path / arm, shared_cache, **arms[arm]), arms)
        by_arm = dict(zip(arms, runs, strict=True))
    if fault.changes_tokens:
        assert by_arm["stock"].answers and by_arm["stock"].answers != stock.answers
        stock = by_arm["stock"]
    strict, serves = by_arm["strict"], by_arm["default" if fault.fatal else "strict"]
    assert serves.returncode == 0, serves.log[-3000:]
    assert serves.answers == stock.answers
    warnings = overlay_warnings(serves)
    if fault.said:
        assert sum(fault.said in line for line in warnings) >= 1, warnings
        assert len(warnings) == len({line.partition("overlay:")[2] for line in warnings}), "something is said twice"
    else:
        assert warnings == []
    if serves.journals:
        patched = max((len(patch.layers) for journal in serves.journals for patch in journal.patches), default=0)
        assert (patched > 0) == fault.patched
    if fault.fatal:
        assert strict.returncode != 0, strict.log[-3000:]
        assert strict.answers == {} and fault.said in strict.log


def test_a_forked_engine_is_patched_and_has_a_journal_of_its_own(
    engine: Callable[..., Run], model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Armed, vLLM imported, hooks set, and only then the fork: the child inherits all of it but the journal's name."""
    settings = {**PASS_THROUGH, "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork", "VLLMOVERLAY_PATCHES": "gdn"}
    run = run_engine(model(MODEL), tmp_path, overlay=True, **settings)
    assert run.answers == engine(MODEL, overlay=False).answers
    (worker,) = run.workers
    assert worker.role != "Main" and worker.layers == LAYERS and worker.calls > 0
    processes = [journal.process_id for journal in run.journals]
    assert worker.raw["parent"] in processes and len(processes) == len(set(processes))


def test_vllm_and_the_target_imported_before_arming(
    engine: Callable[..., Run], model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """The import order reversed: no sitecustomize, vLLM and the layer's module first, then arming, then the engine."""
    code = f"""
import importlib, sys
from tests.engine import offline
importlib.import_module({GDN!r})
assert "overlay.start.import_hooks" not in sys.modules
from overlay.bootstrap import arm
arm()
import json, pathlib
request = {{"model": {str(model(MODEL))!r}, "compiled": False, "tensor_parallel_size": 1}}
pathlib.Path("answers.json").write_text(json.dumps(offline.run(request)))
"""
    settings = {
        **PASS_THROUGH,
        **servers.cpu_environment(),
        **FEW_PROCESSES,
        "VLLMOVERLAY_PATCHES": "gdn",
    }
    environment = servers.environment(True, tmp_path, os.environ, settings)
    environment["PYTHONPATH"] = ""
    program = f"import sys; sys.path.append({str(REPOSITORY)!r})\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "answers.json").read_text()) == engine(MODEL, overlay=False).answers
    (journal,) = [journal for journal in journal_files.read(tmp_path / "journals") if journal.layers]
    assert journal.layers == LAYERS and journal.calls > 0 and not journal.problems
