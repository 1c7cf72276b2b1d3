"""The journal: readable at every moment, cheap, and never the reason that vLLM fails."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from overlay import __version__
from overlay.journal import Journal
from tests.conftest import overlay_environment


def only_file(folder: pathlib.Path) -> dict[str, object]:
    (path,) = folder.glob("*.json")
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


def test_counts_layers_and_reasons_are_in_the_file(journal_folder: pathlib.Path) -> None:
    journal = Journal()
    record = journal.patch("gdn")
    journal.open(str(journal_folder))
    record.verdict = "apply"
    record.patched["model.layers.0.linear_attn"] = {"qkvz": 384, "ba": 8}
    record.refuse("model.layers.1.linear_attn", "batch-invariant mode")
    record.calls.fake += 1
    record.calls.dual_stream += 2
    record.calls.count_serial("above the token threshold")
    record.calls.count_serial("above the token threshold")
    journal.write()
    loaded = only_file(journal_folder)
    assert loaded["pid"] == os.getpid() and loaded["schema"] == 1
    assert loaded["patches"] == {
        "gdn": {
            "verdict": "apply",
            "reason": "this process has not imported the target",
            "module": None,
            "methods": [],
            "layers": {
                "patched": {"model.layers.0.linear_attn": {"qkvz": 384, "ba": 8}},
                "refused": {"model.layers.1.linear_attn": "batch-invariant mode"},
            },
            "calls": {
                "fake": 1,
                "lowered": 0,
                "dual_stream": 2,
                "fused": 0,
                "serial": {"above the token threshold": 2},
            },
            "plans": [],
        }
    }
    assert record.calls.total() == 4


def test_files_are_private_and_no_temporary_file_stays(journal_folder: pathlib.Path) -> None:
    journal = Journal()
    journal.open(str(journal_folder))
    for number in range(20):
        journal.problem(f"problem {number}")
    (path,) = journal_folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(journal_folder.stat().st_mode) == 0o700


def test_an_unchanged_journal_is_not_written_again(journal_folder: pathlib.Path) -> None:
    journal = Journal()
    journal.open(str(journal_folder))
    (path,) = journal_folder.iterdir()
    before = path.stat().st_ino
    journal.write()
    assert path.stat().st_ino == before
    journal.problem("something")
    assert path.stat().st_ino != before


def test_a_problem_is_said_once(journal_folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal()
    journal.problem("one")
    journal.problem("one")
    assert journal.problems == ["one"]
    assert [record.message for record in caplog.records] == ["overlay: one"]
    (said,) = caplog.records
    assert said.overlay == {"event": "problem", "version": __version__, "problem": "one"}  # type: ignore[attr-defined]


def test_a_layer_that_stays_stock_is_a_line_for_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="vllm.overlay")
    Journal().patch("gdn").refuse("layer.1", "batch-invariant mode")
    (said,) = caplog.records
    assert said.levelname == "DEBUG" and "layer.1" in said.message


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    journal = Journal()
    journal.open(str(blocker / "journal"))
    journal.write()
    journal.keep_current()
    assert len(caplog.records) == 1 and str(blocker) in caplog.records[0].message


def test_a_folder_that_vanishes_later_costs_one_warning(
    journal_folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()
    journal.open(str(journal_folder))
    for path in journal_folder.iterdir():
        path.unlink()
    journal_folder.rmdir()
    journal.patch("gdn").verdict = "apply"
    journal.write()
    journal.write()
    assert len(caplog.records) == 1


def test_stale_journals_go_and_fresh_or_live_ones_stay(journal_folder: pathlib.Path) -> None:
    journal_folder.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    old = time.time() - 7200
    stale = journal_folder / f"{gone.pid}-1.json"
    fresh = journal_folder / f"{gone.pid}-2.json"
    living = journal_folder / f"{os.getpid()}-1.json"
    foreign = journal_folder / "notes.json"
    for path in (stale, fresh, living, foreign):
        path.write_text("{}")
    for path in (stale, living, foreign):
        os.utime(path, (old, old))
    Journal().open(str(journal_folder))
    assert not stale.exists()
    assert fresh.exists() and living.exists() and foreign.exists()


WRITER = """
import sys, time
from overlay.journal import journal
record = journal.patch("gdn")
journal.open(sys.argv[1])
journal.keep_current()
print("ready", flush=True)
while True:
    record.calls.dual_stream += 1
    record.patched[f"layer{record.calls.dual_stream}"] = {"qkvz": 1, "ba": 1}
    time.sleep(0.001)
"""


def test_the_file_is_whole_after_kill_9(journal_folder: pathlib.Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(journal_folder)], stdout=subprocess.PIPE, env=overlay_environment()
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(2.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = journal_folder.glob("*.json")
    loaded = json.loads(path.read_text())
    assert loaded["pid"] == process.pid
    assert loaded["patches"]["gdn"]["calls"]["dual_stream"] > 100


FORKER = """
import os, sys
from overlay.journal import journal
record = journal.patch("gdn")
journal.open(sys.argv[1])
record.calls.dual_stream = 7
record.verdict = "apply"
journal.write()
child = os.fork()
if child == 0:
    record.calls.dual_stream += 1
    journal.write()
    os._exit(0)
os.waitpid(child, 0)
print(child)
"""


def test_a_forked_child_has_a_file_and_counters_of_its_own(journal_folder: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORKER, str(journal_folder)],
        capture_output=True,
        text=True,
        env=overlay_environment(),
        check=True,
    )
    child = int(result.stdout)
    journals = {
        loaded["pid"]: loaded for loaded in (json.loads(path.read_text()) for path in journal_folder.glob("*.json"))
    }
    assert len(journals) == 2
    assert journals[child]["patches"]["gdn"]["calls"]["dual_stream"] == 1
    assert journals[child]["patches"]["gdn"]["verdict"] == "apply"
    assert (
        next(loaded for pid, loaded in journals.items() if pid != child)["patches"]["gdn"]["calls"]["dual_stream"] == 7
    )
