"""Group `train`: a training step, forward, backward and AdamW, beside diffusers' class.

python -m pytest bench --benchmark-only -k train
"""

import pytest
import torch

from bench import models
from bench.measure import DEVICE
from pixart_fast.config import SIZES

BF16 = torch.bfloat16


# Batches that fit 80 GB with nothing recomputed.
@pytest.mark.sizes("layers, pixels, batch", small=[(1, 256, 2)], full=[(28, 256, 32), (28, 512, 8), (28, 1024, 2)])
@pytest.mark.paths(*models.EVERYWHERE)
def test_train_step(row, layers, pixels, batch, path):
    names = models.EVERYWHERE if pixels == 256 else models.NEAREST
    if path not in names:
        pytest.skip("measured at 256 px")
    workload = models.Workload(SIZES["XL"]._replace(layers=layers), pixels, batch, BF16, DEVICE)
    row(models.train_step(workload, names), path)


@pytest.mark.paths(*models.EVERYWHERE)
def test_train_step_of_the_embedded_default(row, path):
    """The model of `make train` at its batch: 16 tokens a picture, captions of 16."""
    workload = models.Workload(SIZES["scenes"], 32, 64, torch.float32, DEVICE, tokens=16, channels=128, patch=1)
    row(models.train_step(workload, models.EVERYWHERE), path)
