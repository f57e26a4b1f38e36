"""Flash cross-attention, forward and backward: against fp64, ragged, with what the padding holds poisoned."""

from types import SimpleNamespace

import pytest
import torch

from pixart_fast.kernels import cross_attention, reference
from tests.accuracy import assert_rms, rms_error
from tests.kernels.conftest import DEVICE, DTYPES

# A compiled kernel takes the schedule of its device; the interpreter takes either: two kernels backward, and one pass.
SCHEDULES = [80, 90] if DEVICE == "cpu" else [None]
# Both schedules tile fp32 alike.
CASES = [(dtype, sm) for dtype in DTYPES for sm in SCHEDULES if dtype != torch.float32 or sm != 90]
NAN = float("nan")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel does not write is NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, allocate=allocate, **k: allocate(*a, **k).fill_(NAN))


def operands(N, L, lengths, H, d, dtype, *, B=None, padding=NAN):
    """q, do [B, N, H, d]; k, v [B, L, H, d], views of one projection for two blocks; lengths [B] or None."""
    generator = torch.Generator().manual_seed(N + L + d)
    B = B or len(lengths)
    q, do = torch.randn((2, B, N, H, d), generator=generator).to(DEVICE, dtype).unbind()
    projection = torch.randn((B, L, 2, 2, H, d), generator=generator).to(DEVICE, dtype)
    if lengths is not None:
        lengths = torch.tensor(lengths, device=DEVICE)
        projection[torch.arange(L, device=DEVICE) >= lengths[:, None]] = padding
    return SimpleNamespace(q=q, k=projection[:, :, 1, 0], v=projection[:, :, 1, 1], do=do, lengths=lengths)


def launch(x, sm):
    o, lse = cross_attention.forward(x.q, x.k, x.v, x.lengths, sm=sm)
    return [o, lse, *cross_attention.backward(x.do, x.q, x.k, x.v, o, lse, x.lengths, sm=sm)]


def plain(x, dtype):
    """What `launch` returns, by the reference at a dtype; lse is -inf where there is no token."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
    o = reference.cross_attention(q, k, v, lengths=x.lengths)
    gradients = torch.autograd.grad(o, (q, k, v), x.do.to(dtype))
    q, k = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k))
    scores = torch.einsum("bnhd,blhd->bhnl", q, k) * q.shape[-1] ** -0.5
    if x.lengths is not None:
        padding = torch.arange(k.shape[1], device=DEVICE) >= x.lengths[:, None]
        scores = scores.masked_fill(padding[:, None, None], float("-inf"))
    return [o.detach(), scores.detach().logsumexp(-1), *gradients]


def check(x, sm):
    """All outputs against fp64; what has no token is exactly zero, and -inf for lse."""
    actual, truths, baselines = launch(x, sm), plain(x, torch.float64), plain(x, x.q.dtype)
    for mine, truth, baseline in zip(actual, truths, baselines, strict=True):
        assert mine.is_contiguous() and mine.shape == truth.shape
        empty = ~truth.isfinite()
        assert torch.equal(mine[empty].double(), truth[empty])
        mine, truth, baseline = (t.masked_fill(empty, 0) for t in (mine, truth, baseline))
        if mine.ndim == 3:
            # lse is fp32 whatever the data's dtype: what its rounding costs is allowed, 1e-7, not what the data's does.
            bound = max(torch.finfo(torch.float32).eps, 1.25 * rms_error(baseline, truth))
            assert mine.dtype == torch.float32 and rms_error(mine, truth) <= bound
        else:
            assert_rms(mine, truth, baseline)
    if x.lengths is not None:
        padding = torch.arange(x.k.shape[1], device=DEVICE) >= x.lengths[:, None]
        assert not any(gradient[padding].any() for gradient in actual[3:])
        assert not any(image[x.lengths == 0].any() for image in (actual[0], actual[2]))
        assert not any(gradient[x.lengths == 1].any() for gradient in actual[2:4])  # one token has all weight


@pytest.mark.parametrize(("dtype", "sm"), CASES)
@pytest.mark.parametrize(
    ("N", "L", "lengths", "H"),
    [
        (63, 120, [0, 1, 63, 120], 2),
        (231, 120, [64, 65], 1),  # the first tile of 64 just filled, and just overrun
        (63, 300, [300, 0, 63], 1),
        (130, 300, [191], 1),
        (64, 63, [63, 16], 1),
    ],
)
def test_model_heads(N, L, lengths, H, dtype, sm):
    check(operands(N, L, lengths, H, 72, dtype), sm)


@pytest.mark.parametrize(("dtype", "sm"), CASES)
@pytest.mark.parametrize("d", [12, 32, 64, 80, 100, 128])
def test_other_heads(d, dtype, sm):
    check(operands(63, 70, [70, 33], 1, d, dtype), sm)


@pytest.mark.parametrize("sm", SCHEDULES)
def test_one_image_token(sm):
    check(operands(1, 70, [70, 17, 33, 65], 8, 72, torch.float16), sm)


@pytest.mark.parametrize("sm", SCHEDULES)
def test_captions_of_few_tokens(sm):
    check(operands(64, 5, [5, 2], 1, 72, torch.float16), sm)


@pytest.mark.parametrize("sm", SCHEDULES)
@pytest.mark.parametrize("L", [1, 63, 120, 300])
def test_without_lengths_all_tokens_count(L, sm):
    check(operands(63, L, None, 1, 72, torch.float16, B=2), sm)


def test_an_image_of_4096_tokens_in_parts():
    check(operands(4096, 20, [20], 1, 72, torch.float16), SCHEDULES[-1])


@pytest.mark.parametrize("sm", SCHEDULES)
def test_a_batch_that_fills_the_gpu(sm, monkeypatch):
    """It gets larger tiles, and one program for all image tokens of a head."""
    monkeypatch.setattr(cross_attention, "PROGRAMS", 1)
    check(operands(150, 120, [120, 77], 1, 72, torch.float16), sm)


@pytest.mark.parametrize("sm", SCHEDULES)
def test_padding_is_never_read_and_runs_are_identical(sm):
    """Bit by bit, whether the padding holds NaN or zeros, in the forward, and in sums over parts of the image."""
    runs = (launch(operands(260, 120, [70], 1, 72, torch.float16, padding=padding), sm) for padding in (NAN, 0))
    for poisoned, zeros in zip(*runs, strict=True):
        assert torch.equal(poisoned, zeros)


@pytest.mark.parametrize("sm", SCHEDULES)
@pytest.mark.parametrize("L", [0, 40, 140])
def test_captions_without_a_token(L, sm):
    x = operands(33, L, [0, 0], 1, 72, torch.float16)
    o, lse, *gradients = launch(x, sm)
    assert (lse == float("-inf")).all()
    for t, like in zip((o, *gradients), (x.q, x.q, x.k, x.v), strict=True):
        assert t.shape == like.shape and not t.any()


@pytest.mark.parametrize("sm", SCHEDULES)
def test_a_length_beyond_the_tensor_is_all_of_it(sm):
    x = operands(33, 40, [40, 40], 1, 72, torch.float16)
    expected = launch(x, sm)
    x.lengths = x.lengths + 20
    for a, b in zip(launch(x, sm), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sm", SCHEDULES)
@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: {"do": torch.ones((), dtype=x.q.dtype, device=DEVICE).expand(x.q.shape)},
        lambda x: {"do": x.do[:, :1].expand(x.do.shape)},
        lambda x: {"do": x.do.transpose(1, 2).contiguous().transpose(1, 2)},
        lambda x: {"q": x.q.transpose(1, 2).contiguous().transpose(1, 2), "v": x.v.contiguous()},
        lambda x: {"q": x.q[:, :1].expand(x.q.shape), "k": x.k.transpose(1, 2).contiguous().transpose(1, 2)},
        lambda x: {name: getattr(x, name).transpose(1, 3).contiguous().transpose(1, 3) for name in "qkv"},
    ],
    ids=["do of a sum", "do of a mean", "do by heads", "q by heads", "q expanded, k by heads", "tokens last"],
)
def test_strides(lay_out, sm):
    x = operands(37, 70, [70, 40], 2, 72, torch.float16)
    check(SimpleNamespace(**(vars(x) | lay_out(x))), sm)


@pytest.mark.parametrize(("dtype", "sm"), CASES)
def test_large_scores_do_not_overflow(dtype, sm):
    """Rows whose lse is far from 0 on either side, past what exp holds in fp32 (88) and in fp16 (11)."""
    x = operands(63, 70, [70, 40], 1, 72, dtype)
    x.q[:, :, :, 0], x.k[:, :, :, 0] = torch.linspace(-60, 60, 63, device=DEVICE)[None, :, None], 30
    check(x, sm)


def test_volta_is_refused():
    x = operands(16, 16, None, 1, 16, torch.float16, B=1)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 or more, not 7.0"):
        cross_attention.forward(x.q, x.k, x.v, None, sm=70)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 or more, not 7.5"):
        cross_attention.backward(x.do, x.q, x.k, x.v, x.q, x.q, None, sm=75)
    assert list(cross_attention.variants(70)) == []
