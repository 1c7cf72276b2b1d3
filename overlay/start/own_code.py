"""Checks that nobody but the owner and root can change the overlay's files.

The overlay is code that runs in a server. Somebody else who can write one of its files can run code in that server. So the
overlay does not arm from such a folder, and says which mode bits are wrong. The owner is always trusted: a root process
that uses another user's folder trusts that user.

The check runs at the first ``import vllm``. By then sitecustomize.py and the modules up to this one have run. So it does
not stop somebody who has changed them already; it refuses a folder that somebody could change. An earlier check would cost
every Python process of the machine, and would itself be a file of the same folder.

Only mode bits are checked. With an access control list they show the most that the list gives to anyone but the owner, so a
list is covered. A read-only mount counts by its bits too, because others may have it mounted writable elsewhere.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Collection

from overlay.report.own_folder import OTHERS

_NAMED = 3
#: Files beside the package that are executed or say what is executed (the plugin's metadata), if the folder has them.
_BESIDE = ("sitecustomize.py", "wrapt", "fallback")
_METADATA = "vllm_auxstream_overlay-"


class Writable(RuntimeError):
    """Others can write code that would run. The message names the paths, their modes and the command that changes them."""


def check_code(package: str) -> None:
    """Raise Writable if others than the owner and root can change the package in the folder `package`.

    It checks everything in the package, bytecode included; what belongs to it beside it (sitecustomize.py, wrapt, the
    plugin's metadata); and the folders that lead there, both by the given path and by the path without links. In a sticky
    folder such as /tmp only the owner can replace a file. Raises OSError if something cannot be examined.
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
    """The path with its permission bits. Nothing if no code can run from it: it is missing, leads nowhere, or we may not
    read it.

    Bytecode comes and goes, and root's may be closed to us. A link may lead nowhere (an editor's lock does) or in a circle.
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
    """Everything in a file or folder with its permission bits, and the folders that hold the targets of its links."""
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
        if os.path.isdir(path) and _mode(os.path.join(path, ".")):  # else this user finds no file in it
            waiting.extend(os.path.join(path, name) for name in sorted(os.listdir(path), reverse=True))
    return found, links


def _targets(path: str) -> list[str]:
    """The target of a link, and if that is a link its target too, and so on. Empty for anything that is no link."""
    found = []
    while os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
        found.append(path)
    return found


def _ways(folders: Collection[str]) -> list[tuple[str, int]]:
    """The folders and all folders that lead to them, over links too, with their permission bits.

    A sticky folder further up is left out, because only an owner can rename or remove there. The given folders are never
    left out: a new file in them with the name of one of Python's own modules would be imported instead of that.
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
