"""``python -m overlay matrix``: against a table of its own, with stubs of vLLM in the place of releases."""

from __future__ import annotations

import fnmatch
import json
import pathlib
import stat
from typing import Any

import pytest

from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")
pytest.importorskip("pypi_simple", reason="the command line's libraries are not installed")
from typer.testing import CliRunner

from overlay.cli import matrix, releases
from overlay.cli.app import app
from overlay.patches.registry import TARGET_MODULES

DRIFTED: dict[str, str | None] = {stub_vllm.GDN_MODULE: "class QwenGatedDeltaNetAttention:\n    pass\n"}
EXPECTED = {
    patch: {"verdict": "apply" if patch == "gdn" else "absent", "reason": f"a reason for {patch} | by a person"}
    for patch in TARGET_MODULES
}


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A repository's docs, and a cache with two releases; the registry has no others."""
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(matrix, "EXPECTED", tmp_path / "docs" / "expected-verdicts.json")
    monkeypatch.setattr(matrix, "DOCUMENT", tmp_path / "docs" / "COMPATIBILITY.md")
    registry(monkeypatch, "0.32.0", "0.33.0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    expect({"0.33.0": EXPECTED, "0.32.0": EXPECTED})
    for version in ("0.32.0", "0.33.0"):
        release(tmp_path, version)
    return tmp_path


def registry(monkeypatch: pytest.MonkeyPatch, *versions: str) -> None:
    monkeypatch.setattr(releases, "available", lambda root: list(versions))


def expect(table: Any) -> None:
    matrix.EXPECTED.write_text(json.dumps(table))


def release(world: pathlib.Path, version: str, changes: dict[str, str | None] | None = None) -> None:
    stub_vllm.write(world / "cache" / version, changes, transformers=None)


def invoke(world: pathlib.Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["matrix", *arguments, "--cache", str(world / "cache")])


def test_all_as_expected(world: pathlib.Path) -> None:
    result = invoke(world)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("0.")]
    assert rows == [[version, "apply", *["absent"] * 5] for version in ("0.32.0", "0.33.0")]
    assert "DIFFERENT" not in result.stdout and "not in the table" not in result.stdout


def test_json(world: pathlib.Path) -> None:
    answer = json.loads(invoke(world, "--json").stdout)
    assert (answer["schema"], answer["differences"], answer["not_in_table"]) == (1, [], [])
    gdn = answer["releases"]["0.33.0"]["gdn"]
    assert (gdn["verdict"], gdn["expected"], gdn["methods"]) == ("apply", "apply", ["forward_cuda"])


def test_a_verdict_that_differs_is_status_1_with_file_and_line(world: pathlib.Path) -> None:
    release(world, "0.33.0", DRIFTED)
    result = invoke(world)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("DIFFERENT")]
    assert "0.33.0 gdn: drifted, expected is apply" in line and f"(vllm/{stub_vllm.GDN_MODULE}:1)" in line


def test_an_expected_drift_is_no_difference(world: pathlib.Path) -> None:
    release(world, "0.33.0", DRIFTED)
    expect({"0.33.0": {**EXPECTED, "gdn": {"verdict": "drifted", "reason": "known"}}, "0.32.0": EXPECTED})
    assert invoke(world).exit_code == 0


def test_a_patch_that_the_table_leaves_out_is_status_1(world: pathlib.Path) -> None:
    expect({"0.33.0": {"gdn": EXPECTED["gdn"]}, "0.32.0": EXPECTED})
    result = invoke(world)
    assert (
        result.exit_code == 1 and "0.33.0 pooling: absent, expected-verdicts.json says nothing of it" in result.stdout
    )


def test_a_newer_release_is_shown_and_no_failure(world: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, "0.33.0", "0.100.0")
    release(world, "0.100.0")
    result = invoke(world)
    assert result.exit_code == 0 and "not in the table yet: 0.100.0" in result.stdout
    assert result.stdout.index("0.33.0") < result.stdout.index("0.100.0"), "versions are no text"
    assert invoke(world, "--write").exit_code == 0
    assert "0.100.0" not in matrix.DOCUMENT.read_text()


def test_a_newer_release_that_drifted_is_a_failure(world: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, "0.34.0")
    release(world, "0.34.0", DRIFTED)
    result = invoke(world)
    assert result.exit_code == 1 and "0.34.0 gdn: drifted, not a known shape" in result.stdout


@pytest.mark.parametrize(
    ("changes", "status", "line"),
    [
        ({}, 0, "vLLM 0.34.0: not in the table yet, and nothing drifted"),
        (DRIFTED, 1, f"vLLM 0.34.0: gdn: drifted, not a known shape: * (vllm/{stub_vllm.GDN_MODULE}:1)"),
    ],
    ids=["fine", "drifted"],
)
def test_the_latest_release_is_one_line(
    world: pathlib.Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], status: int, line: str
) -> None:
    monkeypatch.setattr(releases, "latest", lambda: "0.34.0")
    release(world, "0.34.0", changes)
    result = invoke(world, "--latest")
    assert result.exit_code == status and result.stderr == ""
    assert fnmatch.fnmatchcase(result.stdout, f"{line}\n"), result.stdout
    answer = json.loads(invoke(world, "--latest", "--json").stdout)
    assert list(answer["releases"]) == answer["not_in_table"] == ["0.34.0"] and len(answer["differences"]) == status


def test_a_latest_release_of_the_table_is_held_to_it(world: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "latest", lambda: "0.33.0")
    assert invoke(world, "--latest").stdout == "vLLM 0.33.0: as expected\n"
    release(world, "0.33.0", DRIFTED)
    result = invoke(world, "--latest")
    assert result.exit_code == 1 and "vLLM 0.33.0: gdn: drifted, expected is apply" in result.stdout


def test_the_latest_without_a_network_is_one_message(world: pathlib.Path) -> None:
    result = invoke(world, "--latest")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: cannot tell which release of vLLM is the latest")
    assert line.endswith("Without a network, name a release by its number, such as 0.33.0.")


@pytest.mark.parametrize("more", ["0.33.0", "--write", "--check"])
def test_the_latest_is_judged_alone(world: pathlib.Path, more: str) -> None:
    result = invoke(world, "--latest", more)
    assert result.exit_code == 2 and "--latest judges the newest release alone" in result.stderr


def test_releases_by_number(world: pathlib.Path) -> None:
    answer = json.loads(invoke(world, "v0.33", "--json").stdout)
    assert list(answer["releases"]) == ["0.33.0"]


def test_without_a_network_the_table_has_to_do(world: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(root: pathlib.Path) -> list[str]:
        raise releases.UnreachableError("no answer")

    monkeypatch.setattr(releases, "available", unreachable)
    result = invoke(world)
    assert result.exit_code == 0 and "only the releases of the table" in result.stderr
    matrix.EXPECTED.unlink()
    assert invoke(world).exit_code == 2


def test_where_there_is_no_table_nothing_is_missing_from_it(world: pathlib.Path) -> None:
    matrix.EXPECTED.unlink()
    result = invoke(world)
    assert result.exit_code == 0 and "not in the table" not in result.stdout


def test_the_file_is_written_compared_and_noticed_when_it_is_old(world: pathlib.Path) -> None:
    assert invoke(world, "--check").exit_code == 1, "there is none"
    assert invoke(world, "--write").exit_code == 0
    text = matrix.DOCUMENT.read_text()
    assert "| 0.32.0 | apply | absent | absent | absent |" in text
    assert "| 0.32.0 to 0.33.0 | apply | a reason for gdn \\| by a person |" in text, "neighbours share a row"
    assert invoke(world, "--check").exit_code == 0
    assert invoke(world, "--write").exit_code == 0 and matrix.DOCUMENT.read_text() == text
    matrix.DOCUMENT.write_text(text + "\n")
    result = invoke(world, "--check")
    assert result.exit_code == 1 and "is not what would be written now" in result.stdout
    assert matrix.DOCUMENT.read_text() == text + "\n", "comparing writes nothing"


def test_what_differs_is_written_as_found(world: pathlib.Path) -> None:
    release(world, "0.33.0", DRIFTED)
    assert invoke(world, "--write").exit_code == 1
    assert (
        "| 0.33.0 | drifted | QwenGatedDeltaNetAttention has none of the methods forward_cuda"
        in matrix.DOCUMENT.read_text()
    )


def test_the_written_file_is_whole_and_readable(world: pathlib.Path) -> None:
    output = world / "elsewhere.md"
    assert invoke(world, "--write", "--output", str(output)).exit_code == 0
    assert stat.S_IMODE(output.stat().st_mode) == 0o644
    assert not matrix.DOCUMENT.exists() and not list(world.glob(".elsewhere*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main"], "'main' is not a version number"),
        (["--output", "x.md"], "needs --write or --check"),
        (["--write", "--check"], "exclude each other"),
        (["--write", "0.33.0"], "leave 0.33.0 out"),
        (["--write", "--output", "/no/such/folder/x.md"], "/no/such/folder/x.md cannot be written"),
        (["0.31.0"], "Without a network, copy"),
    ],
)
def test_bad_input(world: pathlib.Path, arguments: list[str], message: str) -> None:
    result = invoke(world, *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert not matrix.DOCUMENT.exists()


def test_outside_of_a_repository_there_is_nothing_to_write(world: pathlib.Path) -> None:
    matrix.EXPECTED.unlink()
    result = invoke(world, "--write")
    assert result.exit_code == 2 and str(matrix.EXPECTED) in result.stderr


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"main": {}}', '{"0.33.0": {"gdn": {"verdict": "apply"}}}', '{"0.33.0": 1}']
)
def test_a_table_that_cannot_be_used(world: pathlib.Path, text: str) -> None:
    matrix.EXPECTED.write_text(text)
    result = invoke(world)
    assert result.exit_code == 2 and str(matrix.EXPECTED) in result.stderr
