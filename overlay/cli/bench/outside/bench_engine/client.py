"""The client's process: `vllm bench serve`, run after run, by the function that the command itself calls."""

from __future__ import annotations

import argparse

from . import replies


class Client:
    def do_serve(self, arguments: list[str]) -> None:
        """One run. `arguments` are the command's flags; what it measured is in the file that they name."""
        from vllm.benchmarks import serve

        parser = argparse.ArgumentParser("vllm bench serve")
        serve.add_cli_args(parser)
        serve.main(parser.parse_args(arguments))


def main() -> None:
    """Answer commands until `quit` or the end of standard input."""
    replies.answer_commands(Client())
