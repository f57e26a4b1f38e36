"""A feature store: what the autoencoder and the text encoder made of every sample, once, for random access.

    STORE/manifest.json               what is in it and where it came from; written last
          shards/00000.safetensors    the features of the samples, in the order of their names
          shards/00000.json           what the extraction noted of them, by which it goes on when it is run again
          index.safetensors           uint8 [N]: the bucket of each sample, by its place in the manifest's `buckets`
          null_caption.safetensors    the features of the empty caption
          left_out.jsonl              the samples that are not in it, each with the reason

The tensors of a shard of n samples, T tokens in all:

| name        | dtype, shape                       |                                                          |
|-------------|------------------------------------|----------------------------------------------------------|
| latents.KEY | fp16 or bf16 `[n_KEY, S, C, h, w]` | of bucket KEY: mean (S = 1), mean and deviation (S = 2)  |
| text        | bf16 `[T, caption_channels]`       | the tokens of all captions, none of them padding         |
| index       | int64 `[n, 8]`                     | `COLUMNS`                                                |
| names       | uint8                              | of each sample JSON of its name and its caption, UTF-8   |

Containers were measured with rows as T5-XXL makes them (bench/shard_formats.py).
"""

import hashlib
import json
import os
import secrets
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from train.settings import UserError

VERSION = 1
MANIFEST, LEFT_OUT = "manifest.json", "left_out.jsonl"
INDEX, NULL_CAPTION = "index.safetensors", "null_caption.safetensors"
SHARDS, PARTIAL = "shards", ".partial"
# Bucket (by its place among the shard's own, sorted by name) and row in it, the picture's size, class (-1: none), where
# its tokens and its name end, and the checksum of its latents, its tokens and these numbers as they lie in the file.
COLUMNS = ("bucket", "row", "height", "width", "label", "text_end", "name_end", "checksum")
OPEN_SHARDS = 128  # per process: each is a memory map


class Sample(NamedTuple):
    """What is known of one sample."""

    mean: Tensor  # [C, h, w] fp32, of the VAE's posterior, unscaled; the embedded autoencoder's latents are scaled
    std: Tensor | None  # the same shape; None where the encoder has no posterior
    text: Tensor | None  # [L, caption_channels] bf16, no padding; None in a store of classes
    label: int | None
    size: tuple[int, int]  # height and width of the original picture
    bucket: str  # its key in pixart_fast.aspect.BUCKETS[resolution]; "1.0" without multi-aspect


class File(BaseModel):
    """A file of the store. `count`: of its samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int
    sha256: str
    count: int = 0


class Nouns(BaseModel):
    """What captions talk about (train/data/nouns.py): distinct nouns, those of them that occur more than ten times, all
    occurrences, and nouns per picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distinct: int
    valid: int
    total: int
    per_picture: float


class Manifest(BaseModel):
    """What a store holds.

    `latents = (mean + std * noise - shift_factor) * scaling_factor` is what the model sees. `encoders` has names,
    precisions and SHA-256; `left_out` counts samples by reason; `bytes_per_sample` has "text", "latents" and "all".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = VERSION
    resolution: int
    multi_aspect: bool
    latent_channels: int
    downsample: int
    latent_dtype: str
    scaling_factor: float
    shift_factor: float
    caption_channels: int | None
    max_tokens: int | None
    classes: list[str] | None
    encoders: dict[str, dict[str, Any]]
    sources: list[dict[str, Any]]
    count: int
    buckets: dict[str, int]
    left_out: dict[str, int]
    full_captions: int = 0  # captions that fill max_tokens, most of which were cut there
    bytes_per_sample: dict[str, float] = {}
    nouns: Nouns | None = None  # once they have been counted
    shards: list[File] = []
    files: list[File] = []


class Damaged(Exception):
    """A shard has other bytes than were written; its text says where."""


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, flush it to the disk and give it the name: whole or not at all.

    Raises OSError, a full disk's among them.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors makes files that no one else may read
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except SafetensorError as error:  # how safetensors says what the disk said
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    write_aside(path, lambda partial: partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Without metadata, whose order safetensors leaves to chance: the same tensors are the same bytes.
    write_aside(path, lambda partial: save_file(tensors, partial))


def checksum(*tensors: Tensor | None) -> int:
    """Of their bytes, in words of 64 bits, the sum, in which a change of one bit always shows; six times as fast as
    zlib's CRC-32, with which a data loader would do little else."""
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        if tensor is not None:
            content = tensor.contiguous().view(-1).view(torch.uint8)
            content = F.pad(content, (0, -len(content) % 8)) if len(content) % 8 else content
            total += content.view(torch.int64).sum()
    return int(total)


def write_shard(
    path: Path, samples: Sequence[Sample], names: Sequence[tuple[str, str | None]], dtype: torch.dtype
) -> None:
    """Write samples and their (name, caption) to a file; at least one sample. Raises OSError."""
    keys = sorted({sample.bucket for sample in samples})
    latents: dict[str, list[Tensor]] = {key: [] for key in keys}
    index, text_end, notes = [], 0, bytearray()
    for sample, name in zip(samples, names, strict=True):
        parts = [sample.mean] if sample.std is None else [sample.mean, sample.std]
        stored = torch.stack(parts).to(dtype)
        text_end += 0 if sample.text is None else len(sample.text)
        notes += json.dumps(name, ensure_ascii=False).encode()
        label = -1 if sample.label is None else sample.label
        place = (keys.index(sample.bucket), len(latents[sample.bucket]))
        row = torch.tensor([*place, *sample.size, label, text_end, len(notes)])
        index.append([*row.tolist(), checksum(stored, sample.text, row)])
        latents[sample.bucket].append(stored)
    tensors = {f"latents.{key}": torch.stack(rows) for key, rows in latents.items()}
    tensors["index"] = torch.tensor(index)
    tensors["names"] = torch.frombuffer(notes, dtype=torch.uint8)
    if samples[0].text is not None:
        tensors["text"] = torch.cat([sample.text for sample in samples])
    write_tensors(path, tensors)


def describe(folder: Path, name: str, count: int = 0) -> File:
    """What a manifest says of a file in `folder`."""
    return File(name=name, bytes=(folder / name).stat().st_size, sha256=digest(folder / name), count=count)


def complete(folder: Path, manifest: Manifest, keys: Sequence[str], left_out: Mapping[str, str]) -> Manifest:
    """Write all but the shards and the null caption, last the manifest, with the files besides the shards in it.

    Args:
        keys: the samples' buckets, in order.
        left_out: names and reasons.

    Raises OSError.
    """
    places = {key: place for place, key in enumerate(manifest.buckets)}
    write_tensors(folder / INDEX, {"bucket": torch.tensor([places[key] for key in keys], dtype=torch.uint8)})
    lines = [json.dumps({"key": key, "reason": left_out[key]}, ensure_ascii=False) + "\n" for key in sorted(left_out)]
    write_aside(folder / LEFT_OUT, lambda partial: partial.write_text("".join(lines)))
    names = [INDEX] if manifest.caption_channels is None else [INDEX, NULL_CAPTION]
    manifest = manifest.model_copy(update={"files": [describe(folder, name) for name in names]})
    write_aside(folder / MANIFEST, lambda partial: partial.write_text(manifest.model_dump_json(indent=1) + "\n"))
    return manifest


class Shard:
    """One open shard, memory-mapped. Raises Damaged."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, "pt")
            self.index = self.file.get_tensor("index").numpy()
            names = self.file.offset_keys()
            self.keys = sorted(name[8:] for name in names if name.startswith("latents."))
            self.latents = [self.file.get_slice(f"latents.{key}") for key in self.keys]
            self.text = self.file.get_slice("text") if "text" in names else None
        except (OSError, SafetensorError) as error:
            raise Damaged(str(error)) from error

    def _span(self, row: int, column: str) -> slice:
        ends = self.index[:, COLUMNS.index(column)]
        return slice(int(ends[row - 1]) if row else 0, int(ends[row]))

    def read(self, row: int) -> Sample:
        bucket, place, height, width, label, _, _, expected = self.index[row].tolist()
        try:
            latents = self.latents[bucket][place].clone()
            # Copied: a view of the memory map would drag the whole of it to wherever a data loader sends the sample.
            text = None if self.text is None else self.text[self._span(row, "text_end")].clone()
        except (IndexError, SafetensorError) as error:
            raise Damaged(str(error)) from error
        if checksum(latents, text, torch.from_numpy(self.index[row, :-1])) != expected:
            raise Damaged(f"sample {row} in it has other bytes than were written")
        mean, std = [*latents.float(), None][:2]
        return Sample(mean, std, text, None if label < 0 else label, (height, width), self.keys[bucket])

    def name(self, row: int) -> tuple[str, str | None]:
        """A sample's name in its source, and its caption."""
        note = self.file.get_slice("names")[self._span(row, "name_end")]
        try:
            name, caption = json.loads(bytes(note.numpy()))
        except ValueError as error:
            raise Damaged(f"the name of sample {row} in it has other bytes than were written") from error
        return name, caption


class FeatureStore:
    """A finished store, read by the samples' numbers; may be read in forked workers, and pickled.

    Attributes:
        null_caption: `[L, caption_channels]` bf16, features of the empty caption; None in a store of classes.
        buckets: of each bucket that has samples their numbers, int64, ascending.

    Raises UserError where there is no finished store, or where a file of it is missing or has another size.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest = Manifest.model_validate_json((self.folder / MANIFEST).read_text())
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is no finished store: run `python -m train.data.extract SOURCE {folder} …` first, or again "
                "if it was interrupted."
            ) from error
        except ValidationError as error:
            raise UserError(f"{folder / MANIFEST} is damaged or of another version: extract {folder} again.") from error
        for file in (*self.manifest.shards, *self.manifest.files):
            path = self.folder / file.name
            size = path.stat().st_size if path.is_file() else 0
            if size != file.bytes:
                raise UserError(_damaged(path, f"it has {size} of {file.bytes} bytes"))
        self.starts = np.cumsum([0] + [shard.count for shard in self.manifest.shards])
        numbers = self._load(INDEX)["bucket"].numpy()
        self.buckets = {key: np.flatnonzero(numbers == place) for place, key in enumerate(self.manifest.buckets)}
        captioned = self.manifest.caption_channels is not None
        self.null_caption = self._load(NULL_CAPTION)["null_caption"] if captioned else None
        self._open: dict[int, Shard] = {}

    def __reduce__(self):
        return FeatureStore, (self.folder,)

    def __len__(self) -> int:
        return self.manifest.count

    def _load(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except SafetensorError as error:
            raise UserError(_damaged(self.folder / name, str(error))) from error

    def _row(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self.starts, index) - 1
        return number, index - int(self.starts[number])

    def _at(self, index: int, what: Callable[[Shard, int], Any]) -> Any:
        number, row = self._row(index)
        try:
            if number not in self._open:
                if len(self._open) == OPEN_SHARDS:
                    del self._open[next(iter(self._open))]
                self._open[number] = Shard(self.folder / self.manifest.shards[number].name)
            return what(self._open[number], row)
        except Damaged as error:
            raise UserError(_damaged(self.folder / self.manifest.shards[number].name, str(error))) from error

    def read(self, index: int) -> Sample:
        """A sample. Raises UserError that names the shard where it is damaged, IndexError."""
        return self._at(index, Shard.read)

    def name(self, index: int) -> str:
        """Its name in its source."""
        return self._at(index, Shard.name)[0]

    def caption(self, index: int) -> str | None:
        """Its caption as the source has it, before it is cleaned and cut."""
        return self._at(index, Shard.name)[1]

    def check(self) -> None:
        """Read all of the store. Raises UserError that names the damaged files."""
        files = (*self.manifest.shards, *self.manifest.files)
        damaged = [file.name for file in files if digest(self.folder / file.name) != file.sha256]
        if damaged:
            raise UserError(
                f"{len(damaged)} of {len(files)} files in {self.folder} have other bytes than were written "
                f"({', '.join(damaged[:5])}{', …' if len(damaged) > 5 else ''}): {REMEDY}"
            )


REMEDY = "delete what is damaged and run the extraction again, it writes what is missing."


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): {REMEDY}"
