"""The LoRA verdict on every release, and on changes that upstream has not made yet.

A verdict that lets one of the drifting changes through would add the adapters to the wrong thing in a vLLM of next month;
one that refuses a harmless change would switch the patch off for a comment.
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

from overlay.patches.lora_linear.verdict import BASE, METADATA, OTHERS, PACKAGE, PUNICA, SWITCH
from overlay.patches.registry import judge
from overlay.verdict import Source, Upstream, Verdict, class_at
from tests.conftest import REPOSITORY

from .released import EXPECTED, ChangedTree, releases, tree

pytestmark = pytest.mark.contract

#: Read from the sources by hand: the line of BaseLinearLayerWithLoRA.apply.
LINES = {
    "0.17.1": 122, "0.18.1": 122, "0.19.0": 122, "0.19.1": 122, "0.20.0": 192, "0.20.1": 192, "0.20.2": 192, "0.21.0": 192,
    "0.22.0": 185, "0.22.1": 185, "0.23.0": 185, "0.24.0": 194, "0.25.1": 194, "0.26.0": 194, "0.27.1": 194, "0.28.0": 194,
    "0.29.0": 194, "0.30.0": 198, "0.31.0": 198, "0.32.0": 198, "0.33.0": 198,
}  # fmt: skip
FIRST_WITH_SWITCH, FIRST_WITH_MERGED_COVERED = "0.20.0", "0.25.1"
BASE_APPLY, MERGED_APPLY, REPLICATED_APPLY = (f"{module}.{name}.apply" for module, name in (BASE, *OTHERS))

base, merged, replicated = (f"{PACKAGE}.{module}" for module, _ in (BASE, *OTHERS))
ancestor = f"{PACKAGE}.base"


def from_release(version: str, first: str) -> bool:
    order = list(LINES)
    return order.index(version) >= order.index(first)


# --------------------------------------------------------------------------------------------------------- as released


def test_the_table_has_every_release() -> None:
    assert tuple(LINES) == tuple(EXPECTED) == (*releases.OLDER, *releases.SUPPORTED)


@pytest.mark.parametrize("version", LINES)
def test_verdict(version: str) -> None:
    found = judge("lora_linear", tree(version))
    assert (found.state, found.module) == ("apply", PACKAGE), found
    assert found.where is not None
    path, _, line = found.where.rpartition(":")
    assert int(line) == LINES[version]
    assert pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1].startswith("    def apply(self, x")
    if not from_release(version, FIRST_WITH_SWITCH):
        assert found.methods == (BASE_APPLY,) and found.upstream is None
        return
    assert found.upstream == Upstream("#35721", False, f"{SWITCH}=1")
    assert "layer names" in found.reason and "replicated layers" in found.reason
    if from_release(version, FIRST_WITH_MERGED_COVERED):
        assert found.methods == (BASE_APPLY, REPLICATED_APPLY)
        assert "merged layers" not in found.reason
    else:
        assert found.methods == (BASE_APPLY, MERGED_APPLY, REPLICATED_APPLY)
        assert "merged layers" in found.reason


@pytest.mark.parametrize("version", LINES)
def test_no_class_with_an_apply_is_overlooked(version: str) -> None:
    """Counted without the verdict's reader: whoever else has an apply is sharded, or goes to the base class's."""
    found = judge("lora_linear", tree(version))
    intercepted = {class_name.rpartition(".")[2] for class_name, _ in found.intercepted()}
    others = {}
    for path in pathlib.Path(tree(version).folder, *PACKAGE.split(".")).glob("*.py"):
        for part in re.split(r"^class ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
            match = re.search(r"^    def apply\(.*?(?=^    (?:def|@)|\Z)", part, re.MULTILINE | re.DOTALL)
            name = re.match(r"\w+", part)
            if match and name and name.group() not in intercepted:
                others[name.group()] = match.group()
    for name, text in others.items():
        assert name.endswith("ShardedLoRA") or "super().apply(x, bias)" in text, name


def test_a_class_is_found_below_a_package() -> None:
    package = ast
    assert class_at(package, "NodeVisitor") is ast.NodeVisitor
    assert class_at(package, "missing.NodeVisitor") is None


# ------------------------------------------------------------------------------------- what else the patch takes from vLLM


def source_of(version: str, module: str) -> str:
    source = tree(version).read(module)
    assert source is not None, f"vLLM {version} has no {module}"
    return source.text


PATCH = ast.parse((REPOSITORY / "overlay" / "patches" / "lora_linear" / "patch.py").read_text("utf-8"))
IMPORTS = [
    (node.module, alias.name)
    for node in PATCH.body
    if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("vllm.")
    for alias in node.names
]


@pytest.mark.parametrize("version", releases.SUPPORTED)
@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_what_the_patch_imports_is_there(version: str, module: str, name: str) -> None:
    assert re.search(rf"\b{name}\b", source_of(version, module))


@pytest.mark.parametrize("version", releases.SUPPORTED)
@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vllm.model_executor.layers.linear", "self.prefix = prefix"),
        ("vllm.model_executor.layers.linear", "self.output_size_per_partition = "),
        ("vllm.lora.layers.base_linear", "self.lora_config = lora_config"),
        ("vllm.lora.layers.column_parallel_linear", "self.output_slices = "),
        ("vllm.config.lora", "fully_sharded_loras: bool = False"),
        ("vllm.envs", "VLLM_BATCH_INVARIANT"),
        ("vllm.config.parallel", "def use_ubatching"),
        (PUNICA, "self.token_mapping_meta = LoRAKernelMeta.make("),
        ("vllm.lora.ops.triton_ops.lora_shrink_op", "lora_shrink = torch.ops.vllm.lora_shrink"),
    ],
)
def test_what_the_patch_reads_is_there(version: str, module: str, text: str) -> None:
    assert text in source_of(version, module)


@pytest.mark.parametrize("version", LINES)
def test_every_layer_gets_its_wrapper_once_it_has_its_weights(version: str) -> None:
    """`set_mapping` is where the patch takes a layer: after `create_lora_weights`, for every layer that is replaced."""
    manager = source_of(version, "vllm.lora.model_manager")
    assert manager.index(" from_layer(\n") < manager.index(".set_mapping(punica_wrapper)")
    utilities = source_of(version, "vllm.lora.utils")
    body = utilities[utilities.index("def from_layer(") :]
    assert body.index("lora_cls(layer)") < body.index("create_lora_weights(")


# --------------------------------------------------------------------------------------------------------- changed


def changed(version: str, module: str, old: str, new: str) -> Verdict:
    source = tree(version).read(module)
    assert source is not None
    text = source.text.replace(old, new, 1)
    assert text != source.text, f"{version} has no {old!r}"
    ast.parse(text)  # a change that is not Python would drift for the wrong reason
    return judge("lora_linear", ChangedTree(version, module, Source(text, source.path)))


GEMM_19 = "        output = self.base_layer.quant_method.apply(self.base_layer, x, bias)\n"
GEMM_33 = "        output = self._get_quant_method().apply(self.base_layer, x, bias)\n"
ADD = "            output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices\n"
ADD_CALL = f"self.punica_wrapper.add_lora_linear(\n{ADD}        )"
FLATTEN = "            x = x.flatten(0, 1)\n"
LAST = "            output = output.reshape(original_shape)\n\n        return output\n"
ESCAPE = "            return self._apply_base_forward(x)\n        return super().apply(x, bias)\n"
REPLICATED = "        return self._apply_base_forward(x)\n"
SHRINK = "    shrunk_buffers: torch.Tensor | None = layer.punica_wrapper.add_shrink(\n        buffers, x, layer.lora_a_stacked, 1.0\n    )\n"
MERGED_OUT = "    output = output.view(*out_orig_shape)\n"
CLASS = f"class {BASE[1]}(BaseLayerWithLoRA):\n"
SHRINK_CALL = "        lora_shrink(\n            x,\n            lora_a_stacked,\n            y,\n"
EXPAND = "        self.add_expand(\n            y,\n            buffer,  # type: ignore\n"

#: What must switch the patch off: a name, the releases, the module, what is replaced, and by what.
DRIFTING: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("the GEMM twice", ("0.19.1",), base, GEMM_19, GEMM_19 * 2),
    ("the GEMM twice", ("0.24.0", "0.33.0"), base, GEMM_33, GEMM_33 * 2),
    ("the GEMM of another input", ("0.33.0",), base, GEMM_33, GEMM_33.replace("x, bias", "x * 2, bias")),
    ("the GEMM without bias", ("0.33.0",), base, GEMM_33, GEMM_33.replace("x, bias", "x, None")),
    ("the GEMM by another method", ("0.33.0",), base, GEMM_33, GEMM_33.replace(".apply(", ".apply_monolithic(")),
    ("the GEMM of another layer", ("0.33.0",), base, GEMM_33, GEMM_33.replace("(self.base_layer,", "(self.other,")),
    ("the GEMM in a loop", ("0.19.1",), base, GEMM_19, f"        for _ in range(2):\n    {GEMM_19}"),
    ("the GEMM's result scaled", ("0.33.0",), base, GEMM_33, GEMM_33.replace("bias)\n", "bias) * 2\n")),
    ("the input changed before", ("0.19.1",), base, GEMM_19, f"        x = x * 2\n{GEMM_19}"),
    ("the input cast before", ("0.33.0",), base, GEMM_33, f"        x = x.to(torch.float32)\n{GEMM_33}"),
    ("the input changed in place", ("0.33.0",), base, GEMM_33, f"        x.mul_(2)\n{GEMM_33}"),
    ("the input changed by a helper", ("0.33.0",), base, GEMM_33, f"        x = self._rotate(x)\n{GEMM_33}"),
    ("the input changed by a function", ("0.33.0",), base, GEMM_33, f"        x = quantize(x)\n{GEMM_33}"),
    ("the input changed for the adapters", ("0.20.0", "0.33.0"), base, FLATTEN, FLATTEN.replace("x.flatten(0, 1)", "x[0]")),
    ("the output given to a function", ("0.33.0",), base, LAST, LAST.replace("return output", "return scaled(output)")),
    ("the output scaled after", ("0.19.1", "0.33.0"), base, LAST, LAST.replace("return output", "return output * 2")),
    ("the output changed in place after", ("0.33.0",), base, LAST, LAST.replace("return", "output.mul_(2)\n        return")),
    ("the output copied after", ("0.33.0",), base, LAST, LAST.replace("return output", "return output.clone()")),
    ("the output's part returned", ("0.33.0",), base, LAST, LAST.replace("return output", "return output[:1]")),
    ("two results", ("0.33.0",), base, LAST, LAST.replace("return output", "return output, None")),
    ("nothing returned", ("0.33.0",), base, LAST, LAST.replace("        return output\n", "")),
    ("the adapters twice", ("0.33.0",), base, ADD_CALL, f"{ADD_CALL}\n        {ADD_CALL}"),
    ("the adapters never", ("0.33.0",), base, ADD_CALL, "None"),
    ("the adapters under a condition", ("0.33.0",), base, ADD_CALL, f"{ADD_CALL} if self.n_slices else None"),
    ("another scale", ("0.19.1", "0.33.0"), base, ADD, ADD.replace("1.0", "self.scale")),
    ("other slices", ("0.33.0",), base, ADD, ADD.replace("self.output_slices", "self.slices")),
    ("one more argument", ("0.33.0",), base, ADD, ADD.replace("output_slices", "output_slices, add_inputs=False")),
    ("the adapters into another tensor", ("0.33.0",), base, ADD, ADD.replace("output, x", "output.float(), x")),
    ("the adapters by another method", ("0.33.0",), base, "self.punica_wrapper.add_lora_linear(\n            output, x", "self.punica_wrapper.add_lora_rows(\n            output, x"),
    ("self changed", ("0.33.0",), base, GEMM_33, f"        self.calls = 1\n{GEMM_33}"),
    ("self handed out", ("0.33.0",), base, GEMM_33, f"        note(self)\n{GEMM_33}"),
    ("the wrapper handed out", ("0.33.0",), base, GEMM_33, f"        note(self.punica_wrapper)\n{GEMM_33}"),
    ("a with block", ("0.19.1",), base, GEMM_19, f"        with torch.no_grad():\n    {GEMM_19}"),
    ("apply takes more", ("0.33.0",), base, "def apply(self, x: torch.Tensor,", "def apply(self, x: torch.Tensor, scale,"),
    ("apply decorated", ("0.33.0",), base, "    def apply(self", "    @torch.compile\n    def apply(self"),
    ("apply async", ("0.33.0",), base, "    def apply(self", "    async def apply(self"),
    ("apply defined twice", ("0.33.0",), base, "    def apply(self", "    def apply(self, x, bias=None):\n        return x\n\n    def apply(self"),
    ("apply put in place later", ("0.33.0",), base, CLASS, f"{CLASS}    if torch:\n        apply = None\n"),
    ("apply renamed", ("0.33.0",), base, "    def apply(self", "    def compute(self"),
    ("the class renamed", ("0.33.0",), base, f"class {BASE[1]}(", f"class {BASE[1]}V2("),
    ("the class decorated", ("0.33.0",), base, CLASS, f"@register\n{CLASS}"),
    ("merged: something after", ("0.25.1", "0.33.0"), merged, ESCAPE, ESCAPE.replace("super().apply(x, bias)", "super().apply(x, bias) * 2")),
    ("merged: bias dropped", ("0.33.0",), merged, ESCAPE, ESCAPE.replace("super().apply(x, bias)", "super().apply(x, None)")),
    ("merged: shrink of another input", ("0.20.0", "0.24.0"), merged, SHRINK, SHRINK.replace("buffers, x,", "buffers, x * 2,")),
    ("merged: shrink missing", ("0.20.0",), merged, SHRINK, "    shrunk_buffers = buffers\n"),
    ("merged: output scaled", ("0.20.0",), merged, MERGED_OUT, f"{MERGED_OUT}    output = output * 2\n"),
    ("merged: expand elsewhere", ("0.24.0",), merged, "offset_start=0,", "offset_start=8,"),
    ("replicated: input changed", ("0.20.0", "0.33.0"), replicated, REPLICATED, REPLICATED.replace("(x)", "(x + 1)")),
    ("replicated: a second output", ("0.33.0",), replicated, REPLICATED, REPLICATED.replace("(x)", "(x), None")),
    ("the wrapper wrapped", ("0.33.0",), ancestor, "PunicaWrapperBase = punica_wrapper", "PunicaWrapperBase = traced(punica_wrapper)"),
    ("set_mapping does more", ("0.33.0",), ancestor, "PunicaWrapperBase = punica_wrapper", "PunicaWrapperBase = punica_wrapper\n        self.apply = None"),
    ("expand from another buffer", ("0.19.1", "0.33.0"), PUNICA, EXPAND, EXPAND.replace("buffer,", "buffer * 2,")),
    ("expand twice", ("0.33.0",), PUNICA, EXPAND, f"        self.add_expand(y, buffer, lora_b_stacked, output_slices)\n{EXPAND}"),
    ("the output read before", ("0.33.0",), PUNICA, EXPAND, f"        y = y.contiguous()\n{EXPAND}"),
    ("the wrapper changed", ("0.33.0",), PUNICA, EXPAND, f"        self.calls = 1\n{EXPAND}"),
    ("scaled in between", ("0.33.0",), PUNICA, EXPAND, EXPAND.replace("            y,", "            y * 1,")),
    ("the punica call renamed", ("0.33.0",), PUNICA, "def add_lora_linear", "def add_lora_rows"),
    ("shrink twice in one", ("0.33.0",), PUNICA, SHRINK_CALL, f"        lora_shrink(x, lora_a_stacked, y, scale)\n{SHRINK_CALL}"),
    ("the weights read before the op", ("0.19.1", "0.33.0"), PUNICA, SHRINK_CALL, f"        rank = lora_a_stacked[0].size(-2)\n{SHRINK_CALL}"),
    ("the weights changed for the op", ("0.33.0",), PUNICA, SHRINK_CALL, SHRINK_CALL.replace("lora_a_stacked,", "list(lora_a_stacked),")),
    ("an argument of the op by name", ("0.33.0",), PUNICA, "            scale,\n        )\n\n    def add_expand", "            scaling=scale,\n        )\n\n    def add_expand"),
    ("another op", ("0.33.0",), PUNICA, SHRINK_CALL, SHRINK_CALL.replace("lora_shrink", "lora_shrink_fp8")),
    ("the buffer changed after the op", ("0.33.0",), PUNICA, SHRINK_CALL, f"        y.zero_()\n{SHRINK_CALL}"),
    ("other metadata", ("0.33.0",), PUNICA, SHRINK_CALL + "            *self.token_mapping_meta", SHRINK_CALL + "            *self.prompt_mapping_meta"),
    ("shrink takes more", ("0.33.0",), PUNICA, "        lora_a_stacked: tuple[torch.Tensor, ...],\n        scale: float,\n", "        lora_a_stacked: tuple[torch.Tensor, ...],\n        scale: float,\n        rank: int = 8,\n"),
    ("no flag on the host", ("0.33.0",), METADATA, "no_lora_flag_cpu: torch.Tensor", "no_lora_flag: torch.Tensor"),
]  # fmt: skip

#: What must not: the verdict stays as it is.
HARMLESS: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("a comment", ("0.19.1", "0.33.0"), base, "    def apply(self", "    # changed\n    def apply(self"),
    ("a docstring", ("0.33.0",), base, GEMM_33, f'        """Documented."""\n{GEMM_33}'),
    ("an assertion", ("0.19.1",), base, GEMM_19, f"        assert x.ndim in (2, 3)\n{GEMM_19}"),
    ("an error", ("0.33.0",), base, GEMM_33, f'        if x.ndim > 3:\n            raise ValueError(f"no {{x}}")\n{GEMM_33}'),
    ("another name for the output", ("0.19.1",), base, GEMM_19, GEMM_19.replace("output =", "result =") + "        output = result\n"),
    ("another shape kept", ("0.33.0",), base, "        original_shape = output", "        rows: int = output.shape[0] * 2\n        original_shape = output"),
    ("a quiet log line", ("0.33.0",), base, GEMM_33, f'        logger.debug_once("LoRA")\n{GEMM_33}'),
    ("the result of the adapters unused", ("0.33.0",), base, "lora_output: torch.Tensor | None = self.punica", "_ = self.punica"),
    ("another method of the class", ("0.33.0",), base, "    def reset_lora", "    def note(self):\n        self.x = 1\n\n    def reset_lora"),
    ("a different dummy", ("0.33.0",), base, "        self.n_slices: int\n", "        self.n_slices: int = 0\n"),
    ("another class before", ("0.33.0",), base, CLASS, f"class Another:\n    def apply(self):\n        return 1\n\n\n{CLASS}"),
    ("upstream's own way changed", ("0.33.0",), base, "output.add_(lora_result)", "output.add_(lora_result * 1)"),
    ("the escape widened", ("0.25.1", "0.33.0"), merged, "self.tp_size == 1\n            and", "self.tp_size <= 1\n            and"),
    ("an assertion when merged", ("0.20.0", "0.24.0"), merged, MERGED_OUT, f"    assert output.ndim == 2\n{MERGED_OUT}"),
    ("a quiet line in shrink", ("0.19.1", "0.33.0"), PUNICA, SHRINK_CALL, f"        tokens = x.size(0)\n{SHRINK_CALL}"),
    ("a zeroed buffer", ("0.33.0",), PUNICA, "        buffer = torch.empty(\n            (len(output_slices)", "        buffer = torch.zeros(\n            (len(output_slices)"),
]  # fmt: skip


def cases(changes: list[tuple[str, tuple[str, ...], str, str, str]]) -> list[object]:
    return [
        pytest.param(version, *change[2:], id=f"{version}-{change[0]}") for change in changes for version in change[1]
    ]


@pytest.mark.parametrize(("version", "module", "old", "new"), cases(DRIFTING))
def test_drift(version: str, module: str, old: str, new: str) -> None:
    found = changed(version, module, old, new)
    assert found.state == "drifted", found
    assert found.methods == () and found.reason and found.where is not None
    path, _, line = found.where.rpartition(":")
    assert path.endswith(".py") and line.isdigit()


@pytest.mark.parametrize(("version", "module", "old", "new"), cases(HARMLESS))
def test_harmless(version: str, module: str, old: str, new: str) -> None:
    found, before = changed(version, module, old, new), judge("lora_linear", tree(version))
    assert (found.state, found.methods, found.upstream) == ("apply", before.methods, before.upstream), found


def test_where_points_at_the_change() -> None:
    source = tree("0.33.0").read(base)
    assert source is not None
    text = source.text.replace(GEMM_33, f"        x.mul_(2)\n{GEMM_33}", 1)
    found = judge("lora_linear", ChangedTree("0.33.0", base, Source(text, source.path)))
    assert found.where is not None
    line = int(found.where.rpartition(":")[2])
    assert text.splitlines()[line - 1] == "        x.mul_(2)"


@pytest.mark.parametrize("line", ["{}.apply = traced({}.apply)", "{} = instrumented({})", "setattr({}, 'apply', None)"])
@pytest.mark.parametrize("version", ["0.19.1", "0.33.0"])
def test_drift_after_the_class(version: str, line: str) -> None:
    source = tree(version).read(base)
    assert source is not None
    text = f"{source.text}\n{line.format(BASE[1], BASE[1])}\n"
    assert judge("lora_linear", ChangedTree(version, base, Source(text, source.path))).state == "drifted"


def test_a_file_that_is_not_python_is_drifted() -> None:
    source = tree("0.33.0").read(base)
    assert source is not None
    text = source.text.replace("    def apply(self", "    def apply self", 1)
    assert judge("lora_linear", ChangedTree("0.33.0", base, Source(text, source.path))).state == "drifted"


def test_upstreams_switch_on_by_default_is_landed() -> None:
    found = changed("0.33.0", "vllm.envs", f'getenv("{SWITCH}", "0")', f'getenv("{SWITCH}", "1")')
    assert (found.state, found.methods, found.upstream) == ("landed", (), Upstream("#35721", True))
