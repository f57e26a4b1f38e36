"""Group `loader`: stored features to batches, per worker, beside what a training step of an H100 takes.

python -m pytest bench --benchmark-only -k loader

The store is small and stays in the page cache: what is measured is reading, checking, padding and handing over, not
the disk, which has to give `mb_per_s`. Batches are those of XL/2 at 256 px with T5-XXL's features.
"""

from contextlib import closing

import pytest

from bench.conftest import device_name
from bench.loader import TOKENS, Loader, demand
from bench.measure import DEVICE

BATCH = 32  # rows
COUNT = 256  # samples in the store
PART, ROUNDS = 8, 3  # batches in a round


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader(benchmark, workers):
    with closing(Loader(BATCH, workers, COUNT)) as loader:
        loader.take(1)  # the workers are started
        assert benchmark.pedantic(loader.take, (PART,), rounds=ROUNDS, warmup_rounds=1) == PART * BATCH
    benchmark.group = "loader"
    if not benchmark.enabled:
        return
    rate = PART * BATCH / benchmark.stats.stats.median
    h100 = demand("h100")
    needed = max(h100["planned"], h100["at_40_percent_mfu"])
    benchmark.extra_info.update(
        op="loader",
        path=f"{workers} workers",
        what=f"{TOKENS} tokens of T5-XXL and latents of 256 px, {loader.bytes_of_one / 1e6:.2f} MB, {BATCH} a batch",
        device=device_name(DEVICE),
        workers=workers,
        images_per_s=round(rate, 1),
        images_per_s_of_a_worker=round(rate / max(workers, 1), 1),
        mb_per_s=round(rate * loader.bytes_of_one / 1e6, 1),
        h100_images_per_s={name: of if isinstance(of, str) else round(of, 1) for name, of in h100.items()},
        mb_per_s_for_an_h100=round(needed * loader.bytes_of_one / 1e6, 1),
        workers_for_an_h100=round(needed * max(workers, 1) / rate, 2),
    )
