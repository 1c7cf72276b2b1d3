"""Two linears that read the same input, a large one (main) and a small one (side): serial, on two streams, or as one GEMM.

One GEMM needs both weights in one buffer, and gives both results in one tensor. Copying them apart would cost more than
the GEMM saves (H200, torch 2.11, 2048 to 12288 + 64 columns, 128 tokens, microseconds: serial 22.4, one GEMM 17.0, with
the copies 22.3 to 26.7). So a layer that may use it has the op that gives one tensor, of which the caller takes slices; the
other strategies write into the same tensor then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from overlay.journal import PatchRecord
from overlay.plan import ABOVE_THRESHOLD, DUAL_MAIN_FIRST, FUSED, NOT_CAPTURING, SERIAL, Plan
from overlay.streams import ParallelRegion

BEFORE_CAPTURE = "no call before the capture"
ADAPTERS = "LoRA on the projections"
MOVED_WEIGHTS = "the weights have left their common buffer"
TWO_RESULTS = "one GEMM gives one result, and this graph takes two"
#: Columns of the common result are a multiple of this: rows stay aligned for the kernels that read slices of it.
ALIGNMENT = 16

Pair = tuple[torch.Tensor, torch.Tensor]


class LinearPair:
    """How one layer's two linears run: sizes per tensor-parallel shard, plan, stream and events, and where it counts."""

    def __init__(self, main_size: int, side_size: int, plan: Plan, record: PatchRecord) -> None:
        self.main_size = main_size
        self.side_size = side_size
        self.columns = -(-(main_size + side_size) // ALIGNMENT) * ALIGNMENT
        self.plan = plan
        self.one_result = False  #: whether the traced graph has the op that gives one tensor
        self.plain = False  #: whether each linear is a GEMM of its weight and nothing else
        self.region = ParallelRegion(slots=1)
        self._record = record
        self._prepared = False
        self._always_serial: str | None = None
        self.common: torch.Tensor | None = None  #: both weights, (columns, hidden), where they have been put into one

    @property
    def fills_one_result(self) -> bool:
        """Whether the two results fill the one tensor, without columns that only align it."""
        return self.columns == self.main_size + self.side_size

    # ---- the op's two ways

    def project(self, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor) -> Pair:
        """(tokens, hidden) to (tokens, main_size) and (tokens, side_size)."""
        if self._is_plain_prompt(inputs):
            return linear(inputs, main._parameters["weight"]), linear(inputs, side._parameters["weight"])
        return self.run(self._strategy(main, side, inputs, one_result=False), main, side, inputs)

    def project_into_one(self, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) to (tokens, columns): main's result, side's, and what is left over of the alignment."""
        if self._is_plain_prompt(inputs):
            return self._one_after_the_other(main._parameters["weight"], side._parameters["weight"], inputs)
        return self.run_into_one(self._strategy(main, side, inputs, one_result=True), main, side, inputs)

    def _is_plain_prompt(self, inputs: torch.Tensor) -> bool:
        """Whether a call is one of a prompt above all captured sizes, through plain linears; counts it if so.

        Such a step is Python on the host, layer by layer, and a short prompt waits for it. So these calls take the
        shortest way, and get the weights without asking the modules, which takes a microsecond each.
        """
        if not self.plain or not self._prepared or inputs.shape[0] <= self.plan.token_threshold:
            return False
        self._record.calls.count_serial(ABOVE_THRESHOLD)
        return True

    def _one_after_the_other(self, main: torch.Tensor, side: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Two GEMMs of two weights into one tensor."""
        result = inputs.new_empty((inputs.shape[0], self.columns))
        torch.mm(inputs, main.t(), out=result.narrow(1, 0, self.main_size))
        torch.mm(inputs, side.t(), out=result.narrow(1, self.main_size, self.side_size))
        return result

    def run(self, strategy: str, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor) -> Pair:
        """Both results as the linears give them, by a strategy that has been chosen already."""
        if self.plain:
            return self._order(strategy, lambda: linear(inputs, main.weight), lambda: linear(inputs, side.weight))
        inputs = inputs.contiguous()  # Inductor may have given it other strides, and not every kernel takes those
        (big, _), (small, _) = self._order(strategy, lambda: main(inputs), lambda: side(inputs))
        return big, small

    def run_into_one(
        self, strategy: str, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor
    ) -> torch.Tensor:
        """Both results in one tensor, by a strategy that has been chosen already."""
        if strategy == FUSED:
            assert self.common is not None
            return linear(inputs, self.common)
        if strategy == SERIAL:
            return self._one_after_the_other(main.weight, side.weight, inputs)
        result = inputs.new_empty((inputs.shape[0], self.columns))
        big, small = self.slices(result)
        self._order(
            strategy,
            lambda: torch.mm(inputs, main.weight.t(), out=big),
            lambda: torch.mm(inputs, side.weight.t(), out=small),
        )
        return result

    def _order(self, strategy: str, main: Callable[[], Any], side: Callable[[], Any]) -> tuple[Any, Any]:
        if strategy == SERIAL:
            big, (small,) = self.region.run_serially(main, [side])
        else:
            big, (small,) = self.region.run(main, [side], main_first=strategy == DUAL_MAIN_FIRST)
        return big, small

    def slices(self, result: torch.Tensor) -> Pair:
        """Main's and side's part of the one result tensor."""
        return result[:, : self.main_size], result[:, self.main_size : self.main_size + self.side_size]

    # ---- which way

    def _strategy(self, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor, one_result: bool) -> str:
        reason = self._reason_for_serial(main, side, inputs)
        if reason is None:
            strategy = self.plan.strategy(inputs.shape[0])
            if strategy != FUSED:
                self._record.calls.dual_stream += 1
                return strategy
            if one_result and self._holds(main, side):
                self._record.calls.fused += 1
                return strategy
            reason = MOVED_WEIGHTS if one_result else TWO_RESULTS
        self._record.calls.count_serial(reason)
        return SERIAL

    def _reason_for_serial(self, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor) -> str | None:
        if self._prepared:
            return self._always_serial or self.plan.reason_for_serial(inputs.shape[0])
        if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return BEFORE_CAPTURE
        self._prepare(main, side, inputs)
        return self._always_serial or NOT_CAPTURING

    def _prepare(self, main: torch.nn.Module, side: torch.nn.Module, inputs: torch.Tensor) -> None:
        """Once per layer, outside capture: streams, events, and what libraries allocate on a stream's first use."""
        self._prepared = True
        if not inputs.is_cuda:
            self._always_serial = "serial pass-through"
        elif has_adapters(main) or has_adapters(side):
            self._always_serial = ADAPTERS
        else:
            self.region.prepare(inputs.device)
            self.region.run(lambda: None, [lambda: side(inputs)])

    # ---- one buffer for both weights

    def fits(self, main: torch.nn.Module, side: torch.nn.Module) -> bool:
        """Whether the weights are what one GEMM needs: matrices of the sizes that are known, alike but for their rows."""
        weights = [(main.weight, self.main_size), (side.weight, self.side_size)]
        return all(
            weight.dim() == 2
            and weight.is_contiguous()
            and weight.shape == (rows, main.weight.shape[1])
            and (weight.dtype, weight.device) == (main.weight.dtype, main.weight.device)
            for weight, rows in weights
        )

    def fuse(self, main: torch.nn.Module, side: torch.nn.Module) -> int:
        """Put both weights into one buffer, (columns, hidden); the parameters become views of it. Gives the bytes that
        their own memory had.

        The parameters stay the objects that they are, so loading, reloading and saving weights find them, and copy into
        the buffer. What is left over of the alignment is zero.
        """
        if self.common is not None:
            return 0
        freed = int(main.weight.nbytes + side.weight.nbytes)
        with torch.no_grad():
            common = main.weight.new_zeros((self.columns, main.weight.shape[1]))
            first = 0
            for projection, rows in ((main, self.main_size), (side, self.side_size)):
                part = common[first : first + rows]
                part.copy_(projection.weight)
                projection.weight.data = part
                first += rows
        self.common = common
        return freed

    def probe(self) -> LinearPair:
        """The same pair with streams and events of its own, to measure with."""
        probe = copy.copy(self)
        probe.region = ParallelRegion(slots=1)
        return probe

    def _holds(self, main: torch.nn.Module, side: torch.nn.Module) -> bool:
        """Whether both parameters are still views of the common buffer."""
        common = self.common
        if common is None:
            return False
        begin = common.data_ptr()
        offset = self.main_size * common.stride(0) * common.element_size()
        return bool(main.weight.data_ptr() == begin and side.weight.data_ptr() == begin + offset)


def has_adapters(projection: torch.nn.Module) -> bool:
    """Whether vLLM has put a LoRA layer in a linear's place."""
    return hasattr(projection, "base_layer")
