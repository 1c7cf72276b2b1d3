"""On the real vLLM: torch, transformers and the hub are imported when stock imports them, with the settings of then."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from devtools import servers
from tests.conftest import overlay_environment, run_python

pytestmark = pytest.mark.engine

#: A script that configures the hub between `import vllm` and its first use of vLLM, which is a notebook's usual order. It
#: notes what vLLM's environment module has set, and what is loaded, at the first import of each of three packages.
SCRIPT = """
import json, os, sys
PACKAGES = ("torch", "transformers", "huggingface_hub")
KEYS = ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_COMPILE_THREADS", "HF_HUB_OFFLINE")
seen = {}
class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name in PACKAGES and name not in seen and "vllm" in sys.modules:
            loaded = [module for module in ("vllm.env_override", "vllm.config", *PACKAGES) if module in sys.modules]
            seen[name] = {"environment": {key: os.environ.get(key) for key in KEYS}, "loaded": loaded}
        return None
sys.meta_path.insert(0, Recorder())
import vllm
imported = sorted(seen)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = "/another/home"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9/mirror"
os.environ["HF_TOKEN"] = "another-token"

from vllm import SamplingParams
import huggingface_hub
from huggingface_hub import constants
try:
    huggingface_hub.HfApi().model_info("somebody/something")
    asked = "online"
except Exception as error:
    asked = type(error).__name__
hub = [constants.HF_HUB_OFFLINE, constants.HF_HOME, constants.ENDPOINT, huggingface_hub.get_token(), asked]
print(json.dumps({"by import vllm": imported, "seen": seen, "hub": hub}))
"""


#: vLLM #40331 on the real packages: a thread imports transformers, and names are taken from it meanwhile.
RACE = """
import sys, threading, time
import vllm
thread = threading.Thread(target=__import__, args=("transformers",))
thread.start()
while "transformers" not in sys.modules:
    time.sleep(0.001)
from transformers import GenerationConfig, PretrainedConfig
thread.join()
assert GenerationConfig is sys.modules["transformers"].GenerationConfig
"""


def run(script: str, overlay: bool, folder: str) -> subprocess.CompletedProcess[str]:
    environment = overlay_environment(VLLMOVERLAY_JOURNAL_DIR=folder, **servers.cpu_environment())
    for name in [name for name in environment if name.startswith("HF_")]:
        del environment[name]
    if not overlay:
        del environment["PYTHONPATH"]
    return run_python("-c", script, environment=environment)


def record(overlay: bool, folder: str) -> dict[str, Any]:
    result = run(SCRIPT, overlay, folder)
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_packages_are_imported_when_stock_imports_them_and_the_hubs_settings_count(tmp_path: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        stock, overlay = pool.map(lambda overlay: record(overlay, str(tmp_path)), (False, True))
    assert overlay == stock
    assert stock["by import vllm"] == ["torch"]
    assert stock["hub"] == [True, "/another/home", "http://127.0.0.1:9/mirror", "another-token", "OfflineModeIsEnabled"]
    # Else the comparison shows nothing: vLLM's environment module comes before torch, and the script before transformers.
    assert stock["seen"]["torch"]["loaded"] == ["vllm.env_override"]
    assert stock["seen"]["transformers"]["environment"]["HF_HUB_OFFLINE"] == "1"
    (journal,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert journal["transformers"]["state"] == "imported first" and journal["transformers"]["seconds"] > 0


def test_the_load_race_is_there_in_stock_and_gone_with_the_overlay(tmp_path: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        stock, overlay = pool.map(lambda overlay: run(RACE, overlay, str(tmp_path)), (False, True))
    assert overlay.returncode == 0, overlay.stderr[-2000:]
    assert stock.returncode != 0, "transformers has no such race any more: the watch may go"
    assert "cannot import name 'GenerationConfig' from 'transformers'" in stock.stderr
