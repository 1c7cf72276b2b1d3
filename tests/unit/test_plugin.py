"""The second door: found by its metadata, opens what the first has not, and never twice. On a stub vLLM."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from devtools import plugin_metadata
from tests.conftest import REPOSITORY, overlay_environment
from tests.unit import stub_vllm

#: What vLLM does with the plugins of this group.
LOAD = """
import sys, vllm, vllm.sampling_params, vllm.model_executor.models.qwen3_next
from importlib.metadata import entry_points
for plugin in entry_points(group="vllm.general_plugins"):
    if plugin.name == "auxstream_overlay":
        register = plugin.load()
        register()
        register()
        print(plugin.value, plugin.dist.name, plugin.dist.version)
"""
DRIFTED = """
class QwenGatedDeltaNetAttention:
    def forward_cuda(self, hidden_states):
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        hidden_states = hidden_states * 2
        ba, _ = self.in_proj_ba(hidden_states)
        return qkvz, ba
"""


@pytest.fixture
def mounted(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the package and its metadata, and without a sitecustomize.py; a stub vLLM beside it."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    (folder / "overlay").symlink_to(REPOSITORY / "overlay")
    plugin_metadata.write(REPOSITORY, folder)
    stub_vllm.write(tmp_path / "site", {stub_vllm.GDN_MODULE: DRIFTED})
    return folder


def load(*places: pathlib.Path, code: str = LOAD, **settings: str) -> subprocess.CompletedProcess[str]:
    world = places[0].parent
    environment = overlay_environment(VLLMOVERLAY_JOURNAL_DIR=str(world / "journals"), **settings)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*places, world / "site"]))
    # Not from the repository: what is not in the mounted folder must not be found.
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=world,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def journals(mounted: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (mounted.parent / "journals").glob("*.json")]


def overlay_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "overlay:" in line]


def test_it_is_found_by_the_metadata_and_arms_once(mounted: pathlib.Path) -> None:
    result = load(mounted)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["overlay.plugin:register", "vllm-auxstream-overlay", "0.1.0"]
    (line,) = overlay_lines(result)
    assert "drifted" in line
    (journal,) = journals(mounted)
    assert journal["patches"]["gdn"]["verdict"] == "drifted"
    assert journal["transformers"] == {"state": "was imported before vllm"}


def test_both_doors_arm_once(mounted: pathlib.Path) -> None:
    (mounted / "sitecustomize.py").symlink_to(REPOSITORY / "sitecustomize.py")
    result = load(mounted)
    assert result.returncode == 0 and len(overlay_lines(result)) == 1 and len(journals(mounted)) == 1
    assert journals(mounted)[0]["transformers"]["state"] == "imported first"


def test_without_the_plugin_in_the_allowlist_nothing_is_armed(mounted: pathlib.Path) -> None:
    result = load(mounted, code="import vllm, vllm.model_executor.models.qwen3_next")
    assert (result.returncode, result.stderr, journals(mounted)) == (0, "", [])


def test_switched_off(mounted: pathlib.Path) -> None:
    result = load(mounted, VLLMOVERLAY="0")
    assert (result.returncode, result.stderr, journals(mounted)) == (0, "", [])


def test_what_is_fatal_under_strict_reaches_vllm(mounted: pathlib.Path) -> None:
    result = load(mounted, VLLMOVERLAY_STRICT="1")
    assert result.returncode != 0 and result.stdout == "" and "drifted" in result.stderr


def test_a_folder_of_which_parts_are_missing_fails_where_vllm_expects_it(mounted: pathlib.Path) -> None:
    """vLLM guards the loading of a plugin, and not the call of what it has loaded."""
    (mounted / "overlay").unlink()
    (mounted / "overlay").mkdir()
    for name in ("__init__.py", "bootstrap.py", "plugin.py"):
        (mounted / "overlay" / name).write_bytes((REPOSITORY / "overlay" / name).read_bytes())
    code = LOAD.replace(
        "register = plugin.load()", "try: register = plugin.load()\n        except ImportError: continue"
    )
    result = load(mounted, code=f"{code}\nassert not [f for f in sys.meta_path if 'overlay' in type(f).__module__]")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_a_project_without_the_entry_point_has_no_metadata(tmp_path: pathlib.Path) -> None:
    (tmp_path / "pyproject.toml").write_text('name = "something"\n')
    with pytest.raises(ValueError, match="no entry point"):
        plugin_metadata.files(tmp_path)
