"""vLLM's own configuration of logging takes neither the overlay's level nor its voice, in any of vLLM's ways."""

from __future__ import annotations

import json
import pathlib

import pytest

from devtools import servers
from tests.conftest import overlay_environment, run_python

pytestmark = pytest.mark.engine

ROOT_ONLY = {
    "version": 1,
    "formatters": {"plain": {"format": "%(levelname)s %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}},
    "root": {"level": "INFO", "handlers": ["out"]},
}
#: An entry point configures logging, and each of its processes again.
SPEAKS = """
import sys, vllm, vllm.logger
from overlay.report.log import logger
for path in (None, None, sys.argv[1]):
    vllm.logger.envs.VLLM_LOGGING_CONFIG_PATH = path
    vllm.logger._configure_vllm_root_logger()
    print("configured", flush=True)
    logger.info("an INFO")
    logger.warning("a WARNING")
"""


def test_the_overlay_keeps_its_level_and_its_voice(tmp_path: pathlib.Path) -> None:
    configuration = tmp_path / "logging.json"
    configuration.write_text(json.dumps(ROOT_ONLY))
    environment = overlay_environment(
        VLLMOVERLAY_LOG_LEVEL="warning", VLLMOVERLAY_JOURNAL_DIR=str(tmp_path / "journals"), **servers.cpu_environment()
    )
    result = run_python("-c", SPEAKS, str(configuration), environment=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    by_configuration = result.stdout.split("configured\n")[1:]
    assert len(by_configuration) == 3
    assert all("a WARNING" in said and "an INFO" not in said for said in by_configuration), by_configuration
