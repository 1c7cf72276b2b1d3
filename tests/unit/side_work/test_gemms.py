"""Which linears may be side work, and what main is called."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from overlay.side_work import gemms
from overlay.side_work.adoption import StaysStock
from overlay.side_work.gemms import gemm_of
from tests.unit.linears import OwnWorkspace, SharedWorkspace, linear, marlin, method_named, unquantized

namespace = types.SimpleNamespace


def test_a_side_is_torchs_gemm_or_marlin() -> None:
    assert gemm_of(linear(8, unquantized())) == gemms.TORCH_GEMM
    own = method_named("GPTQMarlinLinearMethod", kernel=marlin(OwnWorkspace))
    assert gemm_of(linear(8, own)) == "GPTQMarlinLinearMethod with MarlinLinearKernel"


@pytest.mark.parametrize("by_stream", [True, False], ids=["0.31 and later", "before"])
def test_marlin_without_a_workspace_of_its_own_needs_locks_that_belong_to_a_stream(
    by_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemms, "_marlin_locks_belong_to_a_stream", lambda: by_stream)
    shared = linear(8, method_named("AutoGPTQLinearMethod", kernel=marlin(SharedWorkspace)))
    if by_stream:
        assert gemm_of(shared) == "AutoGPTQLinearMethod with MarlinLinearKernel"
    else:
        with pytest.raises(StaysStock, match="shares one workspace"):
            gemm_of(shared)


def test_vllms_own_function_says_whose_locks_they_are() -> None:
    """0.32.0, which is installed here, has `get_marlin_workspace`."""
    assert gemms._marlin_locks_belong_to_a_stream()


def cuda_flashinfer_bf16_gemm() -> None: ...


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (method_named("Fp8LinearMethod"), "Fp8LinearMethod is not on the allowlist"),
        (method_named("AutoGPTQLinearMethod", kernel=method_named("MacheteLinearKernel")), "with MacheteLinearKernel"),
        (method_named("UnquantizedLinearMethod", _gemm_impl=cuda_flashinfer_bf16_gemm), "cuda_flashinfer_bf16_gemm"),
    ],
)
def test_every_other_side_is_refused_by_name(method: Any, reason: str) -> None:
    with pytest.raises(StaysStock, match=reason):
        gemm_of(linear(8, method))


@given(st.permutations(range(1, 4)))
def test_the_gate_is_the_largest_parameter_wherever_it_stands(rows: list[int]) -> None:
    """Scales and zero points may be registered before the weight. The GEMM reads all of the weight."""
    main = torch.nn.Module()
    for size in rows:
        main.register_parameter(f"of_{size}", torch.nn.Parameter(torch.zeros(size, 16), requires_grad=False))
    assert gemms.gate_of(main) == "of_3"


@pytest.mark.parametrize("holder", ["quant_method", "scheme"])
@pytest.mark.parametrize("attribute", ["kernel", "fp8_linear", "w8a8_block_fp8_linear"])
def test_the_kind_of_main_names_method_scheme_and_kernel(holder: str, attribute: str) -> None:
    """Layers of another kernel have a plan of their own."""
    main = namespace(quant_method=method_named("Method"), scheme=method_named("Scheme"))
    setattr(getattr(main, holder), attribute, method_named("Kernel"))
    assert gemms.main_kind(main) == "Method Scheme Kernel"
    assert gemms.main_kind(namespace(quant_method=method_named("Method"))) == "Method"


def test_a_gemm_that_its_method_does_not_hold_is_what_vllm_dispatches_to(monkeypatch: pytest.MonkeyPatch) -> None:
    side = linear(8, method_named("UnquantizedLinearMethod"))
    monkeypatch.setattr(gemms, "dispatch_unquantized_gemm", lambda: unquantized()._gemm_impl)
    assert gemm_of(side) == gemms.TORCH_GEMM
    monkeypatch.setattr(gemms, "dispatch_unquantized_gemm", lambda: cuda_flashinfer_bf16_gemm)
    with pytest.raises(StaysStock, match="cuda_flashinfer_bf16_gemm"):
        gemm_of(side)
