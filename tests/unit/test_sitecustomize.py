"""The door: the overlay is armed at every start of Python, and every other sitecustomize works as if it were not there.

Everything happens in real interpreters, on real folders (door_world.py). The yardstick of most tests is stock Python:
the same PYTHONPATH without our folder, and what ran there.
"""

import itertools
import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.door_world import CHAINING, LOG, REPOSITORY, SEEN, World

HEAVY = {
    "wrapt", "torch", "vllm", "transformers", "numpy", "dataclasses", "typing", "re", "inspect", "json", "logging",
    "pathlib", "importlib.util", "importlib.machinery",
}  # fmt: skip

CHILD = """
import sys

def report(connection):
    bootstrap = sys.modules.get("overlay.bootstrap")
    connection.send((getattr(bootstrap, "armed", 0), sys.modules["sitecustomize"].__file__))

if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context(sys.argv[1])
    here, there = context.Pipe()
    process = context.Process(target=report, args=(there,))
    process.start()
    print(*here.recv())
    process.join()
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# Arming


def test_armed_in_a_command(world: World) -> None:
    ours = world.overlay()
    result = world.start([ours])
    assert (result.log, result.stderr, result.returncode) == (["armed"], "", 0)
    assert result.stdout == str(ours / "sitecustomize.py")


def test_armed_in_a_module_and_in_a_script(world: World) -> None:
    ours = world.overlay()
    script = world.root / "script.py"
    script.write_text("pass\n")
    for arguments in (["-m", "script"], [str(script)], ["-P", str(script)] if sys.version_info >= (3, 11) else ["-s"]):
        result = world.start([ours], *arguments, cwd=world.root)
        assert (result.log, result.stderr, result.returncode) == (["armed"], "", 0), arguments


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_armed_in_children_of_multiprocessing(world: World, method: str) -> None:
    ours = world.overlay()
    script = world.root / "script.py"
    script.write_text(CHILD)
    result = world.start([ours], str(script), method)
    assert result.stdout == f"1 {ours / 'sitecustomize.py'}"
    assert result.stderr == ""


def test_armed_in_a_subprocess(world: World) -> None:
    result = world.start([world.overlay()], "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])")
    assert result.log == ["armed", "armed"]


def test_armed_through_a_relative_folder(world: World) -> None:
    world.overlay("relative")
    for entry in ("relative", "./relative/", "nowhere/../relative"):
        (world.root / "nowhere").mkdir(exist_ok=True)
        assert world.start([entry], cwd=world.root).log == ["armed"], entry


def test_armed_from_the_working_directory(world: World) -> None:
    """An empty entry of PYTHONPATH is the working directory."""
    ours = world.overlay()
    foreign = world.foreign("foreign")
    assert world.start(["", foreign], cwd=ours).log == ["armed", "foreign"]


def test_armed_from_a_zip(world: World) -> None:
    import shutil

    archive = shutil.make_archive(str(world.root / "overlay"), "zip", world.overlay())
    assert world.start([archive, world.foreign("foreign")]).log == ["armed", "foreign"]


def test_armed_from_byte_code_that_was_compiled_elsewhere(world: World) -> None:
    """Byte code names the file it was compiled from, which may still be there, and is not this folder's."""
    built, ours = world.overlay("built"), world.root / "ours"
    for file in built.rglob("*.py"):
        target = ours / file.relative_to(built).with_suffix(".pyc")
        target.parent.mkdir(parents=True, exist_ok=True)
        py_compile.compile(str(file), cfile=str(target), doraise=True)
    result = world.start([ours, world.foreign("foreign")])
    assert (result.log, result.stderr) == (["armed", "foreign"], "")


@pytest.mark.parametrize("flag", ["-I", "-S", "-E"])
def test_nothing_happens_where_python_ignores_the_folder(world: World, flag: str) -> None:
    probe = "import sys; print([name for name in sys.modules if name.startswith('overlay')])"
    result = world.start([world.overlay(), world.foreign("foreign")], flag, "-c", probe)
    assert (result.log, result.stdout, result.stderr) == ([], "[]", "")


@pytest.mark.parametrize("value", ["0", "false", "OFF", " No "])
def test_switched_off_it_only_hands_on(world: World, value: str) -> None:
    probe = "import sys; print('overlay.bootstrap' in sys.modules)"
    result = world.start([world.overlay(), world.foreign("foreign")], "-c", probe, VLLMOVERLAY=value)
    assert (result.log, result.stdout, result.stderr) == (["foreign"], "False", "")


@pytest.mark.parametrize("value", ["1", "on", "", "2"])
def test_any_other_value_leaves_the_judgement_to_bootstrap(world: World, value: str) -> None:
    assert world.start([world.overlay()], VLLMOVERLAY=value).log == ["armed"]


# Cost


def test_no_heavy_module_is_imported(world: World) -> None:
    probe = "import sys; print(*sys.modules)"
    stock = set(world.start([], "-c", probe).stdout.split())
    with_overlay = set(world.start([world.overlay()], "-c", probe).stdout.split())
    added = with_overlay - stock
    # On Debian's Python there is something to hand on to.
    assert added - {"overlay.chain"} <= {"sitecustomize", "overlay", "overlay.bootstrap"}


@pytest.mark.skipif(not (REPOSITORY / "overlay" / "bootstrap.py").exists(), reason="bootstrap.py has not landed yet")
def test_the_real_bootstrap_imports_no_heavy_module(world: World) -> None:
    probe = "import sys; print(*sys.modules)"
    stock = set(world.start([], "-c", probe).stdout.split())
    result = world.start([REPOSITORY], "-c", probe)
    assert not (set(result.stdout.split()) - stock) & HEAVY
    assert "overlay.bootstrap" in result.stdout.split()
    assert result.stderr == ""


def test_the_benchmark_measures_and_judges(world: World) -> None:
    """Few runs, and a bound that holds on a busy machine; the promise of 2 ms is the benchmark's own default."""
    pytest.importorskip("rich")
    pytest.importorskip("scipy")
    ours = world.overlay()
    output = world.root / "startup.json"
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.startup", "--overlay", ours, "--pairs", "9"]
    told: Any = {"cwd": REPOSITORY, "capture_output": True, "text": True}
    good = subprocess.run([*command, "--limit", "15", "--json", output], check=False, **told)
    assert good.returncode == 0, good.stdout + good.stderr
    report = json.loads(output.read_text())
    assert {"overlay", "overlay.bootstrap"} <= set(report["modules"])
    assert not HEAVY & set(report["modules"])
    assert [case["pairs"] for case in report["cases"]] == [9, 9]
    slow = ours / "overlay" / "bootstrap.py"
    slow.write_text("import time\ndef arm(): time.sleep(0.05)\n")
    bad = subprocess.run([*command, "--limit", "15"], check=False, **told)
    assert bad.returncode == 1, bad.stdout + bad.stderr


# Handing on


@pytest.mark.parametrize("kind", ["module", "package", "bytecode", "zip"])
def test_hands_on_to_each_kind_of_module(world: World, kind: str) -> None:
    foreign = world.foreign("foreign", kind)
    result = world.start([world.overlay(), foreign])
    assert (result.log, result.stderr) == (["armed", "foreign"], "")
    # Whoever asks for the module gets the one that Python would have imported.
    assert result.stdout == world.start([foreign]).stdout
    assert result.stdout.startswith(str(foreign))


def test_hands_on_to_the_one_python_would_have_run_and_to_no_other(world: World) -> None:
    path = [world.foreign("empty", "empty"), world.overlay(), world.foreign("first"), world.foreign("second")]
    assert world.start(path).log == ["armed", "first"]


def test_hands_on_to_the_one_in_the_standard_library_folder(world: World) -> None:
    """Where Debian puts it. The copy of a virtual environment's site-packages is the same case, further back."""
    debian = Path("/usr/bin/python3")
    probe = "import sys; print('apport_python_hook' in str(sys.modules['sitecustomize'].__loader__.get_data("
    probe += "sys.modules['sitecustomize'].__file__)))"
    if not debian.exists() or "True" not in world.start([], "-c", probe, python=str(debian)).stdout:
        pytest.skip("not Debian's Python")
    result = world.start([world.overlay()], "-c", probe, python=str(debian))
    assert (result.log, result.stdout, result.stderr) == (["armed"], "True", "")


def test_hands_on_to_the_one_in_site_packages(world: World) -> None:
    import venv

    venv.create(world.root / "venv", with_pip=False, symlinks=True)
    python = world.root / "venv" / "bin" / "python"
    (site_packages,) = (world.root / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "sitecustomize.py").write_text(LOG.format(name="installed"))
    result = world.start([world.overlay()], python=str(python))
    assert (result.log, result.stderr) == (["armed", "installed"], "")
    assert result.stdout == str(site_packages / "sitecustomize.py")


def test_an_entry_that_cannot_be_searched_at_start(world: World) -> None:
    """A .pth file ran before us and set a path hook that fails."""
    import venv

    venv.create(world.root / "venv", with_pip=False, symlinks=True)
    (site_packages,) = (world.root / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "failing_hook.py").write_text(
        "import sys\n"
        "def hook(entry):\n    if entry == '/unsearchable': raise RuntimeError('no way in')\n    raise ImportError\n"
        "sys.path_hooks.insert(0, hook)\nsys.path.append('/unsearchable')\n"
    )
    (site_packages / "failing_hook.pth").write_text("import failing_hook\n")
    result = world.start([world.overlay()], python=str(world.root / "venv" / "bin" / "python"))
    assert (result.log, result.returncode) == (["armed"], 0)
    (line,) = result.stderr.splitlines()
    assert "'/unsearchable'" in line


def test_usercustomize_is_untouched(world: World) -> None:
    foreign = world.foreign("foreign")
    (foreign / "usercustomize.py").write_text(LOG.format(name="user"))
    probe = "import site; print(site.ENABLE_USER_SITE)"
    enabled = world.start([], "-c", probe).stdout == "True"
    assert world.start([world.overlay(), foreign]).log == ["armed", "foreign"] + ["user"] * enabled


def test_strange_entries_of_sys_path(world: World) -> None:
    """A Path, a number, a file and a folder that is none; and an entry that the import system cannot even look into."""
    strange = world.foreign("strange")
    (strange / "sitecustomize.py").write_text(
        LOG.format(name="strange")
        + "import sys, pathlib\n"
        + "def hook(entry):\n    if entry == '/unsearchable': raise RuntimeError('no way in')\n    raise ImportError\n"
        + "sys.path_hooks.insert(0, hook)\n"
        + "sys.path[1:1] = [pathlib.Path('/x'), 7, None, '/nowhere', __file__, '/unsearchable']\n"
        + CHAINING.format(caught="ImportError")
        + "sys.path.remove('/unsearchable')\n"
    )
    result = world.start([world.overlay(), strange, world.foreign("next")])
    assert result.log == ["armed", "strange", "next"]
    (line,) = result.stderr.splitlines()
    assert "'/unsearchable'" in line
    assert "RuntimeError: no way in" in line


def test_a_package_can_import_its_parts_later(world: World) -> None:
    foreign = world.foreign("foreign", "package")
    result = world.start([world.overlay(), foreign], "-c", "import sitecustomize.part as part; print(part.__name__)")
    assert (result.stdout, result.log) == ("sitecustomize.part", ["armed", "foreign"])


# Broken foreign modules


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "ValueError: first line second line"),
        ("syntax_error", "SyntaxError:"),
        ("import_error", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ],
)
def test_a_broken_one_is_reported_in_one_line_and_survived(world: World, kind: str, words: str) -> None:
    ours = world.overlay()
    foreign = world.foreign("foreign", kind)
    result = world.start([ours, foreign])
    assert result.returncode == 0
    assert result.stdout == str(ours / "sitecustomize.py")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error in sitecustomize {foreign / 'sitecustomize.py'}; set PYTHONVERBOSE for traceback: ")
    assert words in line


def test_a_broken_one_shows_its_traceback_to_those_who_ask(world: World) -> None:
    result = world.start([world.overlay(), world.foreign("foreign", "raises")], PYTHONVERBOSE="1")
    assert "Traceback (most recent call last)" in result.stderr
    assert "second line" in result.stderr


def test_one_that_ends_by_finding_no_next_one_is_no_error(world: World) -> None:
    """site.py says nothing about this either."""
    result = world.start([world.overlay(), world.foreign("foreign", "not_found")])
    assert (result.log, result.stderr, result.returncode) == (["armed", "foreign"], "", 0)


def test_one_that_takes_itself_out_of_sys_modules_is_survived(world: World) -> None:
    result = world.start([world.overlay(), world.foreign("foreign", "vanishes")])
    assert (result.log, result.stderr, result.returncode) == (["armed", "foreign"], "", 0)


def test_one_that_exits_stops_the_start_as_it_does_in_stock_python(world: World) -> None:
    foreign = world.foreign("foreign", "exits")
    stock = world.start([foreign], "-c", "print('started')")
    result = world.start([world.overlay(), foreign], "-c", "print('started')")
    assert (result.log, result.stdout) == (["armed", "foreign"], "")
    assert result.returncode == stock.returncode != 0
    assert result.stderr.splitlines()[-1] == stock.stderr.splitlines()[-1] == "SystemExit: 7"


@pytest.mark.parametrize("damaged", [True, False])
def test_a_closed_stderr_is_survived(world: World, damaged: bool) -> None:
    path = [world.overlay(), world.overlay("second copy"), world.foreign("foreign", "raises")]
    if damaged:
        (path[0] / "overlay" / "bootstrap.py").unlink()
    command = f"exec '{sys.executable}' -c 'print(1)' 2>&-"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "DOOR_LOG": str(world.root / "log")}
    done = subprocess.run(["sh", "-c", command], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.stdout, done.returncode) == ("1\n", 0)


# Those that chain on, and those that do not


def test_one_like_ddtrace_behind_ours(world: World) -> None:
    path = [world.overlay(), world.foreign("ddtrace", "chains"), world.foreign("next")]
    result = world.start(path)
    assert (result.log, result.stderr) == (["armed", "ddtrace", "next"], "")
    assert result.stdout == str(path[2] / "sitecustomize.py")


def test_one_like_ddtrace_in_front_of_ours(world: World) -> None:
    path = [world.foreign("ddtrace", "chains"), world.overlay(), world.foreign("next")]
    result = world.start(path)
    assert (result.log, result.stderr) == (["ddtrace", "armed", "next"], "")
    assert result.stdout == str(path[2] / "sitecustomize.py")


@pytest.mark.parametrize("in_front", [True, False])
def test_one_like_ddtrace_alone_finds_no_next_one(world: World, in_front: bool) -> None:
    """It asks for the next one and must hear that there is none, not get ours: it then puts itself back."""
    ddtrace = world.foreign("ddtrace", "chains")
    ours = world.overlay()
    result = world.start([ddtrace, ours] if in_front else [ours, ddtrace])
    assert sorted(result.log) == ["armed", "ddtrace"]
    assert result.stdout == str(ddtrace / "sitecustomize.py")


def test_one_that_chains_hears_of_the_failure_of_the_next_one(world: World) -> None:
    """As without us. It is then the one that fails, and this is reported."""
    careless = world.foreign("careless")
    (careless / "sitecustomize.py").write_text(LOG.format(name="careless") + CHAINING.format(caught="ImportError"))
    result = world.start([world.overlay(), careless, world.foreign("broken", "raises")])
    assert (result.log, result.returncode) == (["armed", "careless", "broken"], 0)
    (line,) = result.stderr.splitlines()
    assert str(careless / "sitecustomize.py") in line


def test_one_that_imports_sitecustomize_for_ever(world: World) -> None:
    """Alone it recurses until Python gives up. Behind ours it is never started a second time."""
    endless = world.foreign("endless")
    (endless / "sitecustomize.py").write_text(
        LOG.format(name="endless") + "import sys; del sys.modules['sitecustomize']\nimport sitecustomize\n"
    )
    assert world.start([world.overlay(), endless]).log == ["armed", "endless"]


def test_one_in_front_of_ours_and_behind_it(world: World) -> None:
    """It is still running when it meets ours, and must not be started again."""
    ddtrace, link = world.foreign("ddtrace", "chains"), world.root / "link"
    link.symlink_to(ddtrace)  # Python itself drops a folder that is there twice under one name
    assert world.start([ddtrace, world.overlay(), link, world.foreign("next")]).log == ["ddtrace", "armed", "next"]


def test_one_in_front_of_ours_is_not_shadowed_by_it(world: World) -> None:
    """It has run, and does not chain; ours is then started by its file name, and hands on to what is behind it."""
    ours = world.overlay()
    path = [world.foreign("in_front"), ours, world.foreign("behind")]
    run = "import runpy, sys; runpy.run_path(sys.argv[1])"
    assert world.start(path, "-c", run, str(ours / "sitecustomize.py")).log == ["in_front", "armed", "behind"]


def test_one_like_opentelemetry_does_not_lock_ours_out_of_the_children(world: World) -> None:
    """It moves itself to the front of PYTHONPATH, and does not chain: no child would ever import our module."""
    kept = world.foreign("kept", "empty")
    ours = world.overlay()
    opentelemetry = world.foreign("opentelemetry", "opentelemetry")
    child = "import subprocess, sys, os; print(os.environ['PYTHONPATH'], flush=True); "
    child += "subprocess.run([sys.executable, '-c', ''])"
    result = world.start([kept, ours, opentelemetry], "-c", child)
    assert result.log == ["armed", "opentelemetry"] * 2
    assert result.stdout == os.pathsep.join(map(str, [kept, ours, opentelemetry]))


def test_one_that_takes_ours_off_python_path_is_obeyed(world: World) -> None:
    foreign = world.foreign("foreign")
    (foreign / "sitecustomize.py").write_text("import os; os.environ['PYTHONPATH'] = '/elsewhere'")
    assert world.start([world.overlay(), foreign], "-c", "import os; print(os.environ['PYTHONPATH'])").stdout == (
        "/elsewhere"
    )


# Bad input: the overlay more than once, or not in one piece


def test_the_folder_twice_is_no_matter(world: World) -> None:
    ours = world.overlay()
    foreign = world.foreign("foreign")
    result = world.start([ours, foreign, ours, f"{ours}/"])
    assert (result.log, result.stderr) == (["armed", "foreign"], "")


def test_a_link_to_the_folder_is_the_folder(world: World) -> None:
    ours = world.overlay()
    link = world.root / "link"
    link.symlink_to(ours)
    for path in ([ours, link], [link, ours]):
        result = world.start([*path, world.foreign(f"foreign{path.index(link)}")])
        assert (len(result.log), result.stderr) == (2, "")


def test_a_link_to_the_package_is_the_package(world: World) -> None:
    ours = world.overlay()
    linked = world.foreign("linked", "empty")
    (linked / "overlay").symlink_to(ours / "overlay")
    result = world.start([linked, ours])
    assert (result.log, result.stderr) == (["armed"], "")


def test_files_linked_one_by_one_are_one_overlay(world: World) -> None:
    """Kubernetes and Bazel mount folders of links."""
    ours = world.overlay()
    farm = world.root / "farm"
    (farm / "overlay").mkdir(parents=True)
    for file in ours.rglob("*.py"):
        (farm / file.relative_to(ours)).symlink_to(file)
    result = world.start([farm, world.foreign("foreign")])
    assert (result.log, result.stderr) == (["armed", "foreign"], "")


@pytest.mark.parametrize("between", [True, False])
def test_a_second_copy_stands_down_with_one_line(world: World, between: bool) -> None:
    first, second, foreign = world.overlay("first"), world.overlay("second"), world.foreign("foreign", "chains")
    result = world.start([first, foreign, second] if between else [first, second, foreign])
    assert result.log == ["armed", "foreign"]
    assert result.stderr == (
        f"vLLM overlay: {second} stands down for the copy in {first}; keep one of the two on PYTHONPATH\n"
    )
    assert result.stdout == str(foreign / "sitecustomize.py")


def test_a_second_copy_that_is_switched_off_says_nothing(world: World) -> None:
    result = world.start([world.overlay("first"), world.overlay("second"), world.foreign("foreign")], VLLMOVERLAY="0")
    assert (result.log, result.stderr) == (["foreign"], "")


def test_imported_again_it_is_not_armed_again(world: World) -> None:
    probe = "import sys; del sys.modules['sitecustomize']; import sitecustomize; print(sitecustomize.__file__)"
    ours = world.overlay()
    result = world.start([ours], "-c", probe)
    assert (result.log, result.stdout, result.stderr) == (["armed"], str(ours / "sitecustomize.py"), "")


@pytest.mark.parametrize("kind", ["module", "chains", "raises", "empty"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("rm overlay/bootstrap.py", "cannot import name 'bootstrap'"),
        ("echo 'def (' > overlay/bootstrap.py", "SyntaxError"),
        ("echo > overlay/bootstrap.py", "has no attribute 'arm'"),
        ("echo 'def arm(): raise OSError(28)' > overlay/bootstrap.py", "OSError: 28"),
        ("rm -r overlay", "No module named 'overlay'"),
    ],
)
def test_a_damaged_folder_is_reported_in_one_line_and_python_runs_as_stock(
    world: World, damage: str, words: str, kind: str
) -> None:
    ours = world.overlay()
    subprocess.run(damage, shell=True, cwd=ours, check=True)
    path = [world.foreign("foreign", kind), world.foreign("next", "empty")]
    result, stock = world.start([ours, *path, ours]), world.start(path)
    (line,) = [line for line in result.stderr.splitlines() if "overlay:" in line]
    assert line.startswith(f"vLLM overlay: not armed from {ours}: ")
    assert words in line
    assert result.stderr.count("ValueError: first line") == stock.stderr.count("ValueError: first line")
    assert (result.log, result.returncode) == (stock.log, 0)
    if kind in ("module", "chains"):
        assert result.stdout == stock.stdout


@pytest.mark.parametrize("kind", ["module", "chains", "raises", "not_found", "empty"])
def test_without_chain_the_import_system_hands_on(world: World, kind: str) -> None:
    ours = world.overlay()
    (ours / "overlay" / "chain.py").unlink()
    foreign = world.foreign("foreign", kind)
    probe = SEEN + "; print(sys.path[1:])"
    result = world.start([ours, foreign, ours], "-c", probe)
    stock = world.start([foreign], "-c", probe)
    assert result.log == ["armed", *stock.log]
    first_line = f"vLLM overlay: {ours} is damaged: ModuleNotFoundError: No module named 'overlay.chain'\n"
    assert result.stderr == ("" if kind == "empty" else first_line + stock.stderr)
    seen, paths = result.stdout.splitlines()
    stock_seen, stock_paths = stock.stdout.splitlines()
    if kind in ("module", "chains"):
        assert seen == stock_seen
    assert paths == stock_paths.replace("[", f"['{ours}', ", 1)


def test_another_package_of_our_name_is_left_alone(world: World) -> None:
    stranger = world.foreign("stranger", "empty")
    (stranger / "overlay").mkdir()
    (stranger / "overlay" / "__init__.py").write_text("name = 'stranger'")
    path = [stranger, world.overlay(), world.foreign("foreign")]
    result = world.start(path, "-c", "import overlay; print(overlay.name)")
    assert (result.log, result.stdout) == (["foreign"], "stranger")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"vLLM overlay: not armed from {path[1]}: ImportError: cannot import name 'bootstrap'")
    assert str(stranger) in line


def test_a_strict_arm_can_stop_the_interpreter(world: World) -> None:
    ours = world.overlay()
    (ours / "overlay" / "bootstrap.py").write_text("def arm(): raise SystemExit('bad setting')\n")
    result = world.start([ours, world.foreign("foreign")], "-c", "print('started')")
    assert (result.log, result.stdout) == ([], "")
    assert result.returncode != 0
    assert "SystemExit: bad setting" in result.stderr


# All of it together, against stock Python

KINDS = [
    "module", "package", "bytecode", "zip", "namespace", "empty", "missing", "chains", "raises", "syntax_error",
    "not_found", "exits",
]  # fmt: skip
LETS_THE_NEXT_ONE_RUN = {"namespace", "empty", "missing", "chains"}
numbers = itertools.count()


@settings(max_examples=40)
@given(
    kinds=st.lists(st.sampled_from(KINDS), max_size=5),
    place=st.integers(0, 5),
    again=st.sampled_from([None, "same", "link"]),
)
@example(kinds=["chains", "chains", "module"], place=1, again="link")
@example(kinds=["chains", "namespace", "raises"], place=0, again="same")
def test_like_stock_python_whatever_is_on_the_path(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], place: int, again: str | None
) -> None:
    """The same modules run in the same order, once each, with the same outcome; and the overlay is armed once."""
    world = World(tmp_path_factory.mktemp(f"world{next(numbers)}"))
    foreign = [world.foreign(f"{number}{kind}", kind) for number, kind in enumerate(kinds)]
    ours = world.overlay()
    path = [*foreign[:place], ours, *foreign[place:]]
    if again:
        link = world.root / "link"
        link.symlink_to(ours)
        path.append(ours if again == "same" else link)

    stock = world.start(foreign)
    result = world.start(path)

    assert result.foreign == stock.log
    assert len(set(result.foreign)) == len(result.foreign)
    assert result.returncode == stock.returncode
    assert result.stderr.count("Error in sitecustomize") == stock.stderr.count("Error in sitecustomize")
    reached = set(kinds[:place]) <= LETS_THE_NEXT_ONE_RUN
    assert result.log.count("armed") == reached
    if "exits" not in kinds:
        in_sight = stock.stdout
        if in_sight == "None" and reached and "namespace" in kinds:
            return  # stock Python finds the namespace package; nobody can tell what a folder without code has done
        if in_sight == "None" and reached:
            in_sight = str(ours / "sitecustomize.py")
        assert result.stdout == in_sight


# The real ones


def test_with_the_real_opentelemetry(world: World) -> None:
    auto_instrumentation = pytest.importorskip("opentelemetry.instrumentation.auto_instrumentation")
    folder = Path(auto_instrumentation.__file__).parent
    child = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', os.environ['SEEN']])"
    result = world.start([world.overlay(), folder], "-c", child, SEEN=SEEN)
    assert result.log == ["armed", "armed"]
    assert result.stdout == str(folder / "sitecustomize.py")


@pytest.mark.parametrize("in_front", [True, False])
def test_with_the_real_ddtrace(world: World, in_front: bool) -> None:
    pytest.importorskip("ddtrace")
    import importlib.util

    spec = importlib.util.find_spec("ddtrace")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "bootstrap"
    ours, after = world.overlay(), world.foreign("after")
    result = world.start(
        [folder, ours, after] if in_front else [ours, folder, after],
        "-c",
        SEEN + "; print(sys.modules['ddtrace.bootstrap.sitecustomize'].loaded)",
        DD_TRACE_ENABLED="false",
        DD_INSTRUMENTATION_TELEMETRY_ENABLED="false",
        DD_REMOTE_CONFIGURATION_ENABLED="false",
    )
    assert result.log == ["armed", "after"]
    assert result.stdout.splitlines() == [str(after / "sitecustomize.py"), "True"]
