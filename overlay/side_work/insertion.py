"""Start and join are put into a graph last, so that all other code of it is stock's.

Symptom: with adapters on a base layer that quantizes its input in Inductor's code (FP8 by token), all tokens were other than stock's
(H200, vLLM 0.33.0). Each kernel gave the right bits for what it was given.

Cause: two things in Inductor depend on what is in the graph, and where.

- It computes with the value that a norm has not yet rounded to bf16, until the value is in memory ("realized"). What is lowered
  after that reads the rounded one. A value with several readers is realized at once if one of them is an op that Inductor has
  seen before in this process. An op that it sees for the first time gets a copy, and what stands before it in the graph goes on
  with the value that is not rounded. So in stock the first graph with a shrink computes otherwise than all later ones.
- It moves nodes before it lowers a graph. Which nodes it moves depends on whether the graph writes to one of its inputs, and start
  writes to its gate (`overlay.side_work.locality`).

Fix: all of Inductor's passes, and vLLM's, see stock's graph, with stock's call in the place of the join. When they are done, start
goes behind its input and what writes to that, and join before the first reader of what start writes to. Inductor knows start
beforehand, as it knows stock's op by then, and start's input has to be in memory when start is lowered. Where it is not, such as
behind an activation of one value, the graph is compiled again and keeps stock's calls. So does the first graph of a process that
has a start: it has one layer's linears. vLLM compiles a graph once in stock, and once for each range here. Each time Inductor
knows what it knew the first time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import wrapt

from overlay.report.journal import journal
from overlay.settings import outcome
from overlay.side_work import lowering, ops
from overlay.side_work.adoption import StaysStock
from overlay.side_work.lowering import Edit, edited, op_of

Result = TypeVar("Result")

#: Runs Inductor's passes on a graph in place, as the last thing before it is lowered; not a public name.
PASSES = "_recursive_post_grad_passes"


@dataclass(frozen=True)
class Start:
    """A start of a traced graph."""

    op: str
    weights: int  #: where the first of its weights is among the graph's inputs; -1: it is none
    gate: int  #: the same of its gate
    name: str  #: its pair's


@dataclass(frozen=True)
class Known:
    """An op of starts, and stock's op that does the same work."""

    op: Any
    stock: Any
    weights: int  #: the place of the weights in a call of stock's op
    written: int  #: the place of what it writes to
    edit: Edit  #: puts stock's calls in the place of a start and its join


#: By op of a start.
_known: dict[str, Known] = {}
#: What Inductor knew before a traced graph was compiled for the first time, in that order; by its place and its text.
_known_before: dict[tuple[int, str], list[Any]] = {}
_starts: tuple[Start, ...] = ()  #: of the graph that is being compiled
_found: list[NotInsertedError] = []  #: why that graph has to keep stock's calls
_strict = False


class NotInsertedError(RuntimeError):
    """Start cannot stand where it should."""


class NotInMemoryError(NotInsertedError):
    """The input of start is not in memory when start is lowered. This is expected, and no problem."""


def require(op: Any, stock: Any, edit: Edit, strict: bool) -> None:
    """Have this done for the starts of `op`, in all graphs that vLLM compiles from now on.

    `op` is ``torch.ops.<library>.<op>``: it takes what `stock` takes, which begins with the input that main reads too, then the
    gate and the name of its pair. `edit` puts stock's calls in the place of a start and its join. Under `strict` a graph that
    starts cannot be put into stops vLLM; else it keeps stock's calls. Raises StaysStock where Inductor is not as it is known here.
    """
    global _strict
    from torch._inductor import compile_fx, ir
    from torch._inductor import lowering as inductor

    if str(op) in _known:
        return
    if not hasattr(compile_fx, PASSES) or not hasattr(torch.compiler.config, "cache_key_tag"):
        raise StaysStock("this torch's Inductor is not known")
    arguments = stock.default._schema.arguments
    (weights,) = (place for place, argument in enumerate(arguments) if str(argument.type) == "List[Tensor]")
    (written,) = ops.places_written(stock.default)
    if not _known:
        lowering.intercept_compiler(strict)  # first: it may fail, and the rest must not be done twice
        lowering.compile_by(compiled)
        wrapt.wrap_function_wrapper(compile_fx, PASSES, _insert_last)
        _strict = strict
    _known[str(op)] = Known(op, stock, weights, written, edit)
    inductor.make_fallback(op.default)
    lower = inductor.lowerings[op.default]
    first = op.default._schema.arguments[0].name

    def checked(*arguments: Any, **named: Any) -> Any:
        data = getattr(arguments[0] if arguments else named[first], "data", None)
        while isinstance(data, ir.BaseView):
            data = data.data
        in_memory = isinstance(data, ir.StorageBox) and isinstance(data.data, ir.Buffer)
        if _starts and not in_memory:
            raise _noted(NotInMemoryError(f"the input of {op} is not in memory"))
        return lower(*arguments, **named)

    inductor.lowerings[op.default] = checked


def compiled(
    number: int,
    traced: torch.fx.GraphModule,
    graph: torch.fx.GraphModule,
    compile_graph: Callable[[torch.fx.GraphModule], Result],
) -> Result:
    """What `compile_graph` makes of `graph`, with starts put in last, or of it with stock's calls.

    `graph` is the traced one as its range wants it, and `number` the traced one's place in its model.
    """
    global _starts
    if not any(op_of(node) in _known for node in traced.graph.nodes):
        return compile_graph(graph)
    key = number, str(traced.graph)  # another model has other graphs at the same places
    if key in _known_before:
        _put_back(key)
    else:
        _known_before[key] = [kept.copy() for kept in _inductor()]
    starts = tuple(_starts_of(graph.graph))
    if not starts:
        return compile_graph(graph)
    if key != next(iter(_known_before)):
        _found.clear()
        _starts = starts
        try:
            # The graph is stock's by its text, and what is made of it is not.
            with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag} {starts}"):
                return compile_graph(_with_stocks_calls(graph))
        except Exception:
            if not _found:
                raise
        finally:
            _starts = ()
        _tell()
        _put_back(key)
    for start in starts:
        ops.count_lowered(start.name)
    return compile_graph(_with_stocks_calls(graph))


def _with_stocks_calls(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    return edited(graph, {op: known.edit for op, known in _known.items()})


def _starts_of(graph: torch.fx.Graph) -> Iterable[Start]:
    """The starts of a traced graph, in order."""
    inputs = {node: place for place, node in enumerate(_inputs(graph))}
    for node in graph.nodes:
        known = _known.get(op_of(node) or "")
        if known is not None:
            *given, gate, name = node.args
            yield Start(str(known.op), inputs.get(given[known.weights][0], -1), inputs.get(gate, -1), name)


def _tell() -> None:
    """Say why a graph keeps stock's calls, unless that was to be expected. Raises it under strict."""
    for error in _found:
        if not isinstance(error, NotInMemoryError):
            said = outcome(_strict, "the graph keeps stock's calls")
            journal.problem(f"insertion: {said}: {error}")
            if _strict:
                raise error


def _insert_last(wrapped: Callable[..., None], _: object, args: Any, kwargs: Any) -> None:
    """Inductor's passes, then the starts and joins of the graph that is being compiled."""
    wrapped(*args, **kwargs)
    if not _starts:
        return
    graph = args[0].graph
    try:
        inputs = _inputs(graph)
        for start in _starts:
            known = _known[start.op]
            if not {start.weights, start.gate} <= set(range(len(inputs))):
                raise NotInsertedError("its weights or its gate are no inputs of the graph")
            calls = [reader for reader in inputs[start.weights].users if op_of(reader) == str(known.stock)]
            if len(calls) != 1 or calls[0].kwargs:
                raise NotInsertedError(f"not one plain call of {known.stock} reads a weight, but {len(calls)}")
            _insert(graph, known, calls[0], inputs[start.gate], start.name)
        graph.lint()
    except Exception as error:  # the graph is compiled again without
        raise _noted(NotInsertedError(f"{type(error).__name__}: {error}")) from error


def _insert(graph: torch.fx.Graph, known: Known, call: torch.fx.Node, gate: torch.fx.Node, name: str) -> None:
    """Put start behind its input and all that writes to that, and join before the first reader of what start writes to.

    Stock's call goes.
    """
    read, written = call.args[0], call.args[known.written]
    assert isinstance(read, torch.fx.Node) and isinstance(written, torch.fx.Node)
    reader = min((node for node in written.users if call < node), default=None)
    main = None if reader is None else _written_by(reader)
    if reader is None or main is None:
        raise NotInsertedError(
            f"no op follows {known.stock} that reads what it writes to, and writes to something else"
        )
    place = max(_memory(read), *_inputs(graph), *_writers(graph, read, call))
    for node in _needed_after(place, call):
        if not (_is_view(node) or node.target is torch.ops.aten.empty.memory_format or _is_size(node)):
            raise NotInsertedError(f"{known.stock} needs {node.target} after its input")
        place.append(node)
        place = node
    with graph.inserting_after(place):
        start = graph.call_function(known.op.default, (*call.args, gate, name))
    with graph.inserting_before(reader):
        join = graph.call_function(torch.ops.vllm_overlay.join.default, (written, main, read))
    start.meta, join.meta = dict(call.meta), dict(call.meta)
    graph.erase_node(call)


def _needed_after(place: torch.fx.Node, call: torch.fx.Node) -> list[torch.fx.Node]:
    """The nodes behind `place` that a call needs, in their order."""
    found: set[torch.fx.Node] = set()
    waiting = list(call.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if place < node and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return sorted(found)


def _writers(graph: torch.fx.Graph, read: torch.fx.Node, call: torch.fx.Node) -> Iterable[torch.fx.Node]:
    """The nodes before `call` that may write to the memory of `read`.

    vLLM's last pass makes its ops write in place. So a node's memory may get its values from a later node: an all-reduce with its
    norm writes into a GEMM's result, and a norm or an attention into a buffer.
    """
    memory = _memory(read)
    return [node for node in graph.nodes if node < call and any(_memory(one) is memory for one in _written(node))]


def _memory(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose result a node is a view of, or the node itself. The parts of a tuple count as views of it."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _written(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What a node may write to. A higher-order op does not say what it writes to, so all its inputs count."""
    found: list[Any] = []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        found += node.all_input_nodes
    for place in ops.places_written(node.target):
        name = node.target._schema.arguments[place].name
        given = node.args[place] if place < len(node.args) else node.kwargs.get(name)
        found += given if isinstance(given, (list, tuple)) else [given]
    return [one for one in found if isinstance(one, torch.fx.Node)]


def _is_view(node: torch.fx.Node) -> bool:
    named = torch.ops.aten.reshape.default, operator.getitem
    return node.target in named or bool(getattr(node.target, "is_view", False))


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _written_by(node: torch.fx.Node) -> Any:
    """The one argument that the op of a node writes to; None where it is not one."""
    places = ops.places_written(node.target)
    return node.args[places[0]] if len(places) == 1 and places[0] < len(node.args) else None


def _inputs(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _noted(error: NotInsertedError) -> NotInsertedError:
    _found.append(error)
    return error


def _put_back(key: tuple[int, str]) -> None:
    """Have Inductor know what it knew before it first saw a graph, and no more."""
    for kept, before in zip(_inductor(), _known_before[key], strict=True):
        kept.clear()
        kept.update(before)


def _inductor() -> tuple[Any, ...]:
    """What Inductor remembers of the ops that it has lowered."""
    from torch._inductor import lowering as inductor

    return inductor.lowerings, inductor.needs_realized_inputs
