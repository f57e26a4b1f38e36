"""The cost model against PyTorch's own count of FLOPs, against bytes counted operation by operation, and by hand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench import cost
from bench.cost import Cost, Model, total
from pixart_fast import Transformer, ops
from pixart_fast.config import SIZES, transformer_config
from pixart_fast.cost import forward_flops
from pixart_fast.dit import DiT
from pixart_fast.layers import KeysValues
from pixart_fast.transformer import Block, Stream

XL = Model(layers=28, width=1152)


FREE = ("empty", "_unsafe_view", "prim.")


class Traffic(TorchDispatchMode):
    """Sums the bytes of operands and results of every operation that touches numbers: no views, no allocations."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        views = any(of.alias_info and not of.alias_info.is_write for of in function._schema.returns)
        if not views and not any(word in str(function) for word in FREE):
            for leaves in (tree_leaves((arguments, options or {})), tree_leaves(results)):
                tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values()
                self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return results


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def traffic(run) -> int:
    with Traffic() as counter:
        run()
    return counter.bytes


B, N, L, D, H = 2, 272, 250, 96, 2  # N · L above 256², where bf16 training takes an attention kernel


def training(*leaves: torch.Tensor):
    return [leaf.requires_grad_() for leaf in leaves]


def both_halves(function, *leaves: torch.Tensor) -> tuple[int, int]:
    """Counted FLOPs of forward and backward."""
    leaves = training(*leaves)
    results = []
    forward = counted(lambda: results.append(function(*leaves)))
    return forward, counted(lambda: results[0].sum().backward())


def rows_of(dtype=torch.float32, width: int = D) -> torch.Tensor:
    return torch.randn(B, N, width, dtype=dtype)


@pytest.mark.parametrize("input_gradient", [True, False])
def test_flops_of_a_linear_layer(input_gradient):
    a = rows_of().requires_grad_(input_gradient)
    forward, backward = both_halves(lambda weight, bias: F.linear(a, weight, bias), torch.randn(40, D), torch.randn(40))
    for passes, expected in {
        "forward": forward,
        "training forward": forward,
        "backward": backward,
        "forward+backward": forward + backward,
    }.items():
        assert total(cost.linear(B * N, D, 40, 4, passes, input_gradient=input_gradient)).flops == expected


def test_flops_of_the_fused_products():
    gate, x, weight = ops.Row(torch.randn(B, D)), rows_of(), torch.randn(D, 40)
    forward, backward = both_halves(
        lambda a, weight: ops.gated_linear(x, gate, a, weight, None, backend="reference"), rows_of(width=40), weight
    )
    for fused in (True, False):
        assert total(cost.gated_linear(B * N, 40, D, 4, fused=fused)).flops == forward
        assert total(cost.gated_linear(B * N, 40, D, 4, "backward", fused=fused)).flops == backward
    forward, backward = both_halves(
        lambda a, weight: ops.linear_gelu(a, weight, None, backend="reference"), rows_of(width=40), weight.detach()
    )
    for fused in (True, False):
        assert total(cost.linear_gelu(B * N, 40, D, 4, fused=fused)).flops == forward
        assert total(cost.linear_gelu(B * N, 40, D, 4, "backward", fused=fused)).flops == backward


@pytest.mark.parametrize("tokens", [N, L], ids=["self", "cross"])
def test_flops_of_attention(tokens):
    """By PyTorch's formulas of its kernels, and those of the project's operator."""
    q, k = (B, H, N, D // H), (B, H, tokens, D // H)
    pairs, query, key = B * N * tokens * D, B * N * D, B * tokens * D
    with FakeTensorMode():
        tensors = [torch.empty(B, rows, H, D // H) for rows in (N, tokens, tokens)]
        ours = both_halves(lambda q, k, v: torch.ops.pixart_fast.cross_attention(q, k, v, None)[0], *tensors)
    for forward, backward in (ours, (sdpa_flop_count(q, k, k), sdpa_backward_flop_count(q, q, k, k))):
        assert total(cost.attention(query, key, pairs, 4)).flops == forward
        assert total(cost.attention(query, key, pairs, 4, "backward")).flops == backward


@pytest.fixture
def fake(monkeypatch):
    """Shapes without numbers: the native operators need not be built, since nothing computes."""
    monkeypatch.setattr(ops, "native_problem", None)
    with FakeTensorMode():
        yield


def small(layers: int = 2, **config) -> Transformer:
    """On 8 x 8 tokens."""
    size = SIZES["scenes"]._replace(layers=layers)
    return Transformer(**transformer_config(size, sample_size=16, caption_channels=48, **config))


def inputs(B: int, tokens: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(B, 4, 16, 16),
        "encoder_hidden_states": torch.randn(B, tokens, 48),
        "timestep": torch.full((B,), 500),
    }


@pytest.mark.parametrize("modulation", ["adaln_single", "adaln"])
def test_flops_of_a_model(fake, modulation):
    """Forward, training, and training with every block recomputed, which stops before a block's last product."""
    model, arguments = small(modulation=modulation), inputs(3, 13)
    of = Model.of(model.config)

    def forward():
        with torch.no_grad():
            model(**arguments)

    def train():
        model(**arguments).sample.square().mean().backward()

    assert total(cost.transformer(of, 3, 64, 13, 4)).flops == counted(forward)
    assert total(cost.step(of, 3, 64, 13, 4)).flops == counted(train)
    assert total(cost.step(of, 3, 64, 13, 4, recompute="pointwise")).flops == counted(train)
    model.enable_gradient_checkpointing()
    assert total(cost.step(of, 3, 64, 13, 4, recompute="block")).flops == pytest.approx(counted(train))


def test_flops_of_a_generation(fake):
    """Captions pass through the model once, or in every step."""
    model = small()
    of, arguments = Model.of(model.config), inputs(2 * 3, 13)

    @torch.no_grad()
    def once():
        caption = model.encode_caption(arguments["encoder_hidden_states"])
        for _ in range(4):
            model(**arguments | {"encoder_hidden_states": caption})

    @torch.no_grad()
    def every_time():
        for _ in range(4):
            model(**arguments)

    assert total(cost.generation(of, 3, 64, 13, 4, steps=4)).flops == counted(once)
    assert total(cost.generation(of, 3, 64, 13, 4, steps=4, fused=False)).flops == counted(every_time)
    one = total(cost.generation(of, 3, 64, 13, 4, steps=4, guided=False)).flops
    assert total(cost.generation(of, 3, 64, 13, 4, steps=4)).flops == 2 * one


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_forward_agrees_with_the_formula_that_training_logs(tokens):
    expected = forward_flops(
        layers=28,
        width=1152,
        tokens=tokens,
        text_tokens=120,
        caption_channels=4096,
        patch_features=16,
        out_features=32,
    )
    for fused in (True, False):
        assert total(cost.transformer(XL, 5, tokens, 120, 2, fused=fused)).flops == 5 * expected


def test_parameters():
    """The paper's 611M and 833M, and a class-conditional DiT."""
    assert XL.parameters == 610_856_096
    assert Model(layers=28, width=1152, modulation="adaln").parameters == 833_213_984
    with torch.device("meta"):
        dit = DiT(hidden_size=96, depth=2, num_heads=2)
    of = Model(layers=2, width=96, caption_channels=None, modulation="adaln")
    assert of.parameters == sum(parameter.numel() for parameter in dit.parameters())


def build_block(dtype: torch.dtype, backend: str) -> Block:
    block = Block(D, H, D // H, D, bias=True, dropout=0.0, exact_gelu=False, eps=1e-6)
    block = block if dtype == torch.float32 else block.to(dtype)  # fake weights cannot be moved
    for module in block.modules():
        for name in getattr(module, "backends", {}):
            module.backends[name] = backend if backend == "reference" or name in ops.SERVED_BY[backend] else "auto"
    return block


def block_traffic(dtype: torch.dtype, backend: str, passes: str) -> int:
    """Bytes of a block, operation by operation."""
    block, train = build_block(dtype, backend), passes != "forward"
    tensors = [rows_of(dtype), rows_of(dtype), torch.randn(B, 1, D, dtype=dtype), torch.randn(B, 6, D, dtype=dtype)]
    keys = [torch.randn(B, L, H, D // H, dtype=dtype) for _ in range(2)]
    x, h, gate, condition, k, v = (tensor.requires_grad_(train) for tensor in [*tensors, *keys])
    stream, lengths, results = Stream(x, h, gate) if train else Stream(x), torch.tensor([L - 40, L]), []

    def forward():
        with torch.set_grad_enabled(train):
            results.append(block(stream, condition, KeysValues(k, v), lengths))

    moved = traffic(forward)
    if not train:
        return moved
    upstream = [torch.randn_like(result) for result in results[0]]
    leaves = [x, h, gate, condition, k, v, *block.parameters()]
    # No backward(): it copies a gradient that another leaf shares.
    backward = traffic(lambda: torch.autograd.grad(results[0], leaves, upstream, allow_unused=True))
    return {"training forward": moved, "backward": backward, "forward+backward": moved + backward}[passes]


@pytest.mark.parametrize("passes", cost.PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_of_the_eager_block(dtype, passes):
    """0.6 % from what the operations of plain PyTorch read and write: modulations, biases and masks are left out."""
    of = Model(layers=1, width=D)
    predicted = total(cost.block(of, B, N, L, dtype.itemsize, passes, fused=False)).bytes
    found = block_traffic(dtype, "reference", passes)
    print(f"{passes} {dtype}: {predicted / found - 1:+.2%}")
    assert predicted == pytest.approx(found, rel=0.006)


@pytest.mark.parametrize("passes", cost.PASSES)
def test_bytes_of_the_fused_block(fake, passes):
    """Our operators' operands and results, what the CPU leaves to eager PyTorch put apart."""
    of, one = Model(layers=1, width=D), B * N * D * 4
    # Units of [B, N, D] that the CPU moves besides. Inference: q, k and v read y three times (2), gate and sum behind
    # two products (4 each), GELU (8). Training: gate and sum in two kernels (2); backward: gate's gradients and the sum
    # before them in four (4), sums of q, k and v's in two (2).
    apart = {"forward": 2 + 2 * 4 + 8, "training forward": 2, "backward": 4 + 2, "forward+backward": 8}[passes]
    predicted = total(cost.block(of, B, N, L, 4, passes)).bytes + apart * one
    assert predicted == pytest.approx(block_traffic(torch.float32, "cpu", passes), rel=0.01)


def test_bytes_of_the_text_path():
    """Projection of the captions, and the weights of all keys and values joined for one product."""
    model = small(layers=8).set_backend("reference")
    features = torch.randn(64, 20, 48)
    with torch.no_grad():
        found = traffic(lambda: model.encode_caption(features))
    predicted = total(cost.text(Model.of(model.config), 64, 20, 4)).bytes
    assert predicted == pytest.approx(found, rel=0.006)


def test_bytes_of_the_operators_by_hand():
    """XL/2 at 256 px, 4 samples, bf16: a tensor of [4, 256, 1152] is 2,359,296 bytes."""
    one, rows = 2_359_296, 1024
    weight = 1152 * 1152 * 2
    assert [c.bytes for c in cost.modulated_layernorm(rows, 1152, 2, "forward+backward")] == [4 * one, 6 * one]
    # Eager, in units of an element: residual 2 + 4 twice, 8, 12, 4 + 2; LayerNorm and modulation 6 + 8 + 8 + 8 + 6.
    assert total(cost.modulated_layernorm(rows, 1152, 2, fused=False)).bytes == (38 + 36) * rows * 1152
    assert total(cost.linear(rows, 1152, 1152, 2)).bytes == 2 * one + weight
    assert total(cost.linear(rows, 1152, 1152, 2, "backward")).bytes == 5 * one + 2 * weight
    assert total(cost.gated_linear(rows, 1152, 1152, 2)).bytes == 3 * one + weight
    assert total(cost.linear_gelu(rows, 1152, 4608, 2)).bytes == 5 * one + 4 * weight
    keys = 4 * 120 * 1152 * 2
    pairs = 4 * 256 * 120 * 1152
    found = cost.attention(rows * 1152, 4 * 120 * 1152, pairs, 2, "forward+backward")
    assert found == [Cost(4 * pairs, 2 * one + 2 * keys), Cost(10 * pairs, 4 * one + 4 * keys)]


def test_fused_block_in_inference_is_ten_kernels():
    """As many as the block launches; the eager path moves more, by more in training."""
    assert len(cost.block(XL, 4, 256, 120, 2)) == 10
    ratios = []
    for passes in ("forward", "forward+backward"):
        fused, eager = (total(cost.block(XL, 64, 256, 120, 2, passes, fused=fused)) for fused in (True, False))
        assert fused.flops == eager.flops
        ratios.append(eager.bytes / fused.bytes)
    assert 1.5 < ratios[1] < ratios[0] < 4


def test_bytes_of_the_optimizer():
    """Eager AdamW moves 80 bytes a weight; one pass reads gradient, weight and moments and writes all but the first."""
    weight = nn.Parameter(torch.randn(1000, 100))
    weight.grad = torch.randn_like(weight)
    adamw = torch.optim.AdamW([weight], foreach=False)
    adamw.step()
    assert total(cost.optimizer(weight.numel(), 4, fused=False)).bytes == pytest.approx(traffic(adamw.step), rel=1e-3)
    assert total(cost.optimizer(10, 4)).bytes == 10 * 4 * (4 + 3)
    # bf16: its gradient in and its weight out take 2 bytes each, master and moments 12 in and 12 out.
    assert total(cost.optimizer(10, 2)).bytes == 10 * (2 + 12 + 12 + 2)


def test_recomputing_adds_what_it_says():
    plain, pointwise, block = (total(cost.step(XL, 8, 256, 120, 2, recompute=how)) for how in cost.RECOMPUTE)
    again = total(cost.block(XL, 8, 256, 120, 2, "training forward")[:-1]) * 28
    assert block.flops - plain.flops == pytest.approx(again.flops)
    assert block.bytes - plain.bytes == pytest.approx(again.bytes)
    # Two LayerNorms of 4, gate and sum of 3, GELU of 2 on four times the width; no product.
    assert pointwise == Cost(plain.flops, plain.bytes + 28 * (8 + 3 + 8) * 8 * 256 * 1152 * 2)


def test_limit_of_an_operator_is_its_slower_side():
    assert cost.limit(Cost(flops=6e12, bytes=1e9), copy=1e9, matmul=2e12) == (3, "matmul")
    assert cost.limit(Cost(flops=6e12, bytes=4e9), copy=1e9, matmul=2e12) == (4, "copy")


def test_limits_of_a_sequence_add_up():
    """A product cannot hide behind the LayerNorm that waits for it: 3 + 4 s, not the larger of 3.5 and 5."""
    costs = [Cost(flops=6e12, bytes=1e9), Cost(flops=1e12, bytes=4e9)]
    assert cost.limit(costs, copy=1e9, matmul=2e12) == (7, "copy")
    assert cost.limit(total(costs), copy=1e9, matmul=2e12) == (5, "copy")


def test_costs_add_and_multiply():
    assert Cost(1, 2) + 3 * Cost(4, 5) == Cost(1, 2) + Cost(4, 5) * 3 == Cost(13, 17)
    assert total([]) == Cost()


@pytest.mark.parametrize(
    "wrong", [lambda: cost.linear(1, 2, 3, 4, "backwards"), lambda: cost.step(XL, 1, 2, 3, 4, recompute="all")]
)
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        wrong()
