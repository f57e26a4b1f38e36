"""The Triton adaLN against fp64, as it is launched: its operands, its programs, its rounding."""

import pytest
import torch
from torch.nn import functional as F

from pixart_fast.kernels import modulated_layernorm as kernel
from pixart_fast.kernels import reference
from tests.accuracy import assert_rms, rms_error
from tests.kernels.conftest import DEVICE, DTYPES

EPS = 1e-6
ON_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel leaves unwritten is NaN, or a code that no test expects."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            t = allocate(*args, **kwargs)
            if t.dtype.itemsize == 1:
                t.view(torch.uint8).fill_(0x7F)  # NaN in float8_e4m3fn
            return t.fill_(float("nan")) if t.is_floating_point() and t.dtype.itemsize > 1 else t

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def inputs_of(B, N, D, dtype, condition_dtype=None, *, residual=True, gate=True, rows=True):
    """Operands of `forward` by name: x off centre, so that statistics of low precision show, and modulations as the
    model has them, views of one condition [B, 6, D], different for every sample, and of one table [6, D] in fp32."""
    generator = torch.Generator().manual_seed(B + N + D)
    x, h, condition, table = (torch.randn(*s, generator=generator) for s in ((B, N, D), (B, N, D), (B, 6, D), (6, D)))
    condition = condition.to(DEVICE, condition_dtype or dtype)
    table = (table / 2).to(DEVICE) if rows else [None] * 6
    return {
        "x": (3 + x).to(DEVICE, dtype),
        "residual": h.to(DEVICE, dtype) if residual else None,
        "gate": condition[:, 2] if residual and gate else None,
        "gate_row": table[2] if residual and gate else None,
        "shift": condition[:, 0],
        "shift_row": table[0],
        "scale": condition[:, 1],
        "scale_row": table[1],
    }


def wide(inputs):
    return {name: None if t is None else t.double() for name, t in inputs.items()}


def total(inputs, name):
    """A modulation and its row in one; the row in the modulation's dtype, as plain PyTorch has it."""
    per_sample, row = inputs[name], inputs[f"{name}_row"]
    return per_sample if row is None else per_sample + row.to(per_sample.dtype)


def oracle(inputs):
    """The specification in fp64: (x1, y)."""
    inputs = wide(inputs)
    gate = None if inputs["gate"] is None else total(inputs, "gate")
    shift, scale = total(inputs, "shift"), total(inputs, "scale")
    return reference.modulated_layernorm(inputs["x"], shift, scale, residual=inputs["residual"], gate=gate, eps=EPS)


def plain(inputs):
    """Plain PyTorch in the dtype of x: (x1, y)."""
    x1 = inputs["x"]
    if inputs["gate"] is not None:
        x1 = x1 + total(inputs, "gate")[:, None].to(x1.dtype) * inputs["residual"]
    elif inputs["residual"] is not None:
        x1 = x1 + inputs["residual"]
    shift, scale = (total(inputs, name)[:, None].to(x1.dtype) for name in ("shift", "scale"))
    return x1, F.layer_norm(x1, x1.shape[-1:], eps=EPS) * (1 + scale) + shift


def check_forward(inputs):
    x1, y, mean, rstd = kernel.forward(**inputs, eps=EPS)
    (expected_x1, expected_y), (plain_x1, plain_y) = oracle(inputs), plain(inputs)
    assert_rms(y, expected_y, plain_y)
    if inputs["residual"] is None:
        assert x1.shape == (0,)
        x1 = inputs["x"]
    else:
        assert_rms(x1, expected_x1, plain_x1)
    x1 = x1.double()
    torch.testing.assert_close(mean.double(), x1.mean(-1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rstd.double(), (x1.var(-1, correction=0) + EPS).rsqrt(), rtol=2e-6, atol=0)


def gradient_of(inputs, dy, dx1):
    """Arguments of `backward` after a `forward`."""
    x1, _, mean, rstd = kernel.forward(**inputs, eps=EPS)
    gated = inputs["gate"] is not None
    return {
        "dx1": dx1,
        "dy": dy,
        "x1": x1 if inputs["residual"] is not None else inputs["x"],
        "mean": mean,
        "rstd": rstd,
        "scale": inputs["scale"],
        "scale_row": inputs["scale_row"],
        "residual": inputs["residual"] if gated else None,
        "gate": inputs["gate"],
        "gate_row": inputs["gate_row"],
    }


def autograd(function, inputs, dy, dx1):
    """Gradients of x, residual, gate, shift, scale; those of absent operands are missing."""
    names = [n for n in ("x", "residual", "gate", "shift", "scale") if inputs[n] is not None]
    inputs = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in names}
    x1, y = function(inputs)
    outputs, gradients = ([y], [dy]) if dx1 is None else ([x1, y], [dx1, dy])
    return dict(zip(names, torch.autograd.grad(outputs, [inputs[n] for n in names], gradients), strict=True))


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check_backward(inputs, with_dx1=True):
    x = inputs["x"]
    dy = randn(*x.shape, dtype=x.dtype, seed=1)
    dx1 = randn(*x.shape, dtype=x.dtype, seed=2) if with_dx1 else None
    dx, dresidual, dgate, dshift, dscale = kernel.backward(**gradient_of(inputs, dy, dx1))
    assert dgate.dtype == dshift.dtype == dscale.dtype == torch.float32
    expected = autograd(oracle, wide(inputs), dy.double(), None if dx1 is None else dx1.double())
    baseline = autograd(plain, inputs, dy, dx1)
    actual = {"x": dx, "residual": dresidual, "gate": dgate, "shift": dshift, "scale": dscale}
    if inputs["gate"] is None:
        assert dresidual.shape == dgate.shape == (0,)
        del actual["gate"]
        actual["residual"] = dx
    for name, gradient in expected.items():
        assert_rms(actual[name].to(baseline[name].dtype), gradient, baseline[name])


# D: the model's (1024 + 128, no mask), smaller models', a power of two, a masked tail.
CASES = [(D, torch.float32) for D in (1152, 768, 384, 128, 100)] + [(D, t) for D in (1152, 100) for t in DTYPES[1:]]
# N: one token; programs of 8 rows of which the last has 7 (forward), of 15 and 6 (backward).
LENGTHS = [(33, 1), (1, 231)]
OPERANDS = [
    pytest.param({}, id="gate"),
    pytest.param({"gate": False}, id="residual"),
    pytest.param({"residual": False}, id="x"),
    pytest.param({"rows": False}, id="no-rows"),
]


@pytest.mark.parametrize(("D", "dtype"), CASES)
def test_forward(D, dtype):
    check_forward(inputs_of(2, 17, D, dtype))


def test_forward_of_one_channel():
    check_forward(inputs_of(2, 17, 1, torch.float32))


@pytest.mark.parametrize(("B", "N"), LENGTHS)
def test_forward_of_any_length(B, N):
    check_forward(inputs_of(B, N, 100, torch.float16))


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_optional_operands(dtype, operands):
    check_forward(inputs_of(2, 17, 128, dtype, **operands))


@pytest.mark.parametrize(("D", "dtype"), CASES)
def test_backward(D, dtype):
    check_backward(inputs_of(2, 17, D, dtype))


@pytest.mark.parametrize(("B", "N"), LENGTHS)
def test_backward_of_any_length(B, N):
    check_backward(inputs_of(B, N, 100, torch.float16))


@pytest.mark.parametrize("with_dx1", [True, False])
@pytest.mark.parametrize("operands", OPERANDS)
def test_backward_of_optional_operands(operands, with_dx1):
    check_backward(inputs_of(2, 17, 128, torch.float32, **operands), with_dx1)


def test_backward_of_more_programs_than_are_summed_at_a_time(monkeypatch):
    """As on a device of 40 multiprocessors: 130 programs of one row, where the sum takes 64 at a time."""
    monkeypatch.setattr(kernel, "_device", lambda device: (90, 40))
    assert kernel.rows_per_program(1, 130, 160) == 1
    check_backward(inputs_of(1, 130, 12, torch.float16))


@pytest.mark.parametrize("condition_dtype", DTYPES)
def test_condition_and_data_of_different_dtypes(condition_dtype):
    inputs = inputs_of(2, 17, 128, torch.float16, condition_dtype)
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_y_is_of_the_rounded_x1(dtype):
    """The backward has only the stored x1: with y of another one, it would be the derivative of another function."""
    inputs = inputs_of(2, 17, 128, dtype)
    x1, y, mean, rstd = kernel.forward(**inputs, eps=EPS)
    without = inputs | {"x": x1, "residual": None, "gate": None, "gate_row": None}
    again = kernel.forward(**without, eps=EPS)[1:]
    for actual, expected in zip(again, (y, mean, rstd), strict=True):
        assert torch.equal(actual, expected)


def test_rows_far_off_centre():
    """The rounding of a mean of 1000, 3e-5 of the row's deviation, does not reach y, as it does in plain PyTorch."""
    inputs = inputs_of(2, 17, 128, torch.float32, residual=False)
    inputs["x"] += 997
    _, y, _, _ = kernel.forward(**inputs, eps=EPS)
    assert rms_error(y, oracle(inputs)[1]) < 1e-6


def test_eps():
    inputs = inputs_of(2, 17, 128, torch.float32, residual=False) | {"x": 1e-3 * randn(2, 17, 128, dtype=torch.float32)}
    check_forward(inputs)


def test_strides():
    """Strided operands, and gradients that are expanded (`.sum().backward()`) or strided, give the bits of copies."""
    inputs = inputs_of(2, 17, 100, torch.float16)
    dy, dx1 = (
        torch.ones(1, dtype=torch.float16, device=DEVICE).expand(2, 17, 100),
        randn(2, 100, 17, dtype=torch.float16),
    )
    dx1 = dx1.transpose(1, 2)
    strided = dict(inputs)
    for name in ("x", "residual"):
        strided[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("shift", "scale", "gate"):
        strided[name] = inputs[name].t().contiguous().t()
    assert not any(strided[name].is_contiguous() for name in ("x", "residual", "shift", "scale", "gate"))
    for actual, expected in zip(kernel.forward(**strided, eps=EPS), kernel.forward(**inputs, eps=EPS), strict=True):
        assert torch.equal(actual, expected) and actual.is_contiguous()
    arguments = gradient_of(inputs, dy, dx1)
    strided = arguments | {"scale": strided["scale"], "residual": strided["residual"], "gate": strided["gate"]}
    copies = arguments | {"dy": dy.contiguous(), "dx1": dx1.contiguous()}
    for actual, expected in zip(kernel.backward(**strided), kernel.backward(**copies), strict=True):
        assert torch.equal(actual, expected) and actual.is_contiguous()


def test_one_modulation_expanded_over_the_batch():
    inputs = inputs_of(2, 17, 100, torch.float32)
    one = inputs | {name: inputs[name][:1].expand(2, 100) for name in ("shift", "scale", "gate")}
    check_forward(one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_from_run_to_run(dtype):
    inputs = inputs_of(2, 17, 128, dtype)
    arguments = gradient_of(inputs, randn(2, 17, 128, dtype=dtype), randn(2, 17, 128, dtype=dtype))
    first, second = kernel.backward(**arguments), kernel.backward(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 100), (2, 0, 100)])
def test_nothing(shape):
    """No samples, and no tokens, of which the sums are zero."""
    inputs = inputs_of(*shape, torch.float32)
    x1, y, *statistics = kernel.forward(**inputs, eps=EPS)
    assert x1.shape == y.shape == shape and all(t.shape == shape[:2] for t in statistics)
    dx, dresidual, *sums = kernel.backward(**gradient_of(inputs, y, x1))
    assert dx.shape == dresidual.shape == shape
    assert all(torch.equal(t, torch.zeros(shape[0], shape[2], device=DEVICE)) for t in sums)


# Multiprocessors times programs: the interpreter, A100 and H200 backward, H200 forward.
@pytest.mark.parametrize("at_a_time", [4, 432, 528, 1056])
@pytest.mark.parametrize("N", [1, 231, 256, 1024, 4096])
def test_programs_fill_the_device(at_a_time, N):
    """Rows in sequence stay near their share of the device, also where a batch is just too large for one round."""
    for B in (1, 2, 3, 16, 128, at_a_time, at_a_time + 2):
        rows = kernel.rows_per_program(B, N, at_a_time)
        programs = -(-N // rows)
        assert (programs - 1) * rows < N <= programs * rows
        in_sequence = -(-B * programs // at_a_time) * rows
        assert in_sequence <= 1.25 * B * N / at_a_time + 8


def codes_of(inputs, dtype):
    x1, codes, y_scale = kernel.forward_quantized(**inputs, eps=EPS, dtype=dtype)
    assert codes.dtype == dtype and codes.is_contiguous() and y_scale.dtype == torch.float32
    return x1, codes, y_scale


def given_rows(values, dtype=torch.float32):
    """Operands whose y is `values` [B, D] exactly, for scale -1 leaves the shift alone."""
    B, D = values.shape
    inputs = inputs_of(B, 3, D, dtype, torch.float32, residual=False, rows=False)
    return inputs | {"shift": values.to(DEVICE), "scale": -torch.ones(B, D, device=DEVICE)}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(dtype, operands):
    inputs = inputs_of(2, 17, 128, dtype, **operands)
    x1, codes, y_scale = codes_of(inputs, torch.int8)
    assert torch.equal(x1, kernel.forward(**inputs, eps=EPS)[0])
    rounded = inputs if inputs["residual"] is None else inputs | {"x": x1, "residual": None, "gate": None}
    _, y = oracle(rounded)
    torch.testing.assert_close(y_scale.double(), y.abs().amax(-1) / 127, rtol=1e-5, atol=0)
    assert torch.equal(codes.int().abs().amax(-1), torch.full((2, 17), 127, device=DEVICE, dtype=torch.int32))
    error = (codes.double() - y / y_scale.double()[..., None]).abs().max()
    assert error <= 0.5 + 1e-3, f"a code is off by {error:.4f}, where rounding to the nearest is off by 0.5 at most"


def test_int8_rounds_halves_to_even():
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 62.5, 63.5, -127.0, 0.0, 0.49, 0.51]).repeat(2, 1)
    _, codes, y_scale = codes_of(given_rows(values), torch.int8)
    assert (y_scale == 1).all()
    expected = torch.tensor([127, 0, 2, 2, 0, -2, 62, 64, -127, 0, 0, 1], dtype=torch.int8, device=DEVICE)
    assert torch.equal(codes, expected.expand_as(codes))


def test_fp8_of_values_that_it_has():
    values = torch.tensor([448.0, 416.0, 1.0, -1.125, 0.0, 2.0**-9, -448.0, 240.0, 17.0 / 16 * 0 + 18.0, 15.0])
    _, codes, y_scale = codes_of(given_rows(torch.stack((values, values / 4))), torch.float8_e4m3fn)
    assert torch.equal(y_scale, torch.tensor([[1.0], [0.25]], device=DEVICE).expand(2, 3))
    assert torch.equal(codes.float(), values.to(DEVICE).expand(2, 3, 10))


def test_fp8_scale():
    inputs = inputs_of(2, 17, 128, torch.float32, residual=False)
    y_scale = codes_of(inputs, torch.float8_e4m3fn)[2]
    torch.testing.assert_close(y_scale.double(), oracle(inputs)[1].abs().amax(-1) / 448, rtol=1e-5, atol=0)


@ON_CUDA
def test_fp8_rounds_as_pytorch_does():
    """Not in the interpreter, which loses the carry of a mantissa."""
    inputs = inputs_of(2, 231, 1152, torch.bfloat16)
    _, codes, y_scale = codes_of(inputs, torch.float8_e4m3fn)
    y = kernel.forward(**{name: None if t is None else t.float() for name, t in inputs.items()}, eps=EPS)[1]
    x1 = kernel.forward(**inputs, eps=EPS)[0].float()
    y = kernel.forward(**inputs | {"x": x1, "residual": None, "gate": None, "gate_row": None}, eps=EPS)[1]
    expected = (y / y_scale[..., None]).to(torch.float8_e4m3fn)
    assert (codes.float() != expected.float()).float().mean() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_that_have_no_scale(dtype):
    """Of zeros and of less than fp32 can divide: scale 1 and zeros. With a NaN in x: a scale that is NaN."""
    values = torch.zeros(3, 12)
    values[1] = 1e-38
    inputs = given_rows(values)
    inputs["x"][2, :, 11] = float("nan")
    _, codes, y_scale = codes_of(inputs, dtype)
    assert (y_scale[:2] == 1).all() and (codes[:2].float() == 0).all()
    assert y_scale[2].isnan().all()


def test_fp8_is_refused_before_sm_89(monkeypatch):
    monkeypatch.setattr(kernel, "_device", lambda device: (80, 108))
    inputs = inputs_of(1, 2, 12, torch.float32)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8\.9, and .* has 8\.0"):
        kernel.forward_quantized(**inputs, eps=EPS, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("sm", [70, 80, 90])
def test_variants_name_every_argument_once(sm):
    labels = set()
    for label, function, signature, constants, options in kernel.variants(sm):
        assert sorted((*signature, *constants)) == sorted(function.arg_names), label
        assert options["num_warps"] == 4
        assert ("fp8" in label) == ("*fp8e4nv" in signature.values())
        labels.add(label)
    assert len(labels) == (15 if sm >= 89 else 12)


@pytest.mark.gpu
@ON_CUDA
def test_more_elements_than_32_bits_count():
    N = 2**31 // 1152 + 100
    inputs = inputs_of(1, 1, 1152, torch.bfloat16, residual=False)
    x = torch.zeros(1, N, 1152, dtype=torch.bfloat16, device=DEVICE)
    x[:, -64:] = 3 + randn(1, 64, 1152, dtype=torch.bfloat16)
    _, y, _, _ = kernel.forward(**inputs | {"x": x}, eps=EPS)
    _, expected, _, _ = kernel.forward(**inputs | {"x": x[:, -64:]}, eps=EPS)
    assert torch.equal(y[:, -64:], expected)
