"""The operators of the model, and the one place that decides which kernel runs them.

    modulated_layernorm   LayerNorm(x) (1 + scale) + shift            x [B, N, D]
    self_attention        softmax(q kᵀ / √d + bias) v                 q, k, v [B, N, H, d]
    cross_attention       the same, image to ragged caption           q [B, N, H, d]   k, v [B, L, H, d]   lengths [B]

Every operator takes `backend`: "auto" decides by device capability (`resolve` says what and why, and
`python -m pixart_fast.env` prints it); a name insists on that backend and raises if it cannot serve. Nothing here reads
the environment or touches a device at import.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pixart_fast.kernels import reference

OPS = ("modulated_layernorm", "self_attention", "cross_attention")
BACKENDS = ("auto", "reference", "cpu")


class Choice(NamedTuple):
    name: str
    reason: str


@dataclass(frozen=True)
class Capability:
    """What the decisions depend on. `sm` is the compute capability of an NVIDIA GPU, None for any other device."""

    device: str
    sm: tuple[int, int] | None
    has_bf16: bool
    has_flash_attention: bool


def capability(device: torch.device | str) -> Capability:
    """The `Capability` of a torch device ("cpu", "cuda:1", …)."""
    device = torch.device(device)
    if device.type != "cuda":
        return Capability(device.type, None, torch.backends.mkldnn.is_available(), False)
    sm = torch.cuda.get_device_capability(device)
    # `torch.cuda.is_bf16_supported()` says yes on a V100, where bf16 is emulated.
    return Capability(torch.cuda.get_device_name(device), sm, sm >= (8, 0), sm >= (8, 0))


def precision_for(capability: Capability) -> str:
    """The training precision that a device is fastest at without losing accuracy: "bf16", "fp16" or "fp32"."""
    if capability.sm is None or capability.sm < (7, 0):
        return "fp32"
    return "bf16" if capability.has_bf16 else "fp16"


def attention_kernel(capability: Capability) -> str:
    """The kernel that scaled_dot_product_attention takes on a device, for maskless heads of 72 in half precision."""
    if capability.sm is None:
        return "flash (CPU)" if capability.device == "cpu" else "math"
    if not capability.has_flash_attention:
        return "memory-efficient"
    return "flash" if capability.sm < (9, 0) else "cuDNN or flash, in PyTorch's order"


def _load_native() -> str | None:
    """Loads the operators that CMakeLists.txt builds; returns what is wrong with them, or None."""
    library = Path(__file__).with_name("native.so")
    if not library.exists():
        return "the native operators are not built (run `pip install --no-build-isolation -e .` with a C++ compiler)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0].replace(f"{library.parent}/", "")
        return f"the native operators do not load ({reason}); run `pip install --no-build-isolation -e .` again"
    return None


native_problem = _load_native()


def _cpu_problem(op: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why the native CPU operators cannot serve, or None."""
    if op != "modulated_layernorm":
        return "it has no native CPU operator"
    if device.type != "cpu":
        return f"the data is on {device}"
    if dtype not in (None, torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    return native_problem


def resolve(
    op: str,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    needs_grad: bool = False,
) -> Choice:
    """The backend that `op` runs on, and the reason.

    Raises ValueError for an unknown op or backend, and RuntimeError for a requested backend that cannot serve: it never
    falls back silently.
    """
    if op not in OPS or backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r} of {op!r}: the operators are {OPS}, the backends {BACKENDS}")
    device = torch.device(device)
    if backend == "reference":
        return Choice("reference", "requested")
    problem = _cpu_problem(op, device, dtype)
    if backend == "cpu":
        if problem is not None:
            raise RuntimeError(f"{op} cannot run on backend 'cpu': {problem}; backend='auto' takes what is available")
        return Choice("cpu", "requested")
    if torch.compiler.is_compiling():
        return Choice("reference", "torch.compile fuses plain PyTorch with its neighbours")
    if op != "modulated_layernorm":
        return Choice("reference", "scaled_dot_product_attention")
    if problem is None and needs_grad:
        # B 4, N 256, D 1152 on one core: 10.3 ms forward and backward against 6.7, for the backward is plain PyTorch.
        return Choice("reference", "gradients are needed, and the native operator is native in the forward only")
    return Choice("reference", problem) if problem else Choice("cpu", "native operator, eager inference on the CPU")


def modulated_layernorm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, one modulation per sample (adaLN: DiT 3.2, PixArt-α 2.3).

    x            [B, N, D]             any floating dtype
    shift, scale [B, D] or [B, 1, D]   any floating dtype
    returns      [B, N, D]             x's dtype; statistics and arithmetic in fp32, rounded once

    Raises ValueError where the shapes do not fit, and see `resolve` for `backend`.
    """
    rows = (x.shape[0], x.shape[-1])
    if x.ndim != 3 or any(m.shape not in (rows, (rows[0], 1, rows[1])) for m in (shift, scale)):
        raise ValueError(
            "modulated_layernorm takes x [B, N, D] and shift, scale [B, D] or [B, 1, D], "
            f"not {list(x.shape)}, {list(shift.shape)}, {list(scale.shape)}"
        )
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or scale.requires_grad)
    if resolve("modulated_layernorm", backend, x.device, dtype=x.dtype, needs_grad=needs_grad).name == "cpu":
        y, _, _ = torch.ops.pixart_fast.modulated_layernorm(x, shift.reshape(rows), scale.reshape(rows), eps)
        return y
    return reference.modulated_layernorm(x, shift, scale, eps=eps)


def self_attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """softmax(q kᵀ / √d + bias) v for every head.

    q, k, v  [B, N, H, d]                       one floating dtype
    bias     broadcastable to [B, H, N, N]      added to the scores
    returns  [B, N, H, d]                       q's dtype

    Raises ValueError where the shapes do not fit, and see `resolve` for `backend`.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            "self_attention takes q, k, v [B, N, H, d] of one shape, "
            f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    resolve("self_attention", backend, q.device)
    return _attention(q, k, v, bias)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every image token to the tokens of its caption, ragged by `lengths` or by an additive `bias`.

    q        [B, N, H, d]         one floating dtype for q, k, v
    k, v     [B, L, H, d]         whatever they hold beyond a caption's length is ignored, NaN included
    lengths  int64 [B]            tokens that count; 0 gives zeros, and zero gradients
    bias     [B, L] or [B, 1, L]  added to the scores (diffusers: 0 for a token, -10000 for padding)
    returns  [B, N, H, d]         q's dtype

    Raises ValueError where the shapes do not fit or both lengths and bias are given, and see `resolve` for `backend`.
    """
    B, L = q.shape[0], k.shape[1]
    if q.ndim != 4 or k.shape != (B, L, *q.shape[2:]) or v.shape != k.shape:
        raise ValueError(
            "cross_attention takes q [B, N, H, d] and k, v [B, L, H, d], "
            f"not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if lengths is not None and bias is not None:
        raise ValueError("cross_attention takes lengths or bias, not both: they are two ways to say which tokens count")
    resolve("cross_attention", backend, q.device)
    if lengths is not None:
        if lengths.shape != (B,):
            raise ValueError(f"cross_attention takes lengths [B] with B = {B}, not {list(lengths.shape)}")
        k, v, bias = reference.drop_padding(k, v, lengths)
    elif bias is not None:
        if bias.shape not in ((B, L), (B, 1, L)):
            raise ValueError(f"cross_attention takes bias [B, L] or [B, 1, L] = [{B}, 1, {L}], not {list(bias.shape)}")
        bias = bias.reshape(B, 1, 1, L)
    return _attention(q, k, v, bias)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # In bf16 on a CPU, forward and backward of scaled_dot_product_attention take 9 times as long as plain products for
    # 16 tokens, 3 for 64, 1.8 for 256, and half as long for 1024, whose scores leave the cache (one core, torch 2.13).
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] * k.shape[1] <= 256 * 256:
        return reference.self_attention(q, k, v, bias=bias)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if bias is not None:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _modulated_layernorm_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


def _save_for_backward(ctx, inputs, output):
    x, shift, scale, eps = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.eps, ctx.shift_dtype = eps, shift.dtype


def _modulated_layernorm_backward(ctx, dy, dmean, drstd):
    """dx = rstd (g - mean(g) - x̂ mean(g x̂)), dshift = Σ dy, dscale = Σ dy x̂; x̂ = (x - mean) rstd, g = dy (1 + scale)"""
    x_stored, scale, mean, rstd = ctx.saved_tensors
    x, dy = x_stored.float(), dy.float()
    if torch.is_grad_enabled():  # a second derivative is asked for, and it goes through the statistics too
        mean = x.mean(-1, keepdim=True)
        rstd = (x.var(-1, correction=0, keepdim=True) + ctx.eps).rsqrt()
    else:
        mean, rstd = mean[:, :, None], rstd[:, :, None]
    x_hat = (x - mean) * rstd
    g = dy * (1 + scale[:, None].float())
    dx = rstd * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dshift, dscale = dy.sum(1), (dy * x_hat).sum(1)
    return dx.to(x_stored.dtype), dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None


if native_problem is None:
    torch.library.register_fake("pixart_fast::modulated_layernorm", _modulated_layernorm_fake)
    torch.library.register_autograd(
        "pixart_fast::modulated_layernorm", _modulated_layernorm_backward, setup_context=_save_for_backward
    )
