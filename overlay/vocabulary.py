"""The words that several modules, the journals and the command line share. Imports no other module of the overlay."""

from __future__ import annotations

from collections.abc import Mapping

PATCH_NAMES = ("gdn", "deepseek_v4", "dsa", "lora_linear", "pooling", "frame_stack")
#: Patches that work around Python and not vLLM. No vLLM will ever make them needless.
OF_PYTHON = frozenset({"frame_stack"})

# The state of a patch. These four are a verdict's, read from vLLM's source:
APPLY = "apply"  #: the shape is known and there is something to gain
LANDED = "landed"  #: upstream does it
ABSENT = "absent"  #: this vLLM has no such model or class
DRIFTED = "drifted"  #: the source is there, but not in a shape that the patch knows
# A process adds these five:
INERT = "inert"  #: the shape is right, but there is nothing to gain here
NOT_SEEN = "not seen"  #: this process has not imported the target
OFF = "off"  #: the patch is switched off
REFUSED = "refused"  #: other code runs than the verdict has read
INEFFECTIVE = "ineffective"  #: layers are patched, and the op has never run

#: Strategies of one call. "dual" launches the auxiliary stream's work first, "dual_main_first" the main stream's. Which of
#: the two overlaps better depends on the shape.
SERIAL, DUAL, DUAL_MAIN_FIRST = "serial", "dual", "dual_main_first"
STRATEGIES = (SERIAL, DUAL, DUAL_MAIN_FIRST)
#: The plans that can be set: a measured strategy for each size, or one strategy for all sizes.
AUTO = "auto"
PLANS = (AUTO, DUAL, SERIAL)

#: Roles of processes that multiprocessing has not started.
API_SERVER = "APIServer"
MAIN = "Main"
RAY_WORKER = "RayWorker"
REGISTRY_PROBE = "ModelRegistryProbe"


#: Added to the advice to remove the overlay if a patch of OF_PYTHON applies.
WITH_IT_GOES = "with it goes frame_stack, which some Pythons need"


def is_removable(states: Mapping[str, str]) -> bool:
    """Whether the overlay has nothing to do in this vLLM. `states` are the states of its patches, by name.

    A patch that is off does not count. A patch of OF_PYTHON may still apply, because it never lands. But the answer is no
    if its state does not say what it would do.
    """
    judged = {name: state for name, state in states.items() if state != OFF}
    of_vllm = {state for name, state in judged.items() if name not in OF_PYTHON}
    of_python = {state for name, state in judged.items() if name in OF_PYTHON}
    return bool(of_vllm) and of_vllm <= {LANDED, ABSENT} and of_python <= {LANDED, ABSENT, APPLY, INERT, NOT_SEEN}


def loses_by_removal(states: Mapping[str, str]) -> bool:
    """Whether a patch of OF_PYTHON applies, so that removing the overlay loses something."""
    return any(states.get(name) == APPLY for name in OF_PYTHON)
