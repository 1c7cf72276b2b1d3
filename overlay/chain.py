"""Hands on to the sitecustomize module that ours shadows.

Python imports the first module named sitecustomize on sys.path and no other. Ours takes that place, and gives it back:
`hand_on` runs the one that Python would have run without us. Only that one, because those behind it were shadowed
already; if it chains on in its turn, as ddtrace's does, its search meets ours again, and ours hands on once more.

Three rules keep this from looping: a file is known by its real path, no file is started twice, and no file is started
that is still running further down the stack (it came before us on sys.path, and imported us).

It is loaded while Python starts, and only if there is something to hand on to. So it uses only what the interpreter
has loaded by then: no importlib (the frozen parts of it are there already), no typing, and not even `from __future__`,
which is a file too.
"""

# os.path throughout: pathlib would be one more import
import os
import sys
from _frozen_importlib import module_from_spec
from _frozen_importlib_external import PathFinder

TYPE_CHECKING = False  # type checkers know this name; typing, which defines it, costs more than all of this module
if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.machinery import ModuleSpec
    from types import FrameType

_NAME = "sitecustomize"
_own_files: set[str] = set()  # the sitecustomize.py of this overlay, and those of further copies of it
_started_files: set[str] = set()


def has_run(own_file: str) -> bool:
    """Say whether the sitecustomize in `own_file`, which is ours or a further copy of it, has run in this process."""
    return os.path.realpath(own_file) in _own_files


def hand_on(own_file: str) -> None:
    """Run the sitecustomize that the one in `own_file` shadows, under its own name, and leave it in sys.modules.

    A failure is reported as site.py would report it, and survived. A foreign sitecustomize that imported ours while
    looking for the next one gets the answer it would have got without us: the next one, its exception, or no module.
    """
    own_path = os.path.realpath(own_file)
    _own_files.add(own_path)
    imported_by_another = any(
        frame.f_globals.get("__name__") == _NAME and path not in _own_files for frame, path in _running_modules()
    )
    spec = _find_shadowed(own_path)
    if spec is None or spec.loader is None:
        if imported_by_another:
            raise ModuleNotFoundError(f"No module named {_NAME!r}", name=_NAME)
        return

    ours = sys.modules.get(_NAME)
    python_path = os.environ.get("PYTHONPATH", "")
    try:
        module = sys.modules[_NAME] = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules.setdefault(_NAME, module)  # the import system insists that whoever was imported is there
    except Exception as error:
        if ours is not None:
            sys.modules[_NAME] = ours
        if imported_by_another:
            raise
        # site.py, too, is silent about a sitecustomize that ends by not finding a further one.
        if not (isinstance(error, ImportError) and error.name == _NAME):
            _report(str(spec.origin), error)
    finally:
        _stay_ahead(os.path.realpath(os.path.dirname(os.path.abspath(own_file))), python_path)


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


def _find_shadowed(own_path: str) -> "ModuleSpec | None":
    """Find the first sitecustomize behind ours on sys.path that has not been started.

    Those in front of ours count only where ours is not on sys.path at all, because somebody loaded it by its file name.
    """
    in_front: list[ModuleSpec] = []
    passed_ours = False
    barred = _own_files | _started_files
    barred.update(path for _, path in _running_modules())
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
        if path == own_path:
            passed_ours = True
            in_front.clear()
        elif path not in barred:
            in_front.append(spec)
            if passed_ours:
                break
    if not in_front:
        return None
    _started_files.add(os.path.realpath(str(in_front[0].origin)))
    return in_front[0]


def _running_modules() -> "Iterator[tuple[FrameType, str]]":
    """Yield frame and real path of every module on the stack that is being executed.

    By its `__file__`: the name in the code object of a module without source is that of the file it was compiled from.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            file = frame.f_globals.get("__file__")
            if isinstance(file, str):
                yield frame, os.path.realpath(file)
        frame = frame.f_back


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
