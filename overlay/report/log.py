"""One logger under ``vllm.``, so that operators see the overlay's lines with vLLM's own, in vLLM's format.

The overlay logs before vLLM has configured logging. Up to 0.30.0 vLLM does that when ``vllm.logger`` is imported, from
0.31.0 on when an entry point calls for it. Until then records are held back; then vLLM's handlers get them. If a process
ends before that, its warnings go to stderr.

A logging configuration resets and disables loggers that it does not name. vLLM's own names ``vllm`` and so sets the levels
of all its children; an operator can set another one (``VLLM_LOGGING_CONFIG_PATH``). So this logger keeps its level by
itself and cannot be disabled. Nothing has to be set again after a configuration.

If vLLM logs JSON (``--logging-config.formatter json``, or a formatter in ``VLLM_LOGGING_CONFIG_PATH``), the content of a
record's `FIELD` becomes a field of its line.
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

#: vLLM's function that sets its handlers, in every release. From 0.31.0 on the import does not call it.
CONFIGURE = "_configure_vllm_root_logger"
#: The attribute of a record that holds its data for machines.
FIELD = "overlay"

_held: logging.handlers.MemoryHandler | None = None


class _Logger(logging.Logger):
    """A configuration that names this logger sets its level. Any other leaves it at the chosen level. It cannot be
    disabled.
    """

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
    """The `extra` of a record: the event, the overlay's version, and facts that JSON can hold."""
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
    """vLLM's handlers are set: pass on the held records, and send later ones directly."""
    for held in _let_go():
        # Made anew, because vLLM's formatter needs the attributes that vLLM's own factory adds (0.31.0 and later).
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
        if logger.isEnabledFor(record.levelno):  # a configuration may have set another level meanwhile
            logger.handle(record)


def give_up() -> None:
    """`release` will not be called: write the held warnings and errors to stderr."""
    for record in _let_go():
        if record.levelno >= logging.WARNING:
            sys.stderr.write(f"{record.levelname} {record.name}: {record.getMessage()}\n")


def _let_go() -> list[logging.LogRecord]:
    global _held
    if _held is None:
        return []
    held, _held = _held, None
    if held in logger.handlers:  # else a configuration has already changed both
        logger.removeHandler(held)
        logger.propagate = True
    return held.buffer
