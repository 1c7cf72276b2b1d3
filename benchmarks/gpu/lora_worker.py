"""The worker process of the LoRA evidence: `EngineWorker`, and what only LoRA needs. Run by its path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not this folder, which has modules by the names of others'
    sys.path[0] = str(Path(__file__).resolve().parents[2] / "overlay" / "cli" / "bench" / "outside")

from bench_engine.worker import EngineWorker, main

#: vLLM's class for linears with LoRA, known by name so that nothing is imported only to count.
LINEAR = "BaseLinearLayerWithLoRA"


class LoraWorker(EngineWorker):
    """Commands are the methods whose names begin with `do_`."""

    def do_lora_state(self) -> dict[str, Any]:
        """LoRA linears of the model by class, upstream's switch, and what the overlay's journal says of its patch."""
        from vllm import envs

        classes: dict[str, int] = {}
        for module in self._model().modules():
            if any(base.__name__ == LINEAR for base in type(module).__mro__):
                classes[type(module).__name__] = classes.get(type(module).__name__, 0) + 1
        journal = sys.modules.get("overlay.journal")
        found = journal.journal.as_dict() if journal is not None else None
        return {
            "linears": sum(classes.values()),
            "classes": classes,
            "switch": bool(getattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", False)),
            "patch": found and found["patches"].get("lora_linear"),
            "problems": found and found["problems"],
        }

    def do_churn(
        self, first: str, idle: str, late: dict[str, Any], again: dict[str, Any], seed: int, tokens: int, logprobs: bool
    ) -> dict[str, Any]:
        """Adapters come and go while requests run: tokens and log probabilities as `generate` gives them.

        A base request and one of the loaded adapter `first` run. Then `late` is loaded and a request for it joins; then
        the loaded adapter `idle`, which no request uses, is removed; then `again` (another name and number) is loaded and
        joins. `late` and `again` have what `do_add_adapter` takes. All run to their ends. `again` stays, `late` goes.
        """
        engine = self._llm.llm_engine
        finished: dict[str, Any] = {}

        def run(steps: int) -> None:
            for _ in range(steps):
                for output in engine.step():
                    if output.finished:
                        finished[output.request_id] = output.outputs[0]

        def add(index: int, adapter: str | None) -> str:
            return self._add(14 + 5 * index, seed + index, tokens, 0 if logprobs else None, adapter)

        order = [add(0, None), add(1, first)]
        run(8)
        self.do_add_adapter(**late)
        order.append(add(2, late["name"]))
        run(5)
        removed = self.do_remove_adapter(idle)
        run(3)
        self.do_add_adapter(**again)
        order.append(add(3, again["name"]))
        while len(finished) < len(order):
            run(1)
        self._drain()
        self.do_remove_adapter(late["name"])
        return {"removed": removed, **self._answer([finished[identifier] for identifier in order], logprobs)}


if __name__ == "__main__":
    main(LoraWorker())
