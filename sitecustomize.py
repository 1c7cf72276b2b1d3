# The door: Python imports this module at every start, because its folder is on PYTHONPATH.
#
# It arms the overlay and then steps aside for the sitecustomize that it shadows (overlay/chain.py). It runs in every
# Python process of a container, most of which never see vLLM, so it costs little, imports nothing heavy, and lets nothing
# go wrong: whatever fails here is one line on stderr (logging is not configured yet), and Python starts as if this folder
# were not there.
#
# Two things shape this text. Other tools execute it in modules of their own, so it leaves nothing behind there: no import,
# no function, no docstring. And PYTHONPATH holds for every Python of a container, so it is Python 2 and 3 at once.


def _vllm_overlay():
    # type: () -> None
    import os  # os.path throughout: pathlib would be one more file to load
    import sys

    frame = sys._getframe(1)  # of this module
    file = str(frame.f_globals.get("__file__", ""))
    if not file.endswith(".pyc"):  # which names the source that it was compiled from, wherever that was
        file = frame.f_code.co_filename  # the other one is the tool's where a tool executes this in its own module
    folder = os.path.dirname(os.path.abspath(file))

    def write(*words):
        # type: (*str) -> None
        try:  # noqa: SIM105 - contextlib would be one more import
            sys.stderr.write("vLLM overlay: " + "".join(words) + "\n")
        except (
            AttributeError,
            OSError,
            ValueError,
        ):  # Python was started without a stderr, or nobody reads it any more
            pass

    def arm():
        # type: () -> bool
        """Arm the overlay, unless another copy is the one in use. False: this folder's files do not work."""
        try:
            from overlay import bootstrap

            used = os.path.dirname(os.path.abspath(bootstrap.__file__))
            if os.path.realpath(used) == os.path.realpath(os.path.join(folder, "overlay")):
                bootstrap.arm()
            else:
                copy = os.path.dirname(used)
                write(folder, " stands down for the copy in ", copy, "; keep one of the two on PYTHONPATH")
        except Exception as error:
            write("not armed from ", folder, ": ", type(error).__name__, ": ", str(error))
            return False
        return True

    # bootstrap reads the settings in full; whoever has switched the overlay off must not even pay for importing it.
    off = os.environ.get("VLLMOVERLAY", "").strip().lower() in ("0", "false", "off", "no")
    meant_for_vllm = sys.version_info >= (3, 10)
    chain = sys.modules.get("overlay.chain")
    whole = True
    if meant_for_vllm and not off and not (chain and chain.has_run(file)):
        whole = arm()

    try:  # the import system's own; importlib would be one more file to load
        from _frozen_importlib import module_from_spec
        from _frozen_importlib_external import PathFinder
    except ImportError:  # Python 2
        return

    real_folder = os.path.realpath(folder)
    texts = [(place, entry) for place, entry in enumerate(sys.path) if isinstance(entry, str)]
    own = [place for place, entry in texts if os.path.realpath(entry) == real_folder]
    behind = sys.path[own[0] + 1 :] if own else []

    def nothing_to_do():
        # type: () -> bool
        """Loading chain.py for nothing would double the cost of this module: site.py asks, and nothing is shadowed."""
        above = frame.f_back
        while above is not None and above.f_code.co_name not in ("<module>", "execsitecustomize"):
            above = above.f_back
        if above is None or above.f_code.co_name == "<module>":
            return False
        try:
            spec = PathFinder.find_spec("sitecustomize", behind)
        except Exception:  # chain.py meets the same obstacle, and reports it
            return False
        return spec is None or spec.loader is None

    if nothing_to_do():
        return
    try:
        from overlay.chain import hand_on
    except Exception as error:  # half a folder was copied, or this Python is too old: Python has to start all the same
        if whole and meant_for_vllm:
            write(folder, " is damaged: ", type(error).__name__, ": ", str(error))
        spec = PathFinder.find_spec("sitecustomize", behind)
        if spec is None or spec.loader is None:
            return
        entries = [(place, sys.path[place]) for place in own]
        for _, entry in entries:  # so that nobody finds this file again
            sys.path.remove(entry)
        try:
            module = sys.modules["sitecustomize"] = module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            # One by one, not the whole old list: the other module may have added entries of its own.
            for place, entry in entries:
                sys.path.insert(place, entry)
    else:
        hand_on(frame, file)


globals().pop("_vllm_overlay")()
