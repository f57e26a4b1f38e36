"""The operators' cases: operands at the model's shapes, least bytes and arithmetic, and every path to compare with.

All of XL/2 by default: D 1152, 16 heads of 72. "ours" is `pixart_fast.ops` with the backend that it chooses. A package
that is not installed is named as such in its row; nothing is installed for a benchmark.
"""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import cost
from bench.cost import Cost, total
from bench.measure import Case, Operands, Path
from pixart_fast import env, ops

EPS = 1e-6
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def installed(package: str, module: str) -> ModuleType | str:
    """An optional module, or the sentence for its row."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        return f"{package} is not installed" if name == module.partition(".")[0] else f"{package}: {error}"


def chosen(op: str, passes: str, dtype: torch.dtype, device: torch.device, scores: int | None = None) -> str:
    """The backend that "ours" runs on."""
    return ops.resolve(op, "auto", device, dtype=dtype, needs_grad=passes != "forward", scores=scores).name


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def sizes(**dims: int) -> str:
    return " ".join(f"{name}{size}" for name, size in dims.items())


def modulated_layernorm(passes: str, B: int, N: int, dtype: torch.dtype, device: torch.device, D: int = 1152) -> Case:
    """x1 = x + gate residual, LayerNorm(x1) (1 + scale) + shift, the block's rows in fp32; all gradients."""

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        random = partial(torch.randn, generator=generator, device=device)
        grad = passes != "forward"
        x, residual, dx1, dy = (random(B, N, D).add_(3 * (i == 0)).to(dtype) for i in range(4))
        # Leaves of their own: the gradients of slicing, the same for every path, are not part of the operator.
        samples, rows = random(B, 6, D).to(dtype).unbind(1), random(6, D).unbind(0)
        operands = (x, residual, samples[2], rows[2], samples[0], rows[0], samples[1], rows[1])
        return tuple(operand.detach().requires_grad_(grad) for operand in operands), (dx1, dy)

    def before(x: Tensor, residual: Tensor, gate: Tensor, gate_row: Tensor) -> Tensor:
        return x + (gate + gate_row).to(x.dtype)[:, None] * residual

    def after(y: Tensor, shift: Tensor, shift_row: Tensor, scale: Tensor, scale_row: Tensor) -> Tensor:
        shift, scale = (shift + shift_row).to(y.dtype)[:, None], (scale + scale_row).to(y.dtype)[:, None]
        return y * (1 + scale) + shift

    def plain(x, residual, gate, gate_row, *modulation: Tensor) -> tuple[Tensor, Tensor]:
        x1 = before(x, residual, gate, gate_row)
        return x1, after(F.layer_norm(x1, (D,), eps=EPS), *modulation)

    def around(layer_norm: Callable[[Tensor], Tensor]) -> Path:
        """A fused LayerNorm of another library, what surrounds it compiled."""
        first, last = compiled(before), compiled(after)

        def function(x, residual, gate, gate_row, *modulation: Tensor) -> tuple[Tensor, Tensor]:
            x1 = first(x, residual, gate, gate_row)
            return x1, last(layer_norm(x1), *modulation)

        return Path(function)

    def ours(x, residual, gate, gate_row, shift, shift_row, scale, scale_row) -> tuple[Tensor, Tensor]:
        shift, scale = ops.Row(shift, shift_row), ops.Row(scale, scale_row)
        return ops.modulated_layernorm(x, shift, scale, residual=residual, gate=ops.Row(gate, gate_row), eps=EPS)

    paths: dict[str, Path | str] = {
        "ours": Path(ours),
        "eager": Path(plain),
        "compiled": Path(compiled(plain)),
    }
    if device.type == "cuda":
        for name, found in (("apex", _apex(D)), ("liger", _liger(D, dtype, device))):
            paths[name] = found if isinstance(found, str) else around(found)
    least = total(cost.modulated_layernorm(B * N, D, dtype.itemsize, passes)).bytes
    return Case(
        "modulated_layernorm", passes, sizes(B=B, N=N, D=D), dtype, device, inputs, (Path(plain),), paths,
        chosen("modulated_layernorm", passes, dtype, device), least,
    )  # fmt: skip


def _apex(D: int) -> Callable[[Tensor], Tensor] | str:
    found = env.apex()
    if found.startswith("not installed"):
        return f"apex: {found}"
    return importlib.import_module("apex.normalization").FusedLayerNorm(D, eps=EPS, elementwise_affine=False)


def _liger(D: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor] | str:
    found = installed("liger-kernel", "liger_kernel.transformers.functional")
    if isinstance(found, str):
        return found
    one, zero = torch.ones(D, device=device, dtype=dtype), torch.zeros(D, device=device, dtype=dtype)
    return lambda x1: found.liger_layer_norm(x1, one, zero, EPS)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _sdpa_of(backend: SDPBackend) -> Callable[..., Tensor]:
    def function(*operands: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(*operands)

    return function


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a flash-attn function: some versions return the log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


def self_attention(
    passes: str, B: int, N: int, dtype: torch.dtype, device: torch.device, H: int = 16, d: int = 72
) -> Case:
    """softmax(q kᵀ / √d) v among image tokens: what `ops.self_attention` chose against every kernel there is."""

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        q, k, v, do = (torch.randn(B, N, H, d, generator=generator, device=device).to(dtype) for _ in range(4))
        return tuple(tensor.requires_grad_(passes != "forward") for tensor in (q, k, v)), (do,)

    plain = (Path(ops.reference.self_attention), Path(_sdpa))
    paths: dict[str, Path | str] = {"ours": Path(ops.self_attention), "SDPA": Path(_sdpa)}
    if device.type == "cuda":
        paths |= {name: Path(_sdpa_of(backend)) for name, backend in SDPA.items()}
        for name, module in (
            ("flash-attn 2", "flash_attn"),
            ("flash-attn 3", "flash_attn_interface"),
            ("flash-attn 4", "flash_attn.cute"),
        ):
            found = installed(name, module)
            paths[name] = found if isinstance(found, str) else Path(_flash(found))
    least = total(cost.attention(B * N * H * d, B * N * H * d, B * H * N * N * d, dtype.itemsize, passes))
    return Case(
        "self_attention", passes, sizes(B=B, N=N, H=H, d=d), dtype, device, inputs, plain, paths,
        chosen("self_attention", passes, dtype, device, N * N), least.bytes, least.flops, by_sample=True,
    )  # fmt: skip


def _flash(module: ModuleType) -> Callable[..., Tensor]:
    return lambda q, k, v: _first(module.flash_attn_func(q, k, v))


def cross_attention(
    passes: str,
    B: int,
    N: int,
    dtype: torch.dtype,
    device: torch.device,
    L: int = 120,
    H: int = 16,
    d: int = 72,
) -> Case:
    """Attention to captions of 1 to L tokens, padded to L; the costs are those of the tokens that there are."""
    lengths = torch.randint(1, L + 1, (B,), generator=torch.Generator().manual_seed(0))
    tokens = int(lengths.sum())
    lengths = lengths.to(device)

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        random = partial(torch.randn, generator=generator, device=device)
        q, do = (random(B, N, H, d).to(dtype) for _ in range(2))
        k, v = (random(B, L, H, d).to(dtype) for _ in range(2))
        return (*(tensor.requires_grad_(passes != "forward") for tensor in (q, k, v)), lengths), (do,)

    def plain(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return ops.reference.cross_attention(q, k, v, lengths=lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return ops.cross_attention(q, k, v, lengths=lengths)

    def masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Operands:
        return q, k, v, (torch.arange(L, device=device) < lengths[:, None])[:, None, None]

    paths: dict[str, Path | str] = {
        "ours": Path(ours),
        "eager": Path(plain),
        "compiled": Path(compiled(plain)),
        "SDPA": Path(_sdpa, masked),
    }
    if device.type == "cuda":
        paths |= {name: Path(_sdpa_of(backend), masked) for name, backend in SDPA.items()}
        paths["FlexAttention"] = _flex(L)
        for name, package, module, function in (
            ("PyTorch varlen", "torch.nn.attention.varlen", "torch.nn.attention.varlen", "varlen_attn"),
            ("flash-attn 2 varlen", "flash-attn 2", "flash_attn", "flash_attn_varlen_func"),
            ("flash-attn 3 varlen", "flash-attn 3", "flash_attn_interface", "flash_attn_varlen_func"),
        ):
            found = installed(package, module)
            paths[name] = found if isinstance(found, str) else _varlen(getattr(found, function), L)
    least = total(cost.attention(B * N * H * d, tokens * H * d, N * tokens * H * d, dtype.itemsize, passes))
    return Case(
        "cross_attention", passes, sizes(B=B, N=N, L=L, H=H, d=d), dtype, device, inputs,
        (Path(plain), Path(_sdpa, masked)), paths, chosen("cross_attention", passes, dtype, device, N * L),
        least.bytes, least.flops, by_sample=True,
    )  # fmt: skip


def _flex(L: int) -> Path:
    attention = compiled(flex_attention)

    def pack(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Operands:
        def is_token(sample, head, query, token):
            return token < lengths[sample]

        return q, k, v, create_block_mask(is_token, q.shape[0], None, q.shape[1], L, device=str(q.device))

    def function(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attention(q, k, v, block_mask=mask).transpose(1, 2)

    return Path(function, pack)


def _varlen(attention: Callable[..., Tensor | tuple[Tensor, ...]], L: int) -> Path:
    """A variable-length attention: k and v come without padding, as a model made for it would have them."""

    def kept(k: Tensor, lengths: Tensor) -> Tensor:
        return torch.arange(L, device=k.device) < lengths[:, None]

    def pack(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Operands:
        B, N = q.shape[:2]
        k, v = (tensor.detach()[kept(k, lengths)].requires_grad_(tensor.requires_grad) for tensor in (k, v))
        starts = torch.arange(0, B * N + 1, N, device=q.device, dtype=torch.int32)
        return q, k, v, starts, F.pad(lengths.cumsum(0), (1, 0)).int()

    def function(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor) -> Tensor:
        return _first(attention(q.flatten(0, 1), k, v, starts_q, starts_k, q.shape[1], L)).view_as(q)

    def unpack(gradients: tuple[Tensor, ...], operands: Operands) -> tuple[Tensor, ...]:
        dq, *dkv = gradients
        padded = [torch.zeros_like(k.detach()).masked_scatter(kept(k, operands[3])[:, :, None, None], dk)
                  for k, dk in zip(operands[1:3], dkv, strict=True)]  # fmt: skip
        return dq, *padded

    return Path(function, pack, unpack)


def gated_linear(B: int, N: int, K: int, dtype: torch.dtype, device: torch.device, D: int = 1152) -> Case:
    """residual + gate (a Wᵀ + bias), against the matrix product of the library with the rest behind it."""

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        random = partial(torch.randn, generator=generator, device=device)
        gate, row = random(B, 6, D).to(dtype)[:, 2], random(6, D)[2]
        weight, bias = (random(D, K) * K**-0.5).to(dtype), random(D).to(dtype)
        return (random(B, N, K).to(dtype), weight, bias, random(B, N, D).to(dtype), gate, row), ()

    def plain(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor, row: Tensor) -> Tensor:
        return residual + (gate + row).to(residual.dtype)[:, None] * F.linear(a, weight, bias)

    def ours(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor, row: Tensor) -> Tensor:
        return ops.gated_linear(residual, ops.Row(gate, row), a, weight, bias)

    least = total(cost.gated_linear(B * N, K, D, dtype.itemsize))
    return _linear_case("gated_linear", B, N, K, D, dtype, device, inputs, plain, ours, least)


def linear_gelu(B: int, N: int, dtype: torch.dtype, device: torch.device, K: int = 1152, D: int = 4608) -> Case:
    """gelu_tanh(a Wᵀ + bias), the first product of the feed-forward."""

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        random = partial(torch.randn, generator=generator, device=device)
        weight, bias = (random(D, K) * K**-0.5).to(dtype), random(D).to(dtype)
        return (random(B, N, K).to(dtype), weight, bias), ()

    def plain(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(a, weight, bias), approximate="tanh")

    least = total(cost.linear_gelu(B * N, K, D, dtype.itemsize))
    return _linear_case("linear_gelu", B, N, K, D, dtype, device, inputs, plain, ops.linear_gelu, least)


def _linear_case(
    op: str,
    B: int,
    N: int,
    K: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    inputs,
    plain,
    ours,
    least: Cost,
) -> Case:
    paths = {"ours": Path(ours), "eager": Path(plain), "compiled": Path(compiled(plain))}
    return Case(
        op, "forward", sizes(B=B, N=N, K=K, D=D), dtype, device, inputs, (Path(plain),), paths,
        chosen(op, "forward", dtype, device), least.bytes, least.flops,
    )  # fmt: skip
