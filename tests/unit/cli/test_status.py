"""``python -m overlay status``: what is shown of the processes of this host, and the exit status."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.conftest import overlay_environment

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from typer.testing import CliRunner

from overlay.cli.app import app

GDN: dict[str, Any] = {
    "verdict": "apply",
    "reason": "as known",
    "module": "vllm.gdn",
    "methods": ["forward_cuda"],
    "layers": {
        "patched": {"layers.0": {}, "layers.1": {}},
        "refused": {"layers.2": "quantized", "layers.3": "quantized"},
    },
    "calls": {"fake": 4, "lowered": 9, "dual_stream": 1234, "fused": 789, "serial": {"not capturing a CUDA graph": 56}},
}
#: As the journal has them, and as they are shown.
PLANS: list[dict[str, Any]] = [
    {
        "shape": {"hidden": 2048, "main": 12288, "side": 64, "dtype": "torch.bfloat16"},
        "layers": 2,
        "source": "measured",
        "seconds": 1.25,
        "rows": [
            {"tokens": 1, "strategy": "fused", "us": {"serial": 10.0, "fused": 8.0}, "inexact": []},
            {"tokens": 2, "strategy": "fused", "us": {}, "inexact": []},
            {"tokens": 8, "strategy": "dual", "us": {}, "inexact": ["fused"]},
            {"tokens": 16, "strategy": "fused", "us": {}, "inexact": []},
        ],
    },
    {"shape": {"hidden": 1, "main": 2, "side": 3}, "layers": 1, "source": "read", "seconds": 0.5, "rows": []},
]
SHOWN: list[dict[str, Any]] = [
    {
        "shape": "2048 to 12288 + 64",
        "layers": 2,
        "source": "measured",
        "seconds": 1.25,
        "strategies": {"1": "fused", "2": "fused", "8": "dual", "16": "fused"},
    },
    {"shape": "1 to 2 + 3", "layers": 1, "source": "read", "seconds": 0.5, "strategies": {}},
]
OTHERS = {name: {"verdict": verdict, "reason": f"{name} is {verdict}"} for name, verdict in [("lora_linear", "landed")]}
GONE = 2**22 + 1  # larger than any process number of Linux


def put(folder: pathlib.Path, name: str = "1", **fields: Any) -> None:
    journal = {
        "schema": 1,
        "pid": os.getpid(),
        "started": time.time(),
        "role": "EngineCore_DP0",
        "overlay": "0.1.0",
        "vllm": "0.33.0",
        "fingerprint": "0123456789abcdef",
        "problems": [],
        "patches": {"gdn": GDN, **OTHERS},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**journal, **fields}))


def invoke(folder: pathlib.Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["status", "--journal-dir", str(folder), *arguments])


def test_json(journal_folder: pathlib.Path) -> None:
    put(journal_folder, patches={"gdn": {**GDN, "plans": PLANS}, **OTHERS})
    (journal_folder / "x.json").write_text("{")
    result = invoke(journal_folder, "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["schema"] == 1 and answer["ok"] is True
    assert answer["folder"] == str(journal_folder)
    (process,) = answer["processes"]
    assert (process["pid"], process["role"], process["alive"]) == (os.getpid(), "EngineCore_DP0", True)
    assert (process["vllm"], process["fingerprint"], process["problems"]) == ("0.33.0", "0123456789abcdef", [])
    assert process["patches"]["gdn"] == {
        **GDN,
        "layers": {"patched": ["layers.0", "layers.1"], "refused": GDN["layers"]["refused"]},
        "plans": SHOWN,
    }
    assert process["patches"]["lora_linear"]["plans"] == []
    assert [one["file"] for one in answer["skipped"]] == ["x.json"]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_table_for_people(journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    patches = {"gdn": {**GDN, "plans": PLANS}, **OTHERS, "deepseek_v4": {"verdict": "ineffective"}}
    put(journal_folder, patches=patches)
    put(journal_folder, "2", role="VllmWorker-1", patches=patches)
    result = invoke(journal_folder)
    table = result.stdout[: result.stdout.index("layers stay stock")]
    for text in ("EngineCore_DP0", "VllmWorker-1", "vLLM 0.33.0", "0123456789abcdef", "2 of 4", "landed"):
        assert text in table
    title, numbers = (next(line.split() for line in table.splitlines() if word in line) for word in ("dual", "1234"))
    shown = [numbers[title.index(name) - len(title)] for name in ("dual", "serial", "traced")]
    assert shown == ["1234", "56", "4"], "each under its own title"
    notes = " ".join(result.stdout.split())
    pids = f"{os.getpid()}, {os.getpid()}"
    assert f"{pids}: gdn: 2 layers stay stock: quantized" in notes, "what several processes say is said once"
    assert f"{pids}: gdn: 56 calls serial: not capturing a CUDA graph" in notes
    assert f"{pids}: lora_linear: landed: lora_linear is landed" in notes
    plan = "plan of 2 layers, 2048 to 12288 + 64, measured: 1 to 2 fused, 8 dual, 16 fused"
    assert f"{pids}: gdn: {plan}" in notes
    assert f"{pids}: gdn: plan of 1 layers, 1 to 2 + 3, read: no size" in notes


@pytest.mark.parametrize("verdict", ["drifted", "ineffective", "refused"])
def test_a_patch_that_is_not_well_is_status_1(journal_folder: pathlib.Path, verdict: str) -> None:
    put(journal_folder, patches={"gdn": {"verdict": verdict, "reason": "because"}})
    result = invoke(journal_folder)
    assert result.exit_code == 1 and f"gdn: {verdict}: because" in result.stdout


@pytest.mark.parametrize("verdict", ["apply", "landed", "absent", "inert", "off", "not seen", "of the future"])
def test_every_other_verdict_is_status_0(journal_folder: pathlib.Path, verdict: str) -> None:
    put(journal_folder, patches={"gdn": {"verdict": verdict, "reason": "because"}})
    result = invoke(journal_folder)
    assert result.exit_code == 0 and verdict in result.stdout


OFF: dict[str, Any] = {"verdict": "off", "reason": "switched off"}
UNSEEN: dict[str, Any] = {"verdict": "not seen"}
TRACED: dict[str, Any] = {**GDN, "calls": {"fake": 4}}


@pytest.mark.parametrize(
    ("processes", "required", "said"),
    [
        ([{"gdn": GDN}], "gdn", None),
        ([{"gdn": UNSEEN}, {"gdn": GDN}, {"gdn": TRACED}], " gdn ,gdn", None),
        ([{"gdn": GDN, "pooling": GDN}], "pooling,gdn", None),
        ([{"gdn": GDN}, {"pooling": GDN}], "pooling,gdn", None),
        ([], "gdn", "gdn: no process with the overlay runs here"),
        (
            [],
            "gdn,pooling",
            "gdn: no process with the overlay runs here; pooling: no process with the overlay runs here",
        ),
        ([{"gdn": GDN, "pooling": OFF}], "gdn,pooling", "pooling: off"),
        ([{"gdn": UNSEEN}, {"gdn": TRACED}], "gdn", "gdn: apply, and its op has not run"),
        ([{"gdn": UNSEEN}], "gdn", "gdn: not seen"),
        ([{"gdn": {**GDN, "verdict": "landed"}}, {"gdn": OFF}], "gdn", "gdn: landed, off"),
    ],
)
def test_a_required_patch_has_to_be_in_effect_in_some_process(
    journal_folder: pathlib.Path, processes: list[dict[str, Any]], required: str, said: str | None
) -> None:
    put(journal_folder, "gone", pid=GONE, patches={"gdn": GDN, "pooling": GDN})
    for number, patches in enumerate(processes):
        put(journal_folder, str(number), patches=patches)
    result = invoke(journal_folder, "--require", required)
    lines = [line for line in result.stdout.splitlines() if "REQUIRED" in line]
    assert lines == ([f"REQUIRED, and in effect in no process: {said}"] if said else [])
    assert result.exit_code == bool(said) and invoke(journal_folder).exit_code == 0
    for arguments in ((), ("--all",)):
        answer = json.loads(invoke(journal_folder, "--require", required, "--json", *arguments).stdout)
        assert (answer["ok"], "; ".join(answer["missing"])) == (not said, said or "")


@pytest.mark.parametrize(
    ("state", "loop", "said"),
    [
        ("apply", "EngineCoreProc.run_busy_loop", []),
        ("apply", None, ["frame_stack: apply, and no loop has begun"]),
        ("off", "EngineCoreProc.run_busy_loop", ["frame_stack: off"]),
    ],
)
def test_a_patch_that_is_about_loops_is_in_effect_in_a_process_that_is_in_one(
    state: str, loop: str | None, said: list[str], journal_folder: pathlib.Path
) -> None:
    put(journal_folder, loop=loop, patches={"gdn": UNSEEN, "frame_stack": {"verdict": state}})
    answer = json.loads(invoke(journal_folder, "--require", "frame_stack", "--json").stdout)
    assert answer["missing"] == said
    assert invoke(journal_folder, "--require", "gdn").exit_code == 1


@pytest.mark.parametrize("required", ["", ",", "gnd", "gdn,all"])
def test_a_patch_that_is_none_cannot_be_required(journal_folder: pathlib.Path, required: str) -> None:
    put(journal_folder)
    result = invoke(journal_folder, "--require", required)
    assert result.exit_code == 2 and f"--require={required!r}: allowed are gdn, " in result.stderr


def test_without_a_folder_for_temporary_files_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", gettempdir)
    for environment in ({}, {"VLLMOVERLAY": "0"}):
        monkeypatch.setenv("VLLMOVERLAY", environment.get("VLLMOVERLAY", ""))
        result = CliRunner().invoke(app, ["status"])
        assert result.exit_code == 2 and "VLLMOVERLAY_JOURNAL_DIR=''" in result.stderr
        assert "no folder for temporary files" in result.stderr and "Traceback" not in result.stderr


def test_a_problem_is_status_1(journal_folder: pathlib.Path) -> None:
    put(journal_folder, problems=["transformers cannot be imported"])
    result = invoke(journal_folder)
    assert result.exit_code == 1 and "PROBLEM: transformers cannot be imported" in result.stdout
    assert json.loads(invoke(journal_folder, "--json").stdout)["ok"] is False


def test_the_dead_are_shown_on_request_and_do_not_count(journal_folder: pathlib.Path) -> None:
    put(journal_folder, pid=GONE, problems=["it was bad"])
    alone = invoke(journal_folder)
    assert alone.exit_code == 0 and "no process with the overlay runs here" in alone.stdout
    everyone = invoke(journal_folder, "--all")
    assert everyone.exit_code == 0 and "gone" in everyone.stdout and "it was bad" in everyone.stdout
    (process,) = json.loads(invoke(journal_folder, "--all", "--json").stdout)["processes"]
    assert process["alive"] is False


def test_a_process_that_was_killed(journal_folder: pathlib.Path) -> None:
    script = (
        "import sys; from overlay.report.journal import journal; journal.open(sys.argv[1]); journal.patch('gdn').calls.fake = 3; "
        "journal.write(); print('ready', flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(journal_folder)],
        env=overlay_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        assert [p["pid"] for p in json.loads(invoke(journal_folder, "--json").stdout)["processes"]] == [child.pid]
    finally:
        child.kill()
        child.communicate()
    assert json.loads(invoke(journal_folder, "--json").stdout)["processes"] == []
    (process,) = json.loads(invoke(journal_folder, "--json", "--all").stdout)["processes"]
    assert (process["pid"], process["alive"], process["patches"]["gdn"]["calls"]["fake"]) == (child.pid, False, 3)


def test_foreign_text_cannot_move_the_cursor_or_end_the_command(journal_folder: pathlib.Path) -> None:
    put(journal_folder, role="\x1b[2J[red]worker\ud800", problems=["line\nbreak [/]"])
    result = invoke(journal_folder)
    assert result.exit_code == 1
    assert "\x1b" not in result.stdout and "[red]worker" in result.stdout and "\\n" in result.stdout


def test_a_journal_without_patches(journal_folder: pathlib.Path) -> None:
    put(journal_folder, patches={}, vllm=None, fingerprint=None)
    result = invoke(journal_folder)
    assert result.exit_code == 0 and "vLLM not imported" in result.stdout


def test_a_folder_that_was_named_has_to_be_there(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        result = invoke(tmp_path / name)
        assert result.exit_code == 2 and str(tmp_path / name) in result.stderr and result.stdout == ""


def test_the_folder_comes_from_the_settings(journal_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLMOVERLAY_JOURNAL_DIR", str(journal_folder))
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 0 and str(journal_folder) in result.stdout
    monkeypatch.setenv("VLLMOVERLAY_JOURNAL_DIR", "relative")
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 2 and "VLLMOVERLAY_JOURNAL_DIR='relative'" in result.stderr


def test_watch_and_json_exclude_each_other(journal_folder: pathlib.Path) -> None:
    journal_folder.mkdir()
    assert invoke(journal_folder, "--watch", "--json").exit_code == 2


def test_watch_follows_until_it_is_interrupted(journal_folder: pathlib.Path) -> None:
    put(journal_folder)
    watching = subprocess.Popen(
        [sys.executable, "-m", "overlay", "status", "--watch", "--journal-dir", str(journal_folder)],
        env={**overlay_environment(), "TERM": "xterm", "FORCE_COLOR": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert watching.stdout is not None
        shown = ""
        while "1234" not in shown:
            shown += watching.stdout.readline()
        put(journal_folder, problems=["something new"])
        while "something new" not in shown:
            shown += watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=20) == 1, "the status of the last look"
    finally:
        watching.kill()
        watching.communicate()
