"""devtools.journals: a reader that takes whatever it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devtools import journals


def test_a_full_journal() -> None:
    raw = {
        "pid": 7,
        "role": "VllmWorker-0",
        "started": 12.5,
        "transformers": {"state": "imported first", "seconds": 0.8},
        "problems": ["one"],
        "patches": {
            "gdn": {
                "verdict": "apply",
                "reason": "as known",
                "layers": {"patched": {"a": {"qkvz": 1, "ba": 2}, "b": {}}, "refused": {"c": "quantized"}},
                "calls": {"fake": 2, "dual_stream": 5, "serial": {"prefill": 3, "capture": 1}},
            }
        },
    }
    journal = journals.parse(raw)
    (patch,) = journal.patches
    assert (journal.process_id, journal.role, journal.layers, journal.calls) == (7, "VllmWorker-0", 2, 9)
    assert (patch.verdict, patch.refused, patch.fake_calls) == ("apply", {"c": "quantized"}, 2)
    assert (journal.transformers, journal.transformers_seconds, journal.problems) == ("imported first", 0.8, ("one",))


@pytest.mark.parametrize(
    "raw", [{}, {"patches": None}, {"patches": {"gdn": {}}}, {"patches": {"gdn": {"calls": None}}}]
)
def test_every_field_may_be_missing(raw: dict[str, Any]) -> None:
    journal = journals.parse(raw)
    assert (journal.layers, journal.calls) == (0, 0)


def test_a_folder_is_read_in_order_of_start_and_broken_files_are_passed_over(tmp_path: Path) -> None:
    for pid, started in ((3, 2.0), (2, 1.0), (1, 2.0)):
        (tmp_path / f"{pid}.json").write_text(json.dumps({"pid": pid, "started": started}))
    (tmp_path / "4.json").write_text('{"pid": ')
    (tmp_path / "5.json").write_text("[]")
    (tmp_path / ".journal-half").write_text('{"pid": 6}')
    assert [journal.process_id for journal in journals.read(tmp_path)] == [2, 1, 3]


def test_a_missing_folder_has_no_journals(tmp_path: Path) -> None:
    assert journals.read(tmp_path / "nothing") == []


def test_every_worker_has_to_be_patched() -> None:
    raw = {"patches": {"gdn": {"layers": {"patched": {"a": {}}}, "calls": {"dual_stream": 1}}}}
    assert journals.why_without_effect([journals.parse(raw)], 1) is None
    assert "1 of 2 workers" in (journals.why_without_effect([journals.parse(raw)], 1, workers=2) or "")
