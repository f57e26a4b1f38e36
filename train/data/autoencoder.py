"""Trains the autoencoder of the embedded default (pixart_fast/embedded.py).

    python -m train.data.autoencoder --steps 6000 --out train/data/autoencoder.safetensors
    python -m train.data.autoencoder --steps 4000 --decoder-of train/data/autoencoder.safetensors \\
        --out train/data/autoencoder_64.safetensors

retrain the weights that the repository ships, from the pictures of the training split alone: all of it at 32x32, and
for 64 px a decoder that has seen its aspect ratios too. The encoder, and so every latent, is the same in both.

    python -m train.data.autoencoder --model-folder DIR      text encoder and 64-px autoencoder, to extract features by
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pixart_fast.aspect import BUCKETS
from pixart_fast.embedded import IMAGE_SIZE, Autoencoder, HashedText
from pixart_fast.recipe import Recipe
from train.data import oracle
from train.data.scenes import Scenes

WEIGHTS = Path(__file__).with_name("autoencoder.safetensors")
WEIGHTS_64 = Path(__file__).with_name("autoencoder_64.safetensors")

# Training decodes latents that are off by this much, where their own deviation is 1. The decoder learns to forgive what
# a sampler leaves behind, and the encoder to write shapes large: without it they hide in differences that a short
# diffusion training does not resolve.
LATENT_NOISE = 0.3

LARGER_FROM = 10**9  # index of the first larger picture: they are other scenes than those at 32x32


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Squared error over the objects plus squared error over the background, each a mean: a small object weighs as much
    as a large one. Both arguments are `[B, 3, H, W]`."""
    background = images.flatten(2).median(2).values[..., None, None]  # [B, 3, 1, 1]
    differs = (images - background).abs().amax(1, keepdim=True) > 0.1
    objects = F.max_pool2d(differs.float(), 3, stride=1, padding=1)  # [B, 1, H, W], with the pixels around them
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


def train_decoder(model: Autoencoder, steps: int, *, batch: int = 24, lr: float = 2e-3, seed: int = 0) -> Autoencoder:
    """Teach the decoder larger pictures beside those of 32x32; the encoder stays, and so does every latent.

    Each step takes `batch` pictures of 32x32 and half as many of one bucket of 64 px.
    """
    torch.manual_seed(seed)
    model.decoder.requires_grad_(True)
    parameters = list(model.decoder.parameters())
    scenes, buckets = Scenes(seed), list(BUCKETS[64].values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05, cycle_momentum=False)
    for step in tqdm(range(steps), unit="step", desc="decoder"):
        optimizer.zero_grad()
        for rows, first, size in (
            (batch, 0, (IMAGE_SIZE, IMAGE_SIZE)),
            (batch // 2, LARGER_FROM, buckets[step % len(buckets)]),
        ):
            images = scenes.batch(range(first + step * rows, first + (step + 1) * rows), *size).images
            latents = model.encode(images)
            decoded = model.decode(latents + LATENT_NOISE * torch.randn_like(latents))
            reconstruction_loss(decoded, images).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def measure_statistics(model: Autoencoder, scenes: Scenes, indices: range, batch: int = 256) -> None:
    """Set the latents' mean and deviation from pictures that training has not shown."""
    model.norm.reset_running_stats()
    model.train()
    for start in range(0, len(indices), batch):
        model.encode(scenes.batch(indices[start : start + batch]).images)


@torch.no_grad()
def reconstruction_score(
    model: Autoencoder, split: str, count: int = 512, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE
) -> dict[str, float]:
    """The oracle's rates for pictures that went through the autoencoder."""
    sample = Scenes(seed=1, split=split).batch(range(count), height, width)
    return oracle.score(sample.scenes, model.decode(model.encode(sample.images)))


def save_vae(folder: Path, model: Autoencoder) -> None:
    """`vae/` of a model folder."""
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": Autoencoder.__name__}) + "\n")
    model.save(folder / "vae" / Autoencoder.file_name)


def save_encoders(folder: Path, model: Autoencoder, text: HashedText, guidance: float | None = None) -> None:
    """What a model folder has beside the transformer: `vae/`, `text_encoder/`, `recipe.json`."""
    save_vae(folder, model)
    text.save(folder / "text_encoder")
    recipe = {"max_tokens": text.max_tokens, "clean": False, "keep_cjk": True, "guidance": guidance}
    Recipe(family="embedded", **recipe).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the autoencoder of the embedded default.")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--decoder-of", type=Path, metavar="FILE", help="train these weights' decoder alone, up to 64 px"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--latent-channels", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    made = parser.add_mutually_exclusive_group(required=True)
    made.add_argument("--out", type=Path, metavar="FILE", help="train, and write the weights there")
    made.add_argument("--model-folder", type=Path, metavar="DIR", help="write the shipped 64-px encoders there instead")
    args = parser.parse_args()
    if args.model_folder:
        save_encoders(args.model_folder, Autoencoder.load(WEIGHTS_64), HashedText())
        return
    if args.decoder_of:
        model = train_decoder(Autoencoder.load(args.decoder_of), args.steps, seed=args.seed)
    else:
        model = train(args.steps, batch=args.batch, lr=args.lr, seed=args.seed, latent_channels=args.latent_channels)
    model.save(args.out)
    model = Autoencoder.load(args.out)
    for height, width in ((IMAGE_SIZE, IMAGE_SIZE), *BUCKETS[64].values()):
        for split in ("seen", "held_out"):
            rates = reconstruction_score(model, split, height=height, width=width)
            print(f"{height}x{width} {split:>9}: " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()))


if __name__ == "__main__":
    main()
