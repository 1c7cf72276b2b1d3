"""Auxiliary-stream overlay for vLLM. See README.md."""

__version__ = "0.1.0"
