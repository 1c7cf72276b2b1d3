"""Further commands for the bench's workers: what only LoRA needs."""

from __future__ import annotations

from typing import Any

from bench_engine.worker import EngineWorker

#: vLLM's class for linears with LoRA, known by name so that nothing is imported only to count.
LINEAR = "BaseLinearLayerWithLoRA"


class Worker(EngineWorker):
    """Commands are the methods whose names begin with `do_`."""

    #: The last number that a command here gave to an adapter; loaded again, it gets another one.
    _number = 100

    def do_lora_state(self) -> dict[str, Any]:
        """LoRA linears of a rank by class, upstream's switch, and what each rank's journal says of the overlay's patch."""
        from vllm import envs

        classes: dict[str, int] = self._llm.collective_rpc("bench_classes", args=(LINEAR,))[0]
        return {
            "linears": sum(classes.values()),
            "classes": classes,
            "switch": bool(getattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", False)),
            "ranks": [
                {"patch": found.get("patches", {}).get("lora_linear"), "problems": found.get("problems", [])}
                for found in self._llm.collective_rpc("bench_journal")
            ],
        }

    def _load(self, name: str, path: str) -> str:
        self._number += 1
        self.do_add_adapter(name, self._number, path)
        return name

    def do_churn(
        self, first: str, idle: str, late: str, paths: dict[str, str], seed: int, tokens: int, logprobs: bool
    ) -> dict[str, Any]:
        """Adapters come and go while requests run: tokens and log probabilities as `generate` gives them.

        A base request and one of the loaded adapter `first` run. Then `late` is loaded and a request for it joins; then
        the loaded adapter `idle`, which no request uses, is removed; then its file is loaded by another name and number, and
        a request for that joins. All run to their ends. At last the same adapters are loaded as before.
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
        order.append(add(2, self._load(late, paths[late])))
        run(5)
        self.do_remove_adapter(idle)
        run(3)
        order.append(add(3, self._load("again", paths[idle])))
        while len(finished) < len(order):
            run(1)
        self._drain()
        for name in (late, "again"):
            self.do_remove_adapter(name)
        self._load(idle, paths[idle])
        return self._answer([finished[identifier] for identifier in order], logprobs)
