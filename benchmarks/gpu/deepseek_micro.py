"""The input GEMMs of one DeepSeek-V4-Flash attention layer alone: vLLM's own linears, the overlay's own stage.

Three ways, each in a CUDA graph over several layers with weights of their own (together larger than the L2 cache):
`serial`, one stream; `stock`, as vLLM 0.20.0 has them in a layer with an indexer (the compressor's GEMM next to the indexer's two,
all after the first); `overlay`, all four at once. The results of all three are compared bit for bit.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import deepseek_model
from benchmarks.gpu.capture import capture, microseconds
from overlay.cli.bench import shapes
from overlay.cli.bench.outside.bench_engine import weights

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAYERS = 8
WAYS = ("serial", "stock", "overlay")


class Part(torch.nn.Module):
    """What carries linears under the names that upstream uses."""


def vllm_configuration(folder: Path) -> Any:
    """vLLM's configuration of the model, made as the engine makes it, for linears outside of an engine."""
    from vllm.engine.arg_utils import EngineArgs

    model = shapes.write(folder, deepseek_model.configuration(4))
    own = {"model": str(model), "load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 8}
    return EngineArgs(**own, **deepseek_model.ENGINE).create_engine_config()


def make_layer(ratio: int, number: int, config: Any) -> Any:
    """vLLM's linears of one layer, filled and processed as after loading."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear

    flash = deepseek_model.FLASH
    hidden, rank, head = flash["hidden_size"], flash["q_lora_rank"], flash["head_dim"]

    def compressor(columns: int, name: str) -> Part:
        part = Part()
        part.fused_wkv_wgate = MergedColumnParallelLinear(
            hidden, [columns // 2] * 2, bias=False, return_bias=False, quant_config=None, disable_tp=True, prefix=name
        )
        return part

    layer = Part()
    prefix = f"model.layers.{number}.attn"
    layer.q_lora_rank, layer.head_dim = rank, head
    layer.fused_wqa_wkv = MergedColumnParallelLinear(
        hidden,
        [rank, head],
        bias=False,
        quant_config=config.quant_config,
        prefix=f"{prefix}.fused_wqa_wkv",
        disable_tp=True,
    )
    layer.compressor = compressor(deepseek_model.KV_SCORE[ratio], f"{prefix}.compressor")
    layer.indexer = None
    if ratio == 4:
        layer.indexer = Part()
        layer.indexer.compressor = compressor(deepseek_model.INDEXER_KV_SCORE, f"{prefix}.indexer.compressor")
        layer.indexer.weights_proj = ReplicatedLinear(
            hidden, flash["index_n_heads"], bias=False, quant_config=None, prefix=f"{prefix}.indexer.weights_proj"
        )
    for name, module in layer.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            weights.fill(tensor, f"{prefix}.{name}.{leaf}", type(module).__name__, 7)
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    return layer


class Ways:
    """One layer's GEMMs in each of the three ways. Every way gives its results in the same order."""

    def __init__(self, layer: Any) -> None:
        from vllm.model_executor.layers.utils import cublas_gemm_bf16_bf16_fp32

        from overlay.patches.deepseek_v4.patch import Handover, InputGemms, answering_gemm
        from overlay.report.journal import PatchRecord
        from overlay.side_work.plan import Plan

        self.layer = layer
        self.record = PatchRecord()
        handover = Handover()
        plan = Plan("dual", 1 << 20, only_while_capturing=False)
        self.plain_gemm = cublas_gemm_bf16_bf16_fp32
        self.gemm = answering_gemm(handover, cublas_gemm_bf16_bf16_fp32)
        self.stage = InputGemms(layer, cublas_gemm_bf16_bf16_fp32, handover, plan, self.record)
        self.aux_stream = torch.cuda.Stream()
        self.events = (torch.cuda.Event(), torch.cuda.Event())
        self.results: list[torch.Tensor] = []

    def _compressor(self, states: torch.Tensor, gemm: Any) -> torch.Tensor:
        return gemm(states, self.layer.compressor.fused_wkv_wgate.weight)

    def _indexer(self, states: torch.Tensor, gemm: Any) -> list[torch.Tensor]:
        indexer = self.layer.indexer
        if indexer is None:
            return []
        score = gemm(states, indexer.compressor.fused_wkv_wgate.weight)
        return [score, indexer.weights_proj(states)[0]]

    def serial(self, states: torch.Tensor) -> list[torch.Tensor]:
        qr_kv, _ = self.layer.fused_wqa_wkv(states)
        return [qr_kv, *self._indexer(states, self.plain_gemm), self._compressor(states, self.plain_gemm)]

    def stock(self, states: torch.Tensor) -> list[torch.Tensor]:
        from vllm.utils.multi_stream_utils import maybe_execute_in_parallel

        qr_kv, _ = self.layer.fused_wqa_wkv(states)
        if self.layer.indexer is None:
            return [qr_kv, self._compressor(states, self.plain_gemm)]
        indexer, compressor = maybe_execute_in_parallel(
            lambda: self._indexer(states, self.plain_gemm),
            lambda: self._compressor(states, self.plain_gemm),
            *self.events,
            self.aux_stream,
        )
        return [qr_kv, *indexer, compressor]

    def overlay(self, states: torch.Tensor) -> list[torch.Tensor]:
        self.stage.attend(self.layer, self._attention, states, None, None)
        return self.results

    def _attention(self, layer: Any, states: torch.Tensor, qr: torch.Tensor, kv: torch.Tensor, *_: Any) -> None:
        """Stands for upstream's attention_impl: asks for the three results, each once."""
        qr_kv = torch.as_strided(qr, (qr.shape[0], qr.shape[1] + kv.shape[1]), qr.stride())  # the GEMM's own result
        self.results = [qr_kv, *self._indexer(states, self.gemm), self._compressor(states, self.gemm)]


def measure(ratio: int, config: Any, rounds: int) -> list[dict[str, Any]]:
    """Microseconds per layer of each way and batch size, for layers of one compression ratio."""
    from vllm.config import set_current_vllm_config

    device = torch.device("cuda")
    with set_current_vllm_config(config), torch.device(device):
        ways = [Ways(make_layer(ratio, index, config)) for index in range(LAYERS)]
    rows = []
    for tokens in TOKENS:
        states = torch.zeros(tokens, deepseek_model.FLASH["hidden_size"], device=device, dtype=torch.bfloat16)
        generator = torch.Generator(device=device).manual_seed(tokens)
        graphs, results = {}, {}
        for way in WAYS:
            calls = [functools.partial(getattr(one, way), states) for one in ways]
            graphs[way], results[way] = capture(lambda calls=calls: [call() for call in calls])
        different = dict.fromkeys(WAYS, 0)
        for _ in range(rounds):
            states.normal_(generator=generator)
            kept: dict[str, list[torch.Tensor]] = {}
            for way in WAYS:
                graphs[way].replay()
                kept[way] = [tensor.clone() for layer in results[way] for tensor in layer]
            for way in WAYS:
                pairs = zip(kept["serial"], kept[way], strict=True)
                different[way] += sum(not torch.equal(left, right) for left, right in pairs)
        nothing = any(not tensor.count_nonzero() for tensor in kept["serial"])
        times = {way: time / LAYERS for way, time in microseconds(graphs, replays=40).items()}
        rows.append({"tokens": tokens, **times, "different": different, "a result of zeros": nothing})
        print(
            f"ratio {ratio}, {tokens:5d} tokens: "
            + " ".join(f"{way} {times[way]:6.1f}" for way in WAYS)
            + f" us per layer, overlay/stock {times['overlay'] / times['stock']:.3f}, different {different}",
            flush=True,
        )
    return rows


def run(work: Path) -> dict[str, Any]:
    """Everything, in a process of its own."""
    import vllm
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    torch.set_default_dtype(torch.bfloat16)
    config = vllm_configuration(work / "models" / "micro")
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config):
        address = f"file://{work / 'micro-rendezvous'}"
        (work / "micro-rendezvous").unlink(missing_ok=True)
        init_distributed_environment(1, 0, address, 0)
        ensure_model_parallel_initialized(1, 1)
        with torch.device("cuda"):
            probe = make_layer(4, 99, config)
    method = probe.fused_wqa_wkv.quant_method
    kernel = getattr(method, "fp8_linear", None)
    found: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "fused_wqa_wkv": f"{type(method).__name__} with {type(kernel).__name__}",
        "sizes": {"hidden": 4096, "qr_kv": 1536, "kv_score": deepseek_model.KV_SCORE, "weights": 64, "indexer": 512},
        "layers": LAYERS,
    }
    print(found, flush=True)
    for ratio in (4, 128):
        found[f"ratio {ratio}"] = measure(ratio, config, rounds=20)
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(json.dumps(run(target.parent)))
    sys.stdout.flush()
    os._exit(0)
