"""The fingerprint in vLLM's compile cache key."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import types
from collections.abc import Callable

import pytest

pytest.importorskip("wrapt")

from overlay import cache_identity, effect, hooks, layers
from overlay.journal import Journal, PatchRecord
from overlay.settings import Settings
from overlay.verdict import APPLY, INERT, Verdict

Entries = dict[str, Callable[[], object]]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Entries:
    """vLLM's table of environment variables, which its cache key is made of."""
    module = types.ModuleType("vllm.envs")
    table: Entries = {"VLLM_PORT": lambda: None}
    module.environment_variables = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.envs", module)
    monkeypatch.setattr(cache_identity, "_applied", {})
    monkeypatch.setattr(cache_identity, "_stock", {})
    return table


def test_no_patch_no_entry(entries: Entries) -> None:
    assert cache_identity.ENTRY not in entries


def test_each_set_of_patches_has_an_identity_of_its_own(entries: Entries) -> None:
    one = cache_identity.add("gdn", ["forward_cuda"])
    assert entries[cache_identity.ENTRY]() == one
    two = cache_identity.add("lora_linear", ["apply"])
    assert entries[cache_identity.ENTRY]() == two
    assert cache_identity.add("gdn", ["forward_cuda", "forward_hip"]) not in (one, two)
    assert cache_identity.add("gdn", ["forward_cuda"]) == two
    assert cache_identity.remove("lora_linear") == one


def test_removing_the_last_one_leaves_stocks_key(entries: Entries) -> None:
    cache_identity.add("gdn", ["forward"])
    assert cache_identity.remove("gdn") is None
    assert list(entries) == ["VLLM_PORT"]


def test_which_layers_stay_stock_counts(entries: Entries) -> None:
    """A start in which a layer could not be patched must not find the graph of one in which it was, and the reverse."""
    all_patched = cache_identity.add("gdn", ["forward"])
    assert cache_identity.note_layer("gdn", "layer.0", stock=False) is None
    one = cache_identity.note_layer("gdn", "layer.0", stock=True)
    two = cache_identity.note_layer("gdn", "layer.1", stock=True)
    assert len({all_patched, one, two}) == 3 and entries[cache_identity.ENTRY]() == two
    assert cache_identity.note_layer("gdn", "layer.1", stock=True) is None
    other = cache_identity.note_layer("gdn", "layer.0", stock=False)  # the next engine of the process
    assert other not in (None, all_patched, one, two)
    assert cache_identity.note_layer("gdn", "layer.1", stock=False) == all_patched


@pytest.mark.parametrize("fault", [layers.Refused("known"), ValueError("unknown"), None], ids=repr)
def test_the_key_follows_what_becomes_of_a_layer(
    fault: Exception | None, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "journal", Journal())
    monkeypatch.setattr(layers.agreement, "reason_for_stock", lambda _: None)
    all_patched = layers.journal.fingerprint = cache_identity.add("lora_linear", ["apply"])

    def make() -> tuple[str, dict[str, object]]:
        if fault is not None:
            raise fault
        return "taken", {}

    taken = layers.adopt("lora_linear", PatchRecord(), "layer.0", make, Settings())
    assert (taken == "taken") == (layers.journal.fingerprint == all_patched) == (fault is None)
    assert layers.journal.fingerprint == entries[cache_identity.ENTRY]()


@pytest.mark.parametrize("elastic", [True, False])
def test_every_layer_stays_stock_where_ranks_may_join_that_nobody_has_compared(elastic: bool) -> None:
    """Such a rank could lack the overlay, have vLLM's own compile ranges, and run fewer warm-up steps than the others."""
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(use_ubatching=False, enable_elastic_ep=elastic),
        compilation_config=types.SimpleNamespace(cache_dir=""),
    )
    with pytest.raises(layers.Refused, match="elastic expert parallelism") if elastic else contextlib.nullcontext():
        layers.refuse_modes(config, batch_invariant=False)


@pytest.mark.parametrize("folder", ["/somewhere/of/my/own", ""])
def test_every_layer_stays_stock_where_the_user_has_named_the_folder_of_graphs(folder: str) -> None:
    """No hash is in its name: stock and overlay, two versions, two plans would take each other's graphs."""
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(use_ubatching=False),
        compilation_config=types.SimpleNamespace(cache_dir=folder),
    )
    with pytest.raises(layers.Refused, match="cache_dir is set") if folder else contextlib.nullcontext():
        layers.refuse_modes(config, batch_invariant=False)


@pytest.mark.parametrize("fails", [False, True], ids=["inert", "failed"])
def test_a_patch_that_is_not_installed_after_all_leaves_stocks_key(
    fails: bool, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[object] = []

    def install(module: types.ModuleType, found: Verdict, settings: Settings) -> Verdict:
        keys.append(entries[cache_identity.ENTRY]())
        if fails:
            raise OSError("damaged")
        return dataclasses.replace(found, state=INERT)

    installer = types.ModuleType("overlay.patches.gdn")
    installer.install = install  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "overlay.patches.gdn", installer)
    monkeypatch.setattr(hooks, "journal", Journal())
    with pytest.raises(OSError, match="damaged") if fails else contextlib.nullcontext():
        found = hooks._install("gdn", types.ModuleType("vllm.any"), Verdict(APPLY, "", "vllm.any"), Settings())
        assert found.state == INERT
    assert keys != [] and list(entries) == ["VLLM_PORT"] and hooks.journal.fingerprint is None
    assert "gdn" not in effect._installed


def test_layers_of_a_patch_that_no_graph_shows_do_not_count(entries: Entries) -> None:
    cache_identity.add("gdn", ["forward"])
    assert cache_identity.note_layer("pooling", "GPUModelRunner", stock=True) is None
    assert cache_identity.add("gdn", ["forward"]) == entries[cache_identity.ENTRY]()


def test_the_overlays_own_source_counts(
    entries: Entries, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patches").mkdir()
    source = tmp_path / "patches" / "gdn.py"
    source.write_text("1")
    monkeypatch.setattr(cache_identity, "__file__", str(tmp_path / "cache_identity.py"))
    before = cache_identity.add("gdn", ["forward"])
    assert cache_identity.add("gdn", ["forward"]) == before
    source.write_text("2")
    assert cache_identity.add("gdn", ["forward"]) != before


def test_the_name_is_none_that_vllm_takes_for_its_own() -> None:
    assert not cache_identity.ENTRY.startswith("VLLM_")
