"""The verdict for DeepSeek-V4 on every release, and where upstream's own overlap is incomplete."""

from __future__ import annotations

import pathlib

import pytest

from overlay.patches.deepseek_v4.verdict import MODULES, WRAPPER
from overlay.patches.registry import judge
from overlay.verdict import Source

from .released import EXPECTED, ChangedTree, tree

pytestmark = pytest.mark.contract

OLD, NEW = "model_executor/layers/deepseek_v4_attention.py", "models/deepseek_v4/attention.py"
#: Read from the sources by hand: the first patched method, or the call by which upstream runs the GEMMs in parallel.
WHERE = {
    "0.20.0": f"{OLD}:274",
    "0.20.1": f"{OLD}:380",
    "0.20.2": f"{OLD}:380",
    "0.21.0": f"{OLD}:404",
    "0.22.0": f"{NEW}:397",
    "0.22.1": f"{NEW}:397",
    "0.23.0": f"{NEW}:414",
    "0.24.0": f"{NEW}:416",
    "0.25.1": f"{NEW}:420",
    "0.26.0": f"{NEW}:420",
    "0.27.1": f"{NEW}:449",
    "0.28.0": f"{NEW}:565",
    "0.29.0": f"{NEW}:597",
    "0.30.0": f"{NEW}:706",
    "0.31.0": f"{NEW}:721",
    "0.32.0": f"{NEW}:721",
    "0.33.0": f"{NEW}:725",
}


@pytest.mark.parametrize("version", EXPECTED)
def test_verdict(version: str) -> None:
    found = judge("deepseek_v4", tree(version))
    if version not in WHERE:
        assert (found.state, found.module, found.where) == ("absent", None, None)
        return
    assert found.where is not None and found.where.endswith(f"/vllm/{WHERE[version]}")
    assert found.module in MODULES and found.module.replace(".", "/") in found.where
    if version == "0.20.0":
        assert (found.state, found.class_name, found.methods) == ("apply", WRAPPER, ("forward", "attention_impl"))
        assert found.upstream is None
    else:
        assert (found.state, found.methods) == ("landed", ())
        assert found.upstream is not None and found.upstream.on_by_default
        assert found.upstream.pull_request == "#41061"


@pytest.mark.parametrize("version", sorted(set(WHERE) - {"0.20.0"}))
def test_upstreams_own_switch_is_on_and_where_the_verdict_says(version: str) -> None:
    found = judge("deepseek_v4", tree(version))
    assert found.where is not None and found.upstream is not None
    path, _, line = found.where.rpartition(":")
    assert "= execute_in_parallel(" in pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1]
    name = found.upstream.setting.split()[0]
    environment = tree(version).read("vllm.envs")
    assert environment is not None
    assert f"    {name}: int = 1024\n" in environment.text


@pytest.mark.parametrize("part", ["weights_proj", "fused_wkv_wgate", "fused_wqa_wkv"])
@pytest.mark.parametrize("version", ["0.20.1", "0.28.0", "0.33.0"])
def test_a_parallel_call_without_one_of_the_gemms_has_not_landed(version: str, part: str) -> None:
    name = judge("deepseek_v4", tree(version)).module
    assert name is not None
    source = tree(version).read(name)
    assert source is not None
    source = Source(source.text.replace(part, "something_else"), source.path)
    assert judge("deepseek_v4", ChangedTree(version, name, source)).state == "drifted"
