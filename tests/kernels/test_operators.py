"""The Triton kernels as PyTorch operators: schema, shapes without data, gradients, dynamic tracing (`opcheck`)."""

import pytest
import torch

from pixart_fast import ops  # noqa: F401 - registers what is checked
from tests.kernels.conftest import DEVICE

B, N, L, H, D = 2, 3, 5, 2, 32


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_(grad)


def layernorm_arguments(grad: bool, gated: bool) -> list:
    shift, scale, gate, *_ = randn(B, 6, D, grad=grad).unbind(1)
    rows = randn(6, D, grad=grad).unbind(0)
    residual = [randn(B, N, D, grad=grad), gate, rows[2]] if gated else [None, None, None]
    return [randn(B, N, D, grad=grad), *residual, shift, rows[0], scale, rows[1], 1e-6]


def heads(tokens: int, grad: bool) -> torch.Tensor:
    return randn(B, tokens, H, D // H, grad=grad)


def arguments(name: str, grad: bool) -> list:
    if name.startswith("modulated_layernorm"):
        forward = layernorm_arguments(grad, gated=True)
        if name == "modulated_layernorm_quantized":
            return [*forward, torch.int8]
        if name == "modulated_layernorm":
            return forward
        x, residual, gate, gate_row, _, _, scale, scale_row, _ = forward
        return [x, x, x, randn(B, N), randn(B, N).exp(), scale, scale_row, residual, gate, gate_row]
    if name.startswith("cross_attention"):
        q, k, v, lengths = heads(N, grad), heads(L, grad), heads(L, grad), torch.tensor([L, 2], device=DEVICE)
        if name == "cross_attention":
            return [q, k, v, lengths]
        return [q, q, k, v, q, randn(B, H, N), lengths]
    a, weight, bias = randn(B, N, D), randn(D, D), randn(D)
    return [a, weight, bias, randn(B, N, D), randn(B, D), randn(D)] if name == "gated_linear" else [a, weight, bias]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["modulated_layernorm", "cross_attention"])
def test_differentiable(name, grad):
    torch.library.opcheck(getattr(torch.ops.pixart_fast, name).default, arguments(name, grad))


def test_without_a_residual():
    torch.library.opcheck(torch.ops.pixart_fast.modulated_layernorm.default, layernorm_arguments(True, gated=False))


@pytest.mark.parametrize(
    "name",
    [
        "modulated_layernorm_backward",
        "modulated_layernorm_quantized",
        "cross_attention_backward",
        "gated_linear",
        "linear_gelu",
    ],
)
def test_without_a_gradient(name):
    torch.library.opcheck(getattr(torch.ops.pixart_fast, name).default, arguments(name, False))
