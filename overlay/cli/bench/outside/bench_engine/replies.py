"""Where a worker's answers go: a descriptor of their own, so that nothing vLLM prints can be taken for an answer."""

from __future__ import annotations

import os
from typing import TextIO

REPLY_DESCRIPTOR = "BENCH_REPLY_DESCRIPTOR"


def stream() -> TextIO:
    """The worker's end. Taken out of the environment so that no grandchild writes there."""
    descriptor = int(os.environ.pop(REPLY_DESCRIPTOR))
    os.set_inheritable(descriptor, False)
    return os.fdopen(descriptor, "w")
