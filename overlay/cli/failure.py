"""What ends a command with exit status 2."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot do what it was asked for. The message is one for people: the thing, its value, what is allowed."""


def missing_library(error: ModuleNotFoundError) -> CommandError:
    """The message for a library that is not installed; raises `error` again where a module of the overlay is missing."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "overlay"):
        raise error
    return CommandError(f"this command needs {name}: pip install 'vllm-auxstream-overlay[cli]'")
