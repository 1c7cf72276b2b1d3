"""The second way in: vLLM's plugin mechanism calls `register` in each of its processes, before it builds the model.

vLLM finds it by an entry point of the group ``vllm.general_plugins``, in the metadata of an installed package or of a
folder on PYTHONPATH. It runs later than sitecustomize.py, after vLLM has been imported. That is too late for the race over
transformers, but in time for every patch. If VLLM_PLUGINS is set, it has to name ``auxstream_overlay``.

If parts of the overlay's folder are missing, this import fails; vLLM logs that and goes on.
"""

from __future__ import annotations

from overlay import bootstrap
from overlay.start import import_hooks  # noqa: F401 - arming loads it


def register() -> None:
    """Arm the overlay in this process, unless sitecustomize.py has done so. Raises only what strict mode raises."""
    bootstrap.arm()
