"""Guards every hook, because an exception in a hook would fail the import of vLLM's module."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from overlay.report.journal import journal
from overlay.settings import Settings, outcome


class Drifted(RuntimeError):
    """Strict mode only: the source is not recognised. Already logged."""


def guarded(what: str, hook: Callable[[ModuleType], None], settings: Settings) -> Callable[[ModuleType], None]:
    """The hook, made unable to fail vLLM's import, unless strict asks for that."""

    def call(module: ModuleType) -> None:
        try:
            hook(module)
        except Drifted:
            raise
        except Exception as error:
            journal.problem(f"{what}: {outcome(settings.strict)}: {type(error).__name__}: {error}")
            if settings.strict:
                raise

    return call
