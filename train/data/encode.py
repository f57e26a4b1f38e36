"""Pictures and captions to samples: the autoencoder's posterior and the text encoder's features, as a store keeps them.

On a CPU each picture and each caption is encoded alone, on one thread: the sums in a convolution are ordered by the
size of the batch and the number of threads, and a sample is to have the same bits whoever computes it, and when.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pixart_fast.aspect import BUCKETS, nearest
from pixart_fast.embedded import HashedText
from pixart_fast.recipe import read_recipe
from pixart_fast.text import T5Text, fingerprint
from pixart_fast.vae import VAE
from train.data.raw import BadSample, Entry, RawData, decode, fit, read_bytes
from train.data.store import Manifest, Sample
from train.settings import UserError

MAX_RATIO = 4.0  # of the longer side to the shorter; PixArt-α was trained on nothing narrower
BATCH = 32  # samples that are prepared, and on a GPU encoded, together; always the same ones of a shard
TOO_NARROW = "too narrow"  # the reason of pictures that are sound, but beyond that
LATENT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Picture(NamedTuple):
    """A decoded picture, fitted to its bucket, with what belongs to it."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    size: tuple[int, int]  # height and width before
    bucket: str
    caption: str | None
    label: int | None


class Encoders:
    """The text encoder and autoencoder of a model folder; until they are loaded, they travel to another process.

    Args:
        model: a folder with `vae/` and, unless `classes`, `text_encoder/` and `tokenizer/`, as published or as
            `make train` leaves it. Captions are cleaned and cut as its recipe says.
        resolution: of the square; without `multi_aspect` every picture is cropped to it.
        multi_aspect: to the nearest of the buckets of that resolution.
        classes: samples have labels, and there is no text encoder.
        text_precision: one of `pixart_fast.text.PRECISIONS`; features are kept in bf16.
        latent_dtype: "fp16" or "bf16". The autoencoder computes in fp32.

    Raises UserError where the folder or the resolution will not do.
    """

    def __init__(
        self,
        model: Path,
        *,
        resolution: int,
        multi_aspect: bool = False,
        classes: bool = False,
        text_precision: str = "bf16",
        latent_dtype: str = "fp16",
        device: str = "cpu",
    ):
        self.resolution, self.multi_aspect, self.latent_dtype = resolution, multi_aspect, latent_dtype
        self.device = torch.device(device)
        if multi_aspect and resolution not in BUCKETS:
            known = ", ".join(map(str, BUCKETS))
            raise UserError(
                f"there are no aspect-ratio buckets for {resolution} px, only for {known}: take one of these."
            )
        self.text: T5Text | HashedText | None = None
        self.null_caption: Tensor | None = None  # `[L, caption_channels]` bf16, once loaded
        try:
            self.vae = VAE(model / "vae", self.device, torch.float32)
            recipe = read_recipe(model, null_caption=False)
            if not classes and recipe.family == "embedded":
                self.text = HashedText.load(model / "text_encoder")
            elif not classes:
                self.text = T5Text(
                    model,
                    max_tokens=recipe.max_tokens,
                    precision=text_precision,
                    device=self.device,
                    clean=recipe.clean,
                    keep_cjk=recipe.keep_cjk,
                )
            self.described = self._describe(model, text_precision)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        if resolution < 1 or resolution % self.vae.downsample:
            raise UserError(
                f"resolution {resolution} does not divide by {self.vae.downsample}, the autoencoder's: take "
                f"{max(1, round(resolution / self.vae.downsample)) * self.vae.downsample}."
            )

    def _describe(self, model: Path, text_precision: str) -> dict[str, dict[str, Any]]:
        """Names, precisions and SHA-256 of the encoders."""
        config = self.vae.config
        name = config.get("_name_or_path") or config["_class_name"]
        described = {"vae": {"name": name, "precision": "fp32", "sha256": _fingerprint(model / "vae")}}
        if isinstance(self.text, T5Text):
            described["text"] = {
                "name": self.text.config.get("_name_or_path") or self.text.config["model_type"],
                "precision": text_precision,
                "clean": self.text.clean,
                "keep_cjk": self.text.keep_cjk,
                "sha256": _fingerprint(model / "text_encoder"),
                "tokenizer_sha256": _fingerprint(model / "tokenizer"),
            }
        elif self.text is not None:
            described["text"] = {"name": type(self.text).__name__, "sha256": _fingerprint(model / "text_encoder")}
        return described

    def manifest(self, raw: RawData, keys: list[str], left_out: Mapping[str, str], **more: Any) -> Manifest:
        """What a store says of itself that has samples of these buckets; `more` is what there is to say besides."""
        buckets = Counter(keys)
        config = self.vae.config
        if self.vae.embedded:
            config = {"latent_channels": self.vae.model.latent_channels, "scaling_factor": 1.0}
        return Manifest(
            resolution=self.resolution,
            multi_aspect=self.multi_aspect,
            latent_channels=config["latent_channels"],
            downsample=self.vae.downsample,
            latent_dtype=self.latent_dtype,
            scaling_factor=config["scaling_factor"],
            shift_factor=config.get("shift_factor") or 0.0,
            caption_channels=None if self.text is None else self.text.channels,
            max_tokens=None if self.text is None else self.text.max_tokens,
            classes=raw.classes,
            encoders=self.described,
            sources=[{"path": str(raw.root), "kind": raw.kind}],
            count=len(keys),
            buckets={key: buckets[key] for key in sorted(buckets, key=float)},
            left_out=dict(Counter(reason.partition(":")[0] for reason in left_out.values()).most_common()),
            **more,
        )

    def prepare(self, data: bytes, caption: str | None, label: int | None) -> Picture:
        """A picture file to a picture of its bucket. Raises BadSample."""
        image = decode(data)
        width, height = image.size
        if max(width, height) > MAX_RATIO * min(width, height):
            raise BadSample(f"{TOO_NARROW}: {width}x{height}")
        key, *fitted = "1.0", self.resolution, self.resolution
        if self.multi_aspect:
            key, *fitted = nearest(height / width, self.resolution)
        return Picture(np.asarray(fit(image, *fitted)), (height, width), key, caption, label)

    def prepare_all(
        self, root: Path, entries: list[Entry], threads: int
    ) -> Iterator[list[tuple[Entry, Picture | BadSample]]]:
        """Each `BATCH` entries in a row, with the picture or what is wrong with it; one batch ahead of the caller."""

        def prepare(entry: Entry) -> tuple[Entry, Picture | BadSample]:
            try:
                return entry, self.prepare(read_bytes(root, entry), entry.caption, entry.label)
            except BadSample as error:
                return entry, error

        with ThreadPoolExecutor(threads) as pool:
            ahead: list = []
            for start in range(0, len(entries), BATCH):
                batch = [pool.submit(prepare, entry) for entry in entries[start : start + BATCH]]
                if ahead:
                    yield [future.result() for future in ahead]
                ahead = batch
            yield [future.result() for future in ahead]

    def load(self) -> None:
        """Load the weights and encode the empty caption, if that is not done. Raises UserError."""
        try:
            self.vae.model  # noqa: B018
            if self.text is not None and self.null_caption is None:
                with one_thread():
                    (self.null_caption,) = self.encode_text([""])
        except (OSError, ValueError) as error:
            raise UserError(f"the encoders cannot be loaded: {error}") from error

    @torch.no_grad()
    def encode(self, pictures: list[Picture]) -> list[Sample]:
        """Samples as a store gives them back. Values that are not finite stay so (`fault`)."""
        if self.device.type == "cpu":
            with one_thread():
                return [self._encode([picture])[0] for picture in pictures]
        return self._encode(pictures) if pictures else []

    def _encode(self, pictures: list[Picture]) -> list[Sample]:
        latents: dict[int, list[Tensor | None]] = {}
        for key in sorted({picture.bucket for picture in pictures}):
            places = [place for place, picture in enumerate(pictures) if picture.bucket == key]
            pixels = torch.from_numpy(np.stack([pictures[place].pixels for place in places]))
            latents |= zip(places, self._posterior(pixels.permute(0, 3, 1, 2)), strict=True)
        texts: list[Tensor | None] = [None] * len(pictures)
        if self.text is not None:
            texts = self.encode_text([picture.caption for picture in pictures])
        return [
            Sample(*latents[place], text, picture.label, picture.size, picture.bucket)
            for place, (picture, text) in enumerate(zip(pictures, texts, strict=True))
        ]

    def _posterior(self, pixels: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Mean and deviation of pictures uint8 `[B, 3, H, W]`, rounded as a store does."""
        images = pixels.to(self.device).float() / 127.5 - 1
        if self.vae.embedded:
            return [(mean, None) for mean in self._rounded(self.vae.encode(images))]
        posterior = self.vae.model.encode(images).latent_dist
        return list(zip(self._rounded(posterior.mean), self._rounded(posterior.std), strict=True))

    def _rounded(self, latents: Tensor) -> Tensor:
        return latents.to(LATENT_DTYPES[self.latent_dtype]).float().cpu()

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> list[Tensor]:
        """Features bf16 `[L, caption_channels]` of each caption, on the CPU, end token included."""
        features, lengths = self.text.encode(captions)
        return [row[:length].bfloat16().cpu() for row, length in zip(features, lengths.tolist(), strict=True)]


def _fingerprint(folder: Path) -> str:
    return fingerprint(path for path in folder.iterdir() if path.is_file())


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fault(sample: Sample) -> str | None:
    """The reason to leave out a sample in which an encoder gave NaN, or more than the store's dtype holds."""
    for name, feature in (("latents", sample.mean), ("latents", sample.std), ("text features", sample.text)):
        if feature is not None and not feature.isfinite().all():
            return f"its {name} are not finite"
    return None


class OnlineStore:
    """Samples computed when they are asked for: a FeatureStore's attributes and, on a CPU, its very bits.

    For small sets: every picture is decoded once at the start, to leave out the bad ones, and again when it is read.
    """

    def __init__(self, raw: RawData, encoders: Encoders, *, threads: int = 1):
        self.root, self.encoders = raw.root, encoders
        self.entries: list[Entry] = []
        keys: list[str] = []
        left_out = dict(raw.left_out)
        encoders.load()
        for batch in encoders.prepare_all(raw.root, raw.entries, threads):
            for entry, picture in batch:
                if isinstance(picture, BadSample):
                    left_out[entry.key] = str(picture)
                else:
                    self.entries.append(entry)
                    keys.append(picture.bucket)
        self.manifest = encoders.manifest(raw, keys, left_out)
        self.buckets = {key: np.flatnonzero(np.array(keys) == key) for key in self.manifest.buckets}
        self.null_caption = encoders.null_caption

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Sample:
        """A sample. Raises UserError where its file has changed since the start, IndexError."""
        entry = self.entries[index]
        try:
            picture = self.encoders.prepare(read_bytes(self.root, entry), entry.caption, entry.label)
        except BadSample as error:
            raise UserError(f"{entry.key} cannot be used any more ({error}): put it back as it was.") from error
        (sample,) = self.encoders.encode([picture])
        reason = fault(sample)
        if reason:
            raise UserError(f"{entry.key} cannot be used ({reason}): remove it and start again.")
        return sample

    def name(self, index: int) -> str:
        """Its name in its source."""
        return self.entries[index].key

    def caption(self, index: int) -> str | None:
        """Its caption as the source has it, before it is cleaned and cut."""
        return self.entries[index].caption
