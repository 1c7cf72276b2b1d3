"""Runs in a process of its own: one offline engine, some prompts, and the tokens as JSON.

The parent gives the request as JSON on the command line, and the file for the answers.
"""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import sys
from typing import Any

PROMPTS = [list(range(1, 40)), [7, 8, 9], [201, 3, 77, 300, 12] * 11]
NEW_TOKENS = 12


def run(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = dict(
        model=request["model"],
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        seed=0,
        enforce_eager=not request["compiled"],
        tensor_parallel_size=request["tensor_parallel_size"],
        skip_tokenizer_init=True,
    )
    options.update(request.get("options", {}))
    engine = LLM(**options)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    # No log probabilities: for them vLLM compiles a kernel with Inductor on the CPU, half a minute of every run.
    return {"base": [list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling)]}


def adapt(request: dict[str, Any]) -> dict[str, Any]:
    """Adapters come and go in one engine: none, each alone, all in one batch with a base request, removed and loaded."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=request["model"],
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        seed=0,
        enforce_eager=not request["compiled"],
        skip_tokenizer_init=True,
        enable_lora=True,
        # One more than there are adapters: vLLM 0.32.0 on a CPU gives a base request whatever is in the last slot.
        max_loras=3,
        max_lora_rank=16,
    )
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]

    def tokens(adapters: Any) -> list[list[int]]:
        outputs = engine.generate(prompts, sampling, lora_request=adapters)
        return [list(output.outputs[0].token_ids) for output in outputs]

    first, second = (
        LoRARequest(f"adapter {number}", number, path) for number, path in enumerate(request["adapters"], 1)
    )
    answers = {"base": tokens(None), "first": tokens(first), "second": tokens(second)}
    answers["mixed"] = tokens([None, first, second])
    for adapter in (first, second):
        assert engine.llm_engine.remove_lora(adapter.lora_int_id)
    answers["removed"] = tokens(None)
    again = LoRARequest("again", 7, second.lora_path)
    assert engine.llm_engine.add_lora(again)
    answers["again"] = tokens(again)
    return answers


def embed(request: dict[str, Any]) -> dict[str, Any]:
    """Embeddings of the prompts, in two batches of one engine; prompts are longer than a step, so some come in pieces."""
    from vllm import LLM

    engine = LLM(
        model=request["model"],
        runner="pooling",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        enable_chunked_prefill=True,
        seed=0,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    return {
        name: [output.outputs.embedding for output in engine.embed(batch, use_tqdm=False)]
        for name, batch in (("together", prompts), ("first", prompts[:1]))
    }


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    scenario = embed if wanted.get("embed") else adapt if wanted.get("adapters") else run
    answers = scenario(wanted)
    pathlib.Path(sys.argv[2]).write_text(json.dumps(answers))
    # What has asked to be told of the end is told; for the interpreter to take itself apart would take three seconds more.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
