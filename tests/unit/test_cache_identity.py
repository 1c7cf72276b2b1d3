"""The fingerprint in vLLM's compile cache key."""

from __future__ import annotations

import pathlib
import sys
import types
from collections.abc import Callable

import pytest

from overlay import cache_identity

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
