"""Matrix products with what follows them in the block folded into the store (Triton, inference only).

    gated_linear   residual + (gate + gate_row) (a weightᵀ + bias)   the output projection of self-attention, and fc2
    linear_gelu    gelu(a weightᵀ + bias), tanh form                 fc1

(DiT 3.2 and PixArt-α Figure 4: the gate α behind self-attention and behind the feed-forward, Linear, GELU, Linear.)

    name       shape      dtype           stride
    a          [B, N, K]  T               any, made contiguous
    weight     [D, K]     T               any, made contiguous
    bias       [D]        any floating    any, made contiguous; or None
    residual   [B, N, D]  any floating    any, made contiguous
    gate       [B, D]     any floating    last 1, as a view of the condition [B, 6, D] has it
    gate_row   [D]        any floating    last 1, as a view of scale_shift_table [6, D] has it; or None
    returned   [B, N, D]  residual's; T of linear_gelu        contiguous

T is bf16, fp16 or fp32 (products of fp32 are IEEE, not TF32). Sums, bias, gate and GELU are fp32, rounded once, at the
store. Nothing is saved: there is no backward. Inductor leaves the product to cuBLAS and needs a second kernel, which
reads the product back: [B, N, D] written and read once more for nothing.

A tile of rows never leaves its sample, so that its gate is one row: 172 registers on sm_90 instead of 222 with a gate
per row. Rows beyond the end of a sample are computed in vain: none at N = 256, 1024 or 4096, 10 % at N = 231.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What one program computes, BLOCK_N tokens by BLOCK_D features in steps of BLOCK_K, and with what."""

    block_n: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int


# Half precision, from sm_80 on: before it `tl.dot` is FMA. The large tile takes 64 KB of shared memory there (sm_86 and
# sm_89 have 99 KB) and 96 KB on sm_90.
TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3))
# fp32 products have no tensor cores under IEEE rounding: half the tile, for twice the bytes.
TILE_FP32 = Tile(64, 64, 32, 4, 2)
# Fewer large tiles than multiprocessors (A100 108, H100 and H200 132) leave some idle: then small ones.
MULTIPROCESSORS = {80: 108, 90: 132}
# Tiles of tokens that run side by side before the next features, so that they share weights in the L2 cache.
GROUP_N = tl.constexpr(8)

SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2 / math.pi))
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _tile_of(program, B, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sample, first token and first feature of a program: GROUP_N tiles of rows go along the features together."""
    tiles_of_sample, tiles_d = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    group = program // (GROUP_N * tiles_d)
    inside = program % (GROUP_N * tiles_d)
    members = tl.minimum(B * tiles_of_sample - group * GROUP_N, GROUP_N)
    tile = group * GROUP_N + inside % members
    return tile // tiles_of_sample, tile % tiles_of_sample * BLOCK_N, inside // members * BLOCK_D


@triton.jit
def _product(
    a_ptr,
    weight_ptr,
    bias_ptr,
    row,
    n,
    d,
    N,
    D,
    K,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
):
    """a weightᵀ + bias of the tokens n and features d of the sample that begins at row, fp32."""
    # Rows and features beyond the end read the last one again: cheaper than a mask in the loop, and never stored.
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row * K + tl.minimum(n, N - 1)[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + tl.minimum(d, D - 1)[:, None] * K + k[None, :]
    y = tl.zeros((n.shape[0], d.shape[0]), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if MASK_K:
            keep = (start + k < K)[None, :]
            a = tl.load(a_ptrs, mask=keep, other=0.0)
            weight = tl.load(weight_ptrs, mask=keep, other=0.0)
        else:
            a = tl.load(a_ptrs)
            weight = tl.load(weight_ptrs)
        y = tl.dot(a, tl.trans(weight), y, input_precision="ieee")
        a_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _gelu_tanh(x):
    """x (1 + tanh(u)) / 2 with u = √(2/π) (x + 0.044715 x³), written x / (1 + exp(-2u)): no libdevice, no cancellation.

    exp overflows to infinity for u < -44, and x / inf is the 0 that is meant.
    """
    u = x * (1 + 0.044715 * x * x) * SQRT_2_OVER_PI
    return x / (1 + tl.exp2(u * (-2 * LOG2_E)))


@triton.jit(do_not_specialize=["B", "N"])
def _gated_linear_kernel(
    a_ptr,  # [B, N, K]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    residual_ptr,  # [B, N, D]
    gate_ptr,  # [B, D], rows gate_stride apart
    gate_row_ptr,  # [D] or None
    y_ptr,  # [B, N, D]
    gate_stride,
    B,
    N,
    D,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
):
    sample, first_n, first_d = _tile_of(tl.program_id(0), B, N, D, BLOCK_N, BLOCK_D)
    n, d = first_n + tl.arange(0, BLOCK_N), first_d + tl.arange(0, BLOCK_D)
    row = sample.to(tl.int64) * N  # 128 samples of 4096 tokens times 4608 is more than 2^31
    y = _product(a_ptr, weight_ptr, bias_ptr, row, n, d, N, D, K, BLOCK_K, MASK_K)
    gate = tl.load(gate_ptr + sample * gate_stride + d, mask=d < D, other=0.0).to(tl.float32)
    if gate_row_ptr is not None:
        gate += tl.load(gate_row_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    keep = (n < N)[:, None] & (d < D)[None, :]
    tile = row * D + n[:, None] * D + d[None, :]
    residual = tl.load(residual_ptr + tile, mask=keep, other=0.0).to(tl.float32)
    tl.store(y_ptr + tile, (residual + gate[None, :] * y).to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["B", "N"])
def _linear_gelu_kernel(
    a_ptr,  # [B, N, K]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    y_ptr,  # [B, N, D]
    B,
    N,
    D,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
):
    sample, first_n, first_d = _tile_of(tl.program_id(0), B, N, D, BLOCK_N, BLOCK_D)
    n, d = first_n + tl.arange(0, BLOCK_N), first_d + tl.arange(0, BLOCK_D)
    row = sample.to(tl.int64) * N
    y = _product(a_ptr, weight_ptr, bias_ptr, row, n, d, N, D, K, BLOCK_K, MASK_K)
    keep = (n < N)[:, None] & (d < D)[None, :]
    tl.store(y_ptr + row * D + n[:, None] * D + d[None, :], _gelu_tanh(y).to(y_ptr.dtype.element_ty), mask=keep)


def tile_for(B: int, N: int, D: int, dtype: torch.dtype, sm: int) -> Tile:
    """The tile for B samples of N tokens and D features on compute capability sm (80 for 8.0).

    The large one if there are enough of them for every multiprocessor. Raises RuntimeError below sm_80.
    """
    if sm < 80:
        raise RuntimeError(
            f"the Triton matrix products need sm_80 or later, not sm_{sm}: before it they would run without tensor "
            "cores; the plain product of PyTorch uses them there"
        )
    if dtype == torch.float32:
        return TILE_FP32
    large, small = TILES
    return large if _programs(large, B, N, D) >= MULTIPROCESSORS[90 if sm >= 90 else 80] else small


def _programs(tile: Tile, B: int, N: int, D: int) -> int:
    return B * triton.cdiv(N, tile.block_n) * triton.cdiv(D, tile.block_d)


def _sm(device: torch.device) -> int:
    # In Triton's interpreter the data is on the CPU, and any tile runs.
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def _constexprs(tile: Tile, K: int) -> dict[str, Any]:
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d, "BLOCK_K": tile.block_k}
    return {**blocks, "MASK_K": K % tile.block_k != 0}


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def gated_linear(
    a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gate: Tensor, gate_row: Tensor | None
) -> Tensor:
    """residual + (gate + gate_row) (a weightᵀ + bias) -> [B, N, D] of residual's dtype; operands as in the table above.

    Raises RuntimeError below sm_80.
    """
    (B, N, K), D = a.shape, weight.shape[0]
    tile = tile_for(B, N, D, a.dtype, _sm(a.device))
    a, weight, residual = a.contiguous(), weight.contiguous(), residual.contiguous()
    bias, gate, gate_row = _dense(bias), _dense(gate), _dense(gate_row)
    y = torch.empty_like(residual)
    sizes = (gate.stride(0), B, N, D, K)
    with torch.cuda.device_of(a):
        _gated_linear_kernel[(_programs(tile, B, N, D),)](
            a, weight, bias, residual, gate, gate_row, y, *sizes, **_constexprs(tile, K), **_options(tile)
        )
    return y


def linear_gelu(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(a weightᵀ + bias), tanh form -> [B, N, D] of a's dtype; operands as in the table above.

    Raises RuntimeError below sm_80.
    """
    (B, N, K), D = a.shape, weight.shape[0]
    tile = tile_for(B, N, D, a.dtype, _sm(a.device))
    a, weight, bias = a.contiguous(), weight.contiguous(), _dense(bias)
    y = torch.empty(B, N, D, dtype=a.dtype, device=a.device)
    with torch.cuda.device_of(a):
        _linear_gelu_kernel[(_programs(tile, B, N, D),)](
            a, weight, bias, y, B, N, D, K, **_constexprs(tile, K), **_options(tile)
        )
    return y


def variants(sm: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(label, kernel, signature, constexprs, options) of every launch on sm at XL/2's shapes in bf16; none below sm_80.

    K is 1152 of fc1 and of the projection and 4608 of fc2, in one compiled kernel. "i32:16" is a multiple of 16.
    """
    if sm < 80:
        return
    data = {"a_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16"}
    gated = {"residual_ptr": "*bf16", "gate_ptr": "*bf16", "gate_row_ptr": "*bf16", "gate_stride": "i32:16"}
    rest = {"y_ptr": "*bf16", "B": "i32", "N": "i32", "D": "i32:16", "K": "i32:16"}
    for tile in TILES:
        label = f"{tile.block_n}x{tile.block_d}x{tile.block_k}"
        constexprs, options = _constexprs(tile, 1152), _options(tile)
        yield f"gated_linear {label}", _gated_linear_kernel, {**data, **gated, **rest}, constexprs, options
        yield f"linear_gelu {label}", _linear_gelu_kernel, {**data, **rest}, constexprs, options
