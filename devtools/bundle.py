"""`make bundle`: the one folder that goes on PYTHONPATH, and a .tar.gz of it with its SHA-256.

    python3 -m devtools.bundle [--into FOLDER]

Any Python from 3.10 on runs this: it needs the standard library alone, no network and no .venv. wrapt comes from the
wheel in devtools/wheels/, unchanged from PyPI.

The folder holds ``sitecustomize.py``, ``overlay/``, ``fallback/wrapt/`` (Python files only, which run on any CPython that
the overlay supports), the metadata by which vLLM finds the overlay as a plugin, and both licences. It holds no tests and no
documents. It holds no byte code, which would fit one version of Python.

The same sources give the same bytes, wherever, whenever and by whomever they are bundled: names are sorted, owner, mode
and time are fixed. The time is SOURCE_DATE_EPOCH, else that of the commit. Only zlib is left to the machine: another
implementation of it (zlib-ng) may compress the same .tar into another .tar.gz.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from devtools import plugin_metadata
from overlay import __version__

ROOT = Path(__file__).resolve().parent.parent
NAME = f"vllm-overlay-{__version__}"
#: wrapt for environments that have none, and its SHA-256, which PyPI shows as well.
WRAPT = "wrapt-2.5.2-py3-none-any.whl"
WRAPT_SHA256 = "61eb54e9540ea522c2c4752a57549a83d3c67e6704ed708403d28e067aaf90f0"
#: Where overlay.start.import_hooks looks for wrapt in an environment that has none.
FALLBACK = "fallback"
FILE_MODE = 0o644
FOLDER_MODE = 0o755
#: Seconds since 1970, where neither SOURCE_DATE_EPOCH nor a commit gives a time: the first day that a zip can hold.
NO_TIME = 315532800


class BundleError(Exception):
    """What keeps the bundle from being made; the message says what to do."""


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the bundle by its path in it, sorted. Raises BundleError where wrapt is not the one that is meant."""
    modules = (path for path in (root / "overlay").rglob("*.py") if path.is_file())  # an editor's lock leads nowhere
    sources = [root / "sitecustomize.py", root / "LICENSE", *modules]
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in sources}
    files.update(plugin_metadata.files(root))
    files.update(wrapt_files(root / "devtools" / "wheels" / WRAPT))
    return dict(sorted(files.items()))


def wrapt_files(wheel: Path) -> dict[str, bytes]:
    """wrapt's Python files and its licence, by their paths in the bundle."""
    packed = wheel.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != WRAPT_SHA256:
        raise BundleError(
            f"{wheel} has the SHA-256 {found} and not {WRAPT_SHA256}; take the file from the commit again"
        )
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        files = {
            f"{FALLBACK}/{name}": archive.read(name)
            for name in archive.namelist()
            if name.startswith("wrapt/") and name.endswith(".py")
        }
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        return {**files, f"{FALLBACK}/wrapt/LICENSE": archive.read(licence)}


def time_of(root: Path, environ: Mapping[str, str]) -> int:
    """The time of every file, in seconds since 1970."""
    given = environ.get("SOURCE_DATE_EPOCH", "")
    if given:
        if not given.isdecimal():
            raise BundleError(f"SOURCE_DATE_EPOCH={given!r} is not a whole number of seconds since 1970")
        return int(given)
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return NO_TIME
    return int(commit.stdout) if commit.returncode == 0 and commit.stdout.strip() else NO_TIME


def write_folder(files: Mapping[str, bytes], folder: Path, seconds: int) -> None:
    """Write the files into `folder`, which takes the place of an older one of this name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(FILE_MODE)
            os.utime(path, (seconds, seconds))
        for path in (new, *(path for path in new.rglob("*") if path.is_dir())):
            path.chmod(FOLDER_MODE)
            os.utime(path, (seconds, seconds))
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)


def archive(files: Mapping[str, bytes], name: str, seconds: int) -> bytes:
    """The .tar.gz, with everything in one folder `name`."""
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents if parent.parts}
    names = [name, *(f"{name}/{inner}" for inner in sorted({*folders, *files}))]
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member_name in names:
            member = tarfile.TarInfo(member_name)  # owner root, and no name of one
            member.mtime = seconds
            content = files.get(member_name.removeprefix(f"{name}/"))
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, FOLDER_MODE
                tar.addfile(member)
            else:
                member.size, member.mode = len(content), FILE_MODE
                tar.addfile(member, io.BytesIO(content))
    packed = io.BytesIO()
    # Not gzip.compress: what that writes into the header depends on the version of Python.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0) as file:
        file.write(plain.getvalue())
    return packed.getvalue()


def make(into: Path, root: Path = ROOT) -> tuple[Path, Path, str]:
    """Write folder, .tar.gz and .sha256 into `into`. Gives folder, archive, and the archive's SHA-256."""
    files = contents(root)
    seconds = time_of(root, os.environ)
    folder, packed = into / NAME, into / f"{NAME}.tar.gz"
    write_folder(files, folder, seconds)
    data = archive(files, NAME, seconds)
    digest = hashlib.sha256(data).hexdigest()
    packed.write_bytes(data)
    packed.with_name(f"{packed.name}.sha256").write_text(f"{digest}  {packed.name}\n")
    return folder, packed, digest


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the folder that goes on PYTHONPATH, and a .tar.gz of it.")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="the folder for both (default: dist)")
    try:
        folder, packed, digest = make(parser.parse_args().into)
    except (BundleError, OSError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    print(f"{folder}\n{packed}\nsha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
