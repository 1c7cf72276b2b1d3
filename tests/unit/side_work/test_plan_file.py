"""Plans on disk: what was written is read again, and nothing else is ever taken for one."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import stat
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlay.side_work import plan_file
from overlay.side_work.measure import Row
from overlay.side_work.plan_file import LARGEST_BYTES, Unusable, load, path_of, store
from overlay.vocabulary import SERIAL, STRATEGIES

KEY = {"gpu": "NVIDIA H200", "sizes": [1, 8], "shape": {"hidden": 2048}}
ROWS = [Row(1, {"serial": 10.0, "dual": 8.5}, "dual"), Row(8, {}, "serial")]

names = st.sampled_from(STRATEGIES)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    made = []
    for tokens in sorted(draw(st.sets(st.integers(1, 1 << 24), max_size=8))):
        times = draw(st.dictionaries(names, st.floats(0, 1e9, exclude_max=True), max_size=4))
        strategy = draw(names)
        if times:
            times = {SERIAL: 1.0, strategy: 2.0} | times
        made.append(Row(tokens, times, strategy))
    return made


json_keys = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers()), max_size=4
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "cache" / "auxstream_overlay")


@settings(max_examples=60)
@given(rows(), json_keys)
def test_what_was_written_is_read_again(written: list[Row], key: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "plans")
        assert load(folder, key) is None, "no folder yet"
        store(folder, key, written)
        assert load(folder, key) == written
        assert load(folder, {**key, "another": 1}) is None
        assert os.listdir(folder) == [os.path.basename(path_of(folder, key))]


def test_a_file_is_this_users_alone_and_nothing_is_left_beside_it(folder: str) -> None:
    os.makedirs(os.path.dirname(folder))
    umask = os.umask(0)
    try:
        store(folder, KEY, ROWS)
        store(folder, KEY, ROWS[:1])
    finally:
        os.umask(umask)
    (name,) = os.listdir(folder)
    assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert load(folder, KEY) == ROWS[:1]


def test_a_write_that_fails_leaves_the_old_plan(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store(folder, KEY, ROWS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            store(folder, KEY, [])
    assert len(os.listdir(folder)) == 1 and load(folder, KEY) == ROWS


@pytest.mark.parametrize("mode", [0o700, 0o770, 0o2775, 0o1777])
def test_who_can_write_the_folder_is_not_asked(folder: str, mode: int) -> None:
    """A plan changes no result. Folders of a Kubernetes volume with an fsGroup are writable by a group."""
    os.makedirs(folder)
    os.chmod(folder, mode)
    store(folder, KEY, ROWS)
    assert load(folder, KEY) == ROWS and stat.S_IMODE(os.stat(folder).st_mode) == mode


def good(**changes: Any) -> dict[str, Any]:
    rows = [{"tokens": row.tokens, "microseconds": row.microseconds, "strategy": row.strategy} for row in ROWS]
    return {"schema": plan_file.SCHEMA, "key": KEY, "rows": rows, **changes}


def put(folder: str, content: bytes | dict[str, Any]) -> str:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = path_of(folder, KEY)
    pathlib.Path(path).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def with_row(**changes: Any) -> dict[str, Any]:
    return good(rows=[{"tokens": 1, "microseconds": {}, "strategy": "dual", **changes}])


def test_the_file_that_the_next_cases_spoil_is_good(folder: str) -> None:
    put(folder, good())
    assert load(folder, KEY) == ROWS
    put(folder, with_row())
    assert load(folder, KEY) == [Row(1, {}, "dual")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not a plan"),
        (good(schema=1), "schema 2"),
        (good(schema=None), "schema 2"),
        (good(key={}), "something else"),
        (good(key={**KEY, "gpu": "NVIDIA H100"}), "something else"),
        (good(rows=None), "its rows"),
        (good(rows={}), "its rows"),
        (good(rows=[with_row()["rows"][0]] * 2), "not in order"),
        (good(rows=list(reversed(good()["rows"]))), "not in order"),
        (good(rows=[good()["rows"][0], "row"]), "row 1 is not"),
        (with_row(tokens=0), "row 0"),
        (with_row(tokens=-1), "row 0"),
        (with_row(tokens=True), "row 0"),
        (with_row(tokens=1.0), "row 0"),
        (with_row(tokens=1 << 25), "row 0"),
        (with_row(strategy="triple"), "row 0"),
        (with_row(strategy="fused"), "row 0"),
        (with_row(strategy=["dual"]), "row 0"),
        (with_row(strategy=None), "row 0"),
        (with_row(microseconds=[]), "row 0"),
        (with_row(microseconds={"triple": 1.0}), "row 0"),
        (with_row(microseconds={"serial": "1", "dual": 1.0}), "row 0"),
        (with_row(microseconds={"serial": True, "dual": 1.0}), "row 0"),
        (with_row(microseconds={"serial": -1.0, "dual": 1.0}), "row 0"),
        (with_row(microseconds={"serial": float("nan"), "dual": 1.0}), "row 0"),
        (with_row(microseconds={"serial": float("inf"), "dual": 1.0}), "row 0"),
        (with_row(microseconds={"serial": 10**400, "dual": 1.0}), "row 0"),
        (with_row(microseconds={"dual": 1.0}), "row 0"),
        (with_row(microseconds={"serial": 1.0}), "row 0"),
        (good(rows=[0] * (plan_file.MOST_ROWS + 1)), "its rows"),
        (good(more="x" * LARGEST_BYTES), f"larger than {LARGEST_BYTES} bytes"),
    ],
)
def test_what_is_no_plan_is_left_alone_with_the_reason(folder: str, content: Any, reason: str) -> None:
    path = put(folder, content)
    before = pathlib.Path(path).read_bytes()
    with pytest.raises(Unusable, match=reason) as caught:
        load(folder, KEY)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    assert pathlib.Path(path).read_bytes() == before


def test_a_plan_under_another_ones_name_is_not_used(folder: str) -> None:
    """The name is a part of a hash: whatever it is, the key in the file has to be the one that is asked for."""
    store(folder, {**KEY, "driver": "1"}, ROWS)
    os.rename(path_of(folder, {**KEY, "driver": "1"}), path_of(folder, KEY))
    with pytest.raises(Unusable, match="something else"):
        load(folder, KEY)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "unreadable"])
def test_what_is_no_file_of_this_users_is_not_opened_for_long(folder: str, tmp_path: pathlib.Path, kind: str) -> None:
    path = put(folder, good())
    elsewhere = tmp_path / "elsewhere.json"
    os.rename(path, elsewhere)
    if kind == "link":
        os.symlink(elsewhere, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        os.rename(elsewhere, path)
        os.chmod(path, 0)
    before = descriptors()
    with pytest.raises(Unusable, match=path):
        load(folder, KEY)
    assert descriptors() == before


def test_a_file_of_another_user_is_a_plan_like_any_other(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, good())
    real = os.fstat

    def another(descriptor: int) -> Any:
        values = list(real(descriptor))
        values[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", another)
    assert load(folder, KEY) == ROWS


def test_a_disk_that_fails_is_a_reason(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, good())

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:  # pytest itself asks for files, too
        patch.setattr(os, "fstat", broken)
        with pytest.raises(Unusable, match="Input/output error"):
            load(folder, KEY)


GOOD = json.dumps(good()).encode()
#: A good file of which a piece has been replaced, or cut off.
DAMAGED = st.tuples(
    st.integers(0, len(GOOD)),
    st.integers(0, 40),
    st.binary(max_size=12) | st.sampled_from([b"9" * 5000, b"9" * 400, b"[" * 3000, b"NaN", b"-1", b"1e999", b"null", b'"\\ud800"']),
).map(lambda cut: GOOD[: cut[0]] + cut[2] + GOOD[cut[0] + cut[1] :])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names | st.sampled_from(["tokens", "microseconds", "strategy"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("plans"))


@settings(max_examples=400)
@given(st.binary(max_size=60) | DAMAGED | VALUES.map(lambda rows: json.dumps(good(rows=rows)).encode()))
def test_whatever_is_in_a_file_it_is_a_plan_or_unusable(shared: str, content: bytes) -> None:
    os.chmod(shared, 0o700)
    put(shared, content)
    with contextlib.suppress(Unusable):
        read = load(shared, KEY)
        assert read is not None
        assert [row.tokens for row in read] == sorted({row.tokens for row in read})
        for row in read:
            assert row.strategy in STRATEGIES
            assert all(name in STRATEGIES and 0 <= value < 1e12 for name, value in row.microseconds.items())
            assert not row.microseconds or {SERIAL, row.strategy} <= set(row.microseconds)
