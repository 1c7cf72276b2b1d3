"""The patches, one file each. A patch module has NAME and ``install(module, verdict, settings) -> Verdict``."""
