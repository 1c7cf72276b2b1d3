"""The journal: readable at every moment, cheap, and never the reason that vLLM fails."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay import __version__
from overlay.report import journal as journal_module
from overlay.report import journal_reader as reader
from overlay.report import process_identity
from overlay.report.journal import OwnJournal, PatchRecord
from tests.conftest import journal_name, overlay_environment, run_python


def only_file(folder: pathlib.Path) -> dict[str, object]:
    (path,) = folder.glob("*.json")
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


def test_counts_layers_and_reasons_are_in_the_file(journal_folder: pathlib.Path) -> None:
    journal = OwnJournal()
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
    journal = OwnJournal()
    journal.open(str(journal_folder))
    for number in range(20):
        journal.problem(f"problem {number}")
    (path,) = journal_folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(journal_folder.stat().st_mode) == 0o700


def test_an_unchanged_journal_is_neither_written_nor_made_into_text(
    journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = OwnJournal()
    record = journal.patch("gdn")
    journal.open(str(journal_folder))
    (path,) = journal_folder.iterdir()
    made: list[int] = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *given, **named: (made.append(1), dumps(*given, **named))[1])
    before = path.stat().st_ino
    journal.write()
    assert path.stat().st_ino == before and made == []
    #: Whatever changes, in any part of it, is noticed.
    changes: list[Callable[[], object]] = [
        lambda: record.calls.count_serial("prefill"),
        lambda: record.calls.count_serial("prefill"),
        lambda: record.patched.update({"layer.0": {"qkvz": 1}}),
        lambda: record.patched.update({"layer.0": {"qkvz": 2}}),
        lambda: record.refused.update({"layer.1": "quantized"}),
        lambda: record.plans.append({"layers": 1}),
        lambda: setattr(record, "reason", "another"),
        lambda: setattr(journal, "agreement", {"world": 2}),
        lambda: journal.problems.append("a problem"),
    ]
    for number, change in enumerate(changes, 1):
        change()
        journal.write()
        assert len(made) == number and json.loads(path.read_text()) == journal.as_dict()


def test_a_journal_that_vanished_is_written_again_without_a_change(journal_folder: pathlib.Path) -> None:
    journal = OwnJournal()
    journal.open(str(journal_folder))
    (path,) = journal_folder.iterdir()
    path.unlink()
    journal.write()
    assert json.loads(path.read_text()) == journal.as_dict()


def test_descriptors_of_others_stay_open_and_none_is_left(journal_folder: pathlib.Path) -> None:
    """Somebody closes all of the process's descriptors, and opens others, before the next write."""
    journal = OwnJournal()
    journal.open(str(journal_folder))
    assert journal._held is not None
    number = journal._held[0]
    os.close(number)
    journal.problem("the number is nobody's")
    assert journal._held is not None
    number = journal._held[0]
    theirs = os.open(os.devnull, os.O_RDONLY)
    os.dup2(theirs, number)
    journal.problem("the number is another file's")
    assert os.path.samestat(os.fstat(number), os.fstat(theirs))
    os.close(number)
    os.close(theirs)
    before = len(os.listdir("/proc/self/fd"))
    for text in "abc":
        journal.problem(text)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_journal_is_written_again_before_another_host_takes_it_for_old(
    journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    journal = OwnJournal()
    journal.open(str(journal_folder))
    (path,) = journal_folder.iterdir()
    for passed, written in ((1.0, False), (journal_module._REFRESH_SECONDS, True)):
        os.utime(path, (1.0, 1.0))
        clock[0] += passed
        journal.write()
        assert (path.stat().st_mtime != 1.0) == written
    assert journal_module._REFRESH_SECONDS * 3 < journal_module._STALE_SECONDS


def test_a_problem_is_said_once_and_written_at_once(
    journal_folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = OwnJournal()
    journal.problem("one")
    journal.problem("one")
    assert journal.problems == ["one"]
    assert [record.message for record in caplog.records] == ["overlay: one"]
    (said,) = caplog.records
    assert said.overlay == {"event": "problem", "version": __version__, "problem": "one"}  # type: ignore[attr-defined]
    journal.open(str(journal_folder))
    journal.problem("two")
    assert only_file(journal_folder)["problems"] == ["one", "two"]


def test_each_engine_of_a_process_begins_with_what_was_settled_and_nothing_else() -> None:
    record = PatchRecord(verdict="apply", reason="one after the other")
    for _ in range(2):
        record.patched["layer.0"], record.calls.dual_stream = {}, 1
        record.refuse("layer.1", "batch-invariant mode")
        record.plans.append({})
        assert record.calls.total() == 1
        record.overrule("ineffective", "its op has never run")
        record.overrule("ineffective", "its class was replaced")
        record.begin_engine()
        assert record == PatchRecord(verdict="apply", reason="one after the other")
    record.verdict = "refused"
    record.begin_engine()
    assert record.verdict == "refused", "what held before the last engine holds no longer"


def test_one_thread_keeps_the_file_current_whatever_a_round_meets_and_holds_nobody_up(
    journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_WRITE_INTERVAL_SECONDS", 0.001)
    before = set(threading.enumerate())
    journal, rounds, go = OwnJournal(), [], threading.Event()
    journal.open(str(journal_folder))

    def meets_a_counter_that_grows() -> None:
        go.wait(10)
        rounds.append(1)
        if len(rounds) == 3:
            journal._path = None  # the thread ends
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(journal, "write", meets_a_counter_that_grows)
    journal.keep_current()
    journal.keep_current()
    threads = set(threading.enumerate()) - before
    go.set()
    assert len(threads) == 1 and all(thread.daemon for thread in threads)
    for thread in threads:
        thread.join(10)
    assert len(rounds) == 3


@pytest.mark.parametrize(
    ("process", "arguments", "expected"),
    [
        ("EngineCore", ["/usr/bin/vllm", "serve", "a model"], "EngineCore"),
        ("MainProcess", ["/usr/bin/vllm", "serve", "a model"], "APIServer"),
        ("MainProcess", ["/usr/bin/vllm", "bench", "serve"], "Main"),
        ("MainProcess", ["/site/vllm/entrypoints/openai/api_server.py"], "APIServer"),
        ("MainProcess", ["/site/ray/_private/workers/default_worker.py", "serve"], "RayWorker"),
        ("MainProcess", ["/site/vllm/model_executor/models/registry.py"], "ModelRegistryProbe"),
        ("MainProcess", ["/home/me/serve"], "Main"),
        ("MainProcess", [], "Main"),
    ],
)
def test_a_process_has_the_role_that_vllm_gives_it(
    process: str, arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", process)
    monkeypatch.setattr(sys, "argv", arguments)
    assert journal_module.role() == expected


def test_what_was_counted_last_is_there_when_the_process_has_ended(journal_folder: pathlib.Path) -> None:
    code = f"""
        from overlay.report.journal import journal
        journal.open({str(journal_folder)!r})
        journal.patch("gdn").calls.dual_stream = 7
    """
    run_python("-c", textwrap.dedent(code), environment=overlay_environment(VLLMOVERLAY="0"))
    patches: Any = only_file(journal_folder)["patches"]
    assert patches["gdn"]["calls"]["dual_stream"] == 7


def test_a_folder_that_cannot_be_cleaned_up_has_no_journal_as_the_warning_says(
    journal_folder: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(journal_module, "_remove_stale", broken)
    journal = OwnJournal()
    journal.open(str(journal_folder))
    assert journal.folder is None and "no journal" in caplog.text


def test_a_layer_that_stays_stock_is_a_line_for_those_who_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="vllm.overlay")
    OwnJournal().patch("gdn").refuse("layer.1", "batch-invariant mode")
    (said,) = caplog.records
    assert said.levelname == "DEBUG" and "layer.1" in said.message


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    journal = OwnJournal()
    journal.open(str(blocker / "journal"))
    journal.write()
    journal.keep_current()
    assert len(caplog.records) == 1 and str(blocker) in caplog.records[0].message


def test_a_volume_that_everybody_may_write_to_is_refused_and_a_folder_in_it_will_do(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An emptyDir of Kubernetes; docs/operating.md says what to name instead."""
    mount = tmp_path / "journals"
    mount.mkdir()
    mount.chmod(0o2777)
    OwnJournal().open(str(mount))
    assert len(caplog.records) == 1 and str(mount) in caplog.records[0].message and list(mount.iterdir()) == []
    OwnJournal().open(str(mount / "overlay"))
    assert len(caplog.records) == 1 and len(list((mount / "overlay").iterdir())) == 1
    assert stat.S_IMODE((mount / "overlay").stat().st_mode) & 0o777 == 0o700


def test_a_folder_that_vanishes_later_costs_one_warning(
    journal_folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = OwnJournal()
    journal.open(str(journal_folder))
    for path in journal_folder.iterdir():
        path.unlink()
    journal_folder.rmdir()
    journal.patch("gdn").verdict = "apply"
    journal.write()
    journal.write()
    assert len(caplog.records) == 1


# ---------------------------------------------------------------- what others left in the folder

HOUR = 3600.0


def put(path: pathlib.Path, age: float) -> pathlib.Path:
    path.write_text("{}")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_is_old_and_of_no_process_goes(journal_folder: pathlib.Path) -> None:
    """Restarts of a container among it: its process 1 always lives. A clock may have been set, so the future is old, too."""
    journal_folder.mkdir()
    here = process_identity.own()
    assert here is not None
    restarts = [process_identity.file_name(here._replace(start=here.start - 100 - number)) for number in range(50)]
    elsewhere = process_identity.file_name(here._replace(namespace=here.namespace + 1))
    another_boot = process_identity.file_name(here._replace(boot="0" * 12))
    of_an_older_overlay = [f"{os.getpid()}-{1_700_000_000 + number}.json" for number in range(3)]
    without_proc = process_identity.file_name(None)
    names = [*restarts, elsewhere, another_boot, *of_an_older_overlay, without_proc, ".journal-abcdefgh"]
    for name in names:
        put(journal_folder / name, 2 * HOUR)
    for name in restarts[:5]:
        os.utime(journal_folder / name, (time.time() + 2 * HOUR,) * 2)
    kept = [put(journal_folder / name, 2 * HOUR).name for name in ("notes.json", "2024-01-31.json", f"{os.getpid()}-1")]
    link = journal_folder / process_identity.file_name(here._replace(start=2))
    link.symlink_to(kept[0])
    os.utime(link, (time.time() - 2 * HOUR,) * 2, follow_symlinks=False)
    kept.append(link.name)
    fresh = process_identity.file_name(here._replace(start=here.start - 1))
    put(journal_folder / fresh, HOUR / 2)
    (journal_folder / process_identity.file_name(here._replace(start=1))).mkdir()
    OwnJournal().open(str(journal_folder))
    left = {path.name for path in journal_folder.iterdir() if path.is_file()}
    assert left == {*kept, fresh, process_identity.file_name(here)}


def test_a_living_process_of_this_namespace_keeps_its_file_whatever_its_age(journal_folder: pathlib.Path) -> None:
    journal_folder.mkdir()
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        path = put(journal_folder / journal_name(child.pid), 1e6)
        OwnJournal().open(str(journal_folder))
        assert path.exists()
    put(path, 1e6)
    OwnJournal().open(str(journal_folder))
    assert not path.exists()


def test_a_living_process_of_another_namespace_keeps_its_file_whatever_its_age(journal_folder: pathlib.Path) -> None:
    """By its lock, which the kernel takes back when it ends."""
    journal_folder.mkdir()
    here = process_identity.own()
    assert here is not None
    path = journal_folder / process_identity.file_name(here._replace(number=1, namespace=here.namespace + 1))
    code = "import sys; from overlay import files; files.replace_and_lock(sys.argv[1], '{}', '.journal-'); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=overlay_environment(),
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        os.utime(path, (1.0, 1.0))
        OwnJournal().open(str(journal_folder))
        assert path.exists()
        other.kill()
        other.wait()
    OwnJournal().open(str(journal_folder))
    assert not path.exists()


NAMES = st.one_of(
    st.from_regex(r"\A[0-9\u00b2\u0663]{1,40}(-[0-9a-f\u00b2]{1,15}){0,4}(\.json)?\Z"),
    st.from_regex(r"\A\.journal-[a-z]{8}\Z"),
    st.sampled_from(
        ["9" * 250, "9" * 200 + "-1.json", "1-.json", "-1.json", ".json", "0-1700000000.json", "\udcff-1.json"]
    ),
)


@settings(max_examples=60)
@given(st.dictionaries(NAMES, st.floats(-1e9, 1e9), max_size=6), st.floats(-1e9, 1e9))
def test_neither_names_nor_clocks_keep_a_process_from_its_journal(ages: dict[str, float], clock: float) -> None:
    """Whatever lies in the folder and whatever is the time: nothing is said, the process has its journal and keeps it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        real = time.time
        patched.setattr(time, "time", lambda: real() + clock)
        patched.setattr(journal_module.atexit, "register", lambda _: None)  # the folder does not live until then
        said: list[object] = []
        patched.setattr(journal_module.logger, "warning", lambda *given, **_: said.append(given))
        for name, age in ages.items():
            path = pathlib.Path(folder, name)
            path.write_text("{}")
            with contextlib.suppress(OverflowError):
                os.utime(path, (real() - age,) * 2)
        first, second = OwnJournal(), OwnJournal()
        first.open(folder)
        own_file = process_identity.file_name(process_identity.own())
        os.utime(os.path.join(folder, own_file), (1.0, 1.0))
        second.open(folder)  # as a process that starts later: what is old goes now
        assert said == [] and first.folder == folder
        left = set(os.listdir(folder))
        assert own_file in left
        gone = {name for name in ages if name not in left}
        assert all(process_identity.is_name(name) or name.startswith(".journal-") for name in gone)
        assert all(abs(ages[name]) > HOUR - 60 for name in gone)


WRITER = """
import sys, time
from overlay.report.journal import journal
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


UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--pid", "--fork", "--mount-proc"]
#: In a container: the number of its process, and of whom it is the journal that stays when another container starts.
CONTAINED = """
import os, sys
from overlay.report.journal import journal
journal.open(sys.argv[1])
print(os.getpid(), flush=True)
input()
print(sorted(os.listdir(sys.argv[1])), flush=True)
input()
"""


def test_two_containers_share_a_folder(journal_folder: pathlib.Path) -> None:
    """Two pid namespaces, in both of which the process is number 1. The journal of one is old, as if nothing had changed."""
    refused = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if refused.returncode:
        pytest.skip(f"this machine makes no pid namespaces: {refused.stderr.strip()}")
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            container = stack.enter_context(
                subprocess.Popen(
                    [*UNSHARE, "--kill-child", sys.executable, "-c", CONTAINED, str(journal_folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=overlay_environment(),
                    text=True,
                )
            )
            stack.callback(container.kill)
            assert container.stdout is not None and container.stdout.readline() == "1\n"
            return container

        first = start()
        (path,) = journal_folder.iterdir()
        os.utime(path, (1.0, 1.0))
        second = start()
        assert len(list(journal_folder.iterdir())) == 2 and path.exists()
        assert [one.alive for one in reader.read(journal_folder)] == [True, True], "asked from a third namespace"
        for container in (first, second):
            assert container.stdin is not None
            container.kill()
            container.wait()
        deadline = time.monotonic() + 20
        while any(one.alive for one in reader.read(journal_folder)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [one.alive for one in reader.read(journal_folder)] == [False, False]
        OwnJournal().open(str(journal_folder))
        assert not path.exists(), "old, and of a process that has ended"


FORKER = """
import os, sys, time
from overlay.report.journal import journal
journal.open(sys.argv[1])
record = journal.patch("gdn")
record.calls.dual_stream = 7
record.verdict = "apply"
journal.write()
silent = os.fork()
if silent == 0:
    time.sleep(600)
journal.keep_current()
child = os.fork()
if child == 0:
    record.calls.dual_stream += 1
    time.sleep(600)
print(silent, child, flush=True)
time.sleep(600)
"""


def test_a_forked_child_has_a_file_counters_and_a_lock_of_its_own(journal_folder: pathlib.Path) -> None:
    """Its file follows its counters as its parent's does, without a milestone. One with nothing to say has none."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKER, str(journal_folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=overlay_environment(),
    ) as parent:
        children: list[int] = []
        try:
            assert parent.stdout is not None
            children += map(int, parent.stdout.readline().split())
            _, child = children
            deadline = time.monotonic() + 20
            while len(journals := list(journal_folder.glob("*.json"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            found = {loaded["pid"]: loaded for loaded in (json.loads(path.read_text()) for path in journals)}
            assert set(found) == {parent.pid, child} and found[child]["parent"] == parent.pid
            calls = {pid: loaded["patches"]["gdn"]["calls"]["dual_stream"] for pid, loaded in found.items()}
            assert calls == {parent.pid: 7, child: 1}
            assert found[child]["patches"]["gdn"]["verdict"] == "apply"
            assert found[child]["started"] > found[parent.pid]["started"]
            parent.kill()
            parent.wait()
            alive = {one.process_id: one.alive for one in reader.read(journal_folder)}
            assert alive == {parent.pid: False, child: True}, "no child holds its parent's lock"
        finally:
            for process_id in (parent.pid, *children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)


def test_a_child_that_is_forked_while_its_parent_writes_is_not_stuck(journal_folder: pathlib.Path) -> None:
    journal = OwnJournal()
    journal.open(str(journal_folder))
    with journal._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            journal.problem("one")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


STARTED = """
import multiprocessing, os, sys
def report(folder):
    from overlay.report.journal import OwnJournal
    journal = OwnJournal()
    journal.open(folder)
    print(os.getppid(), journal.as_dict()["parent"], flush=True)
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    child = context.Process(target=report, args=(sys.argv[2],))
    child.start()
    child.join()
    print(os.getpid())
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_parent_is_who_started_it(method: str, journal_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """To the kernel, the child of a fork server is that server's."""
    script = tmp_path / "script.py"
    script.write_text(STARTED)
    result = run_python(str(script), method, str(journal_folder), environment=overlay_environment())
    kernels, parent, started_by = map(int, result.stdout.split())
    assert parent == started_by and (kernels == parent) == (method == "spawn")


def test_a_process_in_one_of_vllms_loops_keeps_its_file_current(
    journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = OwnJournal()
    journal.open(str(journal_folder))
    kept: list[int] = []
    monkeypatch.setattr(journal, "keep_current", lambda: kept.append(1))
    journal.entered("EngineCoreProc.run_busy_loop")
    assert kept == [1] and only_file(journal_folder)["loop"] == "EngineCoreProc.run_busy_loop"
