"""Pooling without async scheduling: the pooler's output is copied on its own stream, and the host waits for that copy only.

Symptom: without async scheduling (``--no-async-scheduling``, Ray, or an option that excludes it) every pooling step ends
with a synchronisation of the whole device: the host waits for all work on all streams.

Cause: `GPUModelRunner._pool` returns the asynchronous output, which waits for the event of its own copy, only under async
scheduling. Otherwise it copies on the main stream and synchronises.

Fix: `_pool` reads ``use_async_scheduling`` for this choice only (the verdict checks that). So the patch makes the flag true
while `_pool` runs, and makes sure that the copy stream exists. All executors accept the asynchronous output without async
scheduling as well, and ask for its result at once. During that time only the worker's main
thread reads the flag, and it is inside `_pool`.

The synchronisation had one more effect: no step began before the last one had left the GPU. A worker whose output nobody
asks for (multiproc asks one rank) would run ahead, and could overwrite inputs that the GPU has not read. So such a worker
stays stock.

Upstream: since vLLM #39113 (0.20.0) the asynchronous output is the only one on CUDA-like devices.

Remove when: the verdict on your vLLM (in the log and in the journal) is ``landed``.
"""
