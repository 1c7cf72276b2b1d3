"""How a command ends if it cannot do what it was asked for. Every message of a failure is written here."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback

#: Bad input, or an error of any kind. 1 means that a command has looked and found something; an error is never 1.
FAILED = 2
#: As a shell counts them: 128 and the number of the signal.
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13

#: What stands before the @ of an address; the second form is an address that has been percent-encoded as a whole.
_CREDENTIALS = re.compile(r"(?i)(://)[^\s/?#]*@|(%3A%2F%2F)(?:(?!%2F|%3F|%23)[^\s/?#])*%40")


class CommandError(Exception):
    """A command cannot do what it was asked for. The message is one for people: the thing, its value, what is allowed."""


def without_credentials(text: str) -> str:
    """`text` with user names, passwords and tokens taken out of the addresses in it."""
    return _CREDENTIALS.sub(lambda found: f"{found[1] or found[2]}***@", text)


def report(error: BaseException) -> int:
    """Say on stderr why a command failed, and give the exit status. What nobody has foreseen is shown with its traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    if isinstance(error, BrokenPipeError):  # whoever reads has seen enough
        return BROKEN_PIPE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        error = _missing_library(error)
    if isinstance(error, (CommandError, OSError)):
        say(f"error: {error}\n")
    else:
        say("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    return FAILED


def say(text: str) -> None:
    """Write to stderr, without credentials; where that is closed as well, the exit status has to do."""
    with contextlib.suppress(OSError):
        sys.stderr.write(without_credentials(text))


def _discard_output() -> None:
    """Nothing can be written to stdout any more: what is left goes nowhere, or Python would fail with it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _missing_library(error: ModuleNotFoundError) -> Exception:
    """The message for a library that is not installed; the error itself where a module of the overlay is missing."""
    name = (error.name or "").partition(".")[0]
    if name in ("", "overlay"):
        return error
    return CommandError(f"this command needs {name}: pip install {name.replace('_', '-')}")
