"""A feature store as the training loop reads it; the store here is a small one in memory."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.loader import demand
from pixart_fast.aspect import BUCKETS
from pixart_fast.recipe import read_recipe
from train.data.features import FeaturesSource
from train.data.source import Steps, load_steps
from train.data.store import FeatureStore, Sample
from train.data.throughput import write_store
from train.settings import DEFAULT, UserError, load_settings

CHANNELS, WIDTH = 4, 6
KEYS = ("0.52", "1.0", "1.46")


class Store:
    """Pictures of three aspects at 256 px, of a VAE with scale and shift, with captions or classes."""

    def __init__(self, count=30, *, multi_aspect=True, classes=None, posterior=True):
        self.manifest = SimpleNamespace(
            resolution=256,
            multi_aspect=multi_aspect,
            latent_channels=CHANNELS,
            downsample=8,
            scaling_factor=0.5,
            shift_factor=0.25,
            caption_channels=None if classes else WIDTH,
            max_tokens=None if classes else 12,
            classes=classes,
            encoders={"text": {"name": "t5", "clean": True, "keep_cjk": False}},
        )
        generator = torch.Generator().manual_seed(0)
        self.null_caption = None if classes else torch.randn(2, WIDTH, generator=generator).bfloat16()
        self.samples = []
        for index in range(count):
            bucket = KEYS[(0, 1, 1, 1, 2, 2)[index % 6]] if multi_aspect else "1.0"
            height, width = BUCKETS[256][bucket]
            shape = (CHANNELS, height // 8, width // 8)
            mean = torch.randn(shape, generator=generator)
            std = torch.rand(shape, generator=generator) if posterior else None
            text = None if classes else torch.randn(1 + index % 7, WIDTH, generator=generator).bfloat16()
            label = index % len(classes) if classes else None
            self.samples.append(Sample(mean, std, text, label, (300 + index, 400), bucket))
        of = np.array([sample.bucket for sample in self.samples])
        self.buckets = {key: np.flatnonzero(of == key) for key in KEYS if key in of}

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        return self.samples[index]

    def name(self, index):
        return f"{index:03}.jpg"


def source(store=None, **options):
    options = {"seed": 0, "batch_size": 4} | options
    return FeaturesSource(Store() if store is None else store, **options)


def undropped(indices):
    return np.zeros(len(indices), bool)


def test_what_the_model_is_built_for():
    features = source()
    assert (features.latent_channels, features.latent_size, features.caption_channels) == (CHANNELS, 32, WIDTH)
    assert features.max_tokens == 12 and features.num_classes is None
    assert torch.equal(features.null_caption, features.store.null_caption.float())
    classes = source(Store(multi_aspect=False, classes=["cat", "dog", "eel"]))
    assert (classes.num_classes, classes.caption_channels, classes.null_caption) == (3, None, None)


def test_a_step_takes_one_bucket_and_all_samples_come():
    features = source()
    seen = []
    for step in range(60):
        indices = features.plan(step)
        assert indices.dtype == np.int64 and len(indices) == 4
        assert len({features.store.samples[index].bucket for index in indices}) == 1
        rows = features.fetch(indices, undropped(indices))
        assert rows.mean.shape[0] == 4 and rows.mean.dtype == torch.float32
        seen.extend(indices)
    assert set(seen) == set(range(30))
    assert max(np.bincount(seen)) - min(np.bincount(seen)) <= 2


def test_latents_are_scaled_as_the_model_sees_them():
    features, indices = source(), source().plan(0)
    rows = features.fetch(indices, undropped(indices))
    for index, mean, std in zip(indices, rows.mean, rows.std, strict=True):
        sample = features.store.samples[index]
        assert torch.equal(mean, (sample.mean - 0.25) * 0.5)
        assert torch.equal(std, sample.std * 0.5), "a deviation has no shift"
    assert source(Store(posterior=False)).fetch(indices, undropped(indices)).std is None


def test_text_is_padded_to_the_longest_of_the_batch():
    features = source(Store(multi_aspect=False))
    rows = features.fetch(np.array([0, 3, 8]), undropped(range(3)))  # 1, 4 and 2 tokens
    assert rows.text.shape == (3, 4, WIDTH) and rows.text.dtype == torch.bfloat16
    assert rows.mask.dtype == torch.bool and rows.mask.sum(1).tolist() == [1, 4, 2]
    for index, text, mask in zip((0, 3, 8), rows.text, rows.mask, strict=True):
        assert torch.equal(text[mask], features.store.samples[index].text)
        assert not text[~mask].any() and mask[: mask.sum()].all()


@pytest.mark.parametrize(("null_mask", "tokens"), [("own", [2, 2, 4]), ("cond", [1, 2, 4])])
def test_a_dropped_caption(null_mask, tokens):
    """Its own mask, or no more tokens than the caption had; never more than the null caption has."""
    features = source(Store(multi_aspect=False), null_mask=null_mask)
    rows = features.fetch(np.array([0, 4, 3]), np.array([True, True, False]))  # 1, 5 and 4 tokens
    assert rows.mask.sum(1).tolist() == tokens
    null = features.store.null_caption
    assert torch.equal(rows.text[0][rows.mask[0]], null[: tokens[0]])
    assert torch.equal(rows.text[1][rows.mask[1]], null)
    assert torch.equal(rows.text[2], features.store.samples[3].text)


def test_the_null_caption_of_a_checkpoint():
    """α's has 120 tokens, of which a dropped caption keeps as many as it had."""
    null = torch.randn(12, WIDTH)
    features = source(Store(multi_aspect=False), null_caption=null, null_mask="cond")
    rows = features.fetch(np.array([4]), np.array([True]))
    assert torch.equal(rows.text[0], null[:5].bfloat16()) and torch.equal(features.null_caption, null)


def test_classes():
    features = source(Store(multi_aspect=False, classes=["cat", "dog", "eel"]))
    rows = features.fetch(np.array([4, 5, 6]), np.array([False, True, False]))
    assert rows.label.tolist() == [1, 3, 0] and rows.label.dtype == torch.int64
    assert rows.text is None and rows.mask is None


def test_micro_conditions_by_name():
    """Of sample 3, 303 x 400 before it was cropped to the bucket of key 1.46, 304 x 208."""
    store = Store()
    index = next(i for i, sample in enumerate(store.samples) if sample.bucket == "1.46")
    height, width = BUCKETS[256]["1.46"]
    told = {
        "original": ([300 + index, 400], 1.46),
        "bucket": ([height, width], 1.46),
        "exact": ([height, width], height / width),
    }
    assert height / width != 1.46
    for name, (size, ratio) in told.items():
        rows = source(store, micro_conditions=name).fetch(np.array([index]), undropped([index]))
        assert rows.resolution.tolist() == [size] and rows.resolution.dtype == torch.float32
        assert torch.equal(rows.aspect_ratio, torch.tensor([[ratio]]))
    assert source(store).fetch(np.array([index]), undropped([index]))[-2:] == (None, None)


def test_a_token_budget():
    """Smaller pictures in larger batches, divisible by what shares them; the bound is kept in every step."""
    features = source(batch_size=None, token_budget=16 * 256, multiple=4, patch_size=2)
    sides = {key: [side // 16 for side in BUCKETS[256][key]] for key in KEYS}
    counts = {}
    for step in range(20):
        indices = features.plan(step)
        bucket = features.store.samples[indices[0]].bucket
        counts[bucket] = len(indices)
        assert len(indices) % 4 == 0 and len(indices) * np.prod(sides[bucket]) <= 4096 and len(indices) >= 16
    assert counts["1.0"] == 16 and features.most_rows == max(counts.values())
    with pytest.raises(UserError, match="too small"):
        source(batch_size=None, token_budget=1000, multiple=4)
    with pytest.raises(ValueError, match="either"):
        source(token_budget=1000)


@pytest.mark.parametrize(("field", "name"), [("mean", "latent mean"), ("std", "deviation"), ("text", "text")])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_feature_that_is_not_finite(field, name, value):
    store = Store()
    bad = getattr(store.samples[7], field).clone()
    bad.view(-1)[-1] = value
    store.samples[7] = store.samples[7]._replace(**{field: bad})
    bucket = store.samples[7].bucket
    with pytest.raises(UserError, match=rf"sample 7 \(007.jpg, bucket {bucket}\): its .*{name} "):
        source(store).fetch(np.array([7]), undropped([7]))
    source(store).fetch(np.array([6]), undropped([6]))


def settings(*overrides):
    return load_settings(DEFAULT, ["batch_size=4", "steps=9", "data.caption_dropout=0.3", *overrides])


def assert_equal(left, right):
    for name, mine, theirs in zip(left._fields, left, right, strict=True):
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs)), name


def test_the_same_batches_with_any_number_of_workers():
    """And from any step on."""
    steps = Steps(source(micro_conditions="exact"), settings(), rank=0, processes=1)
    alone, *helped = ([batch for (batch,) in load_steps(steps, 3, workers, pin=False)] for workers in (0, 1, 2))
    assert len(alone) == 6 and len({batch.latents.shape for batch in alone}) > 1, "several buckets"
    for batches in helped:
        for mine, theirs in zip(batches, alone, strict=True):
            assert_equal(mine, theirs)


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 2)])
def test_the_same_samples_however_they_are_dealt(processes, accumulation):
    """All processes take their rows of a step from one bucket; only the padding of the text depends on the share."""
    features = source()
    for step in range(9):
        (whole,) = Steps(features, settings(), rank=0, processes=1)[step]
        parts = [
            batch
            for rank in range(processes)
            for batch in Steps(features, settings(f"accumulation={accumulation}"), rank, processes)[step]
        ]
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
        assert torch.equal(torch.cat([part.t for part in parts]), whole.t)
        texts = [row[mask] for part in parts for row, mask in zip(part.text, part.mask, strict=True)]
        for mine, row, mask in zip(texts, whole.text, whole.mask, strict=True):
            assert torch.equal(mine, row[mask])


def test_a_sample_has_other_noise_in_its_next_pass():
    features = source(Store(8, multi_aspect=False))
    steps = Steps(features, settings(), rank=0, processes=1)
    found = {}
    for step in range(8):
        (batch,) = steps[step]
        for index, t, noise in zip(features.plan(step), batch.t, batch.noise, strict=True):
            found.setdefault(int(index), []).append((int(t), noise))
    for draws in found.values():
        assert len(draws) == 4 and len({t for t, _ in draws}) > 1
        assert not torch.equal(draws[0][1], draws[1][1])


def test_a_model_folder_says_how_it_was_trained(tmp_path):
    features = source(null_mask="cond", micro_conditions="exact")
    features.save(tmp_path, settings("sampling.guidance=3"))
    recipe = read_recipe(tmp_path)
    assert (recipe.family, recipe.max_tokens, recipe.clean, recipe.keep_cjk) == ("alpha", 12, True, False)
    assert (recipe.null, recipe.null_mask, recipe.micro_conditions) == ("t5_empty", "cond", "exact")
    assert recipe.guidance == 3
    schedule = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert (schedule["beta_start"], schedule["beta_end"]) == pytest.approx((1e-4, 0.02))


def test_a_store_on_disk(tmp_path):
    """As train.data.store writes it, in forked workers too; a flipped byte reaches the loop as a sentence."""
    store = write_store(tmp_path / "store", 12, tokens=5, width=16)
    steps = Steps(FeaturesSource(store, seed=0, batch_size=4), settings(), rank=0, processes=1)
    alone, helped = ([batch for (batch,) in load_steps(steps, 0, workers, pin=False)] for workers in (0, 2))
    for mine, theirs in zip(helped, alone, strict=True):
        assert_equal(mine, theirs)
    shard = tmp_path / "store" / store.manifest.shards[0].name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    broken = FeaturesSource(FeatureStore(tmp_path / "store"), seed=0, batch_size=12)
    for workers in (0, 1):
        steps = Steps(broken, settings("batch_size=12"), rank=0, processes=1)
        error = next(iter(load_steps(steps, 0, workers, pin=False)))
        assert isinstance(error, UserError) and "00000.safetensors is damaged" in str(error)


def test_what_a_training_step_takes():
    """28 · 14 · 1152² of XL/2's parameters see each of 256 tokens: 6 FLOP for each, and attention and text besides."""
    at_least = 6 * 256 * 28 * 14 * 1152**2
    h100, a100 = demand("h100"), demand("a100")
    assert 0.85 < h100["at_40_percent_mfu"] * at_least / (0.4 * 989e12) < 1
    assert h100["at_40_percent_mfu"] / a100["at_40_percent_mfu"] == pytest.approx(989 / 312)
    assert a100["planned"] < h100["planned"] and h100["known"] in ("measured", "carried over", "assumed")
