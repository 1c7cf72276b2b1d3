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
