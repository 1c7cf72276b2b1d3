"""Arms the interpreter: a finder that waits for ``import vllm``.

This runs in every Python process, so it is short, imports nothing (no `typing`, no `__future__`), and everything else is
in `overlay.start.import_hooks`, which is loaded when a process really imports vLLM. Asking for vLLM's spec does not count.
"""

import sys

TYPE_CHECKING = False  # as in typing, without the import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Around = Callable[[ModuleType, Callable[[], None]], None]

_armed = False


def arm() -> None:
    """Wait for ``import vllm`` in this process. Calling it again does nothing."""
    global _armed
    if _armed:
        return
    _armed = True
    vllm = sys.modules.get("vllm")
    if vllm is not None:
        from overlay.start.import_hooks import around_vllm

        around_vllm(vllm, lambda: None, watch)
    else:
        watch("vllm", _around_vllm)


def watch(name: str, around: "Around") -> None:
    """Have `around` called in the place of executing the module `name`, with the module and with what executes it."""
    sys.meta_path.insert(0, _Finder(name, around))


def _around_vllm(module: "ModuleType", execute: "Callable[[], None]") -> None:
    try:
        from overlay.start.import_hooks import around_vllm
    except Exception as error:  # a damaged folder must not cost anyone their vLLM
        sys.stderr.write(f"vLLM overlay: vLLM runs stock: {type(error).__name__}: {error}\n")
        execute()
    else:
        around_vllm(module, execute, watch)


class _Finder:
    """Finds nothing itself; asks the others for the spec of one module, and notices when that spec is executed."""

    def __init__(self, name: str, around: "Around") -> None:
        self._name = name
        self._around = around

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != self._name:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _notice_execution(spec, self._around)
                return spec
        return None


def _notice_execution(spec: "ModuleSpec", around: "Around") -> None:
    """Act right before and right after the module of `spec` is executed.

    The loader stays the object that it is (resources, source and reload keep working); only its `exec_module` is shadowed
    for this one call.
    """
    loader = spec.loader
    execute = getattr(loader, "exec_module", None)
    if loader is None or execute is None:  # a namespace package: a folder of this name
        return

    def exec_module(module: "ModuleType") -> None:
        if module.__name__ != spec.name:  # a zip's loader is that of all its modules
            execute(module)
            return
        vars(loader).pop("exec_module", None)  # who has asked for the spec twice has shadowed it twice
        around(module, lambda: execute(module))

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError as error:  # somebody's loader with slots: an import hook must not fail for our sake
        sys.stderr.write(f"vLLM overlay: vLLM runs stock here: the loader of {spec.name} cannot be watched: {error}\n")
