"""Measured plans on disk, so that the next start does not measure again.

There is one JSON file per key. The key is everything that the times depend on (GPU, driver, torch, vLLM, shapes, sizes).
The file holds the whole key, which is compared, so a file of another machine is not used. A plan can change no result, only
when work is forked. So nobody checks who could write to the folder (volumes in Kubernetes are often writable by a group).
The file is bounded and checked field by field. If anything is wrong, it is not used, with a reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from overlay import files
from overlay.side_work.measure import Row
from overlay.vocabulary import SERIAL, STRATEGIES

SCHEMA = 2
LARGEST_BYTES = 256 << 10
MOST_ROWS = 4096


class Unusable(Exception):
    """Why a file is not used. The message names it."""


def path_of(folder: str, key: Mapping[str, Any]) -> str:
    """The path of a key's plan."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return os.path.join(folder, f"plan-{digest[:24]}.json")


def load(folder: str, key: Mapping[str, Any]) -> list[Row] | None:
    """The rows of a key, or None if there is no file. Raises Unusable."""
    path = path_of(folder, key)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a regular file")
            return _checked(file.read(LARGEST_BYTES + 1), key)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise Unusable(f"{path}: {error}") from error


def _checked(raw: bytes, key: Mapping[str, Any]) -> list[Row]:
    """The rows in a file's content. Raises ValueError with the reason if it is no plan of this key."""
    if len(raw) > LARGEST_BYTES:
        raise ValueError(f"larger than {LARGEST_BYTES} bytes")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"not a plan of schema {SCHEMA}")
    if content.get("key") != json.loads(json.dumps(key)):
        raise ValueError("measured for something else")
    found = content.get("rows")
    if not isinstance(found, list) or len(found) > MOST_ROWS:
        raise ValueError("its rows are not as they should be")
    rows = []
    for number, one in enumerate(found):
        row = _row(one)
        if row is None:
            raise ValueError(f"row {number} is not as it should be")
        rows.append(row)
    if [row.tokens for row in rows] != sorted({row.tokens for row in rows}):
        raise ValueError("its rows are not in order")
    return rows


def _row(raw: Any) -> Row | None:
    if not isinstance(raw, dict):
        return None
    tokens, times, strategy = raw.get("tokens"), raw.get("microseconds"), raw.get("strategy")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 0 < tokens <= 1 << 24:
        return None
    if strategy not in STRATEGIES or not isinstance(times, dict):
        return None
    if not all(name in STRATEGIES and _is_time(value) for name, value in times.items()):
        return None
    if times and not {SERIAL, strategy} <= set(times):
        return None
    return Row(tokens, {name: float(value) for name, value in times.items()}, strategy)


def _is_time(value: Any) -> bool:
    """Whether a value is a number of microseconds that a GEMM can take."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def store(folder: str, key: Mapping[str, Any], rows: list[Row]) -> None:
    """Write the plan of a key, readable by this user only. Raises OSError."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    content = {
        "schema": SCHEMA,
        "key": dict(key),
        "rows": [{"tokens": row.tokens, "microseconds": row.microseconds, "strategy": row.strategy} for row in rows],
    }
    files.replace(path_of(folder, key), json.dumps(content), ".plan-")
