"""Moments of a running vLLM (the ranks meet, the model is loaded, the warm-up is over), and the key of the compile cache."""
