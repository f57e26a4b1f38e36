"""Batches: a step's samples do not depend on processes, accumulation or loader workers."""

import numpy as np
import pytest
import torch

from train.data.source import Batch, ScenesSource, Steps, draw, load_steps
from train.settings import DEFAULT, Diffusion, load_settings


@pytest.fixture(scope="module")
def source():
    settings = load_settings(DEFAULT, [])
    return ScenesSource(settings.data, settings.seed)


def rows(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 4), (2, 3)])
def test_same_samples_however_they_are_dealt(source, processes, accumulation):
    whole = load_settings(DEFAULT, ["batch_size=12"])
    parts = load_settings(DEFAULT, ["batch_size=12", f"accumulation={accumulation}"])
    expected = rows(Steps(source, whole, 0, 1)[3])
    dealt = [batch for rank in range(processes) for batch in Steps(source, parts, rank, processes)[3]]
    assert all(len(batch.t) == 12 // processes // accumulation for batch in dealt)
    for name, mine, theirs in zip(dealt[0]._fields, rows(dealt), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 if name == "latents" else 0)


def test_loader_starts_anywhere_with_any_workers(source):
    settings = load_settings(DEFAULT, ["batch_size=4", "steps=5"])
    steps = Steps(source, settings, 0, 1)
    alone = list(load_steps(steps, 2, workers=0, pin=False))
    helped = list(load_steps(steps, 2, workers=2, pin=False))
    assert len(alone) == len(helped) == 3
    for mine, theirs in zip(alone, helped, strict=True):
        for name, a, b in zip(Batch._fields, rows(mine), rows(theirs), strict=True):
            # A worker encodes on one thread, whose sums round otherwise.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if name == "latents" else 0)
    assert torch.equal(rows(alone[0])[4], rows(steps[2])[4])


def test_draws_are_independent_and_of_the_stated_distribution():
    shape = (8, 4, 4)
    t, drop, noise = zip(*(draw(Diffusion(), 0, index, shape) for index in range(4000)), strict=True)
    noise = np.stack(noise)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(np.mean(t) - 499.5) < 20 and min(t) < 5 and max(t) > 994  # uniform: sd of the mean is 4.6
    assert abs(np.mean(np.array(drop) < 0.1) - 0.1) < 0.02
    assert not np.array_equal(draw(Diffusion(), 1, 0, shape)[2], draw(Diffusion(), 0, 0, shape)[2])
    logit = Diffusion(timesteps="logit_normal", logit_mean=1.0, logit_std=0.5)
    drawn = np.array([draw(logit, 0, index, shape)[0] for index in range(2000)]) / 1000
    assert abs(np.median(drawn) - 1 / (1 + np.exp(-1))) < 0.01


def test_caption_dropout_leaves_the_empty_caption(source):
    _, text, mask = source.fetch(range(4), np.array([True, False, True, False]))
    assert torch.equal(text[0], source.null_caption) and mask[0].sum() == 1
    assert mask[1].sum() > 3 and not torch.equal(text[1], source.null_caption)
