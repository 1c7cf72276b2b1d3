"""The layers that a patch has adopted wait until their model has been loaded. Then each gets its pair, or stays stock.

A pair is made that late because loading quantizes and repacks: only then are kernels and weights final. It is made before
vLLM sizes its KV cache and traces. So vLLM counts the memory that it allocates, and its shape is in the compile cache's
key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from overlay.engine import compile_cache, loaded
from overlay.report.journal import PatchRecord, journal
from overlay.settings import Settings, outcome
from overlay.side_work import adoption, lowering, ops
from overlay.verdict import Verdict

#: The attribute that holds a layer's pair, or None if the layer stays stock.
PAIR = "_overlay_pair"
FAILED = "the plan could not be made"


class HasShape(Protocol):
    """A patch's pair. `shape` is the part of it that shapes the compiled graph."""

    @property
    def shape(self) -> str: ...


Given = TypeVar("Given")
Pair = TypeVar("Pair", bound=HasShape)
#: Gets the layers of one model, each with the result of its check, and vLLM's worker. Returns for each, in this order, its
#: pair or the reason why it stays stock.
Make = Callable[[Sequence[tuple[Any, Given]], Any], Sequence[Pair | str]]


class Waiting(Generic[Given, Pair]):
    """The waiting layers of one patch."""

    def __init__(
        self,
        patch: str,
        verdict: Verdict,
        record: PatchRecord,
        settings: Settings,
        make: Make[Given, Pair],
    ) -> None:
        self._patch = patch
        self._verdict = verdict
        self._record = record
        self._settings = settings
        self._make = make
        self._layers: list[tuple[weakref.ref[Any], str, Given]] = []
        self._unexpected = False

    def begin(self) -> None:
        """Define the ops, and wait for models to be loaded. This changes nothing for a layer without a pair."""
        ops.define(declares_writes=adoption.other_device() is None)
        loaded.when_loaded(self.decide)

    def adopt(self, layer: Any, name: str, check: Callable[[], tuple[Given, dict[str, Any]]]) -> None:
        """Take a layer that has just been made, or leave it stock. Raises only under strict.

        `check` returns what the pair will be made of, and the layer's entry in the journal. It raises StaysStock if the
        layer stays stock.
        """

        def checked() -> tuple[Given, dict[str, Any]]:
            try:
                return check()
            except adoption.StaysStock:
                raise
            except Exception:
                self._unexpected = True
                raise

        setattr(layer, PAIR, None)
        given = adoption.adopt(self._patch, self._record, name, checked, self._settings)
        if given is not None:
            self._layers.append((weakref.ref(layer), name, given))

    def decide(self, worker: Any) -> None:
        """Give every waiting layer its pair, or leave it stock; all of them if that fails. Raises only under strict."""
        waiting = [(layer, name, given) for one, name, given in self._layers if (layer := one()) is not None]
        unexpected, self._unexpected = self._unexpected, False
        self._layers.clear()
        if not waiting and not unexpected:
            return
        plans = len(self._record.plans)
        compilation = worker.vllm_config.compilation_config
        found: Sequence[Pair | str]
        try:
            # All ranks need the same ranges: with other ranges a rank runs other warm-up steps, and ranks wait for each
            # other. Every rank refuses the same layers, but only one may have an error. So several ranks split before they
            # decide.
            several = getattr(worker.vllm_config.parallel_config, "world_size_across_dp", None) != 1
            if several:
                self._split_ranges(worker)
            found = self._make([(layer, given) for layer, _, given in waiting], worker)
            if not several and not all(isinstance(pair, str) for pair in found):
                self._split_ranges(worker)
        except Exception as error:
            said = outcome(self._settings.strict)
            journal.problem(f"{self._patch}: {FAILED}, {said}: {type(error).__name__}: {error}")
            if self._settings.strict:
                raise
            found = [FAILED] * len(waiting)
            del self._record.plans[plans:]
        shapes: dict[str, set[str]] = {}
        for (layer, name, _), pair in zip(waiting, found, strict=True):
            setattr(layer, PAIR, None if isinstance(pair, str) else pair)
            if isinstance(pair, str):
                self._record.patched.pop(name, None)
                self._record.refuse(name, pair)
            shapes.setdefault(name, set()).add("stock" if isinstance(pair, str) else pair.shape)
        if self._verdict.shapes_graph:
            shaping = {name: " and ".join(sorted(them)) for name, them in shapes.items()}
            shaping["ranges"] = str(getattr(compilation, "compile_ranges_endpoints", None))
            compile_cache.note_shapes(self._patch, shaping)
        journal.write()

    def _split_ranges(self, worker: Any) -> None:
        """If the compiled graph shows the ops, have its largest range get stock's calls."""
        if self._verdict.shapes_graph:
            lowering.split_ranges(worker.vllm_config, self._settings.strict)
