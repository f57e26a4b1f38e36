"""What the training loop needs of a data set: latents and ragged text by index, and probes that measure generated
pictures.

Everything random about a sample (timestep, noise, caption dropout) comes from a counter-based generator keyed by the
run's seed and the sample's index. A step is therefore the same whatever the number of processes, accumulation steps or
loader workers, and a resumed run needs no random state.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart_fast.embedded import Autoencoder, HashedText
from pixart_fast.recipe import Recipe
from train.data.autoencoder import WEIGHTS
from train.data.oracle import score
from train.data.scenes import Scene, Scenes
from train.settings import Data, Diffusion, Settings


class Batch(NamedTuple):
    """One micro-batch of one process."""

    latents: Tensor  # [B, C, h, w] fp32
    text: Tensor  # [B, L, caption_channels] fp32
    mask: Tensor  # [B, L] bool, True where there is a token
    t: Tensor  # [B] int64
    noise: Tensor  # [B, C, h, w] fp32

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Probe(NamedTuple):
    """Captions that training never shows, and what their pictures must contain."""

    captions: list[str]
    scenes: list[Scene]
    text: Tensor
    mask: Tensor


class ScenesSource:
    """Procedural scenes as autoencoder latents, captions as hashed text features."""

    def __init__(self, data: Data, seed: int):
        self.scenes = Scenes(seed, captions=data.captions)
        self.autoencoder = Autoencoder.load(WEIGHTS)
        self.text = HashedText()
        self.latent_channels, self.latent_size = self.autoencoder.latent_channels, self.autoencoder.latent_size
        self.caption_channels, self.max_tokens = self.text.channels, self.text.max_tokens
        self.null_caption = self.text.encode([""])[0][0]  # [L, caption_channels]

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features `[B, L, caption_channels]` and their mask `[B, L]`."""
        features, lengths = self.text.encode(captions)
        return features, torch.arange(self.max_tokens) < lengths[:, None]

    @torch.no_grad()
    def fetch(self, indices: range, dropped: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, text and mask of samples; where `dropped [B]` is set the caption is the empty one."""
        drawn = self.scenes.batch(indices)
        captions = ["" if drop else caption for caption, drop in zip(drawn.captions, dropped, strict=True)]
        return self.autoencoder.encode(drawn.images), *self.encode_text(captions)

    def probe(self, split: str, count: int) -> Probe:
        """The first captions of a split that training never shows: "seen" (colour, shape) pairs or "held_out" ones."""
        drawn = Scenes(0, split=split).batch(range(count))
        return Probe(drawn.captions, drawn.scenes, *self.encode_text(drawn.captions))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` on any device to pictures `[B, 3, H, W]` in [-1, 1] on the CPU."""
        return self.autoencoder.decode(latents.float().cpu()).clamp(-1, 1)

    def save(self, folder: Path, diffusion: Diffusion, guidance: float) -> None:
        """What a model folder needs beside the transformer to paint: text encoder, autoencoder, schedule and recipe."""
        self.text.save(folder / "text_encoder")
        vae = folder / "vae"
        vae.mkdir(exist_ok=True)
        (vae / "config.json").write_text(json.dumps({"_class_name": Autoencoder.__name__}) + "\n")
        self.autoencoder.save(vae / Autoencoder.file_name)
        steps = diffusion.num_timesteps
        DPMSolverMultistepScheduler(
            num_train_timesteps=steps, beta_start=0.1 / steps, beta_end=20 / steps, beta_schedule="linear"
        ).save_pretrained(folder / "scheduler")
        recipe = Recipe(family="embedded", max_tokens=self.max_tokens, clean=False, keep_cjk=True, guidance=guidance)
        recipe.save(folder)

    @staticmethod
    def measure(probe: Probe, images: Tensor) -> dict[str, float]:
        """The oracle's rates over a probe's pictures."""
        return score(probe.scenes, images)


def draw(settings: Diffusion, seed: int, index: int, shape: tuple[int, ...]) -> tuple[int, float, np.ndarray]:
    """A sample's timestep, its number in [0, 1) for caption dropout, and its noise."""
    generator = np.random.Generator(np.random.Philox(key=[seed, index]))
    if settings.timesteps == "uniform":
        fraction = generator.random()
    else:
        fraction = 1.0 / (1.0 + np.exp(-(settings.logit_mean + settings.logit_std * generator.standard_normal())))
    t = min(int(fraction * settings.num_timesteps), settings.num_timesteps - 1)
    return t, generator.random(), generator.standard_normal(shape, dtype=np.float32)


class Steps(Dataset):
    """Item s is what one process does in optimizer step s: its `accumulation` micro-batches.

    A step's samples are numbered from s · batch_size; the processes take them in order.
    """

    def __init__(self, source: ScenesSource, settings: Settings, rank: int, processes: int):
        self.source, self.settings, self.rank = source, settings, rank
        self.rows = settings.rows_per_process(processes)

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> list[Batch]:
        settings = self.settings
        first = step * settings.batch_size + self.rank * settings.accumulation * self.rows
        return [
            self.micro_batch(range(start, start + self.rows))
            for start in range(first, first + settings.accumulation * self.rows, self.rows)
        ]

    def micro_batch(self, indices: range) -> Batch:
        settings, source = self.settings, self.source
        shape = (source.latent_channels, source.latent_size, source.latent_size)
        draws = [draw(settings.diffusion, settings.seed, index, shape) for index in indices]
        dropped = np.array([number for _, number, _ in draws]) < settings.data.caption_dropout
        latents, text, mask = source.fetch(indices, dropped)
        t = torch.tensor([t for t, _, _ in draws])
        return Batch(latents, text, mask, t, torch.from_numpy(np.stack([noise for _, _, noise in draws])))


def load_steps(steps: Steps, start: int, workers: int, pin: bool) -> DataLoader:
    """Steps from `start` to the end, prepared by `workers` processes; the same batches whatever their number."""
    return DataLoader(steps, batch_size=None, sampler=range(start, len(steps)), num_workers=workers, pin_memory=pin)
