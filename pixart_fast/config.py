"""Model sizes as data: rows of the papers, as arguments of `Transformer` (DiT table 1; PixArt-α section 2.3)."""

from types import MappingProxyType
from typing import NamedTuple


class Size(NamedTuple):
    """Depth, width and heads of a transformer."""

    layers: int
    width: int
    heads: int


SIZES = MappingProxyType(
    {
        "scenes": Size(layers=4, width=128, heads=4),  # the embedded default: minutes on a laptop CPU
        "S": Size(layers=12, width=384, heads=6),
        "B": Size(layers=12, width=768, heads=12),
        "L": Size(layers=24, width=1024, heads=16),
        "XL": Size(layers=28, width=1152, heads=16),  # PixArt-α and Σ
    }
)


def transformer_config(
    size: Size,
    *,
    sample_size: int,
    patch_size: int = 2,
    in_channels: int = 4,
    caption_channels: int = 4096,
    **extra,
) -> dict:
    """Keyword arguments of `Transformer` for a size; noise and variance come out, so twice `in_channels`.

    Raises ValueError when the heads do not divide the width.
    """
    if size.width % size.heads:
        raise ValueError(f"{size.heads} heads do not divide a width of {size.width}: choose heads that do.")
    return {
        "num_attention_heads": size.heads,
        "attention_head_dim": size.width // size.heads,
        "num_layers": size.layers,
        "cross_attention_dim": size.width,
        "sample_size": sample_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": 2 * in_channels,
        "caption_channels": caption_channels,
        **extra,
    }
