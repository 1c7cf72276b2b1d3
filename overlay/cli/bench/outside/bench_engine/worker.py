"""The worker process: one in-process vLLM engine that does what the controller says, command by command.

In process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), because then all requests of a batch are scheduled together: two engines
see the same batches, and a difference between their tokens is a difference between their kernels. Asynchronous
scheduling stays as vLLM chooses it.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import os
import random
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import replies, weights

if TYPE_CHECKING:
    from collections.abc import Callable


#: overlay.patches.frame_stack.room's, run by its path: a stock process must not find the overlay's package.
with_room: Callable[..., Any] = runpy.run_path(str(Path(__file__).parents[4] / "patches" / "frame_stack" / "room.py"))[
    "with_room"
]
#: About 5 ms each: long enough to tell a slow CPU, short enough to ask in every round.
HOST_STEPS, HOST_LAUNCHES = 100_000, 1_000
#: The most of a trace that goes into one answer: about 1 MB.
MOST_KERNELS = 20_000
#: Categories of a Chrome trace's events.
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def make_prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    """Token ids of one prompt, from a seed; the last ids of the vocabulary are kept for special tokens."""
    generator = random.Random(seed)
    return [generator.randrange(10, vocabulary - 300) for _ in range(length)]


def kernels_of(trace: dict[str, Any]) -> dict[str, Any]:
    """The GPU's part of a Chrome trace, as `EngineWorker.do_kernels` gives it."""
    events = [
        event
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ON_GPU and "dur" in event
    ]
    events = sorted(events, key=lambda event: float(event["ts"]))[-MOST_KERNELS:]
    first = float(events[0]["ts"]) if events else 0.0
    names: dict[str, int] = {}
    kernels = [
        [
            names.setdefault(event["name"], len(names)),
            event.get("args", {}).get("stream", event.get("tid")),
            round(float(event["ts"]) - first, 3),
            float(event["dur"]),
        ]
        for event in events
    ]
    return {"names": list(names), "kernels": kernels}


class EngineWorker:
    """Commands are the methods whose names begin with `do_`."""

    #: Which calls of a step cross the end of a chunk of frames is chance, and differs from arm to arm by what has nothing to
    #: do with the GPU. With room for its frames no arm has such calls.
    room = True

    def __init__(self) -> None:
        self._llm: Any = None
        self._vocabulary = 0
        self._count = 0
        self._decoding: list[str] = []
        self._adapters: dict[str, Any] = {}

    # ---- start and describe

    def do_start(self, engine: dict[str, Any], weight_seed: int | None) -> dict[str, Any]:
        """Build the engine. `weight_seed` None leaves vLLM's dummy weights."""
        begin = time.perf_counter()
        from vllm import LLM

        imported = time.perf_counter()
        if weight_seed is not None:
            os.environ[weights.SEED] = str(weight_seed)
        self._llm = LLM(**engine, worker_extension_cls=weights.EXTENSION)
        self._vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        ready = time.perf_counter()
        return {"import_seconds": imported - begin, "build_seconds": ready - imported, **self.do_describe()}

    def do_describe(self) -> dict[str, Any]:
        """Versions, the device, and what the compiler did."""
        import torch
        import vllm
        from vllm.compilation.counter import compilation_counter

        config = self._llm.llm_engine.vllm_config
        compilation = config.compilation_config
        names = [name for name in sys.modules if name == "overlay" or name.startswith("overlay.")]
        triton = sys.modules.get("triton")
        import transformers

        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": getattr(triton, "__version__", None),
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "overlay_modules": sorted(names),
            "gpu_memory": self._memory(),
            "architecture": config.model_config.architecture,
            "quantization": str(config.model_config.quantization),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "v2_model_runner": str(getattr(config, "use_v2_model_runner", None)),
            "cudagraph_mode": str(compilation.cudagraph_mode),
            "cudagraph_capture_sizes": compilation.cudagraph_capture_sizes,
            "compile_mode": str(compilation.mode),
            "compile_seconds": compilation.compilation_time,
            "counters": dataclasses.asdict(compilation_counter),
        }

    @staticmethod
    def _memory() -> dict[str, int] | None:
        """Bytes that this process's allocator holds; the models of tensor parallelism are in other processes."""
        import torch

        if not torch.cuda.is_available():
            return None
        return {"reserved": torch.cuda.memory_reserved(), "peak_allocated": torch.cuda.max_memory_allocated()}

    def do_checksum(self) -> str:
        """A checksum over the weights, after vLLM has repacked them; of all ranks by comma."""
        return ",".join(self._llm.collective_rpc("bench_checksum"))

    # ---- requests

    def _parameters(self, tokens: int, logprobs: int | None = None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)

    def do_add_adapter(self, name: str, number: int, path: str) -> bool:
        """Load a LoRA adapter; requests ask for it by its name. False where vLLM has it already."""
        from vllm.lora.request import LoRARequest

        self._adapters[name] = LoRARequest(name, number, path)
        return bool(self._llm.llm_engine.add_lora(self._adapters[name]))

    def do_remove_adapter(self, name: str) -> bool:
        """Remove a loaded adapter that no request is using. False where vLLM does not have it."""
        return bool(self._llm.llm_engine.remove_lora(self._adapters.pop(name).lora_int_id))

    def _adapter_of(self, name: str | None) -> dict[str, Any]:
        """The argument of `add_request` for an adapter's name; none for a base request."""
        return {} if name is None else {"lora_request": self._adapters[name]}

    def _add(self, length: int, seed: int, tokens: int, logprobs: int | None = None, adapter: str | None = None) -> str:
        self._count += 1
        identifier = f"evidence-{self._count}"
        prompt = {"prompt_token_ids": make_prompt(length, seed, self._vocabulary)}
        parameters = self._parameters(tokens, logprobs)
        self._llm.llm_engine.add_request(identifier, prompt, parameters, **self._adapter_of(adapter))
        return identifier  # vLLM has a name of its own inside; outputs and aborts go by this one

    def _drain(self) -> None:
        """Step until nothing is left, the batch that asynchronous scheduling still has in flight included."""
        engine, steps = self._llm.llm_engine, 0
        while engine.has_unfinished_requests():
            engine.step()
            steps += 1
            if steps > 20_000:
                raise RuntimeError("requests do not end")
        for _ in range(3):
            engine.step()
        self._synchronize()

    def do_generate(
        self, lengths: list[int], seed: int, tokens: int, logprobs: bool, adapters: list[str | None] | None = None
    ) -> dict[str, Any]:
        """All prompts at once, greedy. Gives tokens per request, and the chosen tokens' log probabilities exactly.

        `adapters` has a loaded adapter's name, or None for the base model, per prompt.
        """
        engine = self._llm.llm_engine
        begin = time.perf_counter()
        order = {}
        for index, (length, adapter) in enumerate(zip(lengths, adapters or [None] * len(lengths), strict=True)):
            order[self._add(length, seed + index, tokens, 0 if logprobs else None, adapter)] = index
        finished: list[Any] = [None] * len(lengths)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[order[output.request_id]] = output.outputs[0]
        self._drain()
        return {**self._answer(finished, logprobs), "seconds": time.perf_counter() - begin}

    @staticmethod
    def _answer(finished: list[Any], logprobs: bool) -> dict[str, Any]:
        """The tokens of finished requests, and a digest of their log probabilities' bits."""
        values: list[list[str]] = []
        if logprobs:
            for output in finished:
                pairs = zip(output.token_ids, output.logprobs, strict=True)
                values.append([float(entry[token].logprob).hex() for token, entry in pairs])
        return {
            "tokens": [list(output.token_ids) for output in finished],
            "logprobs": hashlib.sha256(json.dumps(values).encode()).hexdigest() if logprobs else None,
            "logprobs_of_first": values[0][:8] if logprobs else None,
        }

    # ---- timing

    def _synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def do_decode_begin(
        self,
        requests: int,
        prompt: int,
        tokens: int,
        warm: int,
        seed: int,
        adapters: tuple[str | None, ...] | list[str | None] = (None,),
    ) -> dict[str, Any]:
        """Start `requests` requests and step until all of them decode together. They take turns in using `adapters`."""
        self._decoding = [
            self._add(prompt, seed + index, tokens, adapter=adapters[index % len(adapters)])
            for index in range(requests)
        ]
        together, steps = 0, 0
        while together < warm:
            outputs = self._llm.llm_engine.step()
            if outputs:  # asynchronous scheduling fills its queue first: steps without output
                together = together + 1 if len(outputs) == requests else 0
            steps += 1
            if steps > 5_000:
                raise RuntimeError(f"{requests} requests never decoded together")
        self._synchronize()
        return {"steps": steps}

    def do_decode_steps(self, count: int, warm: int) -> dict[str, Any]:
        """Time `count` steps in a row, after `warm` untimed ones. Only steps that give a token per request count."""
        requests, empty = len(self._decoding), 0

        def step() -> bool:
            nonlocal empty
            complete = len(self._llm.llm_engine.step()) == requests
            empty = 0 if complete else empty + 1
            if empty > 100:
                raise RuntimeError(f"{requests} requests no longer decode together")
            return complete

        gc.collect()
        gc.disable()
        try:
            done = 0
            while done < warm:
                done += step()
            laps = [time.perf_counter()]
            while len(laps) <= count:
                if step():
                    laps.append(time.perf_counter())
            self._synchronize()
        finally:
            gc.enable()
        each = sorted(after - before for before, after in itertools.pairwise(laps))
        return {"mean": (laps[-1] - laps[0]) / count, "median": each[len(each) // 2], "minimum": each[0]}

    def do_decode_end(self) -> dict[str, Any]:
        """Abort the running requests and drain the engine."""
        self._llm.llm_engine.abort_request(self._decoding)  # vLLM knows them by these names and by its own
        self._decoding = []
        self._drain()
        return {}

    def do_first_token(self, length: int, repetitions: int, seed: int, adapter: str | None = None) -> list[float]:
        """Seconds from adding one request to its first and only token, `repetitions` times."""
        engine, times = self._llm.llm_engine, []
        prompts = [make_prompt(length, seed + index, self._vocabulary) for index in range(repetitions)]
        gc.collect()
        gc.disable()
        try:
            for prompt in prompts:
                self._count += 1
                parameters = self._parameters(1)
                self._synchronize()
                begin = time.perf_counter()
                engine.add_request(
                    f"evidence-{self._count}", {"prompt_token_ids": prompt}, parameters, **self._adapter_of(adapter)
                )
                while not engine.step():
                    pass
                times.append(time.perf_counter() - begin)
                self._drain()
        finally:
            gc.enable()
        return times

    def do_host(self) -> dict[str, float]:
        """How fast this process's host is just now: seconds for a fixed piece of Python, and for launching small kernels.

        No launches where this process does not use the GPU itself, as with tensor parallelism.
        """
        import torch

        found = {"Python": min(self._python_seconds() for _ in range(3))}
        if torch.cuda.is_initialized():
            found["kernel launches"] = min(self._launch_seconds() for _ in range(3))
        return found

    @staticmethod
    def _python_seconds() -> float:
        begin = time.perf_counter()
        total = 0
        for number in range(HOST_STEPS):
            total += number & 7
        return time.perf_counter() - begin

    def _launch_seconds(self) -> float:
        import torch

        value = torch.zeros(1, device="cuda")
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(HOST_LAUNCHES):
            value.add_(1.0)
        seconds = time.perf_counter() - begin
        self._synchronize()
        return seconds

    def do_kernels(
        self, requests: int, steps: int, seed: int, adapters: list[str | None] | tuple[str | None, ...] = (None,)
    ) -> dict[str, Any]:
        """What the GPU did in a few decode steps, by start: `names`, and per kernel, copy or fill `[name's index, stream,
        start, duration]` in microseconds. The last MOST_KERNELS of them; none where this process does not use a GPU.
        """
        import torch

        if not torch.cuda.is_initialized():
            return {"names": [], "kernels": []}
        activities = [torch.profiler.ProfilerActivity.CUDA]
        self.do_decode_begin(requests, 16, steps + 100, 8, seed, adapters)
        with torch.profiler.profile(activities=activities):  # the first use of the profiler sets it up: seconds
            self.do_decode_steps(2, 0)
        with torch.profiler.profile(activities=activities) as profile:
            self.do_decode_steps(steps, 0)
        self.do_decode_end()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return kernels_of(json.loads(path.read_text(errors="replace")))


def main() -> None:
    """Answer commands until `quit` or the end of standard input.

    The first argument, if there is one, is the path of a file with a class `Worker`: an EngineWorker with further commands.
    """
    worker: EngineWorker = runpy.run_path(sys.argv[1])["Worker"]() if len(sys.argv) > 1 else EngineWorker()
    if worker.room:
        with_room(replies.answer_commands, worker)
    else:
        replies.answer_commands(worker)
