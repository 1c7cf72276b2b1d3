"""README and docs/: short where they have to be, no link to nowhere, and what can be compared with the code is the code's."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import pytest

from devtools import bundle
from overlay import settings
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]


def text_of(page: pathlib.Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?s)```.*?```", "", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short() -> None:
    assert len(text_of(README).split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", text_of(page))):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_path_of_this_repository_is_there(page: pathlib.Path) -> None:
    """`<patch>` and `…` stand for anything."""
    for path in re.findall(r"`((?:overlay|tests|devtools|benchmarks|docs|deploy)/[\w./*<>…-]+)`", text_of(page)):
        pattern = re.sub("<[a-z]+>|…", "*", path.rstrip("/"))
        assert next(REPOSITORY.glob(pattern), None), path


def test_the_design_names_every_module() -> None:
    """The table of the rooms; a patch's own modules are named once for all patches, the command line's not at all."""
    named = set(re.findall(r"`[\w/<>]*?(\w+)\.py`", text_of(REPOSITORY / "docs" / "design.md")))
    for path in (REPOSITORY / "overlay").rglob("*.py"):
        if "cli" not in path.parts and path.stem != "__main__":
            assert path.stem in named, path


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_nobody_is_sent_to_a_package_that_is_not_published(page: pathlib.Path) -> None:
    for command in re.findall(r"pip install[^\n`]*", text_of(page)):
        assert "auxstream-overlay" not in command.replace("dist/vllm_auxstream", ""), command


def test_the_numbers_of_the_first_page_are_those_of_the_results() -> None:
    """README's table has no number of its own for a format."""
    results = text_of(REPOSITORY / "docs" / "results.md")
    rows = {tuple(re.findall(r"(0\.\d{3}) \(", line)) for line in results.splitlines() if line.startswith("|")}
    table = [line for line in text_of(README).splitlines() if line.startswith("|")]
    found = [re.match(r"(0\.\d{3}) (0\.\d{3}) (0\.\d{3})", line.split("|")[2]) for line in table]
    ratios = [match.groups() for match in found if match]
    assert len(ratios) == 10 == len(rows & set(ratios))


def test_the_docker_command_stands_alone() -> None:
    (command,) = re.findall(r"\$ (docker run (?:.*\\\n)*.*)\n", text_of(README))
    words = command.replace("\\\n", "").split()
    assert {"--ipc=host", "-p", "--gpus"} <= set(words) and "/root/.cache/huggingface" in command
    assert f'"$PWD"/dist/{bundle.NAME}:/opt/overlay:ro' in words and "PYTHONPATH=/opt/overlay" in words
    image = next(place for place, word in enumerate(words) if word.startswith("vllm/vllm-openai:"))
    assert [word for word in words[image + 1 :] if word.startswith("-")] == [] and len(words) == image + 2


def test_the_two_commands() -> None:
    makefile = text_of(REPOSITORY / "Makefile")
    for target in ("demo", "test"):
        assert f"$ make {target} " in text_of(README) and f"\n{target}:" in makefile
    for target in {word for page in PAGES for word in re.findall(r"(?:\$ |`)make ([a-z]+)", text_of(page))}:
        assert f"\n{target}:" in makefile, target


def test_the_settings_are_those_of_the_code() -> None:
    rows = dict(
        re.findall(r"^\| `(VLLMOVERLAY\w*)` \| (.*?) \|", text_of(REPOSITORY / "docs" / "settings.md"), re.MULTILINE)
    )
    assert list(rows) == [f"{settings.FAMILY}", *(name for name in rows if name != settings.FAMILY)]
    assert rows.keys() == settings._VARIABLES.keys()
    defaults = {field.name: field.default for field in dataclasses.fields(settings.Settings)}
    for variable, (name, parse) in settings._VARIABLES.items():
        written = rows[variable].strip("`")
        if name not in ("token_threshold", "journal_folder"):
            assert parse(variable, written) == defaults[name], variable
