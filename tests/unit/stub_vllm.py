"""A vLLM of a few lines with the import order of the real one, for tests of the way in that need no engine.

The real package is used by the engine tests; this one can be given any shape, age or fault in a millisecond.
"""

from __future__ import annotations

import pathlib
import textwrap

REGISTRY = "model_executor/models/registry.py"
GDN_MODULE = "model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py"

FILES = {
    "__init__.py": """
        from .version import __version__
        import typing
        import vllm.env_override
        from vllm.logger import init_logger
        """,
    "version.py": "__version__ = '0.32.0+stub'\n",
    "env_override.py": """
        import os
        os.environ["SEEN_BY_ENVIRONMENT_MODULE"] = ",".join(m for m in ("transformers", "torch") if m in __import__("sys").modules)
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        """,
    "logger.py": """
        import logging, sys
        logging.getLogger("vllm").addHandler(logging.StreamHandler(sys.stderr))
        logging.getLogger("vllm").setLevel("INFO")
        logging.getLogger("vllm").propagate = False
        def init_logger(name):
            return logging.getLogger(name)
        """,
    "envs.py": "environment_variables = {}\n",
    "sampling_params.py": "from transformers import PreTrainedModel\n",
    # What says which models, adapters and runners a vLLM has.
    REGISTRY: """
        _MODELS = {"Qwen3NextForCausalLM": ("qwen3_next", "Qwen3NextForCausalLM")}
        ModelRegistry = dict(_MODELS)
        """,
    "engine/arg_utils.py": """
        class EngineArgs:
            model: str
        class AsyncEngineArgs(EngineArgs):
            enable_log_requests: bool
        """,
    "v1/worker/gpu_worker.py": """
        class Worker:
            model_runner: object
        def init_worker_distributed_environment(vllm_config):
            pass
        """,
    "v1/engine/core_client.py": """
        class EngineCoreClient:
            pass
        class DPLBAsyncMPClient(EngineCoreClient):
            pass
        """,
    "model_executor/__init__.py": "",
    "model_executor/layers/__init__.py": "",
    "model_executor/layers/mamba/__init__.py": "",
    "model_executor/layers/mamba/gdn/__init__.py": "",
    "model_executor/models/__init__.py": "",
    "model_executor/models/qwen3_next.py": "from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import *\n",
    GDN_MODULE: """
        class QwenGatedDeltaNetAttention:
            def forward_cuda(self, hidden_states):
                qkvz, _ = self.in_proj_qkvz(hidden_states)
                ba, _ = self.in_proj_ba(hidden_states)
                return qkvz, ba
        """,
}

#: Over FILES: a vLLM in which the overlay has nothing to do.
NOTHING: dict[str, str | None] = {
    GDN_MODULE: None,
    "model_executor/models/qwen3_next.py": None,
    REGISTRY: "_MODELS = {}\nModelRegistry = dict(_MODELS)\n",
}

TRANSFORMERS = "PreTrainedModel = object\n"


def write(
    folder: pathlib.Path, changes: dict[str, str | None] | None = None, transformers: str | None = TRANSFORMERS
) -> None:
    """Write the stub into `folder` as `vllm` (and `transformers`); None removes a file."""
    for name, text in {**FILES, **(changes or {})}.items():
        if text is None:
            continue
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    if transformers is not None:
        (folder / "transformers").mkdir(parents=True, exist_ok=True)
        (folder / "transformers" / "__init__.py").write_text(textwrap.dedent(transformers))
