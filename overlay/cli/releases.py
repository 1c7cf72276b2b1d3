"""The Python files of released vLLM wheels, under `<cache>/<version>/vllm/...`.

Verdicts are read from upstream's own code and this project stores none of it, so the code comes from the registry. A wheel
has 250 to 500 MB. Its Python files are 6 to 12 MB of that, and lie almost side by side in the archive. So the directory at
the archive's end is read first, and then the stretches that hold Python files: a few ranged requests for a release.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fcntl
import functools
import io
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pypi_simple
import remotezip
import requests
import requests.adapters
import requests.auth
import rich.console
import rich.progress
import urllib3
from packaging.version import InvalidVersion, Version

from overlay.cli.failure import CommandError

FIRST = Version("0.17.1")  # the oldest release that anything is said of

DIRECTORY_BYTES = 2**20  # the archive's directory is about 0.6 MB; one request for all of it
LARGEST_GAP = 2**18  # reading this much for nothing costs less than one more request
TIMEOUT_SECONDS = 60.0
CONNECTIONS = 4

OnProgress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes to read, from any thread."""


class ReleaseError(CommandError):
    """A release cannot be had; the message says which, why, and what to do."""


class UnreachableError(ReleaseError):
    """The package index does not answer."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of the archive: bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def user_cache() -> pathlib.Path:
    """Where this user keeps fetched releases; raises ReleaseError where there is no such place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative one is not valid and counts as not set
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise ReleaseError("this user has no home folder to keep fetched releases in; name one with --cache")
    return pathlib.Path(base, "vllm-overlay", "releases")


def number(version: str) -> str:
    """A version as the registry and the cache folder write it: ``v0.33`` gives ``0.33.0``."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise ReleaseError(f"{version!r} is not a version number, such as '0.33.0'") from None
    base = parsed.base_version
    return str(parsed).replace(base, base + ".0" * (3 - len(parsed.release)), 1)


def sources(version: str, root: pathlib.Path, *, on_progress: OnProgress | None = None) -> pathlib.Path:
    """The folder that holds `vllm/**/*.py` of this release, fetched on first use.

    The folder appears in one step, complete and checked, or not at all; processes that want the same release wait for
    the one that fetches it. Once it is there, nothing asks the network.
    """
    version = number(version)
    folder = root / version
    try:
        if folder.is_dir():
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{version}.lock"):
            if not folder.is_dir():
                _fetch(version, folder, on_progress)
    except OSError as error:
        raise ReleaseError(
            f"vLLM {version} cannot be kept in {root} ({error}); name another folder with --cache"
        ) from error
    return folder


def _fetch(version: str, folder: pathlib.Path, on_progress: OnProgress | None) -> None:
    partial = folder.parent / f".{version}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed; the lock says nobody uses it
    try:
        index = _index()
        remedy = f"copy {folder} from a machine that has it"
        with _network(f"fetch the Python files of vLLM {version}", remedy), _session(index) as session:
            _extract(_wheel(_wheels(session, index), version), partial, session, on_progress)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def available(root: pathlib.Path) -> list[str]:
    """Every release on the registry from 0.17.1 on that has an x86_64 manylinux wheel, oldest first.

    Without those that were taken back and those before a release; `sources` has them by their number. `root` is named in
    the message where the registry does not answer.
    """
    return _available("list the released versions of vLLM", f"copy {root} from a machine that has it")


def latest() -> str:
    """The newest of these. What is in a cache cannot tell, so this always asks the registry."""
    found = _available("tell which release of vLLM is the latest", "name a release by its number, such as 0.33.0")
    if not found:
        raise ReleaseError("the package index has no release of vLLM with an x86_64 manylinux wheel")
    return found[-1]


def _available(purpose: str, remedy: str) -> list[str]:
    index = _index()
    with _network(purpose, remedy), _session(index) as session:
        wheels = _wheels(session, index)
    released = sorted(version for version, wheel in wheels.items() if not (wheel.is_yanked or version.is_prerelease))
    return [str(version) for version in released if version >= FIRST]


def fetch(versions: Sequence[str], root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of several releases, with progress on stderr for those that are fetched."""
    console = rich.console.Console(stderr=True, highlight=False, markup=False)
    columns = (
        rich.progress.TextColumn("vLLM {task.description:<8}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    folders = []
    with rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for version in versions:
            tasks: list[rich.progress.TaskID] = []

            def report(done: int, total: int, version: str = version, tasks: Any = tasks) -> None:
                if not tasks:
                    tasks.append(progress.add_task(version))
                    if not console.is_terminal:
                        console.print(f"fetching vLLM {version}, {total / 2**20:.0f} MiB", soft_wrap=True)
                progress.update(tasks[0], completed=done, total=total)

            folders.append(sources(version, root, on_progress=report))
    return folders


# ---------------------------------------------------------------------------------------------------- the registry


class _AsSomebody(requests.adapters.HTTPAdapter):
    """Sends a user's name and password, which stay out of the addresses: every library puts those into its messages."""

    def __init__(self, user: str, password: str, **options: Any) -> None:
        super().__init__(**options)
        self._authorize = requests.auth.HTTPBasicAuth(user, password)

    def add_headers(self, request: requests.PreparedRequest, **_: Any) -> None:
        self._authorize(request)


@dataclasses.dataclass(frozen=True)
class Index:
    """The package index that pip would ask. `host` is how addresses on it begin."""

    url: str
    host: str
    user: str | None
    password: str | None


def _index() -> Index:
    """PIP_INDEX_URL, pip's configuration, else the library's default. Raises UnreachableError for what is no address."""
    in_environment = os.environ.get("PIP_INDEX_URL", "").strip()
    given = in_environment or _index_in_pip_configuration() or str(pypi_simple.PYPI_SIMPLE_ENDPOINT)
    try:
        parts = urllib.parse.urlsplit(given)
        _ = parts.port  # raises for what is none: most likely a password with a slash in it
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
    except ValueError:
        raise UnreachableError(
            f"{'PIP_INDEX_URL' if in_environment else 'the index-url in the configuration of pip'} is no address that "
            "can be asked: allowed is http(s)://host/path, with / ? # and @ in a name or password written as %2F %3F %23 %40"
        ) from None
    place = parts.netloc.rpartition("@")[2]
    name, secret = (part and urllib.parse.unquote(part) for part in (parts.username, parts.password))
    return Index(parts._replace(netloc=place).geturl(), f"{parts.scheme}://{place}/", name, secret)


def _session(index: Index) -> requests.Session:
    """A session that repeats what a busy server refuses, and trusts what pip trusts."""
    session = requests.Session()
    retry = urllib3.Retry(total=4, connect=2, backoff_factor=0.3, status_forcelist=(429, 500, 502, 503, 504))
    for scheme in ("https://", "http://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry, pool_maxsize=CONNECTIONS))
    if index.user is not None or index.password is not None:
        known = _AsSomebody(index.user or "", index.password or "", max_retries=retry, pool_maxsize=CONNECTIONS)
        session.mount(index.host, known)
    certificates = os.environ.get("PIP_CERT")
    if certificates and pathlib.Path(certificates).exists():
        session.verify = certificates
    return session


@functools.cache
def _index_in_pip_configuration() -> str:
    """Empty where pip has no index configured, or is not installed."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One file of the registry."""

    url: str
    is_yanked: bool


def _wheels(session: requests.Session, index: Index) -> dict[Version, Wheel]:
    """Version → its x86_64 manylinux wheel."""
    client = pypi_simple.PyPISimple(index.url, session=session)
    found: dict[Version, Wheel] = {}
    for package in client.get_project_page("vllm", timeout=TIMEOUT_SECONDS).packages:
        if package.package_type != "wheel" or package.version is None:
            continue
        platform = package.filename.removesuffix(".whl").rpartition("-")[2]
        if platform.startswith("manylinux") and platform.endswith("_x86_64"):
            with contextlib.suppress(InvalidVersion):
                found[Version(package.version)] = Wheel(package.url, bool(package.is_yanked))
    return found


def _wheel(wheels: dict[Version, Wheel], version: str) -> str:
    """The address for a version, or an error that names the versions next to it."""
    wanted = Version(version)
    if wanted in wheels:
        return wheels[wanted].url
    released = sorted(known for known, wheel in wheels.items() if not (wheel.is_yanked or known.is_prerelease))
    place = bisect.bisect(released, wanted)
    near = ", ".join(str(known) for known in released[max(0, place - 2) : place + 2])
    raise ReleaseError(f"vLLM {version} has no x86_64 manylinux wheel on the registry; near it are: {near or 'none'}")


# ------------------------------------------------------------------------------------------------------ the archive


class SpanFetcher(remotezip.RemoteFetcher):  # type: ignore[misc]
    """remotezip's fetcher, with the stretches it will be asked for read ahead in few requests."""

    def __init__(self, url: str, session: requests.Session | None = None, **options: Any) -> None:
        super().__init__(url, session, **options)
        self._spans: list[Span] = []
        self._contents: dict[Span, bytes] = {}

    def read_ahead(self, spans: Sequence[Span], on_progress: OnProgress | None = None) -> None:
        """Reads these stretches, a few at a time."""
        total, done = sum(span.size for span in spans), 0
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for job in as_completed([pool.submit(self._read, span) for span in spans]):
                done += job.result()
                if on_progress is not None:
                    on_progress(done, total)
        self._spans = sorted(spans, key=lambda span: span.start)

    def _read(self, span: Span) -> int:
        content = super().fetch((span.start, span.stop - 1)).read()
        if len(content) != span.size:
            raise remotezip.RemoteIOError(f"{len(content)} bytes came where {span.size} were asked for")
        self._contents[span] = content
        return span.size

    def fetch(self, data_range: tuple[int, int | None], stream: bool = False) -> Any:
        """What remotezip calls: from memory where it was read ahead, else from the server."""
        start, last = data_range
        place = bisect.bisect(self._spans, start, key=lambda span: span.start) - 1
        if last is not None and place >= 0 and last < self._spans[place].stop:
            span = self._spans[place]
            content = self._contents[span][start - span.start : last + 1 - span.start]
            return remotezip.PartialBuffer(io.BytesIO(content), start, len(content), False)
        return super().fetch(data_range, stream)


def _extract(url: str, folder: pathlib.Path, session: requests.Session, on_progress: OnProgress | None) -> None:
    """Writes the wheel's Python files below `folder`; zipfile checks each against the checksum in the directory."""
    fetchers: list[SpanFetcher] = []

    def fetcher(*arguments: Any, **options: Any) -> SpanFetcher:
        fetchers.append(SpanFetcher(*arguments, **options))
        return fetchers[-1]

    with remotezip.RemoteZip(url, DIRECTORY_BYTES, session, fetcher, timeout=TIMEOUT_SECONDS) as archive:
        members = archive.infolist()
        wanted = [member for member in members if _is_source(member.filename)]
        if not wanted:
            raise ReleaseError(f"the wheel {url.rpartition('/')[2]} holds no Python file of vLLM")
        fetchers[0].read_ahead(_spans(members, wanted, archive.start_dir), on_progress)
        for member in wanted:
            path = folder / member.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member))


def _is_source(name: str) -> bool:
    return name.startswith("vllm/") and name.endswith(".py") and ".." not in name.split("/")


def _spans(members: Sequence[zipfile.ZipInfo], wanted: Sequence[zipfile.ZipInfo], end: int) -> list[Span]:
    """The stretches that hold the wanted members, neighbours with a small gap joined.

    A member reaches to where the next one begins: its own header in the archive has fields of its own length, so the
    directory alone does not tell where its content stops.
    """
    starts = sorted(member.header_offset for member in members)
    stop_of = dict(itertools.pairwise([*starts, end]))
    spans: list[Span] = []
    for start in sorted(member.header_offset for member in wanted):
        if spans and start - spans[-1].stop <= LARGEST_GAP:
            spans[-1] = Span(spans[-1].start, stop_of[start])
        else:
            spans.append(Span(start, stop_of[start]))
    return spans


# ------------------------------------------------------------------------------------------------ locks and failures


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    """One process at a time; the system lets go of it when a process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _network(purpose: str, remedy: str) -> Iterator[None]:
    """Turns what a network or a broken archive throws into one sentence with the way out."""
    try:
        yield
    except pypi_simple.NoSuchProjectError as error:
        raise ReleaseError(f"cannot {purpose}: the configured package index does not have vllm") from error
    except (requests.RequestException, remotezip.RemoteZipError, urllib3.exceptions.HTTPError, ValueError) as error:
        # ValueError: sent on to what is no address
        raise UnreachableError(
            f"cannot {purpose}: the package index gave no usable answer ({type(error).__name__}: {error}). "
            f"Without a network, {remedy}."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ReleaseError(f"cannot {purpose}: what came is damaged ({error}); try again") from error
