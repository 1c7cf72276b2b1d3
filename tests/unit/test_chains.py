"""Tools that chain sitecustomize modules start as they do without the overlay, whichever way they run the next one.

Each case is a real interpreter (door_world.py) with tools on PYTHONPATH that do what public tools do, once with the
overlay among them and once without. What each tool saw and was is in the log, and the two logs are the same.
"""

import ast
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.unit.door_world import REPOSITORY, Result, World

#: Tools are named in the order of sys.path: load_module may give a tool its own module, or that of one in front of it.
#: A tool's notes: who it is, by its own names and by those of the module that it found; and whether it left its names alone.
NOTE = """
import os
import sys
def note(name, when, found):
    def folder(file):
        return file and os.path.basename(os.path.dirname(file))
    own = globals()
    spec = own.get("__spec__")
    listed = sys.modules.get("sitecustomize")
    next_one = getattr(found, "NAME", name)
    facts = [
        name, when, own["__name__"], folder(own.get("__file__")), own.get("__package__"),
        spec and (spec.name, folder(spec.origin)), own.get("__doc__"), getattr(listed, "__dict__", None) is own,
        "own " + ",".join(sorted(own)), next_one > name and (next_one, folder(getattr(found, "__file__", None))),
    ]
    with open(os.environ["DOOR_LOG"], "a") as log:
        log.write("|".join(map(str, facts)).replace(" ", "_") + "\\n")
NAME = {name!r}
note({name!r}, "begins", None)
"""
PLAIN = NOTE + "\nnote({name!r}, 'ends', None)\n"

TOOL = (
    NOTE
    + """
import importlib
import importlib.util
import runpy
import types
from importlib.machinery import PathFinder
here_of_{name} = os.path.dirname({file!r})
path = {path}
found = None
if {hidden}:
    sys.path.remove(here_of_{name})
spec = PathFinder.find_spec("sitecustomize", path)
mine_of_{name} = sys.modules.get("sitecustomize")
try:
{run}
except {caught} as error:
    note({name!r}, "caught " + type(error).__name__, None)
    if "sitecustomize" not in sys.modules and mine_of_{name} is not None:
        sys.modules["sitecustomize"] = mine_of_{name}
finally:
    if {hidden}:
        sys.path.insert(0, here_of_{name})
note({name!r}, "ends", found)
"""
)

#: Where a tool looks: behind itself; anywhere but at itself; or where Python does, with its folder off sys.path meanwhile.
PATHS = {
    "behind": "sys.path[sys.path.index(here_of_{name}) + 1:]",
    "not here": "[entry for entry in sys.path if entry != here_of_{name}]",
    "hidden": "sys.path",
}

OWN = "the tool's own module"
#: How a tool runs what it found. The first line of some says that they need their folder off sys.path; of some, that what
#: they found stays in sys.modules. Where that is the overlay's file and nothing is behind it, an empty module stays there.
WAYS = {
    "import": """# hidden
        sys.modules.pop("sitecustomize")
        import sitecustomize as found
        """,
    "import, itself in sys.modules": """# hidden
        import sitecustomize as found
        """,
    "import_module": """# hidden
        sys.modules.pop("sitecustomize")
        found = importlib.import_module("sitecustomize")
        """,
    "util.find_spec": """# hidden
        sys.modules.pop("sitecustomize")
        spec = importlib.util.find_spec("sitecustomize")
        if spec is not None:
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        sys.modules["sitecustomize"] = mine_of_{name}
        """,
    "run_module": """# hidden
        sys.modules.pop("sitecustomize")
        try:
            runpy.run_module("sitecustomize", alter_sys=True)
        except ImportError:  # one without a name, for which site.py would not be silent
            note({name!r}, "found none", None)
        finally:
            sys.modules["sitecustomize"] = mine_of_{name}
        """,
    "spec": """
        if spec is not None:
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        """,
    "spec, registered": """# stays
        if spec is not None:
            found = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        """,
    "spec, registered meanwhile": """
        if spec is not None:
            found = sys.modules["sitecustomize"] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(found)
            finally:
                sys.modules["sitecustomize"] = mine_of_{name}
        """,
    "spec, registered by another name": """
        if spec is not None:
            found = sys.modules["the_next_one"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        """,
    "another name": """
        if spec is not None:
            spec = importlib.util.spec_from_file_location("the_next_one", spec.origin)
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        """,
    "another name, registered": """
        if spec is not None:
            spec = importlib.util.spec_from_file_location("the_next_one", spec.origin)
            found = sys.modules["the_next_one"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        """,
    "a bare module": """
        if spec is not None:
            found = types.ModuleType("sitecustomize")
            spec.loader.exec_module(found)
        """,
    OWN: """
        if spec is not None:
            exec(spec.loader.get_code("sitecustomize"), globals())
        """,
    "load_module": """
        if spec is not None:
            found = spec.loader.load_module("sitecustomize")
        """,
    "load_module, not in sys.modules": """# stays
        sys.modules.pop("sitecustomize", None)
        if spec is not None:
            found = spec.loader.load_module("sitecustomize")
        else:
            sys.modules["sitecustomize"] = mine_of_{name}
        """,
    "run_path": """
        if spec is not None:
            found = types.SimpleNamespace(**runpy.run_path(spec.origin))
        """,
    "run_path, by name": """
        if spec is not None:
            found = types.SimpleNamespace(**runpy.run_path(spec.origin, run_name="sitecustomize"))
        """,
    "exec": """
        if spec is not None:
            exec(compile(spec.loader.get_source("sitecustomize"), spec.origin, "exec"), {{"__name__": "sitecustomize"}})
        """,
}
NEEDS_HIDDEN = [way for way, text in WAYS.items() if text.startswith("# hidden")]
STAYS = [way for way, text in WAYS.items() if text.startswith("# stays")]
#: Ways that give the next one a module which does not say that it is made from the next one's file. If that one uses
#: load_module, what its module said is lost; and nobody but it could know.
UNDESCRIBED = (OWN, "a bare module", "exec", "run_path", "run_path, by name")
LISTED, FOUND = 7, 9  #: The notes that tell of such an empty module: who is in sys.modules, and what was found there.
#: What is behind the tools, if anything: a module of somebody's own.
LASTS = {
    "nothing": None,
    "a module": PLAIN,
    "with a text": "'''A text of its own.'''\n" + PLAIN,
    "raises": PLAIN + "raise ValueError('of the last one')\n",
    "raises ImportError": PLAIN + "raise ImportError('of the last one')\n",
}


@dataclass(frozen=True)
class Tool:
    """How one tool looks for the next sitecustomize, runs it, and what it catches."""

    way: str
    path: str = "behind"
    caught: str = "Exception"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        file = folder / "sitecustomize.py"
        name = folder.name
        indented = "\n".join(line[4:] for line in WAYS[self.way].format(name=name).splitlines()[1:])
        file.write_text(
            TOOL.format(
                name=name,
                file=str(file),
                path=PATHS[self.path].format(name=name),
                hidden=self.path == "hidden",
                caught=self.caught,
                run=indented,
            )
        )


def tools(path: str) -> st.SearchStrategy[Tool]:
    ways = list(WAYS) if path == "hidden" else [way for way in WAYS if way not in NEEDS_HIDDEN]
    return st.builds(Tool, st.sampled_from(ways), st.just(path), st.sampled_from(["Exception", "ImportError", "()"]))


@st.composite
def chains(draw: st.DrawFn) -> list[Tool]:
    """Up to three tools that do not find each other again and again where the overlay is not there.

    One that searches all of sys.path finds those in front of it, unless they are hidden.
    """
    hidden = draw(st.lists(tools("hidden"), max_size=2))
    anywhere = draw(st.lists(tools("not here"), max_size=1))
    behind = draw(st.lists(tools("behind"), min_size=0 if hidden or anywhere else 1, max_size=2))
    chain = [*hidden, *anywhere, *behind][:3]
    ways = [tool.way for tool in chain]
    assume(not any(way in UNDESCRIBED and "load_module" in ways[number:] for number, way in enumerate(ways)))
    return chain


numbers = itertools.count()


def without_the_empty_module(log: list[str]) -> list[list[str]]:
    return [[*facts[:LISTED], *facts[LISTED + 1 : FOUND]] for facts in (line.split("|") for line in log)]


def compare(folder: Path, chain: Sequence[Tool], last: str, place: int, **environment: str) -> tuple[Result, Result]:
    world = World(folder)
    path = []
    for number, tool in enumerate(chain):
        path.append(world.root / f"tool{number}")
        tool.write(path[-1])
    text = LASTS[last]
    if text is not None:
        path.append(world.root / "who_is_last")
        path[-1].mkdir()
        (path[-1] / "sitecustomize.py").write_text(text.format(name="who_is_last"))
    stock = world.start(path)
    overlay = world.start([*path[:place], world.overlay(), *path[place:]], **environment)
    if last == "nothing" and any(tool.way in STAYS for tool in chain):
        assert without_the_empty_module(overlay.foreign) == without_the_empty_module(stock.log)
    else:
        assert overlay.foreign == stock.log
    assert overlay.returncode == stock.returncode == 0
    assert "vLLM overlay" not in overlay.stderr
    assert overlay.stderr.count("Error in sitecustomize") == stock.stderr.count("Error in sitecustomize")
    return stock, overlay


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_run_the_next_one(tmp_path: Path, way: str) -> None:
    """The overlay behind the tool, where the tool's lookup finds it and not what it would have found."""
    tool = Tool(way, "hidden" if way in NEEDS_HIDDEN else "not here", "()")
    for number, last in enumerate(("nothing", "a module")):
        stock, overlay = compare(tmp_path / str(number), [tool], last, 1)
        reached = last != "nothing" and way != "import, itself in sys.modules"
        assert any(line.startswith("who_is_last|ends") for line in stock.log) == reached
        found_it = way != "import, itself in sys.modules"  # which finds itself
        assert overlay.log.count("armed") == found_it
        if last == "nothing" and way in ("import", "import_module"):
            assert len(stock.log) == 1  # the tool catches nothing, and ends there
        else:
            assert stock.log[-1].startswith("tool0|ends")


@settings(max_examples=40)
@given(chain=chains(), last=st.sampled_from(list(LASTS)), place=st.integers(0, 3), off=st.booleans())
@example(chain=[Tool("load_module", "not here"), Tool("load_module")], last="a module", place=0, off=False)
@example(chain=[Tool(OWN), Tool(OWN)], last="a module", place=1, off=False)
@example(chain=[Tool("spec, registered"), Tool("spec"), Tool("run_path")], last="raises", place=2, off=True)
@example(chain=[Tool("import", "hidden"), Tool("load_module")], last="nothing", place=2, off=False)
@example(chain=[Tool("another name, registered"), Tool("a bare module")], last="with a text", place=1, off=False)
def test_tools_see_and_are_what_they_would_be_without_the_overlay(
    tmp_path_factory: pytest.TempPathFactory, chain: list[Tool], last: str, place: int, off: bool
) -> None:
    folder = tmp_path_factory.mktemp(f"world{next(numbers)}")
    compare(folder, chain, last, place, **({"VLLMOVERLAY": "0"} if off else {}))


def started(log: Sequence[str]) -> list[str]:
    return [line.partition("|")[0] for line in log if "|begins|" in line]


@pytest.mark.parametrize("way", ["spec", "load_module", "run_path"])
def test_tools_that_find_each_other_do_not_loop(tmp_path: Path, way: str) -> None:
    """Without the overlay these two recurse until Python gives up; behind it each is started once."""
    world = World(tmp_path)
    for name in ("one", "two"):
        Tool(way, "not here").write(world.root / name)
    result = world.start([world.overlay(), world.root / "one", world.root / "two"])
    assert (started(result.log), result.returncode) == (["one", "two"], 0)
    assert [line for line in result.log if "|ends|" in line][-1].startswith("one|")


@pytest.mark.parametrize("way", ["import", "spec", "load_module"])
@pytest.mark.parametrize("last", ["nothing", "a module"])
def test_a_second_copy_of_the_overlay_is_no_next_one(tmp_path: Path, way: str, last: str) -> None:
    world = World(tmp_path)
    tool, after = world.root / "a_tool", world.root / "who_is_last"
    Tool(way, "hidden").write(tool)
    if (text := LASTS[last]) is not None:
        after.mkdir()
        (after / "sitecustomize.py").write_text(text.format(name=after.name))
    stock = world.start([tool, after])
    result = world.start([tool, world.overlay("first"), world.overlay("second"), after])
    assert result.foreign == stock.log
    assert result.stderr.count("stands down") == len(result.stderr.splitlines()) == 1


def test_a_module_whose_loader_has_no_code(tmp_path: Path) -> None:
    """As an extension module: it is run beside ours, and ours has its names all the same."""
    world = World(tmp_path)
    tool = world.root / "a_tool"
    Tool("spec", "not here").write(tool)
    hook = """
import importlib.machinery
import sys
class Loader:
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.NAME = "who_has_no_code"
        module.same = sys.modules["sitecustomize"] is module
class Finder:
    def __init__(self, entry):
        if entry != "/no/code":
            raise ImportError
    def find_spec(self, name, target=None):
        if name == "sitecustomize":
            return importlib.machinery.ModuleSpec(name, Loader(), origin="/no/code/sitecustomize.so")
sys.path_hooks.insert(0, Finder)
sys.path_importer_cache.pop("/no/code", None)
"""
    file = tool / "sitecustomize.py"
    file.write_text(hook + file.read_text())
    stock = world.start([tool, "/no/code"])
    assert "who_has_no_code" in stock.log[-1]
    assert world.start([tool, world.overlay(), "/no/code"]).foreign == stock.log
    probe = "import sys; sys.path.append('/no/code')\n" + hook + "del sys.modules['sitecustomize']\n"
    probe += "import sitecustomize; print(sitecustomize.NAME, sitecustomize.same)"
    assert world.start([world.overlay("alone")], "-c", probe).stdout == "who_has_no_code True"


@pytest.mark.parametrize("way", ["import", "spec", "load_module"])
@pytest.mark.parametrize("damage", ["chain.py", "bootstrap.py"])
def test_a_tool_in_front_of_a_damaged_folder(tmp_path: Path, way: str, damage: str) -> None:
    world = World(tmp_path)
    ours, tool, after = world.overlay(), world.root / "a_tool", world.root / "who_is_last"
    Tool(way, "not here" if way != "import" else "hidden").write(tool)
    after.mkdir()
    (after / "sitecustomize.py").write_text(PLAIN.format(name=after.name))
    (ours / "overlay" / damage).unlink()
    result = world.start([tool, ours, after])
    assert started(result.log) == [tool.name, after.name]
    assert [line for line in result.log if "|ends|" in line][-1].startswith(tool.name)


def interpreters() -> list[Path]:
    """Pythons of this machine that are older than the overlay's, as they lie around in a container beside vLLM's."""
    found = [*Path("/usr/bin").glob("python[23].[0-9]"), *Path("/usr/bin").glob("python2")]
    for folder in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"):
        found += Path(folder or "/nowhere").glob("versions/[23].[0-9].*/bin/python")
    return sorted({path.resolve() for path in found})


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("python", interpreters(), ids=str)
def test_an_older_python_in_the_same_container(tmp_path: Path, python: Path, off: bool) -> None:
    """The overlay is not for it: it says nothing, arms nothing, and stands in nobody's way."""
    environment = {"VLLMOVERLAY": "0"} if off else {}
    world = World(tmp_path)
    path = [world.root / "tool", world.root / "who_is_last"]
    Tool("spec", "not here").write(path[0])
    path[1].mkdir()
    (path[1] / "sitecustomize.py").write_text(PLAIN.format(name="who_is_last"))
    ours = world.overlay()
    alone = world.start([ours], "-c", "print('started')", python=str(python), **environment)
    assert (alone.stdout, alone.stderr, alone.log) == ("started", "", [])
    if "/2." in str(python) or "python2" in str(python):
        return  # nothing is handed on there
    stock = world.start(path, "-c", "print('started')", python=str(python))
    for place in range(3):
        result = world.start([*path[:place], ours, *path[place:]], "-c", "print('started')", python=str(python))
        assert (result.stdout, result.stderr, result.log) == ("started", "", stock.log)


def test_the_door_is_python_2_and_3_at_once() -> None:
    """Also where none of the old ones is at hand: no annotation, no f-string, nothing that is written in 3 alone."""
    tree = ast.parse((REPOSITORY / "sitecustomize.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert functions
    assert not any(function.returns or any(each.annotation for each in function.args.args) for function in functions)
    only_3 = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Nonlocal, ast.Starred, ast.AsyncFunctionDef, ast.MatMult)
    assert not [node for node in ast.walk(tree) if isinstance(node, only_3)]
    assert all(not function.args.kwonlyargs for function in functions)
