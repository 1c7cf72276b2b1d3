"""Started by its path, in a process of its own: one engine, driven over pipes."""

import importlib

if __name__ == "__main__":  # a spawned child of vLLM imports this file again
    importlib.import_module("bench_engine.worker").main()
