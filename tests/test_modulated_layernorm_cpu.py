"""The native `modulated_layernorm`, forward and backward, against fp64, and as a PyTorch operator."""

import pytest
import torch
from torch.nn import functional as F

from pixart_fast import ops
from tests.accuracy import assert_rms

pytestmark = pytest.mark.skipif(ops.native_problem is not None, reason=str(ops.native_problem))

native_op = torch.ops.pixart_fast.modulated_layernorm
native_backward = torch.ops.pixart_fast.modulated_layernorm_backward
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("x", "residual", "gate", "gate_row", "shift", "shift_row", "scale", "scale_row")
# Which operands there are: as in the model's first norm, after cross-attention, after self-attention, and each alone.
OPERANDS = {
    "plain": ("x", "shift", "scale"),
    "rows": ("x", "shift", "shift_row", "scale", "scale_row"),
    "residual": ("x", "residual", "shift", "shift_row", "scale", "scale_row"),
    "gate": ("x", "residual", "gate", "shift", "scale"),
    "all": NAMES,
    "shift_row": ("x", "shift", "shift_row", "scale"),
    "scale_row": ("x", "shift", "scale", "scale_row"),
    "gate_row": ("x", "residual", "gate", "gate_row", "shift", "scale"),
}


def inputs_of(B, N, D, dtype, operands="all", modulation_dtype=None):
    """x off centre, so that statistics of low precision would show; a modulation of its own for every sample, as views
    of one condition and one table."""
    generator = torch.Generator().manual_seed(B + N + D)
    condition, table = (torch.randn(*s, generator=generator).to(modulation_dtype or dtype) for s in ((B, 6, D), (6, D)))
    given = {name: torch.randn(B, N, D, generator=generator) for name in ("x", "residual")}
    given = {name: tensor.to(dtype) for name, tensor in given.items()} | {"x": (3 + given["x"]).to(dtype)}
    for i, name in enumerate(("shift", "scale", "gate")):
        given[name], given[f"{name}_row"] = condition[:, i], table[i]
    return [given[name] if name in OPERANDS[operands] else None for name in NAMES]


def upstream(B, N, D, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, N, D, generator=generator).to(dtype) for _ in range(2)]


def cast(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def native(*operands):
    x1, y, _, _ = native_op(*operands, 1e-6)
    return [x1, y] if operands[1] is not None else [y]


def plain(x, residual, gate, gate_row, shift, shift_row, scale, scale_row):
    def total(sample, row):
        return (sample if row is None else sample + row)[:, None]

    if residual is not None:
        x = x + residual if gate is None else x + total(gate, gate_row) * residual
    y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + total(scale, scale_row)) + total(shift, shift_row)
    return [x, y] if residual is not None else [y]


def gradients(function, operands, upstream):
    operands = [None if t is None else t.detach().requires_grad_() for t in operands]
    outputs = function(*operands)
    return torch.autograd.grad(outputs, [t for t in operands if t is not None], upstream[: len(outputs)])


def assert_as_plain(operands):
    """Outputs and all gradients, against fp64."""
    B, N, D = operands[0].shape
    dtype, dy = operands[0].dtype, upstream(B, N, D, operands[0].dtype)
    wide = cast(operands, torch.float64)
    # The baseline in one dtype: with an fp32 modulation, plain PyTorch would do bf16's arithmetic in fp32.
    same = cast(operands, dtype)
    for actual, truth, baseline in zip(native(*operands), plain(*wide), plain(*same), strict=True):
        assert_rms(actual, truth, baseline)
    names = [name for name, t in zip(NAMES, operands, strict=True) if t is not None]
    expected, baselines = gradients(plain, wide, cast(dy, torch.float64)), gradients(plain, same, dy)
    for name, actual, truth, baseline in zip(names, gradients(native, operands, dy), expected, baselines, strict=True):
        assert actual.dtype == operands[NAMES.index(name)].dtype, name
        assert_rms(actual.to(dtype), truth, baseline)


# D: the models'; one AVX-512 register and the step of four; one less and one more than each; odd; a single channel.
@pytest.mark.parametrize("D", [1152, 384, 128, 100, 16, 64, 15, 17, 63, 65, 231, 1])
# Enough rows for the RMS to be one: the error of a row depends on how luckily its mean of about 3 rounds.
@pytest.mark.parametrize(("B", "N"), [(64, 1), (2, 63), (2, 231)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(B, N, D, dtype):
    operands = inputs_of(B, N, D, dtype)
    for actual, truth, baseline in zip(
        native(*operands), plain(*cast(operands, torch.float64)), plain(*operands), strict=True
    ):
        assert_rms(actual, truth, baseline)


@pytest.mark.parametrize("operands", OPERANDS)
# One chunk and a part of one, an odd number of rows.
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operand(operands, dtype):
    assert_as_plain(inputs_of(3, 47, 384, dtype, operands))


# 4096 tokens: the modulation's gradients are long sums, which PyTorch takes in a tree.
@pytest.mark.parametrize(
    ("B", "N", "D"),
    [(64, 1, 1152), (2, 32, 768), (2, 231, 1023), (64, 33, 100), (64, 33, 17), (2, 4096, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(B, N, D, dtype):
    # The gradients of 17 numbers in a table row would be a draw.
    assert_as_plain(inputs_of(B, N, D, dtype, "all" if D > 17 else "gate"))


@pytest.mark.parametrize("modulation_dtype", [torch.float32, torch.float16, torch.float64])
def test_a_modulation_of_another_dtype(modulation_dtype):
    assert_as_plain(inputs_of(2, 33, 100, torch.bfloat16, modulation_dtype=modulation_dtype))


@pytest.mark.parametrize("N", [1, 63])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(N, dtype):
    x1, _, mean, rstd = native_op(*inputs_of(2, N, 1152, dtype), 1e-6)
    x1 = x1.double()
    torch.testing.assert_close(mean.double(), x1.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (x1.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("first", [0, 100])
def test_statistics_of_a_row_whose_quarters_differ(first):
    """They are centred at the mean of the first quarter."""
    x = torch.randn(1, 40, 1152, generator=torch.Generator().manual_seed(0))
    x[..., :288] += first
    zero = torch.zeros(1, 1152)
    _, _, mean, rstd = native_op(x, None, None, None, zero, None, zero, None, 1e-6)
    x = x.double()
    torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rstd.double(), (x.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-6, atol=0)


def test_bf16_is_the_fp32_result_rounded_once():
    """To the nearest, ties to even, exactly as PyTorch rounds, and LayerNorm is of the rounded sum."""
    operands = inputs_of(2, 63, 1152, torch.bfloat16)
    x1, y = native(*operands)
    wide = cast(operands, torch.float32)
    assert torch.equal(x1, native(*wide)[0].bfloat16())
    # The fp32 values of two instantiations may differ in their last bit, and so in some thousandths of the roundings.
    expected = native(x1.float(), None, None, None, *wide[4:])[0].bfloat16()
    assert (y != expected).float().mean() < 2e-3
    assert ((y.float() - expected.float()).abs() <= expected.float().abs() * 2**-7).all()


def test_the_nan_of_all_ones_stays_nan():
    """Rounded to bf16 like a number it would be -0."""
    x, zero = torch.randn(1, 2, 64).bfloat16(), torch.zeros(1, 64)
    nan = torch.full((1, 64), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert native_op(x, None, None, None, nan, None, zero, None, 1e-6)[1].isnan().all()


def test_second_derivatives_go_through_the_statistics():
    operands = inputs_of(8, 5, 16, torch.float32, "gate")
    dy = upstream(8, 5, 16, torch.float32)

    def penalty(function, dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in operands]
        wanted = [t for t in leaves if t is not None]
        first = torch.autograd.grad(function(*leaves), wanted, cast(dy, dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (leaves[0], leaves[1], leaves[2], leaves[6]))

    expected, baseline = penalty(plain, torch.float64), penalty(plain, torch.float32)
    for actual, truth, plain_one in zip(penalty(native, torch.float32), expected, baseline, strict=True):
        assert_rms(actual, truth, plain_one)


def test_non_contiguous_inputs_and_expanded_gradients():
    B, N, D = 2, 63, 384
    x, residual, *modulation = inputs_of(B, N, D, torch.float32)
    operands = [x.mT.contiguous().mT, residual.mT.contiguous().mT, *modulation]
    operands[4] = operands[4].mT.contiguous().mT  # shift with another last stride
    assert not any(t.is_contiguous() for t in (operands[0], operands[1], operands[2], operands[4], operands[6]))
    assert_as_plain(operands)
    one = [torch.ones(()).expand(B, N, D)] * 2
    dense = [torch.ones(B, N, D)] * 2
    transposed = [t.mT.contiguous().mT for t in dense]
    for upstream_gradients in (one, transposed):
        for actual, expected in zip(
            gradients(native, operands, upstream_gradients), gradients(native, operands, dense), strict=True
        ):
            assert torch.equal(actual, expected)


def test_a_missing_upstream_gradient_counts_as_zero():
    operands = inputs_of(2, 33, 64, torch.float32)
    x1, y, mean, rstd = native_op(*operands, 1e-6)
    dx1, dy = upstream(2, 33, 64, torch.float32)
    backward = (x1, mean, rstd, operands[6], operands[7], operands[1], operands[2], operands[3])
    for absent, zero in zip(
        native_backward(None, dy, *backward), native_backward(torch.zeros_like(dx1), dy, *backward), strict=True
    ):
        assert torch.equal(absent, zero)
    leaf = operands[0].detach().requires_grad_()
    x1, y, *_ = native_op(leaf, *operands[1:], 1e-6)
    (of_x1,) = torch.autograd.grad(x1, leaf, dx1, retain_graph=True)
    assert torch.equal(of_x1, dx1)
    (of_y,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(of_y, native_backward(None, dy, *backward)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_alone(dtype, bad):
    operands = inputs_of(2, 5, 67, dtype)
    good = native(*operands)[1]
    operands[1][1, 2, 3] = bad
    y = native(*operands)[1]
    assert y[1, 2].isnan().all()
    y[1, 2] = good[1, 2]
    assert torch.equal(y, good)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operands", ["plain", "all"])
def test_threads_do_not_change_a_bit(dtype, operands):
    operands = inputs_of(3, 77, 129, dtype, operands)
    dy = upstream(3, 77, 129, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append([*native(*operands), *gradients(native, operands, dy)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing_in_nothing_out(shape):
    B, _, D = shape
    x, row = torch.empty(shape), torch.zeros(B, D)
    x1, y, mean, rstd = native_op(x, x, row, None, row, None, row, None, 1e-6)
    assert x1.shape == y.shape == shape and mean.shape == rstd.shape == shape[:2]
    dx, dresidual, *sums = native_backward(None, x, x1, mean, rstd, row, None, x, row, None)
    assert dx.shape == dresidual.shape == shape
    assert all(torch.equal(t, row) for t in sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("operands", ["plain", "residual", "all"])
def test_opcheck(dtype, requires_grad, operands):
    operands = inputs_of(2, 5, 24, dtype, operands)
    operands[0] = operands[0].transpose(0, 1).contiguous().transpose(0, 1)
    operands = [None if t is None else t.detach().requires_grad_(requires_grad) for t in operands]
    torch.library.opcheck(native_op.default, (*operands, 1e-6))


@pytest.mark.parametrize("operands", ["plain", "residual", "all"])
def test_opcheck_of_the_backward(operands):
    operands = inputs_of(2, 5, 24, torch.float32, operands)
    x1, _, mean, rstd = native_op(*operands, 1e-6)
    dx1, dy = upstream(2, 5, 24, torch.float32)
    x, residual, gate, gate_row, *_, scale, scale_row = operands
    stored, gated = x if residual is None else x1, None if gate is None else residual
    arguments = (dx1, dy, stored, mean, rstd, scale, scale_row, gated, gate, gate_row)
    torch.library.opcheck(native_backward.default, arguments)


def test_a_compiled_graph_can_hold_it():
    """Asked for by name, the native operator is one opaque node: no graph break, for any shape."""
    torch._dynamo.reset()

    def by_name(x, shift, scale):
        return ops.modulated_layernorm(x, shift, scale, backend="cpu")[1]

    compiled = torch.compile(by_name, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N in ((2, 5), (3, 7)):
        x, *_, shift, _, scale, _ = inputs_of(B, N, 24, torch.float32)
        dy = upstream(B, N, 24, torch.float32)[:1]
        assert torch.equal(compiled(x, shift, scale), by_name(x, shift, scale))
        operands = (x, shift, scale)
        for actual, eager in zip(
            gradients(lambda *t: [compiled(*t)], operands, dy),
            gradients(lambda *t: [by_name(*t)], operands, dy),
            strict=True,
        ):
            torch.testing.assert_close(actual, eager)


def test_wrong_arguments_are_refused():
    x, m, row = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(8)

    def forward(x=x, residual=None, gate=None, gate_row=None, shift=m, shift_row=None, scale=m, scale_row=None):
        return native_op(x, residual, gate, gate_row, shift, shift_row, scale, scale_row, 1e-6)

    def backward(dx1=None, dy=x, mean=x[..., 0], residual=None, gate=None):
        return native_backward(dx1, dy, x, mean, x[..., 0], m, None, residual, gate, None)

    for call, arguments, sentence in (
        (forward, {"x": x[0]}, r"x is \[B, N, D\]"),
        (forward, {"x": x.double()}, "float32 or bfloat16"),
        (forward, {"shift": m[:1]}, r"shift is \[B, D\] = \[2, 8\], not \[1, 8\]"),
        (forward, {"scale": m[:, :4]}, r"scale is \[B, D\] = \[2, 8\], not \[2, 4\]"),
        (forward, {"scale_row": m}, r"scale_row is \[D\] = \[8\]"),
        (forward, {"gate": m}, "a gate comes with a residual"),
        (forward, {"residual": x, "gate_row": row}, "gate_row .* comes with a gate"),
        (forward, {"residual": x[:1]}, "residual is like x"),
        (forward, {"residual": x.bfloat16()}, "residual is like x"),
        (backward, {"dy": x[:1]}, "dy is like x"),
        (backward, {"dx1": x.bfloat16()}, "dx1 is like x"),
        (backward, {"mean": x[..., :2]}, r"mean and rstd are float32 \[B, N\] = \[2, 3\]"),
        (backward, {"residual": x}, "residual and gate come together"),
        (backward, {"residual": x[:, :1], "gate": m}, "residual is like x"),
    ):
        call()
        with pytest.raises(RuntimeError, match=sentence):
            call(**arguments)
    with pytest.raises(RuntimeError, match=r"it takes float32 and bfloat16, not torch\.float64"):
        ops.modulated_layernorm(x.double(), m, m, backend="cpu")


@pytest.mark.parametrize("needs_grad", [False, True])
def test_auto_takes_it(needs_grad):
    assert ops.resolve("modulated_layernorm", needs_grad=needs_grad).name == "cpu"
    x, *_, shift, _, scale, _ = inputs_of(1, 2, 8, torch.float32)
    y = ops.modulated_layernorm(x.requires_grad_(needs_grad), shift, scale)[1]
    assert torch.equal(y, native_op(x, None, None, None, shift, None, scale, None, 1e-6)[1])
    assert y.requires_grad == needs_grad


def test_a_missing_library_is_reported(monkeypatch):
    monkeypatch.setattr(ops, "native_problem", "the native operators are not built")
    assert ops.resolve("modulated_layernorm") == ops.Choice("reference", "the native operators are not built")
    with pytest.raises(RuntimeError, match="backend 'cpu': the native operators are not built"):
        ops.resolve("modulated_layernorm", "cpu")
