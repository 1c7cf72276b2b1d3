"""The verdict for pooling: does one flag alone decide whether `_pool` gives the asynchronous output?"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from overlay.verdict.cut import block
from overlay.verdict.model import Source, SourceTree, Upstream, Verdict, Witness, without_target
from overlay.verdict.questions import Drift, Function, attribute_of_self, check_self, drifted, methods_of, uses_of
from overlay.vocabulary import APPLY, LANDED

MODULE = "vllm.v1.worker.gpu_model_runner"
MODULES = (MODULE,)
#: The module that makes the runner.
WITNESS = Witness("vllm.v1.worker.gpu_worker", "def init_worker_distributed_environment(", "gpu_model_runner")
RUNNER, METHOD = "GPUModelRunner", "_pool"
#: Upstream's own class. It copies on a stream of its own, and whoever asks for the result waits for an event.
OUTPUT = "AsyncGPUPoolingModelRunnerOutput"
#: The flag that `_pool` reads. The patch makes it true during a call.
FLAG = "use_async_scheduling"
STREAM = "async_output_copy_stream"
COPY, SYNC = "_copy_pooler_output_to_cpu", "_sync_device"
RESULT, RAW, MASK = "model_runner_output", "raw_pooler_output", "finished_mask"
#: The modules that take a worker's output in the worker's own process. Each has to know the asynchronous output.
EXECUTORS = (
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.ray_utils",
)

_CHANGES_THE_RUNNER = re.compile(rf"\s*(?:setattr\(\s*{RUNNER}\b|{RUNNER}[\w.]*\s*=(?!=))")
_TAKES_THE_OUTPUT = re.compile(r"isinstance\(\s*\w+,\s*AsyncModelRunnerOutput\s*\)")


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    source = tree.read(MODULE)
    if source is None:
        lost = f"this vLLM has a V1 model runner for GPUs, but it is not in {MODULE}"
        return without_target(tree, WITNESS, absent="this vLLM has no V1 model runner for GPUs", lost=lost)
    try:
        pool = _pool(source)
        where = f"{source.path}:{pool.lineno}"
        if not uses_of(pool, FLAG):
            _check_landed(pool)
            reason = f"upstream's {METHOD} gives the asynchronous output on every CUDA-like device"
            upstream = Upstream("#39113", on_by_default=True)
            return Verdict(LANDED, reason, MODULE, RUNNER, where=where, upstream=upstream)
        _check_pool(pool)
        _check_output(source)
        _check_executors(tree, pool)
    except (Drift, SyntaxError) as error:
        return drifted(error, source.path, MODULE, RUNNER)
    reason = f"without async scheduling {METHOD} synchronises the whole device after its copy"
    return Verdict(APPLY, reason, MODULE, RUNNER, (METHOD,), where=where, shapes_graph=False)


# --------------------------------------------------------- cut out of a file of 7,000 lines, because parsing it takes 40 ms


class _Place(ast.AST):
    """A place in text that has not been parsed, for Drift."""

    def __init__(self, text: str, offset: int) -> None:
        self.lineno = text.count("\n", 0, offset) + 1


def _pool(source: Source) -> Function:
    """`_pool`, if the class has one plain definition of it and nothing replaces that. Raises Drift."""
    text = source.text
    class_start = _only(text, f"\nclass {RUNNER}")
    start = _only(text, f"\n    def {METHOD}")
    if text.rfind("\nclass ", 0, start) + 1 != class_start or text.rfind("\ndef ", 0, start) > class_start:
        raise Drift(_Place(text, start), f"{METHOD} is not a method of {RUNNER}")
    for at in _mentions(text, METHOD):
        before = text[text.rfind("\n", 0, at) + 1 : at]
        called = before.endswith("self.") and text.startswith("(", at + len(METHOD))
        if not (called or at == start + len("    def ") or before.endswith("`") or "#" in before):
            raise Drift(_Place(text, at), f"{METHOD} is named where it is neither defined nor called")
    for at in _mentions(text, RUNNER):
        line = _line(text, at)
        if at == class_start + len("class ") or line.lstrip().startswith(("#", "class ", "def ")):
            continue
        if not line.startswith(" ") or _CHANGES_THE_RUNNER.match(line):
            raise Drift(_Place(text, at), f"{RUNNER} is changed or bound again after its definition")
    if _line(text, class_start - 1).startswith(("@", ")")):
        raise Drift(_Place(text, class_start), f"{RUNNER} is decorated")
    if _line(text, start - 1).lstrip().startswith(("@", ")")):
        raise Drift(_Place(text, start), f"{METHOD} is decorated")
    method = block(source, start, start, indentation=4)
    assert isinstance(method, ast.FunctionDef)
    return method


def _mentions(text: str, name: str) -> Iterator[int]:
    """Where `name` stands as a whole word. str.find reads the file ten times as fast as a regular expression."""
    at = text.find(name)
    while at >= 0:
        end = at + len(name)
        begins = name.startswith("\n") or not text[at - 1 : at].isidentifier()
        ends = end == len(text) or not f"_{text[end]}".isidentifier()
        if begins and ends:
            yield at
        at = text.find(name, end)


def _only(text: str, definition: str) -> int:
    """The offset of the only line that defines a name. `definition` is a newline and how that line begins. Raises Drift."""
    found = [at + 1 for at in _mentions(text, definition)]
    if len(found) != 1:
        raise Drift(_Place(text, found[1] if found else 0), f"{len(found)} plain definitions: {definition.strip()}")
    return found[0]


def _line(text: str, offset: int) -> str:
    """The line in which `offset` lies. A newline belongs to the line that it ends."""
    end = text.find("\n", offset)
    return text[text.rfind("\n", 0, offset) + 1 : end if end >= 0 else len(text)]


# ------------------------------------------------------------------------------------------------------------ the method


def _check_pool(pool: Function) -> None:
    """Raise Drift unless a true flag during a call has one effect: the asynchronous output is returned."""
    _check_self(pool)
    reads = uses_of(pool, FLAG)
    if len(reads) != 1:
        raise Drift(reads[1], f"{METHOD} uses {FLAG} {len(reads)} times")
    index = next((i for i, s in enumerate(pool.body) if isinstance(s, ast.If) and s.test is reads[0]), None)
    if index is None:
        raise Drift(reads[0], f"{FLAG} is not the whole condition of an if of its own in {METHOD}")
    choice, after = pool.body[index], pool.body[index + 1 :]
    assert isinstance(choice, ast.If)
    call = _returned_output(choice.body)
    if call is None or choice.orelse:
        raise Drift(choice, f"{METHOD} does something else under {FLAG} than return {OUTPUT}")
    given = _keywords(call)
    if set(given) != {RESULT, RAW, MASK, STREAM} or not attribute_of_self(given[STREAM], STREAM):
        raise Drift(call, f"{OUTPUT} is given other arguments")
    if not all(isinstance(given[name], ast.Name) for name in (RESULT, RAW, MASK)):
        raise Drift(call, f"{OUTPUT} is given something that is made for it")
    if len(uses_of(pool, STREAM)) != 1:
        raise Drift(uses_of(pool, STREAM)[1], f"{METHOD} uses {STREAM} in another place")
    _check_synchronous(after, given, choice)


def _check_self(pool: Function) -> None:
    """Nothing that is called may read the flag: `self` is not passed on, and no method of it is called except the sync."""
    check_self(pool)
    for node in ast.walk(pool):
        if isinstance(node, ast.Call) and attribute_of_self(node.func) and node.func.attr != SYNC:  # type: ignore[attr-defined]
            raise Drift(node, f"{METHOD} calls a method of its own that may read {FLAG}")
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            raise Drift(node, f"{METHOD} is a generator")


def _check_synchronous(after: list[ast.stmt], given: dict[str, ast.expr], choice: ast.stmt) -> None:
    """The code without the flag: the same copy of the same tensors into the same result, a device sync, and the result."""
    if len(after) != 3:
        raise Drift(
            after[0] if after else choice, f"{METHOD} has {len(after)} statements after the choice, known are 3"
        )
    copied, synchronised, returned = after
    target = copied.targets[0] if isinstance(copied, ast.Assign) and len(copied.targets) == 1 else None
    call = copied.value if isinstance(copied, ast.Assign) else None
    same = (
        isinstance(target, ast.Attribute)
        and target.attr == "pooler_output"
        and _is_same(target.value, given[RESULT])
        and isinstance(call, ast.Call)
        and getattr(call.func, "id", "") == COPY
        and set(_keywords(call)) == {RAW, MASK}
        and all(_is_same(_keywords(call)[name], given[name]) for name in (RAW, MASK))
    )
    if not same:
        raise Drift(copied, f"{METHOD} copies something else than what {OUTPUT} copies")
    value = synchronised.value if isinstance(synchronised, ast.Expr) else None
    if not (isinstance(value, ast.Call) and attribute_of_self(value.func, SYNC) and not value.args + value.keywords):
        raise Drift(synchronised, f"{METHOD} does not synchronise the device after its copy")
    if not (isinstance(returned, ast.Return) and returned.value and _is_same(returned.value, given[RESULT])):
        raise Drift(returned, f"{METHOD} returns something else than what it has filled")


def _returned_output(block: list[ast.stmt]) -> ast.Call | None:
    """The call of upstream's class, if a block only returns that call."""
    value = block[0].value if len(block) == 1 and isinstance(block[0], ast.Return) else None
    return value if isinstance(value, ast.Call) and getattr(value.func, "id", "") == OUTPUT else None


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    """The arguments of a call by name. Empty if one has no name."""
    if call.args or not all(keyword.arg for keyword in call.keywords):
        return {}
    return {str(keyword.arg): keyword.value for keyword in call.keywords}


def _is_same(node: ast.expr, other: ast.expr) -> bool:
    return isinstance(node, ast.Name) and isinstance(other, ast.Name) and node.id == other.id


def _check_landed(pool: Function) -> None:
    """Raise Drift unless the method ends with the asynchronous output, and only other platforms return earlier."""
    if _returned_output(pool.body[-1:]) is None:
        raise Drift(pool.body[-1], f"{METHOD} neither asks for {FLAG} nor ends with {OUTPUT}")
    for statement in pool.body[:-1]:
        leaves = next((node for node in ast.walk(statement) if isinstance(node, ast.Return)), None)
        test = statement.test if isinstance(statement, ast.If) else None
        if leaves and (test is None or not (_is_other_platform(test) or _is_of_locals(test))):
            raise Drift(leaves, f"{METHOD} returns something else under a condition that is not known")


def _is_other_platform(test: ast.expr) -> bool:
    """Whether a test is ``not ….is_cuda_alike()``."""
    called = test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else None
    return isinstance(called, ast.Call) and getattr(called.func, "attr", "") == "is_cuda_alike"


def _is_of_locals(test: ast.expr) -> bool:
    """Whether a condition is about this step's own values, such as: no request has finished."""
    return not any(isinstance(node, ast.Attribute) for node in ast.walk(test))


# ------------------------------------------------------------------------------------------ the code that gets the output


def _check_output(source: Source) -> None:
    """Upstream's class copies after the main stream's work, and gives its result only after the copy."""
    start = _only(source.text, f"\nclass {OUTPUT}")
    node = block(source, start, start, indentation=0)
    assert isinstance(node, ast.ClassDef)
    methods = methods_of(node)
    for name in ("__init__", "get_output"):
        if name not in methods:
            raise Drift(node, f"{OUTPUT} has no {name}")
    making = methods["__init__"]
    names = [argument.arg for argument in (*making.args.args, *making.args.kwonlyargs)]
    if set(names) != {"self", RESULT, RAW, MASK, STREAM}:
        raise Drift(making, f"{OUTPUT} takes other arguments")
    fork = next((s for s in making.body if isinstance(s, ast.With) and _enters_stream(s)), None)
    if fork is None:
        raise Drift(making, f"{OUTPUT} does not switch to {STREAM}")
    waited = _first_call(fork, "wait_stream", on=STREAM)
    copied = _first_call(fork, COPY)
    recorded = _first_call(fork, "record")
    if not (waited and copied and recorded and waited.lineno < copied.lineno < recorded.lineno):
        raise Drift(fork, f"{OUTPUT} does not wait for the main stream, copy and record an event, in this order")
    event = getattr(recorded.func, "value", None)
    reading = methods["get_output"]
    first = next((s for s in reading.body if not _is_docstring(s)), reading)
    waits = _first_call(first, "synchronize")
    if waits is None or ast.dump(getattr(waits.func, "value", waits)) != ast.dump(event or recorded):
        raise Drift(first, f"{OUTPUT}.get_output does not begin by waiting for the event of the copy")


def _enters_stream(statement: ast.With) -> bool:
    """Whether a statement is ``with ….stream(async_output_copy_stream)``."""
    entered = statement.items[0].context_expr
    return (
        len(statement.items) == 1
        and isinstance(entered, ast.Call)
        and getattr(entered.func, "attr", "") == "stream"
        and [getattr(argument, "id", "") for argument in entered.args] == [STREAM]
    )


def _first_call(root: ast.AST, name: str, on: str | None = None) -> ast.Call | None:
    """The first call of a function or method of that name. `on` is the name of the object whose method it has to be."""
    for node in ast.walk(root):
        if not isinstance(node, ast.Call) or name not in (getattr(node.func, "id", ""), getattr(node.func, "attr", "")):
            continue
        if on is None or getattr(getattr(node.func, "value", None), "id", "") == on:
            return node
    return None


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _check_executors(tree: SourceTree, pool: Function) -> None:
    """Each executor checks the type of its output. One that does not would send an object that holds CUDA events."""
    for module in EXECUTORS:
        executor = tree.read(module)
        if executor is None or not _TAKES_THE_OUTPUT.search(executor.text):
            raise Drift(pool, f"{module} does not know an asynchronous output")
