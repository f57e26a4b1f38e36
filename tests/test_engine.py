"""What a block costs before it runs anywhere: graphs, kernel launches, and the bytes it keeps for its backward."""

from contextlib import contextmanager, nullcontext
from copy import deepcopy

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pixart_fast import Transformer, ops
from pixart_fast.engine import compile_blocks, recompute_pointwise
from pixart_fast.layers import KeysValues
from pixart_fast.transformer import Stream

# The 40 aspect ratios of the published 512-px model, height and width in pixels.
PORTRAITS = (
    *((256, w) for w in (1024, 992, 960, 928)),
    *((288, w) for w in (896, 864, 832)),
    *((320, w) for w in (800, 768)),
    *((352, w) for w in (736, 704)),
    *((384, w) for w in (672, 640)),
    *((416, w) for w in (608, 576)),
    *((448, w) for w in (576, 544)),
    *((480, w) for w in (544, 512)),
)
BUCKETS = (*PORTRAITS, (352, 672), (512, 512), *((w, h) for h, w in PORTRAITS))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(cls: type = Transformer, *, heads: int = 2, head_dim: int = 12, layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return cls(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        cross_attention_dim=heads * head_dim,
        sample_size=64,
        use_additional_conditions=False,
    )


def inputs(batch: int, height: int, width: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> dict:
    return {
        "hidden_states": torch.randn(batch, 4, height, width, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, dim, dtype=dtype),
        "timestep": torch.arange(batch),
        "encoder_attention_mask": torch.arange(tokens) < torch.arange(batch)[:, None] % tokens + 1,
    }


@contextmanager
def on_our_kernels(monkeypatch, model: Transformer):
    """The graph of a CUDA device, traced on a CPU: every operator that has a Triton kernel is one opaque node."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "triton_device", "cpu")
        patch.setattr(ops, "triton_problem", None)
        for op in ops.SERVED_BY["triton"]:
            model.set_backend("triton", op=op)
        model.set_backend("reference", op="self_attention")
        yield


@pytest.mark.parametrize("use", ["inference", "training", "training, recomputing"])
def test_one_graph_for_all_blocks_and_all_aspect_ratios(use):
    assert len(set(BUCKETS)) == 40
    model = build()
    if use == "training, recomputing":
        recompute_pointwise(model)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True, backend=keep)
    with torch.set_grad_enabled(use != "inference"):
        for height, width in BUCKETS:
            sample = model(**inputs(2, height // 8, width // 8, 7, 24)).sample
            assert sample.shape == (2, 8, height // 8, width // 8)
    assert len(graphs) == 1


def test_compiled_blocks_compute_the_same():
    model = build(layers=2)
    arguments = inputs(2, 8, 12, 7, 24)
    expected = model(**arguments).sample
    torch.testing.assert_close(compile_blocks(model)(**arguments).sample, expected, rtol=1e-4, atol=1e-5)


VIEWS = ("view", "transpose", "permute", "unbind", "split", "unsqueeze", "select", "slice", "expand", "t", "alias")


def launches(model: nn.Module, block: nn.Module, *arguments) -> list[str]:
    """Names of what would be launched for one block, from its traced graph: everything but views and metadata."""
    with torch.no_grad():
        graph = make_fx(lambda *t: block(*t), tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments).graph
    names = []
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target.name().removeprefix("aten::").removeprefix("pixart_fast::").split(".")[0]
        reads_only = name.lstrip("_").removesuffix("_with_sizes") in VIEWS or "view" in name
        if not reads_only:
            names.append(name)
    return names


def block_inputs(batch: int, tokens: int, text: int, dim: int, heads: int) -> tuple:
    k, v = torch.randn(batch, text, 2, heads, dim // heads, dtype=torch.bfloat16).unbind(2)
    x = torch.randn(batch, tokens, dim, dtype=torch.bfloat16)
    return Stream(x), torch.randn(batch, 6, dim, dtype=torch.bfloat16), KeysValues(k, v), torch.full((batch,), text)


def test_ten_launches_per_block_in_inference(monkeypatch):
    """Every operator that follows a matrix product or goes before one is in one of our kernels."""
    model = build(heads=16, head_dim=72, layers=1).bfloat16()
    model.fuse_qkv_projections()
    with on_our_kernels(monkeypatch, model):
        names = launches(model, model.transformer_blocks[0], *block_inputs(2, 256, 20, 1152, 16))
    assert names == [
        "modulated_layernorm",
        "addmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "gated_linear",
        "addmm",
        "cross_attention",
        "addmm",
        "modulated_layernorm",
        "linear_gelu",
        "gated_linear",
    ]


def test_dropout_is_not_fused_away(monkeypatch):
    model = build(heads=16, head_dim=72, layers=1).bfloat16()
    model.transformer_blocks[0].attn1.to_out[1].p = 0.5
    with on_our_kernels(monkeypatch, model):
        arguments = (model, model.transformer_blocks[0], *block_inputs(2, 256, 20, 1152, 16))
        assert launches(*arguments).count("gated_linear") == 1
        model.eval()
        assert launches(*arguments).count("gated_linear") == 2


def test_plain_pytorch_launches_more():
    """The count above sees what it should: the same block without our kernels, and with separate q, k, v."""
    model = build(heads=16, head_dim=72, layers=1).bfloat16().set_backend("reference")
    names = launches(model, model.transformer_blocks[0], *block_inputs(2, 256, 20, 1152, 16))
    assert names.count("addmm") == 8 and len(names) > 25


def test_diffusers_launches_thirty():
    block = build(PixArtTransformer2DModel, heads=16, head_dim=72, layers=1).bfloat16().transformer_blocks[0]

    def run(x: Tensor, text: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        return block(x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=condition)

    shapes = ((2, 256, 1152), (2, 20, 1152), (2, 6 * 1152), (2, 1, 20))
    assert len(launches(block, run, *(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes))) == 30


def test_diffusers_takes_four_graphs_for_all_aspect_ratios():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(build(PixArtTransformer2DModel, layers=1), fullgraph=True, dynamic=True, backend=keep)
    sizes = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        for height, width in BUCKETS:
            compiled(**inputs(2, height // 8, width // 8, 7, 24), added_cond_kwargs=sizes)
    assert len(graphs) == 4


def kept_per_block(make, tokens: int) -> float:
    """What one block in bf16 keeps from forward to backward, in units of [B, N, D]: XL/2's width, fake tensors."""
    batch, text, dim = 2, 120, 1152
    side = int(tokens**0.5)
    kept = []
    for layers in (2, 4):  # what lies before and after the blocks drops out
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = make(layers)
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16)))
            arguments = inputs(batch, 2 * side, 2 * side, text, dim, torch.bfloat16)
            arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                sample = model(**arguments).sample
                kept.append(tracker.get_tracker_snapshot("current")[torch.device("cpu")][_MemRefType.ACT])
                sample.float().sum().backward()
    return (kept[1] - kept[0]) / 2 / (batch * tokens * dim * 2)


def xl(cls: type = Transformer):
    return lambda layers: build(cls, heads=16, head_dim=72, layers=layers)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_activations_of_a_training_block(monkeypatch, tokens):
    """At most 0.55 of our block in eager PyTorch; 0.62 of diffusers', whose LayerNorm keeps bf16 instead of fp32."""

    def fused(layers: int) -> Transformer:
        model = xl()(layers)
        for op in ("modulated_layernorm", "cross_attention"):
            model.set_backend("triton", op=op)
        return model.set_backend("reference", op="self_attention")

    monkeypatch.setattr(ops, "triton_device", "cpu")
    monkeypatch.setattr(ops, "triton_problem", None)
    eager = kept_per_block(lambda layers: xl()(layers).set_backend("reference"), tokens)
    diffusers = kept_per_block(xl(PixArtTransformer2DModel), tokens)
    with_kernels = kept_per_block(fused, tokens)
    ours = kept_per_block(lambda layers: recompute_pointwise(fused(layers)), tokens)
    print(f"{tokens} tokens: {eager:.2f} eager, {diffusers:.2f} diffusers, {with_kernels:.2f} kernels, {ours:.2f} ours")
    assert ours < with_kernels < diffusers < eager
    assert ours <= 0.55 * eager
    assert ours <= 0.62 * diffusers


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_pointwise_parts_changes_no_gradient_and_repeats_no_product(compiled):
    def step(prepare) -> tuple[dict[str, Tensor], int]:
        model = build(layers=2)
        prepare(model)
        if compiled:
            for block in model.transformer_blocks:
                block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
        torch.manual_seed(1)
        with nullcontext() if compiled else FlopCounterMode(display=False) as counter:
            model(**inputs(2, 8, 12, 7, 24)).sample.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return gradients, 0 if compiled else counter.get_total_flops()

    expected, products = step(lambda model: None)
    actual, with_recomputation = step(recompute_pointwise)
    for name, gradient in expected.items():
        if compiled:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(actual[name], gradient), name
    assert with_recomputation == products


def test_a_copy_of_a_recomputing_model_computes_with_its_own_weights():
    model = recompute_pointwise(build(layers=1))
    copy = deepcopy(model)
    nn.init.zeros_(copy.transformer_blocks[0].attn1.to_v.weight)
    arguments = inputs(2, 8, 12, 7, 24)
    assert not torch.equal(model(**arguments).sample, copy(**arguments).sample)
