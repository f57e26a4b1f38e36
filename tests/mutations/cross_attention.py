"""Mutations of the Triton cross-attention."""

from tests.mutations import Mutation, Subject

# One tile of text: two kernels backward as on sm_80, one pass as on sm_90.
TWO_KERNELS = ("test_captions_of_few_tokens[80]",)
ONE_PASS = ("test_captions_of_few_tokens[90]",)
TWO_TILES = ("test_other_heads[80-dtype1-80]",)

SUBJECT = Subject(
    "kernels/cross_attention.py",
    "tests/kernels/test_cross_attention.py",
    (
        Mutation(
            "one token of padding counted",
            "s = tl.where(count[None, :], _inner(",
            "s = tl.where((tokens <= length)[None, :], _inner(",
            TWO_KERNELS,
        ),
        Mutation("wrong sample's length", "tl.load(lengths_ptr + b)", "tl.load(lengths_ptr + 0 * b)", TWO_KERNELS),
        Mutation(
            "length beyond the text",
            "return tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), L)",
            "return tl.load(lengths_ptr + b).to(tl.int32)",
            ("test_a_length_beyond_the_tensor_is_all_of_it[80]",),
        ),
        Mutation(
            "NaN of the padding times a weight of zero",
            "_load(v_ptr, tokens, v_stride_l, count, MAIN, V_TAIL, HEAD)",
            "_load(v_ptr, tokens, v_stride_l, tokens < L, MAIN, V_TAIL, HEAD)",
            TWO_KERNELS,
        ),
        Mutation(
            "scores not scaled",
            "p = tl.exp2((s - new_top[:, None]) * (scale * LOG2E))",
            "p = tl.exp2((s - new_top[:, None]) * LOG2E)",
            TWO_KERNELS,
        ),
        Mutation("o not rescaled by the next tile", "        o *= rescale[:, None]\n", "", TWO_TILES),
        Mutation(
            "sum not rescaled by the next tile",
            "total = total * rescale + tl.sum(p, 1)",
            "total = total + tl.sum(p, 1)",
            TWO_TILES,
        ),
        Mutation(
            "statistics in fp16",
            "total = total * rescale + tl.sum(p, 1)",
            "total = (total * rescale + tl.sum(p, 1)).to(tl.float16).to(tl.float32)",
            TWO_KERNELS,
        ),
        Mutation(
            "lse in base 2",
            "top * scale + tl.log(divisor)",
            "(top * scale + tl.log(divisor)) * LOG2E",
            TWO_KERNELS,
        ),
        Mutation(
            "last 8 columns of a head of 72 left out of the scores",
            'product = tl.dot(a_tail, b_tail.T, product, input_precision="ieee")',
            "product = product",
            TWO_KERNELS,
        ),
        Mutation(
            "last 8 columns of a head of 72 stored one early",
            "offsets, kept = _part(rows, stride, keep, MAIN, TAIL, HEAD)\n        tl.store(",
            "offsets, kept = _part(rows, stride, keep, MAIN - 1, TAIL, HEAD)\n        tl.store(",
            TWO_KERNELS,
        ),
        Mutation(
            "values of the first head for all",
            "v_ptr += b * v_stride_b + h * V_STRIDE_H\n    length",
            "v_ptr += b * v_stride_b\n    length",
            ("test_strides[do of a sum-80]",),
        ),
        Mutation(
            "delta missing in dq",
            "ds = (p * (dp - delta[:, None])).to(q.dtype)",
            "ds = (p * dp).to(q.dtype)",
            TWO_KERNELS,
        ),
        Mutation(
            "delta missing in one pass",
            "delta = tl.sum(p * dp, 0) if",
            "delta = tl.zeros([BLOCK_N], tl.float32) if",
            ONE_PASS,
        ),
        Mutation(
            "last 8 columns of a head of 72 left out of delta",
            "delta += tl.sum(o_tail.to(tl.float32) * do_tail.to(tl.float32), 1)",
            "delta += 0.0",
            TWO_KERNELS,
        ),
        Mutation("dk without the scale", "dk * ds_scale, dk_tail * ds_scale", "dk, dk_tail", TWO_KERNELS),
        Mutation(
            "a gradient for the score of an only token",
            "return tl.where(length > 1, scale, 0.0)",
            "return tl.where(length > 0, scale, 0.0)",
            ("test_model_heads[63-120-lengths0-2-dtype1-80]",),
        ),
        Mutation(
            "last tile of text left out of dk and dv",
            "tl.where(first < length, N, 0)",
            "tl.where(first + BLOCK_L <= length, N, 0)",
            TWO_KERNELS,
        ),
        Mutation(
            "parts of the image overlap",
            "tl.minimum(part * ROWS + ROWS, last)",
            "last",
            ("test_model_heads[130-300-lengths3-1-dtype1-80]",),
        ),
        Mutation(
            "last image token left out of dk and dv",
            "        keep = rows < N\n",
            "        keep = rows < N - 1\n",
            TWO_KERNELS,
        ),
        Mutation(
            "weights of padding in dv",
            's * (scale * LOG2E) - (lse * LOG2E)[None, :], float("-inf"))',
            "s * (scale * LOG2E) - (lse * LOG2E)[None, :], s * (scale * LOG2E) - (lse * LOG2E)[None, :])",
            TWO_KERNELS,
        ),
        Mutation(
            "dk and dv of the padding not written", "exists = tokens < L\n", "exists = tokens < length\n", TWO_KERNELS
        ),
        Mutation(
            "fp32's rounding of lse left in dq",
            "factor *= weight",
            "factor *= 1.0",
            ("test_other_heads[12-dtype0-80]",),
        ),
        Mutation(
            "do taken as contiguous",
            "do, o, lse = do.contiguous(), o",
            "do, o, lse = do, o",
            ("test_strides[do of a mean-80]",),
        ),
    ),
)
