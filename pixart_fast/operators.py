"""Schemas, shapes and gradients of the fused operators; who computes them is registered elsewhere.

    modulated_layernorm(_backward)   residual + gate, LayerNorm, modulate in one pass          CPU: C++    CUDA: Triton
    modulated_layernorm_quantized    the same with int8 or fp8 rows for the next product                    CUDA: Triton
    cross_attention(_backward)       flash attention to ragged captions                        CPU: C++    CUDA: Triton
    gated_linear, linear_gelu        matrix products with what follows them (inference)                     CUDA: Triton
    packed_linear                    oneDNN's product with the weight in its own layout        CPU: `pixart_fast.ops`

All are `torch.ops.pixart_fast.*`. They take plain tensors and trust them: `pixart_fast.ops` states and checks the
contract. A modulation comes as a pair, a row per sample `[B, D]` (a view of the condition `[B, 6, D]`) and a row of the
block `[D]` (a view of `scale_shift_table`), which the operators add in fp32: S⁽ⁱ⁾ = S̄ + E⁽ⁱ⁾ of PixArt-α section 2.3
without the sum in memory. Their results never share memory with their arguments; what does not exist is of shape [0].
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("pixart_fast", "FRAGMENT")

LAYERNORM_ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor? gate, Tensor? gate_row, Tensor shift, Tensor? shift_row, "
    "Tensor scale, Tensor? scale_row, float eps"
)
SCHEMAS = (
    f"modulated_layernorm({LAYERNORM_ARGUMENTS}) -> (Tensor x1, Tensor y, Tensor mean, Tensor rstd)",
    "modulated_layernorm_backward(Tensor? dx1, Tensor dy, Tensor x1, Tensor mean, Tensor rstd, Tensor scale, "
    "Tensor? scale_row, Tensor? residual, Tensor? gate, Tensor? gate_row) "
    "-> (Tensor dx, Tensor dresidual, Tensor dgate, Tensor dshift, Tensor dscale)",
    f"modulated_layernorm_quantized({LAYERNORM_ARGUMENTS}, ScalarType dtype) -> (Tensor x1, Tensor y, Tensor y_scale)",
    "cross_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths) -> (Tensor o, Tensor lse)",
    "cross_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? lengths) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    "gated_linear(Tensor a, Tensor weight, Tensor? bias, Tensor residual, Tensor gate, Tensor? gate_row) -> Tensor",
    "linear_gelu(Tensor a, Tensor weight, Tensor? bias) -> Tensor",
    "packed_linear(Tensor a, Tensor weight, Tensor? bias, bool gelu) -> Tensor",
)
for schema in SCHEMAS:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def _contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _modulated_layernorm_fake(x, residual, gate, gate_row, shift, shift_row, scale, scale_row, eps):
    x1 = x.new_empty(0) if residual is None else _contiguous_like(x)
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x1, _contiguous_like(x), statistics, torch.empty_like(statistics)


def _modulated_layernorm_backward_fake(dx1, dy, x1, mean, rstd, scale, scale_row, residual, gate, gate_row):
    def row() -> Tensor:
        return x1.new_empty((x1.shape[0], x1.shape[2]), dtype=torch.float32)

    gated = gate is not None
    dresidual = _contiguous_like(x1) if gated else x1.new_empty(0)
    return _contiguous_like(x1), dresidual, row() if gated else x1.new_empty(0, dtype=torch.float32), row(), row()


def _modulated_layernorm_quantized_fake(x, residual, gate, gate_row, shift, shift_row, scale, scale_row, eps, dtype):
    x1 = x.new_empty(0) if residual is None else _contiguous_like(x)
    return x1, _contiguous_like(x, dtype), x.new_empty(x.shape[:2], dtype=torch.float32)


def _cross_attention_fake(q, k, v, lengths):
    B, N, H, _ = q.shape
    return _contiguous_like(q), q.new_empty((B, H, N), dtype=torch.float32)


def _cross_attention_backward_fake(do, q, k, v, o, lse, lengths):
    return _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)


def _gated_linear_fake(a, weight, bias, residual, gate, gate_row):
    return _contiguous_like(residual)


def _linear_gelu_fake(a, weight, bias):
    return a.new_empty((*a.shape[:-1], weight.shape[0]))


def _packed_linear_fake(a, weight, bias, gelu):
    return _linear_gelu_fake(a, weight, bias)


def _total(sample: Tensor, row: Tensor | None) -> Tensor:
    """A modulation in fp32, `[B, 1, D]`."""
    return (sample.float() if row is None else sample.float() + row.float())[:, None]


def _modulated_layernorm_save(ctx, inputs, output):
    x, residual, gate, gate_row, shift, shift_row, scale, scale_row, ctx.eps = inputs
    x1, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    if residual is None:
        ctx.mark_non_differentiable(x1, mean, rstd)
        x1 = x
    else:
        ctx.mark_non_differentiable(mean, rstd)
    gated = residual if gate is not None else None
    ctx.save_for_backward(x1, mean, rstd, scale, scale_row, gated, gate, gate_row)
    ctx.has_residual = residual is not None
    ctx.shift_dtype, ctx.shift_row_dtype = shift.dtype, None if shift_row is None else shift_row.dtype


def _modulated_layernorm_formula(dx1, dy, x1, scale, residual, gate, eps):
    """The backward operator in differentiable torch, through the statistics too, for a second derivative."""
    x, dy = x1.float(), dy.float()
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    x_hat = (x - x.mean(-1, keepdim=True)) * rstd
    g = dy * (1 + scale)
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    if dx1 is not None:
        dx = dx + dx1
    dresidual = dgate = None
    if gate is not None:
        dresidual, dgate = (gate * dx).to(x1.dtype), (residual * dx).sum(1)
    return dx.to(x1.dtype), dresidual, dgate, dy.sum(1), (dy * x_hat).sum(1)


def _modulated_layernorm_backward(ctx, dx1, dy, dmean, drstd):
    x1, mean, rstd, scale, scale_row, residual, gate, gate_row = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x1)
    if torch.is_grad_enabled():
        dx, dresidual, dgate, dshift, dscale = _modulated_layernorm_formula(
            dx1, dy, x1, _total(scale, scale_row), residual, None if gate is None else _total(gate, gate_row), ctx.eps
        )
    else:
        dx, dresidual, dgate, dshift, dscale = torch.ops.pixart_fast.modulated_layernorm_backward(
            dx1, dy, x1, mean, rstd, scale, scale_row, residual, gate, gate_row
        )
    if gate is None:
        dresidual, dgate = dx if ctx.has_residual else None, None

    def of_row(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else gradient.sum(0).to(dtype)

    return (
        dx,
        dresidual,
        None if gate is None else dgate.to(gate.dtype),
        None if gate_row is None else of_row(dgate, gate_row.dtype),
        dshift.to(ctx.shift_dtype),
        of_row(dshift, ctx.shift_row_dtype),
        dscale.to(scale.dtype),
        of_row(dscale, None if scale_row is None else scale_row.dtype),
        None,
    )


def _cross_attention_save(ctx, inputs, output):
    q, k, v, lengths = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, o, lse, lengths)


def _cross_attention_formula(do, q, k, v, lengths):
    """The backward operator in differentiable torch, for a second derivative."""
    do, q, k, v = (t.float().transpose(1, 2) for t in (do, q, k, v))
    keep = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if lengths is not None:
        keep = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
    k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.mT * scale).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    p = scores.softmax(-1) * keep[:, None, None]
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return tuple(gradient.transpose(1, 2) for gradient in (ds @ k, ds.mT @ q, p.mT @ do))


def _cross_attention_backward(ctx, do, dlse):
    q, k, v, o, lse, lengths = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients = _cross_attention_formula(do, q, k, v, lengths)
        return *(gradient.to(q.dtype) for gradient in gradients), None
    return *torch.ops.pixart_fast.cross_attention_backward(do, q, k, v, o, lse, lengths), None


for name, fake in {
    "modulated_layernorm": _modulated_layernorm_fake,
    "modulated_layernorm_backward": _modulated_layernorm_backward_fake,
    "modulated_layernorm_quantized": _modulated_layernorm_quantized_fake,
    "cross_attention": _cross_attention_fake,
    "cross_attention_backward": _cross_attention_backward_fake,
    "gated_linear": _gated_linear_fake,
    "linear_gelu": _linear_gelu_fake,
    "packed_linear": _packed_linear_fake,
}.items():
    torch.library.register_fake(f"pixart_fast::{name}", fake, lib=LIBRARY)
torch.library.register_autograd(
    "pixart_fast::modulated_layernorm",
    _modulated_layernorm_backward,
    setup_context=_modulated_layernorm_save,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "pixart_fast::cross_attention", _cross_attention_backward, setup_context=_cross_attention_save, lib=LIBRARY
)


@register_flop_formula(torch.ops.pixart_fast.cross_attention)
def _cross_attention_flops(q_shape, k_shape, *shapes, **options) -> int:
    """Two products; padding of a ragged caption counts, since lengths are not known here."""
    B, N, H, d = q_shape
    return 4 * B * H * N * k_shape[1] * d


@register_flop_formula(torch.ops.pixart_fast.cross_attention_backward)
def _cross_attention_backward_flops(do_shape, q_shape, k_shape, *shapes, **options) -> int:
    """Five products."""
    return _cross_attention_flops(q_shape, k_shape) // 2 * 5


@register_flop_formula(torch.ops.pixart_fast.packed_linear)
def _packed_linear_flops(a_shape, weight_shape, *shapes, **options) -> int:
    """One product."""
    return 2 * math.prod(a_shape) * weight_shape[0]
