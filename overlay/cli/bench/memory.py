"""How much memory the engines will take, before any of them is started.

Weights and caches follow from the model's sizes. What a process needs beside them (CUDA's context, captured graphs,
activations of the largest prefill) is an allowance, on the safe side: on an H200 an engine of Qwen3.5-35B-A3B's shape with
12 layers was estimated at 35.3 GB and its allocator held 32.1 GB, with 24 layers 63.1 and 59.1. On a CPU (vLLM 0.32.0) the
peak of resident memory was 1.7 GiB of 2.3 estimated with the tiny shape, 3.6 of 3.8 with 1 GiB of weights that are all
embeddings, 2.6 of 3.2 with 0.7 GiB of linears.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlay.cli.bench.formats import FORMATS
from overlay.cli.bench.shapes import WEIGHT_FILES
from overlay.cli.checkpoint import EXPERT_COUNTS
from overlay.cli.failure import CommandError

if TYPE_CHECKING:
    from overlay.cli.bench.shapes import Model

GIB = 1 << 30
#: Bytes of a weight, an activation and a cached key or value: bfloat16.
WIDTH = 2
#: The context of a CUDA process with its libraries' workspaces, and the captured graphs.
PROCESS_BYTES = 2 * GIB
#: A process of vLLM's CPU build with what it starts for a moment: 1.7 GiB with a model of 2 MB (0.32.0, two threads).
CPU_PROCESS_BYTES = 2 * GIB
#: Cache blocks that vLLM keeps for itself, and rounding.
CACHE_SLACK = 1.15
LEAST_CACHE = 256 << 20


@dataclass(frozen=True)
class Load:
    """What an engine has to hold at once."""

    requests: int  #: running together
    request_tokens: int  #: the tokens of each of them
    prompt: int  #: the longest prompt, alone
    prefill: int  #: tokens of one step at most


@dataclass(frozen=True)
class Need:
    """Bytes that one engine takes on each of its GPUs."""

    weights: int
    cache: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.rest

    def as_dict(self) -> dict[str, int]:
        return {"weights": self.weights, "kv_cache": self.cache, "rest": self.rest, "total": self.total}


def need(model: Model, load: Load, tensor_parallel: int = 1, cpu: bool = False) -> Need:
    """The bytes of one engine per GPU; on a CPU its memory."""
    return Need(
        weights=_weights(model) // tensor_parallel,
        cache=cache_bytes(model, load, tensor_parallel),
        rest=(CPU_PROCESS_BYTES + _packed_head(model.text) if cpu else PROCESS_BYTES)
        + _activations(model.text, load, tensor_parallel),
    )


def largest_layers(
    model: Model, load: Load, arms: int, free: int, tensor_parallel: int = 1, cpu: bool = False
) -> int | None:
    """The most layers with which that many engines fit into `free` bytes; None where not even the fewest do."""
    if model.checkpoint is not None:
        return None
    for layers in range(model.layers - model.layers % model.pattern, 0, -model.pattern):
        if arms * need(model.with_layers(layers), load, tensor_parallel, cpu).total <= free:
            return layers
    return None


def check(
    model: Model, load: Load, arms: int, free: int, place: str, tensor_parallel: int = 1, cpu: bool = False
) -> Need:
    """The need of one engine. Raises CommandError, with what would fit, where `arms` engines do not fit into `free`."""
    one = need(model, load, tensor_parallel, cpu)
    if arms * one.total <= free:
        return one
    message = (
        f"{arms} engines of {model.name} with {model.layers} layers need about {_gib(arms * one.total)} GiB on {place}, "
        f"where {_gib(free)} GiB are free (each: weights {_gib(one.weights)}, KV cache {_gib(one.cache)} for "
        f"{load.requests} requests, rest {_gib(one.rest)})"
    )
    layers = largest_layers(model, load, arms, free, tensor_parallel, cpu)
    if layers is not None:
        raise CommandError(f"{message}; --layers {layers} would fit")
    raise CommandError(f"{message}; fewer --arms, smaller --batches or more --tensor-parallel take less")


def _gib(count: int) -> str:
    return f"{count / GIB:.1f}"


# ---------------------------------------------------------------- weights


def _weights(model: Model) -> int:
    if model.checkpoint is not None:
        files = {path for pattern in WEIGHT_FILES for path in model.checkpoint.glob(pattern)}
        return sum(path.stat().st_size for path in files)
    form = FORMATS[model.format]
    embeddings, projections, feed_forward = parameters_by_kind(model)
    return int(embeddings * WIDTH + projections * form.projections + feed_forward * form.feed_forward)


def parameters(model: Model) -> int:
    """The number of weights: projections, experts and embeddings; norms and biases are too small to matter."""
    return sum(parameters_by_kind(model))


def parameters_by_kind(model: Model) -> tuple[int, int, int]:
    """Weights of the embeddings, of attention and linear attention, and of experts or MLPs."""
    text = model.text
    linear = model.linear_layers()
    embeddings = text["vocab_size"] * text["hidden_size"] * (1 if text.get("tie_word_embeddings") else 2)
    attention = linear * (_linear_attention(text) if linear else 0) + (model.layers - linear) * _attention(text)
    dense = min(model.layers, text.get("first_k_dense_replace") or 0) if _experts(text) else model.layers
    mixtures = model.layers - dense
    # A configuration need not have the sizes of what it has none of.
    feed_forward = (dense * _mlp(text) if dense else 0) + (mixtures * _mixture(text) if mixtures else 0)
    return int(embeddings), int(attention), int(feed_forward)


def _packed_head(text: Mapping[str, Any]) -> int:
    """On a CPU vLLM keeps the output layer a second time, packed."""
    return int(text["vocab_size"] * text["hidden_size"] * WIDTH)


def _attention(text: Mapping[str, Any]) -> int:
    if text.get("kv_lora_rank"):
        return _latent_attention(text)
    head = _head(text)
    queries = text["num_attention_heads"] * head
    keys = _key_heads(text) * head
    gated = 2 if text.get("attn_output_gate") else 1
    return int(text["hidden_size"] * (gated * queries + 2 * keys + queries))


def _latent_attention(text: Mapping[str, Any]) -> int:
    """DeepSeek's: queries, keys and values by way of narrow ones, and the indexer where there is one."""
    hidden, heads, rope = text["hidden_size"], text["num_attention_heads"], text["qk_rope_head_dim"]
    latent, queries = text["kv_lora_rank"], heads * (text["qk_nope_head_dim"] + rope)
    narrow = text.get("q_lora_rank")
    indexers = text.get("index_n_heads") or 0
    index = text.get("index_head_dim") or 0
    return int(
        (hidden * narrow + narrow * (queries + indexers * index) if narrow else hidden * queries)
        + hidden * (latent + rope)
        + latent * heads * (text["qk_nope_head_dim"] + text["v_head_dim"])
        + heads * text["v_head_dim"] * hidden
        + hidden * (index + indexers)
    )


def _linear_attention(text: Mapping[str, Any]) -> int:
    key, value = _linear_sizes(text)
    narrow = 2 * text["linear_num_value_heads"]
    return int(text["hidden_size"] * (2 * key + 2 * value + narrow + value))


def _mlp(text: Mapping[str, Any]) -> int:
    return int(3 * text["hidden_size"] * text["intermediate_size"])


def _mixture(text: Mapping[str, Any]) -> int:
    hidden = text["hidden_size"]
    experts = _experts(text)
    shared = text.get("shared_expert_intermediate_size") or (
        (text.get("n_shared_experts") or 0) * text["moe_intermediate_size"]
    )
    return int(3 * hidden * (experts * text["moe_intermediate_size"] + shared) + hidden * experts)


def _experts(text: Mapping[str, Any]) -> int:
    return next((int(text[field]) for field in EXPERT_COUNTS if text.get(field)), 0)


def _head(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _key_heads(text: Mapping[str, Any]) -> int:
    return int(text.get("num_key_value_heads") or text["num_attention_heads"])


def _linear_sizes(text: Mapping[str, Any]) -> tuple[int, int]:
    key = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    return key, text["linear_num_value_heads"] * text["linear_value_head_dim"]


# ---------------------------------------------------------------- caches and activations


def cache_bytes(model: Model, load: Load, tensor_parallel: int = 1) -> int:
    """The cache that holds `load`: all requests decoding together, or the longest prompt.

    A request has one state per linear-attention layer, of one page. vLLM makes the pages of attention layers as large, so
    that even a short request takes a page of every layer.
    """
    text = model.text
    linear = model.linear_layers()
    attention = model.layers - linear
    token = _cached_bytes(text, tensor_parallel)
    page, block = token * 16, 16
    if linear:
        key, value = _linear_sizes(text)
        convolution = (2 * key + value) * (text["linear_conv_kernel_dim"] - 1) * WIDTH
        page = max(page, (state_bytes(text) + convolution) // tensor_parallel)
        block = math.ceil(page / token / 16) * 16
        page = block * token
    running = load.requests * (linear + attention * math.ceil(load.request_tokens / block))
    alone = linear + attention * math.ceil(load.prompt / block)
    return max(LEAST_CACHE, int(max(running, alone) * page * CACHE_SLACK))


def _cached_bytes(text: Mapping[str, Any], tensor_parallel: int) -> int:
    """What one layer keeps of a token on one GPU. Latent attention keeps one narrow row on each, an indexer one more."""
    if text.get("kv_lora_rank"):
        return int((text["kv_lora_rank"] + text["qk_rope_head_dim"] + (text.get("index_head_dim") or 0)) * WIDTH)
    return 2 * max(1, _key_heads(text) // tensor_parallel) * _head(text) * WIDTH


def state_bytes(text: Mapping[str, Any]) -> int:
    """The state of one request in one layer with linear attention; its convolution has a small one beside it."""
    width = 4 if text.get("mamba_ssm_dtype") == "float32" else WIDTH
    return int(_linear_sizes(text)[1] * text["linear_key_head_dim"] * width)


def _activations(text: Mapping[str, Any], load: Load, tensor_parallel: int) -> int:
    hidden = text["hidden_size"]
    wide = 0
    if "linear_num_value_heads" in text:
        key, value = _linear_sizes(text)
        wide = 6 * (2 * key + 2 * value)
    if _experts(text):
        wide += (text.get("num_experts_per_tok") or 1) * 2 * (2 * text["moe_intermediate_size"] + hidden)
    else:
        wide += 3 * text["intermediate_size"]
    per_token = WIDTH * (16 * hidden + wide // tensor_parallel)
    logits = 3 * 4 * load.requests * text["vocab_size"]
    return int(load.prefill * per_token + logits)


# ---------------------------------------------------------------- what is free


def gpus() -> list[tuple[int, str, int]]:
    """Index, name and free bytes of the GPUs here; empty where there is no NVIDIA GPU."""
    query = ["nvidia-smi", "--query-gpu=index,name,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [(int(index), name, int(free) << 20) for index, name, free in rows if free.isdigit()]


def visible(found: list[tuple[int, str, int]], setting: str | None) -> list[tuple[int, str, int]]:
    """Those of the GPUs that CUDA_VISIBLE_DEVICES leaves, where it names them by index; none where it is empty."""
    words = [word.strip() for word in (setting or "").split(",") if word.strip()]
    if setting is None or not all(word.isdigit() for word in words):
        return found
    by_index = {gpu[0]: gpu for gpu in found}
    return [by_index[int(word)] for word in words if int(word) in by_index]


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that Linux would give to new processes: what is available, or less where a container has a limit.

    `root` is the folder that holds proc and sys.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    if not available:
        raise CommandError("/proc/meminfo does not say how much memory is available")
    return min(available + list(_free_in_groups(root)))


#: Of a control group's memory, version 2 and 1: where it is, its limit, its use, and what of that the kernel takes back.
GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _free_in_groups(root: Path) -> Iterator[int]:
    """What this process's control groups leave, from its own up to the outermost that can be seen."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in GROUPS:
            continue
        place, limit, used, reclaimable = GROUPS[controllers]
        outermost = root / place
        # In a container the path may be the host's, and then only the outermost group is there.
        own = outermost / path.lstrip("/")
        for group in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no limit; the outermost may have none
                statistics = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                taken = int((group / used).read_text()) - int(statistics[reclaimable])
                yield max(0, int((group / limit).read_text()) - taken)
            if group == outermost:
                break
