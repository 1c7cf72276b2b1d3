"""A small world of folders for the tests of the door: overlays, foreign sitecustomize modules, interpreters to start.

Every module that Python runs at start appends its name to one log file, so a test reads the order, and the number of
times, from that file. The overlay here is the real sitecustomize.py and the real chain.py over a bootstrap that logs.
"""

import os
import py_compile
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

BOOTSTRAP = """
import os

armed = 0

def arm() -> None:
    global armed
    if armed:  # the contract of the real one: calling it again does nothing
        return
    armed = 1
    with open(os.environ["DOOR_LOG"], "a") as log:
        log.write("armed\\n")
"""

LOG = """
import os
with open(os.environ["DOOR_LOG"], "a") as log:
    log.write("{name}\\n")
"""

# What ddtrace's module does: step off sys.path, out of sys.modules, and let the import system find the next one.
CHAINING = """
import sys
folder = os.path.dirname(__file__)
index = sys.path.index(folder)
del sys.path[index]
this_module = sys.modules.pop("sitecustomize", None)
try:
    import sitecustomize
except {caught}:
    if this_module is not None:
        sys.modules["sitecustomize"] = this_module
finally:
    sys.path.insert(index, folder)
"""

# What OpenTelemetry's module does: off PYTHONPATH while it starts, and back, at the front.
OPENTELEMETRY = """
folder = os.path.dirname(__file__)
entries = [entry for entry in os.environ["PYTHONPATH"].split(os.pathsep) if entry != folder]
os.environ["PYTHONPATH"] = os.pathsep.join([folder, *entries])
"""

TAILS = {
    "module": "",
    "chains": CHAINING.format(caught="Exception"),
    "opentelemetry": OPENTELEMETRY,
    "raises": "raise ValueError('first line\\nsecond line')",
    "import_error": "import no_such_module_anywhere",
    "not_found": "raise ModuleNotFoundError('no next one', name='sitecustomize')",
    "exits": "raise SystemExit(7)",
    "vanishes": "import sys; del sys.modules['sitecustomize']",
}

SEEN = "import sys; module = sys.modules.get('sitecustomize'); print(getattr(module, '__file__', None))"


@dataclass
class Result:
    """What one interpreter did."""

    returncode: int
    stdout: str
    stderr: str
    log: list[str]

    @property
    def foreign(self) -> list[str]:
        return [name for name in self.log if name != "armed"]


@dataclass
class World:
    """Folders under `root`; `start` runs Python with some of them on PYTHONPATH."""

    root: Path
    runs: int = field(default=0)

    def overlay(self, name: str = "overlay folder") -> Path:
        folder = self.root / name
        (folder / "overlay").mkdir(parents=True)
        shutil.copy(REPOSITORY / "sitecustomize.py", folder)
        for file in ("__init__.py", "chain.py"):
            shutil.copy(REPOSITORY / "overlay" / file, folder / "overlay")
        (folder / "overlay" / "bootstrap.py").write_text(BOOTSTRAP)
        return folder

    def foreign(self, name: str, kind: str = "module") -> Path:
        """Make a folder (or a zip file) with a sitecustomize of this kind, which logs `name`."""
        folder = self.root / name
        if kind == "missing":
            return folder
        folder.mkdir(parents=True)
        file = folder / "sitecustomize.py"
        text = LOG.format(name=name)
        if kind == "package":
            file = folder / "sitecustomize" / "__init__.py"
            file.parent.mkdir()
            (file.parent / "part.py").write_text(text)
            file.write_text("from . import part\nfrom .part import log\n")
        elif kind == "bytecode":
            file.write_text(text)
            py_compile.compile(str(file), cfile=str(file) + "c", doraise=True)
            file.unlink()
        elif kind == "zip":
            archive = folder / "archive.zip"
            with zipfile.ZipFile(archive, "w") as opened:
                opened.writestr("sitecustomize.py", text)
            return archive
        elif kind == "namespace":
            (folder / "sitecustomize").mkdir()
        elif kind == "syntax_error":
            file.write_text("def (:\n")
        elif kind != "empty":
            file.write_text(text + TAILS[kind])
        return folder

    def start(
        self,
        path: Sequence[Path | str],
        *arguments: str,
        python: str = sys.executable,
        cwd: Path | None = None,
        **environment: str,
    ) -> Result:
        """Start Python with `path` on PYTHONPATH; without arguments it prints the file of the sitecustomize in use."""
        self.runs += 1
        log = self.root / f"log{self.runs}"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VLLM"))}
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "DOOR_LOG": str(log),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [python, *(arguments or ("-c", SEEN))],
            env=inherited | variables | environment,
            cwd=cwd or self.root,  # -c and -m put it on sys.path: the repository must not be found there
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        lines = log.read_text().split() if log.exists() else []
        return Result(done.returncode, done.stdout.strip(), done.stderr, lines)
