"""Random weights that matter, instead of vLLM's dummy ones.

`load_format="dummy"` fills every tensor with values below 0.001: every token comes out the same and a wrong result can
hide. Here every tensor gets values of a trained model's size, drawn from a generator that is seeded with the tensor's
name, so two processes hold the same bits. The values are there before vLLM repacks or quantizes them.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The environment variable of the seed, and the class that vLLM's workers are given: with both they have these weights.
SEED, EXTENSION = "BENCH_WEIGHT_SEED", "bench_engine.extension.BenchWorker"
#: int32 with eight 4-bit values of 7 and 8: the zero points of a symmetric GPTQ checkpoint.
_SYMMETRIC_ZERO_POINTS = 0x77777777
#: Standard deviations of random 4-bit values: GPTQ's minus 8, of which none is -8, and NVFP4's (0 to 6, and a sign).
_GPTQ_DEVIATION, _NVFP4_DEVIATION = 4.18, 2.93
#: NVFP4's scale of 16 values, of the size that checkpoints have: their largest is 448.
_NVFP4_BLOCK_SCALE = 64.0
#: A static scale of FP8 activations: 448 times as much is 28, and what is below 0.001 vanishes.
_INPUT_SCALE = 1.0 / 16.0
#: What the names of a routed expert's tensors begin with; a linear layer has the same names without.
_EXPERT_PREFIXES = ("w13_", "w2_")
#: Experts that DeepSeek-V4's table of experts by token may name: DeepSeek-V4-Flash has as many.
_EXPERTS_BY_TOKEN = 256
#: Standard deviation of random FP4 values (E2M1) as a power of two, and of how many inputs a scale is in MXFP4 and in FP8.
_FP4_EXPONENT, _FP4_BLOCK, _FP8_BLOCK = 2, 32, 128
_SCALES = {"weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "scales"}


def _generator(device: Any, seed: int, name: str) -> Any:
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return generator


def _expert_prefix(leaf: str) -> str:
    return next((prefix for prefix in _EXPERT_PREFIXES if leaf.startswith(prefix)), "")


def unit(leaf: str, tensors: Mapping[str, Any]) -> float:
    """What a scale has to be for the outputs of its linear layer to be as large as the inputs.

    `leaf` is the scale's name and `tensors` are the tensors of its layer, of which one is the scaled weight. 1 where there
    is none.
    """
    import torch

    prefix = _expert_prefix(leaf)
    for name, packed in (("weight", -1), ("qweight", -2), ("weight_packed", -1)):
        weight = tensors.get(prefix + name)
        if weight is None or weight.dim() < 2:
            continue
        inputs, deviation = weight.shape[packed], 1.0
        if weight.dtype == torch.int32:
            inputs, deviation = inputs * 8, _GPTQ_DEVIATION
        elif weight.dtype == torch.uint8:
            inputs, deviation = inputs * 2, _NVFP4_DEVIATION
        return 1.0 / (deviation * math.sqrt(inputs))
    return 1.0


def _power_of_two(inputs: int) -> int:
    """The bits of the E8M0 scale that makes a sum over `inputs` products of deviation 1 about as large as one of them."""
    return 127 - round(math.log2(inputs) / 2)


def _fill_scale(data: Any, leaf: str, generator: Any, tensors: Mapping[str, Any]) -> None:
    """A quantized weight's scales, or the static scale of its inputs.

    NVFP4 has two: of 16 values and of a whole weight. The second is one for all the parts of a fused layer, and for all
    experts: vLLM takes the first or the largest for all.
    """
    import torch

    if data.dtype == torch.float8_e8m0fnu:
        data.view(torch.uint8).fill_(_power_of_two(data.shape[-1] * _FP8_BLOCK))
        return
    size = unit(leaf, tensors)
    if leaf.endswith("input_scale"):
        data.fill_(_INPUT_SCALE)
        return
    if leaf.endswith("scale_2"):
        data.fill_(size / _NVFP4_BLOCK_SCALE)
        return
    if torch.finfo(data.dtype).bits < 16:
        size = _NVFP4_BLOCK_SCALE
    values = torch.empty(data.shape, dtype=torch.float32, device=data.device)
    data.copy_(values.uniform_(0.5 * size, 1.5 * size, generator=generator).to(data.dtype))


def _fill_integers(data: Any, leaf: str, generator: Any) -> None:
    """4-bit values, eight in an int32 or two in a byte, their zero points or E8M0 scales, and a table of experts."""
    import torch

    if leaf.endswith("qzeros"):
        data.fill_(_SYMMETRIC_ZERO_POINTS)
    elif leaf == "tid2eid":
        data.random_(0, _EXPERTS_BY_TOKEN, generator=generator)
    elif data.dtype == torch.uint8 and leaf.endswith("_scale"):
        data.fill_(_power_of_two(data.shape[-1] * _FP4_BLOCK) - _FP4_EXPONENT)
    elif data.dtype == torch.int32 and leaf.endswith(("qweight", "weight_packed")):
        for part in (
            data if data.dim() > 2 else (data,)
        ):  # an expert at a time: the terms below are as large as the part
            part.random_(-(2**31), 2**31 - 1, generator=generator)
            # 0 becomes 8, the zero point: else the mean of the weights is not zero, and every token comes out the same.
            some = part | ((part >> 1) & 0x77777777) | ((part >> 2) & 0x33333333) | ((part >> 3) & 0x11111111)
            part.bitwise_or_((~some & 0x11111111) << 3)
    elif data.dtype == torch.uint8 and leaf.endswith(("weight", "weight_packed")):
        data.random_(0, 256, generator=generator)


def fill(tensor: Any, name: str, owner: str, seed: int, tensors: Mapping[str, Any] | None = None) -> None:
    """Fill one tensor in place.

    `name` is its full name, `owner` the class name of the module that holds it, `tensors` all that the module holds, by
    their own names: a quantized weight's scale depends on the weight's number of inputs.
    """
    import torch

    if tensor.device.type == "meta" or tensor.numel() == 0:
        return
    data, leaf = tensor.data, name.rpartition(".")[2]
    generator = _generator(data.device, seed, name)
    if not data.is_floating_point():
        _fill_integers(data, leaf, generator)
    elif data.dtype == torch.float8_e8m0fnu or leaf.removeprefix(_expert_prefix(leaf)) in _SCALES:
        _fill_scale(data, leaf, generator, tensors or {})
    elif torch.finfo(data.dtype).bits < 16:
        for part in data if data.dim() > 2 else (data,):  # an expert at a time
            values = torch.empty(part.shape, dtype=torch.float16, device=data.device)
            part.copy_(values.normal_(0.0, 1.0, generator=generator).to(data.dtype))
    elif leaf == "A_log":
        data.uniform_(-4.0, 0.7, generator=generator)
    elif leaf == "dt_bias":
        data.normal_(0.0, 1.0, generator=generator)
    elif "Norm" in owner or "norm" in name.lower().rpartition(".")[0].rpartition(".")[2]:
        data.normal_(0.0 if "Gemma" in owner else 1.0, 0.1, generator=generator)
    elif "Embedding" in owner:
        data.normal_(0.0, 1.0, generator=generator)
    elif data.dim() >= 2:
        data.normal_(0.0, 1.0 / math.sqrt(data.shape[-1]), generator=generator)
    elif "scale" in leaf:
        data.fill_(1.0)
    else:
        data.normal_(0.0, 0.1, generator=generator)


def replace_dummy_weights(seed: int) -> None:
    """Make vLLM's dummy loader (0.19.0 to 0.33.0) fill tensors with `fill`. Call before the engine is built.

    Before 0.20.0 the weights of a layer that vLLM quantizes while it loads it are not filled.
    """
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    get_layer_tensors = dummy_loader.get_layer_tensors
    get_layerwise_info = getattr(dummy_loader, "get_layerwise_info", None)

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        with torch.no_grad():
            for prefix, layer in model.named_modules():
                owner = type(layer).__name__
                info = None if get_layerwise_info is None else get_layerwise_info(layer)
                if info is not None and info.can_load():
                    _quantize_online(self, layer, info, prefix, owner)
                    continue
                tensors = get_layer_tensors(layer)
                for leaf, tensor in tensors.items():
                    if leaf not in layer._non_persistent_buffers_set:
                        fill(tensor, f"{prefix}.{leaf}", owner, seed, tensors)

    def _quantize_online(loader: Any, layer: Any, info: Any, prefix: str, owner: str) -> None:
        """Online quantization: vLLM materializes the layer, asks for values, and quantizes at once."""
        kept, calls = dummy_loader.initialize_single_dummy_weight, [0]

        def initialize(tensor: Any, *_: Any, name: str | None = None, **__: Any) -> None:
            tensors = get_layer_tensors(layer)
            names = {id(value): key for key, value in tensors.items()}
            leaf = name or names.get(id(tensor)) or f"tensor{calls[0]}"
            calls[0] += 1
            fill(tensor, f"{prefix}.{leaf}", owner, seed, tensors)

        dummy_loader.initialize_single_dummy_weight = initialize
        try:
            loader._process_online_quant_layer(layer, info)
        finally:
            dummy_loader.initialize_single_dummy_weight = kept

    dummy_loader.DummyModelLoader.load_weights = load_weights


def checksum(model: Any) -> str:
    """One number over the bits of all parameters and buffers: equal in two processes that hold the same weights."""
    import torch

    total = 0
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach()
        if data.numel() == 0 or data.device.type == "meta":
            continue
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
        flat = (data.to(torch.int8) if data.dtype == torch.bool else data.contiguous().view(words)).flatten()
        part = sum(int(piece.sum(dtype=torch.int64)) for piece in flat.split(1 << 24))
        total = (total * 31 + zlib.crc32(name.encode()) + part) & 0xFFFFFFFFFFFFFFFF
    return f"{total:016x}"
