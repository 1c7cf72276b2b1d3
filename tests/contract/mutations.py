"""Changes that upstream could make to a method with the two projections, and what each must do to the verdict.

Most are written as the code that stands in the place of the pair: `$input` is what both projections are given, `$qkvz`
and `$ba` are the names of their results. `QKVZ` and `BA` are the two statements as every supported release has them.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable, Sequence

QKVZ = "$qkvz, _ = self.in_proj_qkvz($input)"
BA = "$ba, _ = self.in_proj_ba($input)"

TextChange = Callable[[str], str]


def code(*lines: str) -> str:
    return "\n".join(lines)


def under(header: str, *lines: str) -> str:
    """Lines as the body of a compound statement."""
    return "\n".join([header, *(f"    {line}" for part in lines for line in part.splitlines())])


def between(*lines: str) -> str:
    return code(QKVZ, *lines, BA)


#: The patch must step back: intercepted, these would give another result, run something twice, or fail.
DRIFTING: dict[str, str] = {
    # ------------------------------------------------------------------ how often a projection runs
    "qkvz called twice": code(QKVZ, QKVZ, BA),
    "ba called twice": code(QKVZ, BA, BA),
    "both called twice": code(QKVZ, BA, QKVZ, BA),
    "ba called again for another input": code(QKVZ, BA, "other, _ = self.in_proj_ba($input[:1])"),
    "qkvz missing": code("$qkvz = $input", BA),
    "ba missing": code(QKVZ, "$ba = $input"),
    "both missing": code("$qkvz, $ba = $input, $input"),
    "pair in a for loop": under("for _ in range(1):", QKVZ, BA),
    "pair in a while loop": under("while True:", QKVZ, BA, "break"),
    "ba in a for loop": code(QKVZ, under("for _ in range(2):", BA)),
    "qkvz in a list comprehension": code("($qkvz, _), = [self.in_proj_qkvz($input) for _ in range(1)]", BA),
    "ba in a generator": code(QKVZ, "$ba, _ = next(self.in_proj_ba($input) for _ in range(1))"),
    "ba over chunks": code(QKVZ, "$ba = torch.cat([self.in_proj_ba(part)[0] for part in $input.chunk(2)])"),
    "ba in a lambda": code(QKVZ, "$ba, _ = (lambda: self.in_proj_ba($input))()"),
    "ba in a nested function": code(
        QKVZ, under("def project():", "return self.in_proj_ba($input)"), "$ba, _ = project()"
    ),
    "both through another parallel helper": "($qkvz, _), ($ba, _) = both(self.in_proj_qkvz, self.in_proj_ba, $input)",
    # ------------------------------------------------------------------ where the projections stand
    "ba in a helper method": code(QKVZ, "$ba, _ = self._project_ba($input)"),
    "qkvz in a helper method": code("$qkvz, _ = self._project_qkvz($input)", BA),
    "both in a helper method": "$qkvz, $ba = self._project($input)",
    "one fused projection": "$qkvz, $ba = self.in_proj_qkvzba($input)[0].split([8, 4], dim=-1)",
    "ba under a condition": code("$ba = $input", QKVZ, under("if self.tp_size == 1:", BA)),
    "qkvz under a condition": code("$qkvz = $input", under("if self.tp_size == 1:", QKVZ), BA),
    "one or the other": code("$ba = $qkvz = $input", under("if self.tp_size == 1:", QKVZ), under("else:", BA)),
    "ba in a conditional expression": code(QKVZ, "$ba, _ = self.in_proj_ba($input) if self.tp_size else ($input, 0)"),
    "ba behind an and": code(QKVZ, "$ba, _ = self.tp_size and self.in_proj_ba($input)"),
    "pair in try": code(under("try:", QKVZ, BA), under("finally:", "pass")),
    "ba in try": code(QKVZ, under("try:", BA), under("except RuntimeError:", "$ba = $input")),
    "pair in with": under("with torch.inference_mode():", QKVZ, BA),
    "ba in with": code(QKVZ, under("with torch.cuda.stream(self.stream):", BA)),
    "pair in match": under("match self.tp_size:", under("case _:", QKVZ, BA)),
    "both in one statement": "($qkvz, _), ($ba, _) = self.in_proj_qkvz($input), self.in_proj_ba($input)",
    # ------------------------------------------------------------------ what they are given
    # ------------------------------------------------------------------ a side that has been started and not joined
    "ba first and changed before qkvz": code(BA, "$ba = $ba + 1", QKVZ),
    "ba first and read before qkvz": code(BA, "more = $ba * 2", QKVZ),
    "ba first and read in a nested function before qkvz": code(BA, under("def more():", "return $ba * 2"), QKVZ),
    "ba given the output of qkvz": code(QKVZ, "$ba, _ = self.in_proj_ba($qkvz)"),
    "ba given another tensor": code("other = $input.float()", QKVZ, "$ba, _ = self.in_proj_ba(other)"),
    "ba given a clone": code(QKVZ, "$ba, _ = self.in_proj_ba($input.clone())"),
    "qkvz given a slice": code("$qkvz, _ = self.in_proj_qkvz($input[:1])", BA),
    "ba given a second argument": code(QKVZ, "$ba, _ = self.in_proj_ba($input, None)"),
    "ba given a keyword": code(QKVZ, "$ba, _ = self.in_proj_ba(input_=$input)"),
    "ba given a star": code(QKVZ, "$ba, _ = self.in_proj_ba(*[$input])"),
    "ba given a walrus": code(QKVZ, "$ba, _ = self.in_proj_ba(($input := $input * 2))"),
    # ------------------------------------------------------------------ what happens to the input in between
    "input rebound between": between("$input = $input * 2"),
    "input made contiguous between": between("$input = $input.contiguous()"),
    "input rebound under a condition between": between(under("if self.tp_size > 1:", "$input = $input * 2")),
    "input augmented between": between("$input += 1"),
    "input changed in place between": between("$input.mul_(2)"),
    "input written through an index between": between("$input[0] = 0"),
    "input's storage replaced between": between("$input.data = $input.data * 2"),
    "input handed to a function between": between("torch.nn.functional.relu($input, inplace=True)"),
    "input handed to a method between": between("self.norm($input, $qkvz)"),
    "input as an op's output between": between("torch.mul($input, 2, out=$input)"),
    "input handed to a custom op between": between("torch.ops.vllm.scale_(tensor=$input)"),
    "input deleted between": between("other = $input", "del $input", "$input = other"),
    "input a loop's variable between": between(under("for $input in [$qkvz]:", "pass")),
    "input a with's target between": between(under("with self.scaled() as $input:", "pass")),
    "input an import's name between": between("import math as $input"),
    "input imported by its name between": between("from math import pi as $input"),
    "input a nested function's name between": between(under("def $input():", "pass")),
    "input a nested class's name between": between(under("class $input:", "pass")),
    "input an exception's name between": between(
        under("try:", "pass"), under("except RuntimeError as $input:", "pass")
    ),
    "input a match's capture between": between(under("match self.tp_size:", under("case $input:", "pass"))),
    "input a match's rest between": between(under("match [1]:", under("case [*$input]:", "pass"))),
    "input a mapping's rest between": between(under("match {}:", under("case {**$input}:", "pass"))),
    "input the result of qkvz": code("$input, _ = self.in_proj_qkvz($input)", BA, "$qkvz = $input"),
    "input the second result of qkvz": code("$qkvz, $input = self.in_proj_qkvz($input)", BA),
    "input the result of ba, ba first": code("$input, _ = self.in_proj_ba($input)", QKVZ, "$ba = $input"),
    "alias changed in place between": code("alias = $input", QKVZ, "alias.mul_(2)", BA),
    "view changed in place between": code("view = $input.view(-1)", QKVZ, "view[0] = 0", BA),
    "view augmented between": code("view = $input[1:]", QKVZ, "view += 1", BA),
    "input changed by a closure between": code(under("def scale():", "$input.mul_(2)"), QKVZ, "scale()", BA),
    "input rebound by a closure between": code(
        under("def scale():", "nonlocal $input", "$input = $input * 2"), QKVZ, "scale()", BA
    ),
    "input kept and changed through self between": code("kept = [$input]", QKVZ, "kept[0].mul_(2)", BA),
    # ------------------------------------------------------------------ leaving in between
    "return between": between(under("if self.tp_size > 1:", "return $qkvz")),
    "bare return between": between(under("if self.tp_size > 1:", "return")),
    "raise between": between(under("if self.tp_size > 1:", "raise RuntimeError")),
    "yield between": between("yield $qkvz"),
    "yield from between": between("yield from ($qkvz,)"),
    # ------------------------------------------------------------------ what becomes of the results
    "ba not unpacked": code(QKVZ, "$ba = self.in_proj_ba($input)", "$ba = $ba[0]"),
    "ba by another index": code(QKVZ, "$ba = self.in_proj_ba($input)[-1]"),
    "qkvz by a slice": code("$qkvz, = self.in_proj_qkvz($input)[:1]", BA),
    "ba a tensor": code(QKVZ, "$ba = self.in_proj_ba($input)"),
    "ba unpacked into three": code(QKVZ, "$ba, _, _ = self.in_proj_ba($input)"),
    "ba unpacked into one": code(QKVZ, "($ba,) = self.in_proj_ba($input)"),
    "ba unpacked with a star": code(QKVZ, "$ba, *_ = self.in_proj_ba($input)"),
    "qkvz unpacked deeper": code("($qkvz, scale), _ = self.in_proj_qkvz($input)", BA),
    "ba's bias kept on self": code(QKVZ, "$ba, self.bias = self.in_proj_ba($input)"),
    "ba stored in a slice": code("$ba = $input.clone()", QKVZ, "$ba[:], _ = self.in_proj_ba($input)"),
    "ba assigned twice": code(QKVZ, "pair = $ba, _ = self.in_proj_ba($input)"),
    "ba assigned with an annotation": code(QKVZ, "pair: tuple = self.in_proj_ba($input)", "$ba, _ = pair"),
    "ba assigned by a walrus": code(QKVZ, "$ba, _ = (pair := self.in_proj_ba($input))"),
    "ba's result dropped": code("$ba = $input", QKVZ, "self.in_proj_ba($input)"),
    # ------------------------------------------------------------------ other uses of the two modules
    "ba renamed": code(QKVZ, "$ba, _ = self.in_proj_gates($input)"),
    "qkvz renamed": code("$qkvz, _ = self.in_proj_mixed($input)", BA),
    "ba's weight read": code(QKVZ, BA, "weight = self.in_proj_ba.weight"),
    "qkvz's weight read": code("dtype = self.in_proj_qkvz.weight.dtype", QKVZ, BA),
    "ba's quant method called": code(QKVZ, BA, "$ba = self.in_proj_ba.quant_method.apply(self.in_proj_ba, $input)"),
    "ba handed to a function": code(QKVZ, BA, "prefetch(self.in_proj_ba)"),
    "ba under another name": code("project = self.in_proj_ba", QKVZ, "$ba, _ = project($input)"),
    "ba by getattr instead": code(QKVZ, '$ba, _ = getattr(self, "in_proj_ba")($input)'),
    "ba by getattr as well": code(QKVZ, BA, 'weight = getattr(self, "in_proj_ba").weight'),
    "any attribute by getattr": code(QKVZ, BA, "weight = getattr(self, name).weight"),
    "ba's forward": code(QKVZ, "$ba, _ = self.in_proj_ba.forward($input)"),
    "ba replaced": code("self.in_proj_ba = self.other", QKVZ, BA),
    # ------------------------------------------------------------------ what is done with self
    "self given away": code("prepare(self)", QKVZ, BA),
    "self kept": code("layer = self", QKVZ, BA),
    "self rebound": code("self = self.layer", QKVZ, BA),
    "self written to": code(QKVZ, BA, "self.last = $qkvz"),
    "self counted on": code(QKVZ, BA, "self.calls += 1"),
    "self's attribute deleted": code(QKVZ, BA, "del self.last"),
    "self tested": code("assert isinstance(self, torch.nn.Module)", QKVZ, BA),
    "self written to by setattr": code(QKVZ, BA, 'setattr(self, "last", $qkvz)'),
    "super used": code("super().train()", QKVZ, BA),
    "class cell used": code("__class__.train(self)", QKVZ, BA),
}

#: Lines that may stand anywhere around the pair and change nothing about it.
UNRELATED: tuple[str, ...] = (
    "unrelated = 1",
    "rows = $input.size(0)",
    "shape = $input.shape",
    "leading = $input.shape[:-1]",
    "wide = $input.dtype == torch.float32",
    "assert $input.dim() == 2",
    "if $input.is_cuda:\n    unrelated = 2",
    "flag = self.tp_size > 1",
    "# a comment that names self.in_proj_ba(hidden_states) and self.in_proj_qkvz(hidden_states)",
    '"""A string that names self.in_proj_ba(hidden_states)."""',
    "unrelated: int = 3",
    "pass",
)

#: The patch must still be applied: the same two calls, on the same input.
HARMLESS: dict[str, str] = {
    "ba by its first part": code(QKVZ, "$ba = self.in_proj_ba($input)[0]"),
    "qkvz by its first part": code("$qkvz = self.in_proj_qkvz($input)[0]", BA),
    "as it is": code(QKVZ, BA),
    "ba first": code(BA, QKVZ),
    "targets in parentheses": code("($qkvz, _) = self.in_proj_qkvz($input)", "($ba, _) = self.in_proj_ba($input)"),
    "over several lines": code("$qkvz, _ = self.in_proj_qkvz(", "    $input", ")", "$ba, _ = self.in_proj_ba($input)"),
    "with a trailing comma": code(QKVZ, "$ba, _ = self.in_proj_ba($input,)"),
    "on one line": f"{QKVZ}; {BA}",
    "bias under a name": code("$qkvz, bias = self.in_proj_qkvz($input)", "$ba, ba_bias = self.in_proj_ba($input)"),
    "both under one condition": code("$qkvz = $ba = $input", under("if self.tp_size > 0:", QKVZ, BA)),
    "both in one else": code("$qkvz = $ba = $input", under("if self.tp_size < 0:", "pass"), under("else:", QKVZ, BA)),
    "input made contiguous before": code("$input = $input.contiguous()", QKVZ, BA),
    "input under another name": code("states = $input", *(line.replace("$input", "states") for line in (QKVZ, BA))),
    "input rebound after": code(QKVZ, BA, "$input = $input * 1"),
    "input handed out before and after": code("before = torch.relu($input)", QKVZ, BA, "after = torch.relu($input)"),
    "early return before": code(under("if $input.shape[0] < 0:", "return $input"), QKVZ, BA),
    "results changed after": code(QKVZ, BA, "$qkvz = $qkvz * 1", "$ba = $ba.contiguous()"),
    "unrelated work around": code("zeros = torch.zeros(1)", QKVZ, BA, "zeros += 1"),
    "loop elsewhere": code(under("for index in range(2):", "unrelated = index"), QKVZ, BA),
    "with elsewhere": code(under("with torch.inference_mode():", "unrelated = 1"), QKVZ, BA),
    "the attribute asked for": code('found = hasattr(self, "in_proj_ba")', QKVZ, BA),
    "another attribute by getattr": code('found = getattr(self, "in_proj_extra", None)', QKVZ, BA),
    "a helper method for something else": code(QKVZ, BA, "size = self.extra_repr()"),
    **{f"between: {line.splitlines()[0]}": between(line) for line in UNRELATED},
}


def replace_pair(text: str, template: str) -> str:
    """The method with this code in the place of its two projections."""
    block, first, last = _pair(text)
    names = _names(block[first], block[last])
    replacement = string.Template(template).substitute(names)
    lines = text.splitlines()
    start, indentation = block[first].lineno - 1, " " * block[first].col_offset
    lines[start : block[last].end_lineno] = [f"{indentation}{line}" for line in replacement.splitlines()]
    return "\n".join(lines) + "\n"


def surround_pair(
    text: str, before: Sequence[str] = (), inside: Sequence[str] = (), after: Sequence[str] = (), swap: bool = False
) -> str:
    """The method with unrelated lines around its pair."""
    first, second = (BA, QKVZ) if swap else (QKVZ, BA)
    return replace_pair(text, code(*before, first, *inside, second, *after))


def names_a_projection(text: str) -> bool:
    """Whether the code, comments and docstrings apart, has one of the two attributes."""
    nodes = ast.walk(ast.parse(text))
    return any(isinstance(node, ast.Attribute) and node.attr in ("in_proj_qkvz", "in_proj_ba") for node in nodes)


def _pair(text: str) -> tuple[list[ast.stmt], int, int]:
    """The block with the pair, and where in it the two statements are."""
    for node in ast.walk(ast.parse(text)):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            called = [_projection(statement) for statement in block]
            if "in_proj_qkvz" in called and "in_proj_ba" in called:
                places = sorted((called.index("in_proj_qkvz"), called.index("in_proj_ba")))
                return block, places[0], places[1]
    raise LookupError("no pair of projections here")


def _projection(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
        match = re.fullmatch(r"self\.(in_proj_qkvz|in_proj_ba)", ast.unparse(statement.value.func))
        return match.group(1) if match else None
    return None


def _names(*statements: ast.stmt) -> dict[str, str]:
    names = {}
    for statement in statements:
        assert isinstance(statement, ast.Assign)
        target, call = statement.targets[0], statement.value
        assert isinstance(target, ast.Tuple)
        assert isinstance(call, ast.Call)
        key = "qkvz" if _projection(statement) == "in_proj_qkvz" else "ba"
        names[key] = ast.unparse(target.elts[0])
        names["input"] = ast.unparse(call.args[0])
    return names


# ---------------------------------------------------------------------------------------- changes to the whole method


def rename(old: str, new: str) -> TextChange:
    """A local name, a parameter too, changed everywhere in the method."""

    def change(text: str) -> str:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == old:
                node.id = new
            elif isinstance(node, ast.arg) and node.arg == old:
                node.arg = new
        return ast.unparse(tree) + "\n"

    return change


def rename_result(key: str) -> TextChange:
    def change(text: str) -> str:
        block, first, last = _pair(text)
        return rename(_names(block[first], block[last])[key], f"renamed_{key}")(text)

    return change


def reformat(text: str) -> str:
    return ast.unparse(ast.parse(text)) + "\n"


def comment_every_line(text: str) -> str:
    """A comment behind every statement that ends its line, and one above the pair."""
    tree = ast.parse(text)
    strings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.Constant, ast.JoinedStr))
        for line in range(node.lineno, (node.end_lineno or node.lineno))
    }
    lines = text.splitlines()
    return (
        "\n".join(
            line if number in strings or not line.strip() else f"{line}  # self.in_proj_ba(line {number})"
            for number, line in enumerate(lines, start=1)
        )
        + "\n"
    )


def blank_lines(text: str) -> str:
    block, first, last = _pair(text)
    lines = text.splitlines()
    for place in (block[last].lineno - 1, block[first].lineno - 1):
        lines[place:place] = ["", ""]
    return "\n".join(lines) + "\n"


def on_the_method(change: Callable[[ast.FunctionDef], None]) -> TextChange:
    def apply(text: str) -> str:
        tree = ast.parse(text)
        method = tree.body[0]
        assert isinstance(method, ast.FunctionDef)
        change(method)
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"

    return apply


def _annotate(method: ast.FunctionDef) -> None:
    for argument in method.args.args[1:]:
        argument.annotation = ast.parse("'torch.Tensor | None'", mode="eval").body
    method.returns = ast.parse("'torch.Tensor'", mode="eval").body


def _remove_annotations(method: ast.FunctionDef) -> None:
    for argument in method.args.args:
        argument.annotation = None
    method.returns = None


def _set_docstring(method: ast.FunctionDef) -> None:
    _remove_docstring(method)
    method.body.insert(0, ast.Expr(ast.Constant("Calls self.in_proj_ba(hidden_states) once.")))


def _remove_docstring(method: ast.FunctionDef) -> None:
    if ast.get_docstring(method) is not None:
        del method.body[0]


def _add_parameters(method: ast.FunctionDef) -> None:
    extra = ast.parse("def f(*, positions=None, **options): pass").body[0]
    assert isinstance(extra, ast.FunctionDef)
    method.args.kwonlyargs, method.args.kw_defaults = extra.args.kwonlyargs, extra.args.kw_defaults
    method.args.kwarg = extra.args.kwarg


HARMLESS_TO_THE_METHOD: dict[str, TextChange] = {
    "reformatted": reformat,
    "comments on every line": comment_every_line,
    "blank lines around the pair": blank_lines,
    "qkvz's result renamed": rename_result("qkvz"),
    "ba's result renamed": rename_result("ba"),
    "input renamed": rename_result("input"),
    "the unused bias renamed": rename("_", "bias"),
    "annotations added": on_the_method(_annotate),
    "annotations removed": on_the_method(_remove_annotations),
    "docstring changed": on_the_method(_set_docstring),
    "docstring removed": on_the_method(_remove_docstring),
    "parameters added": on_the_method(_add_parameters),
}


def _decorate(method: ast.FunctionDef) -> None:
    method.decorator_list.append(ast.parse("torch.compiler.disable", mode="eval").body)


def _make_static(method: ast.FunctionDef) -> None:
    method.decorator_list.append(ast.Name("staticmethod", ast.Load()))


DRIFTING_OF_THE_METHOD: dict[str, TextChange] = {
    "decorated": on_the_method(_decorate),
    "static": on_the_method(_make_static),
    "async": lambda text: text.replace("def ", "async def ", 1),
    "self under another name": rename("self", "layer"),
    "not Python": lambda text: text.replace("self.in_proj_ba(", "self.in_proj_ba((", 1),
    "assigned again in the class": lambda text: f"{text}{_name(text)} = torch.compiler.disable({_name(text)})\n",
    "assigned again, annotated": lambda text: f"{text}{_name(text)}: object = torch.compiler.disable({_name(text)})\n",
    "deleted and made anew": lambda text: f"{text}del {_name(text)}\n{_name(text)} = other\n",
    "defined again by a loop": lambda text: f"{text}for {_name(text)} in (other,): pass\n",
    "defined only under a condition": lambda text: "if torch.cuda.is_available():\n" + _indent(text),
    "defined again under a condition": lambda text: f"{text}if torch.version.hip:\n{_indent(text)}",
}


def _name(text: str) -> str:
    match = re.search(r"def (\w+)\(", text)
    assert match is not None
    return match.group(1)


def _indent(text: str) -> str:
    return "".join(f"    {line}" if line.strip() else line for line in text.splitlines(keepends=True))


#: Upstream's own overlap: the op of vLLM #36795, and the helper that 0.19.0 brought for it.
LANDED: dict[str, str] = {
    "an op for both": "$qkvz, $ba = torch.ops.vllm.gdn_in_proj($input, 12, 4, self.prefix)",
    "the parallel helper": code(
        "($qkvz, _), ($ba, _) = maybe_execute_in_parallel(",
        "    lambda: self.in_proj_qkvz($input), lambda: self.in_proj_ba($input), self.events[0], self.events[1]",
        ")",
    ),
}
