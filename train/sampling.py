"""Pictures of a model in training, with the averaged weights: what is painted, what the oracle reads, and grids.

A run paints the same things from the same noise every time; `samples/progress.png` grows by a row with each.
"""

import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pixart_fast import DiT, Transformer
from pixart_fast.denoise import Denoiser, Guidance, denoise
from pixart_fast.embedded import HashedText
from pixart_fast.recipe import find, read_recipe
from pixart_fast.samplers import build
from pixart_fast.text import T5Text
from pixart_fast.vae import VAE
from train.data.features import FeaturesSource
from train.data.oracle import read, score
from train.data.scenes import CLASSES, HELD_OUT_PAIRS
from train.data.source import Probe, ScenesSource, Source
from train.settings import Sampling, Settings, UserError

MICRO_BATCH = 96
GRID = 24
STRIP = 8  # pictures in a row of progress.png
Accuracy = dict[str, dict[str, float]]


class ClassDenoiser:
    """A DiT with guidance, called as a `Denoiser` is. labels: int64 `[B]`."""

    def __init__(self, model: DiT, labels: Tensor):
        self.model, self.labels = model, labels
        self.device = next(model.parameters()).device

    def __call__(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        labels = self.labels.to(self.device)
        if guided:
            null = torch.full_like(labels, self.model.y_embedder.num_classes)
            latents, labels = torch.cat([latents, latents]), torch.cat([null, labels])
        time = torch.full((len(latents),), t, device=self.device)
        return self.model(latents, time, labels).float()


def noise(count: int, source: Source, device: torch.device, seed: int = 0) -> Tensor:
    """Of square latents, `[count, C, h, h]`, the same on every device."""
    shape = (count, source.latent_channels, source.latent_size, source.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def sample_latents(
    model: Transformer, source: Source, text: Tensor, mask: Tensor, empty: Tensor, settings: Sampling, *, seed: int = 0
) -> Tensor:
    """Latents `[B, C, h, w]` for text `[B, L, C]`: `settings.steps` of DPM-Solver++ (order 2), classifier-free
    guidance against the empty caption `[K, C]` with its own tokens. Noise depends on `seed` and the row alone.
    """
    count = len(text)
    added = None
    if model.use_additional_conditions:
        side = float(source.latent_size * 8)
        added = {
            "resolution": torch.full((count, 2), side, device=model.device),
            "aspect_ratio": torch.ones(count, 1, device=model.device),
        }
    lengths = torch.full((count,), len(empty))
    denoiser = Denoiser(model, text, mask.sum(1), empty.expand(count, -1, -1), lengths, added)
    start = noise(count, source, model.device, seed)
    return denoise(denoiser, build("dpm", settings.steps), start, Guidance(settings.guidance))


class CaptionedScenes:
    """New captions of both kinds, whose pictures the oracle reads."""

    def __init__(self, source: ScenesSource, settings: Sampling, captions: int):
        self.source, self.settings = source, settings
        self.probes = {split: source.probe(split, captions) for split in ("seen", "held_out")}
        self.captions = self.probes["seen"].captions

    def paint(self, model: Transformer) -> tuple[Tensor, Accuracy]:
        """Pictures `[B, 3, H, W]` in [-1, 1] of the first kind of captions, and the accuracy on each."""
        images = {split: generate(model, self.source, probe, self.settings) for split, probe in self.probes.items()}
        return images["seen"], {split: score(probe.scenes, images[split]) for split, probe in self.probes.items()}


class ClassScenes:
    """Every class that training shows, in turn. Right is a picture in which the oracle finds an object of its class."""

    def __init__(self, source: ScenesSource, settings: Sampling, captions: int):
        self.source, self.settings = source, settings
        taught = [label for label, name in enumerate(CLASSES) if tuple(name.split()) not in HELD_OUT_PAIRS]
        self.labels = torch.tensor(taught * (captions // len(taught) + 1))[:captions]
        self.captions = [CLASSES[label] for label in self.labels.tolist()]

    def paint(self, model: DiT) -> tuple[Tensor, Accuracy]:
        """Pictures `[B, 3, H, W]` in [-1, 1] of the classes, and how many show theirs."""
        start = noise(len(self.labels), self.source, next(model.parameters()).device)
        guidance = Guidance(self.settings.guidance)
        latents = denoise(ClassDenoiser(model, self.labels), build("dpm", self.settings.steps), start, guidance)
        images = self.source.decode(latents)
        seen = [{f"{item.colour} {item.shape}" for item in reading.objects} for reading in read(images)]
        right = sum(caption in objects for caption, objects in zip(self.captions, seen, strict=True))
        return images, {"classes": {"binding": right / len(seen)}}


class Prompts:
    """Pictures of prompts, where features are what a run learns from. Text encoder and VAE are loaded for that alone.

    Raises UserError where `settings.components` is no model folder.
    """

    def __init__(self, source: FeaturesSource, settings: Sampling, device: torch.device):
        self.source, self.settings = source, settings
        store, prompts = source.store, list(settings.prompts)
        try:
            folder = find(settings.components)
            self.vae = VAE(folder / "vae", device, torch.float32)
            if prompts:
                recipe = read_recipe(folder)
                if recipe.family == "embedded":
                    encoder = HashedText.load(folder / "text_encoder")
                else:
                    chosen = {"max_tokens": recipe.max_tokens, "clean": recipe.clean, "keep_cjk": recipe.keep_cjk}
                    encoder = T5Text(folder, device=device, **chosen)
                features, lengths = encoder.encode(prompts)
                encoder.free()
        except (OSError, ValueError) as error:
            raise UserError(f"sampling.components: {error}") from error
        if not prompts:
            rows = range(min(STRIP, len(store)))
            prompts = [store.caption(row) or f"sample {row}" for row in rows]
            texts = [store.read(row).text.float() for row in rows]
            features, lengths = pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts])
        self.captions, self.text = prompts, features.float().cpu()
        self.mask = torch.arange(self.text.shape[1]) < lengths[:, None]

    def paint(self, model: Transformer) -> tuple[Tensor, Accuracy]:
        """Pictures `[B, 3, H, W]` in [-1, 1] of the prompts, in squares; no oracle reads them."""
        latents = sample_latents(model, self.source, self.text, self.mask, self.source.null_caption, self.settings)
        images = torch.cat([self.vae.decode(row) for row in latents.split(4)])
        self.vae.free()
        return images, {}


Painter = CaptionedScenes | ClassScenes | Prompts


def build_painter(source: Source, settings: Settings, captions: int, device: torch.device) -> Painter | None:
    """What a run paints along the way, with `captions` per split where an oracle reads them; None: nothing."""
    if isinstance(source, ScenesSource):
        kind = CaptionedScenes if source.num_classes is None else ClassScenes
        return kind(source, settings.sampling, captions)
    if settings.sampling.components is None or source.num_classes is not None:
        return None
    return Prompts(source, settings.sampling, device)


def generate(model: Transformer, source: ScenesSource, probe: Probe, settings: Sampling) -> Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1] for a probe's captions."""
    empty = source.null_caption[:1]  # the empty caption has one token, its end
    latents = [
        sample_latents(model, source, text, mask, empty, settings, seed=number * MICRO_BATCH)
        for number, (text, mask) in enumerate(
            zip(probe.text.split(MICRO_BATCH), probe.mask.split(MICRO_BATCH), strict=True)
        )
    ]
    return source.decode(torch.cat(latents))


def save_progress(images: Tensor, path: Path, *, tile: int = 96) -> None:
    """A strip of the first pictures beside those of earlier steps: `progress.png` in the folder of `path`, a row per
    strip `step_*.png` there, with its step at its left."""
    strip = to_tiles(images[:STRIP], tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)
    strips = sorted(path.parent.glob("step_*.png"))
    margin, font = 72, ImageFont.load_default(14)
    page = Image.new("RGB", (margin + strip.width, len(strips) * tile), "white")
    pen = ImageDraw.Draw(page)
    for row, file in enumerate(strips):
        with Image.open(file) as picture:
            page.paste(picture, (margin, row * tile))
        pen.text((6, row * tile + tile // 2 - 8), file.stem.removeprefix("step_").lstrip("0"), fill="black", font=font)
    page.save(path.parent / "progress.png")


def to_tiles(images: Tensor, tile: int) -> Image.Image:
    """Pictures `[B, 3, H, W]` in [-1, 1] side by side, each scaled to `tile` pixels."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    strip = Image.new("RGB", (len(pixels) * tile, tile), "white")
    for column, picture in enumerate(pixels):
        how = Image.Resampling.NEAREST if picture.shape[0] < tile else Image.Resampling.LANCZOS
        strip.paste(Image.fromarray(picture).resize((tile, tile), how), (column * tile, 0))
    return strip


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
