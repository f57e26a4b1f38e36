"""Every operator in a few lines of torch: the specification that all kernels are tested against.

Differentiable, any floating dtype (float64 for the oracle of a test), any device. Interfaces are those of
`pixart_fast.ops`, which also checks the arguments.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _wide(*tensors: Tensor) -> list[Tensor]:
    """fp32, or fp64 where one of them is."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def add_residual(x: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    """x + gate · residual, rounded once; x itself without a residual, and the gate is 1 where there is none."""
    if residual is None:
        return x
    if gate is None:
        return x + residual
    wide_x, wide_residual, gate = _wide(x, residual, gate.reshape(x.shape[0], 1, x.shape[2]))
    return (wide_x + gate * wide_residual).to(x.dtype)


def modulated_layernorm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x₁ = x + gate · residual and LayerNorm(x₁) (1 + scale) + shift (adaLN: DiT 3.2, PixArt-α 2.3).

    x, residual [B, N, D]; shift, scale, gate [B, D] or [B, 1, D] -> x₁, y [B, N, D] of x's dtype, in fp32 (fp64 for
    fp64 data) inside. LayerNorm sees the rounded x₁.
    """
    x1 = add_residual(x, residual, gate)
    return x1, _modulate(x1, shift, scale, eps).to(x.dtype)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    wide, shift, scale = _wide(x, *(m.reshape(x.shape[0], 1, x.shape[2]) for m in (shift, scale)))
    return F.layer_norm(wide, x.shape[2:], eps=eps) * (1 + scale) + shift


def modulated_layernorm_quantized(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `modulated_layernorm`, y as int8 or float8_e4m3fn with one fp32 scale per row: y · scale [B, N] is its value.

    A row's largest magnitude becomes 127, or 448 in fp8; a row of zeros has scale 1.
    """
    x1 = add_residual(x, residual, gate)
    y = _modulate(x1, shift, scale, eps)
    largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    y_scale = y.abs().amax(-1) / largest
    y_scale = torch.where(y_scale == 0, 1, y_scale)
    y = y / y_scale[..., None]
    return x1, (y.round() if dtype == torch.int8 else y).to(dtype), y_scale.float()


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v per head, the softmax in fp32 (fp64 for fp64 data).

    q [B, N, H, d]; k, v [B, L, H, d]; bias broadcastable to [B, H, N, L] -> [B, N, H, d]
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention of an image to the first `lengths[b]` tokens of its caption; an empty caption gives zeros.

    q [B, N, H, d]; k, v [B, L, H, d]; lengths int64 [B], or bias [B, L] or [B, 1, L] of the scores -> [B, N, H, d]
    """
    if lengths is not None:
        k, v, bias = drop_padding(k, v, lengths)
    elif bias is not None:
        bias = bias.reshape(k.shape[0], 1, 1, k.shape[1])
    return self_attention(q, k, v, bias=bias)


def drop_padding(k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a ragged batch, zero in the padding, and the bias [B, 1, 1, L] that takes it from the softmax.

    A caption of length 0 keeps one zeroed token, so that the output and all gradients are zero instead of NaN.
    Keys and values are zeroed, not only removed from the softmax, because padding that holds NaN would give 0 · NaN.
    """
    position = torch.arange(k.shape[1], device=k.device)
    padding = (position >= lengths[:, None])[:, :, None, None]
    removed = (position >= lengths.clamp(min=1)[:, None])[:, None, None, :]
    bias = torch.zeros_like(removed, dtype=k.dtype).masked_fill(removed, float("-inf"))
    return k.masked_fill(padding, 0), v.masked_fill(padding, 0), bias


def gated_linear(x: Tensor, gate: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + gate · (a Wᵀ + b): x [B, N, D], gate [B, D] or [B, 1, D], a [B, N, K], weight [D, K] -> [B, N, D]"""
    return x + gate.reshape(x.shape[0], 1, x.shape[2]) * F.linear(a, weight, bias)


def linear_gelu(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU(a Wᵀ + b) in its tanh approximation: a [B, N, K], weight [M, K] -> [B, N, M]"""
    return F.gelu(F.linear(a, weight, bias), approximate="tanh")
