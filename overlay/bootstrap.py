"""Arms the interpreter: a finder that waits for ``import vllm``.

This runs in every Python process, so it is short, imports nothing (no `typing`, no `__future__`), and everything else is
in `overlay.hooks`, which is loaded when a process really imports vLLM. Asking for vLLM's spec does not count.
"""

import sys

TYPE_CHECKING = False  # as in typing, without the import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_armed = False


def arm() -> None:
    """Wait for ``import vllm`` in this process. Calling it again does nothing."""
    global _armed
    if _armed:
        return
    _armed = True
    if "vllm" in sys.modules:
        from overlay.hooks import around_vllm

        around_vllm(lambda: None)
    else:
        sys.meta_path.insert(0, _VllmFinder())


class _VllmFinder:
    """Finds nothing itself; asks the others for vLLM's spec, and notices when that spec is executed."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "vllm":
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _notice_execution(spec)
                return spec
        return None


def _notice_execution(spec: "ModuleSpec") -> None:
    """Act right before and right after the module of `spec` is executed.

    The loader stays the object that it is (resources, source and reload keep working); only its `exec_module` is shadowed
    for this one call.
    """
    loader = spec.loader
    execute = getattr(loader, "exec_module", None)
    if loader is None or execute is None:  # a namespace package: a folder named vllm, not vLLM
        return

    def exec_module(module: "ModuleType") -> None:
        del loader.exec_module
        try:
            from overlay.hooks import around_vllm
        except Exception as error:  # a damaged folder must not cost anyone their vLLM
            sys.stderr.write(f"vLLM overlay: vLLM runs stock: {type(error).__name__}: {error}\n")
            execute(module)
        else:
            around_vllm(lambda: execute(module))

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError as error:  # somebody's loader with slots: an import hook must not fail for our sake
        sys.stderr.write(f"vLLM overlay: vLLM runs stock: its loader cannot be watched: {error}\n")
