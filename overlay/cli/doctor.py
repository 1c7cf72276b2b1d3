"""``doctor``: would a vLLM that is started here have the overlay, and does anything prevent it?

It examines this Python, this environment and this user. So run it where vLLM runs: in its container, as its user.
``status`` tells what the running processes do, and ``check`` what each verdict means; doctor only says whether to run them.

JSON (schema 1)::

    {"schema": 1, "overlay": "0.1.0", "folder": "…", "ok": true,
     "findings": [{"about": "sitecustomize", "state": "ok" | "note" | "do", "found": "…", "do": "…" | null}]}

`about` is one of ABOUT. "do": something has to be done, and `ok` is false. "note": worth knowing; vLLM still has the
overlay.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import overlay
from overlay import __version__, settings
from overlay.cli import check, status, vllms
from overlay.cli.failure import CommandError
from overlay.report.own_folder import NotOurs, check_own_folder
from overlay.start.own_code import Writable, check_code
from overlay.vocabulary import DRIFTED

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
OK, NOTE, DO = "ok", "note", "do"
#: pyproject.toml has the same.
PYTHONS = ((3, 10), (3, 14))
WRAPTS = ((1, 17), (3, 0))
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "auxstream_overlay"
DOOR = "sitecustomize"

FOLDER = Path(overlay.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finding:
    """One line. `do` is what to do about it, None where nothing is."""

    about: str
    state: str
    found: str
    do: str | None = None


def run(as_json: bool) -> int:
    """Look, show, and give the exit status."""
    found = look()
    if as_json:
        print(json.dumps(as_dict(found), indent=1))
    else:
        from overlay.cli import output

        show(found, output.console())
    return int(not is_well(found))


def look() -> list[Finding]:
    """Everything, in the order in which it happens at a start."""
    return [finding for about, examine in ABOUT.items() for finding in _examined(about, examine)]


def _examined(about: str, examine: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A place that cannot be looked at is a finding of its own, and hides no other."""
    try:
        return list(examine())
    except (OSError, ValueError) as error:
        return [Finding(about, DO, f"cannot be looked at: {error}", "let this user read it")]


def is_well(found: list[Finding]) -> bool:
    return all(finding.state != DO for finding in found)


def as_dict(found: list[Finding]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "schema": SCHEMA,
        "overlay": __version__,
        "folder": str(FOLDER),
        "ok": is_well(found),
        "findings": [{"about": one.about, "state": one.state, "found": one.found, "do": one.do} for one in found],
    }


def show(found: list[Finding], console: Console) -> None:
    """The same for people: one finding a line."""
    from rich.text import Text

    from overlay.cli.output import visible

    styles = {OK: "green", NOTE: "yellow", DO: "bold red"}
    width = max(map(len, ABOUT))
    for one in found:
        do = f" -> {one.do}" if one.do else ""
        line = Text(f"{one.state:<5}", style=styles[one.state])
        line.append(visible(f"{one.about:<{width}} {one.found}{do}"), style="default")
        console.print(line, soft_wrap=True)


# ---------------------------------------------------------------- what is looked at


def _entries() -> list[str]:
    """sys.path as sitecustomize.py met it: without the first entry, which is this command's own working directory."""
    first_is_safe = getattr(sys.flags, "safe_path", False) or sys.flags.isolated
    return [entry for entry in sys.path[0 if first_is_safe else 1 :] if isinstance(entry, str)]


def _is_ours(folder: str | os.PathLike[str]) -> bool:
    return os.path.realpath(folder) == str(FOLDER)


def is_armed() -> bool:
    """Whether this process waits for ``import vllm``. Nothing but sitecustomize.py has had the time to arm it."""
    return any(type(finder).__module__ == "overlay.bootstrap" for finder in sys.meta_path)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    lowest, above = (".".join(map(str, one)) for one in PYTHONS)
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        yield Finding("python", OK, f"{version}, {sys.executable}")
    else:
        yield Finding("python", DO, f"{version} is not tested", f"use a Python from {lowest} to below {above}")


def _settings() -> Iterator[Finding]:
    try:
        found = settings.load(os.environ)
    except settings.SettingsError as error:
        yield Finding("settings", DO, str(error), "correct it: until then vLLM runs stock")
        return
    if not found.enabled:
        yield Finding("settings", DO, f"{settings.FAMILY} switches the overlay off", f"unset {settings.FAMILY}")
        return
    given = sorted(
        name
        for name, value in os.environ.items()
        if name.startswith(settings.FAMILY) and not settings.is_service_link(name, value)
    )
    yield Finding("settings", OK, ", ".join(f"{name}={os.environ[name]}" for name in given) or "all at their defaults")
    for line in found.retired:
        yield Finding("settings", NOTE, line, "remove it")


def _sitecustomize() -> Iterator[Finding]:
    """The first door."""
    spec = PathFinder.find_spec(DOOR, _entries())
    first = spec.origin if spec is not None else None
    ours_first = first is not None and _is_ours(os.path.dirname(first))
    if is_armed():
        others = "" if ours_first else f", which {first} in front of it hands on to"
        yield Finding(DOOR, OK, f"armed by {FOLDER / DOOR}.py{others}")
        return
    for flag, meaning in {"isolated": "-I", "ignore_environment": "-E", "no_site": "-S"}.items():
        if getattr(sys.flags, flag):
            yield Finding(
                DOOR, DO, f"Python was started with {meaning}, which ignores it", f"start it without {meaning}"
            )
            return
    otherwise = NOTE if _plugin_folders() and _plugin_is_allowed() else DO
    but = "; the patches come through the second door all the same" if otherwise == NOTE else ""
    if not (FOLDER / f"{DOOR}.py").is_file():
        yield Finding(DOOR, otherwise, f"{FOLDER} has no {DOOR}.py{but}", "mount the folder that `make bundle` makes")
    elif not any(_is_ours(entry) for entry in _entries() if entry):
        yield Finding(DOOR, otherwise, f"{FOLDER} is not on PYTHONPATH{but}", f"export PYTHONPATH={_python_path()}")
    elif not ours_first:
        yield Finding(
            DOOR, otherwise, f"{first} is in front and does not hand on{but}", f"export PYTHONPATH={_python_path()}"
        )
    elif os.environ.get(settings.FAMILY, "").strip().lower() in settings.OFF:
        yield Finding(DOOR, NOTE, "closed, for the overlay is switched off")
    else:
        yield Finding(DOOR, DO, f"{first} has not armed this Python", "read what Python wrote on stderr at its start")


def _python_path() -> str:
    """PYTHONPATH with our folder in front, once."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(FOLDER), *(entry for entry in given if entry and not _is_ours(entry))])


def _plugin_folders() -> list[str]:
    """Where metadata names our plugin, in the order in which it is found."""
    found = []
    for entry in _entries():
        for distribution in importlib.metadata.distributions(path=[entry]):
            names = {one.name for one in distribution.entry_points if one.group == PLUGIN_GROUP}
            if PLUGIN in names:
                found.append(entry)
    return list(dict.fromkeys(found))


def _plugin_is_allowed() -> bool:
    wanted = os.environ.get("VLLM_PLUGINS")
    return wanted is None or PLUGIN in wanted.split(",")  # vLLM strips no spaces


def _plugin() -> Iterator[Finding]:
    """The second door."""
    folders = _plugin_folders()
    first_is_enough = ", which the first door does without" if is_armed() else ""
    if not folders:
        state = NOTE if is_armed() else DO
        yield Finding(
            "plugin", state, f"no metadata names {PLUGIN}{first_is_enough}", "mount the folder that `make bundle` makes"
        )
    elif not _plugin_is_allowed():
        given = os.environ.get("VLLM_PLUGINS", "")
        state = NOTE if is_armed() else DO
        yield Finding(
            "plugin",
            state,
            f"VLLM_PLUGINS={given!r} does not name {PLUGIN}{first_is_enough}",
            f"VLLM_PLUGINS={','.join(filter(None, [given, PLUGIN]))}",
        )
    else:
        yield Finding("plugin", OK, f"{PLUGIN}, by the metadata in {folders[0]}")


def _package() -> Iterator[Finding]:
    """Which `overlay` a server would import, and what that hides."""
    found = []
    for entry in _entries():
        spec = PathFinder.find_spec("overlay", [entry])
        if spec is not None and spec.origin is not None:
            found.append(os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin)
    found = list(dict.fromkeys(map(os.path.realpath, found)))
    own = str(FOLDER / "overlay")
    if not found or found[0] != own:
        first = f"a server here would import {found[0]}" if found else "a server here would not find it"
        yield Finding("package", DO, f"this is {own}, and {first}", f"export PYTHONPATH={_python_path()}")
        return
    yield Finding("package", OK, f"{own}, version {__version__}")
    for hidden in found[1:]:
        if os.path.isfile(os.path.join(hidden, "bootstrap.py")):
            yield Finding("package", NOTE, f"a second copy in {hidden} is not used", "keep one of the two")
        else:
            yield Finding(
                "package", NOTE, f"it hides {hidden}, which has the same name", "rename that module if vLLM needs it"
            )


def _permissions() -> Iterator[Finding]:
    try:
        check_code(os.path.dirname(overlay.__file__))
    except Writable as error:
        problem, _, command = str(error).partition("; to change that")
        yield Finding("permissions", DO, problem, command.partition(": ")[2])
    else:
        yield Finding("permissions", OK, "only the owner and root can write the folder")


def _byte_code() -> Iterator[Finding]:
    sources = [path for path in (FOLDER / "overlay").rglob("*.py") if path.is_file()]
    missing, stale = 0, []
    for path in sources:
        compiled = Path(importlib.util.cache_from_source(str(path)))
        try:
            head = compiled.read_bytes()[:16]
        except FileNotFoundError:
            missing += 1
            continue
        unchecked = head[4:8] == b"\x01\x00\x00\x00"
        if unchecked and head[8:16] != importlib.util.source_hash(path.read_bytes()):
            stale.append(compiled)
    if stale:
        yield Finding(
            "byte code",
            DO,
            f"{len(stale)} files are older than their source and used unchecked, as {stale[0]}",
            f"find {FOLDER} -name __pycache__ -exec rm -r {{}} +",
        )
    elif missing and not os.access(FOLDER / "overlay", os.W_OK):
        yield Finding(
            "byte code",
            NOTE,
            f"{missing} of {len(sources)} files have none for this Python: each process compiles what it imports",
            f"as their owner: {sys.executable} -m compileall -q --invalidation-mode unchecked-hash {FOLDER}",
        )
    else:
        yield Finding("byte code", OK, "there, or written at the first start")


def _wrapt() -> Iterator[Finding]:
    lowest, above = (".".join(map(str, one)) for one in WRAPTS)
    spec = PathFinder.find_spec("wrapt", _entries())
    if spec is None:
        bundled = FOLDER / "fallback" / "wrapt" / "__init__.py"
        if bundled.is_file():
            yield Finding("wrapt", OK, "the bundled one: this Python has none of its own")
        else:
            yield Finding(
                "wrapt",
                DO,
                "this Python has none, and the folder brings none",
                "mount the folder that `make bundle` makes",
            )
        return
    try:
        version = importlib.metadata.version("wrapt")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("wrapt", OK, f"{spec.origin}")
        return
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if WRAPTS[0] <= numbers < WRAPTS[1]:
        yield Finding("wrapt", OK, f"{version}, this Python's own")
    else:
        yield Finding("wrapt", DO, f"{version} is not tested", f"install a wrapt from {lowest} to below {above}")


def _journals() -> Iterator[Finding]:
    try:
        folder = Path(settings.load(os.environ).journal_folder or settings.default_journal_folder())
    except settings.SettingsError:
        return  # said above
    other = f"set {settings.FAMILY}_JOURNAL_DIR to a folder of user {os.geteuid()}"
    if not folder.exists():
        parent = next(above for above in folder.parents if above.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding("journals", OK, f"{folder}, made by the first vLLM here")
        else:
            yield Finding("journals", DO, f"{folder} cannot be made in {parent}", other)
        return
    try:
        check_own_folder(str(folder))
    except NotOurs as error:
        yield Finding("journals", DO, f"{folder}: {error}", other)
        return
    yield Finding("journals", OK, str(folder))
    found = status.look(folder, gone=False)
    versions = {one.journal.overlay or __version__ for one in found.processes} - {__version__}
    if versions:
        yield Finding("processes", DO, f"some run overlay {', '.join(sorted(versions))}", "restart them")
    if not found.ok:
        yield Finding("processes", DO, "something is wrong in a running one", "python -m overlay status")
    elif found.processes:
        yield Finding("processes", OK, f"{len(found.processes)} run here with the overlay")
    else:
        yield Finding("processes", NOTE, status.NOBODY)


def _vllm() -> Iterator[Finding]:
    try:
        vllm = vllms.find(None, None)
        verdicts = check.judge(vllm)
    except CommandError as error:
        yield Finding("vllm", DO, str(error).partition(";")[0], "run this where vLLM runs")
        return
    said = ", ".join(f"{patch} {verdict.state}" for patch, verdict in verdicts.items())
    yield Finding("vllm", OK, f"{vllm.version or 'of unknown version'}: {said}")
    drifted = [patch for patch, verdict in verdicts.items() if verdict.state == DRIFTED]
    if drifted:
        yield Finding(
            "vllm", DO, f"{', '.join(drifted)}: this source is not known", "python -m overlay check, and report it"
        )
    elif check.is_removable(verdicts):
        yield Finding("vllm", NOTE, check.REMOVABLE)


def _gpu() -> Iterator[Finding]:
    """Asked of the driver's own tool: torch would take seconds, and a context on the device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        yield Finding("gpu", DO, f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU", "unset it")
        return
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            asked = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            yield Finding("gpu", DO, "nvidia-smi gives no answer", "look at the driver")
            return
        names = [line.partition(" (")[0] for line in asked.stdout.splitlines() if line.startswith("GPU ")]
        if names and asked.returncode == 0:
            yield Finding("gpu", OK, ", ".join(names))
            return
    elif os.path.exists("/dev/kfd"):
        yield Finding("gpu", OK, "an AMD one")
        return
    if os.environ.get(f"{settings.FAMILY}_SERIAL_PASS_THROUGH", "").strip().lower() in settings.ON:
        yield Finding("gpu", NOTE, f"none; {settings.FAMILY}_SERIAL_PASS_THROUGH runs the ops without one, for tests")
    else:
        yield Finding(
            "gpu", DO, "none is seen, so there is nothing to gain", "give the container one: docker run --gpus all"
        )


#: What is looked at, in order.
ABOUT: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "settings": _settings,
    DOOR: _sitecustomize,
    "plugin": _plugin,
    "package": _package,
    "permissions": _permissions,
    "byte code": _byte_code,
    "wrapt": _wrapt,
    "journals": _journals,  # and "processes"
    "vllm": _vllm,
    "gpu": _gpu,
}
