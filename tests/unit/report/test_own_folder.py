"""No journal goes into a folder that others can write, or choose, and the message says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable

import pytest

from overlay.report import journal_reader as reader
from overlay.report import own_folder
from overlay.report.journal import OwnJournal
from tests.unit.users import SOMEBODY_ELSE, another_user, needs_root

Opened = Callable[[], tuple[list[str], bool]]


@pytest.fixture
def opened(journal_folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> Opened:
    """Opens a journal in the folder; what was warned, and whether a journal is there."""

    def open_and_look() -> tuple[list[str], bool]:
        journal = OwnJournal()
        journal.open(str(journal_folder))
        journal.keep_current()
        journal.problem("something to write")
        warned = [record.getMessage() for record in caplog.records if "no journal" in record.getMessage()]
        return warned, any(journal_folder.glob("*.json"))

    return open_and_look


def test_a_new_folder_is_private_whatever_the_umask(journal_folder: pathlib.Path, opened: Opened) -> None:
    before = os.umask(0)
    try:
        warned, written = opened()
    finally:
        os.umask(before)
    (path,) = journal_folder.iterdir()
    assert not warned and written
    assert [stat.S_IMODE(one.stat().st_mode) for one in (journal_folder, path)] == [0o700, 0o600]


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_can_write_gets_no_journal(
    journal_folder: pathlib.Path, opened: Opened, mode: int
) -> None:
    journal_folder.mkdir()
    journal_folder.chmod(mode)
    warned, written = opened()
    assert not written and len(warned) == 1
    assert f"mode {mode:04o}" in warned[0] and f"chmod go-w {journal_folder}" in warned[0]


@needs_root
def test_a_folder_that_somebody_else_made_first_gets_no_journal(journal_folder: pathlib.Path, opened: Opened) -> None:
    journal_folder.mkdir(mode=0o700)
    os.chown(journal_folder, SOMEBODY_ELSE, SOMEBODY_ELSE)
    warned, written = opened()
    assert not written and len(warned) == 1 and f"belongs to user {SOMEBODY_ELSE}" in warned[0]


@needs_root
def test_a_link_that_somebody_else_made_gets_no_journal(
    journal_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    opened: Opened,
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    (mine / "1-1.json").write_text("{}")
    os.utime(mine / "1-1.json", (0, 0))
    journal_folder.symlink_to(mine)
    os.lchown(journal_folder, SOMEBODY_ELSE, SOMEBODY_ELSE)
    warned, _ = opened()
    assert len(warned) == 1 and f"link made by user {SOMEBODY_ELSE}" in warned[0]
    assert [path.name for path in mine.iterdir()] == ["1-1.json"]


@needs_root
def test_another_user_than_root_trusts_links_of_its_own_and_of_root_and_folders_of_its_own() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        own, roots, file = (pathlib.Path(name, which) for which in ("own", "roots", "file"))
        for folder, user in ((own, SOMEBODY_ELSE), (roots, 0)):
            folder.mkdir(mode=0o755)
            os.chown(folder, user, user)
        file.touch(mode=0o600)
        os.chown(file, SOMEBODY_ELSE, SOMEBODY_ELSE)
        for user in (0, SOMEBODY_ELSE, SOMEBODY_ELSE + 1):
            link = pathlib.Path(name, f"by {user}")
            link.symlink_to(own)
            os.lchown(link, user, user)
            with (
                another_user(),
                contextlib.nullcontext()
                if user in (0, SOMEBODY_ELSE)
                else pytest.raises(own_folder.NotOurs, match="link made"),
            ):
                own_folder.check_own_folder(str(link))
        with another_user(), pytest.raises(own_folder.NotOurs, match="belongs to user 0"):
            own_folder.check_own_folder(str(roots))
        with another_user(), pytest.raises(own_folder.NotOurs, match="not a folder"):
            own_folder.check_own_folder(str(file))


def test_a_link_of_ones_own_is_followed(journal_folder: pathlib.Path, tmp_path: pathlib.Path, opened: Opened) -> None:
    (tmp_path / "mine").mkdir(mode=0o700)
    journal_folder.symlink_to(tmp_path / "mine")
    assert opened() == ([], True)


def test_a_journal_is_data_and_is_never_evaluated(journal_folder: pathlib.Path) -> None:
    journal_folder.mkdir(mode=0o700)
    marker = journal_folder / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    hostile = {"schema": 1, "pid": code, "role": code, "patches": {code: {"verdict": code, "reason": {"a": code}}}}
    (journal_folder / "1-1.json").write_text(json.dumps(hostile))
    (journal_folder / "2-1.json").write_text(code)
    (found,), (skipped,) = reader.load(journal_folder)
    assert found.role == code and found.process_id == 0 and skipped.file == "2-1.json"
    assert not marker.exists()
