"""overlay.report.journal_reader: a reader that takes whatever it finds, and knows whose process runs."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.report import journal as writer
from overlay.report import journal_reader, process_identity
from tests.conftest import journal_name

KEYS = st.sampled_from([
    "pid", "role", "started", "patches", "problems", "transformers", "vllm", "overlay", "fingerprint", "verdict", "reason",
    "module", "methods", "layers", "patched", "refused", "calls", "fake", "dual_stream", "fused", "serial", "state", "seconds",
    "gdn", "plans", "shape", "hidden", "main", "side", "source", "rows", "tokens", "strategy",
])  # fmt: skip
#: Like a journal in its names, and in nothing else.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(KEYS, children, max_size=6),
    max_leaves=20,
)
GARBLED = st.dictionaries(KEYS, JSON, max_size=10)


def entry(**fields: Any) -> str:
    return json.dumps({"schema": journal_reader.SCHEMA, "pid": 7, **fields})


PLAN = {
    "shape": {"hidden": 2048, "main": 12288, "side": 64, "takes_slices": True},
    "layers": 30,
    "source": "measured",
    "seconds": 1.25,
    "rows": [
        {"tokens": 1, "strategy": "fused", "us": {"serial": 10.0}, "inexact": []},
        {"tokens": 8, "strategy": "dual", "us": {}, "inexact": ["fused"]},
    ],
}


def test_a_full_journal() -> None:
    raw = {
        "pid": 7,
        "role": "VllmWorker-0",
        "started": 12.5,
        "vllm": "0.33.0",
        "overlay": "0.1.0",
        "fingerprint": "abc",
        "transformers": {"state": "imported first", "seconds": 0.8},
        "problems": ["one"],
        "patches": {
            "gdn": {
                "verdict": "apply",
                "reason": "as known",
                "module": "vllm.gdn",
                "methods": ["forward_cuda"],
                "layers": {"patched": {"a": {"qkvz": 1, "ba": 2}, "b": {}}, "refused": {"c": "quantized"}},
                "calls": {"fake": 2, "dual_stream": 5, "fused": 4, "serial": {"prefill": 3, "capture": 1}},
                "plans": [PLAN],
            }
        },
    }
    journal = journal_reader.parse(raw)
    (patch,) = journal.patches
    assert (journal.process_id, journal.role, journal.layers, journal.calls) == (7, "VllmWorker-0", 2, 13)
    assert (patch.dual_stream_calls, patch.fused_calls, patch.calls) == (5, 4, 13)
    assert patch.plans == (
        journal_reader.PlanOfShape("2048 to 12288 + 64", 30, "measured", 1.25, ((1, "fused"), (8, "dual"))),
    )
    assert (patch.verdict, patch.refused, patch.fake_calls) == ("apply", {"c": "quantized"}, 2)
    assert (patch.module, patch.methods) == ("vllm.gdn", ("forward_cuda",))
    assert (journal.transformers, journal.transformers_seconds, journal.problems) == ("imported first", 0.8, ("one",))
    assert (journal.vllm, journal.overlay, journal.fingerprint) == ("0.33.0", "0.1.0", "abc")


def test_what_the_overlay_writes_is_what_is_read(journal_folder: pathlib.Path) -> None:
    """Reader and writer are apart on purpose; this is where they meet."""
    journal = writer.OwnJournal()
    journal.open(str(journal_folder))
    record = journal.patch("gdn")
    record.verdict, record.methods = "apply", ("forward_cuda",)
    record.patched["layers.0"] = {"qkvz": 1}
    record.refuse("layers.1", "quantized")
    record.calls.count_serial("prefill")
    record.calls.dual_stream += 2
    record.plans.append(PLAN)
    journal.problem("a problem")
    ((found,), skipped) = journal_reader.load(journal_folder)
    (patch,) = found.patches
    assert skipped == [] and found.alive and found.identity == process_identity.own()
    assert found.identity is not None and found.identity.number == found.process_id == os.getpid()
    assert (patch.layers, patch.refused, patch.serial_calls) == (
        ("layers.0",),
        {"layers.1": "quantized"},
        {"prefill": 1},
    )
    assert (patch.verdict, patch.methods, found.problems) == ("apply", ("forward_cuda",), ("a problem",))
    assert patch.dual_stream_calls == 2 and patch.calls == record.calls.total() == 3
    assert [plan.shape for plan in patch.plans] == ["2048 to 12288 + 64"]
    assert writer.SCHEMA == journal_reader.SCHEMA


@settings(max_examples=200)
@given(GARBLED)
def test_nothing_in_a_file_makes_the_reader_fail(raw: dict[str, Any]) -> None:
    journal = journal_reader.parse(raw)
    assert journal.calls >= 0 and journal.layers >= 0
    assert (journal.started, journal.process_id) <= (1e13, 2**63)


WHOLE = json.dumps(
    {
        "schema": journal_reader.SCHEMA,
        "pid": 7,
        "role": "VllmWorker-0",
        "started": 12.5,
        "transformers": {"state": "imported first", "seconds": 0.8},
        "problems": ["one"],
        "patches": {
            "gdn": {
                "verdict": "apply",
                "methods": ["forward_cuda"],
                "layers": {"patched": {"a": {"qkvz": 1}}, "refused": {"c": "quantized"}},
                "calls": {"fake": 2, "dual_stream": 5, "fused": 4, "serial": {"prefill": 3}},
                "plans": [PLAN],
            }
        },
    }
).encode()
#: A good file of which a piece has been replaced, or cut off: what a full disk or another program leaves.
DAMAGED = st.tuples(
    st.integers(0, len(WHOLE)), st.integers(0, 40), st.binary(max_size=12) | st.sampled_from([b"9" * 5000, b"[" * 3000])
).map(lambda cut: WHOLE[: cut[0]] + cut[2] + WHOLE[cut[0] + cut[1] :])


@settings(max_examples=500)
@given(st.binary(max_size=200) | DAMAGED | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_file_makes_the_reader_fail(content: bytes) -> None:
    """What it gives out is of the types that it promises, whatever the bytes are; else the file is named."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "7-1.json")
        path.write_bytes(content)
        found, skipped = journal_reader.load(path.parent)
    assert [len(found), len(skipped)] in ([1, 0], [0, 1])
    for one in skipped:
        assert one.file == path.name and one.reason
    for journal in found:
        assert isinstance(journal.role, str) and 0 <= journal.process_id < 2**63
        for patch in journal.patches:
            assert all(isinstance(text, str) for text in (patch.name, patch.verdict, patch.reason))
            assert all(isinstance(name, str) for name in (*patch.layers, *patch.methods, *patch.refused))
            counts = (*patch.serial_calls.values(), patch.dual_stream_calls, patch.fused_calls)
            assert all(0 <= count < 2**63 for count in counts)
            for plan in patch.plans:
                assert isinstance(plan.shape, str) and isinstance(plan.source, str) and isinstance(plan.seconds, float)
                assert all(tokens >= 0 and isinstance(strategy, str) for tokens, strategy in plan.strategies)


def test_every_field_may_be_missing() -> None:
    for raw in (
        {},
        {"patches": None},
        {"patches": {"gdn": {}}},
        {"patches": {"gdn": {"calls": None, "plans": None}}},
        {"patches": {"gdn": {"plans": [None, {}, {"rows": [None, {}], "shape": []}]}}},
    ):
        journal = journal_reader.parse(raw)  # type: ignore[arg-type]
        assert (journal.layers, journal.calls) == (0, 0)


def test_a_folder_is_read_in_order_of_start(tmp_path: pathlib.Path) -> None:
    for pid, started in ((3, 2.0), (2, 1.0), (1, 2.0)):
        (tmp_path / f"{pid}.json").write_text(entry(pid=pid, started=started))
    (tmp_path / ".journal-half").write_text('{"pid": 6}')
    assert [journal.process_id for journal in journal_reader.read(tmp_path)] == [2, 1, 3]


def test_what_is_no_journal_is_named_with_the_reason(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.json").write_text('{"pid": ')
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_text(entry(schema=2))
    (tmp_path / "d.json").write_text(entry(problems=["x" * journal_reader.LARGEST_BYTES]))
    (tmp_path / "e.json").mkdir()
    os.mkfifo(tmp_path / "f.json")
    (tmp_path / "g.json").write_bytes(b"\xff\xfe")
    (tmp_path / "h.json").write_text("[" * 100_000)
    (tmp_path / "i.json").write_text(entry())
    (tmp_path / "j.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "k.json").write_text('{"schema": 1}')
    found, skipped = journal_reader.load(tmp_path)
    assert [journal.process_id for journal in found] == [7]
    reasons = {one.file[0]: one.reason for one in skipped}
    assert set(reasons) == set("abcdefghk"), "a link to nowhere is a file that has been removed"
    assert all("is not JSON" in reasons[name] for name in "agh")
    assert reasons["b"] == reasons["k"] == "is not a journal"
    assert reasons["c"] == "has schema 2; this overlay reads 1"
    assert reasons["d"] == "is larger than 4 MiB"
    assert reasons["e"] == reasons["f"] == "is not a file"


def test_a_missing_folder_has_no_journals(tmp_path: pathlib.Path) -> None:
    assert journal_reader.read(tmp_path / "nothing") == []


# ---------------------------------------------------------------- is it alive


def loaded(folder: pathlib.Path, name: str, process_id: int) -> journal_reader.Journal:
    (folder / name).write_text(entry(pid=process_id))
    ((found,), _) = journal_reader.load(folder, lambda one: one == name)
    return found


def test_a_process_that_runs_and_one_that_is_gone(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        name = journal_name(child.pid)
        assert loaded(tmp_path, name, child.pid).alive
        before = process_identity.from_name(name)
        assert before is not None
        given_out_again = process_identity.file_name(before._replace(start=before.start - 1))
        assert not loaded(tmp_path, given_out_again, child.pid).alive
        another_host = process_identity.file_name(before._replace(boot="0" * 12))
        assert not loaded(tmp_path, another_host, child.pid).alive, "a number of another host means nothing here"
    assert not loaded(tmp_path, name, child.pid).alive


@pytest.mark.parametrize("process_id", [0, -1, 2**31, 2**62])
def test_a_number_that_no_process_has(tmp_path: pathlib.Path, process_id: int) -> None:
    assert not loaded(tmp_path, "7-1700000000.json", process_id).alive


def test_of_a_file_without_an_identity_the_number_decides(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert loaded(tmp_path, f"{child.pid}-1700000000.json", child.pid).alive
    assert not loaded(tmp_path, f"{child.pid}-1700000000.json", child.pid).alive
