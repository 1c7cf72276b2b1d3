"""Files and processes of another user than the one who runs the tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

SOMEBODY_ELSE = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(SOMEBODY_ELSE)
    try:
        yield
    finally:
        os.seteuid(0)
