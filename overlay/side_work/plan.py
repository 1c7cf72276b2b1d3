"""When and how to overlap: the choice of a strategy for one call.

Outside a CUDA graph capture the answer is serial. Every step is Python there, so a fork and a join cost more CPU time than
the small GEMM that they hide, and the time to first token grows. Inside a capture the fork costs nothing at replay. Work
that upstream itself forks in eager steps too has a plan with `only_while_capturing` off.

A `Plan` has one strategy up to a threshold. A `SizePlan` has one for each captured size, measured on this GPU by
overlay.side_work.measure.

Source of the fixed thresholds: one H200, torch 2.11, bf16, microseconds per layer in a CUDA graph, qkvz alone | serial |
two streams. 2048 to 12288 + 64 columns: M=64 16.1|21.7|16.8; M=256 20.4|25.8|24.8; M=512 37.4|42.4|45.2. 2048 to 3072 + 16:
M=64 6.9|12.1|7.1; M=256 8.2|13.8|11.8; M=512 11.1|16.8|16.7. 5120 to 16384 + 96: M=64 42.1|49.7|45.1; M=256 60.1|66.3|64.5;
M=512 112.8|137.3|136.7 (benchmarks/results/).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from overlay.vocabulary import SERIAL

ABOVE_THRESHOLD = "above the token threshold"
NOT_CAPTURING = "not capturing a CUDA graph"
SERIAL_PLAN = "plan is serial"
PASS_THROUGH = "serial pass-through"  #: a CPU has no second stream


@dataclass(frozen=True)
class Plan:
    """`mode` is "dual" or "serial"; `token_threshold` is the largest number of tokens (rows) that is overlapped."""

    mode: str
    token_threshold: int
    only_while_capturing: bool = True

    def reason_for_serial(self, tokens: int) -> str | None:
        """None if the strategy is used now; else why not (a key of the journal's serial calls).

        The cheap checks come first. The last one is a call into the driver.
        """
        if tokens > self.token_threshold:
            return ABOVE_THRESHOLD
        if self.strategy(tokens) == SERIAL:
            return SERIAL_PLAN
        if self.only_while_capturing and not torch.cuda.is_current_stream_capturing():
            return NOT_CAPTURING
        return None

    def strategy(self, tokens: int) -> str:
        """The strategy for a number of tokens up to the threshold."""
        return self.mode


@dataclass(frozen=True)
class SizePlan(Plan):
    """A strategy for each measured number of tokens. `mode` says in a word where they come from."""

    strategies: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def of(strategies: Mapping[int, str]) -> SizePlan:
        """A plan with these strategies. It is serial above the largest size that has another strategy."""
        overlapped = [tokens for tokens, strategy in strategies.items() if strategy != SERIAL]
        return SizePlan("measured", max(overlapped, default=0), strategies=dict(sorted(strategies.items())))

    def strategy(self, tokens: int) -> str:
        """A size that was not measured gets the smaller neighbour's strategy; serial if either neighbour is serial."""
        known = self.strategies.get(tokens)
        if known is not None:
            return known
        sizes = list(self.strategies)
        index = bisect_left(sizes, tokens)
        around = [self.strategies[size] for size in sizes[max(index - 1, 0) : index + 1]]
        return SERIAL if SERIAL in around or not around else around[0]
