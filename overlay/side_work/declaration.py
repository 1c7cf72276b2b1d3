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
from overlay.side_work.pairs import Pair
from overlay.side_work.plan import Plan
from overlay.side_work.stand_in import StandIn, with_stand_in
from overlay.side_work.waiting import PAIR, Waiting
from overlay.verdict import Verdict


class Projections(StandIn):
    """The layer, but for main and side. Whichever is called first starts the side.

    Each patch has a subclass, in which `_call_main` and `_call_side` have the names of its linears.
    """

    MAIN: ClassVar[str]
    SIDE: ClassVar[str]

    def __init__(self, layer: torch.nn.Module, pair: Pair) -> None:
        super().__init__(layer)
        self._pair = pair
        self._result_of_side: torch.Tensor | None = None

    def _start(self, x: torch.Tensor) -> torch.Tensor:
        if self._result_of_side is None:
            layer, pair = self._layer, self._pair
            gate = getattr(getattr(layer, self.MAIN), pair.gate)
            if pair.plain:
                weight = getattr(layer, self.SIDE).weight
                self._result_of_side = torch.ops.vllm_overlay.start(x, weight, gate, pair.columns, pair.name)
            else:
                self._result_of_side = torch.ops.vllm_overlay.start_layer(
                    x, gate, pair.columns, self.SIDE, pair.name, ops.encode_layer_name(layer.prefix)
                )
        return self._result_of_side

    def _call_main(self, x: torch.Tensor) -> Any:
        side = self._start(x)
        result = getattr(self._layer, self.MAIN)(x)
        torch.ops.vllm_overlay.join(side, result[0], x)
        return result

    def _call_side(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._start(x), None


@dataclass(frozen=True)
class TwoLinears:
    """What a patch declares.

    `main` and `side` are the attributes of a layer that hold the linears. `sizes_by_heads` gives the columns of main's and of
    side's output per tensor-parallel shard, as the layer's head counts say: main's first, by the names that the journal
    shows. `token_threshold` is the largest number of tokens that forks by a plan that is not measured. `check` raises
    StaysStock for a new layer to which the patch does not apply.
    """

    patch: str
    main: str
    side: str
    sizes_by_heads: Callable[[Any], Mapping[str, int]]
    token_threshold: int
    check: Callable[[Any], None] = lambda _: None

    def sizes(self, layer: Any) -> dict[str, int]:
        """The columns of both linears per shard, by the names that the journal shows; main's first.

        Read from the linears' own bookkeeping, never from ``weight.shape``: Marlin, AWQ, GPTQ and FP8 repack the weight.
        Raises ValueError where the heads say something else.
        """
        expected = self.sizes_by_heads(layer)
        linears = (getattr(layer, name) for name in (self.main, self.side))
        found = {name: int(one.output_size_per_partition) for name, one in zip(expected, linears, strict=True)}
        if found != expected:
            has, says = (", ".join(f"{name}={size}" for name, size in sizes.items()) for sizes in (found, expected))
            raise ValueError(f"shard sizes {has}, but the heads say {says}")
        return found

    def check_new(self, layer: Any) -> dict[str, int]:
        """The sizes of a layer that has just been made. Raises StaysStock where it stays stock."""
        config = get_current_vllm_config()
        self.check(layer)
        adoption.check_registered(layer, layer.prefix, config)
        adoption.refuse_modes(config, envs.VLLM_BATCH_INVARIANT)
        sizes = self.sizes(layer)
        gemms.gemm_of(getattr(layer, self.side))
        return sizes

    def pair_of(self, layer: Any, config: Any, sizes: Mapping[str, int]) -> Pair:
        """The pair of a layer that has its weights. Raises StaysStock where the layer stays stock."""
        main, side = getattr(layer, self.main), getattr(layer, self.side)
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
        return Pair(layer.prefix, main, side, main_columns, columns, *kinds, gemms.gate_of(main), plain)

    def intercept(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A plain function to set on the class in the place of `original`."""
        names = {"MAIN": self.main, "SIDE": self.side}
        calls = {self.main: Projections._call_main, self.side: Projections._call_side}
        kind = type("Projections", (Projections,), names | calls)

        def make(layer: Any) -> Any:
            pair = getattr(layer, PAIR, None)
            return layer if pair is None else kind(layer, pair)

        return with_stand_in(original, make)

    def waiting(self, verdict: Verdict, settings: Settings) -> Waiting[dict[str, int], Pair]:
        """Where new layers wait for their model to be loaded."""
        record = journal.patch(self.patch)
        default = Plan(settings.forks, settings.tokens_or(self.token_threshold))

        def decide(layers: Sequence[tuple[Any, dict[str, int]]], worker: Any) -> list[Pair | str]:
            found: list[Pair | str] = []
            for layer, sizes in layers:
                try:
                    found.append(self.pair_of(layer, worker.vllm_config, sizes))
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
            waiting.adopt(layer, layer.prefix, lambda: (self.check_new(layer),) * 2)

        waiting.begin()
        for name, original in originals.items():
            setattr(target, name, self.intercept(original))
        # Last, because everything before it changes nothing for a layer without a pair.
        wrapt.wrap_function_wrapper(target, "__init__", after_init)
        return verdict
