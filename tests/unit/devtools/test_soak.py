"""The soak without vLLM: its requests against an HTTP server of a few lines, its sums on made-up numbers."""

from __future__ import annotations

import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from devtools import servers
from devtools.soak import load, memory, report
from overlay.report.journal_reader import Journal, Patch

PATCHES = ("gdn", "lora_linear")
LENGTHS = (3, 40, 200, 400)
POOL = load.make_pool(["first", "second"], LENGTHS)
MARGIN = 0.5


def tokens_of(model: str, prompt: list[int], count: int) -> list[int]:
    """What the stand-in answers; another model or prompt gives other tokens."""
    return [(sum(prompt) + sum(model.encode()) + 7 * number) % 500 for number in range(count)]


class StandIn(http.server.BaseHTTPRequestHandler):
    """Completions as vLLM gives them, whole and in pieces."""

    hung_up: threading.Semaphore
    left: list[int]
    broken: bool

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        left = self.left.pop() if self.left else 0
        page = f'vllm:num_requests_running{{engine="0"}} {left}.0\nvllm:num_requests_waiting{{engine="0"}} 0.0\n'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(page.encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and asked["ignore_eos"] and asked["return_token_ids"]
        tokens = tokens_of(asked["model"], asked["prompt"], asked["max_tokens"] - self.broken)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if asked.get("stream") else "application/json")
        self.end_headers()
        if not asked.get("stream"):
            self.wfile.write(json.dumps(self._part(tokens, asked.get("logprobs") == 2)).encode())
            return
        try:
            for token in tokens:
                self.wfile.write(f"data: {json.dumps(self._part([token]))}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.002)
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.hung_up.release()

    def _part(self, tokens: list[int], logprobs: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": None, "logprobs": None, "token_ids": tokens}
        if logprobs:  # the chosen token may be one more beside the likeliest two
            choice["logprobs"] = {"top_logprobs": [{"a": -2.0 - MARGIN, "b": -2.0, "c": -9.0} for _ in tokens]}
        return {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[servers.Server]:
    handler = type("Handler", (StandIn,), {"hung_up": threading.Semaphore(0), "left": [], "broken": False})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as stand_in:
        threading.Thread(target=stand_in.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{stand_in.server_address[1]}"
        made = servers.Server(url, tmp_path / "log", tmp_path, process=None, launched=0.0)  # type: ignore[arg-type]
        made.handler = handler  # type: ignore[attr-defined]
        yield made
        stand_in.shutdown()


def reference() -> dict[str, load.Tokens]:
    return {one.name: tuple(tokens_of(one.model, list(one.prompt), one.new_tokens)) for one in POOL}


def margins(margin: float = MARGIN) -> dict[str, load.Margins]:
    return {one.name: (margin,) * one.new_tokens for one in POOL}


def loaded(server: servers.Server, wanted: dict[str, load.Tokens], margin: float = MARGIN) -> load.Tally:
    tally = load.Tally()
    load.put_load(server, POOL, wanted, margins(margin), tally, seconds=1.5, clients=4, seed=1, stop=threading.Event())
    return tally


def test_the_requests_are_the_same_prompts_for_every_model_and_the_same_every_time() -> None:
    assert load.make_pool(["first", "second"], LENGTHS) == POOL
    by_model = {
        model: [(one.prompt, one.new_tokens) for one in POOL if one.model == model]
        for model in ("tiny", "first", "second")
    }
    assert by_model["tiny"] == by_model["first"] == by_model["second"]
    assert len({one.name for one in POOL}) == len(POOL)
    probes = load.choose_probes(POOL)
    assert {(one.model, len(one.prompt)) for one in probes} == {
        (model, length) for model in by_model for length in (3, 400)
    }


def test_load_is_mixed_and_answers_are_compared(server: servers.Server) -> None:
    tally = loaded(server, reference())
    assert not tally.errors and not tally.different
    assert set(tally.sent) == set(load.WEIGHTS) and tally.same == tally.sent.total() - tally.sent[load.ABORTED]
    handler = server.handler  # type: ignore[attr-defined]
    for _ in range(tally.sent[load.ABORTED]):
        assert handler.hung_up.acquire(timeout=5), "a client that hung up has to be gone for the server"


def other(place: int) -> dict[str, load.Tokens]:
    """The reference, with another token at a place of each answer."""
    found = {name: list(tokens) for name, tokens in reference().items()}
    for tokens in found.values():
        tokens[place] += 1
    return {name: tuple(tokens) for name, tokens in found.items()}


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("margin", [load.TIE, load.TIE + 0.01])
def test_an_answer_under_load_may_leave_the_reference_only_where_two_tokens_are_as_likely(
    place: int, margin: float
) -> None:
    tally = load.Tally()
    sure = {one.name: tuple(margin if at == place else 9.0 for at in range(one.new_tokens)) for one in POOL}
    for request in POOL:
        tally.finished(load.WHOLE, request, reference()[request.name], other(place), sure)
    assert tally.same == 0
    if margin <= load.TIE:
        assert tally.rounded == {margin: len(POOL)} and not tally.different
    else:
        assert not tally.rounded and set(tally.different) == {one.name for one in POOL}


def test_other_tokens_under_load_are_counted_by_request(server: servers.Server) -> None:
    wanted = reference()
    wanted[POOL[0].name] = other(0)[POOL[0].name]
    tally = loaded(server, wanted)
    assert set(tally.different) == {POOL[0].name} and tally.same > 0 and not tally.errors


def test_the_first_answers_come_with_margins(server: servers.Server) -> None:
    found: dict[str, load.Margins] = {}
    assert load.alone(server, POOL, threading.Event(), found) == reference()
    assert found == {name: pytest.approx(values) for name, values in margins().items()}


def test_too_few_tokens_are_an_error_and_not_asked_for_without_a_pause(server: servers.Server) -> None:
    server.handler.broken = True  # type: ignore[attr-defined]
    tally = loaded(server, reference())
    assert tally.errors.total() == tally.sent.total() - tally.sent[load.ABORTED] + sum(
        count for text, count in tally.errors.items() if text.startswith(load.ABORTED)
    )
    assert any("tokens instead of" in text for text in tally.errors)
    assert tally.errors.total() <= 4 * 4
    (answer,) = load.alone(server, POOL[:1], threading.Event()).values()
    assert isinstance(answer, str) and "tokens instead of" in answer


def test_stop_ends_the_load_at_once(server: servers.Server) -> None:
    stop = threading.Event()
    stop.set()
    tally = load.Tally()
    load.put_load(server, POOL, reference(), margins(), tally, seconds=600, clients=2, seed=1, stop=stop)
    assert tally.sent.total() == 0 and load.alone(server, POOL, stop) == {}


def test_an_engine_is_waited_for_until_it_is_empty(server: servers.Server) -> None:
    handler = server.handler  # type: ignore[attr-defined]
    handler.left = [1, 3]
    assert load.wait_until_idle(server, threading.Event()) == 0 and handler.left == []
    handler.left = [2] * 100
    assert load.wait_until_idle(server, threading.Event(), seconds=0.5) == 2


def test_requests_in_the_engine_are_read_from_the_metrics() -> None:
    page = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 1.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 4.0
"""
    assert load.requests_on(page) == 7


def series(minutes: float, growth: float, *, noise: float = 0.0, spikes: int = 0) -> memory.Series:
    """One sample per half second, growing by `growth` MiB per minute."""
    generator = random.Random(3)
    points = []
    for number in range(int(minutes * 120)):
        spike = 500 if spikes and number % spikes == 0 else 0
        size = 1000 + growth * number / 120 + generator.gauss(0, noise) + spike
        points.append((number / 2, size * memory.MIB))
    return points


def test_a_slope_is_found_in_the_second_half_and_spikes_do_not_matter() -> None:
    exact = memory.slope_of(series(8, 2.5))
    assert exact is not None and exact.growth == pytest.approx(2.5) and exact.low == pytest.approx(exact.high)
    flat = [(seconds, size) for seconds, size in series(8, 0, noise=3, spikes=7)]
    for number in range(len(flat) // 2):  # fills its caches first
        flat[number] = (flat[number][0], number * memory.MIB)
    slope = memory.slope_of(flat)
    assert slope is not None and slope.low < 0 < slope.high and slope.high - slope.low < 2


@pytest.mark.parametrize("points", [[], series(8, 1)[:1], series(8, 1)[::30], series(5, 1)], ids=len)
def test_too_few_samples_and_too_short_a_time_have_no_slope(points: memory.Series) -> None:
    assert memory.slope_of(points) is None


def test_resident_memory_is_that_of_the_processes() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"\n"
    own, both = memory.resident_bytes([os.getpid()]), memory.resident_bytes([os.getpid(), child.pid])
    assert both - own > memory.MIB
    child.communicate(b"\n")
    assert memory.resident_bytes([child.pid]) == 0


def test_only_the_gpus_that_may_be_used_are_asked_for_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$1" in --id=1) echo 7;; --query*) echo 5; echo 7;; *) exit 1;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert memory.device_bytes() == 12 * memory.MIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert memory.device_bytes() == 7 * memory.MIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert memory.device_bytes() is None


def test_samples_of_both_sides_are_of_the_same_moments() -> None:
    sampler = memory.Sampler({"stock": lambda: [os.getpid()], "overlay": lambda: [os.getpid()] * 2})
    sampler.start()
    time.sleep(3 * memory.SAMPLE_SECONDS)
    sampler.stop()
    samples = sampler.snapshot()["resident"]
    assert [seconds for seconds, _ in samples["stock"]] == [seconds for seconds, _ in samples["overlay"]]
    assert samples["overlay"][0][1] == pytest.approx(2 * samples["stock"][0][1], rel=0.05)


def test_a_check_names_what_differs_and_where() -> None:
    wanted = {"a": (1, 2, 3), "b": (1, 2, 3), "c": (1, 2, 3), "d": (1, 2, 3)}
    found = report.check(1.0, {"a": (1, 2, 3), "b": (1, 9, 3), "c": (1, 2), "d": "timeout"}, wanted)
    assert found.compared == 4
    assert found.different == ("b: from token 1 on", "c: from token 2 on", "d: timeout")


def journal(**changes: Any) -> Journal:
    patches = tuple(Patch(name, "apply", layers=("x",), serial_calls={"y": 3}) for name in PATCHES)
    facts: dict[str, Any] = {
        "process_id": 1,
        "parent": 0,
        "role": "EngineCore",
        "started": 0.0,
        "patches": patches,
        "problems": (),
        "transformers": "",
        "transformers_seconds": None,
        "vllm": None,
        "overlay": None,
        "fingerprint": None,
        "raw": {},
    }
    return Journal(**{**facts, **changes})


def good() -> report.Soak:
    soak = report.Soak(
        {}, growth_limit=1.0, patches=PATCHES, reference=reference(), journals=[journal()], load_seconds=240.0
    )
    for side in soak.sides.values():
        side.tally.sent[load.WHOLE] = 100
        side.tally.same = 100
        side.checks = [report.Check(1.0, 24, ()), report.Check(400.0, 24, ())]
    mib = [(seconds, size / memory.MIB) for seconds, size in series(8, 0.3, noise=1)]
    soak.samples = {"resident": {"stock": mib, "overlay": [(s, 10 + m) for s, m in mib]}, "device": []}
    return soak


def spoil(soak: report.Soak, how: str) -> None:
    stock, overlay = soak.sides["stock"], soak.sides["overlay"]
    resident = soak.samples["resident"]
    if how == "error":
        overlay.tally.errors["whole: X"] += 2
    elif how == "another token alone":
        overlay.checks.append(report.Check(2.0, 1, ("a: from token 3 on",)))
    elif how == "stock differs from itself alone":
        stock.checks.append(report.Check(2.0, 1, ("a: from token 3 on",)))
    elif how == "another token under load, stock's are the same":
        overlay.tally.different["a"] += 1
    elif how == "stays in the engine":
        overlay.left = 1
    elif how == "grows":
        resident["overlay"] = [(seconds, mib + seconds / 60 * 3) for seconds, mib in resident["overlay"]]
    elif how == "device grows":
        soak.samples["device"] = [(seconds, 1000 + seconds / 60 * 3) for seconds, _ in resident["stock"][::10]]
    elif how == "no effect":
        soak.journals = [journal(patches=(Patch("gdn", "apply", layers=("x",)),))]
    elif how == "a problem":
        soak.journals = [journal(problems=("something",))]
    elif how == "the same answers to everything":
        soak.reference = dict.fromkeys(soak.reference, (1, 1, 1))
    elif how == "other weights were not loaded":
        soak.other_reference = dict(list(soak.reference.items())[:1])
    elif how == "never compared":
        overlay.checks = overlay.checks[:1]
    else:
        soak.died = how


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", "overlay: 2 requests failed"),
        ("another token alone", "overlay: 1 of 49 checks differ: a: from token 3 on"),
        ("stock differs from itself alone", "stock: 1 of 49 checks differ"),
        ("another token under load, stock's are the same", "overlay: 1 answers under load"),
        ("stays in the engine", "still in the engine"),
        ("grows", "memory beyond stock's grows by +3.00"),
        ("device grows", "the GPU's used memory grows by +3.00"),
        ("no effect", "gdn: patched in no layer, or its op never ran"),
        ("a problem", "the overlay reports: something"),
        ("the same answers to everything", "proves nothing"),
        ("other weights were not loaded", "other weights give the same answer"),
        ("never compared", "nothing was compared after the load"),
        ("vllm serve ended", "vllm serve ended"),
    ],
)
def test_each_fault_fails_the_soak_and_says_what_it_is(how: str, said: str) -> None:
    soak = good()
    assert soak.faults() == []
    spoil(soak, how)
    assert said in soak.faults()[0]
    assert json.loads(json.dumps(soak.as_dict()))["faults"] == soak.faults()


def test_where_stock_rounds_differently_in_a_batch_so_may_the_overlay() -> None:
    soak = good()
    for side in soak.sides.values():
        side.tally.different["a"] += 1
    assert soak.faults() == []


def test_growth_that_stock_has_too_is_not_the_overlays() -> None:
    soak = good()
    for name, points in soak.samples["resident"].items():
        soak.samples["resident"][name] = [(seconds, mib + seconds / 60 * 3) for seconds, mib in points]
    assert soak.faults() == []


def test_an_interrupted_soak_is_judged_by_what_it_has() -> None:
    soak = report.Soak({}, growth_limit=1.0, patches=PATCHES, interrupted=True)
    assert soak.faults() == [] and soak.growth()["beyond stock"] is None
    soak.sides["overlay"].tally.errors["x"] += 1
    assert len(soak.faults()) == 1


def test_the_table_shows_both_sides() -> None:
    from rich.console import Console

    soak = good()
    soak.samples["device"] = [(0.0, 5000.0), (400.0, 5001.0)]
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table(soak))
    text = console.export_text()
    for part in ("240 s of mixed load", "whole", "48, 0", "100, 0", "beyond stock", "5000, 5001", "too short to tell"):
        assert part in text
