"""The metadata by which vLLM finds the overlay's plugin in a folder on PYTHONPATH: a .dist-info as pip would leave it.

Python looks for such folders on every entry of sys.path, so a folder that is only mounted is found like an installed one.
"""

from __future__ import annotations

import re
from pathlib import Path

from overlay import __version__

GROUP = "vllm.general_plugins"


def files(root: Path) -> dict[str, bytes]:
    """The two files by their path in the folder. Raises ValueError where pyproject.toml of `root` has no entry point."""
    project = (root / "pyproject.toml").read_text()
    name = re.search(r'^name = "([^"]+)"$', project, re.MULTILINE)
    entry = re.search(
        rf'^\[project\.entry-points\."{re.escape(GROUP)}"\]\n(?:#.*\n)*(\w+) = "([\w.:]+)"$', project, re.MULTILINE
    )
    if name is None or entry is None:
        raise ValueError(f"{root / 'pyproject.toml'} has no entry point of the group {GROUP}")
    folder = f"{name[1].replace('-', '_')}-{__version__}.dist-info"
    return {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name[1]}\nVersion: {__version__}\n".encode(),
        f"{folder}/entry_points.txt": f"[{GROUP}]\n{entry[1]} = {entry[2]}\n".encode(),
    }


def write(root: Path, folder: Path) -> None:
    """Put the files into `folder`, which is to be on PYTHONPATH."""
    for name, content in files(root).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
