"""What the overlay reads of vLLM's linears: a size, and a method of quantization with its kernel."""

from __future__ import annotations

import types
from typing import Any


def linear(size: int, method: Any = None) -> Any:
    return types.SimpleNamespace(output_size_per_partition=size, quant_method=method)


def method_named(name: str, **attributes: Any) -> Any:
    instance = type(name, (), {})()
    vars(instance).update(attributes)
    return instance


def unquantized() -> Any:
    def default_unquantized_gemm() -> None: ...

    return method_named("UnquantizedLinearMethod", _gemm_impl=default_unquantized_gemm)


def marlin_make_workspace_new() -> object:
    return object()


class OwnWorkspace:
    def process_weights_after_loading(self, layer: Any) -> None:
        self.workspace = marlin_make_workspace_new()


class SharedWorkspace:
    def process_weights_after_loading(self, layer: Any) -> None:
        self.workspace = None  # it mentions one, and makes none
        layer.apply = lambda call: call(workspace=None)


def marlin(base: type) -> Any:
    return type("MarlinLinearKernel", (base,), {})()
