"""The first `import vllm` of a process: from there to installed patches."""
