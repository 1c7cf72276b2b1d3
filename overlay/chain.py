"""Runs the sitecustomize module that ours shadows.

Python imports the first module named sitecustomize on sys.path and no other. Ours is that first one, so `hand_on` runs the
one that Python would run without us. It runs only that one, because those behind it were shadowed already. Many tools'
sitecustomize runs the next one in its turn. Its search then finds ours again, and ours hands on once more.

Tools run the next one in many ways: an import, its spec, load_module, or runpy; as a module of any name, in sys.modules or
not, or even in the tool's own module. One rule covers all of them: **the module that our file is run in becomes the next
one**. We execute the next one's code in our own namespace, so whoever holds our module holds what they would hold without
us. If there is no next one, a tool that imported it expects an exception and gets one. A tool that executes our file has
found a file and expects no exception, so for that tool our module is empty.

This cannot loop: no file is started while it is still running further up the stack.

This module is loaded while Python starts, and only if there may be a next one. So it uses only what the interpreter has
loaded by then: no importlib (its frozen parts are already loaded), no typing, and no `from __future__`, which is a file
too. It runs in Python 3.6 and later, because PYTHONPATH also reaches the older Pythons of a container.
"""

# os.path everywhere: pathlib would be one more import.
import os
import sys
from _frozen_importlib import module_from_spec
from _frozen_importlib_external import PathFinder, spec_from_file_location

TYPE_CHECKING = False  # type checkers know this name; importing typing costs more than all of this module
if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.machinery import ModuleSpec
    from types import FrameType, ModuleType
    from typing import Any

_NAME = "sitecustomize"
#: Who runs our file: Python's own start; a module that imports the next one; a tool that executes the file.
_SITE, _IMPORT, _EXECUTION = "site", "import", "execution"
#: The functions of importlib and runpy that look up a module by name and raise ImportError if there is none.
_LOOK_UP = ("_find_and_load", "run_module")

_own_files: "set[str]" = set()  # our sitecustomize.py, and those of other copies of the overlay that have run
_running: "list[str]" = []  # those that we have started and that still run


def has_run(own_file: str) -> bool:
    """Whether the sitecustomize in `own_file` (ours, or that of another copy of the overlay) has run in this process."""
    return os.path.realpath(own_file) in _own_files


def hand_on(frame: "FrameType", file: str) -> None:
    """Run the sitecustomize that ours shadows, in our module: the one that `frame` executes, from our `file`.

    If site.py asks, a failure is reported in site.py's way and Python goes on. Anybody else gets what they would get
    without us: the next module, its exception, or ModuleNotFoundError if there is none.
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
            sys.modules.setdefault(name, ours)  # the import system requires that an imported module is there
    except Exception as error:
        if asked != _SITE:
            raise
        namespace.clear()
        namespace.update(before)
        if ours is not None:
            sys.modules[name] = ours
        # site.py also says nothing if a sitecustomize ends because it finds no further one.
        if not (isinstance(error, ImportError) and error.name == _NAME):
            _report(str(spec.origin), error)
    finally:
        _running.pop()
        _stay_ahead(os.path.realpath(os.path.dirname(os.path.abspath(file))), python_path)


def _become(namespace: "dict[str, Any]", own: str, spec: "ModuleSpec", ours: "ModuleType | None") -> None:
    """Execute the module of `spec` in our `namespace`; if its loader has no code to execute, execute it beside ours and
    copy its names.
    """
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
    """Make a `namespace` that names our file name `spec` instead. Returns the new module that the values come from."""
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
    """If a tool executes our file in its own module, restore what that module says of itself; load_module has overwritten
    it.
    """
    for above in _modules_above(frame):
        if above.f_globals is namespace and _file_of(above) not in _own_files:
            spec = spec_from_file_location(str(namespace.get("__name__")), above.f_code.co_filename)
            if spec is not None:
                _describe(namespace, own, spec)
            return


def _is_file(path: object, real_path: str) -> bool:
    return isinstance(path, str) and os.path.realpath(path) == real_path


def _report(origin: str, error: Exception) -> None:
    """Write one line as site.py would, with the file's name. It goes to stderr, because logging is not configured yet."""
    message = " ".join(str(error).split())
    hint = "" if sys.flags.verbose else "; set PYTHONVERBOSE for traceback"
    try:
        sys.stderr.write(f"Error in sitecustomize {origin}{hint}: {type(error).__name__}: {message}\n")
    except (AttributeError, OSError, ValueError):  # there is no stderr, or its reader has gone
        return
    if sys.flags.verbose:
        sys.excepthook(type(error), error, error.__traceback__)


def _find_shadowed(own: str, frame: "FrameType") -> "ModuleSpec | None":
    """Find the first sitecustomize behind ours on sys.path that is not running. Those in front of ours shadow ours."""
    barred = _own_files.union(_running, map(_file_of, _modules_above(frame)))
    passed_ours = False
    for entry in list(sys.path):
        try:
            spec = PathFinder.find_spec(_NAME, [entry])  # also None for an entry that is not text
        except Exception as error:  # an entry that cannot be searched must not hide the next ones
            _report(f"(looking for one in {entry!r})", error)
            continue
        # No origin: a namespace package, which is any folder of this name. Importing it would run nothing.
        if spec is None or spec.loader is None or spec.origin is None:
            continue
        path = os.path.realpath(spec.origin)
        if path == own:
            passed_ours = True
        elif passed_ours and path not in barred:
            return spec
    return None


def _who_asks(frame: "FrameType") -> str:
    """Return _SITE, _IMPORT or _EXECUTION, from the stack above our module, which `frame` executes.

    Once Python has started, no tool chains any more. An import that then finds nothing to hand on to gets our module.
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
    """The real path of the file whose code `frame` executes. `__file__` will not do, because load_module changes it."""
    return os.path.realpath(frame.f_code.co_filename)


def _stay_ahead(own_folder: str, python_path_before: str) -> None:
    """Put our folder back in front of what another sitecustomize has put before it on PYTHONPATH.

    OpenTelemetry takes its folder off PYTHONPATH while it starts, and then puts it back at the front. It does not chain.
    Without this, the overlay would be armed in the API server and missing from every engine process that it spawns.
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
