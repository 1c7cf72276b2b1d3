"""How the quantization formats of checkpoints name their layers, and what each linear is by them.

Read from vLLM 0.33.0's readers of the same configurations: `Fp8Config`, `ModelOptQuantConfigBase`,
`CompressedTensorsConfig`, `AutoAWQConfig`, `AutoGPTQConfig`, `INCConfig` (AutoRound), `Mxfp4Config`. vLLM fuses several of
a checkpoint's linears into one (`in_proj_qkvz` from `in_proj_qkv` and `in_proj_z`). The fused one is left alone if it is
named itself, or if all its parts are. vLLM refuses a checkpoint that names only some of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from overlay.side_work.rules import MARLIN, OTHER, TORCH, Linear

#: What a class of vLLM's linears is called, in small letters: a target of compressed-tensors such as "Linear" may be a part of it.
CLASSES = ("columnparallellinear", "mergedcolumnparallellinear", "qkvparallellinear", "rowparallellinear")
#: vLLM serves 32 bits as 16 (`_resolve_auto_dtype`): bf16, or fp16 on a GPU without bf16 and in a pooling model.
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "16-bit", "float": "16-bit"}
#: Of ModelOpt: what a `quant_algo` is.
ALGORITHMS = {
    "FP8": "FP8 per tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8 per channel",
    "FP8_PB_WO": "FP8 in blocks",
    "NVFP4": "NVFP4",
    "W4A16_NVFP4": "NVFP4, weights only",
    "MXFP8": "MXFP8",
}
MIXED_PRECISION = "MIXED_PRECISION"
#: vLLM's second module for GPTQ, up to 0.21: it takes what Marlin does not.
EXLLAMA = "vllm.model_executor.layers.quantization.gptq"
#: A key of AutoRound's with one of these is a pattern.
PATTERN_LETTERS = frozenset("*+?^$()[]{}|\\")


class Unusable(ValueError):
    """A configuration that no vLLM takes. The message names the key, its value and what is allowed."""


class Dropped(Unusable):
    """The same of a configuration that only releases with `EXLLAMA` take."""


class Unknown(Exception):
    """A format that this module does not know. The message is its name."""


class Torn(Exception):
    """vLLM does not load the checkpoint: it fuses linears of which only some are quantized. The message names them."""


@dataclass(frozen=True)
class Names:
    """How vLLM's names come from a checkpoint's: `prefixes` to replace, and the parts of what is fused."""

    prefixes: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]

    def mapped(self, name: str) -> str:
        """A name, or the beginning of one, as vLLM writes it."""
        for old, new in self.prefixes.items():
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    def parts(self, name: str) -> list[str]:
        """The names of the parts of which a linear is fused; none where it is not."""
        base, _, last = name.rpartition(".")
        return [f"{base}.{part}" for part in self.fused.get(last, ())]

    def all_parts(self, name: str, matches: Callable[[str], bool]) -> bool:
        """Whether all parts of a linear are matched; it is its own part where it is not fused. Raises Torn where only some are."""
        found = {matches(part) for part in self.parts(name) or [name]}
        if len(found) > 1:
            raise Torn(f"only some of {', '.join(self.fused[name.rpartition('.')[2]])} are quantized")
        return found.pop()

    def is_left_alone(self, name: str, matches: Callable[[str], bool]) -> bool:
        """Whether a linear is matched by its own name or by all its parts. Raises Torn where only some parts are."""
        return matches(name) or self.all_parts(name, matches)


#: What the linear of this full name is.
Reader = Callable[[str], Linear]


@dataclass(frozen=True)
class Format:
    """`name` is the method's with its variant, such as "fp8, blocks of 128 x 128"; `notes` is what its configuration leaves open."""

    name: str
    read: Reader
    notes: tuple[str, ...] = ()


def unquantized(dtype: object) -> Linear:
    """A linear in the model's own type."""
    said = DTYPES.get(str(dtype).removeprefix("torch."), "unquantized")
    return Linear(said, TORCH, reads_input=True)


def bits(linear: Linear) -> int:
    """How wide a weight is, by the first number in what its linear is called; 16 without one."""
    found = re.search(r"\d+", linear.said)
    return int(found[0]) if found else 16


def _quantized(said: str) -> Linear:
    """A kernel that quantizes its input, or that is not known to leave it alone."""
    return Linear(said, OTHER, reads_input=False)


def _weights_only(bits: int) -> Linear:
    """Integer weights: Marlin has kernels for 4 and 8 bits."""
    return Linear(f"{bits}-bit", MARLIN, reads_input=True) if bits in (4, 8) else _quantized(f"{bits}-bit")


def find(config: Mapping[str, Any] | None, dtype: object, names: Names, weights: Sequence[str] | None) -> Format:
    """The format of a checkpoint with this `quantization_config`; None for a checkpoint without.

    `weights`: the names of the tensors in the checkpoint's files, None where there are no files. Raises Unknown, and Unusable.
    """
    plain = unquantized(dtype)
    if config is None:
        return Format(plain.said, lambda _: plain)
    method = _method(config)
    make = _FORMATS.get(method) or _FORMATS.get(method.partition("_")[0] if method.startswith("modelopt") else "")
    if make is None:
        raise Unknown(method)
    return make(config, plain, names, weights)


def _method(config: Mapping[str, Any]) -> str:
    own = _text(config, "quant_method", "")
    inner = config.get("quantization")
    producer = config.get("producer")
    if not own and ("quant_algo" in config or (isinstance(inner, Mapping) and "quant_algo" in inner)):
        own = "modelopt"
    if not own and isinstance(producer, Mapping):
        own = str(producer.get("name") or "")
    if not own:
        raise Unusable("quantization_config has no quant_method; allowed is the name of a format, such as 'fp8'")
    return own.lower()


# ---------------------------------------------------------------- values of a configuration


def _text(config: Mapping[str, Any], key: str, default: str | None = None) -> str:
    found = config.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise Unusable(f"{key} is {shown(found)}; allowed is a text")
    return found


def _number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    found = config.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int) or not -1 <= found <= 1 << 20:
        raise Unusable(f"{key} is {shown(found)}; allowed is a whole number")
    return found


def _list(config: Mapping[str, Any], *keys: str) -> list[str]:
    """Texts under the first of these keys that is there and not empty; lists in the list are taken apart, as vLLM does for GPTQ."""
    key = next((key for key in keys if config.get(key)), keys[0])
    found = config.get(key)
    if isinstance(found, list):
        flat = [inner for one in found for inner in (one if isinstance(one, list) else [one])]
        if all(isinstance(one, str) for one in flat):
            return flat
    elif found is None or found == "":
        return []
    elif isinstance(found, str):
        return [part.strip() for part in found.split(",")]
    raise Unusable(f"{key} is {shown(found)}; allowed is a list of names")


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Mapping[str, Any]]:
    """A mapping of mappings."""
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(value, Mapping) for value in found.values()):
        raise Unusable(f"{key} is {shown(found)}; allowed is an object of objects")
    return dict(found)


def shown(value: object) -> str:
    """A value in a message: a number or a text as it is, cut to 80 letters; of a list its length; of anything else its kind."""
    if isinstance(value, list):
        return f"a list of length {len(value)}"
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise Unusable(f"{shown(text)} is no pattern ({error}); allowed is a regular expression") from error


def _one_of(entries: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is one of these, or begins as one with "re:" before it says."""
    exact = frozenset(entries)
    patterns = [_pattern(entry[3:]) for entry in entries if entry.startswith("re:")]
    return lambda name: name in exact or any(pattern.match(name) for pattern in patterns)


# ---------------------------------------------------------------- the formats


def _fp8(config: Mapping[str, Any], plain: Linear, names: Names, _: Sequence[str] | None) -> Format:
    skipped = {names.mapped(name) for name in _list(config, "ignored_layers", "modules_to_not_convert")}
    block = config.get("weight_block_size")
    if block is None:
        said, detail = "FP8 per tensor", f"per tensor, {_text(config, 'activation_scheme', 'dynamic')} inputs"
    else:
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise Unusable(f"weight_block_size is {shown(block)}; allowed are two whole numbers")
        said, detail = "FP8 in blocks", f"blocks of {block[0]} x {block[1]}"
    return Format(
        f"fp8, {detail}", lambda name: plain if names.is_left_alone(name, skipped.__contains__) else _quantized(said)
    )


def _modelopt(config: Mapping[str, Any], plain: Linear, names: Names, _: Sequence[str] | None) -> Format:
    inner = config.get("quantization", config)
    if not isinstance(inner, Mapping):
        raise Unusable(f"quantization is {shown(inner)}; allowed is an object")
    algorithm = _text(inner, "quant_algo").upper()
    entries = _list(inner, "ignore") if "ignore" in inner else _list(inner, "exclude_modules")
    excluded: list[str] = []
    for entry in entries:
        # "a.b*" stands for the module and everything in it; taken apart, because a prefix may be replaced in each.
        tree = len(entry) > 1 and entry.endswith("*") and not entry.endswith(".*")
        excluded += [names.mapped(entry[:-1]), names.mapped(f"{entry[:-1]}.*")] if tree else [names.mapped(entry)]
    exact = frozenset(excluded)

    def is_excluded(name: str) -> bool:
        if excluded and names.is_left_alone(name, exact.__contains__):
            return True
        within = (name, name.removeprefix("language_model."))
        return any(
            (entry != name and any(entry in one for one in within)) or fnmatchcase(name, entry) for entry in excluded
        )

    if algorithm != MIXED_PRECISION:
        if algorithm not in ALGORITHMS:
            raise Unknown(f"modelopt {algorithm}")
        whole = _quantized(ALGORITHMS[algorithm])
        return Format(f"modelopt, {algorithm}", lambda name: plain if is_excluded(name) else whole)
    layers = {
        names.mapped(name): _text(value, "quant_algo").upper()
        for name, value in _mapping(inner, "quantized_layers").items()
    }
    if not layers:
        raise Unusable("quantized_layers is not there; allowed with MIXED_PRECISION is an object of layers")

    def read(name: str) -> Linear:
        found = {layers[one] for one in (name, *names.parts(name)) if one in layers}
        if is_excluded(name) or not found:
            return plain
        if len(found) > 1:
            raise Torn(f"its parts are {' and '.join(sorted(found))}")
        (algorithm,) = found
        return _quantized(ALGORITHMS.get(algorithm, algorithm))

    return Format("modelopt, mixed precision", read)


def _compressed_tensors(config: Mapping[str, Any], plain: Linear, names: Names, _: Sequence[str] | None) -> Format:
    def mapped(entries: Iterable[str]) -> list[str]:
        return [names.mapped(one) if "." in one and not one.startswith("re:") else one for one in entries]

    ignored = _one_of(mapped(_list(config, "ignore")))
    overall = _text(config, "format", "")
    if config.get("transform_config"):
        # A rotation of the input is a method of its own, for linears without quantization as well.
        return Format("compressed-tensors, rotated", lambda _name: _quantized("rotated"))
    schemes: list[tuple[Callable[[str], bool], Linear]] = []
    by_class: list[Linear] = []
    for group in _mapping(config, "config_groups").values():
        targets = mapped(_list(group, "targets"))
        if not (len(targets) == 1 and targets[0].endswith("Attention")):
            found = _scheme(group, _text(group, "format", overall))
            schemes.append((_one_of(targets), found))
            by_class += [found] if any(target.lower() in one for target in targets for one in CLASSES) else []

    def named(name: str) -> Linear | None:
        return next((found for matches, found in schemes if matches(name)), None)

    def read(name: str) -> Linear:
        if names.is_left_alone(name, ignored):
            return plain
        parts = [named(part) for part in names.parts(name)]
        of_parts = parts[0] if parts and None not in parts else None
        return named(name) or of_parts or (by_class[0] if by_class else plain)

    return Format(f"compressed-tensors, {overall or 'no format'}", read)


def _scheme(group: Mapping[str, Any], form: str) -> Linear:
    """What a group of compressed-tensors makes of its linears."""
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise Unusable(f"weights is {shown(weights)}; allowed is an object with num_bits and type")
    bits, kind = _number(weights, "num_bits"), _text(weights, "type", "int")
    inputs = group.get("input_activations")
    if kind == "float" and bits == 4:
        said = "MXFP4" if weights.get("group_size") == 32 else "NVFP4"
        return _quantized(said if inputs else f"{said}, weights only")
    if kind == "float":
        strategy = _text(weights, "strategy", "tensor")
        said = {"block": "in blocks", "channel": "per channel", "group": "in groups"}.get(strategy, "per tensor")
        return _quantized(f"FP{bits} {said}" + ("" if inputs else ", weights only"))
    if not inputs and form in ("pack-quantized", "") and bits in (4, 8):
        return _weights_only(bits)
    return _quantized(f"INT{bits}" + ("" if inputs else ", weights only"))


def _layers(weights: Sequence[str] | None, packed: bool) -> list[str]:
    """The layers that have packed weights, or those that have others only."""
    layers: dict[str, bool] = {}
    for name in weights or ():
        layer = name.rsplit(".", 1)[0]
        layers[layer] = layers.get(layer, False) or name.endswith(".qweight")
    return [layer for layer, is_packed in layers.items() if is_packed == packed]


def _asks_the_files(key: str, is_known: bool) -> tuple[str, ...]:
    """The note for a configuration without this key; none where its list or the files' index is known."""
    said = f"{key} is not there, so vLLM asks the weight files; without them all linears count as quantized"
    return () if is_known else (said,)


def _awq(config: Mapping[str, Any], plain: Linear, names: Names, weights: Sequence[str] | None) -> Format:
    bits = _number(config, "w_bit", "bits", default=4)
    if bits != 4:
        key = "bits" if config.get("w_bit") is None else "w_bit"
        raise Unusable(f"{key} is {bits}; allowed with awq is 4")
    listed = _list(config, "modules_to_not_convert")
    skipped = [names.mapped(name) for name in listed or _layers(weights, packed=False)]
    notes = _asks_the_files("modules_to_not_convert", bool(listed) or weights is not None)
    packed = _weights_only(bits)

    def is_skipped(name: str) -> bool:
        return any(part in name for part in skipped)

    return Format(f"awq, {bits} bits", lambda name: plain if names.is_left_alone(name, is_skipped) else packed, notes)


def _gptq(config: Mapping[str, Any], plain: Linear, names: Names, weights: Sequence[str] | None) -> Format:
    bits, symmetric = _number(config, "bits"), config.get("sym", True)
    if bits not in (4, 8):
        raise Dropped(f"bits is {bits}; allowed with gptq is 4 or 8")
    if symmetric is not True:
        raise Dropped(f"sym is {shown(symmetric)}; allowed with gptq is true")
    listed = _list(config, "modules_in_block_to_quantize")
    by_name = [names.mapped(name) for name in listed or _layers(weights, packed=True)]
    rules = [
        (_pattern(re.sub(r"^[-+]:", "", text)), None if text.startswith("-:") else _number(rule, "bits", default=bits))
        for text, rule in _mapping(config, "dynamic").items()
    ]
    notes = _asks_the_files("modules_in_block_to_quantize", bool(listed) or weights is not None)

    def is_quantized(name: str) -> bool:
        return any(part in name for part in by_name)

    def read(name: str) -> Linear:
        is_left_alone = bool(by_name) and not names.all_parts(name, is_quantized)
        own = next((found for pattern, found in rules if pattern.match(name)), bits)
        if own is None or is_left_alone:
            return plain
        return _weights_only(own)

    return Format(f"gptq, {bits} bits", read, notes)


def _autoround(config: Mapping[str, Any], plain: Linear, names: Names, _: Sequence[str] | None) -> Format:
    bits, kind = _number(config, "bits"), _text(config, "data_type", "int")
    extra = {
        names.mapped(name): _number(value, "bits", default=bits)
        for name, value in _mapping(config, "extra_config").items()
    }
    patterns = [(_pattern(name), found) for name, found in extra.items() if PATTERN_LETTERS & set(name)]
    blocks = tuple(names.mapped(name) for name in _list(config, "block_name_to_quantize", "to_quant_block_names"))

    def own(name: str) -> int | None:
        """The bits of a name that extra_config has, or a pattern of it."""
        if name in extra:
            return extra[name]
        return next((found for pattern, found in patterns if pattern.search(name)), None)

    def bits_of(name: str) -> int:
        default = bits if not blocks or name.startswith(blocks) else 16
        ending = next((key for key in extra if name == key or name.endswith(f".{key}")), None)
        if ending is not None:
            return extra.get(name, extra[ending])
        parts = [own(part) for part in names.parts(name)]
        if any(part is not None for part in parts):
            each = {default if part is None else part for part in parts}
            if len(each) > 1:
                raise Torn(f"the parts of {name.rpartition('.')[2]} have different bits")
            return each.pop()
        found = own(name)
        return default if found is None else found

    def read(name: str) -> Linear:
        found = bits_of(name)
        if found >= 16:
            return plain
        return _weights_only(found) if kind == "int" else _quantized(f"{kind}, {found} bits")

    return Format(f"auto-round, {bits} bits", read)


def _mxfp4(config: Mapping[str, Any], plain: Linear, names: Names, _: Sequence[str] | None) -> Format:
    return Format("mxfp4, experts only", lambda _name: plain)


_FORMATS: dict[str, Callable[[Mapping[str, Any], Linear, Names, Sequence[str] | None], Format]] = {
    "fp8": _fp8,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _autoround,
    "mxfp4": _mxfp4,
}
