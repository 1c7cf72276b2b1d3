"""vLLM's loops run above one large Python frame, so that no call of a step crosses the end of a chunk of frames.

`verdict` reads where the loops are. `patch` wraps them. `room` has the large frame, and the test whether Python needs it.

Symptom: a step that waits for the host takes up to a fifth longer in one process than in another that does the same, in
every step. On one H200 host the first token took 0.86 to 1.20 of stock's time with the same graphs.

Cause: CPython keeps frames in chunks of 16 KiB (from 3.11 on). A call that does not fit maps a new chunk, and its return
unmaps it. That takes 10 µs on a virtual machine, where a call takes 0.04 µs. Which calls of a step do this depends on the
size of every frame below: on the number of layers (the compiled model's frame has a local for every weight), and on every
wrapper. A wrapper of the overlay can move stock's calls across an end, so the overlay has to prevent that.

Fix: a function whose code asks for a stack of half a mebibyte gets a chunk of one mebibyte, and the functions that it calls
use the rest. Only pages that are used take memory. Each loop is entered once per process, so a step pays nothing. An engine
inside a user's own process is left out, because the frames there are the user's. Ray's workers are left out too.

Upstream: CPython gh-142183 (calls across stack chunks perform badly). gh-145789 keeps one chunk for the next call; it is in
3.15, 3.14 and 3.13. vLLM has no part in it. docs/frame-stack.md tells the story for a reader who knows neither.

Remove when: no Python that vLLM runs on needs it. 3.11 and 3.12 get no fix. Where Python does not need it the patch is
``inert``.
"""
