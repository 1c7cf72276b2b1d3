"""Writes a file that others may read at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from typing import TextIO


def replace(path: str | os.PathLike[str], text: str, prefix: str, mode: int = 0o600) -> None:
    """Write `text` to `path` in UTF-8 with the permission bits `mode`.

    A temporary file beside it (named with `prefix`) is renamed, so a reader never sees half a file. Raises OSError; then
    the old file stays, and no temporary file is left.
    """
    with _becoming(path, prefix, mode) as file:
        file.write(text)


def replace_and_lock(path: str | os.PathLike[str], text: str, prefix: str) -> int:
    """Like `replace` with mode 0600. Returns a descriptor: while it is open, the file is locked (flock).

    The file is locked before it gets its name. If the file system has no locks, there is none.
    """
    with contextlib.ExitStack() as on_failure:
        with _becoming(path, prefix, 0o600) as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            descriptor = os.dup(file.fileno())
            on_failure.callback(os.close, descriptor)
            file.write(text)
        on_failure.pop_all()
    return descriptor


@contextlib.contextmanager
def _becoming(path: str | os.PathLike[str], prefix: str, mode: int) -> Iterator[TextIO]:
    """A new file. It gets the name `path` if the block ends well, and is removed if not."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=prefix)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
        if mode != 0o600:  # mkstemp's default
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
