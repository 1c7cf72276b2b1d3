"""Shared by all levels of tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def overlay_environment(**settings: str) -> dict[str, str]:
    """This process's environment with nothing of the overlay's family in it but `settings`, and the overlay in front."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLMOVERLAY", "VLLM_"))}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment.update(settings)
    return environment


def run_python(*arguments: str, environment: dict[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def journal_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "journal"
