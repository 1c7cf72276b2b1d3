"""A lane without a stream, which notes what it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from overlay.vocabulary import DUAL_MAIN_FIRST


class NotingLane:
    """As `overlay.side_work.lane.Lane`: the work runs when it would be given to the auxiliary stream."""

    def __init__(self, order: list[str]) -> None:
        self.order = order
        self._late: Callable[[], Any] | None = None

    def start(self, result: torch.Tensor, strategy: str, work: Callable[[], Any]) -> None:
        self.order.append("start")
        if strategy == DUAL_MAIN_FIRST:
            self._late = work
        else:
            work()

    def start_and_give(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.order.append("start")
        return work()

    def join(self, result: torch.Tensor) -> None:
        if self._late is not None:
            self._late()
        self.order.append("join")
