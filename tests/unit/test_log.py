"""Records of the overlay's logger: held back until vLLM has handlers, and then with the fields they were given."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from overlay import __version__, log


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
    level = log.logger.level
    monkeypatch.setattr(above, "handlers", [])
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    monkeypatch.setattr(log, "_held", None)
    yield above
    log.logger.setLevel(level)


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
