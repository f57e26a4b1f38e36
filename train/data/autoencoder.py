"""Trains the autoencoder of the embedded default (pixart_fast/embedded.py).

    python -m train.data.autoencoder --steps 6000 --out train/data/autoencoder.safetensors

retrains the weights that the repository ships, from the pictures of the training split alone.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pixart_fast.embedded import Autoencoder
from train.data import oracle
from train.data.scenes import Scenes

WEIGHTS = Path(__file__).with_name("autoencoder.safetensors")

# Training decodes latents that are off by this much, where their own deviation is 1. The decoder learns to forgive what
# a sampler leaves behind, and the encoder to write shapes large: without it they hide in differences that a short
# diffusion training does not resolve.
LATENT_NOISE = 0.3


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Squared error over the objects plus squared error over the background, each a mean: a small object weighs as much
    as a large one. Both arguments are `[B, 3, 32, 32]`."""
    background = images.flatten(2).median(2).values[..., None, None]  # [B, 3, 1, 1]
    differs = (images - background).abs().amax(1, keepdim=True) > 0.1
    objects = F.max_pool2d(differs.float(), 3, stride=1, padding=1)  # [B, 1, 32, 32], with the pixels around them
    error = (decoded - images).square().mean(1, keepdim=True)
    return sum((error * part).sum((1, 2, 3)) / part.sum((1, 2, 3)) for part in (objects, 1 - objects)).mean()


def train(
    steps: int,
    *,
    batch: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    latent_channels: int = 8,
    measured: int = 8192,
) -> Autoencoder:
    """Fit an autoencoder to the training split. The same arguments give the same weights on one machine.

    The statistics of the latents are those of the next `measured` pictures under the final weights.
    """
    torch.manual_seed(seed)
    model = Autoencoder(latent_channels)
    scenes = Scenes(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05, cycle_momentum=False)
    progress = tqdm(range(steps), unit="step", desc="autoencoder")
    for step in progress:
        images = scenes.batch(range(step * batch, (step + 1) * batch)).images
        latents = model.encode(images)
        loss = reconstruction_loss(model.decode(latents + LATENT_NOISE * torch.randn_like(latents)), images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    measure_statistics(model, scenes, range(steps * batch, steps * batch + measured))
    return model.eval()


@torch.no_grad()
def measure_statistics(model: Autoencoder, scenes: Scenes, indices: range, batch: int = 256) -> None:
    """Set the latents' mean and deviation from pictures that training has not shown."""
    model.norm.reset_running_stats()
    model.train()
    for start in range(0, len(indices), batch):
        model.encode(scenes.batch(indices[start : start + batch]).images)


@torch.no_grad()
def reconstruction_score(model: Autoencoder, split: str, count: int = 512) -> dict[str, float]:
    """The oracle's rates for pictures that went through the autoencoder."""
    sample = Scenes(seed=1, split=split).batch(range(count))
    return oracle.score(sample.scenes, model.decode(model.encode(sample.images)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the autoencoder of the embedded default.")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--latent-channels", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train(args.steps, batch=args.batch, lr=args.lr, seed=args.seed, latent_channels=args.latent_channels).save(args.out)
    model = Autoencoder.load(args.out)
    for split in ("seen", "held_out"):
        rates = reconstruction_score(model, split)
        print(f"{split:>9}: " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
