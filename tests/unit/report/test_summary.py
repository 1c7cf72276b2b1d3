"""The one INFO line of a process: what it says, and what a machine reads of it."""

from __future__ import annotations

import json
import logging
import pathlib

import pytest

from overlay import __version__
from overlay.patches import registry
from overlay.report import summary
from overlay.report.journal import Calls, OwnJournal, PatchRecord
from overlay.verdict import SourceTree, Verdict
from overlay.vocabulary import APPLY, WITH_IT_GOES, is_removable
from tests.unit import stub_vllm

#: Over the stub's files: a target of frame_stack's that nobody has imported.
WITH_LOOPS: dict[str, str | None] = {"v1/engine/core.py": "class EngineCoreProc:\n    pass\n"}


def said(
    journal: OwnJournal, caplog: pytest.LogCaptureFixture, tree: pathlib.Path, *, first_rank: bool = True
) -> logging.LogRecord:
    with caplog.at_level("DEBUG", logger="vllm.overlay"):
        journal.note_unseen(lambda patch: registry.judge(patch, SourceTree(tree)))
        summary.say(journal, removable_is_said_here=first_rank)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    return record


def layers(number: int, first: int = 0) -> dict[str, dict[str, object]]:
    return {f"layer.{index}": {} for index in range(first, first + number)}


def journal_of(**patches: PatchRecord) -> OwnJournal:
    journal = OwnJournal()
    journal.vllm_version = "0.32.0"
    journal.patches.update(patches)
    return journal


def test_a_worker_sums_up_all_patches_with_proof(caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path) -> None:
    calls = Calls(fake=2, dual_stream=22, serial={"above the token threshold": 6, "not capturing a CUDA graph": 3})
    gdn = PatchRecord("apply", "one after the other", patched=layers(9), calls=calls)
    gdn.refused = {"layer.9": "batch-invariant mode", "layer.10": "batch-invariant mode"}
    journal = journal_of(
        gdn=gdn,
        lora_linear=PatchRecord("apply", "no way of its own"),
        deepseek_v4=PatchRecord("absent", "no such class"),
        pooling=PatchRecord("landed", "since #39113"),
    )
    journal.fingerprint = "abc"
    record = said(journal, caplog, tmp_path)
    assert record.getMessage() == (
        f"overlay {__version__} on vLLM 0.32.0: gdn: apply, 9 layers patched, op ran 31 times (22 dual stream, "
        "9 serial), 2 layers stock (batch-invariant mode); lora_linear: apply, no such layer in this model; deepseek_v4: absent; "
        "pooling: landed"
    )
    fields = json.loads(json.dumps(record.overlay))  # type: ignore[attr-defined]
    assert fields["patches"].pop("gdn") == {
        "state": "apply",
        "reason": "one after the other",
        "layers_patched": 9,
        "layers_refused": {"batch-invariant mode": 2},
        "calls_traced": 2,
        "calls_dual_stream": 22,
        "calls_fused": 0,
        "calls_serial": {"above the token threshold": 6, "not capturing a CUDA graph": 3},
    }
    assert {name: patch["state"] for name, patch in fields.pop("patches").items()} == {
        "lora_linear": "apply",
        "deepseek_v4": "absent",
        "pooling": "landed",
    }
    assert fields == {
        "event": "summary",
        "version": __version__,
        "vllm": "0.32.0",
        "fingerprint": "abc",
        "removable": False,
        "problems": 0,
    }


@pytest.mark.parametrize("first_rank", [True, False])
def test_what_can_be_removed_is_said_by_the_first_rank_and_known_to_all(
    first_rank: bool, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    journal = journal_of(gdn=PatchRecord("landed"), pooling=PatchRecord("off"))
    record = said(journal, caplog, tmp_path, first_rank=first_rank)
    assert record.getMessage().endswith("pooling: off" + f"; {summary.REMOVABLE}" * first_rank)
    assert record.overlay["removable"] is True  # type: ignore[attr-defined]


@pytest.mark.parametrize("state", ["apply", "inert", "not seen", "off"])
def test_a_patch_of_pythons_does_not_keep_the_overlay_and_is_named_where_it_applies(
    state: str, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    frame_stack = PatchRecord(state, "a loop runs above one large frame", without_layers=True)
    stub_vllm.write(tmp_path, WITH_LOOPS)
    record = said(journal_of(gdn=PatchRecord("landed"), frame_stack=frame_stack), caplog, tmp_path)
    assert record.overlay["removable"] is True  # type: ignore[attr-defined]
    lost = f" ({WITH_IT_GOES})" if state == "apply" else ""
    assert record.getMessage().endswith(f"; {summary.REMOVABLE}{lost}")
    assert ("frame_stack: apply, a loop runs above one large frame; " in record.getMessage()) == (state == "apply")


def test_a_target_that_was_not_imported_is_absent_where_the_source_says_so(
    caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    stub_vllm.write(tmp_path, stub_vllm.NOTHING)
    text = said(journal_of(gdn=PatchRecord()), caplog, tmp_path).getMessage()
    assert f"gdn: absent; {summary.REMOVABLE}" in text


def test_a_target_that_this_model_does_not_import_is_not_seen(
    caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "judge", lambda *_: Verdict(APPLY, "one after the other"))
    journal = journal_of(gdn=PatchRecord())
    record = said(journal, caplog, tmp_path)
    assert record.getMessage().endswith("gdn: not seen, its target was not imported")
    assert journal.patches["gdn"].reason.endswith("apply: one after the other")


def test_many_and_long_reasons_stay_short_in_the_line_and_whole_in_the_fields(
    caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    gdn = PatchRecord("apply")
    gdn.refused = {f"layer.{number}": f"reason {number}\n{'x' * 200}" for number in range(5)}
    record = said(journal_of(gdn=gdn), caplog, tmp_path)
    text = record.getMessage()
    assert text.count("1 layer stock (reason ") == 3 and text.endswith(", 2 layers stock for other reasons")
    assert "\n" not in text and len(text) < 500
    assert record.overlay["patches"]["gdn"]["layers_refused"] == dict.fromkeys(gdn.refused.values(), 1)


def test_an_op_that_was_only_traced_says_that(caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path) -> None:
    journal = journal_of(gdn=PatchRecord("apply", patched=layers(1), calls=Calls(fake=3)))
    text = said(journal, caplog, tmp_path).getMessage()
    assert text.endswith("gdn: apply, 1 layer patched, op has not run yet (traced 3 times)")


def test_inert_says_why(caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path) -> None:
    journal = journal_of(gdn=PatchRecord("inert", "no CUDA-like device"))
    assert said(journal, caplog, tmp_path).getMessage().endswith("gdn: inert, no CUDA-like device")


@pytest.mark.parametrize(
    ("states", "removable"),
    [
        ({"gdn": "landed", "pooling": "absent", "frame_stack": "apply"}, True),
        ({"gdn": "landed", "frame_stack": "drifted"}, False),
        ({"gdn": "landed", "frame_stack": "ineffective"}, False),
        ({"gdn": "apply", "frame_stack": "inert"}, False),
        ({"gdn": "off", "frame_stack": "apply"}, False),  # somebody has asked for this one alone
        ({"gdn": "off", "frame_stack": "absent"}, False),
        ({}, False),
    ],
)
def test_what_the_patches_of_vllm_say_decides_and_a_patch_of_pythons_that_is_not_known_forbids(
    states: dict[str, str], removable: bool
) -> None:
    assert is_removable(states) == removable
