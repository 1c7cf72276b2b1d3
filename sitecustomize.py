"""The door: Python imports this module at every start, because its folder is on PYTHONPATH.

It arms the overlay and then steps aside for the sitecustomize that it shadows. It runs in every Python process of a
container, most of which never see vLLM, so it costs little, imports nothing heavy, and lets nothing go wrong: whatever
fails here is one line on stderr (logging is not configured yet), and Python starts as if this folder were not there.
"""

# os.path throughout: pathlib would be one more import
import os
import sys
from _frozen_importlib_external import PathFinder  # the import system's own; importlib would be one more file to load


def _open() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    chain = sys.modules.get("overlay.chain")
    whole = True
    # bootstrap reads the settings in full; whoever has switched the overlay off must not even pay for importing it.
    switched_off = os.environ.get("VLLMOVERLAY", "").strip().lower() in ("0", "false", "off", "no")
    if not switched_off and not (chain and chain.has_run(__file__)):
        whole = _arm(folder)
    if chain or _another_is_in_sight():
        try:
            from overlay.chain import hand_on
        except Exception as error:  # whatever is wrong with our files, Python has to start
            if whole:
                _write(f"vLLM overlay: {folder} is damaged: {type(error).__name__}: {error}")
            _hand_on_without_chain(os.path.realpath(folder))
        else:
            hand_on(__file__)


def _arm(folder: str) -> bool:
    """Arm the overlay, unless another copy is the one in use. False: this folder's files do not work."""
    try:
        from overlay import bootstrap

        used = os.path.dirname(os.path.abspath(bootstrap.__file__))
        if os.path.realpath(used) == os.path.realpath(os.path.join(folder, "overlay")):
            bootstrap.arm()
        else:
            other = os.path.dirname(used)
            _write(f"vLLM overlay: {folder} stands down for the copy in {other}; keep one of the two on PYTHONPATH")
    except Exception as error:
        _write(f"vLLM overlay: not armed from {folder}: {type(error).__name__}: {error}")
        return False
    return True


def _another_is_in_sight() -> bool:
    """Whether chain.py has anything to do: loading it for nothing would double the cost of this module."""
    try:
        frame = sys._getframe(2).f_back
        while frame is not None:
            if frame.f_globals.get("__name__") == "sitecustomize":
                return True  # it has imported us while looking for the next one
            frame = frame.f_back
        own_path = os.path.realpath(__file__)
        for entry in sys.path:
            spec = PathFinder.find_spec("sitecustomize", [entry])
            if spec and spec.origin and os.path.realpath(spec.origin) != own_path:
                return True
    except Exception:  # chain.py meets the same obstacle, and reports it
        return True
    return False


def _hand_on_without_chain(real_folder: str) -> None:
    """Half a folder was copied: let the import system find the next sitecustomize, errors and all, as it would have."""
    texts = [(place, entry) for place, entry in enumerate(sys.path) if isinstance(entry, str)]
    own = [(place, entry) for place, entry in texts if os.path.realpath(entry) == real_folder]
    for _, entry in own:
        sys.path.remove(entry)
    this_module = sys.modules.pop("sitecustomize", None)
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
        if this_module is not None:
            sys.modules["sitecustomize"] = this_module
    finally:
        # One by one, not the whole old list: the other module may have added entries of its own.
        for place, entry in own:
            sys.path.insert(place, entry)


def _write(line: str) -> None:
    try:  # noqa: SIM105 - contextlib would be one more import
        sys.stderr.write(line + "\n")
    except (AttributeError, OSError, ValueError):  # Python was started without a stderr, or nobody reads it any more
        pass


_open()
