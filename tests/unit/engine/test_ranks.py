"""All ranks or none: real stores of torch.distributed, ranks that are late, missing or of another version."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import pathlib
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from overlay.engine import compile_cache, proof, ranks
from overlay.report.journal import OwnJournal
from overlay.settings import Settings
from overlay.side_work import adoption
from tests.conftest import REPOSITORY, overlay_environment

pytest.importorskip("wrapt")
distributed = pytest.importorskip("torch.distributed")
LONG, SHORT = 20.0, 0.15
STORES = ["hash", "file", "tcp"]


@contextlib.contextmanager
def stores(kind: str, folder: pathlib.Path, world: int) -> Iterator[list[Any]]:
    """A store for each rank, all of one kind and with the same content, under the prefix that torch itself uses."""
    if kind == "hash":
        shared = distributed.HashStore()
        made = [shared] * world
    elif kind == "file":
        made = [distributed.FileStore(str(folder / "store"), world) for _ in range(world)]
    else:
        server = distributed.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        clients = [distributed.TCPStore("127.0.0.1", server.port, world, False) for _ in range(1, world)]
        made = [server, *clients]
    for store in made:
        store.set_timeout(datetime.timedelta(seconds=5))
    yield [distributed.PrefixStore("default_pg", store) for store in made]


def decide(
    stores: Sequence[Any],
    delays: Sequence[float | None],
    reports: Sequence[str] | None = None,
    deadline: float = LONG,
) -> dict[int, str]:
    """What each rank takes with it; a rank whose delay is None never comes."""
    decided: dict[int, str] = {}

    def rank(number: int, delay: float) -> None:
        time.sleep(delay)
        report = reports[number] if reports else '{"overlay": "1"}'
        decided[number] = ranks.agree(stores[number], len(stores), number, report, deadline)

    coming = [
        threading.Thread(target=rank, args=(number, delay), daemon=True)
        for number, delay in enumerate(delays)
        if delay is not None
    ]
    for thread in coming:
        thread.start()
    end = time.monotonic() + deadline + 10.0
    for thread in coming:
        thread.join(max(0.0, end - time.monotonic()))
    assert len(decided) == len(coming), "a rank raised, or waits beyond its deadline"
    return decided


class Clock:
    """In the place of the module time: nobody waits, and whoever would wait for ever is told so."""

    def __init__(self, latest: float) -> None:
        self.now, self.latest = 0.0, latest

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0 and self.now < self.latest, "waits beyond its deadline"
        self.now += seconds


@pytest.mark.parametrize("deadline", [0.0, 0.0005, 1.0, ranks.DEADLINE_SECONDS])
def test_a_rank_waits_as_long_as_the_deadline_and_no_longer(deadline: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(deadline)
    monkeypatch.setattr(ranks, "time", clock)
    decided = ranks.agree(distributed.HashStore(), 2, 0, "{}", deadline)
    assert decided.startswith("rank 1 runs without the overlay")
    assert deadline <= clock.now <= deadline + ranks._LONGEST_PAUSE_SECONDS


@pytest.mark.parametrize("kind", STORES)
def test_ranks_that_are_alike_agree_at_once_and_again_for_a_second_engine(kind: str, tmp_path: pathlib.Path) -> None:
    with stores(kind, tmp_path, 3) as made:
        for _ in range(2):
            started = time.monotonic()
            assert decide(made, [0.0, 0.0, 0.0]) == dict.fromkeys(range(3), ranks.ALIKE)
            assert time.monotonic() - started < LONG / 4


@pytest.mark.parametrize("kind", STORES)
def test_a_rank_that_never_reports_is_named_by_all_others(kind: str, tmp_path: pathlib.Path) -> None:
    with stores(kind, tmp_path, 3) as made:
        decided = decide(made, [0.0, None, 0.02], deadline=SHORT)
    assert decided == dict.fromkeys((0, 2), "rank 1 runs without the overlay (no report within 0 s)")


@pytest.mark.parametrize("kind", STORES)
def test_another_version_is_seen_without_waiting(kind: str, tmp_path: pathlib.Path) -> None:
    reports = ['{"overlay": "1", "source": "a"}', '{"overlay": "1", "source": "a"}', '{"overlay": "1", "source": "b"}']
    with stores(kind, tmp_path, 3) as made:
        started = time.monotonic()
        decided = decide(made, [0.0] * 3, reports)
    assert decided == dict.fromkeys(range(3), "rank 2 differs from rank 0: source b instead of a")
    assert time.monotonic() - started < LONG / 4


def test_a_rank_that_comes_after_the_deadline_takes_what_the_others_have_decided(tmp_path: pathlib.Path) -> None:
    with stores("hash", tmp_path, 2) as made:
        decided = decide(made, [0.0, SHORT * 4], deadline=SHORT)
    assert decided == dict.fromkeys(range(2), "rank 1 runs without the overlay (no report within 0 s)")


def test_two_ranks_that_decide_at_once_take_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's time is up, and while it makes up its mind rank 1 comes, sees both, and publishes."""
    store, late = distributed.HashStore(), []
    compare = ranks.compare

    def interrupted(*arguments: Any) -> str:
        monkeypatch.setattr(ranks, "compare", compare)
        late.append(ranks.agree(store, 2, 1, "{}", 0.0))
        return compare(*arguments)

    monkeypatch.setattr(ranks, "compare", interrupted)
    assert [ranks.agree(store, 2, 0, "{}", 0.0)] == late == [ranks.ALIKE]


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.one_of(st.none(), st.integers(0, 12).map(lambda steps: steps / 100)), min_size=2, max_size=4).filter(
        lambda delays: any(delay is not None for delay in delays)
    ),
    st.sampled_from([0.0, 0.03, 0.06, 2.0]),
)
def test_whoever_comes_when_the_decision_is_one(delays: list[float | None], deadline: float) -> None:
    """The deadlines lie among the delays, so that ranks decide while others arrive."""
    if None in delays:
        deadline = min(deadline, 0.06)
    shared = distributed.HashStore()
    decided = decide([shared] * len(delays), delays, deadline=deadline)
    assert len(set(decided.values())) == 1
    if None in delays:
        assert ranks.ALIKE not in decided.values()
    elif deadline == 2.0:
        assert set(decided.values()) == {ranks.ALIKE}


@pytest.mark.parametrize(
    ("reports", "world", "expected"),
    [
        ({0: b"{}", 1: b"{}"}, 2, ranks.ALIKE),
        ({1: b"{}"}, 3, "ranks 0, 2 run without the overlay (no report within 30 s)"),
        ({2: b'{"a": "1"}'}, 12, "ranks 0, 1, 3, 4, 5, 6, 7, 8 and 3 more run without the overlay (no report within 30 s)"),
        (
            {0: b'{"a": "1"}', 1: b'{"a": "2", "b": "3"}', 2: b'{"a": "2", "b": "3"}'},
            3,
            "ranks 1, 2 differ from rank 0: a 2 instead of 1, b 3 instead of None",
        ),
        ({0: b'{"a": "1"}', 1: b"\xffnot JSON"}, 2, "rank 1 differs from rank 0: a None instead of 1"),
        ({0: b"[]", 1: b'{"a": "1"}'}, 2, "rank 1 differs from rank 0: a 1 instead of None"),
        (
            {1: b'{"a": "1"}', 2: b'{"a": "2"}'},
            3,
            "rank 0 runs without the overlay (no report within 30 s); rank 2 differs from rank 1: a 2 instead of 1",
        ),
    ],
)  # fmt: skip
def test_what_is_said_of_ranks_that_are_not_alike(reports: dict[int, bytes], world: int, expected: str) -> None:
    assert ranks.compare(reports, world, 30.0) == expected


def test_every_setting_that_changes_what_a_rank_does_is_compared() -> None:
    """A setting that is new counts, until somebody says that it may differ."""
    facts = json.loads(ranks.report(Settings()))
    names = {field.name for field in dataclasses.fields(Settings)}
    assert set(facts) == {"overlay", "source", "vllm"} | names - {
        "enabled",
        "strict",
        "log_level",
        "journal_folder",
        "retired",
    }
    same = Settings(strict=True, log_level="debug", journal_folder="/elsewhere", retired=("a line",))
    assert ranks.report(same) == ranks.report(Settings())
    for other in (Settings(patches=("gdn",)), Settings(plan="serial"), Settings(token_threshold=0)):
        assert ranks.report(other) != ranks.report(Settings())


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> OwnJournal:
    fresh = OwnJournal()
    monkeypatch.setattr(ranks, "journal", fresh)
    monkeypatch.setattr(compile_cache, "journal", fresh)
    monkeypatch.setattr(ranks, "_result", None)
    monkeypatch.setattr(ranks, "_watched", [])
    monkeypatch.setattr(ranks, "_worker_is_loaded", False)
    return fresh


@pytest.fixture
def in_world(monkeypatch: pytest.MonkeyPatch, journal: OwnJournal) -> Callable[..., None]:
    """`in_world(size, store, cuda)`: this process is rank 0 of a world, and has this to ask."""

    def put(size: int, store: Callable[[], Any], *, cuda: bool = True) -> None:
        platforms = types.ModuleType("vllm.platforms")
        platforms.current_platform = types.SimpleNamespace(is_cuda_alike=lambda: cuda)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        monkeypatch.setattr(ranks, "_world", lambda: (size, 0))
        monkeypatch.setattr(ranks, "_default_store", store)

    return put


def test_a_graph_of_stock_layers_is_not_found_under_the_key_of_patched_ones(
    in_world: Callable[..., None], journal: OwnJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a cache that was filled while all ranks were alike would bring back the op, for layers that have no pair."""
    envs = types.SimpleNamespace(environment_variables={})
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    monkeypatch.setattr(compile_cache, "_applied", {})

    def key() -> object:
        return envs.environment_variables[compile_cache.ENTRY]()

    compile_cache.add("gdn", ("forward",))
    patched = key()
    in_world(2, no_store)
    ranks.hold(Settings(), LONG)
    apart = key()
    assert apart != patched and journal.fingerprint == apart
    compile_cache.add("gdn", ("forward",))
    assert key() == apart, "a target that is imported later changes nothing"
    in_world(1, no_store)
    ranks.hold(Settings(), LONG)
    assert key() == patched == journal.fingerprint


def no_store() -> Any:
    raise AttributeError("no default store")


@pytest.mark.parametrize(("size", "cuda"), [(1, True), (2, False)], ids=["one rank", "nothing to patch on this device"])
def test_nobody_is_asked_where_there_is_nothing_to_agree_on(
    size: int, cuda: bool, in_world: Callable[..., None], journal: OwnJournal
) -> None:
    in_world(size, no_store, cuda=cuda)
    ranks.hold(Settings(strict=True), LONG)
    assert ranks.reason_for_stock(Settings()) is None and journal.agreement is None and journal.problems == []


@pytest.mark.parametrize("strict", [False, True])
def test_a_failure_of_the_store_leaves_this_rank_stock_and_strict_raises(
    strict: bool, in_world: Callable[..., None], journal: OwnJournal
) -> None:
    in_world(2, no_store)
    with pytest.raises(ranks.NotAlike, match="no default store") if strict else contextlib.nullcontext():
        ranks.hold(Settings(strict=strict), LONG)
    reason = "the ranks could not be compared: AttributeError: no default store"
    assert ranks.reason_for_stock(Settings()) == reason
    assert journal.agreement == {"world": 2, "rank": 0, "result": reason}
    assert [reason in problem for problem in journal.problems] == [True]


@pytest.mark.parametrize("strict", [False, True])
def test_a_missing_rank_keeps_every_layer_stock_and_is_said_once(
    strict: bool, in_world: Callable[..., None], journal: OwnJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "journal", journal)
    store = distributed.HashStore()
    in_world(2, lambda: store)
    for _ in range(2):  # two engines in one process
        with pytest.raises(ranks.NotAlike, match="rank 1 runs without") if strict else contextlib.nullcontext():
            ranks.hold(Settings(strict=strict), 0.0)
    record = journal.patch("gdn")
    made: list[None] = []
    adopted = adoption.adopt("gdn", record, "layer.0", lambda: (made.append(None), {}), Settings(strict=strict))
    assert adopted is None and made == [] and record.patched == {}
    reason = "rank 1 runs without the overlay (no report within 0 s)"
    assert record.refused == {"layer.0": reason}
    said = "vLLM stops here, as strict asks" if strict else "every layer stays stock"
    assert journal.problems == [f"{said}: {reason}"]


def test_the_next_engine_of_the_process_has_an_answer_of_its_own(
    in_world: Callable[..., None], journal: OwnJournal
) -> None:
    in_world(2, no_store)
    ranks.hold(Settings(), LONG)
    assert ranks.reason_for_stock(Settings()) is not None
    in_world(1, no_store)
    ranks.hold(Settings(), LONG)
    assert ranks.reason_for_stock(Settings()) is None


@pytest.mark.parametrize("strict", [False, True])
def test_a_worker_that_never_asked_stays_stock_unless_it_is_alone(
    strict: bool, in_world: Callable[..., None], journal: OwnJournal
) -> None:
    """Somebody's own worker, or a vLLM without the function."""
    ranks.compare_when_joined(types.ModuleType(next(iter(proof.WORKERS))), Settings())
    in_world(1, no_store)
    assert ranks.reason_for_stock(Settings(strict=True)) is None
    in_world(2, no_store)
    with pytest.raises(ranks.NotAlike) if strict else contextlib.nullcontext():
        assert "have not been compared" in str(ranks.reason_for_stock(Settings(strict=strict)))
    assert len(journal.problems) == 1


def test_a_process_without_a_worker_stays_stock_without_a_word(
    in_world: Callable[..., None], journal: OwnJournal
) -> None:
    """vLLM's weight-cache daemon has a world and makes a model, to hold its weights. Strict does not stop it."""
    in_world(2, no_store)
    assert ranks.reason_for_stock(Settings(strict=True)) == ranks.NO_WORKER
    assert journal.problems == [] and journal.agreement is None
    ranks.compare_when_joined(types.ModuleType(next(iter(proof.WORKERS))), Settings())
    with pytest.raises(ranks.NotAlike):
        ranks.reason_for_stock(Settings(strict=True))


def test_a_worker_asks_once_after_it_has_joined_whichever_module_it_is_of(
    monkeypatch: pytest.MonkeyPatch, journal: OwnJournal
) -> None:
    happened: list[str] = []
    first, second = (types.ModuleType(name) for name in proof.WORKERS)

    def join(*ranks: int, backend: str) -> str:
        happened.append(f"joined {ranks} {backend}")
        return "joined"

    monkeypatch.setattr(ranks, "hold", lambda settings, seconds: happened.append(f"asked, {seconds:.0f} s"))
    setattr(first, ranks.JOINS_WORLD, join)
    ranks.compare_when_joined(first, Settings())
    setattr(second, ranks.JOINS_WORLD, getattr(first, ranks.JOINS_WORLD))  # as an import by name
    ranks.compare_when_joined(second, Settings())
    for module in (first, second):
        happened.clear()
        assert getattr(module, ranks.JOINS_WORLD)(1, 2, backend="gloo") == "joined"
        assert happened == ["joined (1, 2) gloo", "asked, 30 s"]


#: One rank in a process of its own: a worker's function makes a real world, and the overlay is asked around it.
RANK = """
    import json, sys, types
    import torch.distributed
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cuda_alike=lambda: True)
    sys.modules.update({"vllm": types.ModuleType("vllm"), "vllm.platforms": platforms})
    from overlay.engine import compile_cache, ranks
    from overlay.report.journal import journal
    from overlay.settings import Settings

    rank, world, file, strict, ways = int(sys.argv[1]), 2, sys.argv[2], sys.argv[3] == "strict", sys.argv[4].split(",")
    ranks.DEADLINE_SECONDS = 1.5
    own = compile_cache.source_hash()

    def init_worker_distributed_environment():
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", init_method=f"file://{file}", world_size=world, rank=rank)

    answers = []
    for way in ways:  # one engine after the other in one world
        module = types.ModuleType("vllm.v1.worker.gpu_worker")
        module.init_worker_distributed_environment = init_worker_distributed_environment
        if not (way == "without" and rank):
            ranks.compare_when_joined(module, Settings(strict=strict))
        compile_cache.source_hash = lambda: "another" if way == "another" and rank else own
        try:
            module.init_worker_distributed_environment()
            raised = None
        except ranks.NotAlike as error:
            raised = str(error)
        answers.append((ranks.reason_for_stock(Settings()), journal.agreement, raised))
        torch.distributed.barrier()
    print(json.dumps([answers, journal.problems]))
"""


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_two_processes_of_a_real_world(strict: bool, tmp_path: pathlib.Path) -> None:
    """Alike, then another version, then no overlay on rank 1: three engines in one world."""
    arguments = [str(tmp_path / "world"), "strict" if strict else "default", "alike,another,without"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), str(rank), *arguments],
            env=overlay_environment(VLLMOVERLAY="0"),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=60)[0] for rank in processes]
    finally:
        for rank in processes:
            rank.kill()
    assert [rank.returncode for rank in processes] == [0, 0]
    (answers, problems), (other_answers, other_problems) = map(json.loads, printed)
    alike, another, without = answers
    assert alike == [None, {"world": 2, "rank": 0, "result": ranks.ALIKE}, None]
    source = compile_cache.source_hash()[:16]
    reason = f"rank 1 differs from rank 0: source another instead of {source}"
    assert another[0] == reason and without[0] == "rank 1 runs without the overlay (no report within 2 s)"
    assert other_answers[0][0] is None and other_answers[1][0] == reason
    assert len(problems) == 2 and len(other_problems) == 1
    for reason, _, raised in [another, without, other_answers[1]]:
        assert (reason in raised) if strict else raised is None
