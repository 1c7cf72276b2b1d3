"""The words that several modules, the journals and the command line share. It imports no other module of the overlay."""

from __future__ import annotations

from collections.abc import Iterable

#: The patches, in the order in which they are named.
PATCH_NAMES = ("gdn", "deepseek_v4", "lora_linear", "pooling")

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


def is_removable(states: Iterable[str]) -> bool:
    """Whether the overlay has nothing to do, where its patches have these states. A patch that is off does not count."""
    judged = set(states) - {OFF}
    return bool(judged) and judged <= {LANDED, ABSENT}
