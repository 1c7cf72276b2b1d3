"""One process for ever: by names, by /proc, and by a lock, whatever containers and clocks do."""

from __future__ import annotations

import fcntl
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import files
from overlay.report import process_identity
from overlay.report.process_identity import Identity
from tests.conftest import journal_name

IDENTITIES = st.builds(
    Identity,
    st.integers(0, 10**10 - 1),
    st.integers(0, 10**20 - 1),
    st.integers(0, 10**20 - 1),
    st.text("0123456789abcdef", min_size=12, max_size=12),
)


@given(IDENTITIES, IDENTITIES)
def test_a_name_is_of_one_process(one: Identity, other: Identity) -> None:
    name = process_identity.file_name(one)
    assert process_identity.from_name(name) == one and process_identity.is_name(name)
    assert (name == process_identity.file_name(other)) == (one == other)


@given(
    st.text(max_size=80)
    | st.from_regex(r"\A[0-9²٣]{1,400}(-[0-9a-f²]{1,40}){0,4}(\.json)?\n?\Z")
    | st.binary(max_size=20).map(os.fsdecode)
)
def test_no_name_is_too_strange(name: str) -> None:
    """What is taken for a name of ours is one that could be written: no number that a machine cannot hold among them."""
    identity, here = process_identity.from_name(name), process_identity.own()
    assert process_identity.runs(f"/nowhere/{name}", here) in (None, False) or identity == here
    assert process_identity.runs_beside(name, here) == (identity == here)
    assert process_identity.runs_beside(name, None) == (identity is None)
    if identity is not None:
        assert process_identity.file_name(identity).encode() and process_identity.is_name(name)


@pytest.mark.parametrize(
    "name", ["notes.json", "2024-01.json", "2024-01-31.json", "results-1.json", "1-1700000000.txt"]
)
def test_a_file_of_somebody_elses_is_not_ours(name: str) -> None:
    assert not process_identity.is_name(name)


def test_older_overlays_and_machines_without_proc_have_names_without_an_identity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert process_identity.is_name("1-1700000000.json")
    for name in ("/proc/self/stat", "/proc/self/ns/pid", "/proc/sys/kernel/random/boot_id"):
        with monkeypatch.context() as patched:
            without(name, patched)
            assert process_identity.own() is None
    names = {process_identity.file_name(None) for _ in range(100)}
    assert len(names) == 100
    assert all(process_identity.is_name(name) and process_identity.from_name(name) is None for name in names)


@pytest.mark.parametrize("boot", [b"", b"\xff\xfe", b"not a boot\n", b"../../../../etc\n"])
def test_a_boot_that_is_none_gives_no_identity(
    boot: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The kernel's name for it becomes part of a file's name."""
    (tmp_path / "boot_id").write_bytes(boot)

    def elsewhere(path: str, **how: Any) -> Any:
        return open(tmp_path / "boot_id" if path.endswith("boot_id") else path, **how)

    monkeypatch.setattr(process_identity, "open", elsewhere, raising=False)
    assert process_identity.own() is None


def without(path: str, patched: pytest.MonkeyPatch) -> None:
    """As where this file is not there."""

    def missing(function: Any) -> Any:
        def call(given: Any, *arguments: Any, **named: Any) -> Any:
            if given == path:
                raise FileNotFoundError(path)
            return function(given, *arguments, **named)

        return call

    patched.setattr(process_identity, "open", missing(open), raising=False)
    patched.setattr(os, "stat", missing(os.stat))


def test_own_is_this_process_and_stays() -> None:
    here = process_identity.own()
    assert here is not None and here == process_identity.own() and here.number == os.getpid()
    assert process_identity.file_name(here) == journal_name(os.getpid())
    code = "from overlay.report import process_identity; print(process_identity.file_name(process_identity.own()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    child = process_identity.from_name(other.stdout.strip())
    assert child is not None and child != here
    assert (child.boot, child.namespace) == (here.boot, here.namespace) and child.start >= here.start


@pytest.mark.parametrize("name", [b") Z 1 (", b"a) b) c", b"\xff\xfe"])
def test_a_program_may_have_any_name(name: bytes) -> None:
    comm = pathlib.Path("/proc/self/comm")
    here, before = process_identity.own(), comm.read_bytes()
    try:
        comm.write_bytes(name)
        assert process_identity.own() == here
    finally:
        comm.write_bytes(before.strip())


def test_only_number_start_namespace_and_boot_together_are_one_process() -> None:
    here = process_identity.own()
    assert here is not None and process_identity.runs_beside(process_identity.file_name(here), here)
    for other in (
        here._replace(start=here.start + 1),
        here._replace(namespace=here.namespace + 1),
        here._replace(boot="0" * len(here.boot)),
    ):
        assert not process_identity.runs_beside(process_identity.file_name(other), here)
    assert not process_identity.runs_beside(process_identity.file_name(here), None), "nobody has an identity there"


def test_a_zombie_has_ended() -> None:
    here = process_identity.own()
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        name = journal_name(child.pid)
        assert process_identity.runs_beside(name, here)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process_identity.runs_beside(name, here)


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path) -> pathlib.Path:
    """The file of a process of another pid namespace, where this process's number is somebody else's."""
    here = process_identity.own()
    assert here is not None
    return tmp_path / process_identity.file_name(here._replace(namespace=here.namespace + 1))


def test_in_another_namespace_the_lock_tells(elsewhere: pathlib.Path) -> None:
    here = process_identity.own()
    assert process_identity.runs(str(elsewhere), here) is False, "there is no such file"
    elsewhere.write_text("")
    assert process_identity.runs(str(elsewhere), here) is False
    for _ in range(2):  # the second time it replaces what was locked
        descriptor = files.replace_and_lock(elsewhere, "", ".temporary-")
        assert process_identity.runs(str(elsewhere), here) is True
        assert process_identity.runs(str(elsewhere), here) is True, "to ask takes nothing away"
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        assert process_identity.runs(str(elsewhere), here) is False


def test_those_who_ask_at_once_are_not_in_each_others_way(elsewhere: pathlib.Path) -> None:
    elsewhere.write_text("")
    with elsewhere.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert process_identity.runs(str(elsewhere), process_identity.own()) is False


def test_what_is_no_file_of_a_process_is_not_waited_for(elsewhere: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A pipe without a writer would be waited for for ever; a link could lead to anybody's lock."""
    here, answers = process_identity.own(), []
    os.mkfifo(elsewhere)
    asking = threading.Thread(target=lambda: answers.append(process_identity.runs(str(elsewhere), here)), daemon=True)
    asking.start()
    asking.join(5)
    os.close(os.open(elsewhere, os.O_RDWR))  # lets go of whoever waits
    assert answers == [False]
    elsewhere.unlink()
    descriptor = files.replace_and_lock(tmp_path / "locked", "", ".temporary-")
    elsewhere.symlink_to(tmp_path / "locked")
    assert process_identity.runs(str(elsewhere), here) is False
    os.close(descriptor)


def test_a_file_that_is_replaced_while_it_is_asked_has_a_living_writer(
    elsewhere: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.write_text("")

    def replaced_meanwhile(*_: Any) -> None:
        files.replace(elsewhere, "", ".temporary-")

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    assert process_identity.runs(str(elsewhere), process_identity.own()) is True


def test_of_another_boot_nothing_can_be_said(elsewhere: pathlib.Path) -> None:
    here = process_identity.own()
    assert here is not None
    path = elsewhere.with_name(process_identity.file_name(here._replace(boot="0" * 12)))
    os.close(files.replace_and_lock(path, "", ".temporary-"))
    assert process_identity.runs(str(path), here) is None
    assert process_identity.runs(str(elsewhere), None) is None


def test_where_the_file_system_has_no_locks_the_file_is_written_all_the_same(
    elsewhere: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    os.close(files.replace_and_lock(elsewhere, "text", ".temporary-"))
    assert elsewhere.read_text() == "text" and process_identity.runs(str(elsewhere), process_identity.own()) is False


def test_a_write_that_fails_leaves_no_descriptor_and_no_file(tmp_path: pathlib.Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnicodeEncodeError):
        files.replace_and_lock(tmp_path / "a", "\ud800", ".temporary-")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace_and_lock(tmp_path / "folder", "", ".temporary-")
    assert len(os.listdir("/proc/self/fd")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
