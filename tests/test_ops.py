"""The operators against fp64 oracles written independently of `kernels/reference.py`, and the choice of backend."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from pixart_fast import ops
from pixart_fast.kernels import reference
from tests.accuracy import assert_rms, rms_error

LENGTHS = [0, 1, 63, 120, 300]


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function, inputs, dy):
    """The result of `function` and the gradients of its floating inputs, given dy."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, dy)]


def modulated(x, shift, scale, **options):
    """y alone, without a residual."""
    same, y = ops.modulated_layernorm(x, shift, scale, **options)
    assert same is x
    return y


def layernorm_oracle(x, shift, scale):
    rows = []
    for sample, b, s in zip(x, shift, scale, strict=True):
        centred = sample - sample.mean(-1, keepdim=True)
        rows.append(centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + s) + b)
    return torch.stack(rows)


def attention_oracle(q, k, v, bias=None):
    scores = torch.einsum("bnhd,blhd->bhnl", q, k) / math.sqrt(q.shape[-1])
    weights = (scores if bias is None else scores + bias).exp()
    return torch.einsum("bhnl,blhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


def ragged_oracle(q, k, v, lengths):
    """One sample after the other, its caption cut to length."""
    results = []
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        o = attention_oracle(q[one], k[one, :length], v[one, :length]) if length else 0 * q[one]
        results.append(o)
    return torch.cat(results)


def plain_attention(q, k, v, bias=None):
    """The baseline of accuracy: PyTorch's own attention, or plain products in bf16, as in training on a CPU."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return ((scores if bias is None else scores + bias).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "N", "D"), [(32, 1, 1152), (3, 63, 37), (2, 231, 1152)])
def test_modulated_layernorm(B, N, D, dtype):
    """Different modulation per sample, batch > 1: a published kernel was wrong there, its test having used batch 1.

    At least 32 rows: the rounding of a row's two statistics moves all of it, so over 2 rows the ratio of RMS errors of
    two equally accurate ways is a draw (0.98 in the mean over seeds, 1.45 at the worst).
    """
    inputs = [randn(B, N, D, dtype=dtype), randn(B, D, dtype=dtype, seed=1), randn(B, D, dtype=dtype, seed=2)]
    dy = randn(B, N, D, dtype=dtype, seed=3)
    expected = with_gradients(layernorm_oracle, [t.double() for t in inputs], dy.double())

    def plain(x, shift, scale):
        return F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    baseline = with_gradients(plain, inputs, dy)
    actual = with_gradients(modulated, inputs, dy)
    for one, truth, plain_one in zip(actual, expected, baseline, strict=True):
        assert_rms(one, truth, plain_one)
    with torch.no_grad():
        assert_rms(modulated(*inputs), expected[0], baseline[0])


def test_modulated_layernorm_takes_both_shapes_of_modulation():
    x, shift, scale = randn(2, 5, 8), randn(2, 8, seed=1), randn(2, 8, seed=2)
    expected = layernorm_oracle(x, shift, scale)
    assert rms_error(modulated(x, shift, scale), expected) < 1e-14
    assert rms_error(modulated(x, shift[:, None], scale[:, None]), expected) < 1e-14


def test_modulated_layernorm_keeps_the_dtype_of_x():
    """Mixed precision: the modulation is fp32, the tokens are bf16."""
    x, shift, scale = (
        randn(2, 5, 8, dtype=torch.bfloat16),
        randn(2, 8, dtype=torch.float32),
        randn(2, 8, seed=2).float(),
    )
    expected = layernorm_oracle(*(t.double() for t in (x, shift, scale)))
    for backend in ("auto", "reference"):
        y = modulated(x, shift, scale, backend=backend)
        assert y.dtype == torch.bfloat16
        assert_rms(y, expected, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_residual_gate_and_rows_of_the_block(dtype, gated, backend):
    """x₁ = x + gate · h and its LayerNorm, each modulation the sum of a sample's row and the block's."""
    B, N, D = 3, 21, 32
    x, h = randn(B, N, D, dtype=dtype), randn(B, N, D, dtype=dtype, seed=1)
    condition = randn(B, 6, D, dtype=dtype, seed=2)
    table = randn(6, D, dtype=torch.promote_types(dtype, torch.float32), seed=3)
    dx1, dy = randn(B, N, D, dtype=dtype, seed=4), randn(B, N, D, dtype=dtype, seed=5)

    def fused(x, h, condition, table):
        shift, scale, gate, *_ = map(ops.Row, condition.unbind(1), table.unbind(0))
        options = {"residual": h, "gate": gate if gated else None, "backend": backend}
        x1, y = ops.modulated_layernorm(x, shift, scale, **options)
        return torch.stack([x1, y])

    def plain(x, h, condition, table):
        shift, scale, gate, *_ = (condition + table).unbind(1)
        x1 = (x + (gate[:, None] if gated else 1) * h).to(x.dtype)
        y = F.layer_norm(x1, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return torch.stack([x1, y.to(x.dtype)])

    inputs, dys = [x, h, condition, table], torch.stack([dx1, dy])
    expected = with_gradients(plain, [t.double() for t in inputs], dys.double())
    baseline = with_gradients(plain, inputs, dys)
    for one, truth, plain_one in zip(with_gradients(fused, inputs, dys), expected, baseline, strict=True):
        assert_rms(one, truth, plain_one)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_rows(dtype):
    """Nearest codes of what the operator gives, one scale per row; a row of zeros stays zero."""
    B, N, D = 2, 9, 64
    x, h = randn(B, N, D, dtype=torch.float32), randn(B, N, D, dtype=torch.float32, seed=1)
    shift, scale, gate = (randn(B, D, dtype=torch.float32, seed=seed) for seed in (2, 3, 4))
    shift[0], scale[0] = 0, -1
    x1, y, y_scale = ops.modulated_layernorm_quantized(x, shift, scale, residual=h, gate=gate, dtype=dtype)
    expected_x1, expected = ops.modulated_layernorm(x, shift, scale, residual=h, gate=gate, backend="reference")
    assert torch.equal(x1, expected_x1) and y.dtype == dtype and y_scale.dtype == torch.float32
    assert y_scale.shape == (B, N) and (y_scale[0] == 1).all() and not y[0].float().any()
    largest = 127 if dtype == torch.int8 else 448
    torch.testing.assert_close(y.float().abs().amax(-1)[1], torch.full((N,), float(largest)))
    codes = expected / y_scale[..., None]
    spacing = torch.ones(()) if dtype == torch.int8 else 2.0 ** (codes.abs().clamp(min=2**-6).log2().floor() - 3)
    assert ((y.float() - codes).abs() <= 0.5001 * spacing).all()
    with pytest.raises(ValueError, match=r"int8 or float8_e4m3fn, not torch\.int16"):
        ops.modulated_layernorm_quantized(x, shift, scale, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="no backend 'cpu'"):
        ops.modulated_layernorm_quantized(x, shift, scale, dtype=dtype, backend="cpu")


def test_linear_operators():
    B, N, K, D = 2, 5, 12, 8
    x, a, weight, bias = randn(B, N, D), randn(B, N, K, seed=1), randn(D, K, seed=2), randn(D, seed=3)
    gate = ops.Row(randn(B, D, seed=4), randn(D, seed=5))
    h = torch.einsum("bnk,dk->bnd", a, weight) + bias
    expected = x + (gate.sample + gate.table)[:, None] * h
    torch.testing.assert_close(ops.gated_linear(x, gate, a, weight, bias), expected)
    gelu = h / 2 * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
    torch.testing.assert_close(ops.linear_gelu(a, weight, bias), gelu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "d"), [(1, 72), (63, 8), (231, 72)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_self_attention(N, d, dtype, with_bias):
    B, H = 2, 2
    inputs = [randn(B, N, H, d, dtype=dtype, seed=seed) for seed in range(3)]
    bias = randn(B, 1, N, N, dtype=dtype, seed=4) if with_bias else None
    dy = randn(B, N, H, d, dtype=dtype, seed=3)
    bias64 = bias.double() if with_bias else None
    expected = with_gradients(lambda *t: attention_oracle(*t, bias64), [t.double() for t in inputs], dy.double())
    baseline = with_gradients(lambda *t: plain_attention(*t, bias), inputs, dy)
    actual = with_gradients(lambda *t: ops.self_attention(*t, bias=bias), inputs, dy)
    for one, truth, plain_one in zip(actual, expected, baseline, strict=True):
        assert_rms(one, truth, plain_one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", [ops.cross_attention, reference.cross_attention])
def test_cross_attention_to_ragged_captions(implementation, dtype):
    """Captions of 0 to 300 tokens; the padding is NaN, as memory from `torch.empty` can be, and must not matter."""
    B, N, L, H, d = len(LENGTHS), 17, max(LENGTHS), 2, 72
    lengths = torch.tensor(LENGTHS)
    q, k, v = (
        randn(B, N, H, d, dtype=dtype),
        randn(B, L, H, d, dtype=dtype, seed=1),
        randn(B, L, H, d, dtype=dtype, seed=2),
    )
    dy = randn(B, N, H, d, dtype=dtype, seed=3)
    padding = torch.arange(L) >= lengths[:, None]
    expected = with_gradients(lambda *t: ragged_oracle(*t, LENGTHS), [t.double() for t in (q, k, v)], dy.double())
    bias = torch.zeros(B, 1, 1, L, dtype=dtype).masked_fill(padding[:, None, None], -10000)
    bias[0] = 0
    visible = v.masked_fill(padding[:, :, None, None], 0)
    baseline = with_gradients(lambda *t: plain_attention(*t, bias), [q, k, visible], dy)
    k[padding] = float("nan")
    v[padding] = float("nan")
    actual = with_gradients(lambda *t: implementation(*t, lengths=lengths), [q, k, v], dy)
    for one, truth, plain_one in zip(actual, expected, baseline, strict=True):
        assert_rms(one[1:], truth[1:], plain_one[1:])
    for of_empty_caption in actual:
        assert torch.equal(of_empty_caption[0], torch.zeros_like(of_empty_caption[0]))
    for gradient in actual[2:]:
        assert not gradient[padding].any()


@pytest.mark.parametrize("implementation", [ops.cross_attention, reference.cross_attention])
def test_cross_attention_with_an_additive_bias_is_the_same(implementation):
    B, N, L, H, d = 3, 5, 7, 2, 8
    q, k, v = randn(B, N, H, d), randn(B, L, H, d, seed=1), randn(B, L, H, d, seed=2)
    lengths = torch.tensor([1, 4, 7])
    bias = torch.where(torch.arange(L) < lengths[:, None], 0.0, -10000.0)
    expected = ragged_oracle(q, k, v, lengths.tolist())
    assert rms_error(implementation(q, k, v, bias=bias), expected) < 1e-14
    assert rms_error(implementation(q, k, v, bias=bias[:, None]), expected) < 1e-14
    assert rms_error(implementation(q, k, v), attention_oracle(q, k, v)) < 1e-14


def test_non_contiguous_inputs_and_expanded_gradients():
    """Tokens that are a view of an image, slices of six modulations, heads of a fused projection, and `.sum()`."""
    B, N, D = 2, 6, 8
    x = randn(B, D, N).transpose(1, 2)
    shift, _, scale, *_ = randn(B, 6, D, seed=1).unbind(1)
    q, k, v = randn(B, N, 3 * D, seed=2).unflatten(-1, (3, 2, 4)).unbind(2)
    assert not x.is_contiguous() and not q.is_contiguous()
    one = torch.ones((), dtype=torch.float64).expand(B, N, D)
    for op, oracle, inputs in (
        (modulated, layernorm_oracle, (x, shift, scale)),
        (ops.self_attention, attention_oracle, (q, k, v)),
        (ops.cross_attention, attention_oracle, (q, k, v)),
    ):
        dy = one.unflatten(-1, inputs[0].shape[2:])
        for actual, expected in zip(with_gradients(op, inputs, dy), with_gradients(oracle, inputs, dy), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def block(x, shift, scale, text, lengths):
    """All three operators, as a block of the transformer has them."""
    y = modulated(x, shift, scale)
    q, kv = y.unflatten(-1, (2, -1)), text.unflatten(-1, (2, -1))
    x = x + ops.self_attention(q, q, q).flatten(2)
    return x + ops.cross_attention(x.unflatten(-1, (2, -1)), kv, kv, lengths=lengths).flatten(2)


def block_inputs(B, N, L, D=16, dtype=torch.float32):
    return [
        randn(B, N, D, dtype=dtype),
        randn(B, D, dtype=dtype, seed=1),
        randn(B, D, dtype=dtype, seed=2),
        randn(B, L, D, dtype=dtype, seed=3),
        torch.arange(B) + L - B + 1,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_every_shape_with_nothing_opaque_that_inductor_fuses(monkeypatch, dtype, training):
    """No graph break and no recompilation; LayerNorm in plain PyTorch, attention native, as nothing fuses into it."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=keep)
    for B, N, L in ((2, 12, 9), (3, 20, 5), (4, 35, 30)):
        inputs = block_inputs(B, N, L, dtype=dtype)
        inputs[0].requires_grad_(training)
        actual = compiled(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "native_problem", "plain PyTorch is the measure")
            exact = block(*(of.double() if of.is_floating_point() else of for of in inputs))
            assert_rms(actual, exact, block(*inputs))
    # bf16 self-attention in training changes hands at 16 tokens.
    assert len(graphs) == (2 if training and dtype == torch.bfloat16 else 1)
    for graph in graphs:
        ours = [str(node.target) for node in graph.graph.nodes if "pixart_fast" in str(node.target)]
        assert ours and set(ours) == {"pixart_fast.cross_attention"}


@pytest.mark.slow
def test_compiled_gradients():
    """Inductor has given NaN gradients in the LayerNorm of transposed tokens in bf16 on the CPU, and right outputs."""
    torch._dynamo.reset()
    x, shift, scale, *_ = block_inputs(2, 12, 9, dtype=torch.bfloat16)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2), shift, scale]
    dy = randn(*x.shape, dtype=torch.bfloat16, seed=5)
    expected = with_gradients(layernorm_oracle, [t.double() for t in inputs], dy.double())
    baseline = with_gradients(modulated, inputs, dy)
    actual = with_gradients(torch.compile(modulated, fullgraph=True), inputs, dy)
    for one, truth, eager in zip(actual, expected, baseline, strict=True):
        assert_rms(one, truth, eager)


@pytest.mark.parametrize(
    ("op", "dtype", "N", "training", "backend"),
    [
        ("self_attention", torch.bfloat16, 16, True, "cpu"),
        ("self_attention", torch.bfloat16, 64, True, "reference"),
        ("self_attention", torch.bfloat16, 256, True, "reference"),
        ("self_attention", torch.bfloat16, 257, True, "cpu"),
        ("self_attention", torch.bfloat16, 64, False, "cpu"),
        ("self_attention", torch.float32, 64, True, "cpu"),
        ("cross_attention", torch.bfloat16, 64, True, "cpu"),
        ("cross_attention", torch.float32, 1024, True, "cpu"),
        ("cross_attention", torch.float32, 1025, True, "reference"),
        ("self_attention", torch.float64, 16, True, "reference"),
    ],
)
def test_attention_on_the_cpu_goes_by_what_was_measured(monkeypatch, op, dtype, N, training, backend):
    monkeypatch.setattr(ops, "native_problem", None)
    choice = ops.resolve(op, device="cpu", dtype=dtype, needs_grad=training, scores=N * N)
    assert choice.name == backend


def test_bf16_training_without_native_operators_takes_plain_products(monkeypatch):
    monkeypatch.setattr(ops, "native_problem", "not built")
    calls = []
    plain = reference.self_attention
    monkeypatch.setattr(reference, "self_attention", lambda *t, **options: calls.append(1) or plain(*t, **options))
    for N, dtype, expected in ((16, torch.bfloat16, 1), (257, torch.bfloat16, 0), (16, torch.float32, 0)):
        calls.clear()
        q = randn(1, N, 1, 8, dtype=dtype).requires_grad_()
        ops.self_attention(q, q, q)
        assert len(calls) == expected


V100 = ops.Capability("Tesla V100", (7, 0), False, False)
T4 = ops.Capability("Tesla T4", (7, 5), False, False)
A100 = ops.Capability("NVIDIA A100", (8, 0), True, True)
H100 = ops.Capability("NVIDIA H100", (9, 0), True, True)
P100 = ops.Capability("Tesla P100", (6, 0), False, False)
CPU = ops.Capability("cpu", None, True, False)


@pytest.mark.parametrize(
    ("capability", "precision", "attention"),
    [
        (V100, "fp16", "memory-efficient"),
        (T4, "fp16", "memory-efficient"),
        (A100, "bf16", "flash"),
        (H100, "bf16", "cuDNN, else flash"),
        (P100, "fp32", "memory-efficient"),
        (CPU, "fp32", "native C++, else flash (CPU)"),
    ],
)
def test_precision_and_attention_by_capability(capability, precision, attention):
    assert ops.precision_for(capability) == precision
    assert ops.attention_kernel(capability) == attention


@pytest.mark.parametrize("expected", [V100, T4, A100, H100])
def test_capability_of_a_gpu(monkeypatch, expected):
    """PyTorch says that a V100 supports bf16, where it is emulated; we go by the compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: expected.sm)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: expected.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert ops.capability("cuda:0") == expected


def test_capability_of_the_cpu():
    found = ops.capability("cpu")
    assert (found.device, found.sm, found.has_flash_attention) == ("cpu", None, False)


ON_GPU = {
    (7, 0): {"modulated_layernorm": "triton"},
    (7, 5): {"modulated_layernorm": "triton"},
    (8, 0): dict.fromkeys(("modulated_layernorm", "cross_attention", "gated_linear", "linear_gelu"), "triton"),
    (6, 0): {},
}
ON_GPU[9, 0] = ON_GPU[8, 0] | {"self_attention": "cudnn"}


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of a compute capability, with Triton."""

    def pretend(sm):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: sm)
        monkeypatch.setattr(ops, "triton_problem", None)
        monkeypatch.setattr(ops, "triton_device", "cuda")

    return pretend


@pytest.mark.parametrize("sm", ON_GPU)
def test_auto_on_a_gpu(gpu, sm):
    gpu(sm)
    half = torch.float16 if sm < (8, 0) else torch.bfloat16
    assert {op: ops.resolve(op, "auto", "cuda", dtype=half).name for op in ops.OPS} == {
        op: ON_GPU[sm].get(op, "reference") for op in ops.OPS
    }
    for op in ("gated_linear", "linear_gelu"):
        assert ops.resolve(op, "auto", "cuda", dtype=half, needs_grad=True).name == "reference"
        assert ops.resolve(op, "auto", "cuda", dtype=torch.float32).name == "reference"
    if sm >= (7, 0):
        assert ops.resolve("modulated_layernorm", "auto", "cuda", dtype=torch.float64).name == "reference"
        assert ops.resolve("self_attention", "auto", "cuda", dtype=torch.float32).name == "reference"


def test_auto_without_triton_says_so(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(ops, "triton_problem", "Triton is not installed (`pip install triton`)")
    assert ops.resolve("cross_attention", "auto", "cuda") == ops.Choice("reference", ops.triton_problem)
    with pytest.raises(RuntimeError, match=r"'triton': Triton is not installed"):
        ops.resolve("cross_attention", "triton", "cuda")


def test_flash_attn_is_taken_by_name(gpu, monkeypatch):
    gpu((9, 0))
    with pytest.raises(RuntimeError, match="flash-attn is not installed"):
        ops.resolve("self_attention", "flash_attn", "cuda", dtype=torch.bfloat16)
    seen = []
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = lambda q, k, v: seen.append(q.shape) or (q, None)
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert ops.flash_attn_version() == 3
    assert ops.resolve("self_attention", "flash_attn", "cuda", dtype=torch.bfloat16).name == "flash_attn"
    with pytest.raises(RuntimeError, match="float16 and bfloat16"):
        ops.resolve("self_attention", "flash_attn", "cuda", dtype=torch.float32)
    q = randn(1, 3, 2, 8)
    assert ops._flash_attn(q, q, q) is q and seen == [q.shape]


def test_a_compiled_graph_knows_the_gpu(gpu):
    """The capability is a constant of the graph, and no break in it."""
    gpu((9, 0))
    torch._dynamo.reset()

    def chosen(x):
        return x + len(ops.resolve("cross_attention", "auto", "cuda:0", dtype=torch.bfloat16).name)

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1)) == len("triton")


@pytest.mark.parametrize("op", ("modulated_layernorm", "self_attention", "cross_attention"))
def test_an_unavailable_backend_raises_and_says_what_to_do(gpu, op):
    gpu((8, 0))
    with pytest.raises(RuntimeError, match=rf"{op} cannot run on backend 'cpu'.*backend='auto'"):
        ops.resolve(op, "cpu", "cuda")
    with pytest.raises(RuntimeError, match=rf"{op} cannot run on backend '(triton|cudnn)'"):
        ops.resolve(op, "cudnn" if op == "self_attention" else "triton", "cpu")
    with pytest.raises(RuntimeError, match="it has no such kernel; backend 'cudnn' serves self_attention"):
        ops.resolve("cross_attention", "cudnn", "cuda")
    x = randn(1, 2, 4) if op == "modulated_layernorm" else randn(1, 2, 1, 4)
    inputs = (x, x[:, 0], x[:, 0]) if op == "modulated_layernorm" else (x, x, x)
    with pytest.raises(RuntimeError, match=rf"{op} cannot run on backend 'cpu'.*not torch.float64|not built"):
        getattr(ops, op)(*inputs, backend="cpu")


def test_linear_operators_fuse_in_plain_inference_only(monkeypatch):
    monkeypatch.setattr(ops, "triton_problem", None)
    monkeypatch.setattr(ops, "triton_device", "cpu")
    a, weight = randn(1, 2, 4, dtype=torch.float32), randn(3, 4, dtype=torch.float32)

    def fuses(backend="triton", weight=weight):
        return ops.fuses("linear_gelu", backend, a, weight)

    assert not fuses()
    with torch.no_grad():
        assert fuses() and not fuses("reference") and not fuses("auto")
        assert not fuses(weight=weight.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not fuses()


def test_a_bias_is_for_plain_pytorch():
    q = randn(1, 2, 1, 4)
    for op, bias in ((ops.self_attention, randn(1, 1, 2, 2)), (ops.cross_attention, randn(1, 2))):
        with pytest.raises(RuntimeError, match="cannot run on backend 'cpu': it has a bias"):
            op(q, q, q, bias=bias, backend="cpu")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no backend 'fast' of 'modulated_layernorm'"):
        ops.resolve("modulated_layernorm", "fast")
    with pytest.raises(ValueError, match="the operators are"):
        ops.resolve("layernorm")


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (3, 2, 4), (2, 1, 4)])
def test_modulated_layernorm_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"not \[3, 5, 4\] and \["):
        modulated(randn(3, 5, 4), randn(*shape), randn(3, 4))


def test_modulated_layernorm_refuses_other_residuals():
    x, m = randn(3, 5, 4), randn(3, 4)
    with pytest.raises(ValueError, match=r"residual like x, \[3, 5, 4\], not \[3, 4, 4\]"):
        ops.modulated_layernorm(x, m, m, residual=x[:, 1:])
    with pytest.raises(ValueError, match="a gate with a residual only"):
        ops.modulated_layernorm(x, m, m, gate=m)
    with pytest.raises(ValueError, match=r"gate \[B, D\].* \[3, 4\] \(with \[3\]\)"):
        ops.modulated_layernorm(x, m, m, residual=x, gate=ops.Row(m, m[:, 0]))


def test_attention_refuses_other_shapes():
    q, text = randn(2, 5, 2, 4), randn(2, 3, 2, 4)
    with pytest.raises(ValueError, match=r"self_attention takes .*\[2, 5, 2, 4\], \[2, 3, 2, 4\]"):
        ops.self_attention(q, text, text)
    with pytest.raises(ValueError, match=r"cross_attention takes .*\[2, 5, 2, 4\], \[2, 3, 2, 4\], \[2, 3, 1, 4\]"):
        ops.cross_attention(q, text, text[:, :, :1])
    with pytest.raises(ValueError, match=r"lengths \[B\] with B = 2, not \[3\]"):
        ops.cross_attention(q, text, text, lengths=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bias .* = \[2, 1, 3\], not \[2, 5\]"):
        ops.cross_attention(q, text, text, bias=randn(2, 5))
    with pytest.raises(ValueError, match="not both"):
        ops.cross_attention(q, text, text, lengths=torch.ones(2, dtype=torch.int64), bias=randn(2, 3))
