"""The verdict on every release, against a table that was read from the sources by hand."""

from __future__ import annotations

import pathlib
import re

import pytest

from .released import EXPECTED, releases, tree, verdict

pytestmark = pytest.mark.contract


def test_the_table_has_every_release() -> None:
    assert tuple(EXPECTED) == (*releases.OLDER, *releases.SUPPORTED)


@pytest.mark.parametrize("version", EXPECTED)
def test_verdict(version: str) -> None:
    found, expected = verdict(version), EXPECTED[version]["gdn"]
    assert found.state == expected["verdict"], found
    assert found.class_name == expected["class"]
    assert list(found.methods) == expected["methods"]
    assert expected["reason"] in found.reason
    assert found.where is not None
    assert found.where.endswith(f"/vllm/{expected['where']}")


@pytest.mark.parametrize("version", releases.SUPPORTED)
def test_where_points_at_the_method(version: str) -> None:
    """A reader opens the file at this line; it has to be the first patched method's."""
    found = verdict(version)
    assert found.where is not None
    path, _, line = found.where.rpartition(":")
    text = pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1]
    assert re.match(rf"    def {found.methods[0]}\(", text), text


@pytest.mark.parametrize("version", releases.SUPPORTED)
def test_every_method_with_the_pair_is_named_or_not_ours(version: str) -> None:
    """A second count, without `ast`: methods of the class in which both projections are called. XPU is not patched."""
    found = verdict(version)
    assert found.module is not None
    source = tree(version).read(found.module)
    assert source is not None
    body = source.text.split(f"\nclass {found.class_name}(", 1)[1]
    parts = re.split(r"^    (?:async )?def (\w+)\(", body, flags=re.MULTILINE)
    calling = {
        name
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
        if "self.in_proj_qkvz(" in text and "self.in_proj_ba(" in text
    }
    assert calling - {"forward_xpu"} == set(found.methods)
