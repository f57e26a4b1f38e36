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
- Tiles of a caption's padding are never computed, and what padding holds, NaN included, never matters.
- A text of one tile needs neither o nor rowsum(do · o) in its backward: that sum is rowsum(p · dp), and p and dp are
  there. dq, dk and dv then come from one pass over q and do, five products instead of seven.

Sums are in fp32, each output is rounded once, and no sum depends on the order in which programs run.
"""

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


def forward_schedule(sm: int, B: int, N: int, H: int, L: int, d: int, dtype: torch.dtype) -> Schedule:
    """How the forward is tiled on compute capability `sm` (80 for 8.0)."""
    if dtype == torch.float32 or d > 80:
        return Schedule(32, 32, 4, 2)
    BLOCK_L = min(64, max(16, triton.next_power_of_2(L)))
    if B * H * triton.cdiv(N, 128) >= PROGRAMS:
        return Schedule(128, BLOCK_L, 8, 2)
    return Schedule(64, BLOCK_L, 4, 2)  # B 2, N 256: 128 programs instead of 64


def one_pass(L: int, d: int, dtype: torch.dtype) -> bool:
    """Whether the whole text stays in one program, which then has dq, dk and dv from one pass."""
    return L <= ONE_TILE and d <= 80 and dtype != torch.float32


def text_schedule(sm: int, L: int, d: int, dtype: torch.dtype) -> Schedule:
    """How the kernel of dk and dv is tiled, which in one pass is the whole backward."""
    if dtype == torch.float32 or d > 80:
        return Schedule(32, 32, 4, 2)
    hopper = (
        sm // 10 == 9
    )  # wgmma takes its operands from shared memory: room for twice the rows before registers spill
    if one_pass(L, d, dtype):
        if L <= 64:
            return Schedule(64, 64, 8, 2) if hopper else Schedule(32, 64, 4, 2)
        return Schedule(64, 128, 8, 2) if hopper else Schedule(32, 128, 8, 3)
    return Schedule(64 if hopper else 32, 64, 4, 2)


def image_schedule(sm: int, d: int, dtype: torch.dtype) -> Schedule:
    """How the kernel of dq is tiled, where the text is longer than one tile."""
    if dtype == torch.float32 or d > 80:
        return Schedule(32, 32, 4, 2)
    return Schedule(64, 64, 4, 2)


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
def _load(ptr, rows, stride, keep, COLUMN: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    """[rows, WIDTH] from column COLUMN; zero where `keep` is false and from column HEAD on."""
    columns = COLUMN + tl.arange(0, WIDTH)
    keep = keep[:, None]
    if COLUMN + WIDTH > HEAD:
        keep = keep & (columns < HEAD)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=keep, other=0.0)


@triton.jit
def _store(ptr, tile, rows, stride, keep, COLUMN: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr):
    columns = COLUMN + tl.arange(0, WIDTH)
    keep = keep[:, None]
    if COLUMN + WIDTH > HEAD:
        keep = keep & (columns < HEAD)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], tile.to(ptr.dtype.element_ty), mask=keep)


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

    q = _load(q_ptr, rows, q_stride_n, keep, 0, MAIN, HEAD)
    o = tl.zeros([BLOCK_N, MAIN], tl.float32)
    if TAIL:
        q_tail = _load(q_ptr, rows, q_stride_n, keep, MAIN, TAIL, HEAD)
        o_tail = tl.zeros([BLOCK_N, V_TAIL], tl.float32)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)

    for start in range(0, length, BLOCK_L):
        tokens = start + tl.arange(0, BLOCK_L)
        count = tokens < length
        k = _load(k_ptr, tokens, k_stride_l, count, 0, MAIN, HEAD)
        s = tl.dot(q, k.T, input_precision="ieee")
        if TAIL:
            k_tail = _load(k_ptr, tokens, k_stride_l, count, MAIN, TAIL, HEAD)
            s = tl.dot(q_tail, k_tail.T, s, input_precision="ieee")
        s = tl.where(count[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2((s - new_top[:, None]) * (scale * LOG2E))
        rescale = tl.exp2((top - new_top) * (scale * LOG2E))
        total = total * rescale + tl.sum(p, 1)
        top = new_top
        v = _load(v_ptr, tokens, v_stride_l, count, 0, MAIN, HEAD)
        p = p.to(v.dtype)
        o = tl.dot(p, v, o * rescale[:, None], input_precision="ieee")
        if TAIL:
            v_tail = _load(v_ptr, tokens, v_stride_l, count, MAIN, V_TAIL, HEAD)
            o_tail = tl.dot(p, v_tail, o_tail * rescale[:, None], input_precision="ieee")

    divisor = tl.where(total > 0, total, 1.0)  # without a token: o = 0 / 1, lse = -inf + log 1
    o_ptr += b * N * H * HEAD + h * HEAD
    _store(o_ptr, o / divisor[:, None], rows, H * HEAD, keep, 0, MAIN, HEAD)
    if TAIL:
        _store(o_ptr, o_tail / divisor[:, None], rows, H * HEAD, keep, MAIN, V_TAIL, HEAD)
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
    tiles = tl.cdiv(L, BLOCK_L)
    if ONE_PASS:
        part, first = tl.program_id(0), 0
    else:
        part, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_L
    tokens = first + tl.arange(0, BLOCK_L)
    length = _length(lengths_ptr, b, L)
    ds_scale = _score_scale(length, scale)
    count = tokens < length
    q_ptr += b * q_stride_b + h * Q_STRIDE_H
    k_ptr += b * k_stride_b + h * K_STRIDE_H
    v_ptr += b * v_stride_b + h * V_STRIDE_H
    do_ptr += b * N * H * HEAD + h * HEAD
    lse_ptr += (b * H + h) * N

    k = _load(k_ptr, tokens, k_stride_l, count, 0, MAIN, HEAD)
    v = _load(v_ptr, tokens, v_stride_l, count, 0, MAIN, HEAD)
    dk = tl.zeros([BLOCK_L, MAIN], tl.float32)
    dv = tl.zeros([BLOCK_L, MAIN], tl.float32)
    if TAIL:
        k_tail = _load(k_ptr, tokens, k_stride_l, count, MAIN, TAIL, HEAD)
        v_tail = _load(v_ptr, tokens, v_stride_l, count, MAIN, TAIL, HEAD)
        dk_tail = tl.zeros([BLOCK_L, TAIL], tl.float32)
        dv_tail = tl.zeros([BLOCK_L, TAIL], tl.float32)
    if ONE_PASS:
        dq_ptr += b * N * H * HEAD + h * HEAD
        last = N
    else:
        delta_ptr += (b * H + h) * N
        last = tl.where(first < length, N, 0)

    for start in range(part * ROWS, tl.minimum(part * ROWS + ROWS, last), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        keep = rows < N
        q = _load(q_ptr, rows, q_stride_n, keep, 0, MAIN, HEAD)
        do = _load(do_ptr, rows, H * HEAD, keep, 0, MAIN, HEAD)
        s = tl.dot(k, q.T, input_precision="ieee")
        if TAIL:
            q_tail = _load(q_ptr, rows, q_stride_n, keep, MAIN, TAIL, HEAD)
            do_tail = _load(do_ptr, rows, H * HEAD, keep, MAIN, TAIL, HEAD)
            s = tl.dot(k_tail, q_tail.T, s, input_precision="ieee")
        lse = tl.load(lse_ptr + rows, mask=keep, other=float("inf"))
        p = tl.exp2(tl.where(count[:, None], s * (scale * LOG2E) - (lse * LOG2E)[None, :], float("-inf")))
        if weight_ptr is not None:
            p *= tl.load(weight_ptr + (b * H + h) * N + rows, mask=keep, other=0.0)[None, :]
        p_rounded = p.to(q.dtype)
        dv = tl.dot(p_rounded, do, dv, input_precision="ieee")
        if TAIL:
            dv_tail = tl.dot(p_rounded, do_tail, dv_tail, input_precision="ieee")
        dp = tl.dot(v, do.T, input_precision="ieee")
        if TAIL:
            dp = tl.dot(v_tail, do_tail.T, dp, input_precision="ieee")
        delta = tl.sum(p * dp, 0) if ONE_PASS else tl.load(delta_ptr + rows, mask=keep, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if TAIL:
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision="ieee")
        if ONE_PASS:
            dq = tl.dot(ds.T, k, input_precision="ieee")
            _store(dq_ptr, dq * ds_scale, rows, H * HEAD, keep, 0, MAIN, HEAD)
            if TAIL:
                dq_tail = tl.dot(ds.T, k_tail, input_precision="ieee")
                _store(dq_ptr, dq_tail * ds_scale, rows, H * HEAD, keep, MAIN, TAIL, HEAD)

    offset = ((part * tl.num_programs(2) + b) * L * H + h) * HEAD
    exists = tokens < L
    _store(dk_ptr + offset, dk * ds_scale, tokens, H * HEAD, exists, 0, MAIN, HEAD)
    _store(dv_ptr + offset, dv, tokens, H * HEAD, exists, 0, MAIN, HEAD)
    if TAIL:
        _store(dk_ptr + offset, dk_tail * ds_scale, tokens, H * HEAD, exists, MAIN, TAIL, HEAD)
        _store(dv_ptr + offset, dv_tail, tokens, H * HEAD, exists, MAIN, TAIL, HEAD)


@triton.jit
def _image_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, weight_ptr, lengths_ptr, dq_ptr,
    N, L, q_stride_b, q_stride_n, k_stride_b, k_stride_l, v_stride_b, v_stride_l, scale,
    Q_STRIDE_H: tl.constexpr, K_STRIDE_H: tl.constexpr, V_STRIDE_H: tl.constexpr,
    H: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dq of one tile of the image, over all tiles of a longer text, and delta = rowsum(do · o) for the text kernel."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < N
    q_ptr += b * q_stride_b + h * Q_STRIDE_H
    k_ptr += b * k_stride_b + h * K_STRIDE_H
    v_ptr += b * v_stride_b + h * V_STRIDE_H
    offset = b * N * H * HEAD + h * HEAD
    length = _length(lengths_ptr, b, L)
    ds_scale = _score_scale(length, scale)

    q = _load(q_ptr, rows, q_stride_n, keep, 0, MAIN, HEAD)
    do = _load(do_ptr + offset, rows, H * HEAD, keep, 0, MAIN, HEAD)
    o = _load(o_ptr + offset, rows, H * HEAD, keep, 0, MAIN, HEAD)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    dq = tl.zeros([BLOCK_N, MAIN], tl.float32)
    if TAIL:
        q_tail = _load(q_ptr, rows, q_stride_n, keep, MAIN, TAIL, HEAD)
        do_tail = _load(do_ptr + offset, rows, H * HEAD, keep, MAIN, TAIL, HEAD)
        o_tail = _load(o_ptr + offset, rows, H * HEAD, keep, MAIN, TAIL, HEAD)
        delta += tl.sum(o_tail.to(tl.float32) * do_tail.to(tl.float32), 1)
        dq_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    tl.store(delta_ptr + (b * H + h) * N + rows, delta, mask=keep)
    lse = tl.load(lse_ptr + (b * H + h) * N + rows, mask=keep, other=float("inf"))

    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_L):
        tokens = start + tl.arange(0, BLOCK_L)
        count = tokens < length
        k = _load(k_ptr, tokens, k_stride_l, count, 0, MAIN, HEAD)
        v = _load(v_ptr, tokens, v_stride_l, count, 0, MAIN, HEAD)
        s = tl.dot(q, k.T, input_precision="ieee")
        dp = tl.dot(do, v.T, input_precision="ieee")
        if TAIL:
            k_tail = _load(k_ptr, tokens, k_stride_l, count, MAIN, TAIL, HEAD)
            v_tail = _load(v_ptr, tokens, v_stride_l, count, MAIN, TAIL, HEAD)
            s = tl.dot(q_tail, k_tail.T, s, input_precision="ieee")
            dp = tl.dot(do_tail, v_tail.T, dp, input_precision="ieee")
        p = tl.exp2(tl.where(count[None, :], s * (scale * LOG2E) - (lse * LOG2E)[:, None], float("-inf")))
        if weight_ptr is not None:
            total += tl.sum(p, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
        if TAIL:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision="ieee")

    if weight_ptr is not None:
        # Rounding lse to fp32 scales all p of a row alike, which fp32 would show: their sum, not quite 1, undoes it.
        weight = 1 / tl.where(total > 0, total, 1.0)
        dq *= weight[:, None]
        if TAIL:
            dq_tail *= weight[:, None]
        tl.store(weight_ptr + (b * H + h) * N + rows, weight, mask=keep)
    _store(dq_ptr + offset, dq * ds_scale, rows, H * HEAD, keep, 0, MAIN, HEAD)
    if TAIL:
        _store(dq_ptr + offset, dq_tail * ds_scale, rows, H * HEAD, keep, MAIN, TAIL, HEAD)


def _capability(q: Tensor, sm: int | None) -> int:
    if sm is None:
        major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
        sm = 10 * major + minor
    if sm < 80:
        raise RuntimeError(f"cross-attention in Triton needs compute capability 8.0 or more, not {sm / 10}")
    return sm


def _layout(q: Tensor, k: Tensor, v: Tensor) -> tuple[list[int], dict[str, int]]:
    """The strides of samples and tokens, which are arguments, and the constants of a head.

    Among these are the head strides: 72 is no multiple of 16, all that Triton learns of an argument, so that each load
    would be 2 bytes wide instead of 16.
    """
    constants = {"H": q.shape[2], **head_split(q.shape[3])._asdict()}
    constants |= {f"{name}_STRIDE_H": t.stride(2) for name, t in zip("QKV", (q, k, v), strict=True)}
    return [stride for t in (q, k, v) for stride in t.stride()[:2]], constants


def _by_columns(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, *, sm: int | None = None) -> tuple[Tensor, Tensor]:
    """o [B, N, H, d] and lse [B, H, N] of the formula above; `sm` overrides the device's compute capability.

    Raises RuntimeError below compute capability 8.0, where products would not run on tensor cores.
    """
    sm = _capability(q, sm)
    (B, N, H, d), L = q.shape, k.shape[1]
    q, k, v = _by_columns(q), _by_columns(k), _by_columns(v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    strides, constants = _layout(q, k, v)
    schedule = forward_schedule(sm, B, N, H, L, d, q.dtype)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(N, schedule.BLOCK_N), H, B)](
            q, k, v, o, lse, lengths, N, L, *strides, d**-0.5,
            **constants, V_TAIL=value_tail(sm, head_split(d)), **schedule._asdict(),
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    *,
    sm: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, N, H, d], dk and dv [B, L, H, d], contiguous, of q's dtype; zero where a caption has no token.

    do, o [B, N, H, d] with any strides, lse [B, H, N] of `forward`. Raises RuntimeError as `forward` does.
    """
    sm = _capability(q, sm)
    (B, N, H, d), L = q.shape, k.shape[1]
    q, k, v, do, o, lse = (
        _by_columns(q),
        _by_columns(k),
        _by_columns(v),
        do.contiguous(),
        o.contiguous(),
        lse.contiguous(),
    )
    strides, constants = _layout(q, k, v)
    whole = one_pass(L, d, q.dtype)
    schedule = text_schedule(sm, L, d, q.dtype)
    tiles = 1 if whole else triton.cdiv(L, schedule.BLOCK_L)
    rows = split_rows(B, N, H, tiles, schedule.BLOCK_N)
    parts = max(1, triton.cdiv(N, rows))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (
        torch.empty((parts, B, L, H, d), dtype=q.dtype if parts == 1 else torch.float32, device=q.device) for _ in "kv"
    )
    delta = None if whole else torch.empty_like(lse)
    weight = torch.empty_like(lse) if q.dtype == torch.float32 else None
    with torch.cuda.device_of(q):
        if not whole:
            over_image = image_schedule(sm, d, q.dtype)
            _image_kernel[(triton.cdiv(N, over_image.BLOCK_N), H, B)](
                q, k, v, o, do, lse, delta, weight, lengths, dq, N, L, *strides, d**-0.5,
                **constants, **over_image._asdict(),
            )  # fmt: skip
        _text_kernel[(parts * tiles, H, B)](
            q, k, v, do, lse, delta, weight, lengths, dq, dk, dv, N, L, rows, *strides, d**-0.5,
            **constants, **schedule._asdict(), ONE_PASS=whole,
        )  # fmt: skip
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype)


def value_tail(sm: int, head: Head) -> int:
    """Columns of the tail in p v, which no product sums over: 8 fit a head of 72, but are no wgmma on Hopper."""
    return 8 if sm // 10 == 8 and head.HEAD - head.MAIN == 8 else head.TAIL


def variants(sm: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Every launch at PixArt-XL/2's shapes in bf16: label, kernel, signature, constants, options. None below 8.0."""
    if sm < 80:
        return
    d, H, dtype = 72, 16, torch.bfloat16
    head = head_split(d)
    common = {"H": H, **head._asdict(), "Q_STRIDE_H": d, "K_STRIDE_H": d, "V_STRIDE_H": d}

    def variant(label, kernel, schedule, extra, fp32=("lse_ptr", "delta_ptr"), absent=()):
        tiles = schedule._asdict()
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        constants = {**common, **tiles, **extra, **dict.fromkeys(absent)}
        types = {"lengths_ptr": "*i64", "scale": "fp32"} | dict.fromkeys(fp32, "*fp32")
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        return label, kernel, signature, constants, options

    for L in (120, 300):
        for B in (2, 32):
            schedule = forward_schedule(sm, B, 256, H, L, d, dtype)
            label = f"cross_attention forward B={B} L={L}"
            yield variant(label, _forward_kernel, schedule, {"V_TAIL": value_tail(sm, head)})
        whole = one_pass(L, d, dtype)
        if not whole:
            yield variant(
                f"cross_attention backward dq L={L}",
                _image_kernel,
                image_schedule(sm, d, dtype),
                {},
                absent=("weight_ptr",),
            )
        schedule = text_schedule(sm, L, d, dtype)
        absent = ("weight_ptr", "delta_ptr") if whole else ("weight_ptr",)
        for B in (2, 32):
            partial = ("dk_ptr", "dv_ptr") if B == 2 else ()
            label = f"cross_attention backward {'dq dk dv' if whole else 'dk dv'} B={B} L={L}"
            fp32 = ("lse_ptr", "delta_ptr", *partial)
            yield variant(label, _text_kernel, schedule, {"ONE_PASS": whole}, fp32, absent)
