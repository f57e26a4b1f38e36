"""The PixArt transformer: DiT with cross-attention to text and one shared time-conditioning MLP (PixArt-α, figure 4).

`Transformer` takes the place of `diffusers.PixArtTransformer2DModel`: the same constructor, `config.json`, `forward`,
state dict and pipelines. Everything that computes is here and in `layers.py`; what diffusers asks for besides is in
`interop.py`.
"""

import warnings
from itertools import islice
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from pixart_fast import ops
from pixart_fast.interop import DiffusersModel
from pixart_fast.layers import (
    AdaLNSingle,
    CaptionProjection,
    Condition,
    CrossAttention,
    FeedForward,
    KeysValues,
    PatchEmbed,
    SelfAttention,
    keys_values,
    unpatchify,
)


class Caption(NamedTuple):
    """Text features with what counts of them: by `lengths [B]`, by an additive `bias [B, 1, L]`, or all (both None).

    `context` is what the blocks attend to: the text at their width `[B, L, D]`, or per block its keys and values.
    """

    text: Tensor  # [B, L, C]
    lengths: Tensor | None
    bias: Tensor | None
    context: list[Tensor | KeysValues] | None = None


def pack_caption(text: Tensor, mask: Tensor | None) -> Caption:
    """Text `[B, L, C]` and diffusers' mask (2-D: 1 = keep; 3-D: a bias to add) to a `Caption`.

    Kept tokens of a 2-D mask move to the front, in order: attention does not depend on the order of its keys, so this
    is exact, and their number replaces the mask. No value leaves the device. A caption without a kept token contributes
    nothing.
    """
    if mask is None:
        return Caption(text, None, None)
    if mask.ndim == 3:
        return Caption(text, None, mask)
    keep = mask.bool()
    order = torch.argsort(keep.int(), dim=1, descending=True, stable=True)
    return Caption(text.gather(1, order[..., None].expand_as(text)), keep.sum(1), None)


class Modulation(NamedTuple):
    """What conditions a block: six rows, in the order of their weights."""

    shift_msa: ops.Row
    scale_msa: ops.Row
    gate_msa: ops.Row
    shift_mlp: ops.Row
    scale_mlp: ops.Row
    gate_mlp: ops.Row


class Stream(NamedTuple):
    """The residual stream between two operators: x + gate · h, which the next LayerNorm adds up in its own pass.

    So the sum is not written and read once more; and x and h are what the backward keeps anyway.
    """

    x: Tensor  # [B, N, D]
    h: Tensor | None = None  # [B, N, D]
    gate: Tensor | None = None  # [B, 1, D]; 1 where there is none

    def total(self) -> Tensor:
        if self.h is None:
            return self.x
        return self.x + (self.h if self.gate is None else self.gate * self.h)


def _norm(
    stream: Stream, shift: ops.Row, scale: ops.Row, eps: float, backend: str, rounded: torch.dtype | None = None
) -> tuple[Tensor, Tensor | ops.Rows]:
    """The stream added up, and LayerNorm of it, modulated, and `rounded` to 8 bits for the products that follow."""
    x, h, gate = stream
    if rounded is not None:
        x, values, row_scale = ops.modulated_layernorm_quantized(
            x, shift, scale, dtype=rounded, residual=h, gate=gate, eps=eps, backend=backend
        )
        return x, ops.Rows(values, row_scale, x.dtype)
    return ops.modulated_layernorm(x, shift, scale, residual=h, gate=gate, eps=eps, backend=backend)


class Block(nn.Module):
    """One transformer block, modulated by adaLN-single: S⁽ⁱ⁾ = S̄ + E⁽ⁱ⁾ (PixArt-α section 2.3, figure 4).

    Self-attention and the MLP sit behind LayerNorm, shift and scale, and a gate; cross-attention to the caption between
    them has neither, as published.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        text_dim: int,
        *,
        bias: bool,
        dropout: float,
        exact_gelu: bool,
        eps: float,
    ):
        super().__init__()
        self.eps = eps
        self.rounded: torch.dtype | None = None  # what LayerNorm's rows are rounded to, for 8-bit linear layers
        self.backends = {"modulated_layernorm": "auto"}
        self.attn1 = SelfAttention(dim, dim, heads, head_dim, bias=bias, dropout=dropout)
        self.attn2 = CrossAttention(dim, text_dim, heads, head_dim, bias=bias, dropout=dropout)
        self.ff = FeedForward(dim, exact_gelu=exact_gelu, dropout=dropout)
        self.init_modulation(dim)

    def init_modulation(self, dim: int) -> None:
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def modulation(self, condition: Tensor) -> Modulation:
        """S̄ `[B, 6, D]` and this block's table E⁽ⁱ⁾, row by row."""
        return Modulation(*map(ops.Row, condition.unbind(1), self.scale_shift_table.unbind(0)))

    def norm(self, stream: Stream, shift: ops.Row, scale: ops.Row) -> tuple[Tensor, Tensor | ops.Rows]:
        return _norm(stream, shift, scale, self.eps, self.backends["modulated_layernorm"], self.rounded)

    def forward(
        self,
        stream: Stream,
        condition: Tensor,
        context: Tensor | KeysValues,
        lengths: Tensor | None = None,
        text_bias: Tensor | None = None,
        attention_bias: Tensor | None = None,
    ) -> Stream:
        m = self.modulation(condition)
        x, y = self.norm(stream, m.shift_msa, m.scale_msa)  # x + gate · h of the block before; [B, N, D]
        x = self.attn1.onto(x, m.gate_msa, y, attention_bias)  # x + gate_msa · attn1(y)
        h = self.attn2(x, context, lengths, text_bias)
        x, y = self.norm(Stream(x, h), m.shift_mlp, m.scale_mlp)  # x + h
        if not torch.is_grad_enabled():
            return Stream(self.ff.onto(x, m.gate_mlp, y))  # x + gate_mlp · ff(y)
        # The same sum, left to the next block: its backward then needs no tensor that this one does not keep already.
        return Stream(x, self.ff(y), m.gate_mlp.total().contiguous())

    @staticmethod
    def first(x: Tensor) -> Stream:
        """The stream before any block, of the kind that blocks hand on: all of them then share one graph."""
        return Stream(x, x * 0, x[:, :1] * 0) if torch.is_grad_enabled() else Stream(x)


class AdaLNBlock(Block):
    """The same block with DiT's own modulation MLP in place of the shared one: 27 % more parameters at XL/2."""

    def init_modulation(self, dim: int) -> None:
        self.adaln = nn.Linear(dim, 6 * dim)

    def modulation(self, condition: Tensor) -> Modulation:
        """The block's linear layer over SiLU of the condition `[B, D]`."""
        return Modulation(*map(ops.Row, self.adaln(F.silu(condition)).unflatten(1, (6, -1)).unbind(1)))


def _check(config: dict[str, Any], micro_conditions: bool) -> None:
    """Refuse, in a sentence, what the class cannot honour."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    dim = heads * head_dim
    if config["modulation"] not in ("adaln_single", "adaln"):
        raise ValueError(f"modulation must be 'adaln_single' or 'adaln', got {config['modulation']!r}.")
    if config["norm_type"] != "ada_norm_single" or config["num_embeds_ada_norm"] is None:
        raise ValueError(
            "norm_type must be 'ada_norm_single' with num_embeds_ada_norm set, "
            f"got {config['norm_type']!r} with {config['num_embeds_ada_norm']}."
        )
    if config["norm_elementwise_affine"]:
        raise ValueError(
            "norm_elementwise_affine=True is not part of PixArt: its LayerNorms take scale and shift from the time."
        )
    if config["attention_type"] != "default":
        raise ValueError(f"attention_type must be 'default', got {config['attention_type']!r}.")
    if config["activation_fn"] not in ("gelu-approximate", "gelu"):
        raise ValueError(f"activation_fn must be 'gelu-approximate' or 'gelu', got {config['activation_fn']!r}.")
    if config["cross_attention_dim"] is None:
        raise ValueError(f"cross_attention_dim must be set; with caption_channels it is the width, {dim}.")
    if config["caption_channels"] is not None and config["cross_attention_dim"] != dim:
        raise ValueError(
            f"cross_attention_dim is {config['cross_attention_dim']}, but captions are projected to the width "
            f"{heads} heads x {head_dim} = {dim}: set cross_attention_dim={dim}."
        )
    if dim % 4:
        raise ValueError(f"the width, {heads} heads x {head_dim} = {dim}, must divide by 4 for the position embedding.")
    if micro_conditions and dim % 3:
        raise ValueError(
            f"micro-conditions split the width in three, and {heads} heads x {head_dim} = {dim} does not divide: "
            "set use_additional_conditions=False."
        )
    if config["sample_size"] % config["patch_size"]:
        raise ValueError(
            f"sample_size {config['sample_size']} does not divide by patch_size {config['patch_size']}: "
            "choose a multiple of the patch."
        )


class Transformer(DiffusersModel):
    """PixArt's transformer; the constructor and `config.json` are those of `diffusers.PixArtTransformer2DModel`.

    Args beyond diffusers':
        modulation: "adaln_single", or "adaln" for the baseline of the paper's ablation: DiT's modulation MLP in every
            block and a pooled-caption term in the condition. At XL/2 with 4096 caption channels 610,856,096 against
            833,213,984 parameters.

    `null_caption [L, C]`, the caption embedding that α checkpoints carry for guidance, is kept beside the weights
    (`null_caption.safetensors`) and returns with `from_pretrained`; it takes no part in `forward`.
    """

    _no_split_modules = ("Block", "AdaLNBlock", "PatchEmbed")
    _repeated_blocks = ("Block", "AdaLNBlock")

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        modulation: str = "adaln_single",
    ):
        # Not super().__init__(), which would build the blocks that ours replace. And by this name: a pipeline that
        # loads a saved `Transformer` looks for ModelMixin in this module to know how.
        ModelMixin.__init__(self)
        if use_additional_conditions is None:
            use_additional_conditions = sample_size == 128
        _check(self.config, use_additional_conditions)
        dim = self.inner_dim = num_attention_heads * attention_head_dim
        self.attention_head_dim = attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.height = self.width = sample_size
        self.use_additional_conditions = use_additional_conditions
        if interpolation_scale is None:
            interpolation_scale = max(sample_size // 64, 1)
        self.gradient_checkpointing = False
        self.backends = {"modulated_layernorm": "auto"}

        # In this order a seed gives the weights that it gives diffusers' class.
        self.pos_embed = PatchEmbed(sample_size, patch_size, in_channels, dim, interpolation_scale)
        block = Block if modulation == "adaln_single" else AdaLNBlock
        self.transformer_blocks = nn.ModuleList(
            block(
                dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim,
                bias=attention_bias,
                dropout=dropout,
                exact_gelu=activation_fn == "gelu",
                eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        if modulation == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
            self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
            self.adaln_single = AdaLNSingle(dim, use_additional_conditions)
        else:
            self.adaln_out = nn.Linear(dim, 2 * dim)
            self.proj_out = nn.Linear(dim, patch_size * patch_size * self.out_channels)
            self.time_condition = Condition(dim, use_additional_conditions)
            self.pooled_projection = nn.Linear(caption_channels or cross_attention_dim, dim)
        self.caption_projection = None if caption_channels is None else CaptionProjection(caption_channels, dim)
        self.register_buffer("null_caption", None, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Caption | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise (and variance) of noisy latents.

        Args:
            hidden_states: noisy latents `[B, in_channels, height, width]` in the model's dtype, any size that divides
                by the patch.
            encoder_hidden_states: text features `[B, L, caption_channels]`, or `[B, 1, L, caption_channels]`, or what
                `encode_caption` made of them (the mask is in it then).
            timestep: `[B]`, integer or fp32 (it enters the sinusoid in fp32).
            added_cond_kwargs: `{"resolution": [B, 2] in pixels, "aspect_ratio": [B, 1]}` where the model has
                micro-conditions; None inside stands for the latents' own size.
            cross_attention_kwargs: accepted for diffusers' sake; ignored with a warning.
            attention_mask: over image tokens, `[B, N]` (1 = keep) or a bias `[B, 1, N]`.
            encoder_attention_mask: over caption tokens, `[B, L]` (1 = keep) or a bias `[B, 1, L]` (-10000 = discard). A
                caption without any kept token adds nothing (diffusers would attend to its padding).

        Returns:
            `Transformer2DModelOutput(sample=[B, out_channels, height, width])`, or a tuple of the sample.
        """
        patch = self.config.patch_size
        height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        if hidden_states.shape[-2] % patch or hidden_states.shape[-1] % patch:
            raise ValueError(f"latents of {tuple(hidden_states.shape[-2:])} do not divide by the patch size {patch}.")
        if encoder_hidden_states is None or timestep is None:
            raise ValueError("forward needs encoder_hidden_states (text features) and timestep.")
        if cross_attention_kwargs:
            warnings.warn(f"cross_attention_kwargs {sorted(cross_attention_kwargs)} have no effect here.", stacklevel=2)

        if isinstance(encoder_hidden_states, Caption):
            caption = encoder_hidden_states
        else:
            caption = self.encode_caption(encoder_hidden_states, encoder_attention_mask)
        embedded = self._embed_condition(hidden_states, timestep, added_cond_kwargs)  # [B, D]
        condition, shift, scale = self._modulations(embedded, caption)
        attention_bias = _self_attention_bias(attention_mask, hidden_states.dtype)

        stream = Block.first(self.pos_embed(hidden_states))  # [B, N, D]
        stream = self.run_blocks(stream, condition, caption, attention_bias)
        _, x = _norm(stream, shift, scale, 1e-6, self.backends["modulated_layernorm"])  # [B, N, D]
        sample = unpatchify(self.proj_out(x), height, width, patch)  # [B, C, height, width]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def run_blocks(
        self,
        stream: Stream,
        condition: Tensor,
        caption: Caption,
        attention_bias: Tensor | None = None,
        first: int = 0,
        stop: int | None = None,
    ) -> Stream:
        """The stream through all blocks, or those from `first` on, up to `stop`."""
        pairs = zip(self.transformer_blocks, caption.context, strict=True)
        for block, context in islice(pairs, first, stop):
            inputs = (stream, condition, context, caption.lengths, caption.bias, attention_bias)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                stream = Stream(*self._gradient_checkpointing_func(block, *inputs))
            else:
                stream = block(*inputs)
        return stream

    def encode_caption(
        self, text: Tensor, mask: Tensor | None = None, *, single: int = 0, fold: bool = False
    ) -> Caption:
        """The part of `forward` that sees the text alone, for all blocks: call it once, then denoise with its result.

        Args:
            text, mask: `forward`'s encoder_hidden_states and encoder_attention_mask.
            single: so many captions, the first of the batch, consist of one token, as the empty prompt does: their
                cross-attention is worked out here. It is not checked, which would wait for the device.
            fold: multiply keys and values into the projections around them, which makes cross-attention cheaper for
                captions below about 70 tokens. Each other caption has one kept token at least; a bias as mask does not
                fold.

        Returns:
            a `Caption` that `forward` takes as encoder_hidden_states, as often as the weights stay what they are.
        """
        caption = pack_caption(text.squeeze(1) if text.ndim == 4 else text, mask)  # official features: [B, 1, L, C]
        projected = caption.text if self.caption_projection is None else self.caption_projection(caption.text)
        layers = [block.attn2 for block in self.transformer_blocks]
        context = keys_values(projected, layers, single)
        if fold and caption.bias is None and isinstance(context[0], KeysValues):
            lengths = None if caption.lengths is None else caption.lengths[single:]
            context = [layer.fold(of, lengths) for layer, of in zip(layers, context, strict=True)]
        return caption._replace(context=context)

    def _embed_condition(self, latents: Tensor, timestep: Tensor, added: dict[str, Tensor] | None) -> Tensor:
        """Time and, with micro-conditions, size and aspect ratio: `[B, D]`."""
        batch, _, height, width = latents.shape
        resolution = ratio = None
        if self.use_additional_conditions:
            if added is None:
                raise ValueError(
                    "this model has micro-conditions: pass added_cond_kwargs={'resolution': [B, 2], "
                    "'aspect_ratio': [B, 1]}."
                )
            resolution, ratio = added.get("resolution"), added.get("aspect_ratio")
            if resolution is None:
                resolution = torch.tensor([[8.0 * height, 8.0 * width]], device=latents.device).expand(batch, -1)
            if ratio is None:
                ratio = torch.tensor([[height / width]], device=latents.device).expand(batch, -1)
        embed = self.adaln_single.emb if self.config.modulation == "adaln_single" else self.time_condition
        return embed(timestep.expand(batch), resolution, ratio, latents.dtype)

    def _modulations(self, embedded: Tensor, caption: Caption) -> tuple[Tensor, ops.Row, ops.Row]:
        """What the blocks receive, and the final layer's shift and scale."""
        if self.config.modulation == "adaln_single":
            rows = (ops.Row(embedded, row) for row in self.scale_shift_table.unbind(0))
            return self.adaln_single(embedded), *rows
        condition = embedded + self.pooled_projection(_pool(caption))
        rows = self.adaln_out(F.silu(condition)).unflatten(1, (2, -1)).unbind(1)
        return condition, *map(ops.Row, rows)

    def set_backend(self, backend: str, *, op: str | None = None) -> "Transformer":
        """Choose who computes one operator of `ops.OPS` (None: all), by a name of `ops.BACKENDS`; returns self.

        Raises ValueError for another name; forward raises where the chosen backend cannot serve.
        """
        if backend not in ops.BACKENDS or op not in (None, *ops.OPS):
            raise ValueError(
                f"backend must be one of {', '.join(ops.BACKENDS)} and op one of {', '.join(ops.OPS)}, "
                f"got {backend!r} and {op!r}."
            )
        for module in self.modules():
            for name in getattr(module, "backends", {}):
                if op in (None, name):
                    module.backends[name] = backend
        return self

    @torch.no_grad()
    def initialize_weights(self, *, gate: float | None = None) -> "Transformer":
        """The published initialisation for training from scratch, after the constructor's; returns self.

        Xavier-uniform linear layers with zero biases; N(0, 0.02) in the time and caption embeddings; zero output
        projections of cross-attention, so that text enters gradually (PixArt-α section 2.3), and a zero final layer. In
        the ablation's adaLN model the modulation starts at zero (DiT's adaLN-Zero).

        Args:
            gate: start every residual gate's table row at this value instead of N(0, 1/D); 1 lets a short training
                move all blocks from its first step. adaLN-single only.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        single = self.config.modulation == "adaln_single"
        small = [self.caption_projection, self.adaln_single if single else self.time_condition]
        for linear in (m for part in small if part is not None for m in part.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
        zero = [block.attn2.to_out[0] for block in self.transformer_blocks] + [self.proj_out]
        if not single:
            zero += [block.adaln for block in self.transformer_blocks] + [self.adaln_out]
        elif gate is not None:
            for block in self.transformer_blocks:
                block.scale_shift_table[[2, 5]] = gate
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        return self


def _self_attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """diffusers' image-token mask, `[B, N]` (1 = keep) or bias `[B, 1, N]`, as a bias `[B, 1, 1, N]`."""
    if mask is None:
        return None
    bias = (1 - mask.to(dtype)[:, None]) * -10000.0 if mask.ndim == 2 else mask
    return bias[:, None]


def _pool(caption: Caption) -> Tensor:
    """Mean of the caption's tokens `[B, C]`."""
    text, lengths, bias, _ = caption
    if lengths is not None:
        keep = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
    elif bias is not None:
        keep = bias[:, 0] > -5000.0
    else:
        return text.mean(1)
    keep = keep[..., None].to(text.dtype)
    return (text * keep).sum(1) / keep.sum(1).clamp(min=1)
