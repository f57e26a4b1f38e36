"""Picture sizes: the aspect-ratio buckets that PixArt was trained on, and how people write sizes."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

# Of the buckets at 1024 px, in units of 64 px: height to widths, for pictures wider than high. Turned by 90 degrees
# they are the buckets of high pictures, but that 21 x 11 was left out by the authors.
_WIDE = {
    8: (32, 31, 30, 29),
    9: (28, 27, 26),
    10: (25, 24),
    11: (23, 22, 21),
    12: (21, 20),
    13: (19, 18),
    14: (18, 17),
    15: (17, 16),
}
_TRAINING_ONLY = frozenset({"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"})


def _ladder(base: int) -> Mapping[str, tuple[int, int]]:
    wide = [(height, width) for height, widths in _WIDE.items() for width in widths]
    high = [(width, height) for height, width in reversed(wide) if (height, width) != (11, 21)]
    unit = base // 16
    return MappingProxyType({str(round(h / w, 2)): (h * unit, w * unit) for h, w in [*wide, (16, 16), *high]})


def _small_ladder(base: int) -> Mapping[str, tuple[int, int]]:
    """Of the ladder, ratios up to 2:1 whose sides divide by 8, as an autoencoder asks."""
    sizes = _ladder(base).items()
    return MappingProxyType({key: (h, w) for key, (h, w) in sizes if not (h % 8 or w % 8) and 0.5 <= h / w <= 2})


BUCKETS: Mapping[int, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {64: _small_ladder(64)} | {base: _ladder(base) for base in (256, 512, 1024, 2048)}
)
"""`BUCKETS[base][key]` is (height, width) in pixels; the keys are height / width to two decimals, ascending. There are
PixArt's 40, and at 64 px the embedded default's five."""


def nearest(height_over_width: float, base: int, *, inference: bool = False) -> tuple[str, int, int]:
    """The key, height and width of the bucket whose key is nearest to an aspect ratio (PixArt-α's data loader).

    `inference` leaves out the seven buckets that the published pipelines leave out: none at 2048 px, where diffusers
    offers all. A ValueError names the tables there are.
    """
    if base not in BUCKETS:
        raise ValueError(
            f"there are no aspect-ratio buckets for {base} px, only for {', '.join(map(str, BUCKETS))}: give the size "
            f"as WIDTHxHEIGHT instead."
        )
    left_out = _TRAINING_ONLY if inference and base < 2048 else frozenset()
    key = min(BUCKETS[base].keys() - left_out, key=lambda key: (abs(float(key) - height_over_width), float(key)))
    return key, *BUCKETS[base][key]


def parse_aspect(text: str) -> float:
    """Height / width of "16:9" or "1.78", both width to height as people write them; ValueError if it is neither."""
    number = r"(\d+\.?\d*|\.\d+)"
    match = re.fullmatch(rf"\s*{number}(?:\s*:\s*{number})?\s*", text)
    width, height = (float(match[1]), float(match[2] or 1)) if match else (0.0, 0.0)
    if not (width > 0 and height > 0 and math.isfinite(width) and math.isfinite(height)):
        raise ValueError(f"{text!r} is no aspect ratio: write width:height, for example 16:9, or one number as 1.78.")
    return height / width


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "1024x768", which is width x height as people write it.

    ValueError if it is no size, or if a side does not divide by 16 (the autoencoder's 8 times the patch of 2), with
    the nearest size that does.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    if not match or not (int(match[1]) and int(match[2])):
        raise ValueError(f"{text!r} is no size: write WIDTHxHEIGHT in pixels, for example 1024x768.")
    width, height = int(match[1]), int(match[2])
    if width % 16 or height % 16:
        across, down = (max(16, 16 * round(side / 16)) for side in (width, height))
        raise ValueError(f"{width}x{height} does not divide by 16: take {across}x{down}.")
    return height, width


def base_size(latent_sample_size: int) -> int:
    """Pixels of the side of the square that a model was trained on: 8 to each of its `sample_size` latents."""
    return 8 * latent_sample_size
