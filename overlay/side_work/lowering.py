"""Graphs are edited before they are compiled, by the range of tokens that they serve.

Steps above the captured sizes run stock's own graph: an op is replaced there by the calls that it stands for. In a graph for
captured sizes alone an op may take over what follows from it (`overlay.side_work.followers`). A graph for both stays as it is. The
rest of this text is about the first.

Symptom: a prompt of more tokens than the largest CUDA graph runs as Python on the host, piece by piece. Where the host is the
limit, an op that is written in Python delays the first token in each layer. It gains nothing: outside a CUDA graph it is serial.

Cause: vLLM traces once, and one compiled graph serves every number of tokens.

Fix: vLLM compiles one graph for each range of tokens if it is given endpoints (``compile_ranges_endpoints``, from 0.18.0 on).
The largest captured size becomes an endpoint, unless the model's hidden size is above WIDEST_ROW. Before the range above it is
compiled, stock's calls take the place of each op that is registered here, in a copy of the graph that Dynamo traced. So
everything behind it (Inductor, vLLM's passes and caches) sees what it sees in stock. A cold start pays for a second pass through
Inductor; a warm one finds both ranges in vLLM's cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import wrapt

from overlay.report.journal import journal
from overlay.settings import outcome
from overlay.side_work.adoption import StaysStock
from overlay.side_work.rules import WIDEST_ROW

#: A way to compile graphs. It gets the traced graph's place in its model, the traced graph, this graph as its range wants it, and
#: vLLM's own way to compile one.
Compile = Callable[[int, torch.fx.GraphModule, torch.fx.GraphModule, Callable[[torch.fx.GraphModule], Any]], Any]
#: Changes a graph in place at one node.
Edit = Callable[[torch.fx.Graph, torch.fx.Node], None]
NO_CAPTURE = "no CUDA graph is captured, so there is nothing to overlap"
#: vLLM's CompilationMode.VLLM_COMPILE: the only one that knows ranges.
VLLM_COMPILE = 3

#: By op. Above the captured sizes an edit puts stock's calls in the place of the node.
_above: dict[str, Edit] = {}
_captured: dict[str, Edit] = {}
_compile: Compile | None = None
_intercepted = False


def register(op: Any, *, above: Edit | None = None, captured: Edit | None = None) -> None:
    """Have the nodes of an op (``torch.ops.<library>.<name>``) edited, in graphs above the captured sizes, or for captured sizes alone."""
    for table, edit in ((_above, above), (_captured, captured)):
        if edit is not None:
            table[str(op)] = edit


def compile_by(own: Compile) -> None:
    """Have graphs compiled by `own` after they were edited for their range."""
    global _compile
    _compile = own


def largest_captured(compilation: Any) -> int:
    """Tokens of the largest CUDA graph that vLLM is going to capture, of a CompilationConfig; 0 where there is none."""
    return max(map(int, compilation.cudagraph_capture_sizes or [0]))


def captures(compilation: Any) -> bool:
    """Whether vLLM is going to capture CUDA graphs, by its CompilationConfig.

    Graphs of pieces will do: start and join lie in one piece. What an op of vLLM's calls that splits the graph is captured in
    full graphs alone; without those its calls are serial, as outside a capture.
    """
    return getattr(compilation.cudagraph_mode, "name", "NONE") != "NONE" and largest_captured(compilation) > 0


def refuse_without_graphs(device: torch.device, config: Any) -> None:
    """Raise StaysStock for a layer on a GPU for which no CUDA graph will be captured. `config` is a VllmConfig."""
    if device.type == "cuda" and not captures(config.compilation_config):
        raise StaysStock(NO_CAPTURE)


def compiles_by_ranges(compilation: Any) -> bool:
    """Whether vLLM itself compiles graphs, each for a range of tokens, by its CompilationConfig; None where nothing is compiled."""
    mode = int(getattr(compilation, "mode", None) or 0)
    return mode == VLLM_COMPILE and hasattr(compilation, "compile_ranges_endpoints")


def split_ranges(config: Any, strict: bool) -> bool:
    """Give the steps above the captured sizes a compiled graph of their own, before vLLM traces. `config` is a VllmConfig.

    False where they get none: no ranges, no captures, an encoder compiled too, or a hidden size that is unknown or above
    WIDEST_ROW.

    The same on all ranks of a pipeline stage, whatever their layers do: a rank with another range would run another warm-up
    step, and the others would wait for it. Stages may differ: a warm-up step sends nothing to another stage. Under `strict`
    a graph that cannot be lowered stops vLLM.
    """
    compilation = config.compilation_config
    limit = largest_captured(compilation) if captures(compilation) else 0
    hidden = getattr(config.model_config.hf_text_config, "hidden_size", None)
    endpoints = getattr(compilation, "compile_ranges_endpoints", None)
    if not compiles_by_ranges(compilation) or not endpoints or not limit:
        return False
    if hidden is None or hidden > WIDEST_ROW:
        return False
    # An encoder is compiled by the same ranges, and vLLM allows shapes that are static in one range only.
    if getattr(compilation, "compile_mm_encoder", False):
        return False
    # vLLM compiles a range of one size with static shapes, and tunes it: its kernels would not be stock's.
    one_size = {limit - 1, limit + 1} & {0, *endpoints}
    if limit < max(endpoints) and not one_size:
        compilation.compile_ranges_endpoints = sorted({*endpoints, limit})
    intercept_compiler(strict)
    return True


def intercept_compiler(strict: bool) -> None:
    """Have the graphs edited that vLLM compiles from now on. Under `strict` one that cannot be edited stops vLLM."""
    global _intercepted
    if _intercepted:
        return
    from vllm.compilation import backends

    def compile_range(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any) -> Any:
        call = inspect.signature(wrapped).bind(*args, **kwargs)

        def compile_graph(graph: torch.fx.GraphModule) -> Any:
            call.arguments["graph"] = graph
            return wrapped(*call.args, **call.kwargs)

        graph = traced = call.arguments["graph"]
        try:
            graph = _for_range(traced, call.arguments["compile_range"], call.arguments["compilation_config"])
        except Exception as error:  # the graph stays as it was traced, which is right and only slower
            reason = f"{type(error).__name__}: {error}"
            said = outcome(strict, "graphs keep their ops as they were traced")
            journal.problem(f"lowering: {said}: {reason}")
            if strict:
                raise
        number = call.arguments.get("graph_index", 0)
        return compile_graph(graph) if _compile is None else _compile(number, traced, graph, compile_graph)

    wrapt.wrap_function_wrapper(backends, "CompilerManager.compile", compile_range)
    _intercepted = True


def _for_range(graph: torch.fx.GraphModule, tokens: Any, compilation: Any) -> torch.fx.GraphModule:
    """A graph edited as its range of tokens asks. One graph for all sizes stays as it is."""
    limit = largest_captured(compilation)
    if tokens.start > limit:
        return edited(graph, _above)
    return edited(graph, _captured) if tokens.end <= limit else graph


def edited(module: torch.fx.GraphModule, edits: dict[str, Edit]) -> torch.fx.GraphModule:
    """A copy of a graph with every edit made; the same object where there is nothing to edit."""
    if not any(op_of(node) in edits for node in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        op = op_of(node)
        if op in edits:
            edits[op](graph, node)
    graph.lint()
    changed = torch.fx.GraphModule(module, graph)
    changed.meta = dict(module.meta)
    return changed


def op_of(node: torch.fx.Node) -> str | None:
    """The name of the op that a node calls, as ``<library>.<name>``."""
    return str(getattr(node.target, "overloadpacket", node.target)) if node.op == "call_function" else None
