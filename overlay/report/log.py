"""One logger under ``vllm.``, so that operators see the overlay's lines with vLLM's own, in vLLM's format.

The overlay speaks before vLLM has configured logging: up to 0.30.0 that is done when ``vllm.logger`` is imported, from
0.31.0 on when an entry point calls for it. Until then records are held back; then they go to vLLM's handlers. A process
that ends before that still gets its warnings, on stderr.

A logging configuration resets and silences loggers that it does not name: vLLM's own, which names ``vllm`` and so takes the
levels of all its children, and one of an operator (``VLLM_LOGGING_CONFIG_PATH``). So this logger keeps its level and its voice
by itself, and nothing has to be set again after a configuration, however often one comes.

Where vLLM logs JSON (``--logging-config.formatter json``, or a formatter in ``VLLM_LOGGING_CONFIG_PATH``), what a record
has in `FIELD` comes out as a field of its line.
"""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from overlay import __version__

#: vLLM's function that sets its handlers, in every release; from 0.31.0 on it is not called at import.
CONFIGURE = "_configure_vllm_root_logger"
#: The attribute of a record that holds what a machine reads of it.
FIELD = "overlay"

_held: logging.handlers.MemoryHandler | None = None


class _Logger(logging.Logger):
    """Whoever names this logger sets its level; to whoever does not it keeps the chosen one, and cannot be disabled."""

    chosen = logging.NOTSET  #: VLLMOVERLAY_LOG_LEVEL

    def setLevel(self, level: int | str) -> None:  # noqa: N802 - the name is logging's
        super().setLevel(level or self.chosen)

    @property
    def disabled(self) -> bool:
        return False

    @disabled.setter
    def disabled(self, _: bool) -> None: ...


logger = logging.getLogger("vllm.overlay")
logger.__class__ = _Logger


def fields(event: str, **facts: Any) -> dict[str, Any]:
    """The `extra` of a record: which event it is, of which overlay, and facts that JSON can hold."""
    return {FIELD: {"event": event, "version": __version__, **facts}}


def hold(level: str) -> None:
    """Set the level, and hold records back until `release`."""
    global _held
    _Logger.chosen = logging.getLevelName(level.upper())
    logger.setLevel(logger.level)
    if _held is None and not logging.getLogger("vllm").handlers:
        _held = logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        logger.addHandler(_held)
        logger.propagate = False
        atexit.register(give_up)


def release_when_configured(vllm_logger: ModuleType) -> None:
    """``vllm.logger`` has just been imported: release now, or when it configures logging."""
    configured_later = hasattr(vllm_logger, "configure_logging") and hasattr(vllm_logger, CONFIGURE)
    if logging.getLogger("vllm").handlers or not configured_later:
        release()
        return
    import wrapt

    def configure(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        release()
        return result

    wrapt.wrap_function_wrapper(vllm_logger, CONFIGURE, configure)


def release() -> None:
    """vLLM's handlers are there: hand over what was held, and everything from now on."""
    for held in _let_go():
        # Made anew: vLLM's formatter wants what vLLM's own factory puts into a record (0.31.0 and later).
        extra = {name: value for name, value in vars(held).items() if name == FIELD}
        record = logger.makeRecord(
            held.name,
            held.levelno,
            held.pathname,
            held.lineno,
            held.msg,
            held.args or (),
            held.exc_info,
            held.funcName,
            extra,
        )
        record.created, record.msecs = held.created, held.msecs
        if logger.isEnabledFor(record.levelno):  # a configuration may have named this logger meanwhile
            logger.handle(record)


def give_up() -> None:
    """Nobody will call `release`: what was held goes to stderr, warnings and worse."""
    for record in _let_go():
        if record.levelno >= logging.WARNING:
            sys.stderr.write(f"{record.levelname} {record.name}: {record.getMessage()}\n")


def _let_go() -> list[logging.LogRecord]:
    global _held
    if _held is None:
        return []
    held, _held = _held, None
    if held in logger.handlers:  # else a configuration has seen to both
        logger.removeHandler(held)
        logger.propagate = True
    return held.buffer
