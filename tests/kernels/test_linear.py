"""The Triton matrix products with epilogues, against float64 and against plain PyTorch at the same dtype."""

import pytest
import torch
from torch.nn import functional as F

from pixart_fast.kernels import linear
from tests.accuracy import assert_rms
from tests.kernels.conftest import DEVICE, DTYPES

HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]

# B, N, K, D. Ends of samples, features and sums inside of tiles; more tiles of tokens than one group of 8 holds, with
# more than one of features; a sample of one token; the widths of XL/2.
SHAPES = [(2, 63, 100, 72), (3, 231, 64, 100), (33, 1, 200, 130), (1, 64, 1152, 1152)]


@pytest.fixture(params=linear.TILES, ids=lambda tile: f"{tile.block_n}x{tile.block_d}")
def tile(request, monkeypatch):
    """The tile of half precision, whatever the device and the sizes."""
    monkeypatch.setattr(linear, "TILES", (request.param, request.param))


@pytest.fixture
def poisoned(monkeypatch):
    """New tensors hold NaN: what a kernel does not write is seen."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, create=create, **kwargs: create(*args, **kwargs).fill_(torch.nan)
        )


def operands(B, N, K, D, dtype, rows=torch.float32):
    """a, weight, bias, residual; gate as a view of the condition [B, 6, D], gate_row as one of the table [6, D]."""
    generator = torch.Generator().manual_seed(B * N + K + D)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    a, weight, bias, residual = randn(B, N, K), randn(D, K) / K**0.5, 1 + randn(D), 3 + randn(B, N, D)
    gate, gate_row = randn(B, 6, D)[:, 2], randn(6, D)[5]
    data = [t.to(DEVICE, dtype) for t in (a, weight, bias, residual, gate)]
    return *data, gate_row.to(DEVICE, rows)


def gated(a, weight, bias, residual, gate, gate_row):
    gate = gate if gate_row is None else (gate + gate_row).to(a.dtype)
    return residual + gate[:, None] * F.linear(a, weight, bias)


def activated(a, weight, bias):
    return F.gelu(F.linear(a, weight, bias), approximate="tanh")


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


def check_gated(*tensors):
    y = linear.gated_linear(*tensors)
    assert y.is_contiguous() and y.untyped_storage().data_ptr() != tensors[3].untyped_storage().data_ptr()
    assert_rms(y, gated(*double(*tensors)), gated(*tensors))
    return y


def check_activated(*tensors):
    y = linear.linear_gelu(*tensors)
    assert y.is_contiguous()
    assert_rms(y, activated(*double(*tensors)), activated(*tensors))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_linear(shape, dtype, poisoned):
    check_gated(*operands(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_gelu(shape, dtype, poisoned):
    check_activated(*operands(*shape, dtype)[:3])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(3, 231, 64, 136), (1, 256, 192, 128)], ids=str)
def test_every_tile(shape, dtype, tile, poisoned):
    """Where tiles reach beyond samples and features, and where they end with them."""
    a, weight, bias, *rest = operands(*shape, dtype)
    check_gated(a, weight, bias, *rest)
    check_activated(a, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_row", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_optional_operands(with_bias, with_row, dtype):
    a, weight, bias, residual, gate, gate_row = operands(2, 40, 96, 72, dtype)
    bias, gate_row = bias if with_bias else None, gate_row if with_row else None
    check_gated(a, weight, bias, residual, gate, gate_row)
    check_activated(a, weight, bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_once(dtype):
    """Plain PyTorch rounds the sum, the gate and the product too, and a third of its results are not the nearest."""
    a, weight, bias, residual, gate, gate_row = operands(2, 64, 96, 128, dtype)
    results = {
        linear.gated_linear(a, weight, bias, residual, gate, gate_row): gated(
            *double(a, weight, bias, residual, gate, gate_row)
        ),
        linear.linear_gelu(a, weight, bias): activated(*double(a, weight, bias)),
    }
    for y, expected in results.items():
        assert (y != expected.to(dtype)).double().mean() < 0.01


def test_dtypes_of_gate_bias_and_residual():
    """The row of the table stays in fp32 under a half-precision condition, and a residual keeps its own dtype."""
    a, weight, bias, residual, gate, gate_row = operands(2, 40, 96, 72, torch.float16)
    y = linear.gated_linear(a, weight, bias.float(), residual.float(), gate.float(), gate_row.half())
    assert y.dtype == torch.float32
    expected = gated(*double(a, weight, bias, residual, gate, gate_row.half()))
    assert_rms(y, expected, gated(*(t.float() for t in (a, weight, bias, residual, gate, gate_row.half()))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    a, weight, bias, residual, gate, gate_row = operands(2, 40, 96, 72, dtype)
    expected = check_gated(a, weight, bias, residual, gate, gate_row)
    scattered = [t.repeat_interleave(2, -1)[..., ::2] for t in (a, weight, bias, residual, gate, gate_row)]
    assert not any(t.is_contiguous() for t in scattered)
    assert torch.equal(linear.gated_linear(*scattered), expected)
    assert torch.equal(linear.linear_gelu(*scattered[:3]), check_activated(a, weight, bias))
    one = residual[:1, :1], gate[:1]
    check_gated(a, weight, bias, one[0].expand_as(residual), one[1].expand_as(gate), gate_row)


def test_samples_do_not_meet():
    """A sample alone gives what it gives in a batch, bit for bit: another sample's NaN does not reach it."""
    tensors = operands(3, 65, 64, 72, torch.float16)
    a, weight, bias, residual, gate, gate_row = tensors
    expected = linear.gated_linear(*tensors)[1:2].clone(), linear.linear_gelu(a, weight, bias)[1:2].clone()
    for t in (a, residual, gate):
        t[0] = t[2] = torch.nan
    assert torch.equal(linear.gated_linear(*tensors)[1:2], expected[0])
    assert torch.equal(linear.linear_gelu(a, weight, bias)[1:2], expected[1])
    alone = linear.gated_linear(a[1:2], weight, bias, residual[1:2], gate[1:2], gate_row)
    assert torch.equal(alone, expected[0])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_far_from_zero(dtype):
    """One product of 1 and x is x: u of the formula is past every exponent, and below -3 the result nearly cancels."""

    def gelu(x):
        return linear.linear_gelu(
            x.to(DEVICE, dtype).reshape(1, -1, 1), torch.ones(1, 1, device=DEVICE, dtype=dtype), None
        )

    huge = torch.tensor([30.0, 1e3, 6e4] if dtype == torch.float16 else [30.0, 1e3, 1e13, 1e38])
    assert torch.equal(gelu(huge).flatten().cpu(), huge.to(dtype))
    assert torch.equal(gelu(-huge).flatten().cpu(), torch.zeros(len(huge), dtype=dtype))
    tail = torch.linspace(-4, -2, 64).to(DEVICE, dtype)
    expected = F.gelu(tail.double(), approximate="tanh").reshape(1, -1, 1)
    assert_rms(gelu(tail), expected, F.gelu(tail, approximate="tanh").reshape(1, -1, 1))
    assert (gelu(tail).double() / expected - 1).abs().max() < 2 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype):
    tensors = operands(2, 100, 128, 130, dtype)
    assert torch.equal(linear.gated_linear(*tensors), linear.gated_linear(*tensors))
    assert torch.equal(linear.linear_gelu(*tensors[:3]), linear.linear_gelu(*tensors[:3]))


def test_the_tile_fills_the_device():
    """fc2 of XL/2: 9 large tiles of features. 132 multiprocessors need 15 of tokens, 108 need 12."""
    large, small = linear.TILES

    def tile(B, N, sm):
        return linear.tile_for(B, N, 1152, torch.bfloat16, sm)

    assert [tile(B, 256, 90) for B in (2, 7, 8, 32)] == [small, small, large, large]
    assert [tile(B, 256, 80) for B in (2, 5, 6, 32)] == [small, small, large, large]
    assert tile(8, 256, 120) == large
    assert linear.tile_for(32, 4096, 1152, torch.float32, 90) == linear.TILE_FP32


def test_no_tensor_cores_no_kernel(monkeypatch):
    monkeypatch.setattr(linear, "_sm", lambda device: 75)
    tensors = operands(1, 32, 32, 32, torch.float32)
    with pytest.raises(RuntimeError, match="need sm_80 or later, not sm_75"):
        linear.gated_linear(*tensors)
    with pytest.raises(RuntimeError, match="need sm_80 or later, not sm_75"):
        linear.linear_gelu(*tensors[:3])
    assert not list(linear.variants(75))
