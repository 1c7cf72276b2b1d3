"""`make release`: the wheel, the sdist, the bundle and their checksums in dist/, each tried in a fresh environment.

    python -m devtools.release [--into FOLDER] [--untagged]

A release is a commit with the tag v<version>, without changes beside it. `--untagged` makes the same files of anything, to try
this out. Nothing is fetched: wrapt comes from devtools/wheels/.

Exit status: 0 made and tried, 2 refused or an error.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from devtools import bundle, environment
from overlay import __version__

ROOT = Path(__file__).resolve().parent.parent
TAG = f"v{__version__}"
NAME = f"vllm_auxstream_overlay-{__version__}"
WHEEL, SDIST, SUMS = f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz", "SHA256SUMS"
#: What the wheel and the sdist are made from.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "overlay")
#: Run in a fresh environment: the overlay is there, at this version, and arms when vLLM calls its plugin.
AS_PLUGIN = """
import importlib.metadata, sys
(entry,) = importlib.metadata.entry_points(group="vllm.general_plugins")
entry.load()()
from overlay import __version__, bootstrap
assert importlib.metadata.version("vllm-auxstream-overlay") == __version__ == sys.argv[1], __version__
assert bootstrap._armed
"""
#: The same for the folder on PYTHONPATH, which is armed before this runs.
AS_FOLDER = """
import importlib.util, sys
from overlay import __version__, bootstrap
assert importlib.util.find_spec("wrapt") is None, "the environment is not a bare one"
assert bootstrap._armed and __version__ == sys.argv[1]
from overlay.start.import_hooks import fall_back_on_our_wrapt
fall_back_on_our_wrapt()
import wrapt
assert wrapt.__file__.startswith(sys.argv[2]), wrapt.__file__
"""


class ReleaseError(Exception):
    """What keeps the release from being made; the message says what to do."""


def check_commit(root: Path) -> None:
    """Raise ReleaseError unless `root` is the tagged commit and nothing else."""
    changed = _git(root, "status", "--porcelain")
    if changed:
        raise ReleaseError(f"there are changes beside the commit; commit them, or take --untagged:\n{changed}")
    tags = _git(root, "tag", "--points-at", "HEAD").split()
    if TAG not in tags:
        raise ReleaseError(
            f"the commit has the tags {tags or 'none'} and overlay/__init__.py the version {__version__}; "
            f"git tag {TAG}, or take --untagged"
        )


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ReleaseError("git is not installed, and without it nobody knows which commit this is") from error
    if result.returncode:
        raise ReleaseError(f"git {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout.strip()


def build(source: Path, kind: str, into: Path, seconds: int) -> None:
    """A wheel or an sdist of a folder of sources, by setuptools' own hooks."""
    code = f"import sys; from setuptools.build_meta import build_{kind} as build; build(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(into)],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(seconds)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ReleaseError(f"setuptools cannot build the {kind}:\n{result.stdout}{result.stderr}")


def make(into: Path, root: Path = ROOT) -> list[Path]:
    """Everything that is published, in `into`; the checksums last."""
    seconds = bundle.time_of(root, os.environ)
    _, packed, _ = bundle.make(into, root)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        for name in SOURCES:
            if (root / name).is_dir():
                shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(root / name, source)
        for kind in ("sdist", "wheel"):
            build(source, kind, into, seconds)
    files = [into / WHEEL, into / SDIST, packed]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (into / SUMS).write_text("".join(lines))
    return [*files, into / SUMS]


def try_out(into: Path) -> None:
    """Install each in an environment of its own. Raises ReleaseError with what does not work."""
    uv = environment.find_uv()
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-release-") as temporary:
        folder = Path(temporary)
        with tarfile.open(into / SDIST) as tar:
            tar.extractall(folder / "sdist")
        (folder / "rebuilt").mkdir()
        build(folder / "sdist" / NAME, "wheel", folder / "rebuilt", bundle.NO_TIME)
        if contents(folder / "rebuilt" / WHEEL) != contents(into / WHEEL):
            raise ReleaseError(f"{SDIST} builds another wheel than {WHEEL}")
        for wheel in (into / WHEEL, folder / "rebuilt" / WHEEL):
            python = fresh(uv, folder / "environment")
            wheels = ["--no-index", "--find-links", str(ROOT / "devtools" / "wheels")]
            run([uv, "pip", "install", "--quiet", "--python", python, *wheels, str(wheel)])
            run([python, "-I", "-c", AS_PLUGIN, __version__])
        with tarfile.open(into / f"{bundle.NAME}.tar.gz") as tar:
            tar.extractall(folder / "mounted")
        mounted = folder / "mounted" / bundle.NAME
        python = fresh(uv, folder / "environment")
        run([python, "-c", AS_FOLDER, __version__, str(mounted)], PYTHONPATH=str(mounted))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def fresh(uv: str, folder: Path) -> str:
    """The Python of a new environment with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    run([uv, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)])
    return str(folder / "bin" / "python")


def run(command: list[str], **variables: str) -> None:
    """Raises ReleaseError with the output where the status is not 0. Nothing of this shell's Python gets in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM", "VIRTUAL_ENV"))}
    result = subprocess.run(command, env={**kept, **variables}, cwd="/", capture_output=True, text=True, check=False)
    if result.returncode:
        raise ReleaseError(f"{' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make and try everything that is published.")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="the folder for it (default: dist)")
    parser.add_argument(
        "--untagged", action="store_true", help="of a commit without the tag, or with changes: to try it out"
    )
    arguments = parser.parse_args()
    into = arguments.into.resolve()
    try:
        if not arguments.untagged:
            check_commit(ROOT)
        into.mkdir(parents=True, exist_ok=True)
        files = make(into)
        try_out(into)
    except (ReleaseError, bundle.BundleError, environment.SetupError, OSError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    print(*files, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
