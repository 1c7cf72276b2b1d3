"""devtools.demo: what passes, what fails, and what the table says. No server is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("rich", reason="the demo's libraries are not installed")

from devtools import demo
from overlay.report import journal_reader

ANSWER = demo.Answer("completion 'Hello'", (5, 6, 7, 8), (-0.5, -0.25, -1.0, -2.0))


def worker(layers: int = 3, calls: int = 12, verdict: str = "apply") -> journal_reader.Journal:
    patch: dict[str, Any] = {
        "verdict": verdict,
        "reason": "because",
        "layers": {"patched": {f"layers.{i}": {} for i in range(layers)}},
        "calls": {"fake": 3, "dual_stream": 0, "serial": {"pass-through": calls} if calls else {}},
    }
    return journal_reader.parse({"pid": 7, "role": "VllmWorker-0", "started": 2.0, "patches": {"gdn": patch}})


def played(**changes: Any) -> demo.Round:
    one = demo.Round("qwen3_5", "compiled", 3)
    one.stock = demo.Side([ANSWER], 30.0, 50.0)
    one.overlay = demo.Side([ANSWER], 31.0, 51.0)
    one.journals = [worker()]
    return replace(one, **changes)


def test_the_same_tokens_and_a_working_patch_pass() -> None:
    assert played().faults() == []


def test_a_different_token_fails_and_is_located() -> None:
    other = replace(ANSWER, tokens=(5, 6, 9, 8))
    (fault,) = played(overlay=demo.Side([other])).faults()
    assert "from token 2 on" in fault
    assert ANSWER.request in fault


@pytest.mark.parametrize("tokens", [(5, 6, 7), (5, 6, 7, 8, 9)])
def test_a_shorter_or_longer_answer_fails(tokens: tuple[int, ...]) -> None:
    (fault,) = played(overlay=demo.Side([replace(ANSWER, tokens=tokens)])).faults()
    assert f"from token {min(len(tokens), 4)} on" in fault


@pytest.mark.parametrize("answers", [[], [ANSWER, ANSWER]])
def test_a_missing_or_surplus_answer_fails(answers: list[demo.Answer]) -> None:
    assert any("answers with the overlay" in fault for fault in played(overlay=demo.Side(answers)).faults())


def test_no_answers_at_all_fail() -> None:
    assert played(stock=demo.Side(), overlay=demo.Side()).faults()


def test_answers_without_tokens_fail() -> None:
    empty = demo.Side([replace(ANSWER, tokens=())])
    assert any("no tokens" in fault for fault in played(stock=empty, overlay=empty).faults())


def test_one_repeated_token_proves_nothing() -> None:
    dull = demo.Side([replace(ANSWER, tokens=(5,) * 16)])
    assert any("proves nothing" in fault for fault in played(stock=dull, overlay=dull).faults())


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([], "never armed"),
        ([worker(layers=0)], "no layer was patched; gdn: apply, because"),
        ([worker(layers=0, verdict="drifted")], "gdn: drifted, because"),
        ([worker(layers=2)], "2 of 3 layers"),
        ([worker(calls=0)], "the op never ran"),
    ],
)
def test_a_patch_without_effect_fails_and_says_why(found: list[journal_reader.Journal], reason: str) -> None:
    (fault,) = played(journals=found).faults()
    assert "the patch had no effect" in fault
    assert reason in fault


def test_the_table_shows_every_process_and_what_the_start_cost() -> None:
    import io

    from rich.console import Console

    server = journal_reader.parse({"pid": 6, "role": "APIServer", "patches": {"gdn": {"verdict": "apply"}}})
    probe = journal_reader.parse({"pid": 8, "role": "ModelRegistryProbe"})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(demo.table([played(journals=[server, probe, replace(probe, process_id=9), worker()])]))
    shown = console.export_text()
    for text in (
        "4 identical",
        "APIServer 6",
        "VllmWorker-0 7",
        "12 (pass-through)",
        "ready 30.0 +1.0 s",
        "CPU 50.0 +1.0 s",
    ):
        assert text in shown
    assert "ModelRegistryProbe (2 processes)" in shown


def test_the_table_shows_a_difference() -> None:
    assert "DIFFERENT" in demo.tokens_cell(played(overlay=demo.Side([replace(ANSWER, tokens=(1, 2, 3, 4))])))
    assert "±1.0e-01" in demo.tokens_cell(played(overlay=demo.Side([replace(ANSWER, logprobs=(-0.4,))])))
