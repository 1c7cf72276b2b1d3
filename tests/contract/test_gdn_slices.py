"""May the projections' results be slices of one tensor? What a forward must not do with them, and what it may.

One GEMM gives one tensor, and a kernel that takes its rows for a tensor of their own would read wrong numbers, without
an error. So everything that is not known to read rows where they lie has to turn `takes_slices` off.
"""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlay.verdict import Source, Verdict, judge
from overlay.verdict.gdn import PACKED_KERNEL, PACKED_SWITCHES

from . import mutations
from .mutations import BA, QKVZ, code, under
from .released import EXPECTED, ChangedTree, Method, methods, releases, tree, verdict

pytestmark = pytest.mark.contract

METHODS = [Method(version, methods(version)[0]) for version in ("0.20.0", "0.33.0")]
HELPER = "fix_query_key_value_ordering"
each_method = pytest.mark.parametrize("method", METHODS, ids=str)

#: Stand in the place of the two projections; the rest of the forward is as released.
UNKNOWN: dict[str, str] = {
    "given to a function": code(QKVZ, BA, "other = kernel($qkvz)"),
    "ba given to a function": code(QKVZ, BA, "other = kernel($ba)"),
    "given to a function of torch": code(QKVZ, BA, "other = torch.relu($qkvz)"),
    "given to an op that writes": code(QKVZ, BA, "torch.ops.vllm.some_kernel($qkvz, $ba, $input)"),
    "given to vLLM's own core": code(QKVZ, BA, "torch.ops.vllm.gdn_attention_core($qkvz, $ba, $ba, $input, 'x')"),
    "given by name": code(QKVZ, BA, "other = kernel(mixed=$qkvz)"),
    "given to split by name": code(QKVZ, BA, "other = torch.split(tensor=$qkvz, split_size_or_sections=2, dim=-1)"),
    "given with a star": code(QKVZ, BA, "other = kernel(*($qkvz, $ba))"),
    "given to map": code(QKVZ, BA, "other = list(map(kernel, ($qkvz, $ba)))"),
    "given in a closure": code(QKVZ, BA, "other = (lambda: kernel($ba))()"),
    "given to a method that is not there": code(QKVZ, BA, "other = self._not_in_this_class($ba)"),
    "given to an attribute that is a module": code(QKVZ, BA, "other = self.norm($qkvz)"),
    "given to a library named like torch's": code(QKVZ, BA, "other = kernels.split($qkvz, 2, dim=-1)"),
    "given to split as the sizes": code(QKVZ, BA, "other = torch.split($input, $ba, dim=-1)"),
    "under another name": code(QKVZ, BA, "other = $ba", "kernel(other)"),
    "under a third name": code(QKVZ, BA, "third = None", under("for _ in range(2):", "kernel(third)", "third = $ba")),
    "as a view under another name": code(QKVZ, BA, "other = $qkvz.view($qkvz.shape[0], -1)", "kernel(other)"),
    "as a view, at once": code(QKVZ, BA, "kernel($qkvz.reshape($qkvz.size(0), 2, -1))"),
    "as a view of a view": code(QKVZ, BA, "kernel($ba.unflatten(-1, (2, -1)).flatten(-2))"),
    "as an expression's value": code(QKVZ, BA, "kernel(other := $ba)"),
    "one of two": code(QKVZ, BA, "kernel($ba if self.tp_size else $input)"),
    "with arithmetic": code(QKVZ, BA, "$ba = $ba * 1"),
    "written to": code(QKVZ, BA, "$ba += 1"),
    "written to by index": code(QKVZ, BA, "$ba[:1] = 0"),
    "stored on the input": code(QKVZ, BA, "$input.saved = $qkvz"),
    "stored on another object": code(QKVZ, BA, "self.cache.last = $ba"),
    "stored in a table": code(QKVZ, BA, "self.cache['last'] = $ba"),
    "stored by a call": code(QKVZ, BA, "self.cache.append($ba)"),
    "stored as a view": code(QKVZ, BA, "self.cache.last = $qkvz.view(*shape)"),
    "in a tuple": code(QKVZ, BA, "both = ($qkvz, $ba)"),
    "in two names at once": code(QKVZ, BA, "first, second = $qkvz, $ba"),
    "in a name and a place": code(QKVZ, BA, "first = self.cache.last = $ba"),
    "returned": code(QKVZ, BA, under("if self.tp_size < 0:", "return $qkvz")),
    "its memory asked for": code(QKVZ, BA, "where = $qkvz.data_ptr()"),
    "its stride asked for": code(QKVZ, BA, "where = $qkvz.stride(0)"),
    "another method of it": code(QKVZ, BA, "$ba.mul_(2)"),
    "another method of it, as a value": code(QKVZ, BA, "other = $ba.chunk"),
    "its own field": code(QKVZ, BA, "other = $ba.data"),
    "taken apart by rows": code(QKVZ, BA, "first, second = $qkvz.chunk(2)"),
    "taken apart by rows, said": code(QKVZ, BA, "first, second = $qkvz.split([1, 2], dim=0)"),
    "taken apart by rows, from behind": code(QKVZ, BA, "first, second = torch.chunk($qkvz, 2, dim=-2)"),
    "taken apart by what is computed": code(QKVZ, BA, "first, second = torch.chunk($qkvz, 2, dim=self.where)"),
    "viewed in one row": code(QKVZ, BA, "other = $ba.view(-1).size(0)"),
    "the packed kernel without a switch": code(QKVZ, BA, f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)"),
    "the packed kernel under another switch": code(
        QKVZ, BA, under("if self.tp_size > 1:", f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)")
    ),
    "the packed kernel under either switch": code(
        QKVZ,
        BA,
        under(
            f"if self.{PACKED_SWITCHES[0]} or self.tp_size > 1:",
            f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)",
        ),
    ),
    "the packed kernel where the switch is off": code(
        QKVZ,
        BA,
        under(f"if self.{PACKED_SWITCHES[0]}:", "pass"),
        under("else:", f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)"),
    ),
    "the packed kernel under a name that is bound twice": code(
        QKVZ,
        BA,
        f"use = self.{PACKED_SWITCHES[0]}",
        "use = True",
        under("if use:", f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)"),
    ),
}

KNOWN: dict[str, str] = {
    "as it is": code(QKVZ, BA),
    "ba first": code(BA, QKVZ),
    "asked for its shape": code(QKVZ, BA, "rows, kind = $qkvz.shape[0], $ba.dtype", "columns = $ba.size(-1)"),
    "copied": code(QKVZ, BA, "other = kernel($ba.contiguous())"),
    "another name, taken apart": code(
        QKVZ, BA, "other = $ba", "first, second = other.chunk(2, dim=-1)", "kernel(first)"
    ),
    "a view, taken apart": code(
        QKVZ, BA, "other = $ba.view($ba.size(0), 2, -1)", "first, second = torch.split(other, 1, dim=1)"
    ),
    "by torch's function": code(QKVZ, BA, "first, second = torch.chunk($ba, 2, -1)"),
    "by position": code(QKVZ, BA, "first, second = $ba.chunk(2, -1)"),
    "forgotten": code(QKVZ, BA, "other = $qkvz", "del other"),
    "the packed kernel with its switch": code(
        QKVZ,
        BA,
        under(
            f"if self.{PACKED_SWITCHES[0]} and $input.dtype == torch.bfloat16:",
            f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)",
        ),
    ),
    "the packed kernel with its switch under a name": code(
        QKVZ,
        BA,
        f"use = $input.is_cuda and self.{PACKED_SWITCHES[1]}",
        under("if use:", under("if self.tp_size:", f"torch.ops.vllm.{PACKED_KERNEL}($qkvz, $ba, $input)")),
    ),
    **{f"after: {line.splitlines()[0]}": code(QKVZ, BA, line) for line in mutations.UNRELATED},
}


def judged(method: Method, source: Source) -> Verdict:
    found = judge("gdn", ChangedTree(method.version, method.module, source))
    assert (found.state, found.methods) == ("apply", verdict(method.version).methods), found
    return found


def judged_pair(method: Method, template: str) -> Verdict:
    text = mutations.replace_pair(method.text, template)
    ast.parse(text)
    return judged(method, method.replaced(text))


@pytest.mark.parametrize("version", releases.SUPPORTED)
def test_every_release(version: str) -> None:
    assert verdict(version).takes_slices == (EXPECTED[version]["gdn"]["verdict"] == "apply")


@pytest.mark.parametrize("version", releases.SUPPORTED)
def test_the_switches_are_the_layers_own(version: str) -> None:
    """A release with the packed kernel has one of the switches; the patch asks each layer for it."""
    module = verdict(version).module
    source = tree(version).read(module or "")
    assert source is not None
    has_kernel = f"torch.ops.vllm.{PACKED_KERNEL}" in source.text
    switches = [name for name in PACKED_SWITCHES if re.search(rf"self\.{name} = ", source.text)]
    assert len(switches) == has_kernel


@each_method
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_to_read_slices(method: Method, name: str) -> None:
    assert judged_pair(method, UNKNOWN[name]).takes_slices is False


@each_method
@pytest.mark.parametrize("name", KNOWN)
def test_what_reads_slices(method: Method, name: str) -> None:
    assert judged_pair(method, KNOWN[name]).takes_slices is True


@each_method
@pytest.mark.parametrize("name", mutations.HARMLESS_TO_THE_METHOD)
def test_harmless_to_the_method(method: Method, name: str) -> None:
    text = mutations.HARMLESS_TO_THE_METHOD[name](method.text)
    assert judged(method, method.replaced(text)).takes_slices is True


def changed_helper(method: Method, old: str, new: str) -> Verdict:
    text = re.sub(old, new, method.source.text, count=1, flags=re.DOTALL)
    assert text != method.source.text
    return judged(method, Source(text, method.source.path))


@each_method
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"(    def fix_query)", r"    @torch.compile\n\1"),
        (r"(    def fix_query)", r"    fix_query_key_value_ordering = other\n\1"),
        (r"(    def fix_query\w+\()(\s*)self,", r"\1\2self, *"),
        (r"    def fix_query", "    async def fix_query"),
        (r"def fix_query_key", "def repair_query_key"),
        (r"(        return query, key, value, z, b, a)", r"        self.saved = mixed_ba\n\1"),
        (r"(        return query, key, value, z, b, a)", r"        kernel(mixed_qkvz)\n\1"),
        (r"(        return query, key, value, z, b, a)", r"        return query, key, value, mixed_qkvz, b, a"),
        (r"(        return query, key, value, z, b, a)", r"        self.fix_query_key_value_ordering(mixed_ba, mixed_ba)\n\1"),
        (r"torch\.split\(mixed_ba, split_arg_list_ba, dim=2\)", "torch.split(mixed_ba, split_arg_list_ba)"),
        (r"torch\.split\(mixed_ba, split_arg_list_ba, dim=2\)", "torch.ops.vllm.split(mixed_ba, split_arg_list_ba, dim=2)"),
    ],
    ids=["decorated", "bound twice", "by name only", "async", "gone", "stores", "calls", "returns it", "calls itself", "by rows", "an op"],
)  # fmt: skip
def test_a_helper_that_is_not_known_to_read_slices(method: Method, old: str, new: str) -> None:
    assert changed_helper(method, old, new).takes_slices is False


@each_method
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"(        return query, key, value, z, b, a)", r"        self.rows = mixed_ba.shape[0]\n\1"),
        (r"(        return query, key, value, z, b, a)", r"        kernel(query)\n\1"),
        (r"(def fix_query\w+\()(\s*)self,", r"\1\2self,"),
    ],
    ids=["asks for the shape", "parts go anywhere", "as it is"],
)
def test_a_helper_that_reads_slices(method: Method, old: str, new: str) -> None:
    text = re.sub(old, new, method.source.text, count=1, flags=re.DOTALL)
    assert judged(method, Source(text, method.source.path)).takes_slices is True


def test_two_helpers_that_call_each_other() -> None:
    method = METHODS[1]
    found = changed_helper(
        method,
        r"(    def fix_query)",
        "    def other(self, ba):\n        self.fix_query_key_value_ordering(ba, ba)\n\n"
        r"\1",
    )
    assert found.takes_slices is True, "nobody calls it"
    text = method.source.text.replace(
        "    def fix_query",
        "    def other(self, ba):\n        return self.another(ba)\n\n    def another(self, ba):\n        return self.other(ba)\n\n    def fix_query",
        1,
    ).replace("= self.fix_query_key_value_ordering(", "= self.other(mixed_qkvz), self.fix_query_key_value_ordering(", 1)
    assert judged(method, Source(text, method.source.path)).takes_slices is False


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(METHODS),
    st.lists(
        st.sampled_from([name for name in KNOWN if name not in ("as it is", "ba first")]), max_size=3, unique=True
    ),
    st.sampled_from(list(UNKNOWN)),
)
def test_one_unknown_use_among_known_ones(method: Method, known: list[str], unknown: str) -> None:
    uses = [KNOWN[name].removeprefix(code(QKVZ, BA)).strip() for name in known]
    assert judged_pair(method, code(QKVZ, BA, *uses)).takes_slices is True
    assert judged_pair(method, code(UNKNOWN[unknown], *uses)).takes_slices is False
