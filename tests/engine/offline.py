"""Runs in a process of its own: one offline engine, some prompts, and the tokens as JSON.

The parent gives the request as JSON on the command line, and the file for the answers.
"""

from __future__ import annotations

import json
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
    if request["lora"]:
        options.update(enable_lora=True, max_lora_rank=8)
    engine = LLM(**options)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    # No log probabilities: for them vLLM compiles a kernel with Inductor on the CPU, half a minute of every run.
    answers = {"base": [list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling)]}
    if request["lora"]:
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest("adapter", 1, request["lora"])
        answers["lora"] = [
            list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling, lora_request=adapter)
        ]
    return answers


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_text(json.dumps(run(json.loads(sys.argv[1]))))
