"""Parts of a source file, cut out as text and parsed alone: parsing a whole file of vLLM takes up to 40 ms."""

from __future__ import annotations

import ast
import re

from overlay.verdict.model import Source
from overlay.verdict.questions import Drift


def cut(source: Source, name: str, indentation: int = 0) -> ast.stmt:
    """A class or function by name, with the line numbers of its file. Raises Drift unless it is there once."""
    margin = " " * indentation
    headers = list(re.finditer(rf"^{margin}(?:class|def|async def) {name}\b", source.text, re.MULTILINE))
    if len(headers) != 1:
        line = source.text.count("\n", 0, headers[1].start()) + 1 if headers else 1
        raise Drift(ast.Pass(lineno=line, col_offset=0), f"{name} is defined {len(headers)} times")
    header = start = headers[0].start()
    before = source.text[:start].splitlines()
    while before and re.match(rf"{margin}@", before[-1]):  # its decorators belong to it
        start -= len(before.pop()) + 1
    return block(source, start, header, indentation)


def block(source: Source, start: int, header: int, indentation: int) -> ast.stmt:
    """The class or function whose first line (a decorator, maybe) begins at `start` and whose header begins at `header`, with
    the line numbers of its file."""
    text = source.text
    # A comment ends no block, and neither does a bracket that closes the header.
    end = re.compile(rf"^ {{0,{indentation}}}[^\s#)\]}}]", re.MULTILINE).search(text, header + 1)
    above = "\n" * text.count("\n", 0, start)
    if indentation:
        above = f"{above[1:]}if True:\n"
    statement = ast.parse(f"{above}{text[start : end.start() if end else len(text)]}", source.path).body[0]
    return statement.body[0] if isinstance(statement, ast.If) else statement


def parse_but_for(source: Source, *names: str) -> ast.Module:
    """The module without the bodies of all other classes and functions; line numbers stay. A third of the time."""
    lines = source.text.splitlines()
    dropping = False
    for index, line in enumerate(lines):
        if line[:1] in (" ", "\t", "") or line[0] in ")]#":
            if dropping:
                lines[index] = ""
            continue
        found = re.match(r"(async\s+def|def|class)\s+(\w+)", line)
        dropping = found is not None and found[2] not in names
        if dropping and found is not None:
            lines[index] = f"class {found[2]}: ..."
    return Source("\n".join(lines), source.path).parse()
