"""Mutations of the matrix products with epilogues."""

from tests.mutations import Mutation, Subject

SMALL = ("test_gated_linear[(2, 63, 100, 72)-dtype0]",)
SMALL_GELU = ("test_linear_gelu[(2, 63, 100, 72)-dtype0]",)

SUBJECT = Subject(
    "kernels/linear.py",
    "tests/kernels/test_linear.py",
    (
        Mutation("wrong sample's gate", "gate_ptr + sample * gate_stride + d", "gate_ptr + d", SMALL),
        Mutation(
            "gate_row of the block subtracted",
            "    if gate_row_ptr is not None:\n        gate +=",
            "    if gate_row_ptr is not None:\n        gate -=",
            SMALL,
        ),
        Mutation(
            "bias forgotten",
            "y += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]",
            "y += 0.0",
            SMALL,
        ),
        Mutation("last element of the sum masked", "start + k < K", "start + k < K - 1", SMALL),
        Mutation(
            "end of the sum not masked for K 96", "K % tile.block_k != 0", "K % 32 != 0", ("test_strides[dtype1]",)
        ),
        Mutation("last feature reads the one before it", "tl.minimum(d, D - 1)", "tl.minimum(d, D - 2)", SMALL),
        Mutation("samples begin one token early", "* N  # 128", "* (N - 1)  # 128", SMALL),
        Mutation(
            "last token of a tile computed by the next one too",
            "tile % tiles_of_sample * BLOCK_N",
            "tile % tiles_of_sample * (BLOCK_N - 1)",
            ("test_every_tile[128x128-(1, 256, 192, 128)-dtype0]",),
        ),
        Mutation(
            "every group of tiles is the first",
            "tile = group * GROUP_N + inside % members",
            "tile = inside % members",
            ("test_gated_linear[(33, 1, 200, 130)-dtype0]",),
        ),
        Mutation(
            "last feature not stored",
            "keep = (n < N)[:, None] & (d < D)[None, :]\n    tl.store",
            "keep = (n < N)[:, None] & (d < D - 1)[None, :]\n    tl.store",
            SMALL_GELU,
        ),
        Mutation(
            "sums in fp16",
            'y = tl.dot(a, tl.trans(weight), y, input_precision="ieee")',
            'y = tl.dot(a, tl.trans(weight), y, input_precision="ieee").to(tl.float16).to(tl.float32)',
            SMALL,
        ),
        Mutation(
            "product rounded before the residual is added",
            "(residual + gate[None, :] * y).to(",
            "(residual + (gate[None, :] * y).to(y_ptr.dtype.element_ty)).to(",
            ("test_rounded_once[dtype0]",),
        ),
        Mutation("GELU to the base e where exp2 has 2", "(-2 * LOG2_E)", "-2.0", SMALL_GELU),
        Mutation("GELU's constant to three digits", "0.044715 * x", "0.0447 * x", SMALL_GELU),
        Mutation(
            "GELU as a quotient of two infinities",
            "return x / (1 + tl.exp2(u * (-2 * LOG2_E)))",
            "power = tl.exp2(u * (2 * LOG2_E))\n    return x * power / (1 + power)",
            ("test_gelu_far_from_zero[dtype0]",),
        ),
        Mutation(
            "residual taken as contiguous",
            "weight.contiguous(), residual.contiguous()",
            "weight.contiguous(), residual",
            ("test_strides[dtype0]",),
        ),
        Mutation("result in the residual's memory", "y = torch.empty_like(residual)", "y = residual", SMALL),
    ),
)
