"""All ranks of a model or none: does every process of the world have the overlay, and the same one?

Symptom: with several nodes, or under Ray, a worker has the environment of its own node. One rank can lack the overlay or
have another version of it, and nothing shows it. The sums are the same, the step takes as long as the slowest rank, and
nobody knows which rank runs which graph.

Cause: each process arms itself from its own environment. No executor compares them.

Fix: when a worker has joined torch.distributed's world, it writes a report on itself to the store by which that world was
made, and waits for the others. This uses no message of an executor, so it is the same with multiprocessing, Ray and
external launchers. A rank without the overlay never reports, and the others notice at a deadline. The last rank to report,
or the first one at its deadline, decides and publishes the result. All ranks take the published result, so a late rank
never decides differently. If ranks differ, all of them stay stock with one WARNING each, or raise under strict, before a
layer is made. A graph compiled then has another key in vLLM's cache, because a graph with the op must not be loaded for
layers without it.

Two versions of the overlay meet in the keys and in the report, so the form of both must never change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from overlay import __version__
from overlay.engine import compile_cache
from overlay.report.journal import journal
from overlay.settings import Settings, outcome

#: The function in the modules of proof.WORKERS that joins the world. Before it no runner and no layer exists. The second
#: module imports it from the first by name (vLLM 0.17.1 to 0.33.0).
JOINS_WORLD = "init_worker_distributed_environment"

#: Waited for only if a rank is missing. The ranks have just made their process groups together, so they report within
#: moments of each other (waits of 0.2 to 16 ms in three starts with TP=2 on two cores). Then only the overlay's own files
#: are read, 1 ms here; the rest is for a network's file system.
DEADLINE_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 0.05

NAME = "agreement"
ALIKE = "alike"
#: Settings that may differ between ranks. They change what is logged and where, or what a failure does, but not what runs.
_MAY_DIFFER = ("enabled", "strict", "log_level", "journal_folder", "retired")
_PREFIX = "vllm_overlay/agreement"
_RESULT = "result"
_NAMED = 8

#: The result of the last comparison in this process; None before the first.
_result: str | None = None
_watched: list[object] = []
#: Why layers stay stock in a process that has a world and never loads vLLM's worker. The weight-cache daemon (``vllm
#: preload``, from 0.30 on) makes a model and runs none. It is not a problem.
NO_WORKER = "no worker runs in this process"
_worker_is_loaded = False


class NotAlike(RuntimeError):
    """Strict mode only: the ranks differ, or cannot be compared. Already logged."""


def compare_when_joined(module: ModuleType, settings: Settings) -> None:
    """Compare the ranks each time that the worker of this module has joined its world.

    If vLLM no longer has this function, `reason_for_stock` finds that several ranks have not been compared.
    """
    import wrapt

    global _worker_is_loaded
    _worker_is_loaded = True
    function = getattr(module, JOINS_WORLD, None)
    if function is None or any(function is one for one in _watched):  # watched: imported by name from the other module
        return

    def join(wrapped: Callable[..., Any], _: object, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        hold(settings, DEADLINE_SECONDS)
        return result

    wrapt.wrap_function_wrapper(module, JOINS_WORLD, join)
    _watched.append(getattr(module, JOINS_WORLD))


def reason_for_stock(settings: Settings) -> str | None:
    """Why every layer of this process has to stay stock, or None. Ask when a layer has been made.

    Raises NotAlike under strict if there are several ranks that were not compared.
    """
    if _result is None:
        world, rank = _world()
        if world > 1:
            if not _worker_is_loaded:
                return NO_WORKER
            text = f"the ranks have not been compared: the worker joined its world without vLLM's {JOINS_WORLD}"
            _conclude(text, world, rank, settings)
    return None if _result in (None, ALIKE) else _result


def _take(result: str) -> None:
    """Set the result that holds in this process from now on, for the layers and for the compile cache."""
    global _result
    _result = result
    # If this fails, it has failed for the patches too, so no patch that shapes a graph is installed.
    with contextlib.suppress(KeyError, AttributeError, OSError):
        if result == ALIKE:
            compile_cache.remove(NAME)
        else:
            compile_cache.add(NAME, ("every layer is stock",))


def hold(settings: Settings, deadline_seconds: float) -> None:
    """Compare this rank with all others of torch.distributed's world. Every rank has to call it.

    Waits for them at most `deadline_seconds`. Raises NotAlike under strict, and nothing else.
    """
    world, rank = None, None
    try:
        world, rank = _world()
        if world == 1 or not _can_patch(settings):
            _take(ALIKE)
            return
        result = agree(_default_store(), world, rank, report(settings), deadline_seconds)
    except Exception as error:
        result = f"the ranks could not be compared: {type(error).__name__}: {error}"
    _conclude(result, world, rank, settings)


def _conclude(result: str, world: int | None, rank: int | None, settings: Settings) -> None:
    _take(result)
    journal.agreement = {"world": world, "rank": rank, "result": result}
    if result != ALIKE:
        text = f"{outcome(settings.strict, 'every layer stays stock')}: {result}"
        journal.problem(text)
        if settings.strict:
            raise NotAlike(text)
    journal.write()


def _can_patch(settings: Settings) -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda_alike() or settings.serial_pass_through)


def report(settings: Settings) -> str:
    """What has to be the same on all ranks, as JSON: an object with text values."""
    facts = {"overlay": __version__, "source": compile_cache.source_hash()[:16], "vllm": journal.vllm_version}
    facts.update({name: value for name, value in dataclasses.asdict(settings).items() if name not in _MAY_DIFFER})
    return json.dumps({name: _text(value) for name, value in facts.items()}, sort_keys=True)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _world() -> tuple[int, int]:
    """The size of torch.distributed's world, and this process's rank in it."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


def _default_store() -> Any:
    """The key-value store by which the world was made. Private in torch, and there since 1.8."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def agree(store: Any, world: int, rank: int, own_report: str, deadline_seconds: float) -> str:
    """ALIKE, or why not: the same text on every rank that asks `store` in this round.

    A second engine in the same world is a second round. A rank counts its rounds in the store and not in its memory, so a
    rank that was started anew meets the others in the store that they share. `check` is called repeatedly, because a wait
    would lock the store for the other threads of this process, such as NCCL's watchdog.
    """
    from torch.distributed import PrefixStore

    number = store.add(f"{_PREFIX}/rounds of rank {rank}", 1)
    store = PrefixStore(f"{_PREFIX}/{number}", store)
    store.set(str(rank), own_report)
    end, pause = time.monotonic() + deadline_seconds, 0.001
    everybody_is_here = store.add("reports", 1) == world
    while not everybody_is_here and not store.check([_RESULT]) and time.monotonic() < end:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    if store.check([_RESULT]):
        published = store.get(_RESULT)
    else:
        reports = {other: store.get(str(other)) for other in range(world) if store.check([str(other)])}
        published = store.compare_set(_RESULT, "", compare(reports, world, deadline_seconds))
    return str(published.decode())


def compare(reports: Mapping[int, bytes], world: int, deadline_seconds: float) -> str:
    """ALIKE, or a text: which ranks of `world` are missing in `reports`, and which differ from the first one, and in what."""
    found = []
    missing = [rank for rank in range(world) if rank not in reports]
    if missing:
        runs = "runs" if len(missing) == 1 else "run"
        found.append(f"{_ranks(missing)} {runs} without the overlay (no report within {deadline_seconds:.0f} s)")
    first = min(reports)
    expected = _facts(reports[first])
    different: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(reports):
        facts = _facts(reports[rank])
        names = [name for name in sorted({*expected, *facts}) if expected.get(name) != facts.get(name)]
        if names:
            what = ", ".join(f"{name} {facts.get(name)} instead of {expected.get(name)}" for name in names)
            different[what].append(rank)
    for what, ranks in list(different.items())[:_NAMED]:
        found.append(f"{_ranks(ranks)} {'differs' if len(ranks) == 1 else 'differ'} from rank {first}: {what}")
    return "; ".join(found) or ALIKE


def _facts(given: bytes) -> dict[str, str]:
    """A report as a table. Empty if it is none (another version of the overlay), so it equals no report of this version."""
    try:
        facts = json.loads(given)
    except ValueError:
        facts = None
    return {str(name): str(value) for name, value in facts.items()} if isinstance(facts, dict) else {}


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NAMED])) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
