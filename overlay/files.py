"""Writing a file that others read meanwhile."""

from __future__ import annotations

import contextlib
import os
import tempfile


def replace(path: str | os.PathLike[str], text: str, prefix: str, mode: int = 0o600) -> None:
    """Write `text` to `path` in UTF-8, with these permission bits: a temporary file beside it, then a rename, so that readers never see half.

    Raises OSError; what was there stays then, and no temporary file (named by `prefix`) is left behind.
    """
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=prefix)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        if mode != 0o600:  # mkstemp's own
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
