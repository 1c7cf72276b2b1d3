"""`make release`: of which commit, what it makes, and that a spoiled file is found."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

from devtools import environment, plugin_metadata, release
from tests.conftest import REPOSITORY

pytest.importorskip("setuptools", minversion="77")


def git(folder: pathlib.Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_a_release_is_the_tagged_commit_and_nothing_else(tmp_path: pathlib.Path) -> None:
    with pytest.raises(release.ReleaseError, match="not a git repository"):
        release.check_commit(tmp_path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    with pytest.raises(release.ReleaseError, match=f"tags none .* git tag {re.escape(release.TAG)}"):
        release.check_commit(tmp_path)
    git(tmp_path, "tag", "v9.9.9")
    with pytest.raises(release.ReleaseError, match=r"\['v9\.9\.9'\]"):
        release.check_commit(tmp_path)
    git(tmp_path, "tag", release.TAG)
    release.check_commit(tmp_path)
    (tmp_path / "left over.py").touch()
    with pytest.raises(release.ReleaseError, match="left over"):
        release.check_commit(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    into = tmp_path_factory.mktemp("dist")
    names = [path.name for path in release.make(into)]
    assert names == [release.WHEEL, release.SDIST, f"{release.bundle.NAME}.tar.gz", release.SUMS]
    return into


def test_the_checksums_are_those_of_the_files(made: pathlib.Path) -> None:
    result = subprocess.run(["sha256sum", "-c", release.SUMS], cwd=made, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.count(": OK\n") == 3


def test_the_wheel_holds_the_package_and_not_the_door(made: pathlib.Path) -> None:
    own = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "overlay").rglob("*.py")}
    wheel = release.contents(made / release.WHEEL)
    assert {name for name in wheel if name.startswith("overlay/")} == own and "sitecustomize.py" not in wheel
    for name, content in plugin_metadata.files(REPOSITORY).items():  # what the mounted folder says
        said = {line for line in content.decode().splitlines() if not line.startswith("Metadata-Version")}
        assert said <= set(wheel[name].decode().splitlines())


def test_each_is_tried_in_a_fresh_environment(made: pathlib.Path) -> None:
    if not (environment.CACHE / f"uv-{environment.UV_VERSION}").exists():
        pytest.skip("the pinned uv is not there: make unit fetches it")
    release.try_out(made)


def test_a_spoiled_wheel_is_found(made: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_uv", lambda: "uv")
    wheel = made / release.WHEEL
    before = wheel.read_bytes()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("overlay/more.py", "")
    try:
        with pytest.raises(release.ReleaseError, match="builds another wheel"):
            release.try_out(made)
    finally:
        wheel.write_bytes(before)


def test_a_refusal_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: pathlib.Path) -> None:
        raise release.ReleaseError("no tag")

    monkeypatch.setattr(release, "check_commit", refuse)
    monkeypatch.setattr(sys, "argv", ["release"])
    assert release.main() == 2 and capsys.readouterr().err == "release: no tag\n"
