"""What stands for T5 and the VAE in the embedded default, `make train`: a text encoder without weights and a small
convolutional autoencoder (train/data/autoencoder.py trains it). A model folder of that kind holds both.

Every word has a fixed vector of random signs, drawn from a hash of its letters. A token's feature is the concatenation
of the vectors of the words around it and of a code of its position: "circle" in "a large red circle in the top left"
carries "large", "red", "top" and "left" in slots of their own, and the model's caption projection learns what to make
of them. Random features of text are a strong baseline (Wieting & Kiela 2019, arXiv 1901.10444).
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pixart_fast.weights import read_json

IMAGE_SIZE = 32  # pixels of a picture's side

END = "</s>"  # closes every caption, and is all there is of the empty one

# Words without content are left out: they would fill a third of the tokens and push the neighbours that matter apart.
SKIPPED = frozenset({"a", "an", "and", "in", "is", "of", "on", "picture", "the", "to", "with"})

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]")
_GOLDEN = 0x9E3779B97F4A7C15


class HashedText:
    """Encodes captions as ragged features, padded with zeros.

    Args:
        max_tokens: tokens kept, the end token included; longer captions lose their end and are counted in `truncated`.
        word_channels: length of a word's vector.
        before, after: how many words on either side a token carries.
        position_channels: length of the position's code (sines and cosines, so an even number).

    Raises ValueError for a negative or odd size.
    """

    def __init__(
        self,
        max_tokens: int = 16,
        word_channels: int = 32,
        before: int = 3,
        after: int = 3,
        position_channels: int = 32,
    ):
        if min(max_tokens, word_channels) < 1 or min(before, after, position_channels) < 0 or position_channels % 2:
            raise ValueError("HashedText takes positive lengths and channels, and an even number of position_channels")
        self.max_tokens, self.word_channels, self.position_channels = max_tokens, word_channels, position_channels
        self.before, self.after = before, after
        self.channels = word_channels * (before + 1 + after) + position_channels
        self.truncated = 0
        self._vectors: dict[str, np.ndarray] = {}
        self._positions = _sinusoids(max_tokens, position_channels)

    @classmethod
    def load(cls, folder: Path) -> "HashedText":
        """What `save` wrote. Raises OSError, ValueError."""
        return cls(
            **{name: value for name, value in read_json(folder / "config.json").items() if name != "_class_name"}
        )

    def save(self, folder: Path) -> None:
        """Its sizes, as `config.json`."""
        names = ("max_tokens", "word_channels", "before", "after", "position_channels")
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, **{name: getattr(self, name) for name in names}}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def cut(self, caption: str) -> str:
        """What of a caption `encode` leaves out, or ""."""
        return " ".join(tokenize(caption)[self.max_tokens - 1 :])

    def free(self) -> None:
        """There are no weights to free: as a T5's."""

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features fp32 `[B, max_tokens, channels]`, zero after a caption's end; lengths int64 `[B]`, at least 1."""
        words = np.zeros((len(captions), self.before + self.max_tokens + self.after, self.word_channels), np.float32)
        lengths = np.zeros(len(captions), np.int64)
        for row, caption in enumerate(captions):
            tokens = [*tokenize(caption), END]
            if len(tokens) > self.max_tokens:
                self.truncated += 1
                tokens = [*tokens[: self.max_tokens - 1], END]
            lengths[row] = len(tokens)
            words[row, self.before : self.before + len(tokens)] = [self._word_vector(token) for token in tokens]
        windows = np.lib.stride_tricks.sliding_window_view(words, self.before + 1 + self.after, axis=1)  # [B, L, C, W]
        features = np.empty((len(captions), self.max_tokens, self.channels), np.float32)
        split = self.channels - self.position_channels
        features[..., :split] = windows.swapaxes(2, 3).reshape(*windows.shape[:2], split)
        features[..., split:] = self._positions
        features[np.arange(self.max_tokens) >= lengths[:, None]] = 0
        return torch.from_numpy(features), torch.from_numpy(lengths)

    def _word_vector(self, word: str) -> np.ndarray:
        if word not in self._vectors:
            self._vectors[word] = self._hash_word(word)
        return self._vectors[word]

    def _hash_word(self, word: str) -> np.ndarray:
        """Signs `[word_channels]`: bits of SplitMix64 seeded with the CRC of the word."""
        counter = np.arange(1, -(-self.word_channels // 64) + 1, dtype=np.uint64)
        bits = zlib.crc32(word.encode()) + counter * np.uint64(_GOLDEN)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = (bits ^ (bits >> np.uint64(31))).astype("<u8").view(np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self.word_channels].astype(np.float32) * 2 - 1


def tokenize(caption: str) -> list[str]:
    """Lower-case words and single punctuation marks, without those in `SKIPPED`."""
    return [word for word in _WORD.findall(caption.lower()) if word not in SKIPPED]


def _sinusoids(length: int, channels: int) -> np.ndarray:
    """The position code of "Attention Is All You Need" (section 3.5): fp32 `[length, channels]`."""
    rates = 1 / 100 ** (np.arange(channels // 2) / max(channels // 2, 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.silu(self.conv(F.silu(x))))


class Autoencoder(nn.Module):
    """RGB pictures to latents with 8 channels and an eighth of their sides, and back: 32x32 to `[8, 4, 4]`.

    Space-to-depth does the down-sampling, so that a batch is encoded in a few milliseconds on one core. Every channel
    of the latents has mean 0 and deviation 1 over the training pictures: the statistics are buffers of `norm`.
    """

    downsample = 8
    latent_size = IMAGE_SIZE // downsample
    file_name = "autoencoder.safetensors"  # in a model folder's vae/

    def __init__(self, latent_channels: int = 8, width: int = 48):
        super().__init__()
        self.latent_channels = latent_channels
        wide = width * 4 // 3
        self.encoder = nn.Sequential(  # [B, 3, 32, 32]
            nn.PixelUnshuffle(4),  # [B, 48, 8, 8]
            nn.Conv2d(48, width, 3, padding=1),
            Residual(width),
            nn.PixelUnshuffle(2),  # [B, 4 * width, 4, 4]
            nn.Conv2d(4 * width, wide, 1),
            Residual(wide),
            nn.Conv2d(wide, latent_channels, 1),  # [B, 8, 4, 4]
        )
        self.norm = nn.BatchNorm2d(latent_channels, affine=False, momentum=None)  # momentum None: plain averages
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, wide, 3, padding=1),
            Residual(wide),
            nn.Conv2d(wide, 4 * width, 1),
            nn.PixelShuffle(2),  # [B, width, 8, 8]
            Residual(width),
            Residual(width),
            nn.Conv2d(width, 4 * width // 2, 1),
            nn.PixelShuffle(2),  # [B, width / 2, 16, 16]
            Residual(width // 2),
            nn.Conv2d(width // 2, 12, 3, padding=1),
            nn.PixelShuffle(2),  # [B, 3, 32, 32]
        )

    def encode(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1], sides that divide by 8, to latents `[B, latent_channels, H / 8, W / 8]`.

        Raises ValueError.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.downsample for side in images.shape[2:]):
            raise ValueError(f"images must be [B, 3, H, W], H and W divisible by 8, not {list(images.shape)}")
        return self.norm(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, latent_channels, h, w]` to pictures `[B, 3, 8 h, 8 w]`, not clipped. Raises ValueError."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be [B, {self.latent_channels}, h, w], not {list(latents.shape)}")
        return self.decoder(latents)

    @classmethod
    def load(cls, path: str | Path) -> "Autoencoder":
        """The trained autoencoder: fp32, frozen, in eval mode."""
        weights = load_file(path)
        model = cls(latent_channels=len(weights["norm.running_mean"]), width=len(weights["encoder.1.bias"]))
        model.load_state_dict(weights)
        return model.float().eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write the weights in half precision; `load` reads them."""
        save_file({name: x.half() if x.is_floating_point() else x for name, x in self.state_dict().items()}, path)
