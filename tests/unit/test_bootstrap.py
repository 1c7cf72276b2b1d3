"""From an armed interpreter to hooks in vLLM: order, guards, and bad input. In real processes, on a stub vLLM."""

from __future__ import annotations

import compileall
import json
import os
import pathlib
import subprocess
import textwrap
from typing import Any

import pytest

from overlay.patches.frame_stack.room import is_needed as frame_stack_is_needed
from tests.conftest import REPOSITORY, overlay_environment, run_python
from tests.unit import stub_vllm

IMPORT_ALL = "import vllm; import vllm.envs; import vllm.model_executor.models.qwen3_next as m"


class World:
    """A stub vLLM in a folder, and processes that import it with the overlay on PYTHONPATH."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.journals_folder = folder / "journal"

    def build(
        self, changes: dict[str, str | None] | None = None, transformers: str | None = stub_vllm.TRANSFORMERS
    ) -> World:
        stub_vllm.write(self.folder / "site", changes, transformers)
        return self

    def run(self, code: str, path: list[str] | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = overlay_environment(VLLMOVERLAY_JOURNAL_DIR=str(self.journals_folder), **settings)
        entries = path if path is not None else [str(REPOSITORY)]
        environment["PYTHONPATH"] = os.pathsep.join([*entries, str(self.folder / "site")])
        return run_python("-c", code, environment=environment)

    def journals(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.journals_folder.glob("*.json"))]


@pytest.fixture
def world(tmp_path: pathlib.Path) -> World:
    return World(tmp_path)


def succeeded(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert result.returncode == 0, result.stderr
    return result


def overlay_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "overlay" in line]


def test_nothing_happens_before_vllm_is_imported(world: World) -> None:
    world.build()
    code = """
import sys, importlib.util
assert importlib.util.find_spec("vllm") is not None   # asking is not importing
heavy = {"wrapt", "transformers", "torch", "vllm", "overlay.settings", "json", "typing"} & set(sys.modules)
assert not heavy - {"typing"}, heavy
import vllm
assert "wrapt" in sys.modules
"""
    succeeded(world.run(code))
    assert len(world.journals()) == 1


def test_transformers_is_imported_when_vllm_first_uses_it_and_not_before(world: World) -> None:
    """Its import reads settings that a program may make after `import vllm`, and before it first uses it."""
    world.build(transformers="import os\nSEEN = os.environ.get('HF_HUB_OFFLINE')\nPreTrainedModel = object\n")
    code = """
import os, sys, vllm, vllm.logger, vllm.envs
assert "transformers" not in sys.modules
os.environ["HF_HUB_OFFLINE"] = "1"
import vllm.sampling_params, transformers
assert transformers.SEEN == "1"
"""
    succeeded(world.run(code))
    (journal,) = world.journals()
    assert journal["transformers"].keys() == {"state", "seconds"}
    assert journal["transformers"]["state"] == "imported first" and journal["transformers"]["seconds"] >= 0


def test_transformers_that_nobody_imports_stays_away(world: World) -> None:
    world.build()
    succeeded(world.run("import vllm, sys; assert 'transformers' not in sys.modules"))
    assert world.journals()[0]["transformers"] == {"state": "has not been imported"}


RACING_VLLM = """
from .version import __version__
import vllm.env_override
"""
#: As vLLM #40331: a module of vLLM's has a thread import transformers, and takes names from it meanwhile.
RACING_MODULE = """
import sys, threading, time
def load():
    {in_thread}
thread = threading.Thread(target=load)
thread.start()
while "transformers" not in sys.modules:           # until the thread is inside transformers' module
    time.sleep(0.01)
{meanwhile}
thread.join()
"""
SLOW_LAZY_TRANSFORMERS = """
import sys, time, types
time.sleep(0.5)
class Lazy(types.ModuleType):
    def __getattr__(self, name):
        if name != "PreTrainedModel":
            raise AttributeError(name)
        return object
lazy = Lazy(__name__)
lazy.__spec__ = __spec__
lazy.__path__ = __path__
sys.modules[__name__] = lazy                       # as transformers does with its lazy module
"""
MEANWHILE = {
    "names": "from transformers import PreTrainedModel\nassert PreTrainedModel is object",
    "the module": "import transformers\nassert transformers.PreTrainedModel is object",
    "a part": "from transformers import part\nassert part.WHOLE",
    "what is not there": "try:\n    from transformers import Nothing\nexcept ImportError: pass\nelse: raise SystemExit(1)",
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_the_load_race_is_there_without_the_overlay_and_gone_with_it(world: World, meanwhile: str) -> None:
    """The waiting import hands out the module object that it found before the wait: the one that was replaced."""
    racing = RACING_MODULE.format(in_thread="import transformers", meanwhile=MEANWHILE[meanwhile])
    world.build({"__init__.py": RACING_VLLM, "racing.py": racing}, transformers=SLOW_LAZY_TRANSFORMERS)
    (world.folder / "site" / "transformers" / "part.py").write_text("WHOLE = True\n")
    # Somebody else watches transformers, too.
    code = "import wrapt; wrapt.register_post_import_hook(print, 'transformers'); import vllm.racing"
    result = succeeded(world.run(code))
    assert result.stdout.count("<module 'transformers'") == 1
    assert world.journals()[0]["transformers"]["state"] == "imported first"
    if meanwhile in ("names", "the module"):
        stock = world.run("import vllm.racing", path=[])
        assert stock.returncode != 0 and "PreTrainedModel" in stock.stderr


def test_two_threads_that_import_names_at_once(world: World) -> None:
    """Whichever is first is as late as without the overlay, and both get all of it."""
    racing = RACING_MODULE.format(
        in_thread="global name\n    from transformers import PreTrainedModel as name",
        meanwhile="from transformers import PreTrainedModel",
    )
    world.build({"__init__.py": RACING_VLLM, "racing.py": racing}, transformers=SLOW_LAZY_TRANSFORMERS)
    succeeded(world.run("import vllm.racing as racing; assert racing.name is racing.PreTrainedModel is object"))


def test_transformers_missing_is_vllms_own_error(world: World) -> None:
    world.build(transformers="raise ImportError('no transformers here')")
    code = "import vllm.logger\ntry:\n    import vllm.sampling_params\nexcept ImportError as error:\n    print(error)"
    result = succeeded(world.run(code))
    assert (result.stdout.strip(), overlay_lines(result)) == ("no transformers here", [])
    assert world.journals()[0]["transformers"] == {"state": "missing"}


def test_transformers_imported_by_the_user_is_left_alone(world: World) -> None:
    world.build()
    succeeded(world.run("import transformers, vllm"))
    assert world.journals()[0]["transformers"] == {"state": "was imported before vllm"}


BAD_SETTINGS = [
    {"VLLMOVERLAY_PLAN": "fast"},
    {"VLLMOVERLAY_UNKNOWN": "1"},
    {"VLLM_OVERLAY_STRICT": "1"},
    {"VLLMOVERLAY": "perhaps"},
]


@pytest.mark.parametrize("setting", BAD_SETTINGS, ids=str)
def test_a_setting_that_cannot_be_used_leaves_vllm_stock_with_one_line(world: World, setting: dict[str, str]) -> None:
    world.build()
    code = f"{IMPORT_ALL}; import sys; assert 'wrapt' not in sys.modules and 'overlay.patches.gdn.patch' not in sys.modules"
    result = succeeded(world.run(code, **setting))
    (line,) = overlay_lines(result)
    ((name, value),) = setting.items()
    assert name in line and repr(value) in line and "stock" in line


#: What stops vLLM under strict: changes of the stub, and further settings.
FATAL: dict[str, tuple[dict[str, str | None], dict[str, str]]] = {
    "VLLMOVERLAY_PLAN='fast'": ({}, {"VLLMOVERLAY_PLAN": "fast"}),
    "gdn: drifted": ({stub_vllm.GDN_MODULE: None, "model_executor/models/qwen3_next.py": "import os\n"}, {}),
    "gdn: {}: ModuleNotFoundError": ({}, {}),
}


@pytest.mark.parametrize("said", FATAL)
def test_what_stops_vllm_under_strict_does_not_say_that_vllm_runs_stock(world: World, said: str) -> None:
    changes, extra = FATAL[said]
    world.build(changes)
    default, strict = world.run(IMPORT_ALL, **extra), world.run(IMPORT_ALL, VLLMOVERLAY_STRICT="1", **extra)
    (line,) = overlay_lines(succeeded(default))
    stock, stopped = "vLLM runs stock here", "vLLM stops here, as strict asks"
    assert said.format(stock) in line and stock in line
    assert strict.returncode != 0 and "runs stock" not in strict.stderr
    assert any(said.format(stopped) in line and stopped in line for line in overlay_lines(strict))


def test_switched_off_means_not_there(world: World) -> None:
    world.build()
    code = f"{IMPORT_ALL}; import sys; assert not [m for m in sys.modules if m.startswith('overlay.') and m != 'overlay.chain']"
    result = succeeded(world.run(code, VLLMOVERLAY="0"))
    assert result.stderr == "" and world.journals() == []


def test_wrapt_missing_leaves_vllm_stock_with_one_line(world: World) -> None:
    world.build()
    (world.folder / "site" / "wrapt.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'wrapt'\", name='wrapt')"
    )
    result = succeeded(world.run(IMPORT_ALL, path=[str(REPOSITORY), str(world.folder / "site")]))
    (line,) = overlay_lines(result)
    assert "wrapt" in line and "stock" in line
    strict = world.run(IMPORT_ALL, VLLMOVERLAY_STRICT="1")
    assert strict.returncode != 0 and "wrapt" in strict.stderr


def test_vllm_missing_is_pythons_own_error(world: World) -> None:
    (world.folder / "site").mkdir()
    result = world.run("import vllm", path=[str(REPOSITORY), "/nonexistent"])
    blocked = world.run("import sys; sys.modules['vllm'] = None\nimport vllm")
    assert blocked.returncode != 0 and "ModuleNotFoundError" in blocked.stderr
    assert result.returncode == 0 or "No module named 'vllm'" in result.stderr


def test_a_folder_that_is_called_vllm_is_not_vllm(world: World) -> None:
    (world.folder / "site" / "vllm").mkdir(parents=True)
    (world.folder / "site" / "vllm" / "data.txt").write_text("")
    environment_code = "import vllm, sys; assert vllm.__file__ is None; assert 'transformers' not in sys.modules"
    result = run_python(
        "-S",
        "-c",
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]; import overlay.bootstrap as b; b.arm(); "
        f"sys.path[:] = [{str(world.folder / 'site')!r}, *sys.path]; {environment_code}",
        environment=overlay_environment(),
    )
    succeeded(result)


def test_a_vllm_from_before_0_19_is_left_alone(world: World) -> None:
    old = "class Qwen3NextGatedDeltaNet:\n    def forward(self, x):\n        a, _ = self.in_proj_qkvz(x)\n"
    world.build({stub_vllm.GDN_MODULE: None, "model_executor/models/qwen3_next.py": old})
    assert overlay_lines(succeeded(world.run("import vllm"))) == []
    gdn = world.journals()[0]["patches"]["gdn"]
    assert gdn["verdict"] == "absent" and "before vLLM 0.19.0" in gdn["reason"]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [(["/usr/bin/vllm", "serve", "model"], 1), (["/usr/bin/vllm", "bench"], 0), (["/home/me/offline.py"], 0)],
)
def test_the_process_of_vllm_serve_says_that_the_overlay_is_armed_and_others_are_silent(
    arguments: list[str], lines: int, world: World
) -> None:
    world.build()
    result = succeeded(world.run(f"import sys; sys.argv = {arguments!r}; import vllm", VLLMOVERLAY_PATCHES="none"))
    said = overlay_lines(result)
    assert len(said) == lines and all("is armed in vLLM 0.32.0+stub" in line for line in said)


def test_a_vllm_without_the_model_says_absent(world: World) -> None:
    world.build(stub_vllm.NOTHING)
    lines = overlay_lines(succeeded(world.run("import vllm", VLLMOVERLAY_LOG_LEVEL="debug")))
    (line,) = [line for line in lines if "gdn" in line]
    assert "absent" in line


def test_byte_code_without_sources_is_no_vllm_without_features(world: World) -> None:
    world.build()
    byte_code = world.folder / "site" / "vllm"
    compileall.compile_dir(byte_code, quiet=1, legacy=True)
    for path in byte_code.rglob("*.py"):
        path.unlink()
    result = succeeded(world.run(IMPORT_ALL, VLLMOVERLAY_PATCHES="all"))
    assert all("drifted, vLLM runs stock here" in line for line in overlay_lines(result))
    (journal,) = world.journals()
    assert {patch["verdict"] for patch in journal["patches"].values()} == {"drifted"}


def test_a_moved_class_is_drift_not_absence(world: World) -> None:
    world.build({stub_vllm.GDN_MODULE: None, "model_executor/models/qwen3_next.py": "import os\n"})
    (line,) = overlay_lines(succeeded(world.run("import vllm")))
    assert "drifted" in line and "stock" in line
    assert world.journals()[0]["patches"]["gdn"]["verdict"] == "drifted"
    strict = world.run("import vllm", VLLMOVERLAY_STRICT="1")
    assert strict.returncode != 0 and "drifted" in strict.stderr


DRIFTED = """
class QwenGatedDeltaNetAttention:
    def forward_cuda(self, hidden_states):
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        hidden_states = hidden_states * 2
        ba, _ = self.in_proj_ba(hidden_states)
        return qkvz, ba
"""


def test_a_vllm_of_unknown_structure_runs_stock_and_names_the_line(world: World) -> None:
    world.build({stub_vllm.GDN_MODULE: DRIFTED})
    code = f"{IMPORT_ALL}; assert m.QwenGatedDeltaNetAttention.forward_cuda.__code__.co_filename == m.QwenGatedDeltaNetAttention.forward_cuda.__globals__['__file__']"
    code = code.replace(
        "m.QwenGatedDeltaNetAttention",
        "__import__('sys').modules['vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn'].QwenGatedDeltaNetAttention",
    )
    result = succeeded(world.run(code))
    (line,) = overlay_lines(result)
    assert "qwen_gdn_linear_attn.py:6" in line and "stock" in line
    assert world.journals()[0]["patches"]["gdn"]["verdict"] == "drifted"
    strict = world.run(code, VLLMOVERLAY_STRICT="1")
    assert strict.returncode != 0 and "qwen_gdn_linear_attn.py:6" in strict.stderr


#: Ways in which code that nobody has judged gets under the name of vLLM's module, and what the reason names.
OTHER_CODE = {
    "an import hook runs a changed copy": (
        """
        import importlib.util, os, sys
        class Hook:
            def find_spec(self, name, path=None, target=None):
                if name != NAME:
                    return None
                file = os.path.join(path[0], "copy.py")
                with open(os.path.join(path[0], "qwen_gdn_linear_attn.py")) as text, open(file, "w") as copy:
                    copy.write(text.read().replace("in_proj_ba(hidden_states)", "in_proj_ba(hidden_states * 2)"))
                return importlib.util.spec_from_file_location(name, file)
        sys.meta_path.insert(0, Hook())
        """,
        "copy.py",
    ),
    "a tool executes other text in the module, under the name of its file": (
        """
        from wrapt import register_post_import_hook
        def execute(module):
            with open(module.__file__) as file:
                text = file.read().replace("in_proj_ba(hidden_states)", "in_proj_ba(hidden_states * 2)")
            exec(compile(text, module.__file__, "exec"), vars(module))
        register_post_import_hook(execute, NAME)
        """,
        "QwenGatedDeltaNetAttention.forward_cuda",
    ),
}


@pytest.mark.parametrize("way", OTHER_CODE)
def test_code_that_nobody_has_judged_is_refused_by_name(world: World, way: str) -> None:
    world.build()
    code, named = OTHER_CODE[way]
    name = "vllm." + stub_vllm.GDN_MODULE.removesuffix(".py").replace("/", ".")
    program = f"NAME = {name!r}\n{textwrap.dedent(code)}\n{IMPORT_ALL}"
    (line,) = overlay_lines(succeeded(world.run(program)))
    assert "gdn: refused, vLLM runs stock here" in line and named in line
    (journal,) = world.journals()
    assert journal["patches"]["gdn"]["verdict"] == "refused" and journal["fingerprint"] is None
    strict = world.run(program, VLLMOVERLAY_STRICT="1")
    assert strict.returncode != 0 and named in strict.stderr


def test_a_verdict_on_another_module_is_not_applied_to_this_one(world: World) -> None:
    """vLLM 0.22.0 moved the layer; where both modules are there the verdict is on the new one."""
    old_module = "model_executor/layers/mamba/gdn_linear_attn.py"
    world.build({old_module: stub_vllm.FILES[stub_vllm.GDN_MODULE]})
    code = "import vllm.envs, vllm.model_executor.layers.mamba.gdn_linear_attn"
    assert overlay_lines(succeeded(world.run(code))) == []
    assert world.journals()[0]["patches"]["gdn"]["verdict"] == "not seen"


def test_a_patch_that_fails_to_install_leaves_vllm_stock_with_one_line(world: World) -> None:
    """The stub has no vllm.platforms, so the patch module cannot be imported: any failure inside a hook is like this."""
    world.build()
    result = succeeded(world.run(IMPORT_ALL))
    (line,) = overlay_lines(result)
    assert "stock" in line
    assert world.journals()[0]["problems"]
    assert world.journals()[0]["fingerprint"] is None
    assert world.run(IMPORT_ALL, VLLMOVERLAY_STRICT="1").returncode != 0


def test_a_worker_that_has_loaded_its_model_calls_who_waits_for_that(world: World) -> None:
    """Without the hook no layer gets a plan, and everything runs stock."""
    world.build({"v1/worker/gpu_worker.py": "class Worker:\n    def load_model(self):\n        return 'loaded'\n"})
    code = """
import vllm, overlay.engine.loaded
seen = []
overlay.engine.loaded.when_loaded(seen.append)
from vllm.v1.worker.gpu_worker import Worker
worker = Worker()
assert seen == [] and worker.load_model() == "loaded" and seen == [worker]
"""
    succeeded(world.run(code))


def test_patches_none_reads_no_source(world: World) -> None:
    world.build({stub_vllm.GDN_MODULE: DRIFTED})
    result = succeeded(world.run(IMPORT_ALL, VLLMOVERLAY_PATCHES="none"))
    assert overlay_lines(result) == []
    assert world.journals()[0]["patches"]["gdn"]["verdict"] == "off"


WORKERS_LOOP = {
    "v1/__init__.py": "",
    "v1/engine/__init__.py": "",
    "v1/engine/core.py": """
        class EngineCoreProc:
            def run_busy_loop(self):
                while True: pass
        class DPEngineCoreProc(EngineCoreProc):
            def run_busy_loop(self):
                while True: pass
        """,
    "v1/executor/__init__.py": "",
    "v1/executor/multiproc_executor.py": """
        class WorkerProc:
            def worker_busy_loop(self):
                while True:
                    return "looped"
        """,
}
RUN_LOOP = """
from vllm.v1.executor.multiproc_executor import WorkerProc
assert WorkerProc().worker_busy_loop() == "looped"
"""


NEEDED = frame_stack_is_needed()
ROOM = ("apply", "WorkerProc.worker_busy_loop runs above one large frame") if NEEDED else ("inert", None)


@pytest.mark.parametrize(
    ("patches", "loop", "frame_stack"),
    [
        ("all", "WorkerProc.worker_busy_loop", ROOM),
        ("frame_stack", "WorkerProc.worker_busy_loop", ROOM),
        ("gdn", "WorkerProc.worker_busy_loop", ("off", "switched off")),
        ("none", None, ("off", "switched off")),
    ],
)
def test_vllms_loops_get_room_by_a_patch_of_its_own_and_are_noted_with_any(
    world: World, patches: str, loop: str | None, frame_stack: tuple[str, str | None]
) -> None:
    world.build(WORKERS_LOOP)
    assert overlay_lines(succeeded(world.run(RUN_LOOP, VLLMOVERLAY_PATCHES=patches))) == []
    (journal,) = world.journals()
    record = journal["patches"]["frame_stack"]
    assert (journal["loop"], record["verdict"]) == (loop, frame_stack[0])
    assert frame_stack[1] in (record["reason"], None)
    assert journal["fingerprint"] is None


def test_a_vllm_without_the_loop_runs_stock_there_and_one_warning_says_so(world: World) -> None:
    world.build({**WORKERS_LOOP, "v1/executor/multiproc_executor.py": "class WorkerProc: pass\n"})
    code = "import vllm.v1.executor.multiproc_executor"
    (line,) = overlay_lines(succeeded(world.run(code)))
    assert "frame_stack: drifted" in line and "worker_busy_loop" in line
    assert world.run(code, VLLMOVERLAY_STRICT="1").returncode != 0


def test_the_folder_twice_on_pythonpath_and_armed_twice_is_armed_once(world: World) -> None:
    world.build({stub_vllm.GDN_MODULE: DRIFTED})
    code = f"from overlay.bootstrap import arm; arm(); arm(); {IMPORT_ALL}"
    result = succeeded(world.run(code, path=[str(REPOSITORY), str(REPOSITORY), f"{REPOSITORY}/tests/.."]))
    assert len(overlay_lines(result)) == 1
    assert len(world.journals()) == 1


def test_vllm_imported_before_arming_still_gets_its_hooks(world: World) -> None:
    world.build({stub_vllm.GDN_MODULE: DRIFTED})
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
{IMPORT_ALL}
from overlay.bootstrap import arm
arm()
"""
    result = succeeded(world.run(code, path=[]))
    assert len(overlay_lines(result)) == 1 and "drifted" in json.dumps(world.journals())


def test_the_loader_of_vllm_keeps_working(world: World) -> None:
    world.build()
    code = """
import importlib, importlib.resources, inspect, vllm
assert "exec_module" not in vars(vllm.__spec__.loader)
assert "env_override" in inspect.getsource(vllm)
assert importlib.resources.files("vllm").joinpath("version.py").is_file()
importlib.reload(vllm)
"""
    succeeded(world.run(code, VLLMOVERLAY_PATCHES="none"))


def test_a_warning_of_a_process_that_never_configures_logging_reaches_stderr(world: World) -> None:
    world.build({"__init__.py": RACING_VLLM, stub_vllm.GDN_MODULE: None, "model_executor/models/qwen3_next.py": ""})
    (line,) = overlay_lines(succeeded(world.run("import vllm")))
    assert line.startswith("WARNING")


def test_a_loader_that_several_modules_share(world: World) -> None:
    """A zip's, or one that a finder of somebody's keeps: asking for vLLM's spec, even twice, is not importing vLLM."""
    world.build()
    code = """
import sys, importlib.machinery, importlib.util
class Loader:
    def create_module(self, spec): return None
    def exec_module(self, module):
        exec(compile(open(module.__spec__.origin).read(), module.__spec__.origin, "exec"), vars(module))
loader = Loader()
class Finder:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            spec.loader = loader
        return spec
sys.meta_path.insert(1, Finder())
importlib.util.find_spec("vllm"), importlib.util.find_spec("vllm"), importlib.util.find_spec("transformers")
import colorsys
assert "overlay.start.import_hooks" not in sys.modules
import vllm, transformers
assert vars(loader) == {}
print(vllm.__version__)
"""
    assert succeeded(world.run(code, VLLMOVERLAY_PATCHES="none")).stdout.strip() == "0.32.0+stub"
    assert world.journals()[0]["transformers"]["state"] == "imported first"


def test_a_vllm_that_leaves_sys_modules_fails_as_it_does_in_stock(world: World) -> None:
    world.build({"__init__.py": "import sys\n__version__ = '1'\ndel sys.modules[__name__]\n"})
    stock, result = world.run("import vllm", path=[]), world.run("import vllm")
    assert stock.returncode == result.returncode == 1
    assert stock.stderr.splitlines()[-1] == "KeyError: 'vllm'"
    assert stock.stderr in result.stderr, "not an error of the overlay's"
    assert [line for line in overlay_lines(result) if "sources" in line]


def test_a_loader_that_cannot_be_watched_costs_one_line(world: World) -> None:
    world.build()
    code = """
import sys, importlib.machinery
class Loader:
    __slots__ = ("inner",)
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return None
    def exec_module(self, module): self.inner.exec_module(module)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "vllm": return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Loader(spec.loader)
        return spec
sys.meta_path.insert(1, Finder())
import vllm
print(vllm.__version__)
"""
    result = succeeded(world.run(code))
    assert result.stdout.strip() == "0.32.0+stub"
    (line,) = overlay_lines(result)
    assert "cannot be watched" in line


def test_a_half_copied_folder_costs_one_line(world: World, tmp_path: pathlib.Path) -> None:
    """sitecustomize and the finder are there, what they load at `import vllm` is not."""
    world.build()
    copy = tmp_path / "copy"
    (copy / "overlay").mkdir(parents=True)
    for name in ("sitecustomize.py", "overlay/__init__.py", "overlay/bootstrap.py", "overlay/chain.py"):
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    result = succeeded(world.run("import vllm; print(vllm.__version__)", path=[str(copy)]))
    (line,) = overlay_lines(result)
    assert "stock" in line and "overlay.start" in line
