"""docs/writing-a-patch.md: its files are taken out of the page and run, on a released source and on vLLM's real layer."""

from __future__ import annotations

import importlib
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import overlay.patches
from overlay.engine import compile_cache, proof, running_code
from overlay.patches import registry
from overlay.settings import Settings
from overlay.verdict import Source, SourceTree, Verdict
from overlay.vocabulary import ABSENT, APPLY, DRIFTED, INERT
from tests.conftest import REPOSITORY
from tests.contract.released import SUPPORTED, ChangedTree, tree

PAGE = REPOSITORY / "docs" / "writing-a-patch.md"
FILES = dict(
    re.findall(r"^```python\n# (overlay/\S+\.py)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
)
(NAME,) = {pathlib.PurePath(path).parts[2] for path in FILES}
VERSION = "0.33.0"


@pytest.fixture(scope="module", autouse=True)
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Gives the example's modules by name, as if its folder were one of overlay/patches."""
    root = tmp_path_factory.mktemp("with_example")
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, "utf-8")
    patches = str(root / "overlay" / "patches")
    overlay.patches.__path__.append(patches)
    importlib.invalidate_caches()
    yield lambda module: importlib.import_module(f"overlay.patches.{NAME}.{module}")
    overlay.patches.__path__.remove(patches)
    for module in [module for module in sys.modules if f"{module}.".startswith(f"overlay.patches.{NAME}.")]:
        del sys.modules[module]


@pytest.fixture
def verdict(example: Callable[[str], Any]) -> Any:
    return example("verdict")


def test_the_page_has_a_whole_patch_of_its_own() -> None:
    """A line that gdn and the example share would belong into a helper; the interface itself is what remains."""
    assert [pathlib.PurePath(path).name for path in FILES] == ["__init__.py", "verdict.py", "patch.py"]
    assert not (REPOSITORY / "overlay" / "patches" / NAME).exists(), "the example is in the overlay: take another one"

    def statements(text: str) -> set[str]:
        found = {line.strip() for line in text.splitlines()}
        return {line for line in found if len(line) > 40 and not re.match(r"from |import |def \w+\(|#", line)}

    of_gdn = {
        line
        for path in (REPOSITORY / "overlay" / "patches" / "gdn").glob("*.py")
        for line in statements(path.read_text())
    }
    assert [line for text in FILES.values() for line in statements(text) & of_gdn] == []
    imported = re.findall(r"^from overlay\.patches", "".join(FILES.values()), re.MULTILINE)
    assert imported == [], "a patch imports no patch"


# ---------------------------------------------------------------- the verdict

MAIN = "        projected_qkvg, _ = self.in_proj_qkvg(hidden_states)\n"
SIDE = "        b, _ = self.b_proj(hidden_states)\n"
DEFINED = "    def _full_forward(\n"
CLASS = "class OlmoHybridGatedDeltaNetAttention("


def changed(verdict: Any, *replacements: tuple[str, str]) -> Verdict:
    """The verdict on the release with each text replaced, where it stands once."""
    module = verdict.MODULES[0]
    source = tree(VERSION).read(module)
    assert source is not None
    text = source.text
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    judged = verdict.judge(ChangedTree(VERSION, module, Source(text, source.path)))
    assert isinstance(judged, Verdict)
    return judged


def between(line: str) -> tuple[str, str]:
    return SIDE, f"        {line}\n{SIDE}"


DRIFTING: dict[str, tuple[list[tuple[str, str]], str]] = {
    "side first, its result used before main": (
        [(SIDE, ""), (MAIN, f"{SIDE}        b = b * 2\n{MAIN}")], "before in_proj_qkvg",
    ),
    "side given main's result": ([(SIDE, SIDE.replace("hidden_states", "projected_qkvg"))], "another input"),
    "side given a part": ([(SIDE, SIDE.replace("hidden_states", "hidden_states[:1]"))], "does not call b_proj"),
    "side given a keyword": ([(SIDE, SIDE.replace("hidden_states", "input_=hidden_states"))], "does not call b_proj"),
    "side called twice": ([between("more, _ = self.b_proj(hidden_states)")], "b_proj twice"),
    "main called twice": ([(MAIN, MAIN * 2)], "in_proj_qkvg twice"),
    "side under a condition": ([(SIDE, f"        if self.tp_size:\n    {SIDE}")], "may change the input or leave"),
    "side in a helper": ([(SIDE, "        b = self._b(hidden_states)\n")], "does not call b_proj"),
    "side not unpacked": ([(SIDE, "        b = self.b_proj(hidden_states)\n")], "does not call b_proj"),
    "one fused linear": ([(SIDE, "        b = projected_qkvg[..., :8]\n")], "does not call b_proj"),
    "main's result in the input's place": ([(MAIN, MAIN.replace("projected_qkvg, _", "hidden_states, _"))], "another input"),
    "main's bias in the input's place": ([(MAIN, MAIN.replace(", _", ", hidden_states"))], "another input"),
    "input rebound between": ([between("hidden_states = hidden_states * 2")], "another input"),
    "input changed in place between": ([between("hidden_states.mul_(2)")], "may change"),
    "input changed by its index between": ([between("hidden_states[0] = 0")], "may change"),
    "an unknown call between": ([between("self.scale(projected_qkvg)")], "may change"),
    "a way out between": ([between("if num_tokens == 0: return")], "may change"),
    "self handed out": ([between("watch = self")], "hands out self"),
    "self stored to": ([(SIDE, f"{SIDE}        self.b = b\n")], "stores to it"),
    "method decorated": ([(DEFINED, f"    @watched\n{DEFINED}")], "not one plain definition"),
    "method async": ([(DEFINED, f"    async {DEFINED.strip()}\n")], "not one plain definition"),
    "method renamed": ([(DEFINED, DEFINED.replace("_full", "_whole"))], "none of the methods _full_forward"),
    "method defined twice": ([(DEFINED, f"    _full_forward = None\n\n{DEFINED}")], "not one plain definition"),
    "class renamed": ([(CLASS, CLASS.replace("Hybrid", ""))], "there is no"),
    "class under a condition too": ([(f'@PluggableLayer.register("olmo_hybrid_gated_delta_net_attention")\n{CLASS}',
        f"if True:\n    OlmoHybridGatedDeltaNetAttention = None\n\n\n{CLASS}")], "bound again"),
    "method replaced after the class": (
        [("\n\ndef _make_fused", "\n\nOlmoHybridGatedDeltaNetAttention._full_forward = None\n\ndef _make_fused")],
        "bound again",
    ),
    "no Python": ([(DEFINED, "    def (\n")], "not readable"),
}  # fmt: skip
HARMLESS: dict[str, list[tuple[str, str]]] = {
    "as released": [],
    "a quiet statement between": [between("last = projected_qkvg[..., -1:]")],
    "the input's shape between": [between("assert hidden_states.shape[0] == num_tokens")],
    "another name for the input": [(MAIN + "        conv", MAIN.replace("hidden_states", "x") + "        conv"),
                                   (SIDE, SIDE.replace("hidden_states", "x")),
                                   ("        num_tokens = hidden_states.size(0)\n", "        num_tokens = 1\n        x = hidden_states\n")],
    "side first": [(SIDE, ""), (MAIN, SIDE + MAIN)],
    "side by its first part": [(SIDE, "        b = self.b_proj(hidden_states)[0]\n")],
    "the other small linear gone": [("        a, _ = self.a_proj(hidden_states)\n", "        a = b\n")],
    "the side's result changed later": [(SIDE, f"{SIDE}        b = torch.sigmoid(b)\n")],
}  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS)
def test_the_verdict_says_apply_on_the_release_and_on_harmless_changes(verdict: Any, change: str) -> None:
    found = changed(verdict, *HARMLESS[change])
    assert (found.state, found.module, found.class_name, found.methods) == (
        APPLY, verdict.MODULES[0], "OlmoHybridGatedDeltaNetAttention", ("_full_forward",),
    ), found  # fmt: skip


@pytest.mark.parametrize("change", DRIFTING)
def test_the_verdict_steps_back_from_a_change_that_matters(verdict: Any, change: str) -> None:
    replacements, reason = DRIFTING[change]
    found = changed(verdict, *replacements)
    assert found.state == DRIFTED and reason in found.reason and found.methods == (), found
    assert found.where is not None and int(found.where.rpartition(":")[2]) > 0


def test_the_verdict_knows_every_release_and_both_places_of_the_class(verdict: Any) -> None:
    places = set()
    for version in SUPPORTED:
        found = verdict.judge(tree(version))
        assert found.state == APPLY, (version, found)
        path, _, line = str(found.where).rpartition(":")
        assert pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1].strip() == DEFINED.strip()
        places.add(found.module)
    assert places == set(verdict.MODULES)


def test_the_verdict_without_the_model_and_with_half_a_copy(verdict: Any, tmp_path: pathlib.Path) -> None:
    assert verdict.judge(SourceTree(tmp_path)).state == DRIFTED
    table = tmp_path.joinpath(*verdict.WITNESS.module.split(".")).with_suffix(".py")
    table.parent.mkdir(parents=True)
    for models, state in ("{}", ABSENT), ("{'Olmo': 'olmo_hybrid'}", DRIFTED):
        table.write_text(f"MODELS = {models}\nModelRegistry = MODELS\n")
        assert verdict.judge(SourceTree(tmp_path)).state == state


# ---------------------------------------------------------------- the patch, on the layer of the vLLM that is installed


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """vLLM's configuration and process groups of one rank, for layers that their own `__init__` makes."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.utils.network_utils import get_open_port

    config = VllmConfig()
    with set_current_vllm_config(config):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        parallel_state.init_distributed_environment(1, 0, address, 0, backend="gloo")
        parallel_state.initialize_model_parallel(1)
        yield config
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@pytest.fixture
def module(world: Any, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The target module of the installed vLLM; its class is as before after the test."""
    from vllm.model_executor.layers.mamba.gdn import olmo_gdn_linear_attn as target

    layer_class = target.OlmoHybridGatedDeltaNetAttention
    for name in ("__init__", "_full_forward"):
        monkeypatch.setattr(layer_class, name, vars(layer_class)[name])
    monkeypatch.setattr(target, "set_triton_allocator", lambda device: None)  # there is no Triton here
    world.compilation_config.static_forward_context.clear()
    return target


class Installed:
    """The example as `overlay.start.install` puts it onto a target module."""

    def __init__(self, example: Callable[[str], Any], module: types.ModuleType, patch: pytest.MonkeyPatch) -> None:
        from overlay.engine import loaded
        from overlay.report.journal import journal
        from overlay.side_work import ops
        from overlay.start import install

        self.waiting: list[Callable[[Any], None]] = []
        patch.setattr(loaded, "_waiting", self.waiting)
        patch.setattr(ops, "planned", {})
        patch.setattr(journal, "patches", {})
        patch.setitem(registry._VERDICTS, NAME, example("verdict"))
        install.install(NAME, module, Settings(serial_pass_through=True, strict=True))
        self.record = journal.patch(NAME)

    def load(self, config: Any) -> None:
        of_vllm = types.SimpleNamespace(
            compilation_config=config.compilation_config,
            parallel_config=config.parallel_config,
            model_config=types.SimpleNamespace(hf_text_config=types.SimpleNamespace(hidden_size=16)),
        )
        for decide in self.waiting:
            decide(types.SimpleNamespace(vllm_config=of_vllm, rank=0))


@pytest.fixture
def installed(
    example: Callable[[str], Any], module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Installed]:
    yield Installed(example, module, monkeypatch)
    compile_cache.remove(NAME)
    proof.forget(NAME)
    running_code._judged.pop(NAME, None)


def core(mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any) -> None:
    """Some function of all inputs, in the place of the recurrence, which needs Triton."""
    value = mixed_qkv[:, -core_attn_out[0].numel() :].reshape(core_attn_out.shape)
    core_attn_out.copy_(value * b.unsqueeze(-1) + a.unsqueeze(-1) + mixed_qkv.sum(-1)[:, None, None])


def make(module: types.ModuleType, config: Any, number: int = 0) -> Any:
    import torch

    model = types.SimpleNamespace(
        hidden_size=16, hidden_act="silu", rms_norm_eps=1e-6, linear_conv_kernel_dim=4,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=10,
    )  # fmt: skip
    layer = module.OlmoHybridGatedDeltaNetAttention(model, config, prefix=f"model.layers.{number}.linear_attn")
    generator = torch.Generator().manual_seed(number)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
        parameter.requires_grad_(False)
    for linear in (layer.in_proj_qkvg, layer.b_proj, layer.a_proj, layer.o_proj):
        linear.quant_method.process_weights_after_loading(linear)
    layer._forward_core = core
    return layer


def run(layer: Any, method: Callable[..., Any], config: Any, tokens: int) -> Any:
    import torch
    from vllm.forward_context import set_forward_context

    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens))
    output = torch.full_like(x, float("nan"))
    with torch.inference_mode(), set_forward_context(None, config):
        method(layer, hidden_states=x, output=output)
    assert output.isfinite().all() and output.unique().numel() > tokens
    return output


def test_the_patched_method_gives_upstreams_bits(module: types.ModuleType, world: Any, request: Any) -> None:
    import torch

    upstream = module.OlmoHybridGatedDeltaNetAttention._full_forward
    installed = request.getfixturevalue("installed")
    assert installed.record.verdict == APPLY
    layer = make(module, world)
    installed.load(world)
    assert installed.record.patched == {layer.prefix: {"in_proj_qkvg": 104, "b_proj": 4}}
    patched = type(layer)._full_forward
    assert patched is not upstream
    for calls, tokens in enumerate((1, 7, 300), 1):
        assert torch.equal(run(layer, patched, world, tokens), run(layer, upstream, world, tokens))
        assert installed.record.calls.total() == calls


def test_start_main_and_join_run_in_this_order_and_the_side_once(
    installed: Installed, module: types.ModuleType, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lane that notes what it is asked for, in the place of a GPU's. Without one the order is stock's."""
    from overlay.side_work import ops
    from tests.unit.lanes import NotingLane

    layer = make(module, world)
    installed.load(world)
    order: list[str] = []
    for name in ("in_proj_qkvg", "b_proj", "a_proj"):
        getattr(layer, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
    run(layer, type(layer)._full_forward, world, 5)
    assert order == ["in_proj_qkvg", "b_proj", "a_proj"]
    order.clear()
    monkeypatch.setattr(ops, "choose", lambda *_: ("dual", NotingLane(order)))
    run(layer, type(layer)._full_forward, world, 5)
    assert order == ["start", "b_proj", "in_proj_qkvg", "join", "a_proj"]


def spoil_side(layer: Any) -> None:
    layer.b_proj.register_forward_hook(lambda *_: None)


def spoil_main(layer: Any) -> None:
    layer.in_proj_qkvg.base_layer = layer.in_proj_qkvg.quant_method


@pytest.mark.parametrize(("spoil", "reason"), [(spoil_side, "hook"), (spoil_main, "LoRA")])
def test_a_refused_layer_runs_stock_and_says_why(
    installed: Installed, module: types.ModuleType, world: Any, spoil: Callable[[Any], None], reason: str
) -> None:
    layer, other = make(module, world), make(module, world, 1)
    spoil(layer)
    installed.load(world)
    assert reason in installed.record.refused[layer.prefix] and list(installed.record.patched) == [other.prefix]
    run(layer, type(layer)._full_forward, world, 3)
    assert installed.record.calls.total() == 0
    run(other, type(layer)._full_forward, world, 3)
    assert installed.record.calls.total() == 1


def test_sizes_that_disagree_with_the_heads_are_an_error(
    installed: Installed, example: Callable[[str], Any], module: types.ModuleType, world: Any
) -> None:
    layer = make(module, world)
    layer.num_v_heads *= 2
    with pytest.raises(ValueError, match=r"104.*heads say"):
        example("patch").PROJECTIONS.check_new(layer)


def test_on_another_device_the_class_stays_as_it_is(example: Callable[[str], Any], module: types.ModuleType) -> None:
    layer_class = module.OlmoHybridGatedDeltaNetAttention
    before = dict(vars(layer_class))
    verdict = Verdict(APPLY, "", module.__name__, layer_class.__name__, ("_full_forward",))
    assert example("patch").install(module, verdict, Settings()).state == INERT
    assert dict(vars(layer_class)) == before
