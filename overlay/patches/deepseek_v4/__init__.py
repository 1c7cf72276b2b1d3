"""The input GEMMs of DeepSeek-V4's attention: up to four at once.

Symptom: each layer of vLLM 0.20.0 runs four GEMMs one after the other, mostly on one stream: ``fused_wqa_wkv`` (1536
columns in DeepSeek-V4-Flash), the compressor's kv_score (2048 or 1024), the indexer's ``weights_proj`` (64) and the
kv_score of the indexer's own compressor (512). At decode sizes none of them fills the GPU.

Cause: all four read only the attention's input, but upstream calls each one where its result is needed.

Fix: all four start at the beginning of ``attention_impl``, inside upstream's custom op: ``fused_wqa_wkv`` on the main
stream, the others on up to three auxiliary streams. They cannot start earlier. The op splits the graph, and between the
pieces of a replayed graph no Python runs that could carry a result. So the traced forward gets a placeholder of zero rows.
Then upstream's own attention_impl runs, and gets each of the other results, finished, where it would compute it.

Upstream: vLLM #41061, in 0.20.1 and later, with the same streams and the same threshold, and in eager steps as well.

Remove when: the verdict on your vLLM (in the log and in the journal) is ``landed``.
"""
