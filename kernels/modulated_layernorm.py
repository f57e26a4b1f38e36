"""adaLN in one pass over the tensors: residual and gate, LayerNorm, modulation (DiT 3.2; PixArt-α 2.3, Figure 4).

    x1 = x + (gate + gate_row) · residual
    y  = (x1 - mean) rstd (1 + scale + scale_row) + shift + shift_row            mean, rstd of the rounded x1

    x, residual, x1, y, dy, dx…   [B, N, D]   fp32, fp16 or bf16
    gate, shift, scale            [B, D]      any floating dtype; usually views of one [B, 6, D]
    gate_row, shift_row, …        [D]         any floating dtype, or None; rows of a block's scale_shift_table
    mean, rstd                    [B, N]      fp32, all that the backward needs besides x1

Arithmetic in fp32, every output rounded once, gradients bit-identical from run to run on one device: a program sums its
rows in order, and a second kernel sums the programs in order. Programs never cross a sample, so the modulation stays in
registers. Forward: two tensors read, two written, where a LayerNorm that a compiler fuses with its neighbours has its
gate and its sums over N (dgate, dshift, dscale) in kernels of their own, which read the tensors again.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four warps hold a row of 1152 with 9 elements per thread, the 1024 of the head as one 128-bit load of 16-bit data.
# Registers are capped because `rows_per_program` counts on `resident` programs of a kernel in a multiprocessor.
FORWARD = {"num_warps": 4, "maxnreg": 64}
# The gated forward spills at 64 registers with fp32 data, and before sm_80, which has no asynchronous copies.
FORWARD_WIDE = {"num_warps": 4, "maxnreg": 80}
BACKWARD = {"num_warps": 4, "maxnreg": 128}
REGISTERS = 65536
# Two rows ahead by asynchronous copies; unpipelined, the forward takes 72 registers and the backward 121.
STAGES = tl.constexpr(3)
# The sums over programs read little: wide in programs, of which a large image has hundreds, and one 128-byte line of D.
REDUCE = {"num_warps": 4}
REDUCE_TILE = {"BLOCK_P": 64, "BLOCK_D": 32}
# What a program reads and writes once (modulation and partial sums), in rows of its loop: 21 KB where a row
# moves 9 (forward), 41 where it moves 14 (backward).
ROWS_TO_START = 3
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _load(ptr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """A row of D in fp32, in two pieces: the first HEAD elements and the other D - HEAD <= TAIL, padded with zeros."""
    columns = HEAD + tl.arange(0, TAIL)
    head = tl.load(ptr + tl.arange(0, HEAD))
    tail = tl.load(ptr + columns) if HEAD + TAIL == D else tl.load(ptr + columns, mask=columns < D, other=0.0)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def _store(ptr, head, tail, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    columns = HEAD + tl.arange(0, TAIL)
    tl.store(ptr + tl.arange(0, HEAD), head)
    if HEAD + TAIL == D:
        tl.store(ptr + columns, tail)
    else:
        tl.store(ptr + columns, tail, mask=columns < D)


@triton.jit
def _load_modulation(ptr, row_ptr, offset, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """One sample's row of the condition plus the block's own."""
    head, tail = _load(ptr + offset, D, HEAD, TAIL)
    if row_ptr is not None:
        row_head, row_tail = _load(row_ptr, D, HEAD, TAIL)
        head += row_head
        tail += row_tail
    return head, tail


@triton.jit
def _fold(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Sums of a row's head onto its tail, of neighbours: within a thread for 1152 elements of 16 bits."""
    return tl.sum(tl.reshape(head, (TAIL, HEAD // TAIL)), 1) + tail


@triton.jit
def _sum(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    return tl.sum(_fold(head, tail, HEAD, TAIL), 0)


@triton.jit
def _sums(head, tail, other_head, other_tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Two sums of which neither waits for the other, in one meeting of the warps."""
    # Two steps keep the additions in sequence few where a sum is no tree, as in the interpreter.
    GROUPS: tl.constexpr = 16 if TAIL >= 16 else TAIL
    both = tl.join(_fold(head, tail, HEAD, TAIL), _fold(other_head, other_tail, HEAD, TAIL))
    return tl.split(tl.sum(tl.sum(tl.reshape(both, (GROUPS, TAIL // GROUPS, 2)), 1), 0))


@triton.jit
def _max(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    return tl.max(tl.maximum(tl.max(tl.reshape(head, (TAIL, HEAD // TAIL)), 1), tail), 0)


@triton.jit(do_not_specialize=["N", "rows"])
def _forward_kernel(
    x_ptr,
    residual_ptr,
    gate_ptr,
    gate_row_ptr,
    shift_ptr,
    shift_row_ptr,
    scale_ptr,
    scale_row_ptr,
    x1_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    y_scale_ptr,
    gate_stride,
    shift_stride,
    scale_stride,
    N,
    rows,
    eps,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * rows
    shift_head, shift_tail = _load_modulation(shift_ptr, shift_row_ptr, b * shift_stride, D, HEAD, TAIL)
    scale_head, scale_tail = _load_modulation(scale_ptr, scale_row_ptr, b * scale_stride, D, HEAD, TAIL)
    if gate_ptr is not None:
        gate_head, gate_tail = _load_modulation(gate_ptr, gate_row_ptr, b * gate_stride, D, HEAD, TAIL)
    for n in tl.range(first, tl.minimum(first + rows, N), num_stages=STAGES):
        row = b * N + n
        head, tail = _load(x_ptr + row * D, D, HEAD, TAIL)
        if residual_ptr is not None:
            residual_head, residual_tail = _load(residual_ptr + row * D, D, HEAD, TAIL)
            if gate_ptr is not None:
                residual_head *= gate_head
                residual_tail *= gate_tail
            stored_head = (head + residual_head).to(x1_ptr.dtype.element_ty)
            stored_tail = (tail + residual_tail).to(x1_ptr.dtype.element_ty)
            _store(x1_ptr + row * D, stored_head, stored_tail, D, HEAD, TAIL)
            head, tail = stored_head.to(tl.float32), stored_tail.to(tl.float32)

        mean = _sum(head, tail, HEAD, TAIL) / D
        head -= mean
        tail -= mean
        if HEAD + TAIL != D:
            tail = tl.where(HEAD + tl.arange(0, TAIL) < D, tail, 0.0)
        # The rounding of a large mean, seen by the centred row, is taken out of the variance and the mean again.
        excess, square = _sums(head, tail, head * head, tail * tail, HEAD, TAIL)
        excess /= D
        mean += excess
        rstd = tl.rsqrt(square / D - excess * excess + eps)
        head = (head - excess) * rstd * (1 + scale_head) + shift_head
        tail = (tail - excess) * rstd * (1 + scale_tail) + shift_tail

        if y_scale_ptr is None:
            tl.store(mean_ptr + row, mean)
            tl.store(rstd_ptr + row, rstd)
        else:
            largest = _max(tl.abs(head), tl.abs(tail), HEAD, TAIL)
            # Below 1e-30 the quotients would leave fp32: such a row is zero. The comparisons let NaN through.
            y_scale = tl.where(largest < 1e-30, 1.0, largest / LARGEST)
            tl.store(y_scale_ptr + row, y_scale)
            inverse = tl.where(largest < 1e-30, 0.0, 1 / y_scale)
            head *= inverse
            tail *= inverse
            if y_ptr.dtype.element_ty == tl.int8:
                # Adding 1.5 · 2²³ leaves an fp32 no bits for a fraction: rounded to the nearest, ties to even.
                head = head + 12582912.0 - 12582912.0
                tail = tail + 12582912.0 - 12582912.0
        y_type: tl.constexpr = y_ptr.dtype.element_ty
        _store(y_ptr + row * D, head.to(y_type), tail.to(y_type), D, HEAD, TAIL)


@triton.jit(do_not_specialize=["N", "rows"])
def _backward_kernel(
    dx1_ptr,
    dy_ptr,
    x1_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    scale_row_ptr,
    residual_ptr,
    gate_ptr,
    gate_row_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    scale_stride,
    gate_stride,
    N,
    rows,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * rows
    scale_head, scale_tail = _load_modulation(scale_ptr, scale_row_ptr, b * scale_stride, D, HEAD, TAIL)
    dshift_head, dshift_tail = tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL,), tl.float32)
    dscale_head, dscale_tail = tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL,), tl.float32)
    if gate_ptr is not None:
        gate_head, gate_tail = _load_modulation(gate_ptr, gate_row_ptr, b * gate_stride, D, HEAD, TAIL)
        dgate_head, dgate_tail = tl.zeros((HEAD,), tl.float32), tl.zeros((TAIL,), tl.float32)
    for n in tl.range(first, tl.minimum(first + rows, N), num_stages=STAGES):
        row = b * N + n
        dy_head, dy_tail = _load(dy_ptr + row * D, D, HEAD, TAIL)
        head, tail = _load(x1_ptr + row * D, D, HEAD, TAIL)
        if dx1_ptr is not None:
            dx1_head, dx1_tail = _load(dx1_ptr + row * D, D, HEAD, TAIL)
        if gate_ptr is not None:
            residual_head, residual_tail = _load(residual_ptr + row * D, D, HEAD, TAIL)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        head, tail = (head - mean) * rstd, (tail - mean) * rstd
        dshift_head += dy_head
        dshift_tail += dy_tail
        dscale_head += dy_head * head
        dscale_tail += dy_tail * tail

        dy_head *= 1 + scale_head
        dy_tail *= 1 + scale_tail
        along_ones, along_x_hat = _sums(dy_head, dy_tail, dy_head * head, dy_tail * tail, HEAD, TAIL)
        along_ones, along_x_hat = along_ones / D, along_x_hat / D
        head = rstd * (dy_head - along_ones - head * along_x_hat)
        tail = rstd * (dy_tail - along_ones - tail * along_x_hat)
        if dx1_ptr is not None:
            head += dx1_head
            tail += dx1_tail
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        _store(dx_ptr + row * D, head.to(dtype), tail.to(dtype), D, HEAD, TAIL)
        if gate_ptr is not None:
            dgate_head += residual_head * head
            dgate_tail += residual_tail * tail
            head *= gate_head
            tail *= gate_tail
            _store(dresidual_ptr + row * D, head.to(dtype), tail.to(dtype), D, HEAD, TAIL)

    programs = tl.num_programs(1)
    partial_ptr += (b * programs + tl.program_id(1)) * D
    stride = tl.num_programs(0).to(tl.int64) * programs * D
    _store(partial_ptr, dshift_head, dshift_tail, D, HEAD, TAIL)
    _store(partial_ptr + stride, dscale_head, dscale_tail, D, HEAD, TAIL)
    if gate_ptr is not None:
        _store(partial_ptr + 2 * stride, dgate_head, dgate_tail, D, HEAD, TAIL)


@triton.jit
def _sum_programs(out_ptr, partial_ptr, programs, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (columns < D)[None, :]
        total += tl.load(partial_ptr + p[:, None] * D + columns[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit(do_not_specialize=["programs"])
def _reduce_kernel(
    partial_ptr,
    dshift_ptr,
    dscale_ptr,
    dgate_ptr,
    programs,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    partial_ptr += b * programs * D
    stride = tl.num_programs(0).to(tl.int64) * programs * D
    _sum_programs(dshift_ptr + b * D, partial_ptr, programs, D, BLOCK_P, BLOCK_D)
    _sum_programs(dscale_ptr + b * D, partial_ptr + stride, programs, D, BLOCK_P, BLOCK_D)
    if dgate_ptr is not None:
        _sum_programs(dgate_ptr + b * D, partial_ptr + 2 * stride, programs, D, BLOCK_P, BLOCK_D)


def tiles(D: int) -> dict[str, int]:
    """The pieces of a row: 1152 is 1024 + 128, without a mask; a tile of 2048 would leave 44 % of its lanes idle."""
    head = max(1, triton.next_power_of_2(D) // 2)
    return {"D": D, "HEAD": head, "TAIL": triton.next_power_of_2(max(1, D - head))}


@cache
def rows_per_program(B: int, N: int, at_a_time: int) -> int:
    """Rows of one sample that a program takes, where the device runs `at_a_time` programs at a time.

    The fewest rows in sequence wins, over schedules of one to eight rounds of resident programs.
    """
    candidates = {triton.cdiv(N, min(N, max(1, rounds * at_a_time // B))) for rounds in range(1, 9)}
    return min(
        sorted(candidates, reverse=True),
        key=lambda rows: triton.cdiv(B * triton.cdiv(N, rows), at_a_time) * (rows + ROWS_TO_START),
    )


def resident(options: dict[str, int]) -> int:
    """Programs that the register file of a multiprocessor holds at a time: 8 of 64 registers, 6 of 80, 4 of 128."""
    return REGISTERS // (32 * options["num_warps"] * options["maxnreg"])


def forward_options(sm: int, dtype: torch.dtype) -> dict[str, int]:
    """`FORWARD` or `FORWARD_WIDE`, by compute capability (90 for 9.0) and the dtype of x."""
    return FORWARD if sm >= 80 and dtype.itemsize == 2 else FORWARD_WIDE


def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors; the interpreter takes part as a new device of four."""
    if device.type != "cuda":
        return 100, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _rows(modulation: Tensor | None) -> tuple[Tensor | None, int]:
    """A modulation [B, D] whose rows are contiguous, and the stride from row to row."""
    if modulation is None:
        return None, 0
    if modulation.stride(1) != 1:
        modulation = modulation.contiguous()
    return modulation, modulation.stride(0)


def _launch_forward(x, residual, gate, gate_row, shift, shift_row, scale, scale_row, eps, dtype, quantized):
    B, N, D = x.shape
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    x1 = x.new_empty(0) if residual is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=dtype)
    statistics = [torch.empty((B, N), dtype=torch.float32, device=x.device) for _ in range(1 if quantized else 2)]
    mean, rstd, y_scale = (None, None, *statistics) if quantized else (*statistics, None)
    (gate, gate_stride), (shift, shift_stride), (scale, scale_stride) = map(_rows, (gate, shift, scale))
    if x.numel() > 0:
        sm, multiprocessors = _device(x.device)
        options = forward_options(sm, x.dtype)
        rows = rows_per_program(B, N, resident(options) * multiprocessors)
        with torch.cuda.device_of(x):
            _forward_kernel[(B, triton.cdiv(N, rows))](
                x,
                residual,
                gate,
                gate_row,
                shift,
                shift_row,
                scale,
                scale_row,
                x1,
                y,
                mean,
                rstd,
                y_scale,
                gate_stride,
                shift_stride,
                scale_stride,
                N,
                rows,
                eps,
                LARGEST=LARGEST_CODE.get(dtype),
                **tiles(D),
                **options,
            )
    return x1, y, *statistics


def forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    shift: Tensor,
    shift_row: Tensor | None,
    scale: Tensor,
    scale_row: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x1 = x + (gate + gate_row) residual; y = LayerNorm(x1) (1 + scale + scale_row) + shift + shift_row.

    x, residual [B, N, D] of one dtype; shift, scale, gate [B, D]; rows [D] -> x1, y like x, contiguous; mean, rstd fp32
    [B, N]. Without a residual x1 is empty, [0]; without a gate the residual is added as it is.
    """
    return _launch_forward(x, residual, gate, gate_row, shift, shift_row, scale, scale_row, eps, x.dtype, False)


def forward_quantized(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    shift: Tensor,
    shift_row: Tensor | None,
    scale: Tensor,
    scale_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` with y in 8 bits, one scale per row -> x1; y int8 or float8_e4m3fn [B, N, D]; y_scale fp32 [B, N].

    y_scale is the row's absolute maximum over 127 (448 for float8_e4m3fn), and y the row over y_scale, rounded to the
    nearest, ties to even. A row below 1e-30 has scale 1 and zeros. Raises RuntimeError for float8_e4m3fn before sm_89.
    """
    if dtype == torch.float8_e4m3fn and _device(x.device)[0] < 89:
        raise RuntimeError(
            f"float8_e4m3fn needs compute capability 8.9, and {x.device} has {_device(x.device)[0] / 10}"
        )
    return _launch_forward(x, residual, gate, gate_row, shift, shift_row, scale, scale_row, eps, dtype, True)


def backward(
    dx1: Tensor | None,
    dy: Tensor,
    x1: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    scale_row: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`, from what it returned, its modulation, and residual where there was a gate.

    dx1 (None for zero), dy, x1, residual [B, N, D] -> dx, dresidual like x1, contiguous; dgate, dshift, dscale fp32
    [B, D]. Without a gate dresidual and dgate are empty, [0]: the residual's gradient is then dx.
    """
    B, N, D = x1.shape
    dy, x1, mean, rstd = (t.contiguous() for t in (dy, x1, mean, rstd))
    dx1, residual = (None if t is None else t.contiguous() for t in (dx1, residual))
    (scale, scale_stride), (gate, gate_stride) = map(_rows, (scale, gate))
    gated = gate is not None
    dx = torch.empty_like(x1)
    dresidual = torch.empty_like(x1) if gated else x1.new_empty(0)
    dshift, dscale = (torch.empty((B, D), dtype=torch.float32, device=x1.device) for _ in range(2))
    dgate = torch.empty((B, D) if gated else 0, dtype=torch.float32, device=x1.device)
    if x1.numel() == 0:
        return dx, dresidual, dgate.zero_(), dshift.zero_(), dscale.zero_()

    rows = rows_per_program(B, N, resident(BACKWARD) * _device(x1.device)[1])
    programs = triton.cdiv(N, rows)
    partial = torch.empty((3 if gated else 2, B, programs, D), dtype=torch.float32, device=x1.device)
    with torch.cuda.device_of(x1):
        _backward_kernel[(B, programs)](
            dx1,
            dy,
            x1,
            mean,
            rstd,
            scale,
            scale_row,
            residual,
            gate,
            gate_row,
            dx,
            dresidual,
            partial,
            scale_stride,
            gate_stride,
            N,
            rows,
            **tiles(D),
            **BACKWARD,
        )
        _reduce_kernel[(B, triton.cdiv(D, REDUCE_TILE["BLOCK_D"]))](
            partial, dshift, dscale, dgate if gated else None, programs, D=D, **REDUCE_TILE, **REDUCE
        )
    return dx, dresidual, dgate, dshift, dscale


def variants(sm: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Every configuration that XL/2 (D 1152) launches on sm_`sm`: (label, kernel, signature, constants, options).

    Data and condition in bf16 (fp16 before sm_80), the block's rows in fp32. A launch finds every pointer and every
    argument named *_stride divisible by 16, and never specialises N, rows and programs.
    """
    data, x_dtype = ("*bf16", torch.bfloat16) if sm >= 80 else ("*fp16", torch.float16)
    options = forward_options(sm, x_dtype)
    types = dict.fromkeys(("N", "rows", "programs", "gate_stride", "shift_stride", "scale_stride"), "i32")
    types |= {"eps": "fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "y_scale_ptr": "*fp32", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("gate_row_ptr", "shift_row_ptr", "scale_row_ptr"), "*fp32")

    def variant(label, kernel, constants, options, absent, special):
        names = [name for name in kernel.arg_names if not name.isupper() or name == "N"]
        signature = {name: (types | special).get(name, data) for name in names if name not in absent}
        return label, kernel, signature, constants | dict.fromkeys(absent), options

    gate = ("gate_ptr", "gate_row_ptr")
    outputs = {"": None, ", int8": torch.int8, ", fp8": torch.float8_e4m3fn}
    if sm < 89:
        del outputs[", fp8"]
    for suffix, dtype in outputs.items():
        special = {} if dtype is None else {"y_ptr": "*i8" if dtype == torch.int8 else "*fp8e4nv"}
        constants = {"LARGEST": LARGEST_CODE.get(dtype), **tiles(1152)}
        for label, absent in (("gate", ()), ("residual", gate), ("no residual", ("residual_ptr", *gate))):
            absent += ("y_scale_ptr",) if dtype is None else ("mean_ptr", "rstd_ptr")
            yield variant(f"forward, {label}{suffix}", _forward_kernel, constants, options, absent, special)
    for label, absent in (("gate", ()), ("no gate", ("residual_ptr", *gate))):
        yield variant(f"backward, {label}", _backward_kernel, tiles(1152), BACKWARD, absent, {})
        yield variant(f"backward, {label}, no dx1", _backward_kernel, tiles(1152), BACKWARD, ("dx1_ptr", *absent), {})
    special = dict.fromkeys(("dshift_ptr", "dscale_ptr", "dgate_ptr"), "*fp32")
    for label, absent in (("gate", ()), ("no gate", ("dgate_ptr",))):
        constants = {"D": 1152, **REDUCE_TILE}
        yield variant(f"sum over programs, {label}", _reduce_kernel, constants, REDUCE, absent, special)
