"""One logger under ``vllm.``, so that operators see the overlay's lines with vLLM's own, in vLLM's format.

The overlay speaks before vLLM has configured logging. Until then records are held back; `release` hands them to
vLLM's handlers. A process that ends before that still gets its warnings, on stderr.
"""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import sys

logger = logging.getLogger("vllm.overlay")

_held: logging.handlers.MemoryHandler | None = None


def hold(level: str) -> None:
    """Set the level, and hold records back until `release`."""
    global _held
    logger.setLevel(level.upper())
    if _held is None and not logging.getLogger("vllm").handlers:
        _held = logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        logger.addHandler(_held)
        logger.propagate = False
        atexit.register(_release_to_stderr)


def release() -> None:
    """vLLM's handlers are there: hand over what was held, and everything from now on."""
    global _held
    if _held is None:
        return
    held, _held = _held, None
    logger.removeHandler(held)
    logger.propagate = True
    for record in held.buffer:
        logger.handle(record)


def _release_to_stderr() -> None:
    if _held is None:
        return
    for record in _held.buffer:
        if record.levelno >= logging.WARNING:
            sys.stderr.write(f"{record.levelname} {record.name}: {record.getMessage()}\n")
