"""Started by its path, in a process of its own: runs of `vllm bench serve`, asked for over pipes."""

import importlib

if __name__ == "__main__":
    importlib.import_module("bench_engine.client").main()
