"""How the command line ends when something is wrong: the message, without passwords, and a status that is not 1."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import overlay_environment
from tests.unit import stub_vllm

pytest.importorskip("typer", reason="the command line's libraries are not installed")

from typer.testing import CliRunner

from overlay.cli import check, failure
from overlay.cli.app import app

USERINFO = st.text(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:\"\\<>[]{}|^`@", min_size=1
) | st.just("s3%2Fcret%40")


@given(
    before=st.text(), secret=USERINFO, scheme=st.sampled_from(["http", "HTTPS", "git+ssh", "socks5h"]), after=st.text()
)
@example(before="url: ", secret="%2F", scheme="http", after="/simple")
def test_no_address_keeps_what_stands_before_its_host(before: str, secret: str, scheme: str, after: str) -> None:
    shown = failure.without_credentials(f"{before} {scheme}://{secret}@host.example/x {after}")
    assert f" {scheme}://***@host.example/x " in shown


@given(st.text().filter(lambda text: "@" not in text and "%40" not in text))
@example("https://host/path")
def test_other_text_stays(text: str) -> None:
    assert failure.without_credentials(text) == text


@pytest.mark.parametrize(
    "text", ["https://host/org/feed@view/simple", "https://host?mail=a@b", "someone@example.org", "https://host#a@b"]
)
def test_an_at_elsewhere_stays(text: str) -> None:
    assert failure.without_credentials(text) == text


def test_an_address_that_is_part_of_another_one() -> None:
    text = "http://proxy/?url=http%3A%2F%2Fsomebody%3As3cret%40host%2Fsimple"
    assert failure.without_credentials(text) == "http://proxy/?url=http%3A%2F%2F***@host%2Fsimple"


# ---------------------------------------------------------------- messages

ADDRESS = "http://somebody:s3cret@host/simple"


def raise_chained(*_: Any, **__: Any) -> int:
    try:
        raise KeyError(ADDRESS)
    except KeyError as error:
        raise RuntimeError(f"cannot ask {ADDRESS}") from error


def raising(error: BaseException) -> Callable[..., int]:
    def raise_it(*_: Any, **__: Any) -> int:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("run", "status", "shown"),
    [
        (raise_chained, 2, ("Traceback", "KeyError", "RuntimeError: cannot ask http://***@host/simple")),
        (raising(OSError(28, "No space left on device", ADDRESS)), 2, ("error: [Errno 28] No space left",)),
        (raising(failure.CommandError(ADDRESS)), 2, ("error: http://***@host/simple\n",)),
        (raising(ModuleNotFoundError("no rich", name="rich")), 2, ("error: this command needs rich",)),
        (raising(ModuleNotFoundError("no scipy", name="scipy.stats")), 2, ("scipy: pip install scipy",)),
        (raising(RecursionError()), 2, ("RecursionError",)),
        (raising(KeyboardInterrupt()), 130, ()),
    ],
    ids=["unforeseen", "the machine's", "foreseen", "a library", "a library of bench", "recursion", "Ctrl-C"],
)
def test_no_error_is_status_1_or_shows_a_password(
    run: Callable[..., int], status: int, shown: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "run", run)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == status and result.stdout == ""
    assert all(text in result.stderr for text in shown) and "s3cret" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", ADDRESS),
        ("check", "--vllm", f"{ADDRESS}/vllm.whl"),
        ("status", "--no-such-option", ADDRESS),
        (ADDRESS,),
    ],
)
def test_what_was_typed_is_shown_without_its_password(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2 and result.stderr and "s3cret" not in result.output


# ---------------------------------------------------------------- where it is written to


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A vLLM in a folder whose name not every terminal can show."""
    stub_vllm.write(tmp_path / "ü", transformers=None)
    return tmp_path / "ü"


def command(
    tree: pathlib.Path, *arguments: str, out: int | IO[bytes] = subprocess.PIPE, shell: str = "", **settings: str
) -> Any:
    """`check` of that tree; `shell` is what closes or fills streams."""
    words = [sys.executable, "-m", "overlay", "check", "--vllm", str(tree), *arguments]
    return subprocess.run(
        ["bash", "-c", f'"$@" {shell}', "bash", *words],
        env=overlay_environment(**settings),
        stdout=out,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )


def test_letters_that_cannot_be_encoded_are_escaped(tree: pathlib.Path) -> None:
    done = command(tree, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"") and b"\\xfc" in done.stdout and b"apply" in done.stdout


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-"])
def test_without_streams_the_exit_status_has_the_answer(tree: pathlib.Path, streams: str) -> None:
    assert (command(tree, shell=streams).returncode, command(tree, "--json", shell=streams).stderr) == (0, b"")
    (tree / "vllm" / stub_vllm.GDN_MODULE).write_text("")
    assert command(tree, shell=streams).returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk here")
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_full_disk_is_one_message(tree: pathlib.Path, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = command(tree, *arguments, out=full)
    assert done.returncode == 2 and done.stderr.decode().splitlines() == ["error: [Errno 28] No space left on device"]
    assert command(tree, *arguments, shell=">/dev/full 2>/dev/full").returncode == 2


def test_a_reader_that_has_gone_is_no_error(tree: pathlib.Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = command(tree, out=gone)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("columns", ["0", "00", "-1", "", "x", "\u00b2", "9" * 5000])
def test_a_width_that_is_none_is_not_taken(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from overlay.cli import output

    monkeypatch.setenv("COLUMNS", columns)
    assert output.console().width == output.PIPE_COLUMNS
    monkeypatch.setenv("COLUMNS", "079")
    assert output.console().width == 79
