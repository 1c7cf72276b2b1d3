"""The verdict for frame_stack: are vLLM's loops where they can be wrapped, and does each run in one call?"""

from __future__ import annotations

import ast

from overlay.engine.loops import LOOPS
from overlay.verdict.cut import cut
from overlay.verdict.model import Source, SourceTree, Verdict, Witness, without_target
from overlay.verdict.questions import Drift, binders, drifted
from overlay.vocabulary import APPLY

PACKAGE = "vllm.v1"
MODULES = tuple(LOOPS)
#: The module that starts the engine cores.
WITNESS = Witness("vllm.v1.engine.core_client", "class DPLBAsyncMPClient", r"vllm\.v1\.engine\.core import")


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it. It does not know which Python will run that
    vLLM.
    """
    if not any(map(tree.has, MODULES)):
        lost = f"this vLLM has engine cores, but they are not in {MODULES[0]}"
        return without_target(tree, WITNESS, absent="this vLLM has no processes of its own with a loop", lost=lost)
    places = []
    for module, names in LOOPS.items():
        source = tree.read(module)
        if source is None:
            base = module.replace(".", "/")
            return drifted(Drift(ast.Pass(), f"this vLLM has no {module}"), f"{tree.folder}/{base}.py", PACKAGE)
        try:
            places += [f"{source.path}:{_line_of_loop(source, name)}" for name in names]
        except (Drift, SyntaxError) as error:
            return drifted(error, source.path, PACKAGE)
    methods = tuple(f"{module[len(PACKAGE) + 1 :]}.{name}" for module, names in LOOPS.items() for name in names)
    reason = "the loops of engine cores and workers can run above one large frame"
    return Verdict(APPLY, reason, PACKAGE, None, methods, where=places[0], shapes_graph=False, without_layers=True)


def _line_of_loop(source: Source, name: str) -> int:
    """The line of a method that holds a loop. Raises Drift unless it is there once, is not asynchronous, and loops.

    An asynchronous method would return at once, before its frames exist. Only the class is parsed.
    """
    class_name, _, method = name.partition(".")
    class_node = cut(source, class_name)
    defined = binders(getattr(class_node, "body", []), method)
    if len(defined) != 1:
        raise Drift(defined[0] if defined else class_node, f"{name} is defined {len(defined)} times")
    (found,) = defined
    if not isinstance(found, ast.FunctionDef):
        raise Drift(found, f"{name} is asynchronous")
    if not any(isinstance(node, ast.While) for node in ast.walk(found)):
        raise Drift(found, f"{name} has no loop")
    return found.lineno
