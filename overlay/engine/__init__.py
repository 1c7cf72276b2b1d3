"""Moments of a running vLLM (ranks meet, the model is loaded, warm-up ends), and the key of the compile cache."""
