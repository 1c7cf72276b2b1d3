"""GDN input projections of Qwen3-Next, Qwen3.5 and every model built on the same layer: two GEMMs at once.

Symptom: each GDN layer runs ``in_proj_qkvz`` (2048 to 12288 columns in Qwen3.5-35B-A3B) and then ``in_proj_ba`` (64
columns) on one stream. The second one fills a few percent of the GPU.

Cause: nothing orders the two. They read the same input and write different results.

Fix: start launches `in_proj_ba` on an auxiliary stream. `in_proj_qkvz` runs as vLLM runs it, whatever its quantization.
Join waits (overlay.side_work). Upstream's own forward runs with a stand-in for `self` whose two projections do this. So no
line of upstream is repeated, and a changed signature (0.25 to 0.26) does not matter.

The sizes are read when a layer is made. The pair is made when the weights are loaded, before vLLM traces. The sizes at
which it forks are measured on the loaded layers.

Upstream: vLLM #36795 did it and #38152 reverted it (the op took the layer name as ``str``, so every layer became a compile
artifact of its own); #39748 closed, #42301 open; #41457 would fuse the two GEMMs instead.

Remove when: the verdict on your vLLM (in the log and in the journal) is ``landed``.
"""
