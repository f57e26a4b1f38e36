"""Pictures of a model in training: DPM-Solver++ with guidance, and grids of them with their captions."""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pixart_fast.denoise import Denoiser, Guidance, denoise
from pixart_fast.samplers import build
from train.data.source import Probe, ScenesSource
from train.settings import Sampling

MICRO_BATCH = 96


def sample_latents(
    model, source: ScenesSource, text: Tensor, mask: Tensor, settings: Sampling, *, seed: int = 0
) -> Tensor:
    """Latents `[B, C, h, w]` for text `[B, L, C]`: `settings.steps` of DPM-Solver++ (order 2), classifier-free
    guidance.

    The unconditional branch sees the empty caption with its own mask. Noise depends on `seed` and the row alone.
    """
    shape = (len(text), source.latent_channels, source.latent_size, source.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    empty, empty_mask = source.encode_text([""])
    count = len(text)
    denoiser = Denoiser(model, text, mask.sum(1), empty.expand(count, -1, -1), empty_mask.sum(1).expand(count))
    return denoise(denoiser, build("dpm", settings.steps), noise, Guidance(settings.guidance))


def generate(model, source: ScenesSource, probe: Probe, settings: Sampling) -> Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1] for a probe's captions."""
    rows = range(0, len(probe.captions), MICRO_BATCH)
    latents = [
        sample_latents(
            model, source, probe.text[i : i + MICRO_BATCH], probe.mask[i : i + MICRO_BATCH], settings, seed=i
        )
        for i in rows
    ]
    return source.decode(torch.cat(latents))


def save_grid(images: Tensor, captions: list[str], path: Path, *, columns: int = 6, tile: int = 160) -> None:
    """A PNG of pictures `[B, 3, H, W]` in [-1, 1], each with its caption under it."""
    font, line, pad = ImageFont.load_default(12), 15, 8
    texts = [textwrap.wrap(caption, tile // 7) for caption in captions]
    rows = -(-len(images) // columns)
    cell_width, cell_height = tile + pad, tile + max(map(len, texts)) * line + pad
    grid = Image.new("RGB", (columns * cell_width + pad, rows * cell_height + pad), "white")
    pen = ImageDraw.Draw(grid)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (picture, text) in enumerate(zip(pixels, texts, strict=True)):
        x, y = pad + i % columns * cell_width, pad + i // columns * cell_height
        grid.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        for row, words in enumerate(text):
            pen.text((x, y + tile + 2 + row * line), words, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
