"""The parts of the PixArt transformer, in the order in which a forward pass meets them.

Parameter names are those of diffusers' `PixArtTransformer2DModel`, so that published weights, LoRA files and PEFT's
target patterns fit as they are. Shapes: B samples, N image tokens, L caption tokens, D width, H heads, d = D / H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixart_fast import ops


def sincos_2d(height: int, width: int, dim: int, *, base_size: int, scale: float, device: torch.device) -> Tensor:
    """Sine-cosine position embedding of a height × width token grid: fp32 `[height * width, dim]`.

    The grid is stretched to `base_size` tokens and compressed by `scale`, so that a model sees the coordinates it was
    trained on at any resolution (DiffFit; PixArt-α section 2.3 "training at high resolution"). The width comes first,
    as in MAE. It is separable: sines are taken of height + width coordinates, not of every token, which is why it is
    not cached.
    """
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))

    def axis(length: int) -> Tensor:
        position = torch.arange(length, dtype=torch.float64, device=device) * (base_size / length / scale)
        angle = position[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    across = axis(width)[None].expand(height, -1, -1)
    down = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def sinusoid(value: Tensor, channels: int = 256) -> Tensor:
    """Sinusoidal features of scalars, fp32 `[..., channels]`, cosines first (DDPM's timestep embedding, as in DiT).

    Always fp32: bf16 has no room for integers above 256, so a timestep or an image height cast to it is another number.
    """
    half = channels // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=value.device) * (-math.log(10000.0) / half))
    angle = value.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class PatchEmbed(nn.Module):
    """Latents `[B, C, height, width]` to tokens `[B, N, D]`: non-overlapping patches plus their position embedding."""

    def __init__(self, sample_size: int, patch_size: int, in_channels: int, dim: int, interpolation_scale: float):
        super().__init__()
        self.patch_size = patch_size
        self.base_size = sample_size // patch_size
        self.interpolation_scale = interpolation_scale
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        # Contiguous, or the residual stream would keep the convolution's layout, in which a token's values lie N apart.
        tokens = self.proj(latents).flatten(2).transpose(1, 2).contiguous()
        height, width = latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size
        position = sincos_2d(
            height,
            width,
            tokens.shape[-1],
            base_size=self.base_size,
            scale=self.interpolation_scale,
            device=tokens.device,
        )
        return (tokens + position).to(tokens.dtype)


class SinusoidMLP(nn.Module):
    """Scalars `[B]` or `[B, k]` to vectors `[B, k * dim]`: sinusoid, linear, SiLU, linear."""

    def __init__(self, dim: int, channels: int = 256):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        features = sinusoid(value, self.channels).to(dtype)
        return self.linear_2(F.silu(self.linear_1(features))).reshape(value.shape[0], -1)


class Condition(nn.Module):
    """The time embedding, with `micro_conditions` plus the image's height, width and aspect ratio: `[B, D]`."""

    def __init__(self, dim: int, micro_conditions: bool):
        super().__init__()
        self.micro_conditions = micro_conditions
        self.timestep_embedder = SinusoidMLP(dim)
        if micro_conditions:
            self.resolution_embedder = SinusoidMLP(dim // 3)
            self.aspect_ratio_embedder = SinusoidMLP(dim // 3)

    def forward(self, t: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None, dtype: torch.dtype) -> Tensor:
        embedded = self.timestep_embedder(t, dtype)
        if self.micro_conditions:
            size = self.resolution_embedder(resolution, dtype)
            ratio = self.aspect_ratio_embedder(aspect_ratio, dtype)
            embedded = embedded + torch.cat([size, ratio], dim=1)
        return embedded


class AdaLNSingle(nn.Module):
    """adaLN-single (PixArt-α section 2.3): one MLP over the embedded time for all blocks, S̄ = f(t) `[B, 6, D]`.

    Each block adds its own table E⁽ⁱ⁾ to it. The final layer takes `emb`'s output itself, before SiLU and linear layer.
    """

    def __init__(self, dim: int, micro_conditions: bool):
        super().__init__()
        self.emb = Condition(dim, micro_conditions)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.linear(F.silu(embedded)).unflatten(1, (6, -1))


class CaptionProjection(nn.Module):
    """Text features `[B, L, C]` to the transformer's width `[B, L, D]`."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class Attention(nn.Module):
    """Projections and heads shared by self- and cross-attention.

    `fuse_projections` replaces two or three matrix products by one; its weights are copies, so where gradients are
    recorded the separate ones still serve.
    """

    op: str
    fused_names: tuple[str, ...]

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, *, bias: bool, dropout: float):
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(dropout)])
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        parts = [getattr(self, name) for name in self.fused_names]
        if any(type(part) is not nn.Linear for part in parts):
            raise ValueError("projections with an adapter cannot be fused: merge or unload the adapter first.")
        self.fused_weight = torch.cat([part.weight for part in parts])
        self.fused_bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])

    def unfuse_projections(self) -> None:
        self.fused_weight = self.fused_bias = None

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x [B, T, C]` to its projections by `fused_names`, each `[B, T, H, d]`."""
        if self.fused_weight is None or torch.is_grad_enabled():
            projected = [getattr(self, name)(x) for name in self.fused_names]
        else:
            projected = F.linear(x, self.fused_weight, self.fused_bias).chunk(len(self.fused_names), dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in projected)

    def merge_heads(self, o: Tensor) -> Tensor:
        projection, dropout = self.to_out
        return dropout(projection(o.flatten(2)))


class SelfAttention(Attention):
    op = "self_attention"
    fused_names = ("to_q", "to_k", "to_v")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x)
        return self.merge_heads(ops.self_attention(q, k, v, bias=bias, backend=self.backend))


class CrossAttention(Attention):
    op = "cross_attention"
    fused_names = ("to_k", "to_v")

    def forward(self, x: Tensor, text: Tensor, lengths: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = self.project(text)
        return self.merge_heads(ops.cross_attention(q, k, v, lengths=lengths, bias=bias, backend=self.backend))


class GELU(nn.Module):
    """A linear layer and its GELU; tanh-approximated unless `exact`."""

    def __init__(self, dim: int, inner: int, exact: bool):
        super().__init__()
        self.approximate = "none" if exact else "tanh"
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """The pointwise MLP, four times as wide inside."""

    def __init__(self, dim: int, *, exact_gelu: bool, dropout: float):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim, exact_gelu), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Tokens `[B, N, p * p * C]` back to latents `[B, C, height * p, width * p]`."""
    grid = tokens.unflatten(1, (height, width)).unflatten(-1, (patch_size, patch_size, -1))  # [B, h, w, p, q, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
