"""Which linears may be main and side, and where no layer forks: rules and reasons in words that need neither torch nor vLLM.

`gemms`, `adoption` and `lowering` ask them of a vLLM that runs, ``python -m overlay check --model`` of a checkpoint's configuration.
Reasons are labels of metrics, so they do not change.

Main may be anything beside a side that is torch's GEMM: vLLM runs it as always. Another side needs a main that reads its input as it
is. Side runs at the same time, so its kernel must share no memory with main's. Two quantized GEMMs can share scratch memory, so
this is an allowlist:

* torch's own GEMM of an unquantized weight (TORCH). cuBLAS has a workspace per handle and stream.
* Marlin (MARLIN). Its locks belong to the layer (up to vLLM 0.30) or to the current stream (`get_marlin_workspace`, from 0.31 on).
* vLLM's GEMM for a CPU, where nothing runs at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What computes a linear: torch's GEMM (or a CPU's), the Marlin kernel of a 4-bit or 8-bit weight, or something else.
TORCH, MARLIN, OTHER = "torch", "marlin", "other"

#: The largest hidden size whose norms Inductor adds up in one order. Above it has two block sizes for a norm, and times both at the
#: kernel's first launch (`add_persistent_rblock`, torch 2.13 and 2.14). In stock that is a step of the largest number of tokens.
#: A graph for the captured sizes alone has its first launch at those, so it can choose otherwise, and then its bits are not stock's
#: (seen on an H200: hidden size 5120, a norm of 2.7 µs in stock and 3.9 with a range of its own).
WIDEST_ROW = 2048

# How vLLM is served decides about these; no configuration of a checkpoint does.
MICRO_BATCHING = "micro-batching (DBO): two main streams would share the auxiliary streams"
ELASTIC = "elastic expert parallelism: a rank that joins later is not compared with the others"
BATCH_INVARIANT = "batch-invariant mode"
#: vLLM names its own folder of compiled graphs by a hash, which knows of the overlay (overlay.engine.compile_cache).
OWN_CACHE = "compilation_config.cache_dir is set: vLLM would not tell graphs with the op in there from stock's"
MODES = (MICRO_BATCHING, ELASTIC, BATCH_INVARIANT, OWN_CACHE)

ADAPTERS = "LoRA on the projections"
SPLIT_FOR_LORA = "the projections are split for LoRA"
NO_COMPRESSOR = "no compressor: fused_wqa_wkv is the only input GEMM"


@dataclass(frozen=True)
class Linear:
    """`said` is what a reason calls it. `reads_input`: its kernel reads its input as it is, and quantizes only weights, if anything."""

    said: str
    gemm: str
    reads_input: bool


#: Of a side that is OTHER.
NOT_ALLOWED = "quantization method {} is not on the allowlist"


def reason_against_main(main: Linear) -> str | None:
    """Why a main linear may have no side but torch's GEMM, as far as it has none; None where it may have any.

    Inductor rounds the output of a norm to bf16 once an op has to read it from memory; code that it met before that op reads the
    value that was not rounded. Start is such an op, and stands before the quantization of main's input; in stock the side may
    stand after it. So the quantized input can differ in its last bit (seen in Inductor's code for a CPU, torch 2.13 and 2.14). A
    GEMM of torch's has its input rounded wherever it stands.
    """
    return (
        None
        if main.reads_input
        else f"{main.said} may quantize its input, and Inductor would round it otherwise than in stock"
    )


def reason_against(main: Linear, side: Linear) -> str | None:
    """Why two linears stay stock by their kernels; None where they may be a pair."""
    if side.gemm == OTHER:
        return NOT_ALLOWED.format(side.said)
    return None if side.gemm == TORCH else reason_against_main(main)
