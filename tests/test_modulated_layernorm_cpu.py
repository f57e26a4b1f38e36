"""The native forward of `modulated_layernorm` against fp64, and as a PyTorch operator."""

import pytest
import torch
from torch.nn import functional as F

from pixart_fast import ops
from pixart_fast.kernels import reference
from tests.accuracy import assert_rms

pytestmark = pytest.mark.skipif(ops.native_problem is not None, reason=str(ops.native_problem))


def inputs_of(B, N, D, dtype, modulation_dtype=None):
    """x off centre, so that statistics of low precision would show; a modulation of its own for every sample."""
    generator = torch.Generator().manual_seed(B + N + D)
    x, shift, scale, dy = (torch.randn(*s, generator=generator) for s in ((B, N, D), (B, D), (B, D), (B, N, D)))
    return (3 + x).to(dtype), shift.to(modulation_dtype or dtype), scale.to(modulation_dtype or dtype), dy.to(dtype)


def native(x, shift, scale):
    return ops.modulated_layernorm(x, shift, scale, backend="cpu")


def plain(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def gradients(function, inputs, dy):
    inputs = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*inputs), inputs, dy)


# D: the model's; one AVX-512 register and the step of four; one less and one more than each; odd; a single channel.
@pytest.mark.parametrize("D", [1152, 16, 64, 15, 17, 63, 65, 231, 1])
# Enough rows for the RMS to be one: the error of a row depends on how luckily its mean of about 3 rounds.
@pytest.mark.parametrize(("B", "N"), [(64, 1), (2, 63), (2, 231)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(B, N, D, dtype):
    *inputs, _ = inputs_of(B, N, D, dtype)
    expected = reference.modulated_layernorm(*(t.double() for t in inputs))
    assert_rms(native(*inputs), expected, plain(*inputs))


@pytest.mark.parametrize("N", [1, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(N, dtype):
    x, shift, scale, _ = inputs_of(2, N, 1152, dtype)
    _, mean, rstd = torch.ops.pixart_fast.modulated_layernorm(x, shift, scale, 1e-6)
    x = x.double()
    torch.testing.assert_close(mean.double(), x.mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (x.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-6, atol=0)


def test_bf16_is_the_fp32_result_rounded_once():
    """To the nearest, ties to even, exactly as PyTorch rounds."""
    x, shift, scale, _ = inputs_of(2, 63, 1152, torch.bfloat16, torch.float32)
    assert torch.equal(native(x, shift, scale), native(x.float(), shift, scale).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    *inputs, dy = inputs_of(3, 63, 231, dtype)
    expected = gradients(reference.modulated_layernorm, [t.double() for t in inputs], dy.double())
    for actual, truth, baseline in zip(
        gradients(native, inputs, dy), expected, gradients(plain, inputs, dy), strict=True
    ):
        assert_rms(actual, truth, baseline)


def test_second_derivatives_go_through_the_statistics():
    *inputs, dy = inputs_of(2, 5, 16, torch.float32)

    def penalty(function, dtype):
        x, shift, scale = (t.to(dtype).requires_grad_() for t in inputs)
        first = torch.autograd.grad(function(x, shift, scale), (x, scale), dy.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, scale))

    expected = penalty(reference.modulated_layernorm, torch.float64)
    baseline = penalty(reference.modulated_layernorm, torch.float32)
    for actual, truth, plain_one in zip(penalty(native, torch.float32), expected, baseline, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-4)
        assert_rms(actual, truth, plain_one)


def test_non_contiguous_inputs_and_expanded_gradients():
    B, N, D = 2, 63, 32
    x, _, _, _ = inputs_of(B, D, N, torch.float32)
    shift, _, scale, *_ = inputs_of(B, 6, D, torch.float32)[0].unbind(1)
    inputs = [x.transpose(1, 2), shift, scale]
    assert not any(t.is_contiguous() for t in inputs)
    expected = reference.modulated_layernorm(*(t.double() for t in inputs))
    assert_rms(native(*inputs), expected, plain(*inputs))
    one = torch.ones(()).expand(B, N, D)
    expected = gradients(reference.modulated_layernorm, [t.double() for t in inputs], one.double())
    for actual, truth, baseline in zip(
        gradients(native, inputs, one), expected, gradients(reference.modulated_layernorm, inputs, one), strict=True
    ):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-5)
        assert actual.shape == baseline.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_row_stays_alone(dtype, bad):
    x, shift, scale, _ = inputs_of(2, 5, 67, dtype)
    good = native(x, shift, scale)
    x[1, 2, 3] = bad
    y = native(x, shift, scale)
    assert y[1, 2].isnan().all()
    y[1, 2] = good[1, 2]
    assert torch.equal(y, good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    x, shift, scale, _ = inputs_of(3, 77, 129, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(x, shift, scale))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing_in_nothing_out(shape):
    x = torch.empty(shape)
    assert native(x, torch.empty(shape[0], 8), torch.empty(shape[0], 8)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    *inputs, _ = inputs_of(2, 5, 24, dtype)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    inputs = [t.detach().requires_grad_(requires_grad) for t in inputs]
    torch.library.opcheck(torch.ops.pixart_fast.modulated_layernorm.default, (*inputs, 1e-6))


def test_a_compiled_graph_can_hold_it():
    """Asked for by name, the native operator is one opaque node: no graph break, for any shape."""
    torch._dynamo.reset()
    compiled = torch.compile(native, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N in ((2, 5), (3, 7)):
        *inputs, dy = inputs_of(B, N, 24, torch.float32)
        assert torch.equal(compiled(*inputs), native(*inputs))
        for actual, eager in zip(gradients(compiled, inputs, dy), gradients(native, inputs, dy), strict=True):
            torch.testing.assert_close(actual, eager)


def test_wrong_arguments_are_refused():
    x, m = torch.randn(2, 3, 8), torch.randn(2, 8)
    native_op = torch.ops.pixart_fast.modulated_layernorm
    with pytest.raises(RuntimeError, match=r"x is \[B, N, D\]"):
        native_op(x[0], m, m, 1e-6)
    with pytest.raises(RuntimeError, match=r"shift and scale are \[B, D\] = \[2, 8\]"):
        native_op(x, m[:1], m, 1e-6)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        native_op(x.double(), m, m, 1e-6)
    with pytest.raises(RuntimeError, match=r"it takes float32 and bfloat16, not torch\.float64"):
        native(x.double(), m, m)


def test_auto_takes_it_for_inference_only():
    """Forward and backward together are slower than plain PyTorch's, as long as the backward is not native."""
    assert ops.resolve("modulated_layernorm").name == "cpu"
    assert ops.resolve("modulated_layernorm", needs_grad=True).name == "reference"
    x, shift, scale, _ = inputs_of(1, 2, 8, torch.float32)
    x.requires_grad_()
    assert "LayerNorm" not in ops.modulated_layernorm(x, shift, scale).grad_fn.name()
    with torch.no_grad():
        assert torch.equal(ops.modulated_layernorm(x, shift, scale), native(x, shift, scale))


def test_a_missing_library_is_reported(monkeypatch):
    monkeypatch.setattr(ops, "native_problem", "the native operators are not built")
    assert ops.resolve("modulated_layernorm") == ops.Choice("reference", "the native operators are not built")
    with pytest.raises(RuntimeError, match="backend 'cpu': the native operators are not built"):
        ops.resolve("modulated_layernorm", "cpu")
