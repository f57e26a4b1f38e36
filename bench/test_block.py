"""Group `block`: one transformer block, and a forward pass of the model, beside diffusers' class.

python -m pytest bench --benchmark-only -k block
"""

import pytest
import torch

from bench import models
from bench.measure import DEVICE
from pixart_fast.config import SIZES

BF16 = torch.bfloat16
XL = SIZES["XL"]


# Few blocks of a forward pass say the same at small scale.
@pytest.mark.sizes("passes, pixels, batch", small=[], full=[("forward", 256, 32), ("forward+backward", 256, 32)])
@pytest.mark.paths(*models.EVERYWHERE)
def test_block(row, passes, pixels, batch, path):
    workload = models.Workload(XL._replace(layers=1), pixels, batch, BF16, DEVICE)
    row(models.block(passes, workload, models.EVERYWHERE), path)


@pytest.mark.sizes("layers, pixels, batch", small=[(2, 256, 2)], full=[(28, 256, 32), (28, 512, 8), (28, 1024, 2)])
@pytest.mark.paths(*models.PATHS)
def test_forward_of_blocks(row, layers, pixels, batch, path):
    names = models.PATHS if pixels == 256 else models.NEAREST
    if path not in names:
        pytest.skip("measured at 256 px")
    row(models.forward(models.Workload(XL._replace(layers=layers), pixels, batch, BF16, DEVICE), names), path)
