"""The patches, one folder each: `verdict` judges the source of a vLLM, `patch` has ``install(module, verdict, settings) -> Verdict``."""
