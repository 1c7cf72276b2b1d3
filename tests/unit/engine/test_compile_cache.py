"""The fingerprint in vLLM's compile cache key."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("wrapt")

import overlay
from overlay.engine import compile_cache, proof
from overlay.report.journal import OwnJournal, PatchRecord
from overlay.settings import Settings
from overlay.side_work import adoption
from overlay.start import install
from overlay.verdict import Verdict
from overlay.vocabulary import APPLY, INERT

Entries = dict[str, Callable[[], object]]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Entries:
    """vLLM's table of environment variables, which its cache key is made of."""
    module = types.ModuleType("vllm.envs")
    table: Entries = {"VLLM_PORT": lambda: None}
    module.environment_variables = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.envs", module)
    monkeypatch.setattr(compile_cache, "_applied", {})
    monkeypatch.setattr(compile_cache, "_stock", {})
    monkeypatch.setattr(compile_cache, "_shapes", {})
    compile_cache.source_hash.cache_clear()
    monkeypatch.setattr(compile_cache, "journal", OwnJournal())
    return table


def test_no_patch_no_entry(entries: Entries) -> None:
    assert compile_cache.ENTRY not in entries


def key_after(entries: Entries, change: Callable[..., None], *given: Any, **named: Any) -> object:
    """What vLLM reads after a change; None where there is no entry."""
    change(*given, **named)
    entry = entries.get(compile_cache.ENTRY)
    return entry and entry()


def test_each_set_of_patches_has_an_identity_of_its_own(entries: Entries) -> None:
    one = key_after(entries, compile_cache.add, "gdn", ["forward_cuda"])
    two = key_after(entries, compile_cache.add, "lora_linear", ["apply"])
    three = key_after(entries, compile_cache.add, "gdn", ["forward_cuda", "forward_hip"])
    assert len({one, two, three, None}) == 4
    assert key_after(entries, compile_cache.add, "gdn", ["forward_cuda"]) == two
    assert key_after(entries, compile_cache.remove, "lora_linear") == one


def test_the_journal_has_what_vllm_reads(entries: Entries) -> None:
    for change in (
        lambda: compile_cache.add("gdn", ["forward"]),
        lambda: compile_cache.note_layer("gdn", "layer.0", stock=True),
        lambda: compile_cache.note_layer("gdn", "layer.0", stock=True),  # which changes nothing
        lambda: compile_cache.add("lora_linear", ["apply"]),
        lambda: compile_cache.remove("gdn"),
    ):
        change()
        assert compile_cache.journal.fingerprint == entries[compile_cache.ENTRY]()
    compile_cache.remove("lora_linear")
    assert compile_cache.journal.fingerprint is None


def test_removing_the_last_one_leaves_stocks_key(entries: Entries) -> None:
    compile_cache.add("gdn", ["forward"])
    compile_cache.remove("gdn")
    assert list(entries) == ["VLLM_PORT"]


def test_which_layers_stay_stock_counts(entries: Entries) -> None:
    """A start in which a layer could not be patched must not find the graph of one in which it was, and the reverse."""

    def note(number: int, stock: bool) -> object:
        return key_after(entries, compile_cache.note_layer, "gdn", f"layer.{number}", stock=stock)

    all_patched = key_after(entries, compile_cache.add, "gdn", ["forward"])
    assert note(0, stock=False) == all_patched
    one, two = note(0, stock=True), note(1, stock=True)
    assert len({all_patched, one, two}) == 3
    assert note(1, stock=True) == two
    other = note(0, stock=False)  # the next engine of the process
    assert other not in (None, all_patched, one, two)
    assert note(1, stock=False) == all_patched


@pytest.mark.parametrize("fault", [adoption.StaysStock("known"), ValueError("unknown"), None], ids=repr)
def test_the_key_follows_what_becomes_of_a_layer(
    fault: Exception | None, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "journal", OwnJournal())
    monkeypatch.setattr(adoption.ranks, "reason_for_stock", lambda _: None)
    all_patched = key_after(entries, compile_cache.add, "lora_linear", ["apply"])

    def make() -> tuple[str, dict[str, object]]:
        if fault is not None:
            raise fault
        return "taken", {}

    taken = adoption.adopt("lora_linear", PatchRecord(), "layer.0", make, Settings())
    assert (taken == "taken") == (compile_cache.journal.fingerprint == all_patched) == (fault is None)
    assert compile_cache.journal.fingerprint == entries[compile_cache.ENTRY]()


@pytest.mark.parametrize("elastic", [True, False])
def test_every_layer_stays_stock_where_ranks_may_join_that_nobody_has_compared(elastic: bool) -> None:
    """Such a rank could lack the overlay, have vLLM's own compile ranges, and run fewer warm-up steps than the others."""
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(use_ubatching=False, enable_elastic_ep=elastic),
        compilation_config=types.SimpleNamespace(cache_dir=""),
    )
    with (
        pytest.raises(adoption.StaysStock, match="elastic expert parallelism") if elastic else contextlib.nullcontext()
    ):
        adoption.refuse_modes(config, batch_invariant=False)


@pytest.mark.parametrize("folder", ["/somewhere/of/my/own", ""])
def test_every_layer_stays_stock_where_the_user_has_named_the_folder_of_graphs(folder: str) -> None:
    """No hash is in its name: stock and overlay, two versions, two plans would take each other's graphs."""
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(use_ubatching=False),
        compilation_config=types.SimpleNamespace(cache_dir=folder),
    )
    with pytest.raises(adoption.StaysStock, match="cache_dir is set") if folder else contextlib.nullcontext():
        adoption.refuse_modes(config, batch_invariant=False)


@pytest.mark.parametrize("fails", [False, True], ids=["inert", "failed"])
def test_a_patch_that_is_not_installed_after_all_leaves_stocks_key(
    fails: bool, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[object] = []

    def refuse(module: types.ModuleType, found: Verdict, settings: Settings) -> Verdict:
        keys.append(entries[compile_cache.ENTRY]())
        if fails:
            raise OSError("damaged")
        return dataclasses.replace(found, state=INERT)

    installer = types.ModuleType("overlay.patches.gdn.patch")
    installer.install = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "overlay.patches.gdn.patch", installer)
    monkeypatch.setattr(install, "journal", OwnJournal())
    with pytest.raises(OSError, match="damaged") if fails else contextlib.nullcontext():
        found = install._install_judged("gdn", types.ModuleType("vllm.any"), Verdict(APPLY, "", "vllm.any"), Settings())
        assert found.state == INERT
    assert keys != [] and list(entries) == ["VLLM_PORT"] and compile_cache.journal.fingerprint is None
    assert "gdn" not in proof._installed


def test_layers_of_a_patch_that_no_graph_shows_do_not_count(entries: Entries) -> None:
    before = key_after(entries, compile_cache.add, "gdn", ["forward"])
    assert key_after(entries, compile_cache.note_layer, "pooling", "GPUModelRunner", stock=True) == before
    assert key_after(entries, compile_cache.add, "gdn", ["forward"]) == before


def test_the_overlays_own_source_counts(
    entries: Entries, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patches").mkdir()
    source = tmp_path / "patches" / "gdn.py"
    source.write_text("1")
    monkeypatch.setattr(overlay, "__file__", str(tmp_path / "__init__.py"))
    before = key_after(entries, compile_cache.add, "gdn", ["forward"])
    assert key_after(entries, compile_cache.add, "gdn", ["forward"]) == before
    source.write_text("2")
    assert key_after(entries, compile_cache.add, "gdn", ["forward"]) == before, "what runs is what was there at first"
    compile_cache.source_hash.cache_clear()  # the next process
    assert key_after(entries, compile_cache.add, "gdn", ["forward"]) != before


def test_a_key_does_not_depend_on_the_engines_before(entries: Entries) -> None:
    compile_cache.add("gdn", ["forward"])

    def engine(name: str) -> object:
        compile_cache.begin_engine()
        compile_cache.note_layer("gdn", f"{name}.1", stock=True)
        return key_after(entries, compile_cache.note_shapes, "gdn", {f"{name}.0": "by weight"})

    alone = engine("b")
    assert engine("a") != alone == engine("b")
    compile_cache.begin_engine()
    assert compile_cache._stock == compile_cache._shapes == {}


def test_the_source_is_that_of_the_whole_overlay_without_its_command_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pathlib.Path(overlay.__file__).parent
    copy = tmp_path / "overlay"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    hash_now = compile_cache.source_hash.__wrapped__
    here = hash_now()
    monkeypatch.setattr(overlay, "__file__", str(copy / "__init__.py"))
    assert hash_now() == here
    sources = sorted(copy.rglob("*.py"))
    assert len(sources) > 40
    for path in sources:
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        counts = "cli" not in path.relative_to(copy).parts
        assert (hash_now() != here) == counts, path
        path.write_bytes(text)


def test_the_name_is_none_that_vllm_takes_for_its_own() -> None:
    assert not compile_cache.ENTRY.startswith("VLLM_")
