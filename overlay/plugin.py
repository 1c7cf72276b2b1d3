"""The other door: vLLM's own plugin mechanism calls `register` in each of its processes, before it builds the model.

It is found by an entry point of the group ``vllm.general_plugins``, in the metadata of an installed package or of a folder
on PYTHONPATH. It opens later than sitecustomize.py, when vLLM has been imported, so it is too late for the race over
transformers; the patches are all in time. Where VLLM_PLUGINS is set it has to name ``auxstream_overlay``.

A folder of which parts are missing fails right here, at the import: vLLM logs that and goes on without.
"""

from __future__ import annotations

from overlay import bootstrap
from overlay.start import import_hooks  # noqa: F401 - arming loads it


def register() -> None:
    """Arm the overlay in this process, unless sitecustomize.py has. Raises what strict wants raised, and nothing else."""
    bootstrap.arm()
