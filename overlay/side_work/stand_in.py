"""Upstream's own method runs with a stand-in for `self`: the real layer, but for what the patch does otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class StandIn:
    """The real layer. A subclass has methods in the place of some of its attributes.

    A plain class, because Dynamo traces through it (it does not trace wrapt.ObjectProxy or SimpleNamespace).
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def with_stand_in(original: Callable[..., Any], make: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function to set on the class in the place of `original`. `make` gives a layer's stand-in, or the layer to run stock.

    A plain function, because Dynamo drops a wrapt wrapper from what it traces, without a word (torch 2.11).
    """

    @functools.wraps(original)
    def method(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(make(self), *args, **kwargs)

    return method
