"""The command line: what can be said of a vLLM before it runs (check, matrix) and while it runs (status).

It reads sources and journals and imports neither vllm nor torch. Of what is here a server imports journals.py alone
(overlay/metrics.py). It needs the libraries of the extra ``cli``; vLLM's own image has those that `check` and `status` need.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit status."""
    from overlay.cli.failure import missing_library

    try:
        from overlay.cli.app import app
    except ModuleNotFoundError as error:
        sys.stderr.write(f"error: {missing_library(error)}\n")
        sys.exit(2)
    app(prog_name="python -m overlay")
