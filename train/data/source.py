"""What the training loop needs of a data set: which samples a step takes, and their latents with text or labels.

Everything random about a sample (timestep, noise, caption dropout, the draw from a VAE's posterior) comes from a
counter-based generator keyed by the run's seed and the sample's number in the run. A step is therefore the same
whatever the number of processes, accumulation steps or loader workers, and a resumed run needs no random state.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pixart_fast.embedded import Autoencoder, HashedText
from train.data.autoencoder import WEIGHTS, save_encoders, save_vae
from train.data.scenes import CLASSES, Scene, Scenes
from train.settings import Data, Diffusion, Settings, UserError


class Rows(NamedTuple):
    """Samples of one size, as a source holds them. Where a caption or label was dropped stands the empty one."""

    mean: Tensor  # [B, C, h, w] fp32, scaled as the model sees latents
    std: Tensor | None = None  # [B, C, h, w] fp32, of the VAE's posterior, from which training draws
    text: Tensor | None = None  # [B, L, caption_channels] in the source's dtype
    mask: Tensor | None = None  # [B, L] bool, True where there is a token
    label: Tensor | None = None  # [B] int64; num_classes is the null class
    resolution: Tensor | None = None  # [B, 2] fp32: height, width
    aspect_ratio: Tensor | None = None  # [B, 1] fp32: height / width


class Batch(NamedTuple):
    """One micro-batch of one process."""

    latents: Tensor  # [B, C, h, w] fp32
    t: Tensor  # [B] int64
    noise: Tensor  # [B, C, h, w] fp32
    text: Tensor | None = None  # these as in Rows
    mask: Tensor | None = None
    label: Tensor | None = None
    resolution: Tensor | None = None
    aspect_ratio: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))


class Source(Protocol):
    """A data set. It is read in forked worker processes."""

    latent_channels: int
    latent_size: int  # of a square picture
    caption_channels: int | None  # None: it has classes instead of captions
    max_tokens: int | None
    null_caption: Tensor | None  # [L, caption_channels]
    num_classes: int | None
    most_rows: int  # that a step takes

    def plan(self, step: int) -> np.ndarray:
        """Indices of all samples of optimizer step `step`, from 0; their latents have one shape."""

    def fetch(self, indices: np.ndarray, dropped: np.ndarray) -> Rows:
        """Some samples; where `dropped [B]` is set without caption or label."""

    def save(self, folder: Path, settings: Settings) -> None:
        """What a model folder needs beside the transformer to paint, as far as the source knows it."""


class Probe(NamedTuple):
    """Captions that training never shows, and what their pictures must contain."""

    captions: list[str]
    scenes: list[Scene]
    text: Tensor
    mask: Tensor


class ScenesSource:
    """Procedural scenes as autoencoder latents, with captions as hashed text features, or with classes."""

    def __init__(self, data: Data, seed: int, batch_size: int = 1, *, classes: bool = False):
        self.scenes, self.most_rows = Scenes(seed, captions=data.captions), batch_size
        self.autoencoder = Autoencoder.load(WEIGHTS)
        self.text = HashedText()
        self.latent_channels, self.latent_size = self.autoencoder.latent_channels, self.autoencoder.latent_size
        self.num_classes = len(CLASSES) if classes else None
        self.caption_channels = self.max_tokens = self.null_caption = None
        if not classes:
            self.caption_channels, self.max_tokens = self.text.channels, self.text.max_tokens
            self.null_caption = self.text.encode([""])[0][0]  # [L, caption_channels]

    def plan(self, step: int) -> np.ndarray:
        return np.arange(step * self.most_rows, (step + 1) * self.most_rows)

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features `[B, L, caption_channels]` and their mask `[B, L]`."""
        features, lengths = self.text.encode(captions)
        return features, torch.arange(self.text.max_tokens) < lengths[:, None]

    @torch.no_grad()
    def fetch(self, indices: np.ndarray, dropped: np.ndarray) -> Rows:
        drawn = self.scenes.batch(indices)
        latents = self.autoencoder.encode(drawn.images)
        if self.num_classes is not None:
            label = torch.tensor([scene.label for scene in drawn.scenes])
            return Rows(latents, label=label.masked_fill(torch.from_numpy(dropped), self.num_classes))
        captions = ["" if drop else caption for caption, drop in zip(drawn.captions, dropped, strict=True)]
        text, mask = self.encode_text(captions)
        return Rows(latents, text=text, mask=mask)

    def probe(self, split: str, count: int) -> Probe:
        """The first captions of a split that training never shows: "seen" (colour, shape) pairs or "held_out" ones."""
        drawn = Scenes(0, split=split).batch(range(count))
        return Probe(drawn.captions, drawn.scenes, *self.encode_text(drawn.captions))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` on any device to pictures `[B, 3, H, W]` in [-1, 1] on the CPU."""
        return self.autoencoder.decode(latents.float().cpu()).clamp(-1, 1)

    def save(self, folder: Path, settings: Settings) -> None:
        if self.num_classes is None:
            save_encoders(folder, self.autoencoder, self.text, settings.sampling.guidance)
        else:
            save_vae(folder, self.autoencoder)
        save_schedule(folder, settings.diffusion)


def save_schedule(folder: Path, settings: Diffusion) -> None:
    """`scheduler/` of a model folder: the linear betas that training used."""
    steps = settings.num_timesteps
    DPMSolverMultistepScheduler(
        num_train_timesteps=steps, beta_start=0.1 / steps, beta_end=20 / steps, beta_schedule="linear"
    ).save_pretrained(folder / "scheduler")


def draw(settings: Diffusion, seed: int, number: int) -> tuple[int, float, np.random.Generator]:
    """A sample's timestep, its number in [0, 1) for caption dropout, and the generator of its noise."""
    generator = np.random.Generator(np.random.Philox(key=[seed, number]))
    if settings.timesteps == "uniform":
        fraction = generator.random()
    else:
        fraction = 1.0 / (1.0 + np.exp(-(settings.logit_mean + settings.logit_std * generator.standard_normal())))
    t = min(int(fraction * settings.num_timesteps), settings.num_timesteps - 1)
    return t, generator.random(), generator


class Steps(Dataset):
    """Item s is what one process does in optimizer step s: its `accumulation` micro-batches, or the UserError that
    stopped their preparation (a loader worker would bury its sentence in a stack trace).

    A step's samples are numbered from s · `stride`; the processes take them in order.
    """

    def __init__(self, source: Source, settings: Settings, rank: int, processes: int):
        self.source, self.settings, self.rank, self.processes = source, settings, rank, processes
        self.stride = max(settings.batch_size, source.most_rows)

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        try:
            indices = self.source.plan(step)
            numbers = step * self.stride + np.arange(len(indices))
            rows = self.settings.rows_per_process(self.processes, len(indices))
            first = self.rank * self.settings.accumulation * rows
            return [
                self.micro_batch(indices[start : start + rows], numbers[start : start + rows])
                for start in range(first, first + self.settings.accumulation * rows, rows)
            ]
        except UserError as error:
            return error

    def micro_batch(self, indices: np.ndarray, numbers: np.ndarray) -> Batch:
        settings, source = self.settings, self.source
        draws = [draw(settings.diffusion, settings.seed, int(number)) for number in numbers]
        dropped = np.array([number for _, number, _ in draws]) < settings.data.caption_dropout
        rows = source.fetch(indices, dropped)
        shape = rows.mean.shape[1:]

        def noise() -> Tensor:
            drawn = [generator.standard_normal(shape, dtype=np.float32) for _, _, generator in draws]
            return torch.from_numpy(np.stack(drawn))

        epsilon = noise()
        latents = rows.mean if rows.std is None else rows.mean + rows.std * noise()
        return Batch(latents, torch.tensor([t for t, _, _ in draws]), epsilon, *rows[2:])


def load_steps(steps: Steps, start: int, workers: int, pin: bool) -> DataLoader:
    """Steps from `start` to the end, prepared by `workers` processes; the same batches whatever their number."""
    return DataLoader(steps, batch_size=None, sampler=range(start, len(steps)), num_workers=workers, pin_memory=pin)
