"""Who else could have written what runs here: the overlay's own files.

The overlay is code in somebody's server. A file of it that others than its owner and root can write is a way for them into
that server, so the overlay does not arm from such a folder and says which mode bits are wrong. The owner is trusted
whoever it is: a process of root that is given a folder of another user's trusts that user.

This is asked at the first ``import vllm``. By then sitecustomize.py and the modules up to here have run, so it is no
barrier against somebody who has written to them already; it refuses the folder where somebody could. Asking earlier would
cost every Python process of the machine, and would have to be asked by a file of the same folder all the same.

Mode bits are what is looked at. With an access control list they hold the most that the list gives to anyone but the
owner, so it is covered; a read-only mount counts by its bits like any other, for others can have the other side of it.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Collection

from overlay.report.own_folder import OTHERS

_NAMED = 3
#: What is executed beside the package, or says what is (the plugin's metadata), where the folder has it.
_BESIDE = ("sitecustomize.py", "wrapt", "fallback")
_METADATA = "vllm_auxstream_overlay-"


class Writable(RuntimeError):
    """Others can write what would run. The message names the paths, their modes and the command that changes them."""


def check_code(package: str) -> None:
    """Raise Writable if others than the owner and root can change the package in the folder `package`.

    That is: everything in it, bytecode included; what belongs to it beside it (sitecustomize.py, wrapt, the plugin's
    metadata); the folders that lead there, by the path as it was given and by the one without links. In a sticky folder
    such as /tmp nobody can replace what is not theirs. Raises OSError where something cannot be looked at.
    """
    package = os.path.abspath(package)
    folder = os.path.dirname(package)
    beside = sorted(name for name in os.listdir(folder) if name in _BESIDE or name.startswith(_METADATA))
    parts = {part: _content(part) for part in (package, *(os.path.join(folder, name) for name in beside))}
    links = [link for _, found in parts.values() for link in found]
    around = _others_can_write(_ways([folder, *links]))
    inside = {part: _others_can_write(found) for part, (found, _) in parts.items()}
    wrong = [*around, *(one for found in inside.values() for one in found)]
    if not wrong:
        return
    named = ", ".join(f"{path} (mode {mode:04o})" for path, mode in wrong[:_NAMED])
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    commands = [f"chmod go-w {shlex.join(path for path, _ in around)}"] if around else []
    if any(inside.values()):
        commands.append(f"chmod -R go-w {shlex.join(part for part, found in inside.items() if found)}")
    user = os.geteuid()
    by_root = ", as root" if user and any(os.stat(path).st_uid != user for path, _ in wrong) else ""
    raise Writable(
        f"{named}{more} can be written by others than the owner and root, who could run code in this process; "
        f"to change that{by_root}: {' && '.join(commands)}"
    )


def _mode(path: str) -> list[tuple[str, int]]:
    """The path with its permission bits; nothing where nothing can run: it is not there, leads nowhere, or is closed to us.

    Byte code comes and goes, and root's may be closed; links may dangle, as an editor's lock does, or go in a circle.
    """
    try:
        return [(path, stat.S_IMODE(os.stat(path).st_mode))]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            return []
        raise


def _others_can_write(found: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(path, mode) for path, mode in found if mode & OTHERS]


def _content(part: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Everything in a file or folder with its permission bits, and the folders that hold what is linked into it."""
    found: list[tuple[str, int]] = []
    links: list[str] = []
    waiting, seen = [part], set()
    while waiting:
        path = waiting.pop()
        entry = _mode(path)
        if not entry:
            continue
        links.extend(os.path.dirname(target) for target in _targets(path))
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        found.extend(entry)
        if os.path.isdir(path) and _mode(os.path.join(path, ".")):  # else nobody of this user finds a file in it
            waiting.extend(os.path.join(path, name) for name in sorted(os.listdir(path), reverse=True))
    return found, links


def _targets(path: str) -> list[str]:
    """What a link that leads somewhere is read as, and, if that is a link, what that one is read as, and so on."""
    found = []
    while os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
        found.append(path)
    return found


def _ways(folders: Collection[str]) -> list[tuple[str, int]]:
    """The folders and what leads to them, with their permission bits: as given, and over each link on the way.

    Of what is further up a sticky folder is left out: only an owner can rename or remove there. The folders themselves
    are not: a new file beside ours, named like a module of Python's own, is imported instead of it.
    """
    found: dict[str, int] = {}
    for folder in folders:
        found.update(_mode(os.path.realpath(folder)))
        waiting, seen = [folder], set()
        while waiting:
            path = waiting.pop()
            if path in seen:
                continue
            seen.add(path)
            above = os.path.dirname(path)
            real = _mode(os.path.realpath(above))
            found.update((way, mode) for way, mode in real if not mode & stat.S_ISVTX)
            waiting.extend([above, *_targets(path)])
    return list(found.items())
