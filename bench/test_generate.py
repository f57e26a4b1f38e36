"""Group `generate`: text features to latents with guidance, beside diffusers' class; and what each change brings.

python -m pytest bench --benchmark-only -k generate
python -m pytest bench --benchmark-only -k ladder     the rungs alone
"""

import pytest
import torch

from bench import models
from bench.measure import DEVICE, Case
from pixart_fast.config import SIZES

PATHS = models.EVERYWHERE
EVERY_SIZE = (*models.NEAREST, *models.EIGHT_BIT)
# Few steps of some blocks: what is done once for all blocks, or once for all steps, keeps about its share.
RUNS = pytest.mark.sizes(
    "layers, pixels, batch, steps",
    small=[(3, 256, 1, 3)],
    full=[(28, 256, 16, 20), (28, 256, 1, 20), (28, 512, 4, 20), (28, 1024, 1, 20)],
)


def case(layers: int, pixels: int, batch: int, steps: int) -> Case:
    workload = models.Workload(SIZES["XL"]._replace(layers=layers), pixels, batch, torch.bfloat16, DEVICE, steps=steps)
    return models.generate(workload, (*PATHS, *models.EIGHT_BIT, *models.RUNGS) if pixels == 256 else EVERY_SIZE)


@RUNS
@pytest.mark.paths(*PATHS, *models.EIGHT_BIT)
def test_generate(row, layers, pixels, batch, steps, path):
    if pixels != 256 and path not in EVERY_SIZE:
        pytest.skip("measured at 256 px")
    row(case(layers, pixels, batch, steps), path)


@RUNS
@pytest.mark.parametrize("rung", models.LADDER)
def test_generate_ladder(row, layers, pixels, batch, steps, rung):
    if pixels != 256:
        pytest.skip("measured at 256 px")
    of = case(layers, pixels, batch, steps)
    path = rung if rung in of.paths else models.SAME[rung]
    row(of, path, ladder={"path": rung, "rung": list(models.LADDER).index(rung)})
