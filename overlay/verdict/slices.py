"""Reading a method with `ast`: would it do the same with slices of a larger tensor as with tensors of its own?

The rows of a slice lie further apart. Torch's own operations read them where they are; a kernel behind a custom op may not.
So a tensor is followed through a method, by every name that it gets, until it is copied, asked for its shape, or taken
apart by columns: such parts are slices in upstream, too. Everything else is a doubt.
"""

from __future__ import annotations

import ast
from collections.abc import Collection

from overlay.verdict.shapes import attribute_of_self, binders

#: What a tensor may be asked: the answer is no view of it, or nothing of its memory.
READS = frozenset({"contiguous", "device", "dim", "dtype", "ndim", "numel", "shape", "size"})
#: What gives the same tensor in another shape, to be followed further.
VIEWS = frozenset({"flatten", "reshape", "unflatten", "view"})
#: What takes a tensor apart, as its method or as a function of torch.
PARTS = frozenset({"chunk", "split"})


def takes_slices(
    method: ast.FunctionDef,
    names: Collection[str],
    class_node: ast.ClassDef,
    excused: Collection[int] = (),
    callers: frozenset[str] = frozenset(),
) -> bool:
    """Whether a method of a class only reads the tensors that it knows by `names`, and each as it lies.

    Methods of the same class that are given one are read in the same way, but for its `callers`. Calls whose `id` is in
    `excused` may be given anything by position.
    """
    return _Follower(method, names, class_node, excused, callers | {method.name}).is_harmless()


class _Follower:
    """One method, and the names that a tensor has in it so far."""

    def __init__(
        self,
        method: ast.FunctionDef,
        names: Collection[str],
        class_node: ast.ClassDef,
        excused: Collection[int],
        open_methods: frozenset[str],
    ) -> None:
        self._method = method
        self._names = set(names)
        self._class = class_node
        self._excused = excused
        self._open_methods = open_methods
        self._parents = {child: parent for parent in ast.walk(method) for child in ast.iter_child_nodes(parent)}

    def is_harmless(self) -> bool:
        known = 0
        while known < len(self._names):  # a name that is found last may stand first in a loop
            known = len(self._names)
            for node in ast.walk(self._method):
                if not isinstance(node, ast.Name) or node.id not in self._names:
                    continue
                if isinstance(self._parents[node], ast.AugAssign):  # writes to it
                    return False
                if isinstance(node.ctx, ast.Load) and not self._use(node):
                    return False
        return True

    def _use(self, tensor: ast.expr) -> bool:
        """Whether what is done with an expression that is the tensor is harmless. Learns the names that it gets."""
        parent = self._parents[tensor]
        if isinstance(parent, ast.Attribute):
            return parent.attr in READS or self._method_of_tensor(parent)
        if isinstance(parent, ast.Assign):
            names = [target.id for target in parent.targets if isinstance(target, ast.Name)]
            self._names.update(names)
            return len(names) == len(parent.targets)
        return (
            isinstance(parent, ast.Call) and any(node is tensor for node in parent.args) and self._given(tensor, parent)
        )

    def _method_of_tensor(self, attribute: ast.Attribute) -> bool:
        call = self._parents[attribute]
        if not isinstance(call, ast.Call) or call.func is not attribute:
            return False
        if attribute.attr in PARTS:
            return _by_columns(call, 1)
        # A view of another number of rows can be made of a tensor of its own, and fails for a slice.
        if attribute.attr == "view" and not (
            call.args and isinstance(call.args[0], (ast.Starred, ast.Name, ast.Call, ast.Subscript))
        ):
            return False
        return attribute.attr in VIEWS and self._use(call)

    def _given(self, tensor: ast.expr, call: ast.Call) -> bool:
        """Whether a call may be given the tensor by position."""
        function = call.func
        if id(call) in self._excused:
            return True
        if not isinstance(function, ast.Attribute):
            return False
        if isinstance(function.value, ast.Name) and function.value.id == "torch" and function.attr in PARTS:
            return call.args[0] is tensor and _by_columns(call, 2)
        definitions = binders(self._class.body, function.attr)
        if not attribute_of_self(function) or len(definitions) != 1 or function.attr in self._open_methods:
            return False
        (helper,) = definitions
        if not isinstance(helper, ast.FunctionDef) or helper.decorator_list:
            return False
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return False
        parameters = [*helper.args.posonlyargs, *helper.args.args][1:]
        given = [
            parameter.arg for parameter, argument in zip(parameters, call.args, strict=False) if argument is tensor
        ]
        return bool(given) and takes_slices(helper, given, self._class, callers=self._open_methods)


def _by_columns(call: ast.Call, position: int) -> bool:
    """Whether a call that takes a tensor apart names a dimension, and not the first: by rows, parts are no slices."""
    by_name = [keyword.value for keyword in call.keywords if keyword.arg == "dim"]
    dimension = (by_name or call.args[position : position + 1] or [ast.Constant(0)])[0]
    try:
        number = ast.literal_eval(dimension)
    except ValueError:
        return False
    return isinstance(number, int) and (number == -1 or number > 0)
