"""Side work: what reads the input of a larger piece of work (main), and is needed only after it.

Two ops stand around main in the model's graph. *Start* forks the side work onto an auxiliary stream; main then runs exactly
as vLLM runs it, whatever its quantization; *join* waits for the side work. Outside a CUDA graph capture start runs the
side work itself and join does nothing: there a fork costs more than it hides.

Order. Inductor may reorder what no data orders. So start declares that it writes to one of main's own weights (`gate`); it
does not. Whatever reads that weight, which is main's GEMM and nothing else, then comes after start. The input is not declared as
written: that would tear the quantization of the input from the norm before it, which Inductor fuses for static FP8.
Join declares that it writes to the side result, so what reads the result comes after join, and it reads main's result,
so it comes after main.

Memory contract, for start and join as for `overlay.side_work.streams`:

* An auxiliary stream does nothing outside a fork. Every fork begins with a wait for an event that was recorded on the stream that
  runs main, after everything that main's stream has done so far. A captured fork is captured with its join.
* What is allocated on the auxiliary stream is read on main's stream after the join. When it is freed, torch's allocator gives its
  memory to later work on that auxiliary stream only. That work waits for the next fork's event, which main's stream records
  after the last read. So `Tensor.record_stream` is not needed. cudaMallocAsync gives memory to any stream, so no fork is made
  with it.
* This holds for one main stream at a time. Target and drafter model take turns on one stream, and share the auxiliary ones. Where
  two threads take turns within a layer (micro-batching, DBO), nothing is forked.

For start and join in particular:

* Join takes the input of start. Inductor keeps the input's memory until join, so nothing overwrites it while the
  auxiliary stream reads it. With main first the lane keeps the work, and so its tensors, until join launches it.
* The result of a plain GEMM is allocated on main's stream, before the fork, and read there after the join. No block of memory
  changes streams. The result of a layer (`start_layer`) is allocated on the auxiliary stream.
* Start and join lie in one piece of the graph: no splitting op and no eager break lies between the two projections (the
  verdict reads that from the source).
* There is one auxiliary stream per device and thread (`overlay.side_work.lane`). A region has others per main stream and slot:
  two engines in one process share none.
"""
