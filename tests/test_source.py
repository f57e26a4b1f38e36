"""Batches: a step's samples do not depend on processes, accumulation or loader workers."""

import numpy as np
import pytest
import torch

from train.data.scenes import CLASSES
from train.data.source import Batch, Rows, ScenesSource, Steps, draw, load_steps
from train.settings import DEFAULT, Diffusion, UserError, load_settings


@pytest.fixture(scope="module")
def source():
    settings = load_settings(DEFAULT, [])
    return ScenesSource(settings.data, settings.seed, batch_size=12)


def rows(batches):
    """The batches' rows together, field by field; None where there is nothing."""
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True)]


def assert_same(mine, theirs, latents):
    """Equal but for latents, within an absolute tolerance: encoded in other batches, on other threads, they round
    otherwise."""
    for name, a, b in zip(Batch._fields, rows(mine), rows(theirs), strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=latents if name == "latents" else 0)


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 4), (2, 3)])
def test_same_samples_however_they_are_dealt(source, processes, accumulation):
    whole = load_settings(DEFAULT, ["batch_size=12"])
    parts = load_settings(DEFAULT, ["batch_size=12", f"accumulation={accumulation}"])
    expected = rows(Steps(source, whole, 0, 1)[3])
    dealt = [batch for rank in range(processes) for batch in Steps(source, parts, rank, processes)[3]]
    assert all(len(batch.t) == 12 // processes // accumulation for batch in dealt)
    assert_same(dealt, [Batch(*expected)], latents=1e-6)


def test_loader_starts_anywhere_with_any_workers(source):
    settings = load_settings(DEFAULT, ["batch_size=12", "steps=5"])
    steps = Steps(source, settings, 0, 1)
    alone = list(load_steps(steps, 2, workers=0, pin=False))
    helped = list(load_steps(steps, 2, workers=2, pin=False))
    assert len(alone) == len(helped) == 3
    for mine, theirs in zip(alone, helped, strict=True):
        assert_same(mine, theirs, latents=1e-5)
    assert torch.equal(alone[0][0].noise, steps[2][0].noise)


def test_what_stops_the_preparation_reaches_the_loop_as_it_is(source, monkeypatch):
    """Not as a worker's stack trace."""
    monkeypatch.setattr(source, "fetch", lambda *_: (_ for _ in ()).throw(UserError("sample 7 is torn")))
    settings = load_settings(DEFAULT, ["batch_size=12", "steps=5"])
    for workers in (0, 1):
        (prepared, *_) = load_steps(Steps(source, settings, 0, 1), 3, workers=workers, pin=False)
        assert isinstance(prepared, UserError) and str(prepared) == "sample 7 is torn"


def test_draws_are_independent_and_of_the_stated_distribution():
    t, drop, generators = zip(*(draw(Diffusion(), 0, number) for number in range(4000)), strict=True)
    noise = np.stack([generator.standard_normal((8, 4, 4)) for generator in generators])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(np.mean(t) - 499.5) < 20 and min(t) < 5 and max(t) > 994  # uniform: sd of the mean is 4.6
    assert abs(np.mean(np.array(drop) < 0.1) - 0.1) < 0.02
    first, other = (draw(Diffusion(), seed, 0)[2].standard_normal(9) for seed in (1, 0))
    assert not np.array_equal(first, other)
    logit = Diffusion(timesteps="logit_normal", logit_mean=1.0, logit_std=0.5)
    drawn = np.array([draw(logit, 0, number)[0] for number in range(2000)]) / 1000
    assert abs(np.median(drawn) - 1 / (1 + np.exp(-1))) < 0.01


def test_caption_dropout_leaves_the_empty_caption(source):
    rows = source.fetch(np.arange(4), np.array([True, False, True, False]))
    text, mask = rows.text, rows.mask
    assert torch.equal(text[0], source.null_caption) and mask[0].sum() == 1
    assert mask[1].sum() > 3 and not torch.equal(text[1], source.null_caption)


def test_classes_and_the_null_class():
    settings = load_settings(DEFAULT, [])
    source = ScenesSource(settings.data, settings.seed, classes=True)
    rows = source.fetch(np.arange(40), np.arange(40) % 4 == 0)
    drawn = source.scenes.batch(range(40)).scenes
    expected = [len(CLASSES) if i % 4 == 0 else scene.label for i, scene in enumerate(drawn)]
    assert rows.label.tolist() == expected and rows.text is None and source.num_classes == len(CLASSES) == 24


class Posterior:
    """A source with a VAE's posterior: mean 3, deviation 2."""

    most_rows = 4

    def plan(self, step):
        return np.arange(4) + 4 * step

    def fetch(self, indices, dropped):
        mean = torch.full((len(indices), 4, 8, 8), 3.0)
        return Rows(mean, torch.full_like(mean, 2.0), label=torch.zeros(len(indices), dtype=torch.int64))


def test_latents_are_drawn_from_the_posterior_apart_from_the_noise():
    settings = load_settings(DEFAULT, ["batch_size=4"])
    batches = [Steps(Posterior(), settings, 0, 1)[step][0] for step in range(50)]
    epsilon = torch.cat([(batch.latents - 3) / 2 for batch in batches])
    noise = torch.cat([batch.noise for batch in batches])
    assert abs(epsilon.mean()) < 0.02 and abs(epsilon.std() - 1) < 0.02
    assert abs((epsilon * noise).mean()) < 0.02  # independent
    again = Steps(Posterior(), settings, 0, 1)[7][0]
    assert torch.equal(again.latents, batches[7].latents)
