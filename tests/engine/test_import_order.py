"""On the real vLLM: transformers comes after vLLM's environment module, and torch comes no earlier than in stock."""

from __future__ import annotations

import json
from typing import Any

import pytest

from devtools import servers
from tests.conftest import overlay_environment, run_python

pytestmark = pytest.mark.engine

#: Notes, at the first import of torch and of transformers, what vLLM's environment module has set and what is loaded.
RECORDER = """
import json, os, sys
seen = {}
class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers") and name not in seen and "vllm" in sys.modules:
            seen[name] = {
                "environment": {key: os.environ.get(key) for key in KEYS},
                "loaded": [m for m in ("vllm.env_override", "transformers", "torch") if m in sys.modules],
            }
        return None
KEYS = ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_COMPILE_THREADS")
sys.meta_path.insert(0, Recorder())
import vllm
print(json.dumps({"seen": seen, "after": {key: os.environ.get(key) for key in KEYS}}))
"""


def record(overlay: bool, folder: str) -> dict[str, Any]:
    environment = overlay_environment(VLLMOVERLAY_JOURNAL_DIR=folder, **servers.cpu_environment())
    if not overlay:
        del environment["PYTHONPATH"]
    result = run_python("-c", RECORDER, environment=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_environment_module_comes_first(tmp_path: Any) -> None:
    stock, overlay = record(False, str(tmp_path)), record(True, str(tmp_path))
    assert "transformers" not in stock["seen"], "import vllm alone imports transformers now: the hook may go"
    assert overlay["seen"]["transformers"]["environment"] == stock["after"]
    assert stock["after"]["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    # torch is imported by vLLM's environment module itself, with and without the overlay, and by nothing before it.
    assert overlay["seen"]["torch"] == stock["seen"]["torch"]
    assert overlay["seen"]["torch"]["loaded"] == ["vllm.env_override"]
