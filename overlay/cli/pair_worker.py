"""The process of ``check --measure``: pairs of vLLM's own linears, and the plan's own measurement of them.

It is one rank. A rank's shard is built as a whole linear of the shard's columns: vLLM divides the columns of such linears
and never their input, and its kernels are chosen by the columns of the shard. So the same kernel runs on the same weight.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import time
import types
from collections.abc import Sequence
from statistics import median
from typing import Any

from overlay.cli.bench.outside.bench_engine import weights
from overlay.cli.bench.outside.bench_engine.worker import EngineWorker

#: Far above the cache of any GPU.
COPIED_BYTES, COPIES = 512 << 20, 9


class Worker(EngineWorker):
    """Commands are the methods whose names begin with `do_`: first `open`, then `measure` for each group."""

    def __init__(self) -> None:
        super().__init__()
        self._context = contextlib.ExitStack()

    def do_open(self, model: str, sees: bool) -> dict[str, Any]:
        """Read a model's configuration as a server does. `model` is its folder, `sees` whether it has a vision part, which is not built."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader.utils import configure_quant_config, get_model_architecture

        arguments = {"language_model_only": True} if sees else {}
        engine = EngineArgs(model=model, load_format="dummy", skip_tokenizer_init=True, **arguments)
        self._config = engine.create_engine_config()
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._context.enter_context(set_current_vllm_config(self._config))
        folder = self._context.enter_context(tempfile.TemporaryDirectory())
        init_distributed_environment(1, 0, f"file://{os.path.join(folder, 'ranks')}", 0, "gloo")
        initialize_model_parallel()
        if self._config.quant_config is not None:
            # As vLLM's loader does: now it knows the model's names, and what is fused of which.
            architecture, _ = get_model_architecture(self._config.model_config)
            configure_quant_config(self._config.quant_config, architecture)
            architecture.__new__(architecture, vllm_config=self._config)
        if self._device.type == "cpu":
            return {"device": None, "bytes_per_second": None}
        return {"device": torch.cuda.get_device_name(), "bytes_per_second": self._bytes_per_second()}

    def do_measure(
        self, patch: str, layers: Sequence[str], hidden: int, main: Sequence[int], side: Sequence[int]
    ) -> dict[str, Any]:
        """Measure one kind of pair. On a CPU it is only built: then there are no rows."""
        from overlay.settings import Settings
        from overlay.start.import_hooks import fall_back_on_our_wrapt

        fall_back_on_our_wrapt()  # nothing is armed in this process
        from overlay.side_work import measure, pairs
        from overlay.side_work.adoption import StaysStock

        begin = time.perf_counter()
        declared = importlib.import_module(f"overlay.patches.{patch}.patch").PROJECTIONS
        sizes = pairs.captured_sizes(self._config, Settings())

        def made(layer: str) -> pairs.Pair:
            linears = {name: self._linear(f"{layer}.{name}", hidden, parts) for name, parts in columns.items()}
            stand_in = types.SimpleNamespace(prefix=layer, **linears)
            pair: pairs.Pair = declared.pair_of(stand_in, self._config, {n: sum(parts) for n, parts in columns.items()})
            return pair

        columns = {declared.main: main, declared.side: side}
        try:
            group = [made(layers[0])]
        except StaysStock as refused:
            return {"stock": str(refused)}
        if self._device.type == "cuda":
            count = measure.layers_for(pairs.weight_bytes(group[0]), len(layers), self._device)
            group += map(made, layers[1:count])
        rows = pairs.rows_of(group, sizes) if sizes else []
        return {
            "pair": group[0].name,
            "seconds": round(time.perf_counter() - begin, 2),
            "rows": [
                {"tokens": row.tokens, "us": row.microseconds, "strategy": row.strategy}
                for row in rows
                if row.microseconds
            ],
        }

    def _linear(self, name: str, hidden: int, parts: Sequence[int]) -> Any:
        """A linear as vLLM makes and loads it, with random weights."""
        import torch
        from vllm.model_executor.layers.linear import MergedColumnParallelLinear
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = self._config
        with set_default_torch_dtype(config.model_config.dtype), torch.no_grad():
            with self._device:
                linear = MergedColumnParallelLinear(
                    hidden, list(parts), bias=False, quant_config=config.quant_config, prefix=name
                )
            tensors = dict(linear.named_parameters())
            for leaf, tensor in tensors.items():
                weights.fill(tensor, f"{name}.{leaf}", "", 0, tensors)
            linear.quant_method.process_weights_after_loading(linear)
        return linear

    def _bytes_per_second(self) -> float:
        """What a copy within the GPU's memory reads and writes."""
        import torch

        source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        seconds = []
        for _ in range(COPIES):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000.0)
        return 2 * COPIED_BYTES / float(median(seconds))
