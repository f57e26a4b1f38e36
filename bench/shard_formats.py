"""Containers for a store's shards: random access to rows as T5-XXL and a VAE make them, from the page cache.

    python -m bench.shard_formats [FOLDER] [--rows 400]

train/data/store.py keeps its shards as `Checked` does.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file

CHANNELS, MEAN_TOKENS, LATENT = 4096, 92, (2, 4, 32, 32)


def raw(tensor):
    return tensor.view(torch.uint8).numpy()


def checksum(*sample):
    return int(sum(tensor.view(-1).view(torch.int64).sum() for tensor in sample))


class Safetensors:
    """All tokens one after the other, all latents, and where each row's tokens end."""

    def write(self, path, samples):
        text, latents = zip(*samples, strict=True)
        sums = torch.tensor([checksum(*sample) for sample in samples])
        ends = torch.tensor([len(tokens) for tokens in text]).cumsum(0)
        save_file({"text": torch.cat(text), "latents": torch.stack(latents), "ends": ends, "sums": sums}, path)

    def open(self, path):
        file = safe_open(path, "pt")
        ends, sums = (file.get_tensor(name).tolist() for name in ("ends", "sums"))
        return file.get_slice("text"), file.get_slice("latents"), [0, *ends], sums

    def read(self, shard, row):
        text, latents, ends, _ = shard
        return text[ends[row] : ends[row + 1]].clone(), latents[row].clone()


class Checked(Safetensors):
    """The same, with the sum of each row's 64-bit words compared."""

    def read(self, shard, row):
        text, latent = super().read(shard, row)
        assert checksum(text, latent) == shard[3][row]
        return text, latent


class Arrow:
    """An Arrow IPC file, memory-mapped, with two binary columns."""

    def write(self, path, samples):
        columns = zip(*[[raw(tensor).tobytes() for tensor in sample] for sample in samples], strict=True)
        table = pa.table(dict(zip(("text", "latents"), (pa.array(c, pa.large_binary()) for c in columns), strict=True)))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    def open(self, path):
        return [column.chunk(0) for column in pa.ipc.open_file(pa.memory_map(str(path))).read_all().columns]

    def read(self, shard, row):
        text, latent = (torch.from_numpy(np.frombuffer(c[row].as_buffer(), np.uint8).copy()) for c in shard)
        return text.view(torch.bfloat16).view(-1, CHANNELS), latent.view(torch.float16).view(LATENT)


class Tar:
    """A tar with one safetensors member per row, found by offset: WebDataset's layout, with an index."""

    def write(self, path, samples):
        with tarfile.open(path, "w") as tar:
            for number, (text, latents) in enumerate(samples):
                member = tarfile.TarInfo(f"{number:06d}.safetensors")
                content = save({"text": text, "latents": latents})
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def open(self, path):
        with tarfile.open(path) as tar:
            return os.open(path, os.O_RDONLY), [(member.size, member.offset_data) for member in tar]

    def read(self, shard, row):
        file, places = shard
        return tuple(load(os.pread(file, *places[row]))[name] for name in ("text", "latents"))


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def read_all(kind, shard, order):
    for row in order:
        kind.read(shard, row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="where to write")
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(MEAN_TOKENS, 20, args.rows).astype(int), 8, 120)
    samples = [(torch.randn(n, CHANNELS).bfloat16(), torch.randn(LATENT).half()) for n in lengths]
    net = sum(tensor.nbytes for sample in samples for tensor in sample)
    print(f"{args.rows} rows of {net / args.rows / 1e3:.0f} kB")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in (Safetensors(), Checked(), Arrow(), Tar()):
            path = Path(folder) / type(kind).__name__
            written, _ = timed(kind.write, path, samples)
            shard = kind.open(path)
            rates = [args.rows / timed(read_all, kind, shard, rng.permutation(args.rows))[0] for _ in range(5)]
            assert all(map(torch.equal, kind.read(shard, 7), samples[7]))
            print(
                f"{type(kind).__name__:12} read {statistics.median(rates):6.0f} rows/s ({min(rates):.0f} to "
                f"{max(rates):.0f}), write {written:.2f} s, overhead {100 * (path.stat().st_size / net - 1):.3f} %"
            )
            path.unlink()


if __name__ == "__main__":
    main()
