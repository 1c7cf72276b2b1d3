"""What a run found: one JSON file, written after every step so that an interrupted run keeps what it has."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from overlay.cli.failure import without_credentials

#: The folder that holds the package `overlay`: what goes on PYTHONPATH.
REPOSITORY = Path(__file__).resolve().parents[3]
SCHEMA = 2
#: The arm that is stock, started a second time.
CONTROL = "control"
#: Arms that need not be like stock: vLLM's own switch for LoRA, and a later vLLM. Only scripts in benchmarks/ have them.
UPSTREAM, NEXT = "upstream", "next"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=REPOSITORY)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def overlay_identity() -> dict[str, Any]:
    """Version, commit (where git is there) and a digest of the overlay's source."""
    digest = hashlib.sha256()
    files = sorted((REPOSITORY / "overlay").rglob("*.py"))
    for path in [*files, REPOSITORY / "sitecustomize.py"]:
        if path.exists():
            digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    version = re.search(r'__version__ = "([^"]+)"', (REPOSITORY / "overlay" / "__init__.py").read_text())
    return {
        "version": version.group(1) if version else None,
        "commit": os.environ.get("EVIDENCE_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "changed": _output("git", "status", "--porcelain", "--", "overlay", "sitecustomize.py"),
        "source": digest.hexdigest()[:16],
    }


def host_identity() -> dict[str, Any]:
    """GPU, driver, machine."""
    query = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "gpu": query,
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _say(text: str) -> None:
    print(text, flush=True)


class Results:
    """A dictionary on disk. `say` shows a problem to whoever watches."""

    def __init__(self, path: Path, say: Callable[[str], None] = _say) -> None:
        self.path, self._say = path, say
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "overlay": overlay_identity(),
            "host": host_identity(),
            "problems": [],
            "unfinished": [],
        }
        self.save()

    def put(self, *keys: str, value: Any) -> None:
        """Set a value under a path of keys, and save."""
        place = self.data
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        self.save()

    def problem(self, text: str) -> None:
        """Something that did not work; it stands in the file and in the report."""
        text = without_credentials(text)
        self._say(f"PROBLEM {text}")
        self.data["problems"].append(text)
        self.save()

    def unfinished(self, text: str) -> None:
        """Something that there was no time for."""
        self._say(text)
        self.data["unfinished"].append(text)
        self.save()

    def save(self) -> None:
        with self._lock:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.data, indent=1, default=str))
            temporary.replace(self.path)


def read_journals(folder: Path) -> list[dict[str, Any]]:
    """The overlay's journals of one run."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder.exists() else []:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        found.append(content)
    return found


def journal_summary(folder: Path) -> list[dict[str, Any]]:
    """What the journals say, short enough for a table."""
    rows = []
    for content in read_journals(folder):
        for name, patch in content.get("patches", {}).items():
            layers = patch.get("layers", {})
            patched, refused = layers.get("patched", {}), layers.get("refused", {})
            if not patched and not refused:
                continue
            sizes = sorted({(entry.get("qkvz"), entry.get("ba")) for entry in patched.values()})
            rows.append(
                {
                    "process": content.get("role"),
                    "patch": name,
                    "verdict": patch.get("verdict"),
                    "patched": len(patched),
                    "sizes": sizes,
                    "refused": len(refused),
                    "reasons": sorted(set(refused.values())),
                    "calls": patch.get("calls"),
                    "fingerprint": content.get("fingerprint"),
                    "problems": content.get("problems"),
                }
            )
    return rows


def journal_problems(folder: Path) -> list[str]:
    """Everything that the overlay's processes of one run complain of."""
    return sorted({str(problem) for content in read_journals(folder) for problem in content.get("problems") or ()})


def versions(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those of vLLM and torch: what stock's engine says of itself, or else what was installed. Servers' results before 2026-11-30 have
    neither."""
    known = (data.get("pair") or {}).get("stock") or data.get("versions") or {}
    return {name: known.get(name) for name in ("vllm", "torch")}


def size(row: Mapping[str, Any], key: str, before: str = "") -> str:
    """What a row is of, in words: its number of requests or length of a prompt, behind its group where there are groups."""
    group = f"{row['group']}, " if row.get("group") else ""
    return f"{group}{before}{row[key]}"


def arms_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ratios to stock of one row, by arm. Results before schema 2 have one arm, the overlay."""
    if "arms" in row:
        return dict(row["arms"])
    keys = ("ratio", "low", "high")
    if row.get("ratio") is not None:
        return {"overlay": {"seconds": row["overlay"], **{key: row[key] for key in keys}}}
    keys = ("different_requests", "first_difference", "logprobs_equal")
    return {"overlay": {key: row[key] for key in keys}} if "logprobs_equal" in row else {}


def overlays_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms of one row that are to be like stock, or better: all that are the overlay's."""
    others = (CONTROL, UPSTREAM, NEXT)
    return {arm: values for arm, values in arms_of(row).items() if arm not in others}


def different(data: dict[str, Any]) -> list[str]:
    """Arms and cases with other tokens than stock's, where stock repeats its own; in words."""
    found = []
    for row in data.get("tokens") or []:
        for arm, answer in overlays_of(row).items():
            if answer["different_requests"] and row["stock_repeats_itself"]:
                found.append(f"{arm}, {row['case']}: {answer['different_requests']} of {row['requests']} requests")
    for row in (data.get("concurrency") or {}).get("answers") or []:
        if row["requests"] == 1 and repeats_answers(row):  # with more clients a batch depends on the moment
            for arm, answer in overlays_of(row).items():
                if arm != "stock" and answer["different"]:
                    found.append(f"{arm}, one client: {answer['different']} of {answer['of']} answers")
    return found


def repeats_answers(row: dict[str, Any]) -> bool:
    """Whether stock has given its first round's answers again, in a row of `concurrency`; False where nobody asked again."""
    stock = row["arms"]["stock"]
    return bool(stock["of"]) and not stock["different"]
