"""Which process a file belongs to, and whether that process still runs.

A process number alone is not enough: every container has a process 1, numbers are reused, and wall clocks are set. On Linux
four facts name one process for ever: the boot of the kernel, the pid namespace, the number in that namespace, and the tick
of the boot at which the process started. They are in the file's name, so nobody has to read a file to know its process.

A process in the same namespace is found in /proc by number and start. In another namespace of the same host its number
means nothing. There the lock (flock) that the writer holds on its file tells whether it runs, because the kernel releases
the lock however the process ends. Nothing here uses a clock. Of another boot (another host, or this one before a restart)
nothing can be said.

The command line and a server use this module too, so it uses only the standard library.
"""

from __future__ import annotations

import fcntl
import os
import re
from typing import NamedTuple

_BOOT_CHARACTERS = 12
_NAME = re.compile(rf"([0-9]{{1,10}})-([0-9]{{1,20}})-([0-9]{{1,20}})-([0-9a-f]{{{_BOOT_CHARACTERS}}})\.json")
#: Names without an identity: this overlay's without /proc (number, random), and an older one's (number, seconds since the
#: epoch).
_NAME_WITHOUT_IDENTITY = re.compile(r"[0-9]{1,10}-([0-9a-f]{32}|[0-9]{9,11})\.json")


class Identity(NamedTuple):
    """One process for ever. `start` is in clock ticks since the boot, `namespace` the inode of its pid namespace."""

    number: int
    start: int
    namespace: int
    boot: str


def own() -> Identity | None:
    """This process; None if /proc does not tell."""
    start = _started("self")
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip().replace("-", "")[:_BOOT_CHARACTERS]
    except (OSError, ValueError):
        return None
    if start is None or re.fullmatch(rf"[0-9a-f]{{{_BOOT_CHARACTERS}}}", boot) is None:
        return None
    return Identity(os.getpid(), start, namespace, boot)


def file_name(identity: Identity | None) -> str:
    """The name of a file of this process. A process without an identity gets a random name."""
    if identity is None:
        return f"{os.getpid()}-{os.urandom(16).hex()}.json"
    return f"{'-'.join(map(str, identity))}.json"


def from_name(name: str) -> Identity | None:
    """The process that a file belongs to, by its name; None if the name does not say it."""
    found = _NAME.fullmatch(name)
    return Identity(int(found[1]), int(found[2]), int(found[3]), found[4]) if found else None


def is_name(name: str) -> bool:
    """Whether this module, or an older overlay, makes names like this one."""
    return bool(_NAME.fullmatch(name) or _NAME_WITHOUT_IDENTITY.fullmatch(name))


def runs(path: str, here: Identity | None) -> bool | None:
    """Whether the process that this file belongs to, by its name, runs now on this host. `here` is `own()`.

    None if this process cannot tell: the name has no identity, or one of another boot.
    """
    writer = from_name(os.path.basename(path))
    if here is None or writer is None or here.boot != writer.boot:
        return None
    return _runs_beside(writer, here) or _is_locked(path)


def runs_beside(name: str, here: Identity | None) -> bool:
    """Whether the process that a file of this name belongs to runs in the pid namespace of `here`, by /proc alone.

    If /proc tells no identity, only a name without one can be that of such a process.
    """
    writer = from_name(name)
    return writer is None if here is None else writer is not None and _runs_beside(writer, here)


def number_runs(process_id: int) -> bool:
    """Whether a process of this number runs, for a file whose name says no more."""
    if not 0 < process_id < 2**31:
        return False
    try:
        os.kill(process_id, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's
    return True


def _runs_beside(writer: Identity, here: Identity) -> bool:
    same_place = (here.boot, here.namespace) == (writer.boot, writer.namespace)
    return same_place and _started(str(writer.number)) == writer.start


def _started(number: str) -> int | None:
    """The tick of the boot at which this process started. None if there is no such process, or it has ended (a zombie)."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the program's name in parentheses and may hold anything.
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_locked(path: str) -> bool:
    """Whether a process holds the lock of overlay.files.replace_and_lock on this file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # blocks nobody: writers lock new files only
        # If the file was replaced since it was opened, its writer has just written it.
        return os.fstat(descriptor).st_ino != os.stat(path).st_ino
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
