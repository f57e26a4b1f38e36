"""Mutations of the C++ operators."""

from tests.mutations import Mutation, Subject

ALL = ("test_every_operand[dtype0-all]",)
PLAIN = ("test_every_operand[dtype0-plain]",)
GATE = ("test_every_operand[dtype0-gate]",)
RAGGED = ("test_lengths[dtype0]",)

SUBJECTS = (
    Subject(
        "kernels/cpu/modulated_layernorm.cpp",
        "tests/test_modulated_layernorm_cpu.py",
        (
            Mutation(
                "wrong sample's modulation",
                "out[i] = base + (sample[b * stride + i] + row[i]);",
                "out[i] = base + (sample[i] + row[i]);",
                ALL,
            ),
            Mutation(
                "modulation of the sample before", "if (row == begin || row % N == 0) {", "if (row == begin) {", PLAIN
            ),
            Mutation(
                "last columns left out of the statistics",
                "for (int64_t i = 4 * quarter; i < D; ++i) {",
                "for (int64_t i = 4 * quarter; i < D - 1; ++i) {",
                ("test_forward[dtype0-2-63-231]",),
            ),
            Mutation(
                "variance about the first quarter's mean",
                "centred.square / count - error * error + task.eps",
                "centred.square / count + task.eps",
                ("test_statistics_of_a_row_whose_quarters_differ[100]",),
            ),
            Mutation(
                "mean(g) missing in dx",
                "(a_dy * scale[i] - a_g - a_hat * a_gx)",
                "(a_dy * scale[i] - a_hat * a_gx)",
                PLAIN,
            ),
            Mutation("dx1 missing in every other row", "widen(b.dx1[i]) + b.rstd * ", "b.rstd * ", GATE),
            Mutation(
                "dgate without every other row",
                "dgate[i] += widen(a.residual[i]) * a_dx + widen(b.residual[i]) * b_dx;",
                "dgate[i] += widen(a.residual[i]) * a_dx;",
                GATE,
            ),
            Mutation(
                "dresidual without the gate",
                "narrow(gate[i] * a_dx, a.dresidual[i]);",
                "narrow(a_dx, a.dresidual[i]);",
                GATE,
            ),
            Mutation(
                "second chunk left out of the sums",
                "for (int64_t chunk = 1; chunk < chunks; ++chunk) {",
                "for (int64_t chunk = 2; chunk < chunks; ++chunk) {",
                PLAIN,
            ),
        ),
    ),
    Subject(
        "kernels/cpu/simd.h",
        "tests/test_modulated_layernorm_cpu.py",
        (
            Mutation(
                "bf16 truncated",
                "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
                "bits >> 16",
                ("test_bf16_is_the_fp32_result_rounded_once",),
            ),
        ),
    ),
    Subject(
        "kernels/cpu/cross_attention.cpp",
        "tests/test_cross_attention_cpu.py",
        (
            Mutation(
                "one token of padding counted",
                "std::min(std::max<int64_t>(lengths[b], 0), L)",
                "std::min(std::max<int64_t>(lengths[b] + 1, 0), L)",
                RAGGED,
            ),
            Mutation(
                "wrong sample's data",
                "const int64_t offset = b * from.sample + (first + row)",
                "const int64_t offset = (first + row)",
                RAGGED,
            ),
            Mutation(
                "blocks of 32 keys overwrite one another",
                "to = ADD || begin > 0 ? to + sum[r][p] : sum[r][p];",
                "to = ADD ? to + sum[r][p] : sum[r][p];",
                RAGGED,
            ),
            Mutation(
                "exponentials of uncentred scores",
                "maximum[i] = p[i], sum[i] = 0;",
                "maximum[i] = 0, sum[i] = 0;",
                ("test_scores_far_apart[300]",),
            ),
            Mutation(
                "log-sum-exp of unscaled scores",
                "maximum[i] * scale + std::log(sum[i])",
                "maximum[i] + std::log(sum[i])",
                ("test_log_sum_exp[dtype0]",),
            ),
            Mutation(
                "dk without the scale",
                "store_rows(dk + l * width, width, scales,",
                "store_rows(dk + l * width, width, ones,",
                RAGGED,
            ),
            Mutation(
                "tokens of the block before in the last one's empty lanes",
                "if (count < LANES) std::fill(q_tokens, q_tokens + 2 * LANES * width, 0.0f);",
                "",
                RAGGED,
            ),
        ),
    ),
)
