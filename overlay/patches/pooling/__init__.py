"""Pooling without async scheduling: the pooler's output is copied on its own stream, and the host waits for that copy only.

Symptom: without async scheduling (``--no-async-scheduling``, Ray, or an option that excludes it) every pooling step ends with
a synchronisation of the whole device: the host waits for everything on every stream.

Cause: `GPUModelRunner._pool` returns the asynchronous output, which waits for the event of its own copy, only under async
scheduling. Otherwise it copies on the main stream and synchronises.

Fix: `_pool` reads ``use_async_scheduling`` for this choice and for nothing else (the verdict checks that). So the flag is true
while `_pool` runs, and the copy stream exists. All executors accept the asynchronous output without async scheduling as well,
and ask for its result at once. Only the worker's main thread reads the flag at that time, and it is in `_pool`.

The synchronisation did one more thing: no step began before the last one had left the GPU. A worker whose output nobody asks
for (multiproc asks one rank) would run ahead, and could write inputs that the GPU has not read. So such a worker stays stock.

Upstream: vLLM #39113 (0.20.0) made the asynchronous output the only one on CUDA-like devices.

Remove when: the verdict on your vLLM (in the log and in the journal) is ``landed``.
"""
