"""Records of the overlay's logger: held back until vLLM has handlers, and then with the fields they were given."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from overlay import __version__
from overlay.report import log
from tests.conftest import overlay_environment, run_python


class Json(logging.Handler):
    """A handler that formats as vLLM's JSON formatter does: what a record has beyond the usual becomes a field."""

    usual = frozenset(vars(logging.makeLogRecord({})))

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        extra = {name: value for name, value in vars(record).items() if name not in self.usual}
        self.lines.append(json.dumps({"message": record.getMessage(), "created": record.created, **extra}))


@pytest.fixture
def vllm_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The logger ``vllm`` without handlers, and the overlay's as it is at the start of a process."""
    above = logging.getLogger("vllm")
    monkeypatch.setattr(type(log.logger), "chosen", logging.NOTSET)
    monkeypatch.setattr(above, "handlers", [])
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    monkeypatch.setattr(log, "_held", None)
    yield above
    monkeypatch.setattr(type(log.logger), "chosen", logging.NOTSET)
    log.logger.setLevel(logging.NOTSET)


def test_held_records_keep_their_fields(vllm_logger: logging.Logger) -> None:
    log.hold("info")
    log.logger.info("overlay %s is here", "x", extra=log.fields("summary", patches={"gdn": {"layers": 9}}))
    log.logger.warning("overlay: nothing for a machine in this one")
    handler = Json()
    vllm_logger.addHandler(handler)
    assert handler.lines == [] and log._held is not None
    (held, _) = log._held.buffer
    log.release()
    log.logger.info("after", extra=log.fields("armed"))
    first, second, third = map(json.loads, handler.lines)
    assert first["message"] == "overlay x is here" and first["created"] == held.created
    assert first["overlay"] == {"event": "summary", "version": __version__, "patches": {"gdn": {"layers": 9}}}
    assert "overlay" not in second
    assert third["overlay"] == {"event": "armed", "version": __version__}


def test_held_records_get_what_the_factory_of_that_moment_gives(vllm_logger: logging.Logger) -> None:
    """vLLM's text format wants an attribute that its own record factory sets, which comes with its configuration."""
    log.hold("info")
    log.logger.info("early", extra=log.fields("armed"))
    before = logging.getLogRecordFactory()

    def factory(*args: object, **kwargs: object) -> logging.LogRecord:
        record = before(*args, **kwargs)
        record.vllm_process_name = "EngineCore"
        return record

    handler = Json()
    vllm_logger.addHandler(handler)
    logging.setLogRecordFactory(factory)
    try:
        log.release()
    finally:
        logging.setLogRecordFactory(before)
    (line,) = map(json.loads, handler.lines)
    assert line["vllm_process_name"] == "EngineCore" and line["overlay"]["event"] == "armed"


HANDLERS = {
    "formatters": {"plain": {"format": "%(levelname)s %(name)s %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}},
}
OUT = {"level": "INFO", "handlers": ["out"]}
#: Of `disable_existing_loggers`, true is what counts where nothing is said.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vLLM's own": {"loggers": {"vllm": {**OUT, "propagate": False}}, "disable_existing_loggers": False},
    "vllm is named": {"loggers": {"vllm": {**OUT, "propagate": False}}},
    "a root logger only": {"root": OUT},
    "a root logger and somebody else's": {"root": OUT, "loggers": {"vllm.engine": {"level": "DEBUG"}}},
    "a root logger that is quieter": {"root": {**OUT, "level": "WARNING"}},
}
#: As vLLM from 0.31.0 on: the module is there, and configures logging later, and again in each of its servers.
CONFIGURES = """
import json, logging, logging.config, sys, types
from overlay.report import log
level, configuration, times = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
log.hold(level)
log.logger.info("early")
log.logger.warning("early")
vllm = types.ModuleType("vllm.logger")
vllm.configure_logging = print
setattr(vllm, log.CONFIGURE, lambda: logging.config.dictConfig({"version": 1, **configuration}))
log.release_when_configured(vllm)
for _ in range(times):
    getattr(vllm, log.CONFIGURE)()
for name in ("debug", "info", "warning", "error"):
    getattr(log.logger, name)("late")
"""


def lines(level: str, configuration: dict[str, Any], times: int = 1) -> list[str]:
    result = run_python(
        "-c",
        CONFIGURES,
        level,
        json.dumps({**HANDLERS, **configuration}),
        str(times),
        environment=overlay_environment(),
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_configuration_that_does_not_name_the_logger_changes_what_it_says(name: str) -> None:
    expected = [
        f"{level} vllm.overlay {when}"
        for level, when in (
            ("INFO", "early"), ("WARNING", "early"),
            ("DEBUG", "late"), ("INFO", "late"), ("WARNING", "late"), ("ERROR", "late"),
        )
    ]  # fmt: skip
    assert lines("debug", CONFIGURATIONS[name], times=2) == expected
    assert lines("error", CONFIGURATIONS[name]) == ["ERROR vllm.overlay late"]


def test_a_configuration_that_names_the_logger_has_its_way() -> None:
    named = {"loggers": {"vllm.overlay": {**OUT, "level": "WARNING", "propagate": False}}, "root": OUT}
    assert lines("info", named) == [
        "WARNING vllm.overlay early",
        "WARNING vllm.overlay late",
        "ERROR vllm.overlay late",
    ]


def test_a_level_that_somebody_set_before_the_overlay_came_stays(vllm_logger: logging.Logger) -> None:
    log.logger.setLevel(logging.ERROR)
    log.hold("info")
    assert log.logger.level == logging.ERROR
    log.logger.setLevel(logging.NOTSET)
    assert log.logger.level == logging.INFO
