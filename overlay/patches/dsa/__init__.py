"""Sparse attention of DeepSeek-V3.2 and GLM-5 (DSA): the indexer's projection runs beside the large one.

Symptom: each layer with an indexer runs `fused_qkv_a_proj` (7168 to 2112 columns in DeepSeek-V3.2) and then
`indexer.wk_weights_proj` (192 columns) on one stream. The second one fills a few percent of the GPU.

Cause: nothing orders the two. They read the same input and write different results. In an FP8 checkpoint the first one is
quantized and the second one is not, so they cannot be one GEMM.

Fix: where the method runs while a CUDA graph is captured, `wk_weights_proj` goes onto an auxiliary stream,
`fused_qkv_a_proj` runs as vLLM runs it, and then main's stream waits (overlay.side_work). These models are not compiled: vLLM
captures their methods as they are (breakable CUDA graphs). So no op is needed, and outside a capture the real layer runs.
No eager break lies between the two projections, so fork and join are in one segment.

A layer without an indexer has nothing to overlap. The drafter (MTP) may skip the indexer from step to step; then the real
layer runs. ROCm's layer has a forward of its own and stays stock.

Upstream: open requests #35226, #39943, #53027.

Remove when: the verdict on your vLLM (in the log and in the journal) is ``landed``.
"""
