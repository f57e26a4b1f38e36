"""Flash attention of an image to its ragged caption, forward and backward, in Triton.

    s = q kᵀ / √d   over the first lengths[b] tokens      p = exp(s - lse)      o = p v

    name     shape             dtype             strides
    q        [B, N, H, d]      fp32, fp16, bf16  last 1 (else copied), others free
    k, v     [B, L, H, d]      q's               last 1 (else copied), others free: views of one fused projection
    lengths  [B]               int64 or None     1
    o        [B, N, H, d]      q's               contiguous
    lse      [B, H, N]         fp32              contiguous; natural logarithm; -inf for an empty caption, whose o is 0

FlashAttention (Dao et al. 2022, algorithms 1 and 4; 2023, section 3.1) for a text of some hundred tokens. Saved for the
backward: q, k, v, o, lse. Why not a library's kernel or Inductor:
- A head of 72 is worked on as 64 + 16 columns (two products into one score tile, two output tiles), where padding to
  96 or 128 would cost 1.2 or 1.6 times as many tensor-core instructions, and spill registers.
- Tiles of a caption's padding are not computed, and what padding holds, NaN included, never matters.
- On Hopper a text of one tile needs neither o nor rowsum(do · o) in its backward: that sum is rowsum(p · dp), and p and
  dp are there. dq, dk and dv then come from one pass over q and do, five products instead of seven.

Sums are in fp32, each output is rounded once, and no sum depends on the order in which programs run.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two
ONE_TILE = 128  # tokens: as many as the backward in one pass holds at a time (PixArt-α's captions are at most 120)
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors: with fewer programs, tiles get smaller


class Schedule(NamedTuple):
    """Tile sizes and compile options of one launch."""

    BLOCK_N: int
    BLOCK_L: int
    num_warps: int
    num_stages: int


class Head(NamedTuple):
    """A head of HEAD columns as MAIN + TAIL: MAIN a power of two, TAIL 0 or a power of two, masked at HEAD."""

    HEAD: int
    MAIN: int
    TAIL: int


def head_split(d: int) -> Head:
    """72 as 64 + 16. A tensor-core product takes at least 16 columns."""
    main = max(16, 1 << d.bit_length() - 1)
    return Head(d, main, max(16, triton.next_power_of_2(d - main)) if d > main else 0)


def value_tail(sm: int, head: Head) -> int:
    """Columns of the tail in p v, which no product sums over: 8 fit a head of 72, but are no wgmma on Hopper."""
    return 8 if sm // 10 == 8 and head.HEAD - head.MAIN == 8 else head.TAIL


def schedules(
    sm: int, B: int, N: int, H: int, L: int, d: int, dtype: torch.dtype
) -> tuple[Schedule, Schedule | None, Schedule]:
    """How the kernels of o, of dq, and of dk and dv are tiled on compute capability `sm` (90 for 9.0).

    None for dq where the last kernel has it too, in one pass: on Hopper, whose products take operands from shared
    memory. On Ampere the registers of dk, dv and a dq that no two warps share would spill.
    """
    if d > 80 or dtype == torch.float32:
        return (Schedule(32, 32, 4, 2),) * 3
    small = Schedule(64, 64, 4, 2)
    # B 2, N 256: 128 small programs instead of 64.
    forward = Schedule(128, 64, 8, 2) if B * H * triton.cdiv(N, 128) >= PROGRAMS else small
    if sm // 10 != 9:
        return forward, small, Schedule(32, 64, 4, 2)
    if L > ONE_TILE:
        return forward, small, small
    return forward, None, small if L <= small.BLOCK_L else Schedule(64, ONE_TILE, 8, 2)


def split_rows(B: int, N: int, H: int, tiles: int, BLOCK_N: int) -> int:
    """How many of N image tokens a program of the text kernel sums over; the parts are then added in a fixed order.

    All of them where B · H · tiles programs fill the GPU, as B 32 does with its 512; else fewer, down to two tiles.
    """
    parts = max(1, min(triton.cdiv(PROGRAMS, max(1, B * H * tiles)), N // (2 * BLOCK_N)))
    return max(1, triton.cdiv(triton.cdiv(N, BLOCK_N), parts)) * BLOCK_N


@triton.jit
def _length(lengths_ptr, b, L):
    if lengths_ptr is None:
        return L
    else:
        return tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), L)


@triton.jit
def _score_scale(length, scale):
    """The scale of dq and dk: 0 for a caption of one token, which has all weight whatever its score."""
    return tl.where(length > 1, scale, 0.0)


@triton.jit
def _part(rows, stride, keep, COLUMN: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """Offsets of [rows, WIDTH] from column COLUMN on, and which of them are kept: none from column HEAD on."""
    columns = COLUMN + tl.arange(0, WIDTH)
    keep = keep[:, None]
    if COLUMN + WIDTH > HEAD:
        keep = keep & (columns < HEAD)[None, :]
    return rows[:, None] * stride + columns[None, :], keep


# A tile of a head is a pair, [rows, MAIN] and [rows, TAIL]; without a tail its second is never used.


@triton.jit
def _load(ptr, rows, stride, keep, MAIN: tl.constexpr, TAIL: tl.constexpr, HEAD: tl.constexpr):
    """Zero where `keep` is false, and from column HEAD on."""
    offsets, kept = _part(rows, stride, keep, 0, MAIN, HEAD)
    main = tl.load(ptr + offsets, mask=kept, other=0.0)
    if TAIL:
        offsets, kept = _part(rows, stride, keep, MAIN, TAIL, HEAD)
        return main, tl.load(ptr + offsets, mask=kept, other=0.0)
    else:
        return main, main


@triton.jit
def _store(ptr, main, tail, rows, stride, keep, MAIN: tl.constexpr, TAIL: tl.constexpr, HEAD: tl.constexpr):
    offsets, kept = _part(rows, stride, keep, 0, MAIN, HEAD)
    tl.store(ptr + offsets, main.to(ptr.dtype.element_ty), mask=kept)
    if TAIL:
        offsets, kept = _part(rows, stride, keep, MAIN, TAIL, HEAD)
        tl.store(ptr + offsets, tail.to(ptr.dtype.element_ty), mask=kept)


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    return tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, TAIL if TAIL else 1], tl.float32)


@triton.jit
def _inner(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """a bᵀ, summed over the columns of a head."""
    product = tl.dot(a, b.T, input_precision="ieee")
    if TAIL:
        product = tl.dot(a_tail, b_tail.T, product, input_precision="ieee")
    return product


@triton.jit
def _outer(a, b, b_tail, sum, sum_tail, TAIL: tl.constexpr):
    """sum + a b, a tile of a head."""
    sum = tl.dot(a, b, sum, input_precision="ieee")
    if TAIL:
        sum_tail = tl.dot(a, b_tail, sum_tail, input_precision="ieee")
    return sum, sum_tail


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, lengths_ptr,
    N, L, q_stride_b, q_stride_n, k_stride_b, k_stride_l, v_stride_b, v_stride_l, scale,
    Q_STRIDE_H: tl.constexpr, K_STRIDE_H: tl.constexpr, V_STRIDE_H: tl.constexpr,
    H: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, V_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < N
    q_ptr += b * q_stride_b + h * Q_STRIDE_H
    k_ptr += b * k_stride_b + h * K_STRIDE_H
    v_ptr += b * v_stride_b + h * V_STRIDE_H
    length = _length(lengths_ptr, b, L)

    q, q_tail = _load(q_ptr, rows, q_stride_n, keep, MAIN, TAIL, HEAD)
    o, o_tail = _zeros(BLOCK_N, MAIN, V_TAIL)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)

    for start in range(0, length, BLOCK_L):
        tokens = start + tl.arange(0, BLOCK_L)
        count = tokens < length
        k, k_tail = _load(k_ptr, tokens, k_stride_l, count, MAIN, TAIL, HEAD)
        s = tl.where(count[None, :], _inner(q, q_tail, k, k_tail, TAIL), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2((s - new_top[:, None]) * (scale * LOG2E))
        rescale = tl.exp2((top - new_top) * (scale * LOG2E))
        total = total * rescale + tl.sum(p, 1)
        top = new_top
        v, v_tail = _load(v_ptr, tokens, v_stride_l, count, MAIN, V_TAIL, HEAD)
        o *= rescale[:, None]
        o_tail *= rescale[:, None]
        o, o_tail = _outer(p.to(v.dtype), v, v_tail, o, o_tail, V_TAIL)

    divisor = tl.where(total > 0, total, 1.0)  # without a token: o = 0 / 1, lse = -inf + log 1
    o_ptr += b * N * H * HEAD + h * HEAD
    _store(o_ptr, o / divisor[:, None], o_tail / divisor[:, None], rows, H * HEAD, keep, MAIN, V_TAIL, HEAD)
    tl.store(lse_ptr + (b * H + h) * N + rows, top * scale + tl.log(divisor), mask=keep)


@triton.jit
def _text_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, weight_ptr, lengths_ptr, dq_ptr, dk_ptr, dv_ptr,
    N, L, ROWS, q_stride_b, q_stride_n, k_stride_b, k_stride_l, v_stride_b, v_stride_l, scale,
    Q_STRIDE_H: tl.constexpr, K_STRIDE_H: tl.constexpr, V_STRIDE_H: tl.constexpr,
    H: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of text, summed over ROWS image tokens; with ONE_PASS that tile is all text: dq as well."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = 1 if ONE_PASS else tl.cdiv(L, BLOCK_L)
    part, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_L
    tokens = first + tl.arange(0, BLOCK_L)
    length = _length(lengths_ptr, b, L)
    ds_scale = _score_scale(length, scale)
    count = tokens < length
    image = b * N * H * HEAD + h * HEAD
    statistics = (b * H + h) * N
    q_ptr += b * q_stride_b + h * Q_STRIDE_H
    k_ptr += b * k_stride_b + h * K_STRIDE_H
    v_ptr += b * v_stride_b + h * V_STRIDE_H

    k, k_tail = _load(k_ptr, tokens, k_stride_l, count, MAIN, TAIL, HEAD)
    v, v_tail = _load(v_ptr, tokens, v_stride_l, count, MAIN, TAIL, HEAD)
    dk, dk_tail = _zeros(BLOCK_L, MAIN, TAIL)
    dv, dv_tail = _zeros(BLOCK_L, MAIN, TAIL)
    last = N if ONE_PASS else tl.where(first < length, N, 0)

    for start in range(part * ROWS, tl.minimum(part * ROWS + ROWS, last), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        keep = rows < N
        q, q_tail = _load(q_ptr, rows, q_stride_n, keep, MAIN, TAIL, HEAD)
        do, do_tail = _load(do_ptr + image, rows, H * HEAD, keep, MAIN, TAIL, HEAD)
        s = _inner(k, k_tail, q, q_tail, TAIL)
        lse = tl.load(lse_ptr + statistics + rows, mask=keep, other=float("inf"))
        p = tl.exp2(tl.where(count[:, None], s * (scale * LOG2E) - (lse * LOG2E)[None, :], float("-inf")))
        if weight_ptr is not None:
            p *= tl.load(weight_ptr + statistics + rows, mask=keep, other=0.0)[None, :]
        dv, dv_tail = _outer(p.to(q.dtype), do, do_tail, dv, dv_tail, TAIL)
        dp = _inner(v, v_tail, do, do_tail, TAIL)
        delta = tl.sum(p * dp, 0) if ONE_PASS else tl.load(delta_ptr + statistics + rows, mask=keep, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk, dk_tail = _outer(ds, q, q_tail, dk, dk_tail, TAIL)
        if ONE_PASS:
            # dqᵀ = kᵀ ds, not dq = dsᵀ k: this way round registers just do not spill.
            dq = tl.dot(k.T, ds, input_precision="ieee").T * ds_scale
            dq_tail = tl.dot(k_tail.T, ds, input_precision="ieee").T * ds_scale if TAIL else dq
            _store(dq_ptr + image, dq, dq_tail, rows, H * HEAD, keep, MAIN, TAIL, HEAD)

    offset = ((part * tl.num_programs(2) + b) * L * H + h) * HEAD
    exists = tokens < L
    _store(dk_ptr + offset, dk * ds_scale, dk_tail * ds_scale, tokens, H * HEAD, exists, MAIN, TAIL, HEAD)
    _store(dv_ptr + offset, dv, dv_tail, tokens, H * HEAD, exists, MAIN, TAIL, HEAD)


@triton.jit
def _image_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, weight_ptr, lengths_ptr, dq_ptr,
    N, L, q_stride_b, q_stride_n, k_stride_b, k_stride_l, v_stride_b, v_stride_l, scale,
    Q_STRIDE_H: tl.constexpr, K_STRIDE_H: tl.constexpr, V_STRIDE_H: tl.constexpr,
    H: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dq of one tile of the image, over all tiles of the text, and delta = rowsum(do · o) for the text kernel."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < N
    length = _length(lengths_ptr, b, L)
    image = b * N * H * HEAD + h * HEAD
    statistics = (b * H + h) * N + rows
    q_ptr += b * q_stride_b + h * Q_STRIDE_H
    k_ptr += b * k_stride_b + h * K_STRIDE_H
    v_ptr += b * v_stride_b + h * V_STRIDE_H

    q, q_tail = _load(q_ptr, rows, q_stride_n, keep, MAIN, TAIL, HEAD)
    do, do_tail = _load(do_ptr + image, rows, H * HEAD, keep, MAIN, TAIL, HEAD)
    o, o_tail = _load(o_ptr + image, rows, H * HEAD, keep, MAIN, TAIL, HEAD)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if TAIL:
        delta += tl.sum(o_tail.to(tl.float32) * do_tail.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=keep)
    lse = tl.load(lse_ptr + statistics, mask=keep, other=float("inf"))
    dq, dq_tail = _zeros(BLOCK_N, MAIN, TAIL)
    total = tl.zeros([BLOCK_N], tl.float32)

    for start in range(0, length, BLOCK_L):
        tokens = start + tl.arange(0, BLOCK_L)
        count = tokens < length
        k, k_tail = _load(k_ptr, tokens, k_stride_l, count, MAIN, TAIL, HEAD)
        s = _inner(q, q_tail, k, k_tail, TAIL)
        p = tl.exp2(tl.where(count[None, :], s * (scale * LOG2E) - (lse * LOG2E)[:, None], float("-inf")))
        if weight_ptr is not None:
            total += tl.sum(p, 1)
        v, v_tail = _load(v_ptr, tokens, v_stride_l, count, MAIN, TAIL, HEAD)
        dp = _inner(do, do_tail, v, v_tail, TAIL)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq, dq_tail = _outer(ds, k, k_tail, dq, dq_tail, TAIL)

    factor = tl.zeros([BLOCK_N], tl.float32) + _score_scale(length, scale)
    if weight_ptr is not None:
        # Rounding lse to fp32 scales all p of a row alike, which fp32 would show: their sum, not quite 1, undoes it.
        weight = 1 / tl.where(total > 0, total, 1.0)
        tl.store(weight_ptr + statistics, weight, mask=keep)
        factor *= weight
    _store(dq_ptr + image, dq * factor[:, None], dq_tail * factor[:, None], rows, H * HEAD, keep, MAIN, TAIL, HEAD)


def _capability(q: Tensor, sm: int | None) -> int:
    if sm is None:
        major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
        sm = 10 * major + minor
    if sm < 80:
        raise RuntimeError(f"cross-attention in Triton needs compute capability 8.0 or more, not {sm / 10}")
    return sm


def _by_columns(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _layout(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[int], dict[str, int]]:
    """The strides of samples and tokens, which are arguments, and the constants of a head.

    Among these are the head strides: 72 is no multiple of 16, all that Triton learns of an argument, so that each load
    would be 2 bytes wide instead of 16.
    """
    constants = {"H": q.shape[2], **head_split(q.shape[3])._asdict()}
    constants |= {f"{name}_STRIDE_H": t.stride(2) for name, t in zip("QKV", (q, k, v), strict=True)}
    return [stride for t in (q, k, v) for stride in t.stride()[:2]], constants


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *, sm: int | None = None) -> tuple[Tensor, Tensor]:
    """o [B, N, H, d] and lse [B, H, N] of the formula above; `sm` overrides the device's compute capability.

    Raises RuntimeError below compute capability 8.0, where products would not run on tensor cores.
    """
    sm = _capability(q, sm)
    (B, N, H, d), L = q.shape, k.shape[1]
    q, k, v = _by_columns(q, k, v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    strides, constants = _layout(q, k, v)
    schedule, _, _ = schedules(sm, B, N, H, L, d, q.dtype)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(N, schedule.BLOCK_N), H, B)](
            q, k, v, o, lse, lengths, N, L, *strides, d**-0.5,
            **constants, V_TAIL=value_tail(sm, head_split(d)), **schedule._asdict(),
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, lengths: Tensor | None, *,
    sm: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [B, N, H, d], dk and dv [B, L, H, d], contiguous, of q's dtype; zero where a caption has no token.

    do, o [B, N, H, d] with any strides, lse [B, H, N] of `forward`. Raises RuntimeError as `forward` does.
    """
    sm = _capability(q, sm)
    (B, N, H, d), L = q.shape, k.shape[1]
    q, k, v = _by_columns(q, k, v)
    do, o, lse = do.contiguous(), o.contiguous(), lse.contiguous()
    strides, constants = _layout(q, k, v)
    _, over_image, over_text = schedules(sm, B, N, H, L, d, q.dtype)
    tiles = triton.cdiv(L, over_text.BLOCK_L) if over_image else 1
    rows = split_rows(B, N, H, tiles, over_text.BLOCK_N)
    parts = max(1, triton.cdiv(N, rows))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (torch.empty((parts, B, L, H, d), dtype=dtype, device=q.device) for _ in range(2))
    delta = torch.empty_like(lse) if over_image else None
    weight = torch.empty_like(lse) if q.dtype == torch.float32 else None
    with torch.cuda.device_of(q):
        if over_image:
            _image_kernel[(triton.cdiv(N, over_image.BLOCK_N), H, B)](
                q, k, v, o, do, lse, delta, weight, lengths, dq, N, L, *strides, d**-0.5,
                **constants, **over_image._asdict(),
            )  # fmt: skip
        _text_kernel[(parts * tiles, H, B)](
            q, k, v, do, lse, delta, weight, lengths, dq, dk, dv, N, L, rows, *strides, d**-0.5,
            **constants, **over_text._asdict(), ONE_PASS=over_image is None,
        )  # fmt: skip
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def variants(sm: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Every launch at PixArt-XL/2's shapes in bf16: label, kernel, signature, constants, options. None below 8.0."""
    if sm < 80:
        return
    d, H = 72, 16
    head = head_split(d)

    def variant(label, kernel, schedule, fp32=("lse_ptr", "delta_ptr"), **extra):
        constants = {"H": H, **head._asdict(), **dict.fromkeys(("Q_STRIDE_H", "K_STRIDE_H", "V_STRIDE_H"), d)}
        constants |= schedule._asdict() | extra
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        types = {"lengths_ptr": "*i64", "scale": "fp32", **dict.fromkeys(fp32, "*fp32")}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        return f"cross_attention {label} B={B} L={L}", kernel, signature, constants, options

    for B, L in itertools.product((2, 32), (40, 120, 300)):
        over_rows, over_image, over_text = schedules(sm, B, 256, H, L, d, torch.bfloat16)
        yield variant("forward", _forward_kernel, over_rows, V_TAIL=value_tail(sm, head))
        partial = ("dk_ptr", "dv_ptr") if B == 2 else ()  # sums over parts of the image
        if over_image:
            yield variant("backward dq", _image_kernel, over_image, weight_ptr=None)
            fp32 = ("lse_ptr", "delta_ptr", *partial)
            yield variant("backward dk dv", _text_kernel, over_text, fp32, weight_ptr=None, ONE_PASS=False)
        else:
            absent = {"weight_ptr": None, "delta_ptr": None}
            yield variant("backward dq dk dv", _text_kernel, over_text, ("lse_ptr", *partial), **absent, ONE_PASS=True)
