"""The regression gate: `python -m overlay bench --compare`."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from overlay.cli.bench import compare
from overlay.cli.bench.compare import FASTER, GONE, NEW, SAME, SLOWER, Ratio, decide
from overlay.cli.failure import CommandError
from tests.conftest import REPOSITORY

REFERENCE = REPOSITORY / "benchmarks" / "results"
EVIDENCE = REFERENCE / "h200-vllm-0.33.0-24-layers" / "results.json"

sizes = st.floats(0.2, 5.0)
spreads = st.floats(0.0, 0.5)
ratios = st.builds(lambda ratio, below, above: Ratio(ratio, ratio - below, ratio + above), sizes, spreads, spreads)


@given(old=ratios, new=ratios)
def test_only_what_is_apart_and_large_enough_has_moved(old: Ratio, new: Ratio) -> None:
    verdict = decide(old, new)
    overlap = max(old.low, new.low) <= min(old.high, new.high)
    small = abs(new.ratio - old.ratio) <= compare.LEAST_CHANGE * old.ratio
    assert (verdict == SAME) == (overlap or small)
    if verdict != SAME:
        assert verdict == (SLOWER if new.ratio > old.ratio else FASTER)


@given(old=ratios, new=ratios)
def test_the_other_way_round_is_the_opposite(old: Ratio, new: Ratio) -> None:
    opposite = {SLOWER: FASTER, FASTER: SLOWER}
    there, back = decide(old, new), decide(new, old)
    # A change of 1 % of the larger ratio can be less than 1 % of the smaller one: then one way says nothing.
    assert SAME in (there, back) or back == opposite[there]


@given(ratio=ratios)
def test_nothing_has_moved_from_itself(ratio: Ratio) -> None:
    assert decide(ratio, ratio) == SAME


def test_both_conditions_are_needed() -> None:
    old = Ratio(0.980, 0.979, 0.981)
    assert decide(old, Ratio(0.9875, 0.987, 0.988)) == SAME  # apart, but 0.8 %
    assert decide(old, Ratio(1.010, 0.975, 1.020)) == SAME  # 3 %, but not apart
    assert decide(old, Ratio(0.995, 0.994, 0.996)) == SLOWER
    assert decide(old, Ratio(0.960, 0.959, 0.961)) == FASTER


def _row(size: str, count: int, ratio: float) -> dict[str, Any]:
    found = {"ratio": ratio, "low": ratio - 0.001, "high": ratio + 0.001}
    return {size: count, "stock": 1.0, "overlay": ratio, **found, "arms": {"overlay": {"seconds": ratio, **found}}}


def _results(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 2,
        "overlay": {"version": "0.1.0"},
        "host": {"gpu": "NVIDIA H200, 580.1, 143771 MiB"},
        "model": {"name": "Qwen3.5-27B", "layers": 16, "tensor_parallel": 1},
        "decode": [_row("requests", 1, 0.98), _row("requests", 8, 0.97)],
        "first_token": [_row("prompt", 128, 1.0)],
        "problems": [],
        **changes,
    }


def _tokens(different: int, repeats: bool = True) -> list[dict[str, Any]]:
    answer = {"different_requests": different, "first_difference": None, "logprobs_equal": not different}
    return [{"case": "N=8", "requests": 8, "stock_repeats_itself": repeats, "arms": {"overlay": answer}}]


def _compare(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> tuple[int, str]:
    paths = []
    for name, data in (("old", old), ("new", new)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(data))
    with (tmp_path / "shown").open("w") as file:
        status = compare.run(*paths, Console(file=file, width=120, markup=False))
    return status, (tmp_path / "shown").read_text()


def test_a_slower_row_is_a_regression(tmp_path: Path) -> None:
    new = _results(decode=[_row("requests", 1, 0.98), _row("requests", 8, 1.05)])
    status, shown = _compare(tmp_path, _results(), new)
    assert status == 1
    assert "+8.2 %" in shown and "2 same, 1 slower" in shown


def test_faster_new_and_gone_rows_are_none(tmp_path: Path) -> None:
    new = _results(decode=[_row("requests", 8, 0.90), _row("requests", 64, 0.99)])
    status, shown = _compare(tmp_path, _results(), new)
    assert status == 0
    assert "1 same, 1 faster, 1 new, 1 gone" in shown


def test_stock_against_stock_cannot_regress(tmp_path: Path) -> None:
    old, new = _results(), _results(tokens=_tokens(0))
    for data, ratio in ((old, 1.0), (new, 1.5)):
        for row in data["decode"]:
            row["arms"]["control"] = {"seconds": 1.0, "ratio": ratio, "low": ratio, "high": ratio}
    new["tokens"][0]["arms"]["control"] = {"different_requests": 1, "first_difference": None, "logprobs_equal": False}
    status, shown = _compare(tmp_path, old, new)
    assert status == 0 and "control" not in shown


def test_serving_rows_are_compared_by_metric(tmp_path: Path) -> None:
    def serving(ratio: float) -> dict[str, Any]:
        return {"rows": [{"rate": 4.0, "metric": "tpot", "arm": "overlay", **_row("x", 1, ratio)}]}

    status, shown = _compare(tmp_path, _results(serving=serving(0.98)), _results(serving=serving(1.02)))
    assert status == 1 and "serving tpot" in shown


def test_a_control_that_was_a_server_is_not_compared(tmp_path: Path) -> None:
    row = {"rate": 4, "metric": "tpot", "arm": "control", "ratio": 1.0, "low": 0.999, "high": 1.001}
    slower = {**row, "ratio": 1.1, "low": 1.09, "high": 1.11}
    status, shown = _compare(tmp_path, _results(serving={"rows": [row]}), _results(serving={"rows": [slower]}))
    assert status == 0 and "serving" not in shown


def test_tokens_that_differ_now_are_a_regression(tmp_path: Path) -> None:
    status, shown = _compare(tmp_path, _results(tokens=_tokens(0)), _results(tokens=_tokens(2)))
    assert status == 1 and "overlay, N=8: 2 requests differ, 0 before" in shown
    assert _compare(tmp_path, _results(tokens=_tokens(2)), _results(tokens=_tokens(2)))[0] == 0
    assert _compare(tmp_path, _results(), _results(tokens=_tokens(2, repeats=False)))[0] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"host": {"gpu": "NVIDIA B200, 580.1, 183359 MiB"}},
        {"host": {"gpu": None}},
        {"model": {"name": "Qwen3.5-35B-A3B", "layers": 16, "tensor_parallel": 1}},
        {"model": {"name": "Qwen3.5-27B", "layers": 12, "tensor_parallel": 1}},
        {"model": {"name": "Qwen3.5-27B", "layers": 16, "tensor_parallel": 2}},
        {"decode": [], "first_token": []},
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="not comparable"):
        _compare(tmp_path, _results(), _results(**changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as results"),
        ("[" * 200_000, "nested too deep"),
        ("[]", "it holds a list of length 0 and no object"),
        ("{}", "host is missing"),
        ('{"host": {}}', "does not say which model"),
        ({"host": None}, "host is None; allowed is an object"),
        ({"host": {"gpu": 5}}, "host.gpu is 5; allowed is a text or null"),
        ({"overlay": None}, "overlay is None; allowed is an object"),
        ({"pair": {"stock": "x"}}, "pair.stock is 'x'; allowed"),
        ({"model": "x"}, "model is 'x'; allowed"),
        ({"model": {"layers": 4, "tensor_parallel": 1}}, "model.name is missing; allowed is a text"),
        ({"model": {"name": "m", "layers": None, "tensor_parallel": 1}}, "model.layers is None; allowed"),
        ({"model": None, "arguments": {"architecture": "a"}}, "arguments.layers is missing; allowed"),
        ({"model": None, "arguments": {"architecture": "a", "layers": "x"}}, "arguments.layers is 'x'; allowed"),
        ({"decode": "abc"}, "decode is 'abc'; allowed is a list or null"),
        ({"decode": ["abc"]}, "decode has a row that is no object"),
        ({"decode": [{"ratio": 1.0, "requests": 1}]}, "decode: overlay is missing"),
        ({"decode": [{**_row("requests", 1, 1.0), "requests": "1"}]}, "decode: requests is '1'; allowed is a number"),
        ({"decode": [_row("requests", 1, float("nan"))]}, "decode: overlay: ratio is nan; allowed is a number"),
        ({"decode": [_row("requests", 1, float("inf"))]}, "decode: overlay: ratio is inf; allowed is a number"),
        ({"decode": [_row("requests", 1, 0.0)]}, "decode: overlay: ratio is 0.0; allowed is a number above 0"),
        ({"decode": [{"requests": 1, "arms": {"overlay": 1.0}}]}, "decode: overlay is 1.0; allowed is an object"),
        ({"decode": [{"requests": 1, "arms": None}]}, "decode: arms is None; allowed is an object"),
        ({"serving": {"rows": [{"metric": "tpot"}]}}, "serving.rows: arm is missing; allowed is a text"),
        ({"concurrency": {"rows": [{}]}}, "concurrency.rows: metric is missing; allowed is a text"),
        (
            {"tokens": [{**_tokens(0)[0], "stock_repeats_itself": 1}]},
            "tokens: stock_repeats_itself is 1; allowed is true",
        ),
    ],
)
def test_no_results_file_is_bad_input(content: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    """A file as it is, or what differs from one of bench; as the old one and as the new one."""
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(_results()))
    bad.write_text(content if isinstance(content, str) else json.dumps(_results(**content)))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(CommandError, match=re.escape(message)) as found:
            compare.run(*pair, Console(file=io.StringIO()))
        assert str(bad) in str(found.value)


@pytest.mark.parametrize("changes", [{"pair": None}, {"versions": None}, {"serving": None, "tokens": None}])
def test_what_was_not_measured_is_no_fault(changes: dict[str, Any], tmp_path: Path) -> None:
    assert _compare(tmp_path, _results(**changes), _results(**changes))[0] == 0


def test_the_reference_results_can_be_read(tmp_path: Path) -> None:
    """Those of before the schema: a run against itself has not moved, and one that is made slower has."""
    old = compare.read(EVIDENCE)
    assert str(compare.subject(old, EVIDENCE)) == "Qwen3.5-35B-A3B with 24 layers on 1 x NVIDIA H200"
    assert len(compare.ratios(old)) == len(old["decode"]) + len(old["first_token"]) == 16
    assert _compare(tmp_path, old, old)[0] == 0
    slower = json.loads(EVIDENCE.read_text())
    for row in slower["decode"]:
        row |= {key: row[key] * 1.5 for key in ("ratio", "low", "high")}
    status, shown = _compare(tmp_path, old, slower)
    assert status == 1 and "7 same, 9 slower" in shown


def test_new_and_gone() -> None:
    ratio = Ratio(1.0, 0.9, 1.1)
    assert compare.Row(("decode", 1.0, "overlay"), None, ratio).verdict == NEW
    assert compare.Row(("decode", 1.0, "overlay"), ratio, None).verdict == GONE
