"""The official names of PixArt's tensors, ours (diffusers'), and what tensors tell of a model's config.

The official code stores q, k, v (and k, v of cross-attention) as rows of one matrix, a position table that follows from
its config, and a caption embedding for guidance.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixart_fast.layers import sincos_2d
from pixart_fast.weights import count_blocks, listed, shape_of

NULL_CAPTION = "y_embedder.y_embedding"  # [L, C]
HEAD_DIM = 72  # of every published PixArt
HEADS = ("num_attention_heads", "attention_head_dim")

# Layers with weight and bias: official name, then ours, in the order of the official one's rows.
SIZE_LAYERS = {
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
}
LAYERS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "final_layer.linear": ("proj_out",),
}
BLOCK_LAYERS = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
REFUSED = {
    r"\b[qk]_norm\.|\bnorm_[qk]\.": "a query-key norm",
    r"\.sr\.": "key-value compression",
    r"^controlnet\.|^base_model\.": "a ControlNet or adapters around it",
    r"\blora_": "LoRA adapters (merge them first)",
}


def key_map(depth: int, micro_conditions: bool) -> dict[str, tuple[str, ...]]:
    """Every official key of a model of `depth` blocks, with the keys of `Transformer` that its rows go to."""
    layers = LAYERS | (SIZE_LAYERS if micro_conditions else {})
    keys = {"final_layer.scale_shift_table": ("scale_shift_table",)}
    for i in range(depth):
        keys[f"blocks.{i}.scale_shift_table"] = (f"transformer_blocks.{i}.scale_shift_table",)
        for official, ours in BLOCK_LAYERS.items():
            layers[f"blocks.{i}.{official}"] = tuple(f"transformer_blocks.{i}.{name}" for name in ours)
    for official, ours in layers.items():
        for kind in ("weight", "bias"):
            keys[f"{official}.{kind}"] = tuple(f"{name}.{kind}" for name in ours)
    return keys


class Named(NamedTuple):
    """A checkpoint by our names; `weights` are views of its tensors."""

    weights: dict[str, Tensor]
    origin: dict[str, str]  # the checkpoint's own name of each, where it differs
    position: Tensor | None = None  # [1, N, D]
    null_caption: Tensor | None = None  # [L, C]


def to_our_names(weights: Mapping[str, Tensor]) -> Named:
    """Weights of either naming by our names; unknown names stay. ValueError for what a `Transformer` does not have."""
    for pattern, feature in REFUSED.items():
        found = [name for name in weights if re.search(pattern, name)]
        if found:
            raise ValueError(f"the checkpoint has {feature}, which Transformer has not: {listed(found)}.")
    if "blocks.0.adaLN_modulation.1.weight" in weights:
        raise ValueError("the checkpoint is a class-conditional DiT: turn it into a PixArt with reparameterize.")
    depth = count_blocks(weights, "blocks")
    if not depth:
        if not count_blocks(weights, "transformer_blocks"):
            raise ValueError(f"the checkpoint is not a PixArt transformer; it has {listed(weights)}.")
        return Named(dict(weights), {})
    keys = key_map(depth, any(name in weights for name in ("csize_embedder.mlp.0.weight", "ar_embedder.mlp.0.weight")))
    renamed, origin = {}, {}
    for name, ours in keys.items():
        origin |= dict.fromkeys(ours, name)
        if name in weights:
            renamed |= zip(ours, weights[name].chunk(len(ours)), strict=False)
    special = ("pos_embed", NULL_CAPTION)
    unknown = {name: tensor for name, tensor in weights.items() if name not in keys and name not in special}
    return Named(renamed | unknown, origin, *(weights.get(name) for name in special))


def infer_config(named: Named, **config: Any) -> dict[str, Any]:
    """The arguments of `Transformer` that tensors tell; `config` wins. ValueError where they do not tell enough.

    The position table tells the latents' size and its own scale. Without it the scale is the published one of the size;
    the null caption's length tells α (120 tokens) from Σ (300), whose scales differ.
    """
    weights, _, position, null_caption = named
    width, in_channels, patch, _ = shape_of(weights, "pos_embed.proj.weight", 4)
    rows = shape_of(weights, "proj_out.weight", 2)[0]
    caption = weights.get("caption_projection.linear_1.weight")
    text = weights.get("transformer_blocks.0.attn2.to_k.weight")
    read = {
        **heads_of(width, *(config.get(name) for name in HEADS)),
        "in_channels": in_channels,
        "out_channels": rows // (patch * patch),
        "num_layers": count_blocks(weights, "transformer_blocks"),
        "cross_attention_dim": width if text is None else text.shape[-1],
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in weights,
        "patch_size": patch,
        "use_additional_conditions": any("resolution_embedder" in name for name in weights),
        "caption_channels": None if caption is None else caption.shape[-1],
        "modulation": "adaln" if "pooled_projection.weight" in weights else "adaln_single",
    }
    if "sample_size" in config:
        size = config["sample_size"]
    elif position is None:
        raise ValueError(
            "the tensors do not tell the size of the latents: pass sample_size=, an eighth of the image's size."
        )
    else:
        size = round((position.numel() / width) ** 0.5) * patch
        if position.shape != (1, (size // patch) ** 2, width):
            raise ValueError(f"pos_embed {list(position.shape)} is not square [1, n * n, {width}]: pass sample_size=.")
    if "interpolation_scale" not in config:
        sigma = null_caption is not None and null_caption.shape[0] == 300
        read["interpolation_scale"] = _position_scale(
            position, size // patch, size / 64 if sigma else max(size // 64, 1)
        )
    return {**read, "sample_size": size, **config}


def heads_of(width: int, heads: int | None = None, head_dim: int | None = None) -> dict[str, int]:
    """Number and width of attention heads, of which one is enough; published models' width without either."""
    head_dim = head_dim or (width // heads if heads else HEAD_DIM)
    if width % head_dim or (heads and heads * head_dim != width):
        count = f"{heads} heads" if heads else f"heads of {head_dim}"
        raise ValueError(f"the width {width} does not divide into {count}: pass num_attention_heads=.")
    return {"num_attention_heads": width // head_dim, "attention_head_dim": head_dim}


def position_table(grid: int, width: int, scale: float) -> Tensor:
    """The official table of a square grid, fp32 `[N, D]`."""
    return sincos_2d(grid, grid, width, base_size=grid, scale=scale, device=torch.device("cpu"))


def _position_scale(position: Tensor | None, grid: int, expected: float) -> float:
    """The interpolation scale that a table was made with; `expected` where there is none or it tells nothing."""
    if position is None or position.shape[1] != grid * grid:
        return expected
    candidates = sorted({expected, 0.5, 1, 2, 4}, key=lambda scale: scale != expected)
    table = position[0].float().cpu()
    errors = {scale: (position_table(grid, table.shape[1], scale) - table).abs().max().item() for scale in candidates}
    best = min(errors, key=errors.get)
    if errors[best] > 0.02:  # several roundings of bf16
        warnings.warn(
            f"pos_embed is none of the tables of the published models; going on with interpolation_scale={expected}.",
            stacklevel=3,
        )
        return expected
    return best
