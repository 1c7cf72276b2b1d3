"""From the first `import vllm` of a process to installed patches."""
