"""Mutations of the Triton adaLN."""

from tests.mutations import Mutation, Subject

PLAIN = ("test_forward_of_optional_operands[dtype0-x]",)
GATED = ("test_forward_of_optional_operands[dtype0-gate]",)
MASKED = ("test_forward[100-dtype4]",)
PLAIN_BACKWARD = ("test_backward_of_optional_operands[x-False]",)
GATED_BACKWARD = ("test_backward_of_optional_operands[gate-True]",)

SUBJECT = Subject(
    "kernels/modulated_layernorm.py",
    "tests/kernels/test_modulated_layernorm.py",
    (
        Mutation(
            "wrong sample's scale, forward",
            "scale_row_ptr, b * scale_stride, D, HEAD, TAIL)\n    if gate",
            "scale_row_ptr, 0 * scale_stride, D, HEAD, TAIL)\n    if gate",
            PLAIN,
        ),
        Mutation(
            "gate_row of the block ignored, forward",
            "_load_modulation(gate_ptr, gate_row_ptr, b * gate_stride, D, HEAD, TAIL)\n    for",
            "_load_modulation(gate_ptr, None, b * gate_stride, D, HEAD, TAIL)\n    for",
            GATED,
        ),
        Mutation(
            "scale for 1 + scale",
            "(tail - excess) * rstd * (1 + scale_tail)",
            "(tail - excess) * rstd * scale_tail",
            PLAIN,
        ),
        Mutation(
            "statistics in fp16",
            "rstd = tl.rsqrt(square / D - excess * excess + eps)",
            "rstd = tl.rsqrt((square / D - excess * excess + eps).to(tl.float16).to(tl.float32))",
            PLAIN,
        ),
        Mutation(
            "statistics of the unrounded x1",
            "head, tail = stored_head.to(tl.float32), stored_tail.to(tl.float32)",
            "head, tail = head + residual_head, tail + residual_tail",
            ("test_y_is_of_the_rounded_x1[dtype1]",),
        ),
        Mutation("the mean's rounding left in y", "excess /= D", "excess *= 0.0", ("test_rows_far_off_centre",)),
        Mutation("variance over D - 1", "rstd = tl.rsqrt(square / D ", "rstd = tl.rsqrt(square / (D - 1) ", PLAIN),
        Mutation("eps 1e-2", "- excess * excess + eps)", "- excess * excess + 1e-2)", ("test_eps",)),
        Mutation(
            "padding counted in the variance",
            "tail = tl.where(HEAD + tl.arange(0, TAIL) < D, tail, 0.0)",
            "tail = tail + 0.0",
            MASKED,
        ),
        Mutation(
            "last column not stored",
            "tl.store(ptr + columns, tail, mask=columns < D)",
            "tl.store(ptr + columns, tail, mask=columns < D - 1)",
            MASKED,
        ),
        Mutation(
            "last column not read",
            "tl.load(ptr + columns, mask=columns < D, other=0.0)",
            "tl.load(ptr + columns, mask=columns < D - 1, other=0.0)",
            MASKED,
        ),
        Mutation(
            "last token left out, forward",
            "tl.minimum(first + rows, N), num_stages=STAGES):\n        row = b * N + n\n        head",
            "tl.minimum(first + rows, N - 1), num_stages=STAGES):\n        row = b * N + n\n        head",
            PLAIN,
        ),
        Mutation(
            "wrong sample's scale, backward",
            "scale_row_ptr, b * scale_stride, D, HEAD, TAIL)\n    dshift",
            "scale_row_ptr, 0 * scale_stride, D, HEAD, TAIL)\n    dshift",
            PLAIN_BACKWARD,
        ),
        Mutation(
            "mean(g) missing in dx",
            "head = rstd * (dy_head - along_ones - head * along_x_hat)",
            "head = rstd * (dy_head - head * along_x_hat)",
            PLAIN_BACKWARD,
        ),
        Mutation(
            "mean(g x_hat) missing in dx",
            "tail = rstd * (dy_tail - along_ones - tail * along_x_hat)",
            "tail = rstd * (dy_tail - along_ones)",
            PLAIN_BACKWARD,
        ),
        Mutation("dx1 missing in dx", "tail += dx1_tail", "tail += 0.0", GATED_BACKWARD),
        Mutation(
            "dgate's term missing in the tail",
            "dgate_tail += residual_tail * tail",
            "dgate_tail += 0.0 * tail",
            GATED_BACKWARD,
        ),
        Mutation(
            "dgate without the gradient of x1",
            "dgate_head += residual_head * head",
            "dgate_head += residual_head * (head - dx1_head if dx1_ptr is not None else head)",
            GATED_BACKWARD,
        ),
        Mutation(
            "dresidual without the gate",
            "            tail *= gate_tail\n            _store(dresidual",
            "            tail *= 1.0\n            _store(dresidual",
            GATED_BACKWARD,
        ),
        Mutation("dscale a sum of dy", "dscale_tail += dy_tail * tail", "dscale_tail += dy_tail", PLAIN_BACKWARD),
        Mutation(
            "last program's sums left out",
            "inside = (p < programs)[:, None]",
            "inside = (p < programs - 1)[:, None]",
            PLAIN_BACKWARD,
        ),
        Mutation(
            "sums of the first sample for all",
            "partial_ptr += b * programs * D",
            "partial_ptr += 0 * b * programs * D",
            PLAIN_BACKWARD,
        ),
        Mutation(
            "int8 truncates",
            "tail = tail + 12582912.0 - 12582912.0",
            "tail = tail + 0.0",
            ("test_int8_rounds_halves_to_even",),
        ),
        Mutation(
            "row's maximum without its magnitude",
            "largest = _max(tl.abs(head), tl.abs(tail), HEAD, TAIL)",
            "largest = _max(head, tail, HEAD, TAIL)",
            ("test_int8[dtype0-x]",),
        ),
        Mutation(
            "NaN quantised as zero",
            "y_scale = tl.where(largest < 1e-30, 1.0, largest / LARGEST)",
            "y_scale = tl.where(largest > 1e-30, largest / LARGEST, 1.0)",
            ("test_rows_that_have_no_scale[dtype0]",),
        ),
        Mutation("fp8 to 240", "torch.float8_e4m3fn: 448.0", "torch.float8_e4m3fn: 240.0", ("test_fp8_scale",)),
        Mutation(
            "dy taken as contiguous",
            "dy, x1, mean, rstd = (t.contiguous() for t in (dy, x1, mean, rstd))",
            "x1, mean, rstd = (t.contiguous() for t in (x1, mean, rstd))",
            ("test_strides",),
        ),
        Mutation(
            "sums over no tokens left unset",
            "return dx, dresidual, dgate.zero_(), dshift.zero_(), dscale.zero_()",
            "return dx, dresidual, dgate, dshift, dscale",
            ("test_nothing[shape1]",),
        ),
    ),
)
