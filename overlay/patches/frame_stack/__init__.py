"""vLLM's loops run above one large Python frame, so that no call of a step crosses the end of a chunk of frames.

`verdict` reads where the loops are, `patch` wraps them, `room` has the large frame and the test whether Python needs it.

Symptom: a step that waits for the host takes up to a fifth longer in one process than in another that does the same, and
does so in every step: on one H200 host the first token took 0.86 to 1.20 of stock's time with the same graphs.

Cause: CPython keeps frames in chunks of 16 KiB (from 3.11 on). A call that does not fit maps a new chunk, and its return
unmaps it: 10 µs on a virtual machine, where a call takes 0.04. Which calls of a step these are depends on the size of
every frame below. So it depends on the number of layers (the compiled model's frame has a local for every weight), and on
who has wrapped what. A wrapper of ours can move stock's calls across an end, so the overlay has to prevent that.

Fix: a function whose code asks for a stack of half a mebibyte gets a chunk of one mebibyte, and what it calls goes into the
rest. Only pages that are used take memory. Each loop is entered once per process, so a step pays nothing. An engine inside
somebody's own process is left out, because its frames are not ours; so are Ray's workers.

Upstream: CPython gh-142183 (calls across stack chunks perform badly); gh-145789 keeps one chunk for the next call, and is in
3.15, 3.14 and 3.13. vLLM has no part in it. docs/frame-stack.md tells the story for somebody who knows neither.

Remove when: no Python that vLLM runs on needs it: 3.11 and 3.12 get no fix. Where Python needs none the patch is ``inert``.
"""
