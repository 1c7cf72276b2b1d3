"""Which process a file is of, and whether that process still runs.

A process number alone does not say it: every container has a process 1, numbers are given out again, and wall clocks are
set. On Linux four facts name one process for ever: the boot of the kernel, the pid namespace, the number in that
namespace, and the tick of the boot at which the process started. They are in the file's name, so that nobody has to read
a file to know whose it is.

In its own namespace a process is found in /proc by number and start. From another namespace of the same host its number
means nothing; there the lock (flock) tells that the writer holds on its file: the kernel takes it back when the process
ends, however it ends. Nothing here asks a clock. Another boot, which is another host or the time before a restart,
cannot be asked at all.

The command line and a server read with this, too: the standard library only.
"""

from __future__ import annotations

import fcntl
import os
import re
from typing import NamedTuple

_BOOT_CHARACTERS = 12
_NAME = re.compile(rf"([0-9]{{1,10}})-([0-9]{{1,20}})-([0-9]{{1,20}})-([0-9a-f]{{{_BOOT_CHARACTERS}}})\.json")
#: Where /proc does not tell (number, random), and from overlays without identities (number, seconds since the epoch).
_NAME_WITHOUT_IDENTITY = re.compile(r"[0-9]{1,10}-([0-9a-f]{32}|[0-9]{9,11})\.json")


class Identity(NamedTuple):
    """One process for ever. `start` is in clock ticks since the boot, `namespace` the inode of its pid namespace."""

    number: int
    start: int
    namespace: int
    boot: str


def own() -> Identity | None:
    """This process; None where /proc does not tell."""
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
    """The name of a file of this process. A process without an identity gets a name that nobody else has."""
    if identity is None:
        return f"{os.getpid()}-{os.urandom(16).hex()}.json"
    return f"{'-'.join(map(str, identity))}.json"


def from_name(name: str) -> Identity | None:
    """The process that a file is of, by its name; None where the name does not say."""
    found = _NAME.fullmatch(name)
    return Identity(int(found[1]), int(found[2]), int(found[3]), found[4]) if found else None


def is_name(name: str) -> bool:
    """Whether a file of this name is one of those that this module, or an older overlay, gives names to."""
    return bool(_NAME.fullmatch(name) or _NAME_WITHOUT_IDENTITY.fullmatch(name))


def runs(path: str, here: Identity | None) -> bool | None:
    """Whether the process that this file is of, by its name, runs now on this host; `here` is `own()`.

    None where this process cannot tell: the name has no identity, or one of another boot.
    """
    writer = from_name(os.path.basename(path))
    if here is None or writer is None or here.boot != writer.boot:
        return None
    return _runs_beside(writer, here) or _is_locked(path)


def runs_beside(name: str, here: Identity | None) -> bool:
    """Whether the process that a file of this name is of runs in the pid namespace of `here`, by /proc alone.

    Where /proc tells nobody's identity, any name may be that of such a process.
    """
    writer = from_name(name)
    return writer is None if here is None else writer is not None and _runs_beside(writer, here)


def number_runs(process_id: int) -> bool:
    """Whether a process of this number runs, for a file whose name does not say more."""
    if not 0 < process_id < 2**31:
        return False
    try:
        os.kill(process_id, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True


def _runs_beside(writer: Identity, here: Identity) -> bool:
    same_place = (here.boot, here.namespace) == (writer.boot, writer.namespace)
    return same_place and _started(str(writer.number)) == writer.start


def _started(number: str) -> int | None:
    """The tick of the boot at which this process started; None where there is none, or one that has ended (a zombie)."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            # The second field is the program's name in parentheses and may hold anything.
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_locked(path: str) -> bool:
    """Whether somebody holds the lock of overlay.files.replace on this file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a writer locks new files only: this is in nobody's way
        # Replaced since it was opened: its writer has just been at it.
        return os.fstat(descriptor).st_ino != os.stat(path).st_ino
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
