"""A feature store as the training loop reads it: batches of one bucket, captions as ragged text, micro-conditions.

Neither text encoder nor autoencoder is here: what they gave lies in the store (train/data/store.py).
"""

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pixart_fast.aspect import BUCKETS
from pixart_fast.recipe import PUBLISHED, Recipe
from train.data.buckets import BucketBatches, rows_by_tokens
from train.data.source import Rows, save_schedule
from train.data.store import FeatureStore, Sample
from train.settings import Settings, UserError

MicroConditions = Literal["none", "original", "bucket", "exact"]
NullMask = Literal["own", "cond"]


class FeaturesSource:
    """The samples of a store, in batches that all processes take from the same bucket.

    Args:
        store: where they lie.
        seed: the run's; with the step's number it chooses the samples.
        batch_size: samples of an optimizer step, over all processes.
        token_budget: instead, image tokens of an optimizer step: buckets of smaller pictures get larger batches.
        multiple: what a budgeted batch must divide by, processes times accumulation.
        patch_size: the model's, by which image tokens are counted.
        micro_conditions: what the model is told of a picture: nothing ("none"); its original height and width and its
            bucket's key ("original", PixArt-α's training); the bucket's height and width and its key ("bucket"), or
            their exact quotient ("exact", diffusers' pipeline).
        null_mask: how many tokens of the null caption stand where a caption is dropped: as many as it has ("own"), or
            no more than the caption ("cond", PixArt-α's training).
        null_caption: `[L, caption_channels]`, the embedding of an α checkpoint; None: the store's features of the
            empty caption.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        seed: int,
        batch_size: int | None = None,
        token_budget: int | None = None,
        multiple: int = 1,
        patch_size: int = 2,
        micro_conditions: MicroConditions = "none",
        null_mask: NullMask = "own",
        null_caption: Tensor | None = None,
    ):
        if (batch_size is None) == (token_budget is None):
            raise ValueError("give either batch_size or token_budget.")
        for value, known in ((micro_conditions, MicroConditions), (null_mask, NullMask)):
            if value not in get_args(known):
                raise ValueError(f"{value!r} is none of {', '.join(get_args(known))}.")
        self.store, self.micro_conditions, self.null_mask = store, micro_conditions, null_mask
        manifest = store.manifest
        self.latent_channels, self.latent_size = manifest.latent_channels, manifest.resolution // manifest.downsample
        self.caption_channels, self.max_tokens = manifest.caption_channels, manifest.max_tokens
        self.null = "t5_empty" if null_caption is None else "checkpoint"
        null_caption = store.null_caption if null_caption is None else null_caption
        self.null_caption = None if null_caption is None else null_caption.float()
        self.num_classes = None if manifest.classes is None else len(manifest.classes)
        square = (manifest.resolution, manifest.resolution)
        self.sizes = {key: BUCKETS[square[0]][key] if manifest.multi_aspect else square for key in store.buckets}
        side = manifest.downsample * patch_size
        tokens = {key: (height // side) * (width // side) for key, (height, width) in self.sizes.items()}
        rows = batch_size if token_budget is None else rows_by_tokens(tokens, token_budget, multiple)
        self.batches = BucketBatches({key: len(indices) for key, indices in store.buckets.items()}, rows, seed)
        self.most_rows = max(self.batches.rows)

    def plan(self, step: int) -> np.ndarray:
        """Indices of the samples, int64, of optimizer step `step` (from 0), over all processes; all of one bucket."""
        key, places = self.batches.batch(step)
        return self.store.buckets[key][places]

    def fetch(self, indices: np.ndarray, dropped: np.ndarray) -> Rows:
        """Samples of one bucket; where `dropped [B]` is set, with the null caption or class in place of their own.

        Text is padded to the longest of these captions. Raises UserError that names the sample where a feature is NaN
        or infinite, and the store's own where it is damaged.
        """
        samples = [self.store.read(int(index)) for index in indices]
        for index, sample in zip(indices, samples, strict=True):
            self._check_finite(int(index), sample)
        manifest = self.store.manifest
        mean = (torch.stack([sample.mean for sample in samples]) - manifest.shift_factor) * manifest.scaling_factor
        std = label = text = mask = None
        if samples[0].std is not None:
            std = torch.stack([sample.std for sample in samples]) * manifest.scaling_factor
        if self.num_classes is not None:
            labels = [self.num_classes if drop else sample.label for sample, drop in zip(samples, dropped, strict=True)]
            label = torch.tensor(labels)
        if self.caption_channels is not None:
            text, mask = self._captions(samples, dropped)
        return Rows(mean, std, text, mask, label, *self._micro_conditions(samples))

    def _captions(self, samples: list[Sample], dropped: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features `[B, L, caption_channels]` in the store's dtype, zeros beyond each caption, and a mask `[B, L]`."""
        captions = [self._null(sample) if drop else sample.text for sample, drop in zip(samples, dropped, strict=True)]
        lengths = torch.tensor([len(caption) for caption in captions])
        text = torch.zeros(len(captions), int(lengths.max()), self.caption_channels, dtype=samples[0].text.dtype)
        for row, caption in zip(text, captions, strict=True):
            row[: len(caption)] = caption
        return text, torch.arange(text.shape[1]) < lengths[:, None]

    def _null(self, sample: Sample) -> Tensor:
        """The null caption in place of a sample's own."""
        return self.null_caption if self.null_mask == "own" else self.null_caption[: len(sample.text)]

    def _micro_conditions(self, samples: list[Sample]) -> tuple[Tensor | None, Tensor | None]:
        """Height and width `[B, 2]` and aspect ratio `[B, 1]`, fp32; None where the model is told nothing."""
        if self.micro_conditions == "none":
            return None, None
        buckets = [self.sizes[sample.bucket] for sample in samples]
        sizes = [sample.size for sample in samples] if self.micro_conditions == "original" else buckets
        if self.micro_conditions == "exact":
            ratios = [height / width for height, width in buckets]
        else:
            ratios = [float(sample.bucket) for sample in samples]
        return torch.tensor(sizes, dtype=torch.float32), torch.tensor(ratios, dtype=torch.float32)[:, None]

    def _check_finite(self, index: int, sample: Sample) -> None:
        named = {"latent mean": sample.mean, "latent deviation": sample.std, "text": sample.text}
        for name, feature in named.items():
            # isfinite() of every number would take five times as long as reading the sample.
            if feature is not None and not torch.stack(feature.aminmax()).isfinite().all():
                raise UserError(
                    f"sample {index} ({self.store.name(index)}, bucket {sample.bucket}): its {name} is not finite; "
                    "extract the store again, without it or in bf16."
                )

    def save(self, folder: Path, settings: Settings) -> None:
        """The schedule, and a recipe of what the model was told. Text encoder and autoencoder are not written: they
        lie where the extraction found them."""
        save_schedule(folder, settings.diffusion)
        if self.caption_channels is None:
            return
        text = self.store.manifest.encoders["text"]
        family = "sigma" if self.max_tokens == PUBLISHED["sigma"].max_tokens else "alpha"
        Recipe(
            family=family if "clean" in text else "embedded",
            max_tokens=self.max_tokens,
            clean=text.get("clean", False),
            keep_cjk=text.get("keep_cjk", True),
            null=self.null,
            null_mask=self.null_mask,
            **({} if self.micro_conditions == "none" else {"micro_conditions": self.micro_conditions}),
            guidance=settings.sampling.guidance,
        ).save(folder)
