"""Parts of `benchmarks/gpu_evidence.py`: what a GPU host measures and checks, one module per subject."""
