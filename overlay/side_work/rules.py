"""Which linears may be main and side, and where no layer forks: rules and reasons that need neither torch nor vLLM.

`gemms`, `adoption` and `lowering` apply them to a vLLM that runs, ``python -m overlay check --model`` to a checkpoint's
configuration. Reasons are labels of metrics, so they do not change.

Main may be anything if side is torch's GEMM, because vLLM runs main as always. Any other side needs a main that reads its
input as it is. Side runs at the same time as main, so their kernels must not share memory. Two quantized GEMMs can share
scratch memory, so a side has to be on this allowlist:

* torch's own GEMM of an unquantized weight (TORCH). cuBLAS has a workspace per handle and stream.
* Marlin (MARLIN). Its locks belong to the layer (up to vLLM 0.30) or to the current stream (`get_marlin_workspace`, from
  0.31 on).
* vLLM's GEMM for a CPU, where nothing runs at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What computes a linear: torch's GEMM (or a CPU's), the Marlin kernel of a 4-bit or 8-bit weight, or something else.
TORCH, MARLIN, OTHER = "torch", "marlin", "other"

#: The largest hidden size whose norms Inductor adds up in one order. For larger ones it has two block sizes for a norm, and
#: times both at the kernel's first launch (`add_persistent_rblock`, torch 2.13 and 2.14). In stock the first launch is a
#: step of the largest number of tokens. A graph for the captured sizes alone has its first launch at one of those. So it
#: can choose the other block size, and then its bits differ from stock's (seen on an H200: hidden size 5120, a norm of 2.7
#: µs in stock and 3.9 µs with a range of its own).
WIDEST_ROW = 2048

# These depend on how vLLM is served, not on a checkpoint's configuration.
MICRO_BATCHING = "micro-batching (DBO): two main streams would share the auxiliary streams"
ELASTIC = "elastic expert parallelism: a rank that joins later is not compared with the others"
BATCH_INVARIANT = "batch-invariant mode"
#: vLLM names its own folder of compiled graphs by a hash that includes the overlay (overlay.engine.compile_cache).
OWN_CACHE = "compilation_config.cache_dir is set: vLLM would not tell graphs with the op in there from stock's"
MODES = (MICRO_BATCHING, ELASTIC, BATCH_INVARIANT, OWN_CACHE)

ADAPTERS = "LoRA on the projections"
SPLIT_FOR_LORA = "the projections are split for LoRA"
NO_COMPRESSOR = "no compressor: fused_wqa_wkv is the only input GEMM"


@dataclass(frozen=True)
class Linear:
    """`said` is its name in a reason. `reads_input`: its kernel reads its input as it is; it quantizes at most its weights."""

    said: str
    gemm: str
    reads_input: bool


#: The reason for a side that is OTHER.
NOT_ALLOWED = "quantization method {} is not on the allowlist"


def reason_against_main(main: Linear) -> str | None:
    """Why a main linear may have no side except torch's GEMM; None if it may have any.

    Inductor computes with a norm's output before it is rounded to bf16, until an op has to read it from memory. Start is such
    an op, and not always where stock has one. So the quantized input can differ in its last bit. torch's GEMM has the
    output in memory at once, in stock as well. `overlay.side_work.insertion` has the whole story, and a way for vLLM's own op.
    """
    return (
        None
        if main.reads_input
        else f"{main.said} may quantize its input, and Inductor would round it otherwise than in stock"
    )


def reason_against(main: Linear, side: Linear) -> str | None:
    """Why two linears stay stock because of their kernels; None if they may be a pair."""
    if side.gemm == OTHER:
        return NOT_ALLOWED.format(side.said)
    return None if side.gemm == TORCH else reason_against_main(main)
