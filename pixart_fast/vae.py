"""Pictures to latents and back: the published VAE, or the small autoencoder of the embedded default."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pixart_fast.embedded import Autoencoder
from pixart_fast.weights import read_json


class VAE:
    """A model folder's `vae/`, whose weights load when they are first needed.

    Args:
        folder: holds config.json and the weights, as diffusers writes them, or the embedded default's autoencoder.
        dtype: fp16 becomes fp32, in which the VAE of SDXL, Σ's, overflows.
        tiled: one picture at a time, in overlapping tiles: the peak is a fraction, the seams are blended.

    Raises OSError, ValueError, one sentence.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, *, tiled: bool = False):
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json: a model folder has its VAE there, as published.")
        self.config = read_json(folder / "config.json")
        self.folder, self.device, self.tiled = folder, device, tiled
        self.dtype = torch.float32 if dtype == torch.float16 else dtype
        self.embedded = self.config.get("_class_name") == Autoencoder.__name__
        self.downsample = 8 if self.embedded else 2 ** (len(self.config["block_out_channels"]) - 1)
        self._model = None

    @property
    def model(self):
        if self._model is None:
            if self.embedded:
                self._model = Autoencoder.load(self.folder / Autoencoder.file_name)
            else:
                self._model = AutoencoderKL.from_pretrained(self.folder, torch_dtype=self.dtype).eval()
                if self.tiled:
                    self._model.enable_tiling()
            self._model.to(self.device)
        return self._model

    def free(self) -> None:
        """Drop the weights; the next picture loads them again."""
        self._model = None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1] to latents `[B, C, H / 8, W / 8]`, fp32, scaled: the posterior's mode."""
        if self.embedded:
            return self.model.encode(images.to(self.device))
        latents = self.model.encode(images.to(self.device, self.dtype)).latent_dist.mode().float()
        return (latents - (self.config.get("shift_factor") or 0)) * self.model.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to pictures `[B, 3, 8 h, 8 w]` in [-1, 1], fp32 on the CPU."""
        if self.embedded:
            return self.model.decode(latents.to(self.device)).clamp(-1, 1).cpu()
        latents = latents / self.model.config.scaling_factor + (self.config.get("shift_factor") or 0)
        rows = latents.to(self.device, self.dtype).split(1 if self.tiled else len(latents))
        return torch.cat([self.model.decode(row).sample.float().clamp(-1, 1).cpu() for row in rows])
