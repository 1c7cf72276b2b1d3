"""When a fork pays: the choice between the auxiliary stream and the plain serial order, for one call.

Outside CUDA graph capture the answer is always serial. There every step is Python, a fork and a join cost more CPU time
than the small GEMM that they hide, and time to first token grows. Inside a capture the fork costs nothing at replay.

Source of the threshold: H200, bf16, microseconds per layer for the pair of GDN projections (qkvz alone | serial | two
streams), 2048 to 12288 + 64 columns: M=64 20.6|28.9|23.4; M=256 25.6|33.8|32.6; M=1024 81|96|96.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """`mode` is "dual" or "serial"; `token_threshold` is the largest number of tokens (rows) that is overlapped."""

    mode: str
    token_threshold: int

    def reason_for_serial(self, tokens: int, capturing: bool) -> str | None:
        """None where the auxiliary stream is to be used, else why not (a key of the journal's serial calls)."""
        if self.mode == "serial":
            return "plan is serial"
        if not capturing:
            return "not capturing a CUDA graph"
        if tokens > self.token_threshold:
            return "above the token threshold"
        return None
