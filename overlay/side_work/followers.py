"""Start also does what follows from the side's result alone, so that it runs beside main as well.

Symptom: after the join, every GDN layer of a decode step runs two kernels of about 1 µs each (H200, vLLM 0.33.0). One copies
the halves of the side's result, `b` and `a`, each to memory of its own. The other fills the output of the attention core with
zeros.

Cause: the compiled graph has them after main, though neither reads main's result.

Fix: before a graph is compiled, its `start` becomes `start_into`, which fills two buffers: the side's result, part after part,
and the zeros. Upstream's nodes that copied and filled go. Copies and zeros have the same bits whoever makes them. Where
something else reads the side's result, it stays in one part. Outside a CUDA graph the op costs the host more than the
compiled kernels, so a graph that also serves prompts keeps its `start`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from overlay.side_work.lowering import op_of

#: Bytes. Kernels are compiled apart for pointers that are multiples of it, as every tensor's of its own memory is.
ALIGNMENT = 16


@dataclass(frozen=True)
class Followers:
    """What follows from one side's result. `copies` are the nodes that copy equal parts of its columns, in their order."""

    join: Node
    copies: tuple[Node, ...]
    zeros: Node | None


def find(start: Node, start_op: Any, join_op: Any) -> Followers | None:
    """What follows from the result of `start` alone, in a graph that Dynamo traced. None where nothing does."""
    joins = [node for node in start.users if op_of(node) == str(join_op)]
    result = start.meta.get("example_value")
    if len(joins) != 1 or result is None or result.dim() != 2:
        return None
    copies = _copies([node for node in start.users if node is not joins[0]], start.args[3], result.element_size())
    zeros = _zeros(start, start_op, joins[0], result)
    return Followers(joins[0], copies, zeros) if copies or zeros is not None else None


def _copies(readers: Sequence[Node], columns: Any, element: int) -> tuple[Node, ...]:
    """The nodes ``result.chunk(n, dim=-1)[i].contiguous()`` for every i, where nothing else reads the result.

    `element` is the size of an element in bytes.
    """
    if len(readers) != 1 or not _is_method(readers[0], "chunk"):
        return ()
    (chunk,) = readers
    given = dict(zip(("self", "chunks", "dim"), chunk.args, strict=False)) | chunk.kwargs
    count = given.get("chunks")
    if given.get("dim", 0) not in (-1, 1) or not isinstance(count, int) or columns % count:
        return ()
    if columns // count * element % ALIGNMENT:
        return ()
    parts = {node.args[1]: node for node in chunk.users if node.target is operator.getitem}
    if len(chunk.users) != count or parts.keys() != set(range(count)):
        return ()
    copies = [user for index in range(count) for user in parts[index].users]
    plain = all(_is_method(copy, "contiguous") and len(copy.args) == 1 and not copy.kwargs for copy in copies)
    return tuple(copies) if plain and [copy.args[0] for copy in copies] == [parts[i] for i in range(count)] else ()


def _is_method(node: Node, name: str) -> bool:
    return bool(node.op == "call_method" and node.target == name)


def _zeros(start: Node, start_op: Any, join: Node, result: torch.Tensor) -> Node | None:
    """The first ``torch.zeros`` between the join and the next start, if it is as `result` and its sizes are known at `start`."""
    nodes = list(start.graph.nodes)
    before, after = nodes[: nodes.index(start)], nodes[nodes.index(join) + 1 :]
    for node in after:
        if op_of(node) == str(start_op):
            break
        if node.op == "call_function" and node.target is torch.zeros:
            plain = len(node.args) == 1 and isinstance(node.args[0], (tuple, list))
            same = node.kwargs == {"dtype": result.dtype, "device": result.device}
            return node if plain and same and set(node.all_input_nodes) <= set(before) else None
    return None


def take(graph: Graph, start: Node, found: Followers, start_into: Any, join_into: Any) -> None:
    """Replace `start`, its join and what follows by `start_into` and `join_into`, in place."""
    x, weight, gate, columns, name = start.args
    parts = found.copies or (start,)
    zeros = () if found.zeros is None else (found.zeros,)
    with graph.inserting_before(start):
        rows = graph.call_method("size", (x, 0))
        sizes = ((len(parts), rows, columns // len(parts)), *(node.args[0] for node in zeros))
        results = [graph.call_method("new_empty", (x, size)) for size in sizes]
        graph.call_function(start_into, (x, weight, results, gate, name))
    with graph.inserting_before(found.join):
        graph.call_function(join_into, (results, *found.join.args[1:]))
        made = [graph.call_function(operator.getitem, (results[0], index)) for index in range(len(parts))]
    graph.erase_node(found.join)
    for node, result in zip((*parts, *zeros), (*made, *results[1:]), strict=True):
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
    for node in (*found.copies, *zeros):
        graph.erase_node(node)
    for chunk in list(start.users):
        for part_of_it in list(chunk.users):
            graph.erase_node(part_of_it)
        graph.erase_node(chunk)
    graph.erase_node(start)
