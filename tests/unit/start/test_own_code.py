"""Nothing is armed from a folder that others can write, and the message says what to do."""

from __future__ import annotations

import errno
import os
import pathlib
import shlex
import shutil
import stat
import subprocess
import tempfile
from typing import Any

import pytest

import overlay
from devtools import plugin_metadata
from overlay.engine import compile_cache
from overlay.start import own_code
from tests.conftest import REPOSITORY, overlay_environment, run_python
from tests.unit import stub_vllm
from tests.unit.users import SOMEBODY_ELSE, another_user, needs_root


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder as a server mounts it: both doors, the package, wrapt, bytecode; nobody but the owner can write."""
    place = tmp_path / "a place" / "mounted"
    shutil.copytree(REPOSITORY / "overlay", place / "overlay", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "sitecustomize.py", place)
    plugin_metadata.write(REPOSITORY, place)
    for wrapt in (
        place / "wrapt",
        place / "fallback" / "wrapt",
    ):  # where an environment has it, and where the bundle has it
        wrapt.mkdir(parents=True)
        (wrapt / "decorators.py").write_text("")
    (place / "somebody_elses").mkdir()
    (place / "overlay" / "__pycache__").mkdir()
    (place / "overlay" / "__pycache__" / "hooks.cpython-311.pyc").write_bytes(b"")
    for path in (place.parent, place, *place.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (place / "somebody_elses").chmod(0o777)  # as in a folder of installed packages: not the overlay's, not its business
    return place


def check(folder: pathlib.Path) -> None:
    own_code.check_code(str(folder / "overlay"))


@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize(
    "name",
    [
        "overlay/start/import_hooks.py",
        "overlay/patches/gdn/patch.py",
        "overlay/__pycache__/hooks.cpython-311.pyc",
        "overlay/__pycache__",
        "overlay/verdict",
        "overlay",
        "sitecustomize.py",
        "wrapt/decorators.py",
        "fallback/wrapt/decorators.py",
        "fallback",
        "vllm_auxstream_overlay-0.1.0.dist-info/entry_points.txt",
        ".",
        "..",
    ],
)
def test_what_others_can_write_is_named_with_the_command_that_changes_it(
    folder: pathlib.Path, name: str, bit: int
) -> None:
    check(folder)
    path = pathlib.Path(os.path.normpath(folder / name))
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bit)
    with pytest.raises(own_code.Writable) as refusal:
        check(folder)
    text = str(refusal.value)
    assert f"{path} (mode {stat.S_IMODE(path.stat().st_mode):04o})" in text
    command = text.partition("to change that: ")[2]
    part = folder / name.partition("/")[0]
    assert command == shlex.join(
        ["chmod", *(["go-w"] if path in (folder, folder.parent) else ["-R", "go-w"]), os.path.normpath(part)]
    )
    subprocess.run(command, shell=True, check=True)
    check(folder)


def test_a_checkout_under_umask_002_takes_one_command(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "fallback")  # a bundle's
    for path in (folder, *folder.rglob("*")):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWGRP)
    with pytest.raises(own_code.Writable, match=r"\(mode 0664\).* and \d+ more") as refusal:
        check(folder)
    text = str(refusal.value)
    assert len(text.replace(str(folder), "")) < 400
    subprocess.run(text.partition("to change that: ")[2], shell=True, check=True)
    check(folder)


@pytest.mark.parametrize("wrong", [1, 3, 4, 6])
def test_the_first_are_named_and_the_rest_is_counted(folder: pathlib.Path, wrong: int) -> None:
    for path in sorted((folder / "overlay").glob("*.py"))[:wrong]:
        path.chmod(0o666)
    with pytest.raises(own_code.Writable) as refusal:
        check(folder)
    named, _, _ = str(refusal.value).partition(" can be written")
    assert named.count("mode 0666") == min(wrong, 3)
    assert named.endswith(f" and {wrong - 3} more" if wrong > 3 else "(mode 0666)")


def test_what_cannot_be_looked_at_is_not_taken_for_safe(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def broken(path: str, **how: Any) -> os.stat_result:
        if str(path).endswith("hooks.py"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return look(path, **how)

    monkeypatch.setattr(os, "stat", broken)
    with pytest.raises(OSError, match=r"hooks\.py"):
        check(folder)


def test_a_sticky_folder_further_up_is_fine_and_right_above_is_not(folder: pathlib.Path) -> None:
    folder.parent.chmod(0o1777)
    check(folder)
    folder.chmod(0o1777)  # a random.py in it would be imported before Python's own
    with pytest.raises(own_code.Writable, match="mode 1777"):
        check(folder)


def test_links_are_followed_to_what_others_can_write(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    check(link)
    folder.parent.chmod(0o777)
    with pytest.raises(own_code.Writable, match="a place"):
        check(link)
    folder.parent.chmod(0o755)

    elsewhere, beyond = tmp_path / "elsewhere", tmp_path / "beyond"
    for place in (elsewhere, beyond):
        place.mkdir(mode=0o755)
    shutil.move(folder / "overlay" / "files.py", beyond)
    (elsewhere / "files.py").symlink_to(beyond / "files.py")
    (folder / "overlay" / "files.py").symlink_to(os.path.relpath(elsewhere / "files.py", folder / "overlay"))
    check(folder)
    for place in (elsewhere, beyond):
        place.chmod(0o775)
        with pytest.raises(own_code.Writable, match=place.name):
            check(folder)
        place.chmod(0o755)


def test_whoever_can_turn_a_link_on_the_way_is_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The path as given, and each link that it leads over: /opt/overlay, to /srv/current/overlay, to /data/1/overlay."""
    opt, srv = tmp_path / "opt", tmp_path / "srv"
    for place in (opt, srv):
        place.mkdir(mode=0o755)
    (srv / "current").symlink_to(pathlib.Path("..", "srv", "..", folder.parent.name))
    (opt / "overlay").symlink_to(srv / "current" / folder.name)
    given = opt / "overlay"
    check(given)
    for place in (opt, srv, folder.parent):
        place.chmod(0o775)
        with pytest.raises(own_code.Writable, match=f"{place.name} .mode 0775"):
            check(given)
        place.chmod(0o1777)
        check(given)
        place.chmod(0o755)

    (srv / "files.py").symlink_to(folder / "overlay" / "files.py")
    (folder / "overlay" / "same_layers.py").symlink_to(srv / "files.py")
    check(folder)
    srv.chmod(0o775)
    with pytest.raises(own_code.Writable, match="srv"):
        check(folder)


DANGLING = {
    ".#hooks.py": "somebody@machine.1234",  # an editor's lock
    "gone.py": "/nowhere/at/all.py",
    "in_a_file.py": "hooks.py/inside.py",
    "itself.py": "./itself.py",
    "beyond_itself.py": "../overlay/itself.py/more.py",
    "circle": "../overlay",
}


def test_a_link_to_nowhere_or_in_a_circle_changes_nothing(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay, "__file__", str(folder / "overlay" / "__init__.py"))
    before = compile_cache.source_hash()
    for name, target in DANGLING.items():
        (folder / "overlay" / name).symlink_to(target)
    check(folder)
    looked_at, _ = own_code._content(str(folder / "overlay"))
    assert len({os.path.realpath(path) for path, _ in looked_at}) == len(looked_at), "goes round in a circle"
    assert compile_cache.source_hash() == before


@needs_root
def test_byte_code_that_only_root_can_read_is_nothing_to_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root has run from the folder under umask 077. For others Python then reads the sources, as if nothing were there."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        place = pathlib.Path(name, "overlay")
        cached = place / "__pycache__"
        cached.mkdir(parents=True, mode=0o755)
        (place / "hooks.py").write_text("")
        (cached / "hooks.cpython-311.pyc").write_bytes(b"")
        for mode in (0o700, 0o744):
            cached.chmod(mode)
            with another_user():
                own_code.check_code(str(place))
        cached.chmod(0o711)  # what is in there runs, for those who know its name
        with another_user(), pytest.raises(PermissionError):
            own_code.check_code(str(place))
        cached.chmod(0o777)
        with another_user(), pytest.raises(own_code.Writable, match="to change that, as root: chmod"):
            own_code.check_code(str(place))


@needs_root
def test_an_owner_of_any_name_is_trusted(folder: pathlib.Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, SOMEBODY_ELSE, SOMEBODY_ELSE)
    check(folder)
    (folder / "sitecustomize.py").chmod(0o666)
    with pytest.raises(own_code.Writable, match="to change that: chmod"):  # this is root already
        check(folder)


@pytest.mark.parametrize("strict", [False, True])
def test_vllm_runs_stock_with_one_warning_and_strict_stops_it(folder: pathlib.Path, strict: bool) -> None:
    shutil.rmtree(folder / "wrapt")  # the environment's own, then
    stub_vllm.write(folder.parent / "site")
    journals = folder.parent / "journals"
    environment = overlay_environment(
        VLLMOVERLAY_JOURNAL_DIR=str(journals), VLLMOVERLAY_STRICT=str(int(strict)), VLLMOVERLAY_PATCHES="none"
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parent / "site")])

    def start() -> subprocess.CompletedProcess[str]:
        return run_python("-c", "import vllm; print(vllm.__version__)", environment=environment)

    (folder / "overlay" / "files.py").chmod(0o664)
    refused = start()
    lines = [line for line in refused.stderr.splitlines() if line.startswith("WARNING") and "overlay" in line]
    assert len(lines) == 1 and "files.py (mode 0664)" in lines[0] and "chmod -R go-w" in lines[0]
    assert not journals.exists()
    assert (refused.returncode != 0) == strict
    assert refused.stdout.strip() == ("" if strict else "0.32.0+stub")

    (folder / "overlay" / "files.py").chmod(0o644)
    armed = start()
    assert armed.returncode == 0 and armed.stderr == ""
    assert len(list(journals.glob("*.json"))) == 1


def test_other_processes_of_python_do_not_pay(folder: pathlib.Path) -> None:
    """The check comes with vLLM: a folder that it would refuse says nothing in a process without vLLM."""
    (folder / "overlay").chmod(0o777)
    environment = overlay_environment()
    environment["PYTHONPATH"] = str(folder)
    result = run_python("-c", "import sys; print('overlay.start.own_code' in sys.modules)", environment=environment)
    assert (result.stdout.strip(), result.stderr) == ("False", "")
