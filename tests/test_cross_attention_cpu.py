"""The native attention, forward and backward, against fp64, and as a PyTorch operator."""

import pytest
import torch

from pixart_fast import ops
from pixart_fast.kernels import reference
from tests.accuracy import assert_rms

pytestmark = pytest.mark.skipif(ops.native_problem is not None, reason=str(ops.native_problem))

native_op = torch.ops.pixart_fast.cross_attention
native_backward = torch.ops.pixart_fast.cross_attention_backward
DTYPES = [torch.float32, torch.bfloat16]


def inputs_of(B, N, L, H, d, dtype, lengths=None):
    """q, and k and v as views of one projection, NaN beyond the lengths; do."""
    generator = torch.Generator().manual_seed(B + N + L + d)
    q, do = (torch.randn(B, N, H, d, generator=generator).to(dtype) for _ in range(2))
    projected = torch.randn(B, L, 2, H, d, generator=generator).to(dtype)
    if lengths is not None:
        lengths = torch.tensor(lengths)
        projected[torch.arange(L) >= lengths[:, None]] = float("nan")
    return q, *projected.unbind(2), lengths, do


def native(q, k, v, lengths):
    return native_op(q, k, v, lengths)[0]


def plain(q, k, v, lengths):
    return reference.cross_attention(q, k, v, lengths=lengths)


def gradients(function, q, k, v, lengths, do):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(function(*leaves, lengths), leaves, do)


def assert_as_plain(q, k, v, lengths, do):
    """Output and gradients against fp64."""
    wide = [t.double() for t in (q, k, v)]
    assert_rms(native(q, k, v, lengths), plain(*wide, lengths), plain(q, k, v, lengths))
    for actual, truth, baseline in zip(
        gradients(native, q, k, v, lengths, do),
        gradients(plain, *wide, lengths, do.double()),
        gradients(plain, q, k, v, lengths, do),
        strict=True,
    ):
        assert_rms(actual, truth, baseline)


# One block of 16 tokens, a part of one, several; head_dim: the models', and 12 and 100, which no vector divides.
@pytest.mark.parametrize(("B", "N"), [(64, 1), (3, 16), (2, 63), (2, 231)])
@pytest.mark.parametrize(
    ("L", "H", "d"), [(16, 4, 32), (120, 2, 72), (63, 2, 64), (40, 3, 12), (7, 2, 100), (300, 1, 72)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(B, N, L, H, d, dtype):
    assert_as_plain(*inputs_of(B, N, L, H, d, dtype, [L, *((7 * b + 3) % L + 1 for b in range(1, B))]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [16, 100, 256])
def test_self_attention(N, dtype):
    assert_as_plain(*inputs_of(2, N, N, 2, 72, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(dtype):
    """Every kind in one batch; a caption of one token gives its value, an empty one zeros, without NaN from padding."""
    lengths = [0, 1, 63, 120, 300, 64]
    q, k, v, lengths, do = inputs_of(6, 37, 300, 2, 72, dtype, lengths)
    assert_as_plain(q, k, v, lengths, do)
    o, lse = native_op(q, k, v, lengths)
    assert torch.equal(o[1], v[1, :1].expand_as(o[1]))
    assert not o[0].any() and lse[0].isneginf().all()
    dq, dk, dv = native_backward(do, q, k, v, o, lse, lengths)
    assert not dq[:2].any()  # the only weight is always 1
    for gradient in (dk, dv):
        assert not gradient[torch.arange(300) >= lengths[:, None]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(dtype):
    q, k, v, lengths, _ = inputs_of(3, 33, 40, 2, 72, dtype, [40, 1, 17])
    lse = native_op(q, k, v, lengths)[1]
    scores = torch.einsum("bnhd,blhd->bhnl", q.double(), k.double()) * 72**-0.5
    scores = scores.masked_fill((torch.arange(40) >= lengths[:, None])[:, None, None], float("-inf"))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 30, 300])
def test_scores_far_apart(size):
    """Weights down to exp(-1e4), which fp32 does not hold."""
    q, k, v, lengths, do = inputs_of(2, 48, 31, 2, 72, torch.float32, [31, 20])
    assert_as_plain(q * size, k, v, lengths, do)


def test_no_lengths_are_all_tokens():
    q, k, v, _, do = inputs_of(2, 33, 40, 2, 32, torch.float32)
    full = torch.full((2,), 40)
    assert torch.equal(native(q, k, v, None), native(q, k, v, full))
    for a, b in zip(gradients(native, q, k, v, None, do), gradients(native, q, k, v, full, do), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    q, k, v, lengths, do = inputs_of(3, 33, 20, 2, 32, dtype, [20, 3, 11])
    dense = [t.contiguous() for t in (q, k, v)]
    expected = [native(*dense, lengths), *gradients(native, *dense, lengths, do)]
    of_all_blocks = torch.full((3, 20, 5, 2, 2, 32), float("nan"), dtype=dtype)
    of_all_blocks[:, :, 2, 0], of_all_blocks[:, :, 2, 1] = k, v
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        of_all_blocks[:, :, 2, 0],
        of_all_blocks[:, :, 2, 1].mT.contiguous().mT,  # another last stride
    )
    assert not any(view.is_contiguous() for view in views)
    strided = do.transpose(1, 3).contiguous().transpose(1, 3)
    for a, b in zip(expected, [native(*views, lengths), *gradients(native, *views, lengths, strided)], strict=True):
        assert a.shape == b.shape and b.is_contiguous() and torch.equal(a, b)
    one = torch.ones((), dtype=dtype).expand_as(q)
    for a, b in zip(
        gradients(native, *views, lengths, one), gradients(native, *dense, lengths, one.contiguous()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_stays_in_its_head(dtype):
    q, k, v, lengths, _ = inputs_of(2, 33, 20, 3, 32, dtype, [20, 11])
    good = native(q, k, v, lengths)
    q[1, 20, 2, 5] = float("nan")
    o = native(q, k, v, lengths)
    assert o[1, 20, 2].isnan().all()
    o[1, 20, 2] = good[1, 20, 2]
    assert torch.equal(o, good)
    k[1, 3, 1, 5] = float("nan")
    o = native(q, k, v, lengths)
    assert o[1, :, 1].isnan().all() and torch.equal(o[0], good[0]) and torch.equal(o[1, :, 0], good[1, :, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype):
    arguments = inputs_of(3, 47, 40, 3, 72, dtype, [40, 0, 13])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append([*native_op(*arguments[:4]), *gradients(native, *arguments)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize(("B", "N", "L"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_nothing_in_nothing_out(B, N, L):
    q, kv = torch.randn(B, N, 2, 8), torch.randn(B, L, 2, 8)
    o, lse = native_op(q, kv, kv, None)
    dq, dk, dv = native_backward(q, q, kv, kv, o, lse, None)
    assert o.shape == dq.shape == q.shape and lse.shape == (B, 2, N) and dk.shape == dv.shape == kv.shape
    assert not any(t.any() for t in (o, dq, dk, dv)) and lse.isneginf().all()


def test_second_derivatives():
    q, k, v, lengths, do = inputs_of(4, 20, 9, 2, 12, torch.float32, [9, 1, 5, 8])
    k, v = (t.nan_to_num() for t in (k, v))

    def penalty(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        first = torch.autograd.grad(function(*leaves, lengths), leaves, do.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    expected, baseline = penalty(plain, torch.float64), penalty(plain, torch.float32)
    for actual, truth, plain_one in zip(penalty(native, torch.float32), expected, baseline, strict=True):
        assert_rms(actual, truth, plain_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(dtype, requires_grad, ragged):
    q, k, v, lengths, do = inputs_of(2, 5, 7, 2, 12, dtype, [7, 3] if ragged else None)
    k, v = (t.nan_to_num() for t in (k, v))
    leaves = [t.detach().requires_grad_(requires_grad) for t in (q, k, v)]
    torch.library.opcheck(native_op.default, (*leaves, lengths))
    o, lse = native_op(q, k, v, lengths)
    torch.library.opcheck(native_backward.default, (do, q, k, v, o, lse, lengths))


def test_wrong_arguments_are_refused():
    q, k, lengths = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 4, 8), torch.tensor([5, 2])

    def forward(q=q, k=k, v=k, lengths=lengths):
        return native_op(q, k, v, lengths)

    lse = forward()[1]

    def backward(do=q, lse=lse):
        return native_backward(do, q, k, k, q, lse, lengths)

    for call, arguments, sentence in (
        (forward, {"q": q[0]}, r"q is \[B, N, H, d\], k and v are \[B, L, H, d\]"),
        (forward, {"q": q[:1]}, r"q is \[B, N, H, d\]"),
        (forward, {"k": k[:, :, :2]}, r"q is \[B, N, H, d\]"),
        (forward, {"v": k[:, :4]}, r"q is \[B, N, H, d\]"),
        (forward, {"v": k.bfloat16()}, "all float32 or all bfloat16"),
        (forward, {"q": q.half(), "k": k.half(), "v": k.half()}, "all float32 or all bfloat16"),
        (forward, {"lengths": lengths[:1]}, r"lengths are int64 \[B\] = \[2\]"),
        (forward, {"lengths": lengths.int()}, r"lengths are int64 \[B\] = \[2\]"),
        (backward, {"do": q[:, :2]}, "do is like q"),
        (backward, {"do": q.bfloat16()}, "do is like q"),
        (backward, {"lse": torch.zeros(2, 4, 2)}, "lse the forward's"),
    ):
        call()
        with pytest.raises(RuntimeError, match=sentence):
            call(**arguments)


def test_ops_takes_it_for_few_tokens():
    q, k, v, lengths, _ = inputs_of(2, 16, 16, 2, 32, torch.float32, [16, 3])
    assert torch.equal(ops.cross_attention(q, k, v, lengths=lengths), native(q, k, v, lengths))
    assert torch.equal(ops.cross_attention(q, k, v, lengths=lengths, backend="cpu"), native(q, k, v, lengths))
    assert torch.equal(ops.self_attention(q, q, q), native(q, q, q, None))
