"""`make bundle`: what is in it, that it is the same bytes everywhere, and that it works wherever it is put.

Here with a vLLM of a few lines in a bare Python without wrapt; test_bundle_engine.py does it with a real one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator

import pytest

from devtools import bundle, plugin_metadata
from tests.conftest import REPOSITORY, overlay_environment
from tests.unit import stub_vllm

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOBODY = 65534
IMPORT = (
    "import vllm, vllm.logger, vllm.sampling_params, wrapt, json; print(json.dumps([wrapt.__file__, vllm.__file__]))"
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path, str]:
    return bundle.make(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def open_folder() -> Iterator[pathlib.Path]:
    """A folder that every user may enter; pytest's own are private."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="overlay bundle "))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A fresh virtual environment with nothing in it, of one Python version."""

    def make(version: str) -> str:
        folder = tmp_path_factory.mktemp("bare")
        for base in interpreters(version):
            if not subprocess.run([base, "-m", "venv", "--without-pip", folder], check=False).returncode:
                return str(folder / "bin" / "python")
        pytest.skip(f"no Python {version} here")

    return make


def interpreters(version: str) -> list[str]:
    """Where a Python of this version may be: this one, on PATH, in pyenv."""
    found = [sys.executable] if version == ".".join(map(str, sys.version_info[:2])) else []
    on_path = shutil.which(f"python{version}")
    in_pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    found += [str(path) for path in sorted(in_pyenv.glob(f"{version}.*/bin/python"))]
    return [*found, on_path] if on_path else found


class Place:
    """An unpacked bundle next to a stub vLLM, in a folder whose name has a space."""

    def __init__(self, folder: pathlib.Path, packed: pathlib.Path) -> None:
        self.folder = folder / "a mounted folder"
        with tarfile.open(packed) as tar:
            tar.extractall(self.folder)
        self.folder.chmod(0o755)
        self.overlay = self.folder / bundle.NAME
        self.site = self.folder / "site"
        self.journals = self.folder / "journals"
        stub_vllm.write(self.site)
        for path in (self.overlay, *self.overlay.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

    def run(
        self, python: str, *python_path: pathlib.Path, user: int | None = None, code: str = IMPORT
    ) -> subprocess.CompletedProcess[str]:
        # No patch is wanted: a bare Python has no torch. The way in needs wrapt all the same.
        environment = overlay_environment(VLLMOVERLAY_PATCHES="none", VLLMOVERLAY_JOURNAL_DIR=str(self.journals))
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [*python_path, self.site]))
        return subprocess.run(
            [python, "-c", code],
            env=environment,
            cwd="/",
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def written(self) -> list[dict[str, object]]:
        return [json.loads(path.read_text()) for path in sorted(self.journals.glob("*.json"))]

    def assert_works(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == 0, result.stderr
        wrapt_file, vllm_file = json.loads(result.stdout)
        assert pathlib.Path(wrapt_file) == self.overlay / "fallback" / "wrapt" / "__init__.py"
        assert pathlib.Path(vllm_file).parent == self.site / "vllm"
        (journal,) = self.written()
        assert journal["transformers"]["state"] == "imported first" and journal["problems"] == []  # type: ignore[index]
        assert "overlay" not in result.stderr


@pytest.fixture
def place(open_folder: pathlib.Path, made: tuple[pathlib.Path, pathlib.Path, str]) -> Place:
    return Place(open_folder, made[1])


# ---------------------------------------------------------------- what is in it


def test_it_holds_both_doors_the_package_wrapt_and_two_licences(made: tuple[pathlib.Path, pathlib.Path, str]) -> None:
    folder = made[0]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "overlay").rglob("*.py")}
    wrapt = {name for name in names if name.startswith("fallback/wrapt/")}
    assert names == own | wrapt | set(plugin_metadata.files(REPOSITORY)) | {"sitecustomize.py", "LICENSE"}
    assert {"overlay/cli/app.py", "overlay/patches/gdn/patch.py"} <= own
    assert {pathlib.PurePosixPath(name).suffix for name in wrapt - {"fallback/wrapt/LICENSE"}} == {".py"}
    assert (folder / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    assert "Graham Dumpleton" in (folder / "fallback/wrapt/LICENSE").read_text()


def test_folder_and_archive_hold_the_same_and_the_sum_is_right(made: tuple[pathlib.Path, pathlib.Path, str]) -> None:
    folder, packed, digest = made
    assert hashlib.sha256(packed.read_bytes()).hexdigest() == digest
    assert subprocess.run(["sha256sum", "-c", f"{packed.name}.sha256"], cwd=packed.parent, check=False).returncode == 0
    with tarfile.open(packed) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == sorted({member.name for member in members})
        packed_files = {
            member.name.removeprefix(f"{bundle.NAME}/"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in members
            if member.isfile()
        }
        assert {(m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, "", "", 0o644),
            (0, 0, "", "", 0o755),
        }
    on_disk = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert packed_files == on_disk


def tree_of(folder: pathlib.Path) -> list[tuple[str, int, float, bytes]]:
    """Name, mode, time and bytes of everything in a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found.append((path.relative_to(folder).as_posix(), stat.S_IMODE(status.st_mode), status.st_mtime, content))
    return found


def test_the_same_sources_give_the_same_bytes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of the sources with times, modes and byte code of their own, bundled under two umasks."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    archives, trees = [], []
    for number, umask in enumerate((0o077, 0o002)):
        root = tmp_path / f"checkout {number}"
        root.mkdir()
        for name in ("sitecustomize.py", "LICENSE", "pyproject.toml"):
            shutil.copy(REPOSITORY / name, root)
        ignored = shutil.ignore_patterns("__pycache__") if number else None
        shutil.copytree(REPOSITORY / "overlay", root / "overlay", ignore=ignored)
        shutil.copytree(REPOSITORY / "devtools" / "wheels", root / "devtools" / "wheels")
        (root / "overlay" / "files.py").chmod(0o600 + 0o111 * number)
        os.utime(root / "overlay" / "files.py", (number, number))
        before = os.umask(umask)
        try:
            folder, packed, _ = bundle.make(tmp_path / f"dist {number}", root)
        finally:
            os.umask(before)
        archives.append(packed.read_bytes())
        trees.append(tree_of(folder))
    assert archives[0] == archives[1]
    assert trees[0] == trees[1] and {time for _, _, time, _ in trees[0]} == {1700000000}
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archives[0]))) as tar:
        assert {member.mtime for member in tar} == {1700000000}


@pytest.mark.parametrize("version", PYTHONS)
def test_every_python_packs_the_same_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    _, packed, _ = bundle.make(tmp_path / "own")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    for python in interpreters(version):
        command = [python, "-m", "devtools.bundle", "--into", str(tmp_path / "other")]
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        if "Traceback" in result.stderr:
            pytest.fail(result.stderr)
        if result.returncode == 0:  # a launcher of pyenv for a version that is not switched on ends with an error
            assert (tmp_path / "other" / packed.name).read_bytes() == packed.read_bytes()
            return
    pytest.skip(f"no Python {version} here")


def test_a_second_bundle_takes_the_place_of_the_first(tmp_path: pathlib.Path) -> None:
    folder, packed, digest = bundle.make(tmp_path)
    (folder / "left over.py").touch()
    assert bundle.make(tmp_path) == (folder, packed, digest)
    assert not (folder / "left over.py").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [folder.name, packed.name, f"{packed.name}.sha256"]
    )


def test_the_time_is_the_commits_unless_one_is_given(tmp_path: pathlib.Path) -> None:
    assert bundle.time_of(tmp_path, {"SOURCE_DATE_EPOCH": "12"}) == 12
    with pytest.raises(bundle.BundleError, match="SOURCE_DATE_EPOCH='tomorrow'"):
        bundle.time_of(tmp_path, {"SOURCE_DATE_EPOCH": "tomorrow"})
    assert bundle.time_of(tmp_path, {}) == bundle.NO_TIME
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x", "--date", "now"]):
        subprocess.run(
            ["git", "-C", tmp_path, *arguments],
            check=True,
            env={**os.environ, "GIT_COMMITTER_DATE": "1600000000 +0000"},
        )
    assert bundle.time_of(tmp_path, {}) == 1600000000


def test_a_wrapt_that_is_not_the_pinned_one_is_refused(tmp_path: pathlib.Path) -> None:
    """The wheel is PyPI's, and of the version that the tests run with."""
    version = bundle.WRAPT.split("-")[1]
    assert f"\nwrapt=={version}\n" in (REPOSITORY / "requirements.lock").read_text()
    wheel = tmp_path / bundle.WRAPT
    shutil.copy(REPOSITORY / "devtools" / "wheels" / bundle.WRAPT, wheel)
    assert "fallback/wrapt/wrappers.py" in bundle.wrapt_files(wheel)
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(bundle.BundleError, match=f"{bundle.WRAPT} has the SHA-256 .* and not {bundle.WRAPT_SHA256}"):
        bundle.wrapt_files(wheel)


def test_make_bundle_needs_a_bare_python_and_nothing_else(
    tmp_path: pathlib.Path, bare_python: Callable[[str], str]
) -> None:
    """From a checkout without .venv, with a Python without packages, the oldest that the overlay supports, and no PATH."""
    root = tmp_path / "checkout"
    for name in ("overlay", "devtools"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "sitecustomize.py", "LICENSE", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root)
    make = shutil.which("make") or pytest.skip("make is not installed here")
    result = subprocess.run(
        [make, "bundle", f"PYTHON={bare_python('3.10')}"],
        cwd=root,
        env={"PATH": "/bin:/usr/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not (root / ".venv").exists() and (root / "dist" / bundle.NAME / "overlay" / "bootstrap.py").is_file()
    assert result.stdout.splitlines()[0].endswith(f"dist/{bundle.NAME}")


def test_the_command_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bundle", "--into", str(tmp_path / "out")])
    assert bundle.main() == 0
    folder, packed, digest = capsys.readouterr().out.splitlines()
    assert pathlib.Path(folder).is_dir() and pathlib.Path(packed).is_file() and len(digest) == len("sha256 ") + 64
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "-1")
    assert bundle.main() == 2
    assert "SOURCE_DATE_EPOCH='-1'" in capsys.readouterr().err


# ---------------------------------------------------------------- where it is put


@pytest.mark.parametrize("version", PYTHONS)
def test_read_only_in_a_python_without_wrapt(place: Place, bare_python: Callable[[str], str], version: str) -> None:
    python = bare_python(version)
    assert "No module named 'wrapt'" in place.run(python, code="import wrapt").stderr
    place.assert_works(place.run(python, place.overlay))
    if os.getuid() != 0:  # root may write anywhere
        assert not list(place.overlay.rglob("__pycache__"))


def test_the_images_own_wrapt_is_in_front(place: Place, bare_python: Callable[[str], str]) -> None:
    shutil.copytree(place.overlay / "fallback" / "wrapt", place.site / "wrapt")
    result = place.run(bare_python("3.11"), place.overlay)
    assert result.returncode == 0 and "overlay" not in result.stderr, result.stderr
    assert pathlib.Path(json.loads(result.stdout)[0]) == place.site / "wrapt" / "__init__.py"


def test_as_another_user(place: Place) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    candidates = dict.fromkeys([sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"])
    probe = "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))"
    for python in candidates:
        try:
            result = subprocess.run(
                [python, "-c", probe], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=False
            )
        except OSError:
            continue
        if result.returncode == 0:
            break
    else:
        pytest.skip("no Python here that another user may run")
    place.journals.mkdir()
    os.chown(place.journals, NOBODY, NOBODY)
    result = place.run(python, place.overlay, user=NOBODY)
    place.assert_works(result)
    assert not list(place.overlay.rglob("__pycache__"))
    (journal,) = place.journals.glob("*.json")
    assert (journal.stat().st_uid, stat.S_IMODE(journal.stat().st_mode)) == (NOBODY, 0o600)


@pytest.mark.parametrize("in_front", [False, True])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_with_others_on_the_python_path(
    place: Place, bare_python: Callable[[str], str], kind: str, in_front: bool
) -> None:
    """A folder or a zip of somebody else, with a module and a sitecustomize of its own, on either side."""
    files = {"theirs.py": "X = 1\n", "sitecustomize.py": "import builtins; builtins.THEIRS = True\n"}
    if in_front:  # whoever is in front and wants others to run has to hand on; we are not asked
        del files["sitecustomize.py"]
    other = place.folder / f"other.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(other, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        other.mkdir()
        for name, text in files.items():
            (other / name).write_text(text)
    entries = [other, place.overlay] if in_front else [place.overlay, other]
    check = "import theirs, builtins; assert theirs.X == 1; " + ("" if in_front else "assert builtins.THEIRS; ")
    place.assert_works(place.run(bare_python("3.11"), *entries, code=check + IMPORT))


def test_an_editors_lock_is_not_in_it(tmp_path: pathlib.Path) -> None:
    for name in ("overlay", "devtools/wheels"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("sitecustomize.py", "LICENSE", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    before = bundle.contents(tmp_path)
    (tmp_path / "overlay" / ".#hooks.py").symlink_to("somebody@machine.1234")
    assert bundle.contents(tmp_path) == before


def test_as_a_zip_itself_it_leaves_vllm_stock_with_one_line(place: Place, bare_python: Callable[[str], str]) -> None:
    """Whether others can write to it, and what its source is (for the compile cache's key), is asked of a folder."""
    packed = pathlib.Path(shutil.make_archive(str(place.folder / "overlay"), "zip", place.overlay))
    result = place.run(bare_python("3.11"), packed, code="import vllm, vllm.logger")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if "overlay" in line)
    assert "vLLM runs stock" in line and str(packed) in line
    assert place.written() == []


def test_the_command_line_is_in_it(place: Place) -> None:
    """`python -m overlay` from the mounted folder, in a Python that has typer and rich, as vLLM's image has."""
    stub = place.site
    result = subprocess.run(
        [sys.executable, "-m", "overlay", "check", "--vllm", str(stub), "--json"],
        env=overlay_environment(PYTHONPATH=str(place.overlay)),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    assert found["vllm"]["path"].startswith(str(stub)) and set(found["patches"]) >= {"gdn", "pooling"}
