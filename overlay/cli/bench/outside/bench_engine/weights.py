"""Random weights that matter, instead of vLLM's dummy ones.

`load_format="dummy"` fills every tensor with values below 0.001: every token comes out the same and a wrong result can
hide. Here every tensor gets values of a trained model's size, drawn from a generator that is seeded with the tensor's
name, so two processes hold the same bits. The values are there before vLLM repacks or quantizes them.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

#: int32 with eight 4-bit values of 7 and 8: the zero points of a symmetric GPTQ checkpoint.
_SYMMETRIC_ZERO_POINTS = 0x77777777


def _generator(device: Any, seed: int, name: str) -> Any:
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return generator


def fill(tensor: Any, name: str, owner: str, seed: int) -> None:
    """Fill one tensor in place. `name` is its full name, `owner` the class name of the module that holds it."""
    import torch

    if tensor.device.type == "meta" or tensor.numel() == 0:
        return
    data, leaf = tensor.data, name.rpartition(".")[2]
    generator = _generator(data.device, seed, name)
    if not data.is_floating_point():
        if leaf == "qweight" and data.dtype == torch.int32:
            data.random_(-(2**31), 2**31 - 1, generator=generator)
            # 0 becomes 8, the zero point: else the mean of the weights is not zero, and every token comes out the same.
            some = data | ((data >> 1) & 0x77777777) | ((data >> 2) & 0x33333333) | ((data >> 3) & 0x11111111)
            data |= (~some & 0x11111111) << 3
        elif leaf == "qzeros":
            data.fill_(_SYMMETRIC_ZERO_POINTS)
        return
    if torch.finfo(data.dtype).bits < 16:
        values = torch.empty(data.shape, dtype=torch.float16, device=data.device)
        data.copy_(values.normal_(0.0, 1.0, generator=generator).to(data.dtype))
    elif leaf == "A_log":
        data.uniform_(-4.0, 0.7, generator=generator)
    elif leaf == "dt_bias":
        data.normal_(0.0, 1.0, generator=generator)
    elif leaf == "scales":  # GPTQ: (input / group, output); a random 4-bit value minus 8 has a deviation of 4.6
        size = 1.0 / (4.6 * math.sqrt(data.shape[0] * 128))
        data.uniform_(0.5 * size, 1.5 * size, generator=generator)
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
    """Make vLLM's dummy loader (0.20.0 to 0.33.0) fill tensors with `fill`. Call before the engine is built."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader

    get_layerwise_info, get_layer_tensors = dummy_loader.get_layerwise_info, dummy_loader.get_layer_tensors

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        with torch.no_grad():
            for prefix, layer in model.named_modules():
                owner = type(layer).__name__
                if get_layerwise_info(layer).can_load():
                    _quantize_online(self, layer, prefix, owner, seed)
                    continue
                for leaf, tensor in get_layer_tensors(layer).items():
                    if leaf not in layer._non_persistent_buffers_set:
                        fill(tensor, f"{prefix}.{leaf}", owner, seed)

    def _quantize_online(loader: Any, layer: Any, prefix: str, owner: str, seed: int) -> None:
        """Online quantization: vLLM materializes the layer, asks for values, and quantizes at once."""
        kept, calls = dummy_loader.initialize_single_dummy_weight, [0]

        def initialize(tensor: Any, *_: Any, name: str | None = None, **__: Any) -> None:
            names = {id(value): key for key, value in get_layer_tensors(layer).items()}
            leaf = name or names.get(id(tensor)) or f"tensor{calls[0]}"
            calls[0] += 1
            fill(tensor, f"{prefix}.{leaf}", owner, seed)

        dummy_loader.initialize_single_dummy_weight = initialize
        try:
            loader._process_online_quant_layer(layer, get_layerwise_info(layer))
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
        part = sum(int(piece.sum(dtype=torch.int64)) for piece in flat.split(1 << 28))
        total = (total * 31 + zlib.crc32(name.encode()) + part) & 0xFFFFFFFFFFFFFFFF
    return f"{total:016x}"
