"""Inductor moves the nodes of a graph with start as it moves those of stock's graph.

Symptom: in the code for a GPU one kernel was not stock's by its text. A norm's kernel stored the sum of the residual stream in its
first loop, and stock's in its second (torch 2.10 to 2.14). All measured bits were stock's.

Cause: Inductor moves each node to where it is read first, but no node behind the first write to an input of the graph. Such
writes come last. Start writes to its gate, which is an input, so what only the graph's results read stayed where it was.

Fix: the writes to gates are not in the graph while nodes are moved. Start itself stays where it is, before main's quantization.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import wrapt

#: Where Inductor moves nodes, and what it asks of every node then: how many writes come before it. No public names.
MODULE, MOVES = "torch._inductor.fx_passes.post_grad", "reorder_for_locality"
COUNTS = "compute_mutation_region_ids"

Pass = Callable[[torch.fx.Graph], None]


def keep(library: str) -> None:
    """Have this done for the ops of `library`, in every graph that Inductor compiles from now on. Does not import Inductor.

    Where Inductor is not as it is known here, its own pass runs.
    """

    def move(wrapped: Pass, _: object, args: Any, kwargs: Any) -> None:
        graph: torch.fx.Graph = args[0] if args else kwargs["graph"]
        ours = [node for node in graph.nodes if _is_of(library, node)]
        if ours:
            _move(graph, ours, wrapped)
        else:
            wrapped(graph)

    def wrap(module: ModuleType) -> None:
        from torch._inductor import pattern_matcher

        if hasattr(module, MOVES) and hasattr(pattern_matcher, COUNTS):
            wrapt.wrap_function_wrapper(module, MOVES, move)

    wrapt.register_post_import_hook(wrap, MODULE)


def _is_of(library: str, node: torch.fx.Node) -> bool:
    """Whether a node calls an op of this library that writes to something, in the form in which Inductor's passes see it."""
    if node.op != "call_function" or not str(node.target).startswith("auto_functionalized") or not node.args:
        return False
    return getattr(node.args[0], "namespace", None) == library


def _move(graph: torch.fx.Graph, ours: list[torch.fx.Node], move: Pass) -> None:
    from torch._inductor import pattern_matcher

    count = getattr(pattern_matcher, COUNTS)
    written = {reader for node in ours for reader in node.users}
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    writes = [node for node in copies if node.args[1] in written]
    kept = [(node.args, dict(node.meta)) for node in writes]
    for node in writes:
        graph.erase_node(node)
    count(graph)
    anchors = []  # nobody reads one, so it stays, and what it reads stays before it
    for node in ours:
        with graph.inserting_after(node):
            anchors.append(graph.call_function(operator.getitem, (node, 0)))
    move(graph)
    for node in anchors:
        graph.erase_node(node)
    with graph.inserting_before(graph.output_node()):
        for given, meta in kept:
            graph.call_function(torch.ops.aten.copy_.default, given).meta = meta
    count(graph)
