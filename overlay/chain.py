"""Hands on to the sitecustomize module that ours shadows.

Python imports the first module named sitecustomize on sys.path and no other. Ours takes that place, and gives it back:
`hand_on` runs the one that Python would have run without us. Only that one, because those behind it were shadowed
already; if it chains on in its turn, as many tools' do, its search meets ours again, and ours hands on once more.

Tools run the next one in many ways: an import, its spec, load_module, runpy; as a module of any name, in sys.modules or
not, or even in the tool's own module. One rule holds for all of them: **the module that our file is run in becomes the next
one**. We execute the next one's code in our own namespace, so whoever holds that module holds what it would have held without
us. Where there is no next one, a tool that imported it has to hear so from an exception, and expects it; a tool that
executes our file has found one and expects none, so for that tool our module is an empty one.

This cannot loop: no file is started while it is still running further up the stack.

It is loaded while Python starts, and only if there may be something to hand on to. So it uses only what the interpreter
has loaded by then: no importlib (the frozen parts of it are there already), no typing, and not even `from __future__`,
which is a file too. It runs in Python 3.6 and later: PYTHONPATH also holds for a container's older Pythons.
"""

# os.path throughout: pathlib would be one more import
import os
import sys
from _frozen_importlib import module_from_spec
from _frozen_importlib_external import PathFinder, spec_from_file_location

TYPE_CHECKING = False  # type checkers know this name; typing, which defines it, costs more than all of this module
if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.machinery import ModuleSpec
    from types import FrameType, ModuleType
    from typing import Any

_NAME = "sitecustomize"
#: Who has our file run: Python's own start; a module that imports the next one meanwhile; somebody who executes the file.
_SITE, _IMPORT, _EXECUTION = "site", "import", "execution"
#: The functions of importlib and runpy that look a module up by its name, and raise ImportError where there is none.
_LOOK_UP = ("_find_and_load", "run_module")

_own_files: "set[str]" = set()  # the sitecustomize.py of this overlay, and those of further copies of it that have run
_running: "list[str]" = []  # those that we have started and that have not ended


def has_run(own_file: str) -> bool:
    """Say whether the sitecustomize in `own_file`, which is ours or a further copy of it, has run in this process."""
    return os.path.realpath(own_file) in _own_files


def hand_on(frame: "FrameType", file: str) -> None:
    """Run the sitecustomize that ours shadows, in ours: the module that `frame` executes, from our `file`.

    Where site.py asks, a failure is reported in site.py's way, and survived. Whoever else asks gets the answer that there
    would be without us: the next one, its exception, or that there is none.
    """
    own = os.path.realpath(file)
    _own_files.update((own, _file_of(frame)))
    asked = _who_asks(frame)
    spec = _find_shadowed(own, frame)
    namespace = frame.f_globals
    if spec is None:
        _give_back(namespace, own, frame)
        if asked == _IMPORT:
            raise ModuleNotFoundError(f"No module named {_NAME!r}", name=_NAME)
        return

    before = dict(namespace)
    name = str(namespace.get("__name__"))
    ours = sys.modules.get(name)
    if getattr(ours, "__dict__", None) is not namespace:
        ours = None
    python_path = os.environ.get("PYTHONPATH", "")
    _running.append(os.path.realpath(str(spec.origin)))
    try:
        _become(namespace, own, spec, ours)
        if ours is not None:
            sys.modules.setdefault(name, ours)  # the import system insists that whoever was imported is there
    except Exception as error:
        if asked != _SITE:
            raise
        namespace.clear()
        namespace.update(before)
        if ours is not None:
            sys.modules[name] = ours
        # site.py, too, is silent about a sitecustomize that ends by not finding a further one.
        if not (isinstance(error, ImportError) and error.name == _NAME):
            _report(str(spec.origin), error)
    finally:
        _running.pop()
        _stay_ahead(os.path.realpath(os.path.dirname(os.path.abspath(file))), python_path)


def _become(namespace: "dict[str, Any]", own: str, spec: "ModuleSpec", ours: "ModuleType | None") -> None:
    """Execute the module of `spec` in our `namespace`, or beside it where its loader has no code to execute."""
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(_NAME) if get_code is not None else None
    module = _describe(namespace, own, spec)
    if code is not None:
        exec(code, namespace)
        return
    if ours is not None:  # an extension module
        sys.modules[spec.name] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    namespace.update(vars(module))


def _describe(namespace: "dict[str, Any]", own: str, spec: "ModuleSpec") -> "ModuleType":
    """Have a `namespace` say that it is made from `spec` wherever it says that it is made from ours. Gives what it copies."""
    ours = namespace.get("__spec__")
    names = ["__file__"] if _is_file(namespace.get("__file__"), own) else []
    if ours is not None and _is_file(ours.origin, own):
        names += ["__spec__", "__loader__", "__package__", "__cached__", "__path__", "__doc__"]
        spec.name = ours.name
    module = module_from_spec(spec)
    for name in names:
        namespace.pop(name, None)
        if hasattr(module, name):
            namespace[name] = getattr(module, name)
    return module


def _give_back(namespace: "dict[str, Any]", own: str, frame: "FrameType") -> None:
    """A tool's own module that our file is executed in says who it was: load_module has written ours over that."""
    for above in _modules_above(frame):
        if above.f_globals is namespace and _file_of(above) not in _own_files:
            spec = spec_from_file_location(str(namespace.get("__name__")), above.f_code.co_filename)
            if spec is not None:
                _describe(namespace, own, spec)
            return


def _is_file(path: object, real_path: str) -> bool:
    return isinstance(path, str) and os.path.realpath(path) == real_path


def _report(origin: str, error: Exception) -> None:
    """Write what site.py would write, and the file, in one line. To stderr: logging is not configured at this point."""
    message = " ".join(str(error).split())
    hint = "" if sys.flags.verbose else "; set PYTHONVERBOSE for traceback"
    try:
        sys.stderr.write(f"Error in sitecustomize {origin}{hint}: {type(error).__name__}: {message}\n")
    except (AttributeError, OSError, ValueError):  # Python was started without a stderr, or nobody reads it any more
        return
    if sys.flags.verbose:
        sys.excepthook(type(error), error, error.__traceback__)


def _find_shadowed(own: str, frame: "FrameType") -> "ModuleSpec | None":
    """Find the first sitecustomize behind ours on sys.path that is not running. Those in front of ours shadow ours."""
    barred = _own_files.union(_running, map(_file_of, _modules_above(frame)))
    passed_ours = False
    for entry in list(sys.path):
        try:
            spec = PathFinder.find_spec(_NAME, [entry])  # None, too, for an entry that is no text
        except Exception as error:  # an entry nobody can search must not hide those behind it
            _report(f"(looking for one in {entry!r})", error)
            continue
        # No origin: a namespace package, that is any folder of this name. Importing it would run nothing.
        if spec is None or spec.loader is None or spec.origin is None:
            continue
        path = os.path.realpath(spec.origin)
        if path == own:
            passed_ours = True
        elif passed_ours and path not in barred:
            return spec
    return None


def _who_asks(frame: "FrameType") -> str:
    """Give _SITE, _IMPORT or _EXECUTION, from what is on the stack above our module, which `frame` executes.

    Once Python has started, nobody chains any more: there an import that finds nothing to hand on to gets our module.
    """
    imported = chained = False
    above = frame.f_back
    while above is not None:
        name = above.f_code.co_name
        if name == "execsitecustomize":
            return _IMPORT if chained else _SITE
        if name in _LOOK_UP:
            imported = True
        elif name == "<module>" and _file_of(above) not in _own_files:
            if not imported:
                break
            chained = True
        above = above.f_back
    return _EXECUTION


def _modules_above(frame: "FrameType") -> "Iterator[FrameType]":
    """Yield the frame of every module that is being executed further up the stack."""
    above = frame.f_back
    while above is not None:
        if above.f_code.co_name == "<module>":
            yield above
        above = above.f_back


def _file_of(frame: "FrameType") -> str:
    """The real path of the file whose code `frame` executes; not `__file__`, which load_module changes under a tool."""
    return os.path.realpath(frame.f_code.co_filename)


def _stay_ahead(own_folder: str, python_path_before: str) -> None:
    """Put our folder back in front of what another sitecustomize has put before it on PYTHONPATH.

    OpenTelemetry takes its folder off PYTHONPATH while it starts, and puts it back at the front. It does not chain, so
    without this the overlay would be armed in the API server and missing from every engine process spawned by it.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    before = python_path_before.split(os.pathsep)
    if entries == before:
        return
    places = [place for place, entry in enumerate(entries) if entry and os.path.realpath(entry) == own_folder]
    if not places:
        return
    in_front, ours, behind = entries[: places[0]], entries[places[0]], entries[places[0] + 1 :]
    in_front_before = before[: before.index(ours)] if ours in before else []
    newcomers = [entry for entry in in_front if entry not in in_front_before]
    kept = [entry for entry in in_front if entry in in_front_before]
    os.environ["PYTHONPATH"] = os.pathsep.join([*kept, ours, *newcomers, *behind])
