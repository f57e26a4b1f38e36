"""Every operator in a few lines of torch: the specification that all kernels are tested against.

Differentiable, any floating dtype (float64 for the oracle of a test), any device. Interfaces are those of
`pixart_fast.ops`, which also checks the arguments.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated_layernorm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift (adaLN: DiT 3.2, PixArt-α 2.3), in fp32 (fp64 for fp64 data), rounded once.

    x [B, N, D]; shift, scale [B, D] or [B, 1, D] -> [B, N, D] of x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    shift, scale = (m.to(dtype).reshape(x.shape[0], 1, x.shape[2]) for m in (shift, scale))
    return (F.layer_norm(x.to(dtype), x.shape[2:], eps=eps) * (1 + scale) + shift).to(x.dtype)


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
