"""Containers for a store's shards: random access to rows as T5-XXL and a VAE make them, from the page cache.

    python -m bench.shard_formats [FOLDER]

train/data/store.py keeps its shards as `Checked` does.
"""

import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file

ROWS, CHANNELS, MEAN_TOKENS, LATENT = 400, 4096, 92, (2, 4, 32, 32)


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
        sample = super().read(shard, row)
        assert checksum(*sample) == shard[3][row]
        return sample


class Arrow:
    """An Arrow IPC file, memory-mapped, with two binary columns."""

    def write(self, path, samples):
        columns = [[tensor.view(torch.uint8).numpy().tobytes() for tensor in row] for row in zip(*samples, strict=True)]
        table = pa.table([pa.array(column, pa.large_binary()) for column in columns], names=["text", "latents"])
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
                member, content = tarfile.TarInfo(f"{number}.safetensors"), save({"text": text, "latents": latents})
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def open(self, path):
        with tarfile.open(path) as tar:
            return os.open(path, os.O_RDONLY), [(member.size, member.offset_data) for member in tar]

    def read(self, shard, row):
        content = load(os.pread(shard[0], *shard[1][row]))
        return content["text"], content["latents"]


def measure(kind, path, samples, rng):
    start = time.perf_counter()
    kind.write(path, samples)
    written, rates, shard = time.perf_counter() - start, [], kind.open(path)
    for _ in range(7):
        start = time.perf_counter()
        for row in rng.permutation(ROWS):
            sample = kind.read(shard, row)
        rates.append(ROWS / (time.perf_counter() - start))
        assert all(map(torch.equal, sample, samples[row]))
    return statistics.median(rates), min(rates), max(rates), written


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(MEAN_TOKENS, 20, ROWS).astype(int), 8, 120)
    samples = [(torch.randn(n, CHANNELS).bfloat16(), torch.randn(LATENT).half()) for n in lengths]
    net = sum(tensor.nbytes for sample in samples for tensor in sample)
    print(f"{ROWS} rows of {net / ROWS / 1e3:.0f} kB")
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        for kind in (Safetensors(), Checked(), Arrow(), Tar()):
            path = Path(folder) / type(kind).__name__
            rate, slowest, fastest, written = measure(kind, path, samples, rng)
            over = 100 * (path.stat().st_size / net - 1)
            print(
                f"{path.name:12} {rate:6.0f} rows/s ({slowest:.0f} to {fastest:.0f}), written in {written:.2f} s, "
                f"{over:.3f} % overhead"
            )
