"""A real `vllm serve`, eager, with the overlay by PYTHONPATH alone, asked over HTTP with the openai client.

The demo does the same compiled and for both models; `make test` must not depend on having seen it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from devtools import journals, servers, tiny_models
from overlay.cli.journals import Journal
from tests.engine.conftest import PASS_THROUGH

pytestmark = pytest.mark.engine
NAME = "qwen3_5"


def ask(server: servers.Server) -> list[str]:
    client = server.client()
    completions = [
        client.completions.create(model=servers.MODEL_NAME, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
        for prompt in ("Hello world", "The quick brown fox jumps over")
    ]
    chat = client.chat.completions.create(
        model=servers.MODEL_NAME,
        messages=[{"role": "user", "content": "what is a fork?"}],
        max_tokens=12,
        temperature=0,
    )
    return [*completions, chat.choices[0].message.content or ""]


def test_served_tokens_are_those_of_stock(model: Callable[[str], pathlib.Path], tmp_path: pathlib.Path) -> None:
    arguments = (*tiny_models.serve_arguments(NAME), "--enforce-eager")
    built = model(NAME)

    def served(overlay: bool) -> tuple[list[str], list[Journal]]:
        extra = {**servers.cpu_environment(), **(PASS_THROUGH if overlay else {})}
        folder = tmp_path / ("overlay" if overlay else "stock")
        with servers.serve(sys.executable, built, overlay=overlay, folder=folder, env=extra, args=arguments) as server:
            return ask(server), server.journals()

    with ThreadPoolExecutor(2) as pool:
        (stock, _), (answers, written) = pool.map(served, (False, True))
    assert answers == stock and any(answers)
    assert journals.why_without_effect(written, tiny_models.gdn_layers(NAME)) is None
    roles = {journal.role for journal in written}
    assert "APIServer" in roles and any(role.startswith("EngineCore") for role in roles)
    loops = {journal.raw["loop"] for journal in written if journal.role.startswith("EngineCore")}
    assert loops == {"EngineCoreProc.run_busy_loop"}
