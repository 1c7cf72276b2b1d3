"""The verdict for LoRA linears: does each `apply` compute the base layer once, add the adapters once, and nothing else?

The patch shrinks the input of `apply` next to the base layer, and lets the adapters add to the output when upstream's
`apply` has returned. That is upstream's result only where `apply` gives its own input and its own output to both. So
each `apply` is followed statement by statement, into the helpers that it calls, along every path to a ``return``.

The patch also runs the punica wrapper's `add_lora_linear` with a stand-in, and hands its gate through `add_shrink` beside the
weights. So the first has to call `add_shrink` and `add_expand` once each, with a buffer of its own, and the second has to give
its weights to the op and to nothing else.

Two branches are taken as never entered: the one for platforms that cannot update in place (no CUDA-like one), and
upstream's own dual stream (where it is switched on, the patch steps aside before it installs anything).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from overlay.verdict.cut import cut
from overlay.verdict.model import Source, SourceTree, Upstream, Verdict, Witness, without_target
from overlay.verdict.questions import (
    HARMLESS_ATTRIBUTES,
    QUIET,
    Drift,
    Function,
    binders,
    drifted,
    methods_of,
    plain_class,
    plain_function,
)
from overlay.vocabulary import APPLY, DRIFTED, LANDED

PACKAGE = "vllm.lora.layers"
MODULES = (PACKAGE,)
#: Where LoRA is switched on.
WITNESS = Witness("vllm.engine.arg_utils", "class AsyncEngineArgs(", "enable_lora")
BASE = ("base_linear", "BaseLinearLayerWithLoRA")
#: Classes whose own `apply`, where they have one, may leave upstream's dual stream aside.
OTHERS = (
    ("column_parallel_linear", "MergedColumnParallelLinearWithLoRA"),
    ("replicated_linear", "ReplicatedLinearWithLoRA"),
)
ANCESTOR = ("base", "BaseLayerWithLoRA")
PUNICA = "vllm.lora.punica_wrapper.punica_gpu"
PUNICA_METHODS = {
    "add_lora_linear": ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"],
    "add_shrink": ["self", "y", "x", "lora_a_stacked", "scale"],
}
#: The op that a punica wrapper's `add_shrink` calls, a global of its module.
SHRINK = "lora_shrink"
METADATA = "vllm.lora.ops.triton_ops.lora_kernel_metadata"
#: Upstream's switch (vLLM #35721), and its default in vllm/envs.py.
SWITCH = "VLLM_LORA_ENABLE_DUAL_STREAM"
SWITCH_DEFAULT = re.compile(rf'getenv\(\s*"{SWITCH}",\s*"(\w+)"')

#: What a name in an `apply` stands for.
SELF, INPUT, BIAS, OUTPUT, RAW, LORA, OTHER = "self", "input", "bias", "output", "raw", "lora", "other"
TENSORS = frozenset({INPUT, BIAS, OUTPUT, RAW, LORA})
#: Calls that give another view of the same elements in the same order.
VIEWS = frozenset({"flatten", "reshape", "view"})
#: The calls that matter: what happens there, what they give, and what they have to be given (roles, or source text).
CALLS = {
    "self.base_layer.quant_method.apply": ("gemm", OUTPUT, ["self.base_layer", INPUT, BIAS]),
    "self._get_quant_method().apply": ("gemm", OUTPUT, ["self.base_layer", INPUT, BIAS]),
    "self.base_layer": ("gemm", RAW, [INPUT]),
    "self.punica_wrapper.add_lora_linear": (
        "add", LORA, [OUTPUT, INPUT, "self.lora_a_stacked", "self.lora_b_stacked", "1.0", "self.output_slices"],
    ),
    "self.punica_wrapper.add_shrink": ("shrink", OTHER, [OTHER, INPUT, "self.lora_a_stacked", "1.0"]),
    "self.punica_wrapper.add_expand": (
        "expand", LORA,
        [OUTPUT, OTHER, "self.lora_b_stacked", "self.output_slices", "offset_start=0", "add_input=True"],
    ),
}  # fmt: skip
#: What may happen on a way through an `apply`: the adapters in one call, or in two around a collective.
KNOWN_WAYS = (("gemm", "add"), ("gemm", "shrink", "expand"))
FROM_BASE = "base"  #: on a way that goes through ``super().apply``

Events = tuple[str, ...]
Roles = dict[str, str]


def judge(tree: SourceTree) -> Verdict:
    """The verdict for one vLLM, read from its sources without importing it."""
    if not tree.has(PACKAGE):
        lost = f"this vLLM has LoRA, but its layers are not in {PACKAGE}"
        return without_target(tree, WITNESS, absent="this vLLM has no LoRA layers", lost=lost)
    base = tree.read(f"{PACKAGE}.{BASE[0]}")
    if base is None:
        return Verdict(DRIFTED, f"this vLLM has LoRA layers, but no {PACKAGE}.{BASE[0]}", PACKAGE)
    reading = _Reading(tree)
    try:
        methods = _intercepted(reading)
        _check_punica(reading)
        line = reading.method(*BASE, "apply").lineno
    except (Drift, SyntaxError) as error:
        return drifted(error, reading.path, PACKAGE)
    found = Verdict(
        APPLY,
        "the base GEMM and the LoRA kernels run one after the other",
        PACKAGE,
        methods=tuple(f"{module}.{class_name}.apply" for module, class_name in methods),
        where=f"{base.path}:{line}",
    )
    return found if SWITCH not in base.text else _beside_upstream(found, base, tree)


def _beside_upstream(found: Verdict, base: Source, tree: SourceTree) -> Verdict:
    """Where upstream has a dual stream of its own: what that leaves out, and whether it is on by itself."""
    environment = tree.read("vllm.envs")
    default = SWITCH_DEFAULT.search(environment.text) if environment is not None else None
    if default is not None and default.group(1) not in ("0", "False"):
        reason = f"upstream overlaps LoRA linears, {SWITCH} is on by default (vLLM #35721)"
        return replace(found, state=LANDED, reason=reason, methods=(), upstream=Upstream("#35721", True))
    left_out = []
    if any("MergedColumn" in name for name in found.methods):
        left_out.append("merged layers")
    if any("Replicated" in name for name in found.methods):
        left_out.append("replicated layers")
    if re.search(r"def lora_linear_async\(\s*layer_name: str\b", base.text):
        left_out.append("layer names that share compiled graphs")
    reason = f"upstream's dual stream is off by default ({SWITCH}) and leaves out {', '.join(left_out) or 'nothing'}"
    return replace(found, reason=reason, upstream=Upstream("#35721", False, f"{SWITCH}=1"))


def _intercepted(reading: _Reading) -> list[tuple[str, str]]:
    """The (module, class) pairs whose `apply` is to be intercepted. Raises Drift where one is not of a known shape."""
    found = []
    for place in (BASE, *OTHERS):
        if place != BASE and "apply" not in reading.methods(*place):
            continue
        ways = list(_Follower(reading, *place).ways_through_apply())
        for way in ways:
            if way[way[:1] == (FROM_BASE,) :] not in KNOWN_WAYS:
                what = f"a way through {place[1]}.apply does {', '.join(way) or 'nothing'}"
                raise Drift(reading.method(*place, "apply"), f"{what}; known are gemm and add, once each")
        if not any(FROM_BASE in way for way in ways):
            found.append(place)
    body = reading.method(*ANCESTOR, "set_mapping").body
    if [ast.unparse(statement).replace(": PunicaWrapperBase", "") for statement in body] != [
        "self.punica_wrapper = punica_wrapper"
    ]:
        raise Drift(body[0], f"{ANCESTOR[1]}.set_mapping does not just keep the punica wrapper")
    return found


class _Reading:
    """The parts of a vLLM's source that matter here, cut out as text first: parsing whole files takes too long."""

    def __init__(self, tree: SourceTree) -> None:
        self._tree = tree
        self._classes: dict[tuple[str, str], dict[str, Function]] = {}
        self.path = ""  #: of what was read last

    def source(self, module: str) -> Source:
        source = self._tree.read(module)
        if source is None:
            raise Drift(ast.Pass(), f"this vLLM has no {module}")
        self.path = source.path
        return source

    def methods(self, module: str, class_name: str) -> dict[str, Function]:
        """The methods of a LoRA layer's class that is defined once, and not changed afterwards."""
        known = self._classes.get((module, class_name))
        if known is not None:
            self.path = self.source(f"{PACKAGE}.{module}").path
            return known
        source = self.source(f"{PACKAGE}.{module}")
        again = "\n".join(re.findall(rf"^(?:setattr\({class_name}\b|{class_name}\b).*$", source.text, re.MULTILINE))
        cut_out = ast.Module([cut(source, class_name), *ast.parse(again).body], [])
        node = plain_class(cut_out, class_name)
        if node.decorator_list:
            raise Drift(node, f"{class_name} is decorated")
        if binders(node.body, "apply"):
            plain_function(node.body, "apply")
        self._classes[module, class_name] = methods_of(node)
        return self._classes[module, class_name]

    def method(self, module: str, class_name: str, name: str) -> Function:
        methods = self.methods(module, class_name)
        if name not in methods:
            raise Drift(ast.Pass(), f"{class_name} has no {name}")
        return methods[name]

    def function(self, module: str, name: str) -> Function | None:
        """A function at the top level of a LoRA layer's module."""
        source = self.source(f"{PACKAGE}.{module}")
        if not re.search(rf"^def {name}\(", source.text, re.MULTILINE):
            return None
        node = cut(source, name)
        assert isinstance(node, ast.FunctionDef)
        return node


@dataclass
class _Frame:
    """Where the reader is on one way through an `apply`: what each name stands for, and what has happened."""

    roles: Roles
    events: Events
    value: str = OTHER  #: what the last expression stands for, and what has been returned
    returned: bool = False


class _Follower:
    """Every way through one class's `apply`, as the sequence of what happens on it."""

    def __init__(self, reading: _Reading, module: str, class_name: str) -> None:
        self._reading = reading
        self._module = module
        self._class_name = class_name

    def ways_through_apply(self) -> Iterator[Events]:
        method = self._reading.method(self._module, self._class_name, "apply")
        if [argument.arg for argument in method.args.args] != ["self", "x", "bias"]:
            raise Drift(method, "apply takes something else than x and bias")
        for frame in self._function(method, [SELF, INPUT, BIAS], ()):
            if frame.value != OUTPUT:
                raise Drift(method, f"apply gives something else than the base layer's output: {frame.value}")
            yield frame.events

    def _function(self, function: Function, arguments: list[str], events: Events) -> Iterator[_Frame]:
        names = [argument.arg for argument in function.args.args]
        plain = isinstance(function, ast.FunctionDef) and not function.decorator_list
        if not plain or function.args.vararg or function.args.kwonlyargs or function.args.kwarg:
            raise Drift(function, f"{function.name} is decorated, async, or takes other arguments")
        roles = dict.fromkeys(names, OTHER) | dict(zip(names, arguments, strict=False))
        for frame in self._block(function.body, [_Frame(roles, events)]):
            if not frame.returned:
                raise Drift(function, f"{function.name} may give nothing")
            yield frame

    def _block(self, block: list[ast.stmt], frames: list[_Frame]) -> list[_Frame]:
        for statement in block:
            going_on = [frame for frame in frames if not frame.returned]
            frames = [frame for frame in frames if frame.returned]
            for frame in going_on:
                frames += self._statement(statement, frame)
        return frames

    def _statement(self, statement: ast.stmt, frame: _Frame) -> list[_Frame]:
        """The frames after one statement; none where it raises."""
        if isinstance(statement, ast.Raise):
            return []
        if isinstance(statement, ast.Pass):
            return [frame]
        if isinstance(statement, ast.Expr):
            return self._value(statement.value, frame)
        if isinstance(statement, ast.Assert):
            self._quiet(statement.test, frame)
            return [frame]
        if isinstance(statement, ast.Return) and statement.value is not None:
            return [replace(after, returned=True) for after in self._value(statement.value, frame)]
        if isinstance(statement, ast.If):
            if _never_entered(statement.test):
                return self._block(statement.orelse, [frame])
            self._quiet(statement.test, frame)
            arms = (statement.body, statement.orelse)
            return [after for arm in arms for after in self._block(arm, [frame])]
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            return self._assign(statement.targets[0], statement.value, frame)
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            return self._assign(statement.target, statement.value, frame)
        raise Drift(statement, "a statement of a kind that no known apply has")

    def _assign(self, target: ast.expr, value: ast.expr, frame: _Frame) -> list[_Frame]:
        if isinstance(target, ast.Name):
            after = self._value(value, frame)
            return [replace(one, roles={**one.roles, target.id: one.value}) for one in after]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            roles = dict(frame.roles)
            for name, part in zip(target.elts, value.elts, strict=True):
                (one,) = self._value(part, frame)
                if not isinstance(name, ast.Name) or one.events != frame.events:
                    raise Drift(target, "a tuple is assigned that no known apply has")
                roles[name.id] = one.value
            return [replace(frame, roles=roles)]
        raise Drift(target, "something else than a name is assigned to")

    def _value(self, expression: ast.expr, frame: _Frame) -> list[_Frame]:
        """The frames after an expression, one for each way through what it calls."""
        if isinstance(expression, ast.Call):
            return self._call(expression, frame)
        role = self._role(expression, frame)
        if isinstance(expression, ast.IfExp) and self._unpacks_raw(expression, frame):
            role = OUTPUT
        if role is None:
            self._quiet(expression, frame)
        return [replace(frame, value=role or OTHER)]

    def _unpacks_raw(self, expression: ast.IfExp, frame: _Frame) -> bool:
        """``y[0] if isinstance(y, tuple) else y``, of what the base layer itself gives."""
        name = expression.orelse
        return (
            isinstance(name, ast.Name)
            and frame.roles.get(name.id) == RAW
            and ast.unparse(expression.test) == f"isinstance({name.id}, tuple)"
            and ast.unparse(expression.body) == f"{name.id}[0]"
        )

    def _call(self, call: ast.Call, frame: _Frame) -> list[_Frame]:
        callee = self._path(call.func, frame)
        if callee in CALLS:
            event, role, wanted = CALLS[callee]
            self._check_given(call, frame, wanted)
            return [replace(frame, value=role, events=(*frame.events, event))]
        inlined = self._inlined(callee, call, frame)
        if inlined is not None:
            return inlined
        if isinstance(call.func, ast.Attribute) and call.func.attr in VIEWS and isinstance(call.func.value, ast.Name):
            role = frame.roles.get(call.func.value.id, OTHER)
            if role in (INPUT, OUTPUT):
                for argument in call.args:
                    self._quiet(argument.value if isinstance(argument, ast.Starred) else argument, frame)
                return [replace(frame, value=role)]
        self._quiet(call, frame)
        return [replace(frame, value=OTHER)]

    def _inlined(self, callee: str, call: ast.Call, frame: _Frame) -> list[_Frame] | None:
        """The ways through a function of upstream's that a call hands the layer to; None where it hands it to none."""
        given = [self._role(argument, frame) for argument in call.args]
        follower, target, events = self, None, frame.events
        if callee == "super().apply":
            follower, target = _Follower(self._reading, *BASE), self._reading.method(*BASE, "apply")
            given, events = [SELF, *given], (*events, FROM_BASE)
        elif callee.startswith("self.") and callee.count(".") == 1:
            name = callee.removeprefix("self.")
            own = self._reading.methods(self._module, self._class_name)
            target = own.get(name) or self._reading.methods(*BASE).get(name)
            given = [SELF, *given]
            if target is None:
                raise Drift(call, f"calls self.{name}, which is not known")
        elif isinstance(call.func, ast.Name) and SELF in given:
            target = self._reading.function(self._module, call.func.id)
        if target is None:
            return None
        arguments = [role for role in given if role is not None]
        if call.keywords or len(arguments) < len(given):
            raise Drift(call, f"calls {callee} with something else than plain names")
        ways = follower._function(target, arguments, events)
        return [replace(frame, value=way.value, events=way.events) for way in ways]

    def _path(self, callee: ast.expr, frame: _Frame) -> str:
        """A callee as text, with ``self`` in the place of whatever name the layer has in this function."""
        text = ast.unparse(callee)
        root, dot, rest = text.partition(".")
        return f"self{dot}{rest}" if frame.roles.get(root) == SELF else text

    def _check_given(self, call: ast.Call, frame: _Frame, wanted: list[str]) -> None:
        """Raise Drift unless a call's arguments are `wanted`."""
        given = [self._role(argument, frame) or self._path(argument, frame) for argument in call.args]
        given += [ast.unparse(keyword) for keyword in call.keywords]
        if given != wanted:
            raise Drift(call, f"{ast.unparse(call.func)} is given {', '.join(given)}, known is {', '.join(wanted)}")

    def _role(self, value: ast.expr, frame: _Frame) -> str | None:
        """What a name stands for; None for everything else."""
        return frame.roles.get(value.id, OTHER) if isinstance(value, ast.Name) else None

    def _quiet(self, expression: ast.expr, frame: _Frame) -> None:
        """Raise Drift where an expression could change a tensor or the layer, or hand one of them out."""
        only_asked = {
            id(node.value)
            for node in ast.walk(expression)
            if isinstance(node, ast.Attribute) and node.attr in HARMLESS_ATTRIBUTES
        } | {
            id(node.left)
            for node in ast.walk(expression)
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot))
        }
        of_self = {id(node.value) for node in ast.walk(expression) if isinstance(node, ast.Attribute)}
        for node in ast.walk(expression):
            if not isinstance(node, QUIET):
                raise Drift(node, "an expression of a kind that no known apply has")
            if isinstance(node, ast.Call) and self._path(node.func, frame).startswith("self."):
                raise Drift(node, f"calls {ast.unparse(node.func)}, which is not known")
            if isinstance(node, ast.Attribute) and node.attr == "punica_wrapper":
                raise Drift(node, "uses the punica wrapper in a way that is not known")
            role = frame.roles.get(node.id) if isinstance(node, ast.Name) else None
            if (role in TENSORS and id(node) not in only_asked) or (role == SELF and id(node) not in of_self):
                raise Drift(node, f"{ast.unparse(node)} may be changed or handed out")


def _never_entered(test: ast.expr) -> bool:
    """A branch for platforms without updates in place, or upstream's own dual stream."""
    if ast.unparse(test) == "not current_platform.can_update_inplace()":
        return True
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return any(ast.unparse(part) == "self._enable_aux_cuda_stream" for part in parts)


def _check_punica(reading: _Reading) -> None:
    """The adapters are a shrink and an expand with one buffer between them, and whether there are any the host knows. The
    shrink gives its weights and its buffer to the op, and uses them for nothing else."""
    source = reading.source(PUNICA)
    add, calls, others = _punica_method(source, "add_lora_linear", "self.")
    given = [(ast.unparse(call.func), [ast.unparse(argument) for argument in call.args]) for call in calls]
    if given != [
        ("self.add_shrink", ["buffer", "x", "lora_a_stacked", "scale"]),
        ("self.add_expand", ["y", "buffer", "lora_b_stacked", "output_slices"]),
    ]:
        raise Drift(add, "add_lora_linear is not one shrink into a buffer and one expand from it")
    if others["y"] != 1 or others["self"] != 2:
        raise Drift(add, "add_lora_linear does more with the output, or with itself, than to hand them on")
    shrink, calls, others = _punica_method(source, "add_shrink", f"{SHRINK}(")
    call = ast.unparse(calls[0]) if len(calls) == 1 and not calls[0].keywords else ""
    if not call.startswith(f"{SHRINK}(x, lora_a_stacked, y, *self.token_mapping_meta.meta_args("):
        raise Drift(
            shrink, f"add_shrink does not call {SHRINK} once, with input, weights, buffer and token_mapping_meta"
        )
    for name in ("lora_a_stacked", "y", SHRINK):
        if others[name] != 1:
            raise Drift(shrink, f"add_shrink does more with {name} than to call the op")
    if "no_lora_flag_cpu: torch.Tensor" not in reading.source(METADATA).text:
        raise Drift(ast.Pass(), "the kernels' metadata has no no_lora_flag_cpu")


def _punica_method(source: Source, name: str, prefix: str) -> tuple[ast.FunctionDef, list[ast.Call], Counter[str]]:
    """A plain method of the wrapper, its calls that begin with `prefix`, and how often its code names what."""
    method = plain_function([cut(source, f"PunicaWrapperGPU.{name}")], name)
    if [argument.arg for argument in method.args.args] != PUNICA_METHODS[name]:
        raise Drift(method, f"{name} does not take {', '.join(PUNICA_METHODS[name])}")
    nodes = [node for statement in method.body for node in ast.walk(statement)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node).startswith(prefix)]
    return method, calls, Counter(node.id for node in nodes if isinstance(node, ast.Name))
