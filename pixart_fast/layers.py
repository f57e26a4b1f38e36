"""The parts of the PixArt transformer, in the order in which a forward pass meets them.

Parameter names are those of diffusers' `PixArtTransformer2DModel`, so that published weights, LoRA files and PEFT's
target patterns fit as they are. Shapes: B samples, N image tokens, L caption tokens, D width, H heads, d = D / H.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixart_fast import ops


class Folded(NamedTuple):
    """Keys with the query projection, and values with the output projection: the layer from x to its result in two
    products, of less arithmetic than its own where a caption has fewer than about D / H tokens."""

    scores: Tensor  # [B, D, H * L]: Wq Kᵀ / √d
    bias: Tensor  # fp32 [B, 1, H * L]: what the query's bias adds, -inf for padding
    results: Tensor  # [B, H * L, D]: V Wo


class KeysValues(NamedTuple):
    """What one cross-attention layer makes of the captions, once for all steps of a sampler.

    Attention to a single token is that token's value, whatever the query: samples with such a caption (the empty prompt
    of guidance) come first in a batch, and of them the layer's result is kept instead.
    """

    k: Tensor | None  # [B - S, L, H, d]; None where every result is fixed
    v: Tensor | None
    fixed: Tensor | None = None  # results of the first S samples, [S, 1, D], or [S, N, D]
    folded: Folded | None = None  # in the place of k and v


KEPT_POSITIONS = 8  # position embeddings; one is 19 MB at 1024 px and XL/2


def sincos_2d(height: int, width: int, dim: int, *, base_size: int, scale: float, device: torch.device) -> Tensor:
    """Sine-cosine position embedding of a height × width token grid: fp32 `[height * width, dim]`.

    The grid is stretched to `base_size` tokens and compressed by `scale`, so that a model sees the coordinates it was
    trained on at any resolution (DiffFit; PixArt-α section 2.3 "training at high resolution"). The width comes first,
    as in MAE. It is separable: sines are taken of height + width coordinates, not of every token.
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
        self.positions: dict[tuple, Tensor] = {}

    def position(self, height: int, width: int, like: Tensor) -> Tensor:
        """The position embedding fp32 `[height * width, D]` beside tokens `like`; those of the last shapes are kept."""
        make = partial(
            sincos_2d,
            height,
            width,
            like.shape[-1],
            base_size=self.base_size,
            scale=self.interpolation_scale,
            device=like.device,
        )
        # A compiler folds it into its own code; a fake tensor, or one of inference mode, must not outlive its mode.
        if torch.compiler.is_compiling() or type(like) is not Tensor or like.is_inference():
            return make()
        key = (height, width, like.device)
        if key not in self.positions:
            while len(self.positions) >= KEPT_POSITIONS:
                self.positions.pop(next(iter(self.positions)))
            self.positions[key] = make()
        return self.positions[key]

    def forward(self, latents: Tensor) -> Tensor:
        # Contiguous, or the residual stream would keep the convolution's layout, in which a token's values lie N apart.
        tokens = self.proj(latents).flatten(2).transpose(1, 2).contiguous()
        height, width = latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size
        return (tokens + self.position(height, width, tokens)).to(tokens.dtype)


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

    fused_names: tuple[str, ...]

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, *, bias: bool, dropout: float):
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(dropout)])
        self.to_qkv: nn.Module | None = None  # one layer in the place of those of fused_names, which are None then
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

    def project(self, x: Tensor | ops.Rows) -> tuple[Tensor, ...]:
        """`x [B, T, C]` to its projections by `fused_names`, each `[B, T, H, d]`."""
        if self.to_qkv is not None:
            projected = self.to_qkv(x).chunk(len(self.fused_names), dim=-1)
        elif self.fused_weight is None or torch.is_grad_enabled():
            projected = [getattr(self, name)(x) for name in self.fused_names]
        else:
            projected = F.linear(x, self.fused_weight, self.fused_bias).chunk(len(self.fused_names), dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)) for part in projected)

    def out(self, o: Tensor) -> Tensor:
        projection, dropout = self.to_out
        return dropout(projection(o))


class SelfAttention(Attention):
    fused_names = ("to_q", "to_k", "to_v")

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.backends = {"self_attention": "auto", "gated_linear": "auto"}

    def attend(self, y: Tensor | ops.Rows, bias: Tensor | None) -> Tensor:
        q, k, v = self.project(y)
        return ops.self_attention(q, k, v, bias=bias, backend=self.backends["self_attention"]).flatten(2)

    def forward(self, y: Tensor | ops.Rows, bias: Tensor | None = None) -> Tensor:
        return self.out(self.attend(y, bias))

    def onto(self, x: Tensor, gate: ops.Row, y: Tensor | ops.Rows, bias: Tensor | None = None) -> Tensor:
        """x + gate · attention(y); projection, gate and sum are one kernel where that serves."""
        o = self.attend(y, bias)
        projection, dropout = self.to_out
        fused = None
        if not (dropout.training and dropout.p):
            fused = gated_linear(x, gate, o, projection, self.backends["gated_linear"])
        return x + gate.total() * self.out(o) if fused is None else fused


class CrossAttention(Attention):
    fused_names = ("to_k", "to_v")

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.backends = {"cross_attention": "auto"}

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues,
        lengths: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if isinstance(context, Tensor):
            context = KeysValues(*self.project(context))
        k, v, fixed, folded = context
        if fixed is not None:
            if k is None and folded is None:
                return fixed.expand(-1, x.shape[1], -1)
            rest = (k if folded is None else folded.scores).shape[0]
            of_rest = (None if of is None else of.narrow(0, fixed.shape[0], rest) for of in (x, lengths, bias))
            return torch.cat([fixed.expand(-1, x.shape[1], -1), self.attend(*of_rest, k, v, folded)])
        return self.attend(x, lengths, bias, k, v, folded)

    def attend(
        self,
        x: Tensor,
        lengths: Tensor | None,
        bias: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        folded: Folded | None,
    ) -> Tensor:
        if folded is not None:
            scores = (ops.wide_product(x, folded.scores) + folded.bias).unflatten(-1, (self.heads, -1))
            return torch.bmm(scores.softmax(-1).flatten(-2).to(x.dtype), folded.results) + self.to_out[0].bias
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        backend = self.backends["cross_attention"]
        return self.out(ops.cross_attention(q, k, v, lengths=lengths, bias=bias, backend=backend).flatten(2))

    def fold(self, context: KeysValues, lengths: Tensor | None) -> KeysValues:
        """Keys and values folded into the projections around them; as it is where those are more than linear layers.

        `lengths` of the samples that k and v have, each 1 at least.
        """
        k, v, fixed, _ = context
        query, out = self.to_q, self.to_out[0]
        if not (is_plain(query) and is_plain(out)):
            return context
        heads, scale = self.heads, k.shape[-1] ** -0.5
        wide = torch.einsum("blhd,hdc->bchl", k.float() * scale, query.weight.float().unflatten(0, (heads, -1)))
        bias = torch.zeros_like(wide[:, 0])  # [B, H, L]
        if query.bias is not None:
            bias = torch.einsum("blhd,hd->bhl", k.float() * scale, query.bias.float().unflatten(0, (heads, -1)))
        if lengths is not None:
            padding = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
            bias = bias.masked_fill(padding[:, None], -torch.inf)
        results = torch.einsum("blhd,chd->bhlc", v.float(), out.weight.float().unflatten(1, (heads, -1)))
        folded = Folded(wide.flatten(2).to(k.dtype), bias.flatten(1)[:, None], results.flatten(1, 2).to(v.dtype))
        return KeysValues(None, None, fixed, folded)


def keys_values(text: Tensor, layers: list[CrossAttention], single: int = 0) -> list[Tensor | KeysValues]:
    """What each cross-attention layer attends to: its keys and values, by one matrix product for all layers.

    text `[B, L, D]`, of which the first `single` samples have one token -> per layer k, v `[B - single, L, H, d]`,
    views of one tensor, and what the layer gives for the others. The weights are joined for the occasion, which moves
    them once: little beside the product, and nothing to keep in step with training. Where a projection is more than a
    linear layer (an adapter, a quantised or a partitioned weight) every layer gets the text, and projects it itself.
    """
    projections = [projection for layer in layers for projection in (layer.to_k, layer.to_v)]
    if not all(is_plain(projection) for projection in projections):
        return [text] * len(layers)
    weight = torch.cat([projection.weight for projection in projections])
    bias = None if projections[0].bias is None else torch.cat([projection.bias for projection in projections])
    joined = F.linear(text, weight, bias).unflatten(-1, (len(layers), 2, layers[0].heads, -1))
    pairs = [KeysValues(*pair.unbind(2)) for pair in joined.unbind(2)]
    if not single:
        return pairs
    return [
        KeysValues(k[single:], v[single:], layer.out(v[:single, :1].flatten(2)))
        for layer, (k, v, *_) in zip(layers, pairs, strict=True)
    ]


def gated_linear(x: Tensor, gate: ops.Row, a: Tensor, projection: nn.Linear, backend: str) -> Tensor | None:
    """x + gate · projection(a) as one operator of inference, or None where that does not serve."""
    if is_plain(projection) and ops.fuses("gated_linear", backend, a, projection.weight):
        return ops.gated_linear(x, gate, a, projection.weight, projection.bias, backend=backend)
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer's product can be taken without calling it: no adapter, hook, offloading or partition."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.numel() > 0
    )


class PackedLinear(nn.Linear):
    """A linear layer whose inference on a CPU reads a copy of the weight in oneDNN's layout (`ops.packed_linear`)."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "PackedLinear":
        """The same layer, with the same parameters, not copies."""
        packed = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        packed.weight, packed.bias = linear.weight, linear.bias
        return packed.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.packed_linear(x, self.weight, self.bias)


class GELU(nn.Module):
    """A linear layer and its GELU; tanh-approximated unless `exact`."""

    def __init__(self, dim: int, inner: int, exact: bool):
        super().__init__()
        self.approximate = "none" if exact else "tanh"
        self.proj = nn.Linear(dim, inner)
        self.backends = {"linear_gelu": "auto"}

    def forward(self, x: Tensor | ops.Rows) -> Tensor:
        tanh, backend = self.approximate == "tanh", self.backends["linear_gelu"]
        if tanh and type(self.proj) is PackedLinear:
            return ops.packed_linear(x, self.proj.weight, self.proj.bias, gelu=True)
        if tanh and is_plain(self.proj) and ops.fuses("linear_gelu", backend, x, self.proj.weight):
            return ops.linear_gelu(x, self.proj.weight, self.proj.bias, backend=backend)
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """The pointwise MLP, four times as wide inside."""

    def __init__(self, dim: int, *, exact_gelu: bool, dropout: float):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim, exact_gelu), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])
        self.backends = {"gated_linear": "auto"}

    def forward(self, y: Tensor | ops.Rows) -> Tensor:
        for layer in self.net:
            y = layer(y)
        return y

    def onto(self, x: Tensor, gate: ops.Row, y: Tensor | ops.Rows) -> Tensor:
        """x + gate · mlp(y); the last projection, gate and sum are one kernel where that serves."""
        gelu, dropout, projection = self.net
        u = dropout(gelu(y))
        fused = gated_linear(x, gate, u, projection, self.backends["gated_linear"])
        return x + gate.total() * projection(u) if fused is None else fused


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Tokens `[B, N, p * p * C]` back to latents `[B, C, height * p, width * p]`."""
    grid = tokens.unflatten(1, (height, width)).unflatten(-1, (patch_size, patch_size, -1))  # [B, h, w, p, q, C]
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
