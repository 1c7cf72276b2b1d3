"""The verdict for DeepSeek-V4's input GEMMs: can their results be computed first and handed to upstream's own code?

The patch relies on several places, and all are read. The traced forward only passes the first GEMM's result on.
attention_impl calls compressor and indexer once each. These two run each of their GEMMs of the attention's input once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from overlay.verdict.cut import block, parse_but_for
from overlay.verdict.model import Source, SourceTree, Upstream, Verdict, in_model_registry, without_target
from overlay.verdict.questions import (
    HARMLESS_ATTRIBUTES,
    Drift,
    Function,
    binders,
    check_self,
    drifted,
    fingerprint,
    leaving,
    plain_class,
    plain_function,
    uses_of,
)
from overlay.vocabulary import APPLY, DRIFTED, LANDED

#: The attention's module from vLLM 0.22.0 on, and from 0.20.0 to 0.21.0.
MODULES = ("vllm.models.deepseek_v4.attention", "vllm.model_executor.layers.deepseek_v4_attention")
#: Shows that this vLLM has the model, in case its attention moves again.
WITNESS = in_model_registry("deepseek_v4")
COMPRESSOR_MODULE = "vllm.model_executor.layers.deepseek_compressor"
STREAMS_MODULE = "vllm.utils.multi_stream_utils"

WRAPPER, INDEXER, COMPRESSOR = "DeepseekV4MultiHeadLatentAttentionWrapper", "DeepseekV4Indexer", "DeepseekCompressor"
PROJECTION, WEIGHTS, KV_SCORE_LINEAR = "fused_wqa_wkv", "weights_proj", "fused_wkv_wgate"
KV_SCORE_GEMM = "cublas_gemm_bf16_bf16_fp32"
OP = "deepseek_v4_attention"
ATTENTION_PARAMETERS = ["self", "hidden_states", "qr", "kv", "positions", "out"]
PARALLEL = "maybe_execute_in_parallel"
#: The code of vLLM 0.20.0 by its fingerprint. It will not change any more, because upstream has its own overlap. The code
#: of ASKS calls compressor and indexer, or the compressor alone, in functions that `maybe_execute_in_parallel` runs once.
OPS = {OP: "a054a48871990b2d", f"{OP}_fake": "ed122ed4fb597f85"}
ASKS = "76419109ce75dd66"

LANDED_SETTING = "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD"
UPSTREAM = Upstream("#41061", True, f"{LANDED_SETTING} (tokens; 1024; 0 switches it off)")


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    for module in MODULES:
        source = tree.read(module)
        if source is None:
            continue
        try:
            return _landed(source, module) or _judge_attention(tree, source, module)
        except SyntaxError as error:
            return drifted(error, str(error.filename), module)
    return without_target(
        tree,
        WITNESS,
        absent="this vLLM has no DeepSeek-V4",
        lost=f"this vLLM has DeepSeek-V4, but its attention is not in {' or '.join(MODULES)}",
    )


def _landed(source: Source, module: str) -> Verdict | None:
    """Upstream's own overlap: one method that gives all four GEMMs to execute_in_parallel, up to a number of tokens."""
    for method in _methods_that_mention(source, LANDED_SETTING):
        mentioned = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "execute_in_parallel"
                and {WEIGHTS, KV_SCORE_LINEAR} <= mentioned
                and any(PROJECTION in name for name in mentioned)
                and LANDED_SETTING in {getattr(part, "attr", "") for part in ast.walk(node)}
            ):
                where = f"{source.path}:{node.lineno}"
                reason = "upstream runs the input GEMMs in parallel"
                return Verdict(LANDED, reason, module, where=where, upstream=UPSTREAM)
    return None


def _methods_that_mention(source: Source, word: str) -> Iterator[ast.stmt]:
    """Each method that mentions a word."""
    last = 0
    for found in re.finditer(word, source.text):
        start = source.text.rfind("\n    def ", 0, found.start()) + 1
        if start > last:
            last = start
            yield block(source, start, start, indentation=4)


def _judge_attention(tree: SourceTree, source: Source, module: str) -> Verdict:
    compressors, streams = tree.read(COMPRESSOR_MODULE), tree.read(STREAMS_MODULE)
    if compressors is None or streams is None:
        missing = COMPRESSOR_MODULE if compressors is None else STREAMS_MODULE
        return Verdict(DRIFTED, f"this vLLM has no module {missing}", module, WRAPPER, where=f"{source.path}:1")
    path = source.path
    try:
        attention = parse_but_for(source, WRAPPER, INDEXER, OP, f"{OP}_fake")
        wrapper = _plain_methods(attention, WRAPPER, "__init__", "forward", "attention_impl")
        indexer = _plain_methods(attention, INDEXER, "forward")
        _check_forward(wrapper["forward"])
        _check_op(attention)
        _check_attention_impl(wrapper["attention_impl"])
        _check_indexer(indexer["forward"])
        path = compressors.path
        _check_compressor(compressors)
        path = streams.path
        _check_join(streams.parse())
    except Drift as drift:
        return drifted(drift, path, module, WRAPPER)
    return Verdict(
        APPLY,
        "the input GEMMs run one after the other",
        module,
        WRAPPER,
        ("forward", "attention_impl"),
        where=f"{source.path}:{wrapper['forward'].lineno}",
    )


# -------------------------------------------------------------------------------- the places that are read


def _check_forward(forward: Function) -> None:
    """The first GEMM's result is split and passed to the op, and used nowhere else."""
    check_self(forward)
    _check_input(forward)
    call = _only_call(forward, PROJECTION, uses_of(forward, PROJECTION))
    projected = _statement_of(forward, call)
    result = _unpacked(projected, 2)[0]
    if not _is_name(call.args[0] if call.args else None, "hidden_states") or len(call.args) != 1 or call.keywords:
        raise Drift(call, f"{PROJECTION} is given something else than hidden_states")
    loads = [node for node in ast.walk(forward) if _is_load(node, result)]
    parts = f"{result}.split([self.q_lora_rank, self.head_dim], dim=-1)"
    split = next((one for one in forward.body if isinstance(one, ast.Assign) and ast.unparse(one.value) == parts), None)
    if split is None or len(loads) != 1:
        raise Drift(projected, f"the result of {PROJECTION} is not split once into q_lora_rank and head_dim columns")
    qr, kv = _unpacked(split, 2)
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call)]
    op_calls = [node for node in calls if re.fullmatch(rf"torch\.ops\.\w+\.{OP}", ast.unparse(node.func))]
    if len(op_calls) != 1:
        raise Drift(forward, f"forward calls the op {OP} {len(op_calls)} times")
    op = op_calls[0]
    _statement_of(forward, op)
    if len(op.args) < 3 or [getattr(node, "id", None) for node in op.args[:3]] != ["hidden_states", qr, kv]:
        raise Drift(op, f"the op {OP} is not given hidden_states and the two parts of the split")
    for name in (qr, kv):
        if sum(_is_load(node, name) for node in ast.walk(forward)) != 1 or _stores(forward, name) != 1:
            raise Drift(split, f"{name} is used for something else than the op {OP}")
    for node in _used(forward, "hidden_states"):
        if node is not call.args[0] and node is not op.args[0]:
            raise Drift(node, "forward uses hidden_states for something else than the first GEMM and the op")


def _check_op(module: ast.Module) -> None:
    """The op passes on what it gets; its fake reads no input."""
    for name, known in OPS.items():
        if fingerprint(plain_function(module.body, name)) != known:
            raise Drift(plain_function(module.body, name), f"{name} is not the one of vLLM 0.20.0")


def _check_attention_impl(method: Function) -> None:
    """Compressor and indexer are called once each, in every call, with the unchanged input."""
    arguments = method.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if names != ATTENTION_PARAMETERS or arguments.vararg or arguments.kwarg or arguments.kwonlyargs:
        raise Drift(method, f"attention_impl takes {', '.join(names)}; known is {', '.join(ATTENTION_PARAMETERS)}")
    _check_input(method)
    asks = next((statement for statement in method.body if fingerprint(statement) == ASKS), None)
    if asks is None:
        raise Drift(method, "attention_impl does not ask compressor and indexer as vLLM 0.20.0 does")
    before, after = method.body[: method.body.index(asks)], method.body[method.body.index(asks) + 1 :]
    early = leaving(before)
    if early is not None:
        raise Drift(early, "attention_impl may end before compressor and indexer are asked")
    rest = ast.Module([*before, *after], [])
    for node in (*uses_of(rest, "indexer"), *uses_of(rest, "compressor"), *_used(rest, "hidden_states")):
        raise Drift(node, "attention_impl uses compressor, indexer or hidden_states elsewhere")


def _check_indexer(forward: Function) -> None:
    """The indexer's two GEMMs of the input run once each, before anything else uses the input."""
    _check_input(forward)
    asked = []
    last = 0
    for name in (WEIGHTS, "compressor"):
        call = _only_call(forward, name, uses_of(forward, name))
        if not call.args or not _is_name(call.args[0], "hidden_states") or (name == WEIGHTS and len(call.args) != 1):
            raise Drift(call, f"the indexer gives {name} something else than hidden_states")
        last = max(last, forward.body.index(_statement_of(forward, call)))
        asked.append(call.args[0])
    _check_untouched_until(forward, last, "hidden_states", asked)


def _check_compressor(source: Source) -> None:
    """The compressor's one GEMM is a function of its module. It gets the input and the linear's weight, before anything
    else does.
    """
    module = parse_but_for(source, COMPRESSOR)
    forward = _plain_methods(module, COMPRESSOR, "forward")["forward"]
    imported = binders(module.body, KV_SCORE_GEMM)
    if len(imported) != 1 or not isinstance(imported[0], ast.alias) or imported[0].asname:
        at = imported[-1] if imported else module
        raise Drift(at, f"{KV_SCORE_GEMM} is not one plain import of the compressor's module")
    uses = [node for node in ast.walk(module) if isinstance(node, ast.Name) and node.id == KV_SCORE_GEMM]
    call = _only_call(forward, KV_SCORE_GEMM, uses)
    if len(forward.args.args) < 2:
        raise Drift(forward, "the compressor's forward takes no input")
    given = forward.args.args[1].arg
    if [ast.unparse(node) for node in call.args] != [given, f"self.{KV_SCORE_LINEAR}.weight"] or call.keywords:
        raise Drift(call, f"{KV_SCORE_GEMM} is not given the compressor's input and {KV_SCORE_LINEAR}.weight")
    if len(uses_of(forward, KV_SCORE_LINEAR)) != 1:
        raise Drift(forward, f"the compressor's forward uses {KV_SCORE_LINEAR} more than once")
    _check_untouched_until(forward, forward.body.index(_statement_of(forward, call)), given, [call.args[0]])
    if _stores(forward, given):
        raise Drift(forward, f"the compressor's forward puts something in the place of {given}")


def _check_join(module: ast.Module) -> None:
    """Upstream's own auxiliary stream, which reads our results, is joined before attention_impl goes on.

    The branch for that stream leaves only at its end, and its last statement waits for the event behind the stream's work.
    """
    function = plain_function(module.body, PARALLEL)
    tests = [node for node in ast.walk(function) if isinstance(node, ast.If)]
    branch = next((node.body for node in tests if "aux_stream is not None" in ast.unparse(node.test)), None)
    if branch is None:
        raise Drift(function, f"{PARALLEL} has no branch for an auxiliary stream")
    if ast.unparse(branch[-1]) != "event1.wait()":
        raise Drift(branch[-1], f"{PARALLEL} does not end with the main stream's wait for the auxiliary one")
    early = leaving(branch)
    if early is not None:
        raise Drift(early, f"{PARALLEL} may end before the auxiliary stream is joined")
    forks = [node for node in branch if isinstance(node, ast.With) and "(aux_stream)" in ast.unparse(node.items[0])]
    if len(forks) != 1 or ast.unparse(forks[0].body[-1]) != "event1.record()" or _stores(function, "event1"):
        raise Drift(branch[-1], f"{PARALLEL} does not wait for an event behind the auxiliary stream's work")


# ---------------------------------------------------------------------------------------------- the questions


def _plain_methods(module: ast.Module, class_name: str, *names: str) -> dict[str, Function]:
    """The methods of a class. Each is defined once and plainly, and nothing changes it later."""
    class_node = plain_class(module, class_name)
    return {name: plain_function(class_node.body, name) for name in names}


def _check_input(method: Function) -> None:
    """The input is a parameter and is not bound again."""
    if "hidden_states" not in [argument.arg for argument in method.args.args]:
        raise Drift(method, f"{method.name} takes no hidden_states")
    if _stores(method, "hidden_states"):
        raise Drift(method, f"{method.name} puts something in the place of hidden_states")


def _check_untouched_until(method: Function, last: int, name: str, asked: list[ast.expr]) -> None:
    """No statement up to `last` leaves the method or uses the input, except in the known calls."""
    early = leaving(method.body[: last + 1])
    if early is not None:
        raise Drift(early, f"{method.name} may end before its GEMM")
    for node in _used(ast.Module(method.body[: last + 1], []), name):
        if node not in asked:
            raise Drift(node, f"{method.name} uses {name} before its GEMM")


def _only_call(method: Function, name: str, uses: Sequence[ast.AST]) -> ast.Call:
    """The one call of something, which is also its only use."""
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call) and node.func in uses]
    if len(uses) != 1 or len(calls) != 1:
        raise Drift(
            uses[-1] if uses else method, f"{name} is used {len(uses)} times; known is one call in {method.name}"
        )
    return calls[0]


def _statement_of(method: Function, call: ast.Call) -> ast.stmt:
    """The statement at the method's top level that is this call or assigns its result. So it runs once, always."""
    for statement in method.body:
        if isinstance(statement, (ast.Assign, ast.Expr)) and statement.value is call:
            return statement
    raise Drift(call, f"{method.name} makes the call under a condition, in a loop, or inside another expression")


def _unpacked(statement: ast.stmt, count: int) -> list[str]:
    target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
    names = [getattr(element, "id", None) for element in getattr(target, "elts", [])]
    if not isinstance(target, ast.Tuple) or len(names) != count or None in names:
        raise Drift(statement, f"a result is not unpacked into {count} names")
    return [str(name) for name in names]


def _is_name(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_load(node: ast.AST, name: str) -> bool:
    return _is_name(node, name) and isinstance(node.ctx, ast.Load)  # type: ignore[attr-defined]


def _stores(root: ast.AST, name: str) -> int:
    """How often a name is bound, deleted or declared in a function; its parameters do not count."""
    found = 0
    for node in ast.walk(root):
        if isinstance(node, ast.Name):
            found += node.id == name and not isinstance(node.ctx, ast.Load)
        elif isinstance(node, (ast.Lambda, ast.FunctionDef)) and node is not root:
            found += sum(argument.arg == name for argument in ast.walk(node.args) if isinstance(argument, ast.arg))
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            found += name in node.names
    return found


def _used(root: ast.AST, name: str) -> list[ast.expr]:
    """Every place where a tensor is used for more than its shape, type and device."""
    harmless = {
        id(node.value)
        for node in ast.walk(root)
        if isinstance(node, ast.Attribute) and node.attr in HARMLESS_ATTRIBUTES
    }
    return [node for node in ast.walk(root) if _is_load(node, name) and id(node) not in harmless]  # type: ignore[misc]
