"""Does it pay to hide the z part of a GDN layer's input projection under the convolution and the recurrence?

    cd benchmarks && python3 -m gpu.z_overlap --out z.json       # needs a GPU and vLLM; about a minute
    cd benchmarks && python3 -m gpu.z_overlap --dry-run --out z.json    # CPU, stand-ins for the kernels: a test of this script

z is not needed before the norm after the core attention, so its GEMM need not be done when the convolution starts. This
measures the decode stage of GDN layers (input projections, convolution, recurrence, gated norm, output projection) in one
CUDA graph over layers with weights of their own, together larger than the L2 cache, with the kernels of the vLLM that is
installed, in the arrangements of `ARRANGEMENTS`. `z_omitted` leaves the GEMM of z out altogether: no arrangement can be
faster. The graphs take turns, round by round; a ratio is the median of the rounds' ratios to `dual`.

A stage is only part of a step. `step_gain_percent` is what a whole decode step would gain: the time saved in three of
four layers, over the time of a layer. That time comes from `--step-us`, else, for the shape that was measured in an
engine, from benchmarks/results, else from a lower bound (the stage, and the weights that the rest of the layer has to
read at the memory's peak rate), which makes the gain an upper bound. Times are microseconds per layer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, silu, softplus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

MAIN, SIDE, OWN = "main", "side", "own"
#: vLLM pads with block 0, so the slots of real requests begin at 1.
FIRST_SLOT = 1
CONVOLUTION_WIDTH = 4
#: Three of four layers of Qwen3-Next and Qwen3.5 are GDN layers.
GDN_SHARE = 0.75
#: Peak rate of an H200's memory, bytes per microsecond.
PEAK_BYTES = 4.8e6
TOKENS = (1, 2, 4, 8, 16, 32, 64)
#: The gain of a whole decode step from which on the arrangement would be worth its code, in percent.
TARGET_PERCENT = 3.0
RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Mlp:
    """The MLP after the attention, for the lower bound of a layer's time; dense where `experts` is 0."""

    intermediate: int
    experts: int = 0
    chosen: int = 0
    shared: int = 0

    def weight_bytes(self, hidden: int, tokens: int, shards: int) -> float:
        """bf16 bytes that a step reads: of experts, those that tokens with independent choices are expected to hit."""
        hit = self.experts * (1.0 - (1.0 - self.chosen / self.experts) ** tokens) if self.experts else 1.0
        columns = 3 * (hit * self.intermediate + self.shared) / shards + self.experts
        return 2.0 * hidden * columns


@dataclass(frozen=True)
class Shape:
    """One GDN layer, per tensor-parallel shard. Columns of the projection in the order of Qwen3.5: q, k, v, z."""

    name: str
    hidden: int
    key_heads: int
    value_heads: int
    mlp: Mlp
    shards: int = 1
    head: int = 128

    @property
    def qkv(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.head

    @property
    def z(self) -> int:
        return self.value_heads * self.head

    @property
    def ba(self) -> int:
        return 2 * self.value_heads


_MOE = Mlp(intermediate=512, experts=256, chosen=8, shared=512)
SHAPES = (
    Shape("35b-tp1", 2048, 16, 32, _MOE),
    Shape("27b-tp1", 5120, 16, 48, Mlp(intermediate=17408)),
    Shape("35b-tp4", 2048, 4, 8, _MOE, shards=4),
)
#: The shape that benchmarks/results has decode steps of.
MEASURED = SHAPES[0].name
TINY = (Shape("tiny", 32, 2, 4, Mlp(intermediate=64), head=8),)


@dataclass(frozen=True)
class Arrangement:
    """Where and when the two small GEMMs of a stage run. `split`: the weights of qkv and z are two GEMMs."""

    what: str
    split: bool = True
    ba: str = SIDE
    z: str | None = None
    after_qkv: bool = False
    low_priority: bool = False


ARRANGEMENTS = {
    "serial": Arrangement("stock's order on one stream", split=False, ba=MAIN),
    "dual": Arrangement("the overlay: ba next to qkvz, joined before the convolution", split=False),
    "dual_split": Arrangement("as dual, z as a GEMM of its own after qkv: what the split costs", z=MAIN),
    "z_beside": Arrangement("z behind ba on one auxiliary stream, joined before the norm", z=SIDE),
    "z_two_streams": Arrangement("ba and z on an auxiliary stream each", z=OWN),
    "z_after": Arrangement("z begins when qkv is done, on ba's stream", z=SIDE, after_qkv=True),
    "z_beside_low": Arrangement("as z_two_streams, z at the lowest priority", z=OWN, low_priority=True),
    "z_after_low": Arrangement(
        "z begins when qkv is done, at the lowest priority", z=OWN, after_qkv=True, low_priority=True
    ),
    "z_omitted": Arrangement("bound: the GEMM of z is not run at all"),
}
CANDIDATES = ("z_beside", "z_two_streams", "z_after", "z_beside_low", "z_after_low")
BASE, REFERENCE, BOUND = "dual", "serial", "z_omitted"

#: What has to be done before a piece of a stage may begin.
NEEDS = {
    "gates": {"ba"},
    "convolution": {"qkv"},
    "recurrence": {"convolution", "gates", "buffer"},
    "norm": {"recurrence", "z"},
    "output": {"norm", "qkv", "z", "ba"},
}


class CudaLanes:
    """Lanes are streams, marks are events. Kernels keep the priority of the stream on which they were captured."""

    def __init__(self, low_priority: bool) -> None:
        priority = -1 if low_priority else 0
        self.streams = {lane: torch.cuda.Stream(priority=priority) for lane in (MAIN, SIDE)}
        self.streams[OWN] = torch.cuda.Stream(priority=0)

    def begin(self) -> torch.cuda.Event:
        return self.mark(MAIN)

    def mark(self, lane: str) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=False)
        event.record(self.streams[lane])
        return event

    def wait(self, lane: str, mark: torch.cuda.Event) -> None:
        self.streams[lane].wait_event(mark)

    def run(self, lane: str, piece: str, work: Callable[[], Any]) -> Any:
        with torch.cuda.stream(self.streams[lane]):
            return work()


class CheckedLanes:
    """For a machine without a GPU: runs everything at once, and raises where a wait is missing.

    Each lane knows the pieces of this stage that are certainly done when its next piece begins: its own, and those of
    the marks it has waited for. An auxiliary lane that knows nothing has not been forked.
    """

    def __init__(self) -> None:
        self.known: dict[str, set[str]] = {}
        self.order: list[tuple[str, str]] = []

    def begin(self) -> frozenset[str]:
        self.known = {MAIN: {"start"}, SIDE: set(), OWN: set()}
        self.order = []
        return self.mark(MAIN)

    def mark(self, lane: str) -> frozenset[str]:
        return frozenset(self.known[lane])

    def wait(self, lane: str, mark: frozenset[str]) -> None:
        self.known[lane] |= mark

    def run(self, lane: str, piece: str, work: Callable[[], Any]) -> Any:
        missing = {"start", *NEEDS.get(piece, ())} - self.known[lane]
        if missing:
            raise RuntimeError(f"{piece} on {lane} does not wait for {sorted(missing)}")
        self.known[lane].add(piece)
        self.order.append((lane, piece))
        return work()


# The kernels: stand-ins in plain torch, which say what is expected of a kernel, and those of the installed vLLM.


def plain_convolution(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """One step of a causal depthwise convolution with SiLU. x (N, channels), state (slots, channels, width - 1)."""
    index = slots.long()
    window = torch.cat((state[index], x.unsqueeze(-1)), dim=-1).float()
    state[index] = window[..., 1:].to(state.dtype)
    return silu((window * weight.float()).sum(-1)).to(x.dtype)


def plain_recurrence(
    mixed: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """One step of the gated delta rule. mixed (N, q + k + v), state (slots, value heads, v, k), out (N, 1, value heads, v)."""
    index = slots.long()
    count, _, heads, width = out.shape
    keys = (mixed.shape[1] - heads * width) // 2
    query, key, value = mixed.float().split([keys, keys, heads * width], dim=-1)
    depth = state.shape[-1]
    repeats = heads * depth // keys
    query, key = (
        torch.nn.functional.normalize(part.reshape(count, -1, depth), dim=-1).repeat_interleave(repeats, dim=1)
        for part in (query, key)
    )
    decay = torch.exp(-torch.exp(a_log.float()) * softplus(a.float() + dt_bias.float()))
    memory = state[index].float() * decay[..., None, None]
    recalled = torch.einsum("nhvk,nhk->nhv", memory, key)
    correction = (value.reshape(count, heads, width) - recalled) * torch.sigmoid(b.float())[..., None]
    memory = memory + correction[..., None] * key[..., None, :]
    state[index] = memory.to(state.dtype)
    out.copy_(torch.einsum("nhvk,nhk->nhv", memory, query * depth**-0.5).unsqueeze(1))


def plain_norm(core: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dimension with weight one, times SiLU of z. Both (N, value heads, width)."""
    wide = core.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * silu(z.float())).to(core.dtype)


def _linear_attention_ops() -> tuple[Any, bool]:
    """vLLM's module of flash-linear-attention kernels, and whether this is the newer of its two places."""
    try:
        return importlib.import_module("vllm.third_party.flash_linear_attention.ops"), True
    except ImportError:
        return importlib.import_module("vllm.model_executor.layers.fla.ops"), False


def vllm_convolution() -> Callable[..., torch.Tensor]:
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

    def run(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return causal_conv1d_update(x, state, weight, None, "silu", conv_state_indices=slots, validate_data=False)

    return run


def vllm_packed_recurrence() -> Callable[..., None]:
    kernel = _linear_attention_ops()[0].fused_recurrent_gated_delta_rule_packed_decode

    def run(
        mixed: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        a_log: torch.Tensor,
        dt_bias: torch.Tensor,
        state: torch.Tensor,
        out: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        kernel(
            mixed_qkv=mixed,
            a=a,
            b=b,
            A_log=a_log,
            dt_bias=dt_bias,
            scale=state.shape[-1] ** -0.5,
            initial_state=state,
            out=out,
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )

    return run


def vllm_unpacked_recurrence() -> Callable[..., None]:
    """What vLLM runs where its packed decode is switched off: q, k and v are copied first."""
    kernel = _linear_attention_ops()[0].fused_sigmoid_gating_delta_rule_update
    starts: dict[int, torch.Tensor] = {}

    def run(
        mixed: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        a_log: torch.Tensor,
        dt_bias: torch.Tensor,
        state: torch.Tensor,
        out: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        count, _, heads, width = out.shape
        if count not in starts:  # made by the warm-up, outside capture
            starts[count] = torch.arange(count + 1, device=out.device, dtype=torch.int32)
        depth = state.shape[-1]
        keys = (mixed.shape[1] - heads * width) // 2
        query, key, value = mixed.split([keys, keys, heads * width], dim=-1)
        result, _ = kernel(
            A_log=a_log,
            a=a,
            b=b,
            dt_bias=dt_bias,
            q=query.reshape(1, count, -1, depth).contiguous(),
            k=key.reshape(1, count, -1, depth).contiguous(),
            v=value.reshape(1, count, heads, width).contiguous(),
            initial_state=state,
            inplace_final_state=True,
            cu_seqlens=starts[count],
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )
        out.copy_(result.reshape(out.shape))

    return run


def vllm_compiled_norm() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """vLLM's norm in plain torch through Inductor, which is what its compiled models run.

    The older release folds tokens and heads into one dimension first, which makes Inductor copy z; the newer does not.
    """
    import torch._dynamo
    import torch._inductor.config
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNormGated

    newer = _linear_attention_ops()[1]
    torch._inductor.config.compile_threads = 1  # a pool of compile processes starts slower than these few compiles
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    with set_current_vllm_config(VllmConfig()):
        module = RMSNormGated(
            128, eps=1e-6, norm_before_gate=True, activation="silu", device=torch.device("cuda"), dtype=torch.bfloat16
        )

    def normalize(core: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if newer:
            return module.forward_native(core, z)
        return module.forward_native(core.reshape(-1, core.shape[-1]), z.reshape(-1, z.shape[-1])).reshape(core.shape)

    compiled = torch.compile(normalize, fullgraph=True)

    def run(core: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        # As in vLLM, one kernel for every number of tokens but 1, which torch always compiles for itself.
        torch._dynamo.maybe_mark_dynamic(core, 0)
        torch._dynamo.maybe_mark_dynamic(z, 0)
        return compiled(core, z)

    return run


def vllm_triton_norm() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What vLLM's norm runs outside a compiled model."""
    function = importlib.import_module(_linear_attention_ops()[0].__name__ + ".layernorm_guard").rmsnorm_fn
    weight = torch.ones(128, device="cuda", dtype=torch.bfloat16)

    def run(core: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return function(core, weight, None, z=z, eps=1e-6, norm_before_gate=True, activation="silu")

    return run


@dataclass
class Kernels:
    """The three kernels of a stage, and where each comes from."""

    convolution: Callable[..., torch.Tensor] = plain_convolution
    recurrence: Callable[..., None] = plain_recurrence
    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = plain_norm


def _attempt(
    piece: str,
    makers: Iterable[Callable[[], Callable[..., Any]]],
    sample: Callable[[Callable[..., Any]], torch.Tensor],
    expected: torch.Tensor,
) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """The first kernel that can be imported and called on a sample; what went wrong with the others; its largest difference."""
    failures: dict[str, str] = {}
    for maker in makers:
        try:
            kernel = maker()
            result = sample(kernel)
            torch.cuda.synchronize()
        except Exception as error:
            failures[maker.__name__] = f"{type(error).__name__}: {error}"[:600]
            print(f"{piece}: {maker.__name__} cannot be used: {failures[maker.__name__]}", flush=True)
            continue
        difference = float((result.float() - expected.float()).abs().max())
        return kernel, {"used": maker.__name__, "difference": difference, "failures": failures}
    print(f"{piece}: NOT vLLM's kernel but plain torch, several kernels: its times mean little", flush=True)
    return None, {"used": "plain torch", "difference": 0.0, "failures": failures}


def choose_kernels(device: torch.device) -> tuple[Kernels, dict[str, Any]]:
    """vLLM's kernels, each called on a sample and compared with plain torch; a named substitute where one fails."""
    count, heads, width = 3, 4, 128
    bfloat, single = {"device": device, "dtype": torch.bfloat16}, {"device": device, "dtype": torch.float32}
    slots = torch.arange(FIRST_SLOT, count + FIRST_SLOT, device=device, dtype=torch.int32)
    channels = (2 * 2 + heads) * width
    x, weight = torch.randn(count, channels, **bfloat), torch.randn(channels, CONVOLUTION_WIDTH, **bfloat)
    convolution_state = torch.randn(count + 1, CONVOLUTION_WIDTH - 1, channels, **bfloat)
    gates = torch.randn(2, count, heads, **bfloat)
    a_log, dt_bias = torch.randn(heads, **single), torch.randn(heads, **bfloat)
    state = torch.randn(count + 1, heads, width, width, **single)
    core, z = torch.randn(count, heads, width, **bfloat), torch.randn(count, 2 * heads, width, **bfloat)[:, heads:]

    def convolve(kernel: Callable[..., torch.Tensor]) -> torch.Tensor:
        return kernel(x.clone(), convolution_state.clone().transpose(1, 2), weight, slots)

    def recur(kernel: Callable[..., None]) -> torch.Tensor:
        out = torch.zeros(count, 1, heads, width, **bfloat)
        kernel(x, gates[1], gates[0], a_log, dt_bias, state.clone(), out, slots)
        return out

    kernels, found = Kernels(), {}
    sources = (
        ("convolution", (vllm_convolution,), convolve),
        ("recurrence", (vllm_packed_recurrence, vllm_unpacked_recurrence), recur),
        ("norm", (vllm_compiled_norm, vllm_triton_norm), lambda kernel: kernel(core, z)),
    )
    for piece, makers, sample in sources:
        kernel, found[piece] = _attempt(piece, makers, sample, sample(getattr(kernels, piece)))
        if kernel is not None:
            setattr(kernels, piece, kernel)
        print(f"{piece}: {found[piece]['used']}, largest difference {found[piece]['difference']:.4f}", flush=True)
    return kernels, found


class Layer:
    """Weights and state of one GDN layer. qkv and z are views of the weight of qkvz."""

    def __init__(self, shape: Shape, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        def weights(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5

        self.shape = shape
        self.qkvz = weights(shape.qkv + shape.z, shape.hidden)
        self.qkv, self.z = self.qkvz.split([shape.qkv, shape.z])
        self.ba = weights(shape.ba, shape.hidden)
        self.output = weights(shape.hidden, shape.z)
        self.convolution = weights(shape.qkv, CONVOLUTION_WIDTH)
        self.a_log = torch.rand(shape.value_heads, device=device)
        self.dt_bias = torch.ones(shape.value_heads, device=device, dtype=dtype)
        # Laid out as in vLLM's cache: positions before channels; the kernels take channels before positions.
        self.convolution_state = torch.empty(
            slots, CONVOLUTION_WIDTH - 1, shape.qkv, device=device, dtype=dtype
        ).transpose(1, 2)
        self.state = torch.empty(slots, shape.value_heads, shape.head, shape.head, device=device)


def reset(layers: Sequence[Layer]) -> None:
    """The same states as after every other reset, so that two arrangements can be compared."""
    generator = torch.Generator(layers[0].state.device).manual_seed(1)
    for layer in layers:
        layer.convolution_state.normal_(generator=generator)
        layer.state.normal_(std=0.1, generator=generator)


def stage(
    layer: Layer,
    x: torch.Tensor,
    slots: torch.Tensor,
    spare_z: torch.Tensor,
    how: Arrangement,
    lanes: CudaLanes | CheckedLanes,
    kernels: Kernels,
) -> torch.Tensor:
    """The decode stage of one layer. x (N, hidden), slots (N,), spare_z (N, z) for `z_omitted`; gives (N, hidden).

    Memory: see overlay/streams.py. Everything that an auxiliary lane allocates is read on the main one before this
    returns, and the next stage begins with a wait for the main lane.
    """
    shape, count = layer.shape, x.shape[0]
    start = lanes.begin()
    done: dict[str, Any] = {}

    def launch(piece: str, lane: str, after: Any, weight: torch.Tensor) -> torch.Tensor:
        if lane != MAIN:
            lanes.wait(lane, after)
        result = lanes.run(lane, piece, lambda: linear(x, weight))
        done[piece] = lanes.mark(lane)
        return result

    def join(piece: str, lane: str) -> None:
        if lane != MAIN:
            lanes.wait(MAIN, done[piece])

    ba = z = None
    if how.ba != MAIN:
        ba = launch("ba", how.ba, start, layer.ba)
    if how.z in (SIDE, OWN) and not how.after_qkv:
        z = launch("z", how.z, start, layer.z)
    mixed = launch("qkv", MAIN, start, layer.qkv if how.split else layer.qkvz)
    if not how.split:
        mixed, z = mixed.split([shape.qkv, shape.z], dim=-1)
    if how.z is None:
        z = lanes.run(MAIN, "z", lambda: spare_z if how.split else z)
    elif z is None:
        z = launch("z", how.z, done["qkv"], layer.z)
    if ba is None:
        ba = launch("ba", MAIN, start, layer.ba)

    join("ba", how.ba)
    # One copy of b and a, and the cleared buffer: one kernel each, as in the compiled model.
    pairs = ba.view(count, 2, shape.value_heads).transpose(0, 1)
    gates = lanes.run(MAIN, "gates", lambda: pairs.clone(memory_format=torch.contiguous_format))
    core = lanes.run(
        MAIN, "buffer", lambda: torch.zeros(count, shape.value_heads, shape.head, device=x.device, dtype=x.dtype)
    )
    mixed = lanes.run(
        MAIN, "convolution", lambda: kernels.convolution(mixed, layer.convolution_state, layer.convolution, slots)
    )
    lanes.run(
        MAIN,
        "recurrence",
        lambda: kernels.recurrence(
            mixed, gates[1], gates[0], layer.a_log, layer.dt_bias, layer.state, core.unsqueeze(1), slots
        ),
    )
    join("z", how.z or MAIN)
    gate = z.view(count, shape.value_heads, shape.head)
    normed = lanes.run(MAIN, "norm", lambda: kernels.norm(core, gate))
    return lanes.run(MAIN, "output", lambda: linear(normed.flatten(1), layer.output))


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median and its distribution-free interval: the order statistics that enclose it at the given confidence."""
    ordered = sorted(values)
    count = len(ordered)
    tail, below = 0.0, 0
    while below < count // 2:
        tail += math.comb(count, below) / 2.0**count
        if tail > (1.0 - confidence) / 2.0:
            break
        below += 1
    edge = max(below - 1, 0)
    return statistics.median(ordered), ordered[edge], ordered[count - 1 - edge]


def layer_times(version: str, given: Mapping[tuple[str, int], float]) -> dict[tuple[str, int], tuple[float, str]]:
    """Microseconds of a whole layer by shape and number of tokens, and where the number is from.

    The given ones first, then those of the decode steps in benchmarks/results for this release: the faster of its two
    sides. With few tokens that step is partly the host's time, so the gain there is for the step as it was measured.
    """
    path = RESULTS / f"h200-vllm-{version}-24-layers" / "results.json"
    found: dict[tuple[str, int], tuple[float, str]] = {}
    if path.is_file():
        results = json.loads(path.read_text())
        for row in results["decode"]:
            step = min(row["stock"], row["overlay"])
            found[MEASURED, row["requests"]] = (step * 1e6 / int(results["arguments"]["layers"]), "engine")
    found.update({key: (value, "given") for key, value in given.items()})
    return found


def step_gain(
    shape: Shape, row: Mapping[str, Any], times: Mapping[tuple[str, int], tuple[float, str]]
) -> dict[str, Any]:
    """What a whole decode step gains in percent: the best candidate with its interval, and the bound of all candidates."""
    base, ratios = row["us"][BASE], row["ratio"]
    best = min((name for name in CANDIDATES if name in ratios), key=lambda name: ratios[name][0])
    rest = shape.mlp.weight_bytes(shape.hidden, row["tokens"], shape.shards) / PEAK_BYTES
    layer, source = times.get((shape.name, row["tokens"]), (GDN_SHARE * base + rest, "lower bound"))

    def percent(ratio: float) -> float:
        return round(100.0 * GDN_SHARE * base * (1.0 - ratio) / layer, 2)

    median, low, high = ratios[best]
    return {
        "best": best,
        "layer_us": round(layer, 1),
        "layer_us_from": source,
        "step_gain_percent": percent(median),
        "step_gain_interval": [percent(high), percent(low)],
        "step_gain_bound_percent": percent(ratios[BOUND][0]),
        "pays_below_layer_us": round(max(0.0, 100.0 * GDN_SHARE * base * (1.0 - median) / TARGET_PERCENT), 1),
    }


def _work(
    name: str, layers: Sequence[Layer], inputs: tuple[torch.Tensor, ...], lanes: Mapping[bool, Any], kernels: Kernels
) -> Callable[[], list[torch.Tensor]]:
    how = ARRANGEMENTS[name]
    return lambda: [stage(layer, *inputs, how, lanes[how.low_priority], kernels) for layer in layers]


def _capture(work: Callable[[], list[torch.Tensor]], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Any]:
    with torch.cuda.stream(stream):  # compiles kernels, and gives each stream its library workspaces
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = work()
    return graph, result


def _replays(graphs: Mapping[str, torch.cuda.CUDAGraph], rounds: int, layers: int) -> dict[str, list[float]]:
    """Microseconds per layer, round by round. Who is first changes from round to round."""
    names = list(graphs)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for index in range(rounds + 3):
        torch.cuda._sleep(6_000_000)  # lets the host get ahead, so that no launch is waited for
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            if index >= 3:
                events[name].append((begin, end))
        if index % 10 == 9:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) * 1000.0 / layers for begin, end in all_] for name, all_ in events.items()}


def _compare(outputs: Mapping[str, list[torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Against stock's order: layers whose output differs in any bit, and the largest difference; the bound has none."""
    found = {}
    for name, result in outputs.items():
        if name in (REFERENCE, BOUND):
            continue
        pairs = list(zip(outputs[REFERENCE], result, strict=True))
        found[name] = {
            "layers_different": sum(not torch.equal(old, new) for old, new in pairs),
            "largest": max(float((old.float() - new.float()).abs().max()) for old, new in pairs),
        }
    return found


def measure(
    shape: Shape,
    tokens: int,
    layers: Sequence[Layer],
    lanes: Mapping[bool, Any],
    kernels: Kernels,
    rounds: int,
) -> dict[str, Any]:
    """All arrangements at one number of tokens: times on a GPU (else none), and the outputs compared."""
    device, dtype = layers[0].qkvz.device, layers[0].qkvz.dtype
    slots = torch.arange(FIRST_SLOT, tokens + FIRST_SLOT, device=device, dtype=torch.int32)
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    inputs = (x, slots, torch.randn(tokens, shape.z, device=device, dtype=dtype))
    reset(layers)
    works = {name: _work(name, layers, inputs, lanes, kernels) for name in ARRANGEMENTS}
    row: dict[str, Any] = {"shape": shape.name, "tokens": tokens, "layers": len(layers)}
    if device.type == "cuda":
        torch.cuda.synchronize()
        graphs = {}
        for name, work in works.items():
            try:
                graphs[name] = _capture(work, lanes[ARRANGEMENTS[name].low_priority].streams[MAIN])
            except Exception as error:
                if name not in CANDIDATES:
                    raise
                row.setdefault("failures", {})[name] = f"{type(error).__name__}: {error}"[:600]
                print(f"{shape.name} N={tokens}: {name} cannot be captured: {row['failures'][name]}", flush=True)
        times = _replays({name: graph for name, (graph, _) in graphs.items()}, rounds, len(layers))
        row["us"] = {name: round(statistics.median(values), 3) for name, values in times.items()}
        row["ratio"] = {
            name: [
                round(part, 5) for part in interval([new / old for new, old in zip(values, times[BASE], strict=True)])
            ]
            for name, values in times.items()
        }
    outputs = {}
    for name, work in works.items():
        if name in row.get("failures", ()):
            continue
        reset(layers)
        if device.type == "cuda":
            torch.cuda.synchronize()
            graphs[name][0].replay()
            torch.cuda.synchronize()
            outputs[name] = [output.clone() for output in graphs[name][1]]
        else:
            outputs[name] = work()
    row["against_serial"] = _compare(outputs)
    row["finite"] = all(bool(torch.isfinite(output).all()) for result in outputs.values() for output in result)
    whole = [linear(x, layer.qkvz).split([shape.qkv, shape.z], dim=-1) for layer in layers]
    row["gemm_bits_equal"] = {
        "qkv": all(torch.equal(linear(x, layer.qkv), qkv) for layer, (qkv, _) in zip(layers, whole, strict=True)),
        "z": all(torch.equal(linear(x, layer.z), z) for layer, (_, z) in zip(layers, whole, strict=True)),
    }
    return row


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Times of every arrangement, then ratios to `dual` and what a step gains."""
    timed = [row for row in rows if "us" in row]
    print("\nus per layer (stage alone)")
    print(f"{'shape':8} {'N':>3} " + " ".join(f"{name:>13}" for name in ARRANGEMENTS))
    for row in timed:
        cells = [f"{row['us'][name]:13.2f}" if name in row["us"] else f"{'failed':>13}" for name in ARRANGEMENTS]
        print(f"{row['shape']:8} {row['tokens']:>3} " + " ".join(cells))
    print("\nratio of the stage to dual, 95% interval; layers whose output differs from serial in any bit")
    for row in timed:
        cells = []
        for name in (name for name in CANDIDATES if name in row["ratio"]):
            median, low, high = row["ratio"][name]
            cells.append(
                f"{name} {median:.3f} ({low:.3f}..{high:.3f}) {row['against_serial'][name]['layers_different']}"
            )
        print(f"{row['shape']:8} {row['tokens']:>3} " + "  ".join(cells))
    print(f"\ngain of a decode step over dual (kept from {TARGET_PERCENT} % on); bound: with z for free")
    print(
        f"{'shape':8} {'N':>3} {'best':>13} {'gain %':>7} {'95%':>15} {'bound %':>8} {'layer us':>9} {'from':12} z bits qkv bits"
    )
    for row in timed:
        step = row["step"]
        low, high = step["step_gain_interval"]
        print(
            f"{row['shape']:8} {row['tokens']:>3} {step['best']:>13} {step['step_gain_percent']:7.2f} "
            f"{f'{low:.2f}..{high:.2f}':>15} {step['step_gain_bound_percent']:8.2f} {step['layer_us']:9.1f} "
            f"{step['layer_us_from']:12} {row['gemm_bits_equal']['z']!s:6} {row['gemm_bits_equal']['qkv']}"
        )
    for what, key in (("gain", "step_gain_percent"), ("bound", "step_gain_bound_percent")):
        reached = [f"{row['shape']} N={row['tokens']}" for row in timed if row["step"][key] >= TARGET_PERCENT]
        print(f"{what} of {TARGET_PERCENT} % or more: {', '.join(reached) or 'nowhere'}")
    for row in rows:
        if "error" in row or not row["finite"]:
            print(f"PROBLEM {row['shape']} N={row['tokens']}: {row.get('error', 'an output is not finite')}")


def step_times(text: str) -> dict[tuple[str, int], float]:
    """``1=155,8=190`` (the measured shape) or ``35b-tp4/8=80``. Raises ValueError with the piece that cannot be read."""
    names = {shape.name for shape in SHAPES}
    found: dict[tuple[str, int], float] = {}
    for piece in text.split(","):
        key, separator, value = piece.strip().partition("=")
        name, slash, tokens = key.rpartition("/")
        if not separator or not tokens.isdigit() or (slash and name not in names):
            raise ValueError(f"{piece!r}: wanted [SHAPE/]N=microseconds, shapes {sorted(names)}")
        found[name or MEASURED, int(tokens)] = float(value)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON, written after every row")
    parser.add_argument("--layers", type=int, default=16, help="layers per graph, each with weights of its own")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shapes", default=",".join(shape.name for shape in SHAPES))
    parser.add_argument("--tokens", type=lambda text: tuple(map(int, text.split(","))), default=TOKENS)
    parser.add_argument("--seconds", type=float, default=85.0, help="no further row is begun after this")
    parser.add_argument(
        "--step-us", type=step_times, default={}, metavar="[SHAPE/]N=US,…", help="time of a whole layer"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="CPU, tiny shape, plain torch in the place of the kernels"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, begin = parse(arguments), time.monotonic()
    found: dict[str, Any] = {"arrangements": {name: asdict(how) for name, how in ARRANGEMENTS.items()}}
    rows: list[dict[str, Any]] = []
    found |= {"torch": torch.__version__, "rows": rows, "complete": False}
    torch.manual_seed(0)
    with torch.no_grad():
        if options.dry_run:
            device, dtype, shapes = torch.device("cpu"), torch.float32, TINY
            kernels, version = Kernels(), "none"
        else:
            os.environ["VLLMOVERLAY"] = "0"
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            device, dtype = torch.device("cuda"), torch.bfloat16
            shapes = tuple(shape for shape in SHAPES if shape.name in options.shapes.split(","))
            import vllm

            version = vllm.__version__.partition("+")[0]
            print(f"vllm {vllm.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
            kernels, found["kernels"] = choose_kernels(device)
            found["gpu"] = torch.cuda.get_device_name()
            print(f"kernels ready after {time.monotonic() - begin:.0f} s", flush=True)
        found["vllm"] = version
        times = layer_times(version, options.step_us)
        lanes = None if options.dry_run else {low: CudaLanes(low) for low in (False, True)}
        for shape in shapes:
            layers = [Layer(shape, max(options.tokens) + FIRST_SLOT, device, dtype) for _ in range(options.layers)]
            for tokens in options.tokens:
                if time.monotonic() - begin > options.seconds:
                    print(f"out of time before {shape.name} N={tokens}", flush=True)
                    break
                fresh = lanes or {low: CheckedLanes() for low in (False, True)}
                try:
                    row = measure(shape, tokens, layers, fresh, kernels, options.rounds)
                except Exception as error:  # the lease is short: the other rows may still be measured
                    row = {"shape": shape.name, "tokens": tokens, "error": f"{type(error).__name__}: {error}"[:600]}
                    traceback.print_exc()
                if "us" in row:
                    row["step"] = step_gain(shape, row, times)
                row["seconds"] = round(time.monotonic() - begin, 1)
                rows.append(row)
                options.out.write_text(json.dumps(found, indent=1))
            del layers
        found["complete"] = sum("error" not in row for row in rows) == len(shapes) * len(options.tokens)
    options.out.write_text(json.dumps(found, indent=1))
    print_table(rows)
    print(f"complete: {found['complete']}, {time.monotonic() - begin:.0f} s")
    return 0 if found["complete"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
