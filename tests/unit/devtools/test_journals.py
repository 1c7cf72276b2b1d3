"""devtools.journals: whether the overlay changed what ran. The reader itself is tested in test_cli_journals.py."""

from __future__ import annotations

from devtools.journals import why_without_effect
from overlay.report import journal_reader


def test_every_worker_has_to_be_patched() -> None:
    raw = {"patches": {"gdn": {"layers": {"patched": {"a": {}}}, "calls": {"dual_stream": 1}}}}
    assert why_without_effect([journal_reader.parse(raw)], 1) is None
    assert "1 of 2 workers" in (why_without_effect([journal_reader.parse(raw)], 1, workers=2) or "")


def test_layers_whose_op_was_only_traced_have_changed_nothing() -> None:
    raw = {"patches": {"gdn": {"layers": {"patched": {"a": {}}}, "calls": {"fake": 3, "lowered": 2}}}}
    assert "the op never ran" in (why_without_effect([journal_reader.parse(raw)], 1) or "")
