"""Main reads what it reads in stock, although start reads the same value from memory.

Symptom: a base layer that quantizes its input in Inductor's code (FP8 by token), with adapters: other tokens than stock's, in
every case (H200, vLLM 0.33.0). Each kernel gave the right bits for what it was given.

Cause: Inductor computes with the value that a norm has not yet rounded to bf16, until the value is in memory ("realized"). What
is lowered after that reads the rounded one. A value with several readers is realized at once if one of them is an op that
Inductor has seen before in this process. An op that it sees for the first time gets a copy, and the others go on with the value
that is not rounded. So in stock the first graph with a shrink computes otherwise than all later ones. Start is another op
than shrink, with other rules, and made the first graph like the later ones. (Seen with torch 2.13 on a CPU. The code that
decides is the same in torch 2.10, 2.11 and 2.14, and the same for a GPU.)

Fix: the first graph of a process that has a start of that op gets stock's calls. It has one layer's linears. In all others
start is known to Inductor beforehand, as stock's op is by then, and its input has to be in memory when start is lowered. Where
it is not, such as behind an activation of one value, the graph is compiled again with stock's calls. vLLM compiles a graph
once in stock, and once for each range here. Each time Inductor knows what it knew the first time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from overlay.side_work import lowering
from overlay.side_work.lowering import Edit, edited, op_of, with_graph

Result = TypeVar("Result")

#: By op of a start: how stock's calls take its place, and that of its join.
_edits: dict[str, Edit] = {}
#: The pairs to which this applies, by the name that is the last argument of their start.
_names: set[str] = set()
#: What Inductor knew before a traced graph was compiled for the first time, in that order; by its place and its text.
_known_before: dict[tuple[int, str], list[Any]] = {}
_found: list[str] = []  #: inputs that were not in memory, in the compilation that runs


class NotRealizedError(RuntimeError):
    """The input of a start is not in memory when start is lowered."""


def require(op: Any, name: str, edit: Edit) -> None:
    """Have this done for the starts of pairs of that name. `op` is ``torch.ops.<library>.<op>``: it begins with the input that main
    reads too, and ends with the name. `edit` puts stock's calls in the place of a start and its join.
    """
    from torch._inductor import ir
    from torch._inductor import lowering as inductor

    _names.add(name)
    if str(op) in _edits:
        return
    lowering.compile_by(compiled)
    _edits[str(op)] = edit
    inductor.make_fallback(op.default)
    lower = inductor.lowerings[op.default]
    names = [argument.name for argument in op.default._schema.arguments]

    def checked(*arguments: Any, **named: Any) -> Any:
        given = dict(zip(names, arguments, strict=False)) | named
        data = getattr(given[names[0]], "data", None)
        while isinstance(data, ir.BaseView):
            data = data.data
        in_memory = isinstance(data, ir.StorageBox) and isinstance(data.data, ir.Buffer)
        if given[names[-1]] in _names and not in_memory:
            _found.append(given[names[-1]])
            raise NotRealizedError(f"the input of {op} is not in memory")
        return lower(*arguments, **named)

    inductor.lowerings[op.default] = checked


def compiled(
    number: int,
    traced: torch.fx.GraphModule,
    graph: torch.fx.GraphModule,
    compile_graph: Callable[[torch.fx.GraphModule], Result],
) -> Result:
    """What `compile_graph` makes of `graph`, or of it with stock's calls.

    `graph` is the traced one as its range wants it, and `number` the traced one's place in its model.
    """
    if not _has_start(traced):
        return compile_graph(graph)
    key = number, str(traced.graph)  # another model has other graphs at the same places
    if key in _known_before:
        _put_back(key)
    else:
        _known_before[key] = [kept.copy() for kept in _inductor()]
    if not _has_start(graph):
        return compile_graph(graph)
    if key == next(iter(_known_before)):
        return compile_graph(edited(graph, _edits))
    _found.clear()
    try:
        return compile_graph(with_graph(graph, copy.deepcopy(graph.graph)))  # a compiler may change it
    except Exception:
        if not _found:
            raise
    _put_back(key)
    return compile_graph(edited(graph, _edits))


def _has_start(graph: torch.fx.GraphModule) -> bool:
    return any(op_of(node) in _edits for node in graph.graph.nodes)


def _put_back(key: tuple[int, str]) -> None:
    """Have Inductor know what it knew before it first saw a graph, and no more."""
    for kept, before in zip(_inductor(), _known_before[key], strict=True):
        kept.clear()
        kept.update(before)


def _inductor() -> tuple[Any, ...]:
    """What Inductor remembers of the ops that it has lowered."""
    from torch._inductor import lowering as inductor

    return inductor.lowerings, inductor.needs_realized_inputs
