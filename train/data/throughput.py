"""How fast stored features become batches: `python -m train.data.throughput [STORE] --workers 2`.

Without a store it makes one of random features as PixArt-α's stages at 256 px have them: latents of 4 x 32 x 32 and
dense captions of 92 tokens of T5-XXL, give or take, 0.77 MB a sample. With `--ask` a line "N" on the standard input
makes it take N batches and answer with their samples: so another process can time it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from train.data import store
from train.data.features import FeaturesSource
from train.data.source import Batch, Steps, load_steps
from train.settings import DEFAULT, UserError, load_settings

TOKENS, MAX_TOKENS, WIDTH = 92, 120, 4096


def write_store(folder: Path, count: int, *, tokens: int = TOKENS, width: int = WIDTH) -> store.FeatureStore:
    """A store of random features in one shard: captions of `tokens` in the mean, at least half as many."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        length = int(torch.randint(tokens // 2, tokens + tokens // 2 + 1, (), generator=generator))
        mean, std = torch.randn(2, 4, 32, 32, generator=generator)
        text = torch.randn(min(length, MAX_TOKENS), width, generator=generator).bfloat16()
        samples.append(store.Sample(mean, std.abs(), text, None, (256, 256), "1.0"))
    shard = f"{store.SHARDS}/00000.safetensors"
    (folder / store.SHARDS).mkdir(parents=True)
    store.write_shard(folder / shard, samples, [(str(number), None) for number in range(count)], torch.float16)
    store.write_tensors(folder / store.NULL_CAPTION, {"null_caption": torch.zeros(1, width, dtype=torch.bfloat16)})
    manifest = store.Manifest(
        resolution=256,
        multi_aspect=False,
        latent_channels=4,
        downsample=8,
        latent_dtype="fp16",
        scaling_factor=0.18215,
        shift_factor=0.0,
        caption_channels=width,
        max_tokens=MAX_TOKENS,
        classes=None,
        encoders={},
        sources=[],
        count=count,
        buckets={"1.0": count},
        left_out={},
        shards=[store.describe(folder, shard, count)],
    )
    store.complete(folder, manifest, ["1.0"] * count, {})
    return store.FeatureStore(folder)


def batches(of: store.FeatureStore, rows: int, workers: int) -> Iterator[Batch]:
    """The batches of a run of one process, as many as one asks for; what was prepared ahead is thrown away."""
    settings = load_settings(DEFAULT, [f"batch_size={rows}", "steps=1000000"])
    steps = Steps(FeaturesSource(of, seed=0, batch_size=rows), settings, rank=0, processes=1)
    found = (batch for (batch,) in load_steps(steps, 0, workers, pin=False))
    return islice(found, 4 * workers + 1, None)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.data.throughput", description="Samples/s of a data loader.")
    parser.add_argument("store", nargs="?", type=Path, help="a folder of train.data.extract (random features)")
    parser.add_argument("--workers", type=int, default=1, help="0: in the training process (%(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="of a batch (%(default)s)")
    parser.add_argument("--count", type=int, default=256, help="samples of random features (%(default)s)")
    parser.add_argument("--batches", type=int, default=40, help="to take (%(default)s)")
    parser.add_argument("--ask", action="store_true", help="take batches when they are asked for on the standard input")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            of = (
                write_store(Path(folder, "store"), options.count)
                if options.store is None
                else store.FeatureStore(options.store)
            )
            found = batches(of, options.rows, options.workers)
            if options.ask:
                print(of.manifest.shards[0].bytes / of.manifest.shards[0].count, flush=True)
                for line in sys.stdin:
                    print(sum(len(batch.latents) for batch in islice(found, int(line))), flush=True)
                return 0
            begin = time.perf_counter()
            taken = sum(len(batch.latents) for batch in islice(found, options.batches))
            seconds = time.perf_counter() - begin
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(f"{taken / seconds:.0f} samples/s, {options.workers} workers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
