"""LoRA linears: the first half of the adapters' work runs next to the base layer.

Symptom: each linear with LoRA runs three things on one stream: its base layer, a shrink (a fill, and a GEMM to the
adapters' rank) and an expand (a GEMM from the rank to the output, which it adds to). At decode sizes the LoRA kernels take
as long as the base layer's GEMM, or longer, and fill a few percent of the GPU.

Cause: nothing orders the shrink and the base layer. Both read the layer's input.

Fix: start launches the shrink on an auxiliary stream. The base layer runs as vLLM runs it. Join waits, and then upstream's
own expand adds to the base layer's output (overlay.side_work). Start and join are put into a compiled graph last, so all
else in it is stock's (`overlay.side_work.insertion`). In vLLM before 0.18 that cannot be done, and a base layer that quantizes
its input stays stock. All of it is upstream's code:

* Its `add_lora_linear` runs with a stand-in for the punica wrapper, which notes the arguments of shrink and expand.
* Its `add_shrink` runs on the real wrapper. It passes its weights to the op ``lora_shrink``, a global of its module, and
  the patch puts a function there. This function calls upstream's op, unless the weights are `Gated`: then it calls start.
* Its `apply` runs on a copy of the layer whose wrapper adds nothing: that is the base layer.
* Its `add_expand` runs on the real wrapper.

So every kernel gets the arguments that upstream gives it. In a step above the captured sizes start becomes upstream's op
again, and join is removed.

Upstream: vLLM #35721 in 0.20.0, off by default (``VLLM_LORA_ENABLE_DUAL_STREAM``). If it is set, this patch does nothing.
Upstream also puts the expand on the auxiliary stream, into a buffer of zeros that is added at the end. That hides more and
costs more: a fill, and an addition that reads the whole output once more (benchmarks/results/ has both). It runs the base
layer inside its op. It leaves out merged layers (gate_up_proj, qkv_proj) up to 0.24.0, and replicated ones in all releases.
It takes the layer name as ``str``, so every layer becomes a compile artifact of its own.

Remove when: upstream's switch covers the layers that you serve, and is set.
"""
