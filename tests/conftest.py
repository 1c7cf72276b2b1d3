"""Shared by all levels of tests."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from overlay.report import process_identity

with contextlib.suppress(ImportError):  # the GPU host has no hypothesis, and its tests need none
    from hypothesis import settings

    # A time limit for one example says how busy the machine is, and nothing about the code.
    settings.register_profile("any machine", deadline=None)
    settings.load_profile("any machine")

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


def journal_name(process_id: int) -> str:
    """The name that a journal of this process has, which runs in the namespace of the tests."""
    here, start = process_identity.own(), process_identity._started(str(process_id))
    assert here is not None and start is not None
    return process_identity.file_name(here._replace(number=process_id, start=start))


@pytest.fixture
def journal_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "journal"
