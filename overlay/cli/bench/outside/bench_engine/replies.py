"""Commands come by standard input. Answers go to a descriptor of their own, so that nothing vLLM prints can be taken for one."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import TextIO

REPLY_DESCRIPTOR = "BENCH_REPLY_DESCRIPTOR"


def stream() -> TextIO:
    """The worker's end. Taken out of the environment so that no grandchild writes there."""
    descriptor = int(os.environ.pop(REPLY_DESCRIPTOR))
    os.set_inheritable(descriptor, False)
    return os.fdopen(descriptor, "w")


def answer_commands(worker: object) -> None:
    """Answer commands, and end the process. Commands are the methods whose names begin with `do_`."""
    answers = stream()
    for line in sys.stdin:
        message = json.loads(line)
        command = message.pop("command")
        if command == "quit":
            break
        try:
            answer = {"result": getattr(worker, f"do_{command}")(**message)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{command}: {type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    answers.close()
    journal = sys.modules.get("overlay.report.journal")
    if journal is not None:
        with contextlib.suppress(Exception):
            journal.journal.write()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's own shutdown takes seconds of device time
