"""The verdict for the GDN input projections: does the forward call both, once each, on one unchanged input?"""

from __future__ import annotations

import ast

from overlay.verdict.model import SourceTree, Verdict, in_model_registry, without_target
from overlay.verdict.questions import (
    Drift,
    Function,
    attribute_of_self,
    binders,
    check_self,
    disturbs,
    drifted,
    find_class,
    methods_of,
    paths_to_statements,
    uses_of,
    written_to_class,
)
from overlay.vocabulary import ABSENT, APPLY, DRIFTED, LANDED

QKVZ, BA = "in_proj_qkvz", "in_proj_ba"
#: Where the class has lived: from vLLM 0.22.0, and 0.19.0 to 0.21.0.
TARGETS = (
    ("vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn", "QwenGatedDeltaNetAttention"),
    ("vllm.model_executor.layers.mamba.gdn_linear_attn", "GatedDeltaNetAttention"),
)
MODULES = tuple(module for module, _ in TARGETS)
#: Where releases before 0.19.0 kept it.
MODEL = "vllm.model_executor.models.qwen3_next"
#: The models that are built on it.
WITNESS = in_model_registry("qwen3_next|qwen3_5")
METHODS = ("forward", "forward_cuda", "forward_hip", "forward_cpu")
#: The op that vLLM #36795 brought and #38152 reverted. Where it is back, upstream does the overlap.
LANDED_OP = "gdn_in_proj"


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    for module, class_name in TARGETS:
        source = tree.read(module)
        if source is None:
            continue
        try:
            return _judge_class(source.parse(), module, class_name, source.path)
        except SyntaxError as error:
            return drifted(error, source.path, module)
    return _without_target(tree)


def _without_target(tree: SourceTree) -> Verdict:
    model = tree.read(MODEL)
    if model is not None and f"self.{QKVZ}(" in model.text:
        return Verdict(
            ABSENT,
            "the GDN layer is part of models/qwen3_next.py, as before vLLM 0.19.0; the overlay supports 0.19.0 and later",
            MODEL,
            where=f"{model.path}:1",
        )
    return without_target(
        tree,
        WITNESS,
        absent="this vLLM has no Qwen3-Next and no GDN layer",
        lost=f"this vLLM has Qwen3-Next, but its GDN layer is not in {' or '.join(MODULES)}",
    )


def _judge_class(tree: ast.Module, module: str, class_name: str, path: str) -> Verdict:
    class_node = find_class(tree, class_name)
    if class_node is None:
        return Verdict(DRIFTED, f"no class {class_name} at the top level of {module}", module, where=f"{path}:1")
    methods = methods_of(class_node)
    primary = "forward_cuda" if "forward_cuda" in methods else "forward"
    patched = []
    try:
        _check_definitions(tree, class_node)
        if primary not in methods:
            raise Drift(class_node, f"{class_name} has neither forward_cuda nor forward")
        for name in METHODS:
            method = methods.get(name)
            if method is None:
                continue
            landed = _landed(method)
            if landed is not None:
                reason = f"upstream overlaps the projections in {name} (vLLM #36795)"
                return Verdict(LANDED, reason, module, class_name, where=f"{path}:{landed}")
            if name == primary or any(getattr(node, "attr", None) in (QKVZ, BA) for node in ast.walk(method)):
                _check_method(method)
                patched.append(name)
    except Drift as drift:
        return drifted(drift, path, module, class_name)
    reason = f"{QKVZ} and {BA} run one after the other"
    return Verdict(
        APPLY,
        reason,
        module,
        class_name,
        tuple(patched),
        where=f"{path}:{methods[primary].lineno}",
    )


def _check_definitions(tree: ast.Module, class_node: ast.ClassDef) -> None:
    """What stands in the class is what runs: one plain definition of each method, and nothing put in its place."""
    for binder in binders(tree.body, class_node.name):
        if binder is not class_node:
            raise Drift(binder, f"{class_node.name} is bound more than once")
    written = written_to_class(tree, class_node.name)
    if written is not None:
        raise Drift(written, f"{class_node.name} is changed after its definition")
    methods = methods_of(class_node)
    for name in METHODS:
        for binder in binders(class_node.body, name):
            if binder is not methods.get(name):
                raise Drift(binder, f"{name} has not one plain definition")


def _landed(method: Function) -> int | None:
    """The line where upstream's own overlap stands, if it does."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == LANDED_OP:
            return node.lineno
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            inside = {name for name in (QKVZ, BA) if any(uses_of(argument, name) for argument in node.args)}
            if called.endswith("execute_in_parallel") and len(inside) == 2:
                return node.lineno
    return None


def _check_method(method: Function) -> None:
    """Raise Drift unless the stand-in for `self` may run this method."""
    name = method.name
    if isinstance(method, ast.AsyncFunctionDef) or method.decorator_list:
        raise Drift(method, f"{name} is async or decorated")
    asked = (node for node in ast.walk(method) if isinstance(node, ast.Call) and _asks_for_another(node))
    check_self(method, excused=[call.args[0] for call in asked])
    (call, block) = _single_call(method, QKVZ)
    (other, other_block) = _single_call(method, BA)
    if block is not other_block:
        raise Drift(other, f"{name} calls {QKVZ} and {BA} in different blocks")
    if _input_name(call) != _input_name(other):
        raise Drift(other, f"{name} gives {BA} another input than {QKVZ}")
    first, last = sorted((_index_of(block, call), _index_of(block, other)))
    if first == last:
        raise Drift(call, f"{name} calls both projections in one statement")
    name_of_input = _input_name(call)
    _unpacked_names(block[last])
    if name_of_input in _unpacked_names(block[first]):
        raise Drift(block[first], f"{name} puts a projection's result in the place of {name_of_input}")
    # A side that is asked for first has only been started: nobody may touch its result before main, which joins it.
    unfinished = _unpacked_names(block[first]) if first == _index_of(block, other) else set()
    for statement in block[first + 1 : last]:
        disturbing = disturbs(statement, name_of_input)
        if disturbing is not None:
            raise Drift(disturbing, f"{name} may change {name_of_input} or leave between the projections")
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in unfinished:
                raise Drift(node, f"{name} uses {node.id}, a result of {BA}, before {QKVZ}")


def _asks_for_another(call: ast.Call) -> bool:
    """``hasattr(self, "…")``, or ``getattr(self, "…")`` of anything but a projection."""
    function = getattr(call.func, "id", "")
    if function not in ("hasattr", "getattr") or len(call.args) < 2:
        return False
    attribute = getattr(call.args[1], "value", None)
    return isinstance(attribute, str) and (function == "hasattr" or attribute not in (QKVZ, BA))


def _single_call(method: Function, attribute: str) -> tuple[ast.Call, list[ast.stmt]]:
    """The one call of a projection, with the block that its statement stands in; only ``if`` may lead there."""
    found: list[tuple[ast.Call, list[ast.stmt]]] = []
    excused: set[int] = set()
    for path, block in paths_to_statements(method):
        in_split_branch = any(arm == "body" and _is_split_test(statement) for statement, arm in path)
        for statement in block:
            value = statement.value if isinstance(statement, ast.Assign) else None
            if not (isinstance(value, ast.Call) and attribute_of_self(value.func, attribute)):
                continue
            if in_split_branch:
                excused.add(id(value.func))
            else:
                found.append((value, block))
    uses = [node for node in uses_of(method, attribute) if id(node) not in excused]
    if len(uses) != 1 or len(found) != 1:
        at = uses[1] if len(uses) > 1 else (uses[0] if uses else method)
        raise Drift(
            at, f"{method.name} uses {attribute} {len(uses)} times; known is one plain call, assigned, under no loop"
        )
    return found[0]


def _is_split_test(statement: ast.stmt) -> bool:
    """``if hasattr(self, "in_proj_qkv")``: the separate projections that 0.19.0 to 0.20.2 use under LoRA, left alone."""
    test = statement.test if isinstance(statement, ast.If) else None
    return (
        isinstance(test, ast.Call)
        and isinstance(test.func, ast.Name)
        and test.func.id == "hasattr"
        and len(test.args) == 2
        and isinstance(test.args[1], ast.Constant)
        and test.args[1].value == "in_proj_qkv"
    )


def _input_name(call: ast.Call) -> str:
    if len(call.args) != 1 or call.keywords or not isinstance(call.args[0], ast.Name):
        raise Drift(call, "a projection is called with something else than one plain name")
    return call.args[0].id


def _unpacked_names(statement: ast.stmt) -> set[str]:
    assert isinstance(statement, ast.Assign)
    target = statement.targets[0]
    if (
        len(statement.targets) != 1
        or not isinstance(target, ast.Tuple)
        or len(target.elts) != 2
        or not all(isinstance(element, ast.Name) for element in target.elts)
    ):
        raise Drift(statement, "a projection's result is not unpacked into two names")
    return {element.id for element in target.elts if isinstance(element, ast.Name)}


def _index_of(block: list[ast.stmt], call: ast.Call) -> int:
    return next(index for index, statement in enumerate(block) if getattr(statement, "value", None) is call)
