"""A run of the bench's client without vLLM: what the client is asked for, and what becomes of its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from overlay.cli.bench import servers
from overlay.cli.bench.results import Results
from overlay.cli.bench.setup import Setup


@dataclass
class Client:
    """In the place of the client's process: writes `answer` where `vllm bench serve` would."""

    answer: dict[str, Any]
    arguments: list[str] = field(default_factory=list)
    log: Path = Path("client.log")

    def call(self, command: str, _: float, arguments: list[str]) -> None:
        assert command == "serve"
        self.arguments = arguments
        (folder, name) = (arguments[arguments.index(flag) + 1] for flag in ("--result-dir", "--result-filename"))
        (Path(folder) / name).write_text(json.dumps(self.answer))


def run(
    folder: Path, load: servers.Load, answer: dict[str, Any], embeddings: list[str]
) -> tuple[Client, dict[str, Any]]:
    """One run of a load on a server that answers with `embeddings`."""
    results = Results(folder / "results.json", lambda text: None)
    fleet = servers.Fleet(Setup(folder, folder, None, 100.0), results, SimpleNamespace(), {}, folder, None, "x")  # type: ignore[arg-type]
    client = Client(answer)
    server: Any = SimpleNamespace(arm="stock", port=1, log=folder / "server.log", embeddings=lambda: embeddings)
    return client, fleet._run(client, server, load, 0)  # type: ignore[arg-type]
