"""A text encoder without weights to train or download, in the place of T5.

Every word has a fixed vector of random signs, drawn from a hash of its letters. A token's feature is the concatenation
of the vectors of the words around it and of a code of its position: "circle" in "a large red circle in the top left"
carries "large", "red", "top" and "left" in slots of their own, and the model's caption projection learns what to make
of them. Random features of text are a strong baseline (Wieting & Kiela 2019, arXiv 1901.10444).
"""

import re
import zlib

import numpy as np
import torch

END = "</s>"  # closes every caption, and is all there is of the empty one

# Words without content are left out: they would fill a third of the tokens and push the neighbours that matter apart.
SKIPPED = frozenset({"a", "an", "and", "in", "is", "of", "on", "picture", "the", "to", "with"})

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]")
_GOLDEN = 0x9E3779B97F4A7C15


class HashedText:
    """Encodes captions as ragged features, padded with zeros.

    Args:
        max_length: tokens kept, the end token included; longer captions lose their end and are counted in `truncated`.
        word_channels: length of a word's vector.
        before, after: how many words on either side a token carries.
        position_channels: length of the position's code (sines and cosines, so an even number).

    Raises ValueError for a negative or odd size.
    """

    def __init__(
        self,
        max_length: int = 16,
        word_channels: int = 32,
        before: int = 3,
        after: int = 3,
        position_channels: int = 32,
    ):
        if min(max_length, word_channels) < 1 or min(before, after, position_channels) < 0 or position_channels % 2:
            raise ValueError("HashedText takes positive lengths and channels, and an even number of position_channels")
        self.max_length, self.word_channels, self.position_channels = max_length, word_channels, position_channels
        self.before, self.after = before, after
        self.channels = word_channels * (before + 1 + after) + position_channels
        self.truncated = 0
        self._vectors: dict[str, np.ndarray] = {}
        self._positions = _sinusoids(max_length, position_channels)

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features fp32 `[B, max_length, channels]`, zero after a caption's end; lengths int64 `[B]`, at least 1."""
        words = np.zeros((len(captions), self.before + self.max_length + self.after, self.word_channels), np.float32)
        lengths = np.zeros(len(captions), np.int64)
        for row, caption in enumerate(captions):
            tokens = [*tokenize(caption), END]
            if len(tokens) > self.max_length:
                self.truncated += 1
                tokens = [*tokens[: self.max_length - 1], END]
            lengths[row] = len(tokens)
            words[row, self.before : self.before + len(tokens)] = [self._word_vector(token) for token in tokens]
        windows = np.lib.stride_tricks.sliding_window_view(words, self.before + 1 + self.after, axis=1)  # [B, L, C, W]
        features = np.empty((len(captions), self.max_length, self.channels), np.float32)
        split = self.channels - self.position_channels
        features[..., :split] = windows.swapaxes(2, 3).reshape(*windows.shape[:2], split)
        features[..., split:] = self._positions
        features[np.arange(self.max_length) >= lengths[:, None]] = 0
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
