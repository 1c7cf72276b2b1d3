"""Writing a file that others read meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from typing import TextIO


def replace(path: str | os.PathLike[str], text: str, prefix: str, mode: int = 0o600) -> None:
    """Write `text` to `path` in UTF-8, with these permission bits: a temporary file beside it, then a rename, so that readers never see half.

    Raises OSError; what was there stays then, and no temporary file (named by `prefix`) is left behind.
    """
    with _becoming(path, prefix, mode) as file:
        file.write(text)


def replace_and_lock(path: str | os.PathLike[str], text: str, prefix: str) -> int:
    """As `replace`, and give a descriptor: as long as it is open, there is a lock (flock) on the file.

    The file has its lock before it has its name. Where the file system has no locks, there is none.
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
    """A new file that gets the name `path` when the block ends well, and is removed when it does not."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=prefix)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
        if mode != 0o600:  # mkstemp's own
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
