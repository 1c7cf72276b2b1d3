"""A real vLLM in real processes, on CPU: with the overlay it gives the tokens of stock, and the op has run.

The CPU has no auxiliary stream. With the serial pass-through the whole path is there (hook, stand-in, custom op, fake
tensors, compile, journal), and the two projections run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from devtools import tiny_models
from overlay import __version__
from overlay.patches.frame_stack.room import is_needed as room_is_needed
from tests.engine.conftest import Run

pytestmark = pytest.mark.engine

Engine = Callable[..., Run]
MODEL = "qwen3_5_text"
MODELS = [MODEL, "qwen3_next"]
SHARD_SIZES = {1: {"qkvz": 1536, "ba": 8}, 2: {"qkvz": 768, "ba": 4}}


def gdn_sizes(run: Run) -> list[dict[str, dict[str, int]]]:
    """Per worker: the sizes of each patched layer."""
    return [journal.raw["patches"]["gdn"]["layers"]["patched"] for journal in run.workers]


def assert_same_answers(overlay: Run, stock: Run) -> None:
    assert overlay.answers == stock.answers
    for answers in stock.answers.values():
        assert len({token for answer in answers for token in answer}) > 5, "the model says nothing that could differ"


@pytest.mark.parametrize(("name", "compiled"), [(MODEL, False), *((name, True) for name in MODELS)])
def test_same_tokens_and_every_layer_through_the_op(engine: Engine, name: str, compiled: bool) -> None:
    stock, overlay = (engine(name, overlay=side, compiled=compiled) for side in (False, True))
    assert_same_answers(overlay, stock)
    assert stock.journals == []
    (worker,) = overlay.workers
    layers = tiny_models.gdn_layers(name)
    assert worker.layers == layers and worker.calls >= layers * 12
    assert worker.calls % layers == 0, "some layers went around the op"
    assert gdn_sizes(overlay) == [dict.fromkeys(worker.patches[0].layers, SHARD_SIZES[1])]
    assert worker.raw["agreement"] is None, "there is nobody to agree with"
    assert (overlay.fake_calls() > 0) == compiled


def test_sizes_are_per_shard_with_two_real_shards(engine: Engine) -> None:
    stock, overlay = (engine(MODEL, overlay=side, compiled=True, tensor_parallel_size=2) for side in (False, True))
    assert_same_answers(overlay, stock)
    assert len(overlay.workers) == 2
    for journal, sizes in zip(overlay.workers, gdn_sizes(overlay), strict=True):
        assert list(sizes.values()) == [SHARD_SIZES[2]] * tiny_models.gdn_layers(MODEL)
        assert journal.calls > 0
        assert journal.raw["loop"] == "WorkerProc.worker_busy_loop"
        frame_stack = journal.raw["patches"]["frame_stack"]
        said = ("apply", "WorkerProc.worker_busy_loop runs above one large frame")
        assert ((frame_stack["verdict"], frame_stack["reason"]) == said) == room_is_needed()


def test_every_process_of_the_engine_has_a_journal(engine: Engine) -> None:
    overlay = engine(MODEL, overlay=True, compiled=True)
    roles = [journal.role for journal in overlay.journals]
    assert "Main" in roles and any(role.startswith("EngineCore") for role in roles)
    assert {journal.transformers for journal in overlay.journals} == {"imported first"}
    assert not [problem for journal in overlay.journals for problem in journal.problems]
    verdicts = {journal.raw["patches"]["gdn"]["verdict"] for journal in overlay.workers}
    assert verdicts == {"apply"}


def test_vllm_logs_the_overlays_one_line_and_the_overlay_warns_of_nothing(engine: Engine) -> None:
    overlay = engine(MODEL, overlay=True, compiled=True)
    (line,) = [line for line in overlay.log.splitlines() if "INFO" in line and f"overlay {__version__}" in line]
    assert f"gdn: apply, {tiny_models.gdn_layers(MODEL)} layers patched, op " in line
    warnings = [line for line in overlay.log.splitlines() if "WARNING" in line and "overlay" in line.lower()]
    assert warnings == []
    assert "Unknown vLLM environment variable" not in overlay.log
