"""The verdict for DeepSeek-V4's input GEMMs: can their results be computed first and handed to upstream's own code?

Only vLLM 0.20.0 runs them one after the other, and its code is known by its fingerprints: the traced forward, which passes the
first GEMM's result on, the op, attention_impl, which calls compressor and indexer once each, these two, which run each of
their GEMMs of the attention's input once, and the helper that joins upstream's own auxiliary stream.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from overlay.verdict.cut import block, cut
from overlay.verdict.known import Known, unknown
from overlay.verdict.model import Source, SourceTree, Upstream, Verdict, in_model_registry, without_target
from overlay.verdict.questions import Drift, drifted
from overlay.vocabulary import APPLY, LANDED

#: The attention's module from vLLM 0.22.0 on, and from 0.20.0 to 0.21.0.
MODULES = ("vllm.models.deepseek_v4.attention", "vllm.model_executor.layers.deepseek_v4_attention")
#: Shows that this vLLM has the model, in case its attention moves again.
WITNESS = in_model_registry("deepseek_v4")

WRAPPER, METHODS = "DeepseekV4MultiHeadLatentAttentionWrapper", ("forward", "attention_impl")
#: What is patched, and what it relies on, as in 0.20.0.
KNOWN: Known = {
    MODULES[1]: {
        f"{WRAPPER}.forward": ("608a88ca54afb430",),
        f"{WRAPPER}.attention_impl": ("d46985935ab1488d",),
        "DeepseekV4Indexer.forward": ("9e9f8229cf8e6a43",),
        "deepseek_v4_attention": ("a054a48871990b2d",),
        "deepseek_v4_attention_fake": ("ed122ed4fb597f85",),
    },
    "vllm.model_executor.layers.deepseek_compressor": {"DeepseekCompressor.forward": ("f4dba6bb3c84afbe",)},
    "vllm.utils.multi_stream_utils": {"maybe_execute_in_parallel": ("d042770511808d9c",)},
}

PROJECTION, WEIGHTS, KV_SCORE_LINEAR = "fused_wqa_wkv", "weights_proj", "fused_wkv_wgate"
LANDED_SETTING = "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD"
UPSTREAM = Upstream("#41061", True, f"{LANDED_SETTING} (tokens; 1024; 0 switches it off)")


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    for module in MODULES:
        source = tree.read(module)
        if source is None:
            continue
        try:
            found = _landed(source, module)
            if found is None and module not in KNOWN:
                raise Drift(ast.Pass(), "upstream's own overlap of the input GEMMs is not there as known")
        except (Drift, SyntaxError) as error:
            return drifted(error, source.path, module)
        found = found or unknown(tree, KNOWN, module, WRAPPER)
        if found is not None:
            return found
        where = f"{source.path}:{cut(source, f'{WRAPPER}.{METHODS[0]}').lineno}"
        return Verdict(APPLY, "the input GEMMs run one after the other", module, WRAPPER, METHODS, where=where)
    return without_target(
        tree,
        WITNESS,
        absent="this vLLM has no DeepSeek-V4",
        lost=f"this vLLM has DeepSeek-V4, but its attention is not in {' or '.join(MODULES)}",
    )


def _landed(source: Source, module: str) -> Verdict | None:
    """Upstream's own overlap: one method that gives all four GEMMs to execute_in_parallel, up to a number of tokens."""
    for method in _methods_that_mention(source, LANDED_SETTING):
        mentioned = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "execute_in_parallel"
                and {WEIGHTS, KV_SCORE_LINEAR} <= mentioned
                and any(PROJECTION in name for name in mentioned)
                and LANDED_SETTING in {getattr(part, "attr", "") for part in ast.walk(node)}
            ):
                where = f"{source.path}:{node.lineno}"
                reason = "upstream runs the input GEMMs in parallel"
                return Verdict(LANDED, reason, module, where=where, upstream=UPSTREAM)
    return None


def _methods_that_mention(source: Source, word: str) -> Iterator[ast.stmt]:
    """Each method that mentions a word."""
    last = 0
    for found in re.finditer(word, source.text):
        start = source.text.rfind("\n    def ", 0, found.start()) + 1
        if start > last:
            last = start
            yield block(source, start, start, indentation=4)
