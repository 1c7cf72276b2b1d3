"""When a fork pays: the choice between the auxiliary stream and the plain serial order, for one call.

Outside CUDA graph capture the answer is serial. There every step is Python, a fork and a join cost more CPU time than the
small GEMM that they hide, and time to first token grows. Inside a capture the fork costs nothing at replay. Work that
upstream itself forks in eager steps, too, has a plan with `only_while_capturing` off.

Source of the threshold: one H200, torch 2.11, bf16, microseconds per layer in a CUDA graph, qkvz alone | serial | two
streams. 2048 to 12288 + 64 columns: M=64 16.1|21.7|16.8; M=256 20.4|25.8|24.8; M=512 37.4|42.4|45.2. 2048 to 3072 + 16:
M=64 6.9|12.1|7.1; M=256 8.2|13.8|11.8; M=512 11.1|16.8|16.7. 5120 to 16384 + 96: M=64 42.1|49.7|45.1; M=256
60.1|66.3|64.5; M=512 112.8|137.3|136.7 (benchmarks/results/).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ABOVE_THRESHOLD = "above the token threshold"
NOT_CAPTURING = "not capturing a CUDA graph"
SERIAL_PLAN = "plan is serial"


@dataclass(frozen=True)
class Plan:
    """`mode` is "dual" or "serial"; `token_threshold` is the largest number of tokens (rows) that is overlapped."""

    mode: str
    token_threshold: int
    only_while_capturing: bool = True

    def reason_for_serial(self, tokens: int) -> str | None:
        """None where the auxiliary stream is to be used now, else why not (a key of the journal's serial calls).

        The cheap questions come first: the last one is a call into the driver.
        """
        if tokens > self.token_threshold:
            return ABOVE_THRESHOLD
        if self.mode == "serial":
            return SERIAL_PLAN
        if self.only_while_capturing and not torch.cuda.is_current_stream_capturing():
            return NOT_CAPTURING
        return None
