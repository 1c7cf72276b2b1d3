"""The command line: tells about a vLLM before it runs (check, matrix), where it starts (doctor) and while it runs (status).

It reads sources and journals and imports neither vllm nor torch. A server imports nothing from it. It needs the libraries
of the extra ``cli``. vLLM's own image has those that `check`, `doctor` and `status` need.
"""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Run the command line and leave with its exit status."""
    from overlay.cli import failure

    _make_streams_usable()
    try:
        from overlay.cli.app import app

        app(prog_name="python -m overlay")
    except Exception as error:
        sys.exit(failure.report(error))


def _make_streams_usable() -> None:
    """A closed stream swallows what is written to it; one that cannot encode a letter gets it as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115 - until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
