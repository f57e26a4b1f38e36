"""The parts against formulas written out in fp64, apart from any library."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pixart_fast import layers
from pixart_fast.layers import (
    AdaLNSingle,
    CaptionProjection,
    Condition,
    CrossAttention,
    FeedForward,
    PatchEmbed,
    SelfAttention,
    SinusoidMLP,
    sincos_2d,
    sinusoid,
    unpatchify,
)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head's attention `[N, d]`."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v


@pytest.mark.parametrize(
    ("height", "width", "base", "scale"), [(4, 4, 4, 1.0), (3, 5, 4, 1.0), (6, 2, 8, 2.0), (1, 7, 64, 0.5)]
)
def test_positions_are_sines_of_stretched_coordinates(height, width, base, scale):
    dim = 24
    embedding = sincos_2d(height, width, dim, base_size=base, scale=scale, device=torch.device("cpu"))
    assert embedding.shape == (height * width, dim) and embedding.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            expected = []
            for position, length in ((column, width), (row, height)):
                coordinate = position / (length / base) / scale
                angles = [coordinate / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(embedding[row * width + column], expected, atol=1e-6)


def test_position_embeddings_are_kept_per_shape(monkeypatch):
    made = []
    monkeypatch.setattr(layers, "sincos_2d", lambda *of, **more: made.append(of[:2]) or sincos_2d(*of, **more))
    embed = PatchEmbed(8, 2, 4, 24, 1.0)
    for height, width in [(8, 8), (8, 12), (8, 8), (12, 8)]:
        latents = torch.randn(2, 4, height, width)
        position = sincos_2d(height // 2, width // 2, 24, base_size=4, scale=1.0, device=latents.device)
        expected = embed.proj(latents).flatten(2).transpose(1, 2) + position
        assert torch.equal(embed(latents), expected)
    assert made == [(4, 4), (4, 6), (6, 4)]
    for width in range(2, 40, 2):
        embed(torch.randn(1, 4, 2, width))
    assert len(embed.positions) == layers.KEPT_POSITIONS
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        embed(mode.from_tensor(torch.randn(1, 4, 6, 6)))
    with torch.inference_mode():
        embed(torch.randn(1, 4, 6, 10))
    assert not {(3, 3), (3, 5)} & {key[:2] for key in embed.positions}


def test_time_features_are_cosines_then_sines():
    value = torch.tensor([0.0, 1.0, 999.0])
    features = sinusoid(value, 8)
    for t, row in zip(value.tolist(), features, strict=True):
        angles = [t * 10000 ** (-i / 4) for i in range(4)]
        np.testing.assert_allclose(row, [math.cos(a) for a in angles] + [math.sin(a) for a in angles], atol=1e-4)


def test_neighbouring_times_differ_in_bf16_models():
    """Rounded to bf16 before the sinusoid, 998 and 999 would be the same time."""
    assert torch.tensor(998.0).bfloat16() == torch.tensor(999.0).bfloat16()
    mlp = SinusoidMLP(16).bfloat16()
    first, second = mlp(torch.tensor([998, 999]), torch.bfloat16)
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)
    assert sinusoid(torch.tensor([998, 999])).dtype == torch.float32


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_inverts_a_patch_embedding_that_copies(patch):
    channels, height, width = 3, 8, 12
    dim = patch * patch * channels
    latents = torch.randn(2, channels, height, width)
    copying = F.conv2d(latents, torch.eye(dim).view(dim, channels, patch, patch), stride=patch)
    # The convolution lists a patch as [C, p, q]; the output layer lists it as [p, q, C].
    tokens = copying.flatten(2).transpose(1, 2).unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(2)
    assert torch.equal(unpatchify(tokens, height // patch, width // patch, patch), latents)


def test_patch_embedding_adds_the_positions():
    embed = PatchEmbed(8, 2, 4, 16, 1.0)
    latents = torch.randn(2, 4, 6, 10)
    tokens = embed(latents)
    assert tokens.shape == (2, 15, 16) and tokens.is_contiguous()
    position = sincos_2d(3, 5, 16, base_size=4, scale=1.0, device=latents.device)
    patch = latents[1, :, 2:4, 6:8]  # second row, fourth column
    expected = torch.einsum("dcpq,cpq->d", embed.proj.weight, patch) + embed.proj.bias + position[1 * 5 + 3]
    torch.testing.assert_close(tokens[1, 8], expected, rtol=1e-5, atol=1e-5)
    assert embed.bfloat16()(latents.bfloat16()).dtype == torch.bfloat16


def test_condition_adds_height_width_and_aspect_ratio():
    condition = Condition(12, micro_conditions=True).double()
    t, size, ratio = torch.tensor([7, 800]), torch.tensor([[512.0, 768.0], [64.0, 32.0]]), torch.tensor([[0.5], [2.0]])
    embedded = condition(t, size, ratio, torch.float64)
    time = condition.timestep_embedder(t, torch.float64)
    parts = [condition.resolution_embedder(size[:, i], torch.float64) for i in (0, 1)]
    parts.append(condition.aspect_ratio_embedder(ratio[:, 0], torch.float64))
    assert [p.shape for p in parts] == [(2, 4)] * 3
    torch.testing.assert_close(embedded, time + torch.cat(parts, 1))
    plain = Condition(12, micro_conditions=False)
    assert not hasattr(plain, "resolution_embedder") and plain(t, None, None, torch.float32).shape == (2, 12)


def test_adaln_single_is_silu_and_one_linear_layer():
    layer = AdaLNSingle(12, micro_conditions=False).double()
    embedded = torch.randn(2, 12, dtype=torch.float64)
    expected = (embedded * torch.sigmoid(embedded)) @ layer.linear.weight.T + layer.linear.bias
    torch.testing.assert_close(layer(embedded), expected.view(2, 6, 12))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("exact", [False, True])
def test_feed_forward(exact):
    ff = FeedForward(6, exact_gelu=exact, dropout=0.0).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = x @ ff.net[0].proj.weight.T + ff.net[0].proj.bias
    assert hidden.shape[-1] == 24
    hidden = gelu_exact(hidden) if exact else gelu_tanh(hidden)
    torch.testing.assert_close(ff(x), hidden @ ff.net[2].weight.T + ff.net[2].bias)


def test_caption_projection():
    layer = CaptionProjection(5, 6).double()
    text = torch.randn(2, 3, 5, dtype=torch.float64)
    hidden = gelu_tanh(text @ layer.linear_1.weight.T + layer.linear_1.bias)
    torch.testing.assert_close(layer(text), hidden @ layer.linear_2.weight.T + layer.linear_2.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_head_by_head(bias):
    layer = SelfAttention(12, 12, 3, 4, bias=bias, dropout=0.0).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert (layer.to_q.bias is not None) == bias and layer.to_out[0].bias is not None
    q, k, v = layer.to_q(x), layer.to_k(x), layer.to_v(x)
    heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
    for sample in range(2):
        o = torch.cat([attend(q[sample, :, h], k[sample, :, h], v[sample, :, h]) for h in heads], dim=1)
        torch.testing.assert_close(layer(x)[sample], layer.to_out[0](o))


def test_cross_attention_sees_only_the_caption():
    layer = CrossAttention(12, 8, 3, 4, bias=True, dropout=0.0).double()
    x, text = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 6, 8, dtype=torch.float64)
    lengths = torch.tensor([6, 2])
    output = layer(x, text, lengths)
    q, k, v = layer.to_q(x), layer.to_k(text), layer.to_v(text)
    for sample, length in enumerate(lengths):
        heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
        o = torch.cat([attend(q[sample, :, h], k[sample, :length, h], v[sample, :length, h]) for h in heads], dim=1)
        torch.testing.assert_close(output[sample], layer.to_out[0](o))


@pytest.mark.parametrize("bias", [True, False])
def test_fused_projections_are_copies_that_serve_without_gradients(bias):
    layer = SelfAttention(12, 12, 3, 4, bias=bias, dropout=0.0)
    x = torch.randn(2, 5, 12)
    expected = layer(x).detach()
    names = layer.state_dict().keys()
    layer.fuse_projections()
    assert layer.state_dict().keys() == names
    nn.init.zeros_(layer.to_v.weight)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.to_v.weight.grad.abs().max() > 0
    layer.unfuse_projections()
    with torch.no_grad():
        assert not torch.allclose(layer(x), expected)


def test_fused_projections_follow_the_module():
    layer = CrossAttention(12, 8, 3, 4, bias=True, dropout=0.0)
    layer.fuse_projections()
    layer.to(torch.bfloat16)
    assert layer.fused_weight.dtype == torch.bfloat16 and layer.fused_weight.shape == (24, 8)
    with torch.no_grad():
        assert layer(torch.randn(1, 2, 12).bfloat16(), torch.randn(1, 3, 8).bfloat16()).dtype == torch.bfloat16
