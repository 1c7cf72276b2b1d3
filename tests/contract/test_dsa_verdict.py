"""The projections of DeepSeek-V3.2's attention: the verdict on every release, on changes of it, and what it relies on."""

from __future__ import annotations

import ast
import pathlib
import re
import types
from typing import Any

import pytest

from overlay.patches.dsa import verdict as dsa
from overlay.patches.registry import judge
from overlay.verdict import Source, Verdict
from overlay.vocabulary import ABSENT, APPLY, DRIFTED, LANDED

from .released import ChangedTree, releases, tree

pytestmark = pytest.mark.contract

NEW, OLD = "models/deepseek_v32/attention.py", "models/deepseek_v32/nvidia/attention.py"
#: By hand, from the sources: where `forward` begins. Releases before 0.25 run these models by models/deepseek_v2.py.
WHERE = {
    "0.25.1": f"{OLD}:342",
    "0.26.0": f"{OLD}:342",
    "0.27.1": f"{NEW}:321",
    "0.28.0": f"{NEW}:331",
    "0.29.0": f"{NEW}:278",
    "0.30.0": f"{NEW}:286",
    "0.31.0": f"{NEW}:286",
    "0.32.0": f"{NEW}:298",
    "0.33.0": f"{NEW}:298",
}
each_release = pytest.mark.parametrize("version", WHERE)


def text(version: str, path: str) -> str:
    return pathlib.Path(tree(version).folder, "vllm", path).read_text("utf-8")


def method(version: str, name: str, path: str = "", class_name: str = "DeepseekV32Attention") -> ast.FunctionDef:
    module = ast.parse(text(version, path or WHERE[version].partition(":")[0]))
    (found,) = (one for one in module.body if isinstance(one, ast.ClassDef) and one.name == class_name)
    (wanted,) = (one for one in found.body if isinstance(one, ast.FunctionDef) and one.name == name)
    return wanted


@pytest.mark.parametrize("version", [*releases.OLDER, *releases.SUPPORTED])
def test_verdict(version: str) -> None:
    found = judge("dsa", tree(version))
    if version not in WHERE:
        assert (found.state, found.methods) == (ABSENT, ())
        return
    assert (found.state, found.class_name, found.methods) == (APPLY, "DeepseekV32Attention", ("forward",))
    assert not found.shapes_graph, "no compiled graph shows it"
    assert found.where is not None and found.where.endswith(f"/vllm/{WHERE[version]}")
    path, _, line = found.where.rpartition(":")
    assert pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1].startswith("    def forward(")


# ---------------------------------------------------------------- what the patch relies on


@each_release
def test_nothing_compiles_the_model_that_has_the_layer(version: str) -> None:
    """Otherwise Dynamo would trace the method, and the stand-in would step aside."""
    folder = pathlib.Path(tree(version).folder, "vllm", "models", "deepseek_v32")
    files = [*folder.glob("*.py"), *folder.joinpath("nvidia").rglob("*.py")]
    assert any("DeepseekV32Attention(" in path.read_text("utf-8") for path in files)
    for path in files:
        assert "support_torch_compile" not in path.read_text("utf-8"), path


@each_release
def test_vllm_runs_the_model_by_itself_from_029_on(version: str) -> None:
    """With breakable graphs. Before, it was there for those who asked for it by `model_class_overrides`."""
    by_default = version >= "0.29.0"
    assert ('"DeepseekV32ForCausalLM"' in text(version, "config/vllm.py")) == by_default
    assert ("vllm.models.deepseek_v32" in text(version, "model_executor/models/registry.py")) == by_default
    assert "model_class_overrides" in text(version, "config/model.py")
    assert ("model_class_overrides" in judge("dsa", tree(version)).reason) != by_default


@each_release
def test_the_side_is_never_quantized_and_whole_on_every_rank(version: str) -> None:
    init = method(version, "__init__", class_name="DeepseekV32Indexer")
    (made,) = (
        node.value
        for node in ast.walk(init)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.wk_weights_proj"
    )
    assert isinstance(made, ast.Call) and ast.unparse(made.func) == "MergedColumnParallelLinear"
    assert ast.unparse(made.args[1]) == "[self.head_dim, self.n_head]"
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in made.keywords}
    assert (given["quant_config"], given["disable_tp"], given["bias"]) == ("None", "True", "False")


@each_release
def test_main_has_the_columns_that_the_sizes_say_and_is_whole_on_every_rank(version: str) -> None:
    init = ast.unparse(method(version, "__init__"))
    assert "[q_lora_rank, kv_lora_rank + qk_rope_head_dim]" in init
    model = "model_executor/models/deepseek_v2.py"
    assert "disable_tp=True" in ast.unparse(method(version, "__init__", model, "DeepSeekV2FusedQkvAProjLinear"))


@each_release
def test_main_ends_no_segment(version: str) -> None:
    """Beside what every linear does (test_reliance) its class has a forward of its own: one op, which is no break."""
    forward = ast.unparse(
        method(version, "forward", "model_executor/models/deepseek_v2.py", "DeepSeekV2FusedQkvAProjLinear")
    )
    assert set(re.findall(r"torch\.ops\.vllm\.(\w+)", forward)) == {"min_latency_fused_qkv_a_proj"}
    assert "vllm::min_latency_fused_qkv_a_proj" not in text(version, "config/compilation.py")
    for line in text(version, "model_executor/models/deepseek_v2.py").split("eager_break_during_capture")[1:]:
        assert "min_latency" not in line.partition("\ndef ")[2].partition("(")[0]


@each_release
def test_the_layer_has_its_name_its_sizes_and_says_when_it_skips_the_indexer(version: str) -> None:
    bound = {
        node.attr
        for node in ast.walk(
            method(version, "__init__", "model_executor/layers/attention/mla_attention.py", "MLAAttention")
        )
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    assert {"layer_name", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"} <= bound
    assert "compilation_config.static_forward_context[prefix] = self" in text(
        version, "model_executor/layers/attention/mla_attention.py"
    )
    assert "self.skip_topk = False" in ast.unparse(method(version, "__init__"))
    assert "self_attn.skip_topk = skip" in text(version, "models/deepseek_v32/nvidia/mtp.py")


@pytest.mark.parametrize("version", [version for version in WHERE if version >= "0.28.0"])
def test_rocms_layer_has_a_forward_of_its_own(version: str) -> None:
    """So it stays stock (`test_a_class_with_a_method_of_its_own_stays_stock`)."""
    assert method(version, "forward", "models/deepseek_v32/amd/rocm.py", "DeepseekV32MLAAttention")


def test_the_patch_runs_where_the_verdict_says_that_the_branch_is_entered() -> None:
    """The condition stands twice: as text that the verdict compares, and as the patch's own question."""
    pytest.importorskip("vllm")
    from overlay.patches.dsa.patch import PROJECTIONS

    (test,) = dsa.PAIR.always
    for indexer in (None, object()):
        for skips in (False, True):
            layer: Any = types.SimpleNamespace(indexer=indexer, skip_topk=skips)
            entered = eval(test, {"self": layer})
            assert entered == (PROJECTIONS.is_candidate(layer) and PROJECTIONS.calls_side(layer))
    assert (dsa.PAIR.main, dsa.PAIR.sides) == (PROJECTIONS.main, (PROJECTIONS.side,))


# ---------------------------------------------------------------- changes

MAIN = "        qkv_lora = self.fused_qkv_a_proj(hidden_states)[0]\n"
TEST = "        if self.indexer is not None and not self.skip_topk:\n            kw ="
SIDE = "            kw = self.indexer.wk_weights_proj(hidden_states)[0]\n"
ELSE = "        else:\n            index_k = None\n            index_weights = None\n"
DEFINED = "    def forward(  # type: ignore[override]\n        self,\n        positions"
CLASS = "class DeepseekV32Attention(MLAAttention):\n"


def after_main(*lines: str) -> tuple[str, str]:
    return MAIN, MAIN + "".join(f"        {line}\n" for line in lines)


#: Pieces of text that are there once, what takes their places, and a part of the reason.
DRIFTING: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "the side given main's result": (((SIDE, SIDE.replace("hidden_states", "q_c")),), "another input"),
    "the side given some rows": (((SIDE, SIDE.replace("hidden_states", "hidden_states[:1]")),), "plainly"),
    "the side's second part": (((SIDE, SIDE.replace("[0]", "[1]")),), "plainly"),
    "the side twice": (((SIDE, SIDE + SIDE),), "twice"),
    "the side by another name of the child": (
        ((SIDE, "            child = self.indexer\n            kw = child.wk_weights_proj(hidden_states)[0]\n"),), "indexer",
    ),
    "the child called": (((SIDE, "            kw = self.indexer(hidden_states)\n"),), "indexer"),
    "the child handed out": ((after_main("self.watch(self.indexer)"),), "hands out indexer"),
    "the side's weight read": ((after_main("size = self.indexer.wk_weights_proj.weight.shape"),), "plainly"),
    "another test": (((TEST, TEST.replace("self.indexer is not None and ", "")),), "leave"),
    "another test before the side": (((TEST, TEST.replace("not self.skip_topk", "positions.numel()")),), "may"),
    "the side without a condition, after a break": (
        ((TEST, "        self._sparse(hidden_states)\n" + TEST),), "may change the input or leave",
    ),
    "main under a condition": (((MAIN, f"        if self.use_pcp:\n    {MAIN}"),), "before fused_qkv_a_proj"),
    "main given something else": (((MAIN, MAIN.replace("(hidden_states)", "(hidden_states * 2)")),), "plainly"),
    "the input changed between": ((after_main("hidden_states.mul_(2)"),), "may change"),
    "the input gathered between": ((after_main("hidden_states = gather(hidden_states)"),), "may change"),
    "a way out between": ((after_main("if self.use_pcp:", "    return qkv_lora"),), "leave"),
    "an eager break between": ((after_main("self._fused_attention(qkv_lora)"),), "may change"),
    "self handed out": ((after_main("remember(self)"),), "hands out self"),
    "the condition changed by the method": ((after_main("self.skip_topk = True"),), "stores to it"),
    "one linear for both": (((SIDE, "            kw = qkv_lora[:, 2112:]\n"),), "does not call"),
    "forward decorated": (((DEFINED, f"    @torch.no_grad()\n{DEFINED}"),), "not one plain definition"),
    "forward renamed": (((DEFINED, DEFINED.replace("forward", "forward_cuda")),), "none of the methods"),
    "the class renamed": (((CLASS, CLASS.replace("V32", "V33")),), "there is no class"),
    "the class decorated by assignment": (((CLASS, f"DeepseekV32Attention = None\n\n\n{CLASS}"),), "bound again"),
    "no Python": (((MAIN, "        qkv_lora = (\n"),), "not readable"),
}  # fmt: skip
HARMLESS: dict[str, tuple[tuple[str, str], ...]] = {
    "as released": (),
    "both unpacked": (
        (MAIN, MAIN.replace("qkv_lora =", "qkv_lora, _ =").replace("[0]", "")),
        (SIDE, SIDE.replace("kw =", "kw, _ =").replace("[0]", "")),
    ),
    "the side first": (
        (SIDE, "            pass\n"), (MAIN, TEST.replace("            kw =", SIDE) + MAIN),
    ),
    "a tensor made between": (after_main("zeros = torch.zeros_like(qkv_lora)"),),
    "the child asked between": (after_main("width = self.indexer.head_dim if self.indexer is not None else 0"),),
    "something else without the indexer": ((ELSE, f"{ELSE}            self.count(hidden_states)\n"),),
    "another name for the input": (
        (MAIN, "        x = hidden_states\n" + MAIN.replace("(hidden_states)", "(x)")), (SIDE, SIDE.replace("(hidden_states)", "(x)")),
    ),
    "the result changed afterwards": ((SIDE, f"{SIDE}            kw.mul_(2)\n"),),
}  # fmt: skip
VERSIONS = ("0.25.1", "0.28.0", "0.33.0")


def changed(version: str, changes: tuple[tuple[str, str], ...]) -> Verdict:
    path = WHERE[version].partition(":")[0]
    module = "vllm." + path.removesuffix(".py").replace("/", ".")
    # Upstream's indexer had a forward of its own up to 0.28: only the layer's code is changed.
    before, _, rest = text(version, path).partition(CLASS)
    rest = CLASS + rest
    for old, new in changes:
        assert rest.count(old) == 1, (version, old)
        rest = rest.replace(old, new)
    return judge("dsa", ChangedTree(version, module, Source(before + rest, path)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("change", DRIFTING)
def test_drift(version: str, change: str) -> None:
    changes, reason = DRIFTING[change]
    found = changed(version, changes)
    assert found.state == DRIFTED and reason in found.reason and found.methods == (), found
    assert found.where is not None and int(found.where.rpartition(":")[2]) > 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("change", HARMLESS)
def test_harmless(version: str, change: str) -> None:
    found = changed(version, HARMLESS[change])
    assert (found.state, found.methods, found.shapes_graph) == (APPLY, ("forward",), False), found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("helper", ["execute_in_parallel", "maybe_execute_in_parallel"])
def test_upstreams_own_overlap(version: str, helper: str) -> None:
    both = "lambda: self.fused_qkv_a_proj(hidden_states), lambda: self.indexer.wk_weights_proj(hidden_states)"
    found = changed(
        version, ((MAIN, f"        qkv_lora, kw = {helper}({both}, *self.events)\n"), (SIDE, "            pass\n"))
    )
    assert (found.state, found.methods) == (LANDED, ()), found


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_that_is_compiled_drifts(version: str, tmp_path: pathlib.Path) -> None:
    """Its method would be traced, and the patch would do nothing."""
    folder = tmp_path / "vllm"
    for path in (WHERE[version].partition(":")[0], "models/deepseek_v32/nvidia/model.py"):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        compiled = "from vllm.compilation.decorators import support_torch_compile\n" if "model.py" in path else ""
        target.write_text(compiled + text(version, path), "utf-8")
    found = judge("dsa", type(tree(version))(tmp_path))
    assert (found.state, found.methods) == (DRIFTED, ()) and "compiled" in found.reason
    assert found.where is not None and found.where.endswith("nvidia/model.py:1")


@each_release
def test_check_knows_which_layers_have_an_indexer(version: str) -> None:
    """`check --model` reads a configuration as the layer does (`overlay.cli.checkpoint`)."""
    init = ast.unparse(method(version, "__init__"))
    for line in (
        "index_topk_freq = getattr(config, 'index_topk_freq', 1)",
        "index_topk_pattern = getattr(config, 'index_topk_pattern', None)",
        "index_skip_topk_offset = getattr(config, 'index_skip_topk_offset', 2)",
        "skip_topk = max(layer_id - index_skip_topk_offset + 1, 0) % index_topk_freq != 0",
        "skip_topk = index_topk_pattern[layer_id] == 'S'",
        "if not skip_topk or is_mtp_layer:",
    ):
        assert line in init, line
