"""The custom ops of side work: start, start_layer and join. `overlay.side_work` says what they promise each other.

`start_into` and `join_into` take the place of start and join in graphs that are captured (`overlay.side_work.followers`).

No op takes the name of a layer unless it has to call one. A name as ``str`` makes every layer a compile artifact of its own
(vLLM #38152 took the first dual-stream op back for that), so `start_layer` takes it as vLLM's own opaque type.

An op is total. A graph from yesterday's cache may name a pair that has no plan today: start then computes the side work
itself, on the current stream.

torch makes the ops' schemas from the annotations here, so they are types and not text: no ``from __future__ import annotations``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.utils import torch_utils

from overlay.report.journal import PatchRecord
from overlay.side_work import followers, lane, locality, lowering
from overlay.side_work.plan import PASS_THROUGH, Plan
from overlay.vocabulary import SERIAL

LIBRARY = "vllm_overlay"
JOIN = f"{LIBRARY}.join"
TAGS = (torch.Tag.flexible_layout,)
NO_STREAM = "no auxiliary stream"

# vLLM 0.20.0 and later with torch 2.11 and later; before that a plain str.
LayerNameType: Any = getattr(torch_utils, "LayerNameType", str)
encode_layer_name = getattr(torch_utils, "_encode_layer_name", str)
resolve_layer_name = getattr(torch_utils, "_resolve_layer_name", str)

_libraries: list[torch.library.Library] = []  # an op lives as long as its library object
_defined = False  #: whether all ops are there


def register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> Any:
    """Define ``vllm_overlay::<name>`` for the platform's device, and give it.

    `mutates` names the arguments that the op declares to write to. The tag ``flexible_layout`` lets Inductor choose the layout of
    its inputs, as for stock's GEMMs. Without it Inductor puts the op's name into the kernel that makes the input, and times that
    kernel apart from stock's kernel of the same text. At times it then took another block size, which adds in another order
    (vLLM 0.33.0).
    """
    library = torch.library.Library(LIBRARY, "FRAGMENT")
    torch_utils.direct_register_custom_op(
        name, implementation, mutates_args=list(mutates), fake_impl=fake, target_lib=library, tags=TAGS
    )
    _libraries.append(library)
    return getattr(getattr(torch.ops, LIBRARY), name)


@dataclass
class PlannedPair:
    """What the ops know of a pair by its name: when to fork, and where to count."""

    plan: Plan
    record: PatchRecord


#: By name. Layers of one shape and one kind of main share a name.
planned: dict[str, PlannedPair] = {}


def gemm(x: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> None:
    """(tokens, hidden) and (columns, hidden) into (tokens, columns): the call that stock's compiled graph makes."""
    torch.mm(x, weight.t(), out=result)


def choose(x: torch.Tensor, name: str, idle: str | None = None) -> tuple[str, lane.Lane | None]:
    """The strategy of one call, counted, and the lane of this thread. `idle` says why there is no work to fork, if so."""
    pair = planned.get(name)
    found = lane.lane_of(x.device) if x.is_cuda else None
    if pair is None:
        return SERIAL, found
    reason = idle or _reason_for_serial(x, pair.plan, found)
    if reason is None:
        pair.record.calls.dual_stream += 1
        return pair.plan.strategy(x.shape[0]), found
    pair.record.calls.count_serial(reason)
    return SERIAL, found


def _reason_for_serial(x: torch.Tensor, plan: Plan, found: lane.Lane | None) -> str | None:
    if not x.is_cuda:
        return PASS_THROUGH
    reason = plan.reason_for_serial(x.shape[0])
    if reason is None and found is None:
        return NO_STREAM
    return reason


def _start(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, columns: int, name: str) -> torch.Tensor:
    strategy, found = choose(x, name)
    if strategy == SERIAL or x.dim() != 2 or found is None:
        result = torch.nn.functional.linear(x, weight)
        if found is not None:
            found.forget(result)
        return result
    result = x.new_empty((x.shape[0], columns))
    found.start(result, strategy, lambda: gemm(x, weight, result))
    return result


def _start_layer(
    x: torch.Tensor, gate: torch.Tensor, columns: int, side: str, name: str, layer_name: LayerNameType
) -> torch.Tensor:
    strategy, found = choose(x, name)
    linear = get_forward_context().no_compile_layers[resolve_layer_name(layer_name)]
    for part in side.split("."):
        linear = linear._modules[part]

    def work() -> torch.Tensor:
        # Inductor may have given x other strides, and not every kernel takes those. A copy is made here, on the stream that
        # reads it: main's stream would give its memory away when this op returns.
        return linear(x.contiguous())[0]

    if strategy == SERIAL or found is None:
        result = work()
        if found is not None:
            found.forget(result)
        return result
    return found.start_and_give(work)


def _start_into(
    x: torch.Tensor, weight: torch.Tensor, results: list[torch.Tensor], gate: torch.Tensor, name: str
) -> None:
    strategy, found = choose(x, name)
    parts = results[0]  # (parts, tokens, columns of a part)
    in_place = 1 in parts.shape[:2]  # the GEMM's result, a row per token, then lies in memory as the parts do
    # Made on main's stream. Until the join the lane keeps it, as a part of the work.
    rows = parts.view(x.shape[0], -1) if in_place else x.new_empty((x.shape[0], weight.shape[0]))

    def work() -> None:
        # The GEMM first: it can begin before main's fills the GPU. The rest is short.
        gemm(x, weight, rows)
        if not in_place:
            parts.copy_(rows.view(x.shape[0], parts.shape[0], -1).transpose(0, 1))
        for zeros in results[1:]:
            zeros.zero_()

    if strategy != SERIAL and found is not None:
        found.start(parts, strategy, work)
        return
    work()
    if found is not None:
        found.forget(parts)


def _join(result: torch.Tensor, main: torch.Tensor, x: torch.Tensor) -> None:
    found = lane.lane_of(x.device) if x.is_cuda else None
    if found is not None:
        found.join(result)


def _join_into(results: list[torch.Tensor], main: torch.Tensor, x: torch.Tensor) -> None:
    _join(results[0], main, x)


def define(declares_writes: bool) -> None:
    """Define the ops, once per process.

    `declares_writes`: whether start and join declare the writes that give them their place. A device without a second stream
    needs none, and vLLM's graph pass for ops that write asks for kernels that its build for a CPU does not have.
    Raises where an op cannot be defined; then every later try does.
    """
    global _defined
    if _defined:
        return

    def fake_start(x, weight, gate, columns, name):  # type: ignore[no-untyped-def]
        _count_fake(name)
        return x.new_empty((*x.shape[:-1], columns))

    def fake_start_layer(x, gate, columns, side, name, layer_name):  # type: ignore[no-untyped-def]
        _count_fake(name)
        return x.new_empty((*x.shape[:-1], columns))

    def fake_join(result, main, x):  # type: ignore[no-untyped-def]
        return None

    def fake_start_into(x, weight, results, gate, name):  # type: ignore[no-untyped-def]
        _count_fake(name)

    gate, result = (["gate"], ["result"]) if declares_writes else ([], [])
    start = register("start", _start, fake_start, gate)
    lowering.register(start, above=_lower_start)
    register("start_layer", _start_layer, fake_start_layer, gate)
    join = register("join", _join, fake_join, result)
    lowering.register(join, above=_lower_join)
    if declares_writes:
        locality.keep(LIBRARY)
        start_into = register("start_into", _start_into, fake_start_into, ["results", "gate"])
        join_into = register("join_into", _join_into, fake_join, ["results"])

        def take_followers(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
            found = followers.find(node, start, join)
            if found is not None:
                followers.take(graph, node, found, start_into, join_into)

        lowering.register(start, captured=take_followers)
    _defined = True


def define_start_of(stock: Any, name: str, idle: Callable[[Sequence[Any]], str | None]) -> lowering.Edit:
    """Define ``vllm_overlay::<name>``: a start whose side work is one of vLLM's own ops (``torch.ops.vllm.<op>``).

    It takes what `stock` takes, whose first argument has a row per token and which writes to one argument, then the gate and
    the pair's name. `idle` says of the arguments why there is no work to fork; None where there is.
    """
    (written,) = places_written(stock.default)

    def start(*given):  # type: ignore[no-untyped-def]
        *arguments, _, pair_name = given
        result = arguments[written]
        strategy, found = choose(arguments[0], pair_name, idle(arguments))
        if strategy != SERIAL and found is not None:
            found.start(result, strategy, lambda: stock.default(*arguments))
            return
        stock.default(*arguments)
        if found is not None:
            found.forget(result)

    def put_back(graph: torch.fx.Graph, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Stock's call where stock has it, at the join, with its buffer before it: Inductor's order is that of the graph.

        Gives the joins, which are still there.
        """
        *arguments, _, _ = node.args
        result = arguments[written]
        joins = [reader for reader in result.users if lowering.op_of(reader) == JOIN]
        with graph.inserting_before(joins[0] if joins else node):
            call = graph.call_function(stock, tuple(arguments))
        call.meta = dict(node.meta)
        graph.erase_node(node)
        if result.op == "call_function" and all(call <= reader for reader in result.users):
            call.prepend(result)
        return joins

    def lower(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
        count_lowered(node.args[-1])
        put_back(graph, node)

    library = torch.library.Library(LIBRARY, "FRAGMENT")
    given, _, _ = str(stock.default._schema).partition("(")[2].rpartition(") -> ")
    library.define(f"{name}({given}, Tensor(gate!) gate, str name) -> ()", tags=TAGS)
    library.impl(name, start, dispatch_key=current_platform.dispatch_key)
    library._register_fake(name, lambda *given: _count_fake(given[-1]))
    _libraries.append(library)
    op = getattr(getattr(torch.ops, LIBRARY), name)
    lowering.register(op, above=lower)

    def put_back_without_join(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
        for join in put_back(graph, node):
            graph.erase_node(join)

    return put_back_without_join


def places_written(op: Any) -> list[int]:
    """The places of the arguments that an op (``torch.ops.<library>.<op>.<overload>``) writes to; none for what is no op."""
    schema = getattr(op, "_schema", None)
    arguments = enumerate(schema.arguments) if schema is not None else ()
    return [place for place, argument in arguments if argument.alias_info and argument.alias_info.is_write]


def count_lowered(name: str) -> None:
    """Count a start that is stock's call in a compiled graph."""
    pair = planned.get(name)
    if pair is not None:
        pair.record.calls.lowered += 1


def _count_fake(name: str) -> None:
    pair = planned.get(name)
    if pair is not None:
        pair.record.calls.fake += 1


def _lower_start(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Stock's linear in the place of start."""
    x, weight, _, _, name = node.args
    with graph.inserting_before(node):
        result = graph.call_function(torch._C._nn.linear, (x, weight, None))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    count_lowered(name)


def _lower_join(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Nothing in the place of join: above the captured sizes nothing is forked."""
    graph.erase_node(node)
