"""A patch for two linears of one class that read the same input: what it declares, and what follows from that.

The patch declares which attributes of a layer are main and side, what the layer's heads say of their sizes, and to which
layers it does not apply. Its verdict names the class and the methods. The rest is the same for every such patch:

* A layer that has just been made is adopted, or stays stock with a reason.
* When the model has been loaded, each adopted layer gets its pair, and each pair its plan (overlay.side_work.pairs).
* A layer with a pair runs upstream's own method with a stand-in for `self`. Every other layer runs stock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
import wrapt
from vllm import envs
from vllm.config import get_current_vllm_config

from overlay.report.journal import journal
from overlay.settings import Settings
from overlay.side_work import adoption, gemms, lowering, ops, pairs, rules
from overlay.side_work.adoption import StaysStock
from overlay.side_work.lane import Lane
from overlay.side_work.pairs import Pair
from overlay.side_work.plan import NOT_CAPTURING, Plan
from overlay.side_work.stand_in import StandIn, with_stand_in
from overlay.side_work.waiting import PAIR, Waiting
from overlay.verdict import Verdict
from overlay.vocabulary import SERIAL


class _Child(StandIn):
    """A child of the layer, but for one linear in it, whose calls go to the layer's stand-in."""

    def __init__(self, child: torch.nn.Module, linear: str, call: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(child)
        setattr(self, linear, call)


def linear_of(layer: Any, path: str) -> Any:
    """The linear at a path, such as ``linear`` or ``child.linear``. Raises AttributeError."""
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


class Projections(StandIn):
    """The layer, but for main and side. Whichever is called first starts the side, and join comes right after main.

    This one is traced by Dynamo, so start and join are ops.
    """

    MAIN: ClassVar[str]
    SIDE: ClassVar[str]

    @classmethod
    def of(cls, main: str, side: str) -> type[Projections]:
        """The class for a patch's linears: each call of one, by its path in the layer, comes to this class."""
        members: dict[str, Any] = {"MAIN": main, "SIDE": side}
        for path, call in ((main, cls._call_main), (side, cls._call_side)):
            child, _, name = path.rpartition(".")
            members[child or name] = cls._child(child, name, call) if child else call
        return type(cls.__name__, (cls,), members)

    @staticmethod
    def _child(child: str, linear: str, call: Callable[..., Any]) -> property:
        def stand_in(self: Projections) -> _Child:
            return _Child(getattr(self._layer, child), linear, lambda x: call(self, x))

        return property(stand_in)

    def __init__(self, layer: torch.nn.Module, pair: Pair) -> None:
        super().__init__(layer)
        self._pair = pair
        self._result_of_side: torch.Tensor | None = None

    def _start(self, x: torch.Tensor) -> torch.Tensor:
        if self._result_of_side is None:
            layer, pair = self._layer, self._pair
            gate = getattr(linear_of(layer, self.MAIN), pair.gate)
            if pair.plain:
                weight = linear_of(layer, self.SIDE).weight
                self._result_of_side = torch.ops.vllm_overlay.start(x, weight, gate, pair.columns, pair.name)
            else:
                self._result_of_side = torch.ops.vllm_overlay.start_layer(
                    x, gate, pair.columns, self.SIDE, pair.name, ops.encode_layer_name(layer.prefix)
                )
        return self._result_of_side

    def _call_main(self, x: torch.Tensor) -> Any:
        side = self._start(x)
        result = linear_of(self._layer, self.MAIN)(x)
        torch.ops.vllm_overlay.join(side, result[0], x)
        return result

    def _call_side(self, x: torch.Tensor) -> Any:
        return self._start(x), None


class NotTraced(Projections):
    """The same for a method that Dynamo does not trace: nothing reorders its calls, so a fork needs no ops.

    An op that is written in Python costs the host more than the calls in it. What does not fork is as in stock, in stock's
    order.
    """

    def __init__(self, layer: torch.nn.Module, pair: Pair) -> None:
        super().__init__(layer, pair)
        self._lane: Lane | None = None
        self._chosen = False

    def _fork(self, x: torch.Tensor) -> None:
        """Start the side, if the plan says so. The first of the two calls decides."""
        if self._chosen:
            return
        self._chosen = True
        strategy, lane = ops.choose(x, self._pair.name)
        if strategy != SERIAL and lane is not None and x.dim() == 2:
            self._lane, self._result_of_side = lane, pairs.start_side(self._pair, x, strategy, lane)

    def _call_main(self, x: torch.Tensor) -> Any:
        self._fork(x)
        try:
            return linear_of(self._layer, self.MAIN)(x)
        finally:
            if self._lane is not None and self._result_of_side is not None:
                self._lane.join(self._result_of_side)

    def _call_side(self, x: torch.Tensor) -> Any:
        self._fork(x)
        return linear_of(self._layer, self.SIDE)(x) if self._result_of_side is None else (self._result_of_side, None)


@dataclass(frozen=True)
class TwoLinears:
    """What a patch declares.

    `main` and `side` are where a layer has the linears: ``linear``, or ``child.linear`` for one in a child of the layer. A
    layer whose child is None has nothing to overlap, and is not counted. `sizes_by_heads` gives the columns of main's and of
    side's output per tensor-parallel shard, as the layer's head counts say: main's first, by the names that the journal
    shows. `token_threshold` is the largest number of tokens that forks by a plan that is not measured. `check` raises
    StaysStock for a new layer to which the patch does not apply. `name` is the attribute with the layer's own name.
    `calls_side` says of a layer whether its next call will call the side; where not, the real layer runs.
    """

    patch: str
    main: str
    side: str
    sizes_by_heads: Callable[[Any], Mapping[str, int]]
    token_threshold: int
    check: Callable[[Any], None] = lambda _: None
    name: str = "prefix"
    calls_side: Callable[[Any], bool] = lambda _: True

    def is_candidate(self, layer: Any) -> bool:
        """Whether a new layer has the children that the linears belong to."""
        children = (path.rpartition(".")[0] for path in (self.main, self.side))
        return all(linear_of(layer, child) is not None for child in children if child)

    def sizes(self, layer: Any) -> dict[str, int]:
        """The columns of both linears per shard, by the names that the journal shows; main's first.

        Read from the linears' own bookkeeping, never from ``weight.shape``: Marlin, AWQ, GPTQ and FP8 repack the weight.
        Raises ValueError where the heads say something else.
        """
        expected = self.sizes_by_heads(layer)
        linears = (linear_of(layer, path) for path in (self.main, self.side))
        found = {name: int(one.output_size_per_partition) for name, one in zip(expected, linears, strict=True)}
        if found != expected:
            has, says = (", ".join(f"{name}={size}" for name, size in sizes.items()) for sizes in (found, expected))
            raise ValueError(f"shard sizes {has}, but the heads say {says}")
        return found

    def check_new(self, layer: Any) -> dict[str, int]:
        """The sizes of a layer that has just been made. Raises StaysStock where it stays stock."""
        config = get_current_vllm_config()
        self.check(layer)
        adoption.check_registered(layer, getattr(layer, self.name), config)
        adoption.refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
        sizes = self.sizes(layer)
        gemms.gemm_of(linear_of(layer, self.side))
        return sizes

    def pair_of(self, layer: Any, config: Any, sizes: Mapping[str, int], traced: bool = True) -> Pair:
        """The pair of a layer that has its weights. Raises StaysStock where the layer stays stock."""
        main, side = linear_of(layer, self.main), linear_of(layer, self.side)
        main_columns, columns = sizes.values()
        if gemms.has_adapters(main):
            raise StaysStock(rules.ADAPTERS)
        gemms.check_side(side)
        kind = gemms.gemm_of(side)  # again: loading may have given it another kernel
        lowering.refuse_without_graphs(next(side.parameters()).device, config)
        plain = kind == gemms.TORCH_GEMM
        if not plain:
            gemms.check_beside(main)
        elif side.weight.shape != (columns, int(side.input_size)):
            raise StaysStock(f"the side's weight has the shape {tuple(side.weight.shape)}")
        kinds = gemms.main_kind(main), kind
        name = getattr(layer, self.name)
        return Pair(name, main, side, main_columns, columns, *kinds, gemms.gate_of(main), plain, traced)

    def intercept(self, original: Callable[..., Any], traced: bool = True) -> Callable[..., Any]:
        """A plain function to set on the class in the place of `original`. `traced`: Dynamo traces it."""
        kind = (Projections if traced else NotTraced).of(self.main, self.side)
        calls_side = self.calls_side

        def make(layer: Any) -> Any:
            pair = getattr(layer, PAIR, None)
            return layer if pair is None or not calls_side(layer) else kind(layer, pair)

        def make_in_capture(layer: Any) -> Any:
            """Outside a capture the real layer: there a step is Python, and each attribute of a stand-in costs it time."""
            pair = getattr(layer, PAIR, None)
            if pair is None or torch.compiler.is_compiling() or not calls_side(layer):
                return layer
            if pair.on_gpu and not torch.cuda.is_current_stream_capturing():
                ops.planned[pair.name].record.calls.count_serial(NOT_CAPTURING)
                return layer
            return kind(layer, pair)

        return with_stand_in(original, make if traced else make_in_capture)

    def waiting(self, verdict: Verdict, settings: Settings) -> Waiting[dict[str, int], Pair]:
        """Where new layers wait for their model to be loaded."""
        record = journal.patch(self.patch)
        default = Plan(settings.forks, settings.tokens_or(self.token_threshold))

        def decide(layers: Sequence[tuple[Any, dict[str, int]]], worker: Any) -> list[Pair | str]:
            found: list[Pair | str] = []
            for layer, sizes in layers:
                try:
                    found.append(self.pair_of(layer, worker.vllm_config, sizes, verdict.shapes_graph))
                except StaysStock as refused:
                    found.append(str(refused))
            made = [pair for pair in found if isinstance(pair, Pair)]
            pairs.settle(made, worker, settings, record, default)
            return found

        return Waiting(self.patch, verdict, record, settings, decide)

    def install(self, module: ModuleType, verdict: Verdict, settings: Settings) -> Verdict:
        """Intercept the class of `verdict` in a module that has just been executed. Gives the verdict that holds here."""
        inert = adoption.inert_without_cuda(verdict, settings.serial_pass_through)
        if inert is not None:
            return inert
        target = getattr(module, str(verdict.class_name))
        originals = {name: vars(target)[name] for name in verdict.methods}
        waiting = self.waiting(verdict, settings)

        def after_init(wrapped: Callable[..., None], layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
            wrapped(*args, **kwargs)
            try:
                candidate = self.is_candidate(layer)
            except AttributeError:
                candidate = True  # what is missing is for check to say
            if candidate:
                name = getattr(layer, self.name, type(layer).__name__)
                waiting.adopt(layer, name, lambda: (check(layer),) * 2)
            else:  # each step asks for it, and a module is slow to say that it has no attribute
                setattr(layer, PAIR, None)

        def check(layer: torch.nn.Module) -> dict[str, int]:
            kind = type(layer)
            # A derived class. If the class itself has lost the methods, that is for the proof of effect to find.
            if kind is not target and all(getattr(kind, name) is not ours for name, ours in patched.items()):
                own = f"{kind.__qualname__} of {kind.__module__}"
                raise StaysStock(f"{own} has {' and '.join(patched)} of its own")
            return self.check_new(layer)

        waiting.begin()
        patched = {name: self.intercept(original, verdict.shapes_graph) for name, original in originals.items()}
        for name, ours in patched.items():
            setattr(target, name, ours)
        # Last, because everything before it changes nothing for a layer without a pair.
        wrapt.wrap_function_wrapper(target, "__init__", after_init)
        return verdict
