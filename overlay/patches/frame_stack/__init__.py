"""Room for the Python frames of vLLM's loops: `patch` tells the story."""
