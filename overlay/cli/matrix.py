"""``matrix``: the verdict of every patch on every release, compared with the expected one, and as Markdown.

docs/expected-verdicts.json says for every release and patch which verdict is expected, and why, in a person's words. A
verdict that differs is an error. A release that is newer than the table is judged and shown but is no error, because a new
release of vLLM must not break this project's CI. It enters the written table together with its expectation.

JSON (schema 1)::

    {"schema": 1, "overlay": "0.1.0",
     "releases": {"0.33.0": {"gdn": {…as in check…, "expected": "apply" | null}}},
     "differences": ["…"], "not_in_table": ["0.34.0"]}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from overlay import __version__, files
from overlay.cli import check, failure, releases, vllms
from overlay.cli.failure import CommandError
from overlay.cli.vllms import Vllm
from overlay.patches import registry
from overlay.verdict import Verdict
from overlay.vocabulary import DRIFTED

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
DOCS = Path(__file__).resolve().parents[2] / "docs"
EXPECTED = DOCS / "expected-verdicts.json"
DOCUMENT = DOCS / "COMPATIBILITY.md"


@dataclass(frozen=True)
class Expectation:
    """What a person says of one patch in one release."""

    verdict: str
    reason: str


@dataclass(frozen=True)
class Judged:
    """One release with what was found and what is expected; nothing is expected of a release that is not in the table."""

    version: str
    vllm: Vllm
    found: Mapping[str, Verdict]
    expected: Mapping[str, Expectation] | None

    def differences(self) -> Iterator[str]:
        """One line for each verdict that is not what is expected, or that is drifted where nothing is."""
        for patch, found in self.found.items():
            expected = (self.expected or {}).get(patch)
            if expected is None and self.expected is not None:
                wanted = f"{EXPECTED.name} says nothing of it"
            elif expected is not None and expected.verdict != found.state:
                wanted = f"expected is {expected.verdict}"
            elif expected is None and found.state == DRIFTED:
                wanted = "not a known shape"
            else:
                continue
            where = f" ({self.vllm.relative(found.where)})" if found.where else ""
            yield f"{self.version} {patch}: {found.state}, {wanted}: {found.reason}{where}"


Expectations = Mapping[str, Mapping[str, Expectation]]


def run(
    versions: Sequence[str],
    *,
    write: bool,
    compare: bool,
    output: Path | None,
    as_json: bool,
    cache: Path | None,
    latest: bool = False,
) -> int:
    """Judge, show, write or compare; gives the exit status."""
    if latest:
        if versions or write or compare:
            raise CommandError(
                "--latest judges the newest release alone: leave --write, --check and other releases out"
            )
        versions = [releases.latest()]
    expectations = load(EXPECTED) if EXPECTED.exists() else {}
    document = _document_path(versions, write, compare, output, expectations)
    root = cache or releases.user_cache()
    wanted = [releases.number(version) for version in versions] or _all(expectations, root)
    judged = judge(wanted, expectations, root)
    differences = [line for one in judged for line in one.differences()]
    new = [one.version for one in judged if one.expected is None] if expectations else []
    if document is not None:
        text = markdown([one for one in judged if one.expected is not None])
        if write:
            write_whole(document, text)
        elif not _says(document, text):
            differences.append(f"{document} is not what would be written now; write it with --write")
    if as_json:
        print(json.dumps(as_dict(judged, new, differences), indent=1))
    elif latest:
        from overlay.cli.output import visible

        (version,) = wanted
        fine = "not in the table yet, and nothing drifted" if new else "as expected"
        print(visible(f"vLLM {version}: {'; '.join(line.removeprefix(f'{version} ') for line in differences) or fine}"))
    else:
        from overlay.cli.output import console

        show(judged, new, differences, console())
    return int(bool(differences))


def _document_path(
    versions: Sequence[str], write: bool, compare: bool, output: Path | None, expectations: Expectations
) -> Path | None:
    """The Markdown file to write or compare, None for neither."""
    if not write and not compare:
        if output is not None:
            raise CommandError(f"--output={str(output)!r} needs --write or --check")
        return None
    if write and compare:
        raise CommandError("--write and --check exclude each other: one makes the file, the other compares it")
    if versions:
        raise CommandError(f"the file holds every release: leave {' '.join(versions)} out")
    if not expectations:
        raise CommandError(f"there is no {EXPECTED}: the file is made in a checkout of the repository")
    return output or DOCUMENT


def load(path: Path) -> dict[str, dict[str, Expectation]]:
    """The expectations by release and patch, oldest release first."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {
            version: {patch: Expectation(entry["verdict"], entry["reason"]) for patch, entry in entries.items()}
            for version, entries in sorted(table.items(), key=lambda item: Version(item[0]))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def _all(expectations: Expectations, root: Path) -> list[str]:
    """What the table has, and what the registry has; without a network, the table has to do."""
    found = set(expectations)
    try:
        found |= set(releases.available(root))
    except releases.UnreachableError as error:
        if not found:
            raise
        failure.say(f"only the releases of the table, newer ones are not known: {error}\n")
    return sorted(found, key=Version)


def judge(versions: Sequence[str], expectations: Expectations, root: Path) -> list[Judged]:
    """The verdicts on these releases; those that are not in `root` are fetched."""
    vllms_of_releases = [vllms.of_release(folder) for folder in releases.fetch(versions, root)]
    return [
        Judged(version, vllm, check.judge(vllm), expectations.get(version))
        for version, vllm in zip(versions, vllms_of_releases, strict=True)
    ]


def as_dict(judged: Sequence[Judged], new: Sequence[str], differences: Sequence[str]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "schema": SCHEMA,
        "overlay": __version__,
        "releases": {
            one.version: {
                patch: {**check.verdict_as_dict(found), "expected": _expected_state(one, patch)}
                for patch, found in one.found.items()
            }
            for one in judged
        },
        "differences": list(differences),
        "not_in_table": list(new),
    }


def _expected_state(one: Judged, patch: str) -> str | None:
    expectation = (one.expected or {}).get(patch)
    return expectation.verdict if expectation else None


def show(judged: Sequence[Judged], new: Sequence[str], differences: Sequence[str], console: Console) -> None:
    """The table for people, and what is not as expected."""
    from rich import box
    from rich.table import Table

    from overlay.cli.output import verdict_text, visible

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("vLLM", *registry.TARGET_MODULES):
        table.add_column(name, no_wrap=True)
    for one in judged:
        table.add_row(one.version, *(verdict_text(found.state) for found in one.found.values()))
    console.print(table)
    if new:
        console.print(f"not in the table yet: {', '.join(new)}", soft_wrap=True)
    for line in differences:
        console.print(visible(f"DIFFERENT: {line}"), soft_wrap=True)


# ---------------------------------------------------------------- Markdown


def markdown(judged: Sequence[Judged]) -> str:
    """docs/COMPATIBILITY.md: one table of all, and for each patch what was found and why that is so."""
    patches = list(registry.TARGET_MODULES)
    lines = [
        "# What each patch does in each release of vLLM",
        "",
        "Made by `make matrix` from upstream's released sources; CI makes it again and compares. What is expected, and why, is",
        f"in [{EXPECTED.name}]({EXPECTED.name}).",
        "",
        "`apply`: patched. `landed`: upstream does it. `absent`: there is nothing of the kind. `inert`: the shape is known and",
        "there is nothing to gain. `drifted`: not a known shape, left alone.",
        "",
        *_markdown_table(
            ("vLLM", *patches), [(one.version, *(one.found[patch].state for patch in patches)) for one in judged]
        ),
    ]
    for patch in patches:
        lines += [
            "",
            f"## {patch}",
            "",
            *_markdown_table(("vLLM", "verdict", "why", "where", "upstream"), _spans(patch, judged)),
        ]
    return "\n".join(lines) + "\n"


def _spans(patch: str, judged: Sequence[Judged]) -> list[tuple[str, ...]]:
    """One row for neighbouring releases of which the same is said."""

    def said(one: Judged) -> tuple[str, ...]:
        found, expectation = one.found[patch], (one.expected or {}).get(patch)
        where = " ".join(f"`{name}`" for name in (found.module, *found.methods) if name)
        upstream = check.upstream_text(found.upstream) if found.upstream else ""
        as_expected = expectation is not None and expectation.verdict == found.state
        return found.state, expectation.reason if expectation and as_expected else found.reason, where, upstream

    rows = []
    for cells, group in itertools.groupby(judged, said):
        versions = [one.version for one in group]
        rows.append((versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}", *cells))
    return rows


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), "|" + "---|" * len(heads), *(line(row) for row in rows)]


def write_whole(path: Path, text: str) -> None:
    """Write the file in one step, or leave the one that is there."""
    try:
        files.replace(path, text, f".{path.name}-", mode=0o644)
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error}); name another file with --output") from error


def _says(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read: {error}") from error
