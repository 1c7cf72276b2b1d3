"""``check --model``: what each patch would do with a checkpoint, by its configuration and the sources of one vLLM.

Only JSON is loaded: neither torch nor vLLM, and no weights. How vLLM is started can change the answer (`rules.MODES`). So
can the GPU, if vLLM has several kernels for a format. The reasons say so.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from overlay.cli.failure import CommandError
from overlay.cli.options import MOST_LAYERS
from overlay.cli.quantization import (
    EXLLAMA,
    Dropped,
    Format,
    Names,
    Torn,
    Unknown,
    Unusable,
    bits,
    find,
    shown,
    unquantized,
)
from overlay.side_work.rules import (
    ADAPTERS,
    MARLIN,
    MODES,
    NO_COMPRESSOR,
    TORCH,
    WIDEST_ROW,
    Linear,
    reason_against,
    reason_against_main,
)
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY

#: The state of a group: the patch would take it, it stays stock, or nobody can tell from the configuration.
STOCK, UNKNOWN = "stock", "unknown"
WHEN_SERVED = "when served with --enable-lora"
#: A configuration is a few kilobytes, with the names of all layers some hundred.
LARGEST_FILE = 16 << 20
CONFIG, MODELOPT_CONFIG, INDEX = "config.json", "hf_quant_config.json", "model.safetensors.index.json"
ALLOWED = "allowed are a checkpoint's folder and its config.json"

#: Qwen3-Next and the Qwen3.5 family (3.6 and 3.8 have its architectures): the models on the GDN layer that the patch knows.
NEXT = re.compile(r"Qwen3Next(ForCausalLM)?|Qwen3NextMTP")
QWEN3_5 = re.compile(r"Qwen3_[5-9](Moe)?(ForCausalLM|ForConditionalGeneration|MTP)|ColQwen3_5")
#: The models with DeepSeek-V3.2's attention (DSA), and the package that their class is in from vLLM 0.29 on.
DSA = re.compile(r"(DeepseekV32|GlmMoeDsa)ForCausalLM")
DSA_PACKAGE = "vllm.models.deepseek_v32"
DEEPSEEK_V4 = re.compile(r"DeepseekV4For(CausalLM|ConditionalGeneration)")
#: How vLLM tells a pooling model by its architecture (`_SUFFIX_TO_DEFAULTS`); a model that generates ends otherwise.
POOLING = re.compile(r"(ForTextEncoding|For\w*Classification|ForRewardModeling|(?<!Chat)(?<!LMHead)Model)$")
#: What a folder of Sentence Transformers has: then vLLM pools, whatever the architecture.
POOLS = "modules.json"
#: Fields that say how many routed experts there are, by family.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
#: Fields of models with latent attention, whose linears have other names.
OTHER_LINEARS = ("q_lora_rank", "kv_lora_rank", "compress_ratios")
#: The kinds of layers that a model with linear attention has; vLLM refuses others.
KINDS = FULL, LINEAR = "full_attention", "linear_attention"
ATTENTION = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
MLP = {"gate_up_proj": ("gate_proj", "up_proj")}
GDN = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
LATENT = {"fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
MAIN, SIDE = "in_proj_qkvz", "in_proj_ba"
WHOLE_SIDE = "disable_tp_for_ba_proj"
#: vLLM's models, and the module that names all architectures.
MODELS = "vllm.model_executor.models"
REGISTRY = f"{MODELS}.registry"
#: Where vLLM says how it compiles, and what it has there from 0.18 on: then starts are put into graphs last.
COMPILATION, RANGES = "vllm.config.compilation", "compile_ranges_endpoints"


@dataclass(frozen=True)
class Shape:
    """What ``--measure`` builds of a group: one rank's shard of main and side.

    `layers` are vLLM's names. `main` and `side` are the columns per shard of the parts that vLLM merges into one linear. `bits`
    are the widths of a weight of the projections, and of the experts or MLPs.
    """

    layers: tuple[str, ...]
    hidden: int
    main: tuple[int, ...]
    side: tuple[int, ...]
    bits: tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Layers with which a patch does the same, for the same reason. `sizes`: columns per shard, and of the input.

    `shape` is there if the patch applies and is for two linears. `measured` is what ``--measure`` has found.
    """

    patch: str
    layers: int
    state: str
    reason: str
    sizes: tuple[tuple[str, int], ...] = ()
    linears: tuple[str, ...] = ()
    shape: Shape | None = None
    measured: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"patch": self.patch, "layers": self.layers, "state": self.state, "reason": self.reason}
        if self.sizes:
            found["sizes"] = dict(self.sizes)
        if self.linears:
            found["linears"] = list(self.linears)
        if self.measured is not None:
            found["measured"] = dict(self.measured)
        return found


@dataclass(frozen=True)
class Checkpoint:
    """What `check --model` says. `notes` are sentences for a person; `modes` is how vLLM may be served so that all stays stock."""

    config: Configuration
    architecture: str
    format: str
    shards: int
    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    modes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return str(self.config.file)

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "architecture": self.architecture,
            "format": self.format,
            "tensor_parallel": self.shards,
            "groups": [group.as_dict() for group in self.groups],
            "notes": list(self.notes),
            "modes": list(self.modes),
        }


@dataclass
class Configuration:
    """A `config.json`, and what lies beside it. Every question about a value is asked here, so a wrong one has one message."""

    file: Path
    content: Mapping[str, Any]
    text: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        nested = self.content.get("text_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise self.wrong("text_config", nested, "an object")
        self.text = nested or self.content

    def wrong(self, key: str, value: object, allowed: str) -> CommandError:
        return CommandError(f"--model: {self.file}: {key} is {shown(value)}; allowed is {allowed}")

    def size(self, key: str, most: int = 1 << 30, least: int = 1) -> int:
        """A size of the language model, which has to be there."""
        found = self.text.get(key)
        if type(found) is not int or not least <= found <= most:
            raise self.wrong(key, found, f"a whole number from {least} to {most}")
        return found

    def size_or(self, key: str, default: int, least: int = 1) -> int:
        """The same of one that may be missing."""
        return default if self.text.get(key) is None else self.size(key, least=least)

    @property
    def layers(self) -> int:
        return self.size("num_hidden_layers", MOST_LAYERS)

    @property
    def architecture(self) -> str:
        found = self.content.get("architectures")
        if not isinstance(found, list) or not found or not isinstance(found[0], str) or not found[0]:
            raise self.wrong("architectures", found, "a list with the name of a model's class")
        return found[0]

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """Where vLLM looks for it, in that order."""
        places = (self.content.get("quantization_config"), self.text.get("quantization_config"))
        for found in (*places, self.content.get("compression_config")):
            if found is not None:
                if not isinstance(found, Mapping):
                    raise self.wrong("quantization_config", found, "an object")
                return found
        beside = self.file.parent / MODELOPT_CONFIG
        return _json(beside) if beside.is_file() else None

    @property
    def dtype(self) -> object:
        """Where vLLM looks for it, in that order (`get_torch_dtype`)."""
        inner = (self.content.get(key) for key in ("vision_config", "encoder_config"))
        places = (place for place in (self.content, self.text, *inner) if isinstance(place, Mapping))
        return next((found for place in places if (found := place.get("dtype") or place.get("torch_dtype"))), None)

    def kinds(self) -> list[str]:
        """The kind of each layer, as in `layer_types`."""
        count, types = self.layers, self.text.get("layer_types")
        if types is None:
            every = self.size_or("full_attention_interval", 4)
            return [FULL if (index + 1) % every == 0 else LINEAR for index in range(count)]
        if not isinstance(types, list) or len(types) < count or not all(isinstance(one, str) for one in types):
            raise self.wrong("layer_types", types, f"a list of {count} kinds of layers")
        return types[:count]

    def hybrid_kinds(self) -> list[str]:
        """The same of a model with linear attention, of which vLLM knows two kinds."""
        kinds = self.kinds()
        unknown = next((one for one in kinds if one not in KINDS), None)
        if unknown is not None:
            raise self.wrong("an entry of layer_types", unknown, " or ".join(KINDS))
        return kinds

    def weights(self) -> list[str] | None:
        """The names of the tensors, by the index of the weight files; None where there is none."""
        index = self.file.parent / INDEX
        if not index.is_file():
            return None
        names = _json(index).get("weight_map")
        if not isinstance(names, Mapping):
            raise CommandError(f"--model: {index} has no weight_map; {ALLOWED}")
        return list(names)


def read(given: str) -> Configuration:
    """The configuration that ``--model`` names. Raises CommandError where there is none that can be read."""
    path = Path(given).expanduser()
    try:
        file = path / CONFIG if path.is_dir() else path
        if not file.is_file():
            lacks = f"is a folder without {CONFIG}" if path.is_dir() else "is no file"
            raise CommandError(f"--model={given!r} {lacks}; {ALLOWED}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CommandError(f"--model={given!r} cannot be read: {error}; {ALLOWED}") from error
    return Configuration(file, _json(file))


def _json(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise CommandError(
                f"--model: {file} is larger than {LARGEST_FILE >> 20} MiB, so it is no configuration; {ALLOWED}"
            )
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of 5000 digits
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise CommandError(f"--model: {file} is no JSON that can be read: {reason}; {ALLOWED}") from error
    if not isinstance(content, Mapping):
        raise CommandError(f"--model: {file} holds a {type(content).__name__} and no object; {ALLOWED}")
    return content


# ---------------------------------------------------------------- the answer


def judge(
    given: str, verdicts: Mapping[str, Verdict], source_of: Callable[[str], str], shards: int, lora: bool
) -> Checkpoint:
    """What the patches of these verdicts would do with a checkpoint on `shards` GPUs.

    `source_of` gives the text of a module of that vLLM. `lora`: the checkpoint is served with --enable-lora.
    """
    config = read(given)
    architecture = config.architecture
    nested = architecture.endswith("ForConditionalGeneration") and config.text is not config.content
    names = Names(
        {"model.language_model.": "language_model.model." if nested else "model."},
        {**ATTENTION, **MLP, **LATENT, **({} if NEXT.fullmatch(architecture) else GDN)},
    )
    notes: list[str] = []
    form: Format | None = None
    try:
        form = find(config.quantization, config.dtype, names, config.weights())
        notes += form.notes
        name = form.name
    except Unusable as error:
        if not (isinstance(error, Dropped) and source_of(EXLLAMA)):
            raise CommandError(f"--model: {config.file}: quantization_config: {error}") from error
        name = f"unknown: gptq, {str(error).partition(';')[0]}"
    except Unknown as unknown:
        name = f"unknown: {unknown}"
    asked = _Asked(
        config,
        verdicts,
        source_of,
        shards,
        lora,
        form,
        name,
        "language_model.model.layers" if nested else "model.layers",
    )
    if config.text.get("num_attention_heads") is not None:
        asked.divided("num_attention_heads")
    asked.check_key_value_heads()
    groups: list[Group] = []
    if NEXT.fullmatch(architecture) or QWEN3_5.fullmatch(architecture):
        groups += asked.gdn()
    if DSA.fullmatch(architecture):
        groups += asked.dsa()
    if DEEPSEEK_V4.fullmatch(architecture):
        groups += asked.deepseek_v4()
    unjudged = None
    if POOLING.search(architecture) or (config.file.parent / POOLS).is_file():
        groups += asked.pooling()
        unjudged = "it is not judged for a pooling model" if lora else None
    elif not asked.has_usual_linears():
        unjudged = f"how {architecture} names its linears is not known here"
    else:
        groups += asked.lora_linear()
    notes += [f"lora_linear: {unjudged}; the journal of a server tells"] if unjudged else []
    states = {group.state for group in groups}
    if not states & {APPLY, UNKNOWN}:
        notes.append(f"no {'other ' if unjudged else ''}patch applies to this checkpoint ({architecture}, {name})")
    elif {group.patch for group in groups if group.state == APPLY} == {"lora_linear"} and not lora:
        notes.append(f"no patch applies to {architecture} but lora_linear, {WHEN_SERVED}")
    # pooling asks for none of them: it forks nothing.
    modes = MODES if any(group.state == APPLY and group.patch != "pooling" for group in groups) else ()
    return Checkpoint(config, architecture, name, shards, tuple(groups), tuple(notes), modes)


@dataclass(frozen=True)
class _Asked:
    """One checkpoint and one vLLM; a method for each patch."""

    config: Configuration
    verdicts: Mapping[str, Verdict]
    source_of: Callable[[str], str]
    shards: int
    lora: bool
    form: Format | None
    format_name: str
    prefix: str

    def _off(self, patch: str) -> str | None:
        """Why a patch does nothing in this vLLM, whatever the model is."""
        found = self.verdicts[patch]
        return None if found.state == APPLY else f"{found.state} in this vLLM: {found.reason}"

    def _off_here(self, patch: str) -> str | None:
        """The same of a patch of the model's own layers."""
        name = self.config.architecture
        is_known = f'"{name}"' in self.source_of(REGISTRY)
        return self._off(patch) or (None if is_known else f"this vLLM has no {name} of its own")

    def divided(self, key: str) -> int:
        """A size per shard. Raises CommandError where it cannot be divided: vLLM would not start."""
        size = self.config.size(key)
        if size % self.shards:
            raise CommandError(f"--tp={self.shards}: the model's {key} is {size}; allowed is a number that divides it")
        return size // self.shards

    def check_key_value_heads(self) -> None:
        """Raise CommandError where vLLM's attention cannot divide them, or copy each to as many shards. A latent one has none."""
        count = self.config.size_or("num_key_value_heads", 1)
        latent = any(self.config.text.get(key) is not None for key in OTHER_LINEARS)
        if count % self.shards and self.shards % count and not latent:
            raise CommandError(
                f"--tp={self.shards}: the model's num_key_value_heads is {count}; allowed is a number that divides it, or a multiple of it"
            )

    def _grouped(self, patch: str, rows: Iterable[tuple[Any, ...]], linears: bool = False) -> list[Group]:
        """Rows (state, reason, sizes[, linear]) that are alike as one group, in the order in which they come."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for state, reason, sizes, linear in rows:
            found.setdefault((state, reason, sizes), []).append(linear)
        return [
            Group(patch, len(names), state, reason, sizes, tuple(dict.fromkeys(names)) if linears else ())
            for (state, reason, sizes), names in found.items()
        ]

    def gdn(self) -> list[Group]:
        """The input projections of the linear attention layers."""
        config = self.config
        hidden = config.size("hidden_size")
        keys = self.divided("linear_num_key_heads") * config.size("linear_key_head_dim")
        heads = self.divided("linear_num_value_heads")
        values = heads * config.size("linear_value_head_dim")
        # vLLM 0.22 and later keep ba whole on every rank for these formats: Marlin has no kernel for fewer columns.
        whole = self.format_name.startswith(("awq", "gptq", "auto-round")) and not NEXT.fullmatch(config.architecture)
        whole = whole and WHOLE_SIDE in self.source_of(self.verdicts["gdn"].module or "")
        heads = config.size("linear_num_value_heads") if whole else heads
        main: tuple[int, ...] = (keys, keys, values, values)
        side: tuple[int, ...] = (heads, heads)
        sizes = (("hidden", hidden), ("qkvz", sum(main)), ("ba", sum(side)))
        if NEXT.fullmatch(config.architecture):  # its checkpoint has each of the two as one weight
            main, side = (sum(main),), (sum(side),)
        layers = [index for index, kind in enumerate(config.hybrid_kinds()) if kind == LINEAR]
        off = self._off_here("gdn")
        names = [f"{self.prefix}.{index}.linear_attn" for index in layers]
        rows = [((STOCK, off) if off is not None else self._of_pair(name, hidden)) + (sizes, name) for name in names]
        return [
            replace(
                group,
                linears=(),
                shape=Shape(group.linears, hidden, main, side, self._bits(group.linears[0]))
                if group.state == APPLY
                else None,
            )
            for group in self._grouped("gdn", rows, linears=True)
        ]

    def _bits(self, layer: str) -> tuple[int, int]:
        """The widths of a weight of this linear attention layer's main projection, and of the experts or the MLP after it."""
        mlp = f"{layer.rpartition('.')[0]}.mlp"
        names = f"{layer}.{MAIN}", f"{mlp}.experts.0.gate_proj" if self._is_mixture() else f"{mlp}.gate_up_proj"
        main, feed_forward = map(self._bits_of, names)
        return main, feed_forward

    def _bits_of(self, linear: str) -> int:
        """16 also for what vLLM does not load, or what is of an unknown format."""
        try:
            return bits(self.form.read(linear)) if self.form else 16
        except Torn:
            return 16

    def _is_mixture(self) -> bool:
        return any(self.config.text.get(key) for key in EXPERT_COUNTS)

    def _of_pair(self, layer: str, hidden: int) -> tuple[str, str]:
        if self.lora:
            return STOCK, f"{ADAPTERS} (unless --lora-target-modules leaves both out)"
        if self.form is None:
            return UNKNOWN, f"the format is {self.format_name}: what vLLM makes of it decides, when it is served"
        try:
            main, side = (self.form.read(f"{layer}.{name}") for name in (MAIN, SIDE))
        except Torn as error:
            return STOCK, f"vLLM does not load it: {error}"
        what = f"{SIDE} is {side.said} beside {main.said}"
        against = reason_against(main, side)
        if against is not None:
            return STOCK, f"{what}: {against}"
        said = [what]
        if side.gemm == MARLIN:
            said.append(f"where vLLM takes Marlin for {SIDE}; another kernel stays stock")
        if hidden > WIDEST_ROW:
            said.append(f"hidden size above {WIDEST_ROW}: prompts above the captured sizes keep the ops, serially")
        return APPLY, "; ".join(said)

    def dsa(self) -> list[Group]:
        """The first projections of the layers that have an indexer. The others have nothing to overlap, and are not counted."""
        config, off = self.config, self._off_here("dsa")
        if off is None and DSA_PACKAGE not in self.source_of(REGISTRY):
            off = self.verdicts["dsa"].reason
        latent = sum(config.size(key) for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"))
        side = config.size("index_head_dim") + config.size("index_n_heads")
        sizes = (("hidden", config.size("hidden_size")), ("qkv_a", latent), ("wk_weights", side))
        rows = []
        for index in self._indexers():
            state, reason = (STOCK, off) if off is not None else self._beside_latent(f"{self.prefix}.{index}.self_attn")
            rows.append((state, reason, sizes, ""))
        return self._grouped("dsa", rows)

    def _indexers(self) -> list[int]:
        """The numbers of the layers that have an indexer, as vLLM 0.25 to 0.33 reads them from a configuration."""
        config = self.config
        pattern = config.text.get("index_topk_pattern")
        if pattern is None:
            every, offset = config.size_or("index_topk_freq", 1), config.size_or("index_skip_topk_offset", 2, least=0)
            return [index for index in range(config.layers) if max(index - offset + 1, 0) % every == 0]
        if not isinstance(pattern, (str, list)) or not all(isinstance(one, str) for one in pattern):
            raise config.wrong("index_topk_pattern", pattern, "a letter for each layer, S for one without an indexer")
        return [index for index in range(config.layers) if pattern[index : index + 1] not in ("S", ["S"])]

    def _beside_latent(self, layer: str) -> tuple[str, str]:
        if self.lora:
            return STOCK, f"{ADAPTERS} (unless --lora-target-modules leaves both out)"
        side = unquantized(self.config.dtype).said  # vLLM never quantizes it, so main may be anything
        if self.form is None:
            return APPLY, f"wk_weights_proj is {side} beside a format that is {self.format_name}"
        try:
            main = self.form.read(f"{layer}.fused_qkv_a_proj").said
        except Torn as error:
            return STOCK, f"vLLM does not load it: {error}"
        return APPLY, f"wk_weights_proj is {side} beside {main}"

    def deepseek_v4(self) -> list[Group]:
        """The GEMMs before the attention: layers with a compressor."""
        config, off = self.config, self._off_here("deepseek_v4")
        ratios = config.text.get("compress_ratios")
        count = config.layers
        if not isinstance(ratios, list) or len(ratios) < count or not all(type(ratio) is int for ratio in ratios):
            raise config.wrong("compress_ratios", ratios, f"a list of {count} whole numbers")
        rows = []
        for ratio in ratios[:count]:
            if off is not None:
                state, reason = STOCK, off
            elif ratio <= 1:
                state, reason = STOCK, NO_COMPRESSOR
            else:
                beside = "three GEMMs" if ratio == 4 else "one GEMM"
                state, reason = APPLY, f"compress ratio {ratio}: {beside} in bf16 beside fused_wqa_wkv"
            rows.append((state, reason, (), ""))
        return self._grouped("deepseek_v4", rows)

    def pooling(self) -> list[Group]:
        """The copy of the pooler's output. vLLM's runner makes it, so the model does not matter."""
        off = self._off("pooling")
        reason = "where async scheduling is off (--no-async-scheduling, or an option that excludes it)"
        return [Group("pooling", 1, STOCK if off else APPLY, off or reason)]

    def has_usual_linears(self) -> bool:
        """Whether the linears are called as those of most models, or this vLLM has no class of which to ask that.

        A model's module says so where it names what is fused (`packed_modules_mapping`), or builds on Llama's class.
        """
        if any(self.config.text.get(key) is not None for key in OTHER_LINEARS):
            return False
        entry = re.search(
            rf'"{re.escape(self.config.architecture)}":\s*\(\s*"([\w.]+)",\s*"(\w+)"', self.source_of(REGISTRY)
        )
        if entry is None:
            return True
        source = self.source_of(entry[1] if "." in entry[1] else f"{MODELS}.{entry[1]}")
        if f"class {entry[2]}(LlamaForCausalLM" in source:
            return True
        needed = ATTENTION if self._is_mixture() else {**ATTENTION, **MLP}
        return "self.mixer" not in source and all(f'"{name}"' in source for name in needed)

    def lora_linear(self) -> list[Group]:
        """The linears of the language model's layers, as far as their names are those of most models."""
        off = self._off_here("lora_linear")
        rows: list[tuple[Any, ...]] = []
        for linear in self._linears() if self.config.text.get("num_hidden_layers") is not None else ():
            state, reason = (STOCK, off) if off is not None else self._of_base(linear)
            said = reason if self.lora or off is not None else f"{WHEN_SERVED}: {reason}"
            rows.append((state, said, (), linear.removeprefix(f"{self.prefix}.").partition(".")[2]))
        return self._grouped("lora_linear", rows, linears=True)

    def _linears(self) -> Iterable[str]:
        config = self.config
        is_hybrid = "linear_num_value_heads" in config.text
        kinds = config.hybrid_kinds() if is_hybrid else [FULL] * config.layers
        mixture = self._is_mixture()
        shared = bool(config.text.get("shared_expert_intermediate_size"))
        inner = ("mlp.shared_expert.",) if shared else () if mixture else ("mlp.",)
        for index, kind in enumerate(kinds):
            own = (f"linear_attn.{MAIN}", f"linear_attn.{SIDE}", "linear_attn.out_proj")
            attention = own if kind == LINEAR else ("self_attn.qkv_proj", "self_attn.o_proj")
            for name in itertools.chain(
                attention, (f"{part}{one}" for part in inner for one in ("gate_up_proj", "down_proj"))
            ):
                yield f"{self.prefix}.{index}.{name}"

    def _of_base(self, linear: str) -> tuple[str, str]:
        if self.form is None:
            return UNKNOWN, f"the format is {self.format_name}: what vLLM makes of it decides, when it is served"
        try:
            base: Linear = self.form.read(linear)
        except Torn as error:
            return STOCK, f"vLLM does not load it: {error}"
        said = f"the base layer is {base.said}"
        against = reason_against_main(base)
        if against is None:
            return APPLY, said if base.gemm == TORCH else f"{said} and reads its input as it is"
        return (APPLY, said) if RANGES in self.source_of(COMPILATION) else (STOCK, f"{said}: {against}")
