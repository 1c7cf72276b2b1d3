"""devtools.servers without vLLM: a small HTTP server stands in for `vllm serve`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from devtools import servers

STAND_IN = """\
#!{python}
import http.server, os, signal, subprocess, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
print("started", flush=True)
{body}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(folder: Path, body: str = "") -> str:
    """A `vllm` beside a `python`, as in an environment's bin folder."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, body=textwrap.dedent(body)))
    program.chmod(0o755)
    return str(folder / "bin" / "python")


def test_a_server_is_waited_for_and_stopped(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "time.sleep(0.5)")
    with servers.serve(python, tmp_path, overlay=False, folder=tmp_path / "work") as server:
        assert server.start_seconds >= 0.5
        assert server.process_ids() == [server.process.pid]
        assert server.cpu_seconds() > 0
        assert server.journals(wait_seconds=0) == []
    assert server.process.poll() is not None


def test_children_do_not_outlive_the_server(tmp_path: Path) -> None:
    python = stand_in(tmp_path, 'subprocess.Popen(["sleep", "600"])')
    members = []

    def interrupted() -> None:
        with servers.serve(python, tmp_path, overlay=False, folder=tmp_path / "work") as server:
            members.extend([server.process.pid, *server.process_ids()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    group, *processes = members
    assert len(processes) == 2
    deadline = time.monotonic() + 5
    while servers.group_members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert servers.group_members(group) == {}


def test_a_server_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "STOP_TIMEOUT_SECONDS", 0.2)
    python = stand_in(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    with servers.serve(python, tmp_path, overlay=False, folder=tmp_path / "work") as server:
        pass
    assert server.process.returncode == -9


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    python = stand_in(tmp_path, 'sys.exit("no such model")')
    with (
        pytest.raises(servers.ServerError, match=r"ended with status 1(.|\n)*no such model"),
        servers.serve(python, tmp_path, overlay=False, folder=tmp_path / "work"),
    ):
        pass


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    seen: list[str] = []
    python = stand_in(tmp_path, 'print("Resolved architecture: Tiny", flush=True); time.sleep(600)')
    with (
        pytest.raises(servers.ServerError, match="did not answer in 1 s"),
        servers.serve(
            python,
            tmp_path,
            overlay=False,
            folder=tmp_path / "work",
            timeout=1,
            on_progress=lambda _, stage: seen.append(stage),
        ),
    ):
        pass
    assert seen[-1] == "starting the engine core"


def test_two_servers_start_side_by_side(tmp_path: Path) -> None:
    python = stand_in(tmp_path)
    with (
        servers.launch(python, tmp_path, overlay=False, folder=tmp_path / "one") as one,
        servers.launch(python, tmp_path, overlay=True, folder=tmp_path / "two") as two,
    ):
        servers.wait_until_ready([one, two])
        assert one.base_url != two.base_url
        servers.ask_to_stop([one, two])


def test_the_second_need_not_wait_until_the_first_answers(tmp_path: Path) -> None:
    python = stand_in(tmp_path, 'print("GPU KV cache size: 1 tokens", flush=True); time.sleep(600)')
    with servers.launch(python, tmp_path, overlay=False, folder=tmp_path / "one") as one:
        servers.wait_for_kv_cache(one, timeout=20)
        assert not one.is_ready() and one.stage() == "first run of the model"


def test_a_server_that_ends_without_a_kv_cache_is_an_error(tmp_path: Path) -> None:
    python = stand_in(tmp_path, 'sys.exit("no memory")')
    with (
        servers.launch(python, tmp_path, overlay=False, folder=tmp_path / "one") as one,
        pytest.raises(servers.ServerError, match="no memory"),
    ):
        servers.wait_for_kv_cache(one, timeout=20)


def test_stock_and_overlay_differ_in_the_path_and_the_overlays_settings_alone(tmp_path: Path) -> None:
    base = {
        "PATH": "/bin",
        "PYTHONPATH": f"{servers.ROOT}{os.pathsep}/elsewhere",
        "VLLMOVERLAY": "0",
        "VLLM_PLUGINS": "x",
    }
    stock = servers.environment(False, tmp_path, base)
    overlay = servers.environment(True, tmp_path, base)
    assert stock["PYTHONPATH"].split(os.pathsep)[0] == "/elsewhere"
    assert overlay["PYTHONPATH"].split(os.pathsep)[:2] == [str(servers.ROOT), "/elsewhere"]
    differing = {name for name in stock.keys() | overlay.keys() if stock.get(name) != overlay.get(name)}
    assert differing == {"PYTHONPATH", "VLLMOVERLAY_JOURNAL_DIR"}
    assert "VLLM_PLUGINS" not in stock
    assert "VLLMOVERLAY" not in overlay


def test_an_empty_path_stays_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "BESIDE", tmp_path / "nothing")
    assert "PYTHONPATH" not in servers.environment(False, tmp_path, {})


def test_ones_own_settings_win(tmp_path: Path) -> None:
    assert servers.environment(True, tmp_path, {}, {"VLLMOVERLAY_PLAN": "serial"})["VLLMOVERLAY_PLAN"] == "serial"


def test_zombies_are_no_members() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    deadline = time.monotonic() + 10
    while servers.group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert servers.group_members(process.pid) == {}
    process.wait()
