"""Arms the interpreter: installs a finder that waits for ``import vllm``.

This runs in every Python process. So it is short, and it imports nothing (no `typing`, no `__future__`). Everything else is
in `overlay.start.import_hooks`, which is loaded when a process really imports vLLM. Asking only for vLLM's spec does not
load it.
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
    """Have `around` called instead of executing the module `name`. It gets the module, and a function that executes the
    module.
    """
    sys.meta_path.insert(0, _Finder(name, around))


def _around_vllm(module: "ModuleType", execute: "Callable[[], None]") -> None:
    try:
        from overlay.start.import_hooks import around_vllm
    except Exception as error:  # a damaged overlay folder must not stop vLLM
        sys.stderr.write(f"vLLM overlay: vLLM runs stock: {type(error).__name__}: {error}\n")
        execute()
    else:
        around_vllm(module, execute, watch)


class _Finder:
    """Asks the other finders for the spec of one module, and has `around` called when that spec is executed."""

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
    """Have `around` called in the place of executing the module of `spec`.

    The loader stays the same object, so resources, source and reload keep working. Only its `exec_module` is shadowed, for
    this one call.
    """
    loader = spec.loader
    execute = getattr(loader, "exec_module", None)
    if loader is None or execute is None:  # a namespace package: a plain folder of this name
        return

    def exec_module(module: "ModuleType") -> None:
        if module.__name__ != spec.name:  # a zip has one loader for all its modules
            execute(module)
            return
        vars(loader).pop("exec_module", None)  # asking twice for the spec shadows it twice
        around(module, lambda: execute(module))

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError as error:  # a loader with slots: an import must not fail because of us
        sys.stderr.write(f"vLLM overlay: vLLM runs stock here: the loader of {spec.name} cannot be watched: {error}\n")
