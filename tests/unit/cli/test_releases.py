"""overlay.cli.releases against a package index of its own: a real HTTP server on this machine and real wheels."""

from __future__ import annotations

import base64
import http.server
import io
import pathlib
import subprocess
import sys
import threading
import traceback
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

releases = pytest.importorskip("overlay.cli.releases", reason="the command line's libraries are not installed")

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
BINARY = bytes(range(256)) * 8192  # 2 MB between the Python files, as compiled libraries lie between them in a wheel
SOURCES = {
    "vllm/__init__.py": "first = 1\n",
    "vllm/layers/gdn.py": "second = 2\n",
    "vllm/layers/empty.py": "",
    "vllm/worker.py": "# a word outside ASCII: naïve\n",
}


def wheel() -> bytes:
    """Python files in two stretches with a large binary between them, and files that are not wanted."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("vllm/__init__.py", "vllm/layers/gdn.py"):
            archive.writestr(name, SOURCES[name])
        archive.writestr("vllm/layers/config.json", "{}")
        archive.writestr("vllm/layers/empty.py", SOURCES["vllm/layers/empty.py"])
        archive.writestr(zipfile.ZipInfo("vllm/_C.abi3.so"), BINARY, zipfile.ZIP_STORED)
        archive.writestr("vllm/worker.py", SOURCES["vllm/worker.py"])
        archive.writestr("elsewhere/setup.py", "not = 'of vllm'\n")
        archive.writestr(zipfile.ZipInfo("vllm/_D.abi3.so"), BINARY, zipfile.ZIP_STORED)
    return buffer.getvalue()


class Index:
    """A package index with the wheels it was given; it remembers what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.ranges: list[str] = []
        self.yanked: set[str] = set()
        #: What is answered in the place of the page, or of a wheel: a status, a body, an address to go to.
        self.page: tuple[int, bytes, str | None] | None = None
        self.wheel: tuple[int, bytes, str | None] | None = None
        self.authorizations: list[str | None] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.authorizations.append(self.headers.get("Authorization"))
                instead = index.page if self.path == "/simple/vllm/" else index.wheel
                if instead is not None:
                    status, body, place = instead
                    self._answer(status, body, {"Location": place} if place else {"Content-Type": "text/html"})
                    return
                if self.path == "/simple/vllm/":
                    links = "".join(
                        f'<a href="/files/{name}"{" data-yanked" if name in index.yanked else ""}>{name}</a>\n'
                        for name in index.files
                    )
                    self._answer(200, links.encode(), {"Content-Type": "text/html"})
                    return
                content = index.files.get(self.path.rpartition("/")[2])
                asked = self.headers.get("Range")
                if content is None or asked is None:  # the whole of a wheel is 300 MB: nobody may ask for it
                    self._answer(404, b"", {})
                    return
                index.ranges.append(asked)
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = max(0, len(content) - int(last)) if not first else int(first)
                stop = len(content) if not first or not last else min(int(last) + 1, len(content))
                header = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
                self._answer(206, content[start:stop], header)

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple/"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    content = wheel()
    names = [f"vllm-{version}-cp38-abi3-manylinux1_x86_64.whl" for version in ("0.9.2", "0.17.1", "0.30.0", "0.4.0")]
    names += [
        "vllm-0.19.0-cp38-abi3-manylinux_2_31_x86_64.whl",
        "vllm-0.20.0-cp38-abi3-manylinux_2_28_aarch64.whl",
        "vllm-0.19.0.tar.gz",
    ]
    index = Index(dict.fromkeys(names, content))
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(releases, "DIRECTORY_BYTES", 4096)
    yield index
    index.close()


def test_brings_the_python_files_and_nothing_else(index: Index, tmp_path: pathlib.Path) -> None:
    folder = releases.sources("0.19.0", root=tmp_path)
    found = {
        path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()
    }
    assert found == SOURCES


def test_reads_neighbours_together_and_leaves_the_binaries(index: Index, tmp_path: pathlib.Path) -> None:
    releases.sources("0.19.0", root=tmp_path)
    assert len(index.ranges) == 3, "the directory, the stretch before the binary, the stretch after it"
    spans = [span.removeprefix("bytes=").split("-") for span in index.ranges[1:]]
    assert sum(int(last) - int(first) for first, last in spans) < len(BINARY) / 10


def test_reports_progress_up_to_everything(index: Index, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    releases.sources("0.19.0", root=tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_asks_nothing_once_the_files_are_there(index: Index, tmp_path: pathlib.Path) -> None:
    first = releases.sources("0.19.0", root=tmp_path)
    index.close()
    assert releases.sources("0.19.0", root=tmp_path) == first
    assert releases.sources("v0.19", root=tmp_path) == first, "another way to write the same number"


@pytest.mark.parametrize("place", [0, 2], ids=["no compressed data", "other compressed data"])
def test_damage_is_noticed_and_leaves_nothing_behind(index: Index, tmp_path: pathlib.Path, place: int) -> None:
    name = "vllm-0.19.0-cp38-abi3-manylinux_2_31_x86_64.whl"
    content = bytearray(index.files[name])
    content[content.index(b"vllm/layers/gdn.py") + len("vllm/layers/gdn.py") + place] ^= 0xFF
    index.files[name] = bytes(content)
    with pytest.raises(releases.ReleaseError, match="damaged"):
        releases.sources("0.19.0", root=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_files_of_a_killed_process_are_replaced(index: Index, tmp_path: pathlib.Path) -> None:
    left = tmp_path / ".0.19.0.partial" / "vllm" / "half.py"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    folder = releases.sources("0.19.0", root=tmp_path)
    assert not (folder / "vllm" / "half.py").exists()


@pytest.mark.parametrize("version", ["0.20.0", "0.21.5"], ids=["only another machine's wheel", "never released"])
def test_an_unknown_version_names_its_neighbours(index: Index, tmp_path: pathlib.Path, version: str) -> None:
    with pytest.raises(releases.ReleaseError, match=rf"vLLM {version} .*0\.17\.1, 0\.19\.0, 0\.30\.0$"):
        releases.sources(version, root=tmp_path)


def test_a_version_that_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(releases.ReleaseError, match="'main' is not a version number"):
        releases.sources("main", root=tmp_path)


def test_a_version_cannot_lead_out_of_the_cache(tmp_path: pathlib.Path) -> None:
    with pytest.raises(releases.ReleaseError, match="not a version number"):
        releases.sources("../0.19.0", root=tmp_path / "cache")


def test_without_a_network_the_folder_is_named(index: Index, tmp_path: pathlib.Path) -> None:
    index.close()
    with pytest.raises(releases.UnreachableError, match="no usable answer") as caught:
        releases.sources("0.19.0", root=tmp_path)
    assert str(tmp_path / "0.19.0") in str(caught.value)


def test_available_lists_the_registry_from_the_first_release_on(index: Index, tmp_path: pathlib.Path) -> None:
    assert releases.available(tmp_path) == ["0.17.1", "0.19.0", "0.30.0"]


def test_without_a_release_there_is_no_latest(index: Index) -> None:
    index.files.clear()
    with pytest.raises(releases.ReleaseError, match="no release of vLLM"):
        releases.latest()


def test_processes_at_the_same_time_fetch_once(index: Index, tmp_path: pathlib.Path) -> None:
    script = (
        "import pathlib, sys; from overlay.cli import releases; "
        "print(len(list(releases.sources('0.19.0', root=pathlib.Path(sys.argv[1])).rglob('*.py'))))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [output for output, _ in outputs] == [f"{len(SOURCES)}\n"] * 3, outputs
    assert len([asked for asked in index.ranges if asked.startswith("bytes=-")]) == 1, "one of them read the archive"


def test_what_was_taken_back_or_came_before_a_release_is_there_by_its_number(
    index: Index, tmp_path: pathlib.Path
) -> None:
    content = next(iter(index.files.values()))
    for version in ("0.31.0", "0.32.0rc1"):
        index.files[f"vllm-{version}-cp38-abi3-manylinux1_x86_64.whl"] = content
    index.yanked.add("vllm-0.31.0-cp38-abi3-manylinux1_x86_64.whl")
    assert releases.available(tmp_path)[-1] == releases.latest() == "0.30.0"
    assert releases.sources("0.31.0", root=tmp_path).name == "0.31.0"
    assert releases.sources("0.32.0.RC1", root=tmp_path).name == "0.32.0rc1"


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ("0.33.0", "0.33.0"),
        ("v0.33", "0.33.0"),
        ("1", "1.0.0"),
        ("0.33rc1", "0.33.0rc1"),
        ("0.9.2.post1", "0.9.2.post1"),
    ],
)
def test_a_version_has_one_name(given: str, number: str) -> None:
    assert releases.number(given) == number


def test_a_cache_that_cannot_be_used_is_named_with_the_way_out(index: Index, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(releases.ReleaseError, match="--cache") as caught:
        releases.sources("0.19.0", root=tmp_path / "file" / "cache")
    assert str(tmp_path / "file" / "cache") in str(caught.value)


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert releases.user_cache() == tmp_path / ".cache" / "vllm-overlay" / "releases"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert releases.user_cache() == tmp_path / "other" / "vllm-overlay" / "releases"


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(releases.ReleaseError, match="--cache"):
        releases.user_cache()


def test_progress_goes_to_stderr(index: Index, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        folders = releases.fetch(["0.17.1", "0.19.0"], tmp_path)
    shown = capsys.readouterr()
    assert [folder.name for folder in folders] == ["0.17.1", "0.19.0"]
    assert shown.out == ""
    assert [line.split(",")[0] for line in shown.err.splitlines()] == ["fetching vLLM 0.17.1", "fetching vLLM 0.19.0"]


# ---------------------------------------------------------------- names and passwords


#: What stands before the host of an index, and what the index is to be told.
SECRETS = {
    "somebody:s3cret": "somebody:s3cret",
    "some%20body:s3cret%2F%40%3A": "some body:s3cret/@:",
    "s3cret": "s3cret:",
    ":s3cret": ":s3cret",
    "somebody:s3cret@s3cret": "somebody:s3cret@s3cret",
}


def with_secret(url: str, secret: str) -> str:
    return url.replace("://", f"://{secret}@", 1)


@pytest.mark.parametrize(("secret", "told"), SECRETS.items())
def test_an_index_is_told_who_asks_and_no_other_host_is(
    index: Index, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, secret: str, told: str
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", with_secret(index.url, secret))
    releases.sources("0.19.0", root=tmp_path)
    expected = "Basic " + base64.b64encode(told.encode()).decode()
    assert len(index.authorizations) > 3 and set(index.authorizations) == {expected}
    index.authorizations.clear()
    monkeypatch.setenv("PIP_INDEX_URL", with_secret(index.url.replace("127.0.0.1", "localhost"), secret))
    index.page = (302, b"", f"{index.url}elsewhere/")
    with pytest.raises(releases.ReleaseError):
        releases.sources("0.17.1", root=tmp_path)
    assert index.authorizations == [expected, None]


WHEEL = "vllm-0.19.0-cp38-abi3-manylinux_2_31_x86_64.whl"
FAILURES: dict[str, dict[str, Any]] = {
    **{f"the page: {status}": {"page": (status, b"", None)} for status in (401, 403, 404, 500)},
    **{f"the wheel: {status}": {"wheel": (status, b"", None)} for status in (200, 403, 416, 503)},
    "no page": {"page": (200, b"\xff\x00 {", None)},
    "a page of another type": {"page": (200, b"{", "text/plain")},
    "a circle": {"page": (302, b"", "/simple/vllm/")},
    "to nowhere": {"page": (302, b"", "http://127.0.0.1:9/")},
    "to no address": {"page": (302, b"", "http://[/")},
    "damaged": {"files": {WHEEL: b"no archive" * 1000}},
    "nobody listens": {"url": "http://127.0.0.1:9/simple/"},
    "no TLS": {"scheme": "https"},
}


@pytest.mark.parametrize("how", FAILURES)
def test_no_failure_shows_a_password(
    index: Index,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    """Neither the message, nor an exception behind it, nor what a library says itself."""
    changes = dict(FAILURES[how])
    url = changes.pop("url", index.url.replace("http", changes.pop("scheme", "http"), 1))
    for name, value in changes.items():
        setattr(index, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for secret in SECRETS:
        monkeypatch.setenv("PIP_INDEX_URL", with_secret(url, secret))
        with pytest.raises(releases.ReleaseError) as caught:
            releases.sources("0.19.0", root=tmp_path)
        shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb)) + "".join(capfd.readouterr())
        assert "s3cret" not in shown.replace(repr(secret), ""), shown


@pytest.mark.parametrize(
    "address",
    [
        "http://somebody:s3/cret@host/simple",
        "http://somebody:s3cret@[::1/simple",
        "http://somebody:s3cret@h\u2100/simple",
        "ftp://somebody:s3cret@host/simple",
        "somebody:s3cret@host/simple",
        "http://somebody:s3cret@/simple",
        "http://somebody:s3cret@host:port/simple",
    ],
)
def test_an_address_that_is_none_is_not_shown(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    with pytest.raises(releases.UnreachableError, match="PIP_INDEX_URL is no address") as caught:
        releases.available(tmp_path)
    assert "cret" not in "".join(traceback.format_exception_only(caught.type, caught.value))
    assert caught.value.__suppress_context__
