"""The words that several modules, the journals and the command line share. It imports no other module of the overlay."""

from __future__ import annotations

from collections.abc import Mapping

#: The patches, in the order in which they are named.
PATCH_NAMES = ("gdn", "deepseek_v4", "lora_linear", "pooling", "frame_stack")
#: Those that mend Python and not vLLM: no vLLM will ever do it itself.
OF_PYTHON = frozenset({"frame_stack"})

# The state of a patch. These five are a verdict's, read from vLLM's source:
APPLY = "apply"  #: the shape is known and there is something to gain
LANDED = "landed"  #: upstream does it
ABSENT = "absent"  #: this vLLM has no such model or class
DRIFTED = "drifted"  #: the shape is not one we know
INERT = "inert"  #: the shape is right, but there is nothing to gain here
# A process adds these four:
NOT_SEEN = "not seen"  #: this process has not imported the target
OFF = "off"  #: the patch is switched off
REFUSED = "refused"  #: somebody else has been at what the patch would change
INEFFECTIVE = "ineffective"  #: layers are patched, and the op has never run

#: Strategies of one call. "dual" gives the auxiliary stream its work first, "dual_main_first" the main stream; which of the
#: two overlaps better depends on the shape.
SERIAL, DUAL, DUAL_MAIN_FIRST = "serial", "dual", "dual_main_first"
STRATEGIES = (SERIAL, DUAL, DUAL_MAIN_FIRST)
#: Plans that a person can ask for: a measured strategy for each size, or the same strategy for all sizes.
AUTO = "auto"
PLANS = (AUTO, DUAL, SERIAL)

#: Roles of processes that nobody's multiprocessing has started.
API_SERVER = "APIServer"
MAIN = "Main"
RAY_WORKER = "RayWorker"
REGISTRY_PROBE = "ModelRegistryProbe"


#: What is said of removal where a patch of Python's still applies.
WITH_IT_GOES = "with it goes frame_stack, which some Pythons need"


def is_removable(states: Mapping[str, str]) -> bool:
    """Whether the overlay has nothing to do in this vLLM, where its patches, by name, have these states.

    A patch that is off does not count. A patch of Python's does not have to land: it would keep the overlay for ever. But
    one of which nobody can tell what it would do is no reason to say so.
    """
    judged = {name: state for name, state in states.items() if state != OFF}
    of_vllm = {state for name, state in judged.items() if name not in OF_PYTHON}
    of_python = {state for name, state in judged.items() if name in OF_PYTHON}
    return bool(of_vllm) and of_vllm <= {LANDED, ABSENT} and of_python <= {LANDED, ABSENT, APPLY, INERT, NOT_SEEN}


def loses_by_removal(states: Mapping[str, str]) -> bool:
    """Whether a patch of Python's applies: what can be removed is not quite without use."""
    return any(states.get(name) == APPLY for name in OF_PYTHON)
