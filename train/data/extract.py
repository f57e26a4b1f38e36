"""Features once: every picture and caption of a source through the autoencoder and the text encoder, into a store.

    python -m train.data.extract SOURCE STORE --model PixArt-alpha/PixArt-XL-2-512x512 --resolution 512 --multi-aspect

The samples, sorted by name, are cut into shards of fixed size, and a shard is the unit of everything: one worker makes
it, it is there whole or not at all, and what it holds depends on its samples alone. So the store is the same bytes
whatever the number of workers, and a command that was interrupted goes on when it is given again. The workers are
actors of Ray Data, on this machine or on a cluster; one that is lost is replaced, and its shard made again.
"""

import argparse
import hashlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from pixart_fast.recipe import FILE, find
from pixart_fast.text import PRECISIONS
from train.data.encode import LATENT_DTYPES, TOO_NARROW, Encoders, Picture, fault
from train.data.raw import KINDS, BadSample, Entry, RawData, open_raw
from train.data.store import (
    LEFT_OUT,
    NULL_CAPTION,
    PARTIAL,
    SHARDS,
    VERSION,
    FeatureStore,
    Manifest,
    complete,
    describe,
    write_aside,
    write_json,
    write_shard,
    write_tensors,
)
from train.settings import UserError

PLAN, LISTING = "plan.json", "listing.jsonl"
TRIES, MOST_TRIES = ".tries", 4  # of a shard whose workers are lost: beyond these it is the shard, or the memory
ROOT = Path(__file__).resolve().parents[2]

EXAMPLES = """examples:
  python -m train.data.extract photos/ store/ --model PixArt-alpha/PixArt-XL-2-1024-MS --resolution 1024 --multi-aspect
      photos/ has metadata.jsonl with file_name and text; one GPU encodes, if there is one
  python -m train.data.extract 'sam/*.tar' store/ --captions captions.jsonl --model DIR --resolution 256 --workers 8
  python -m train.data.extract imagenet/train store/ --model DIR --resolution 256
      one folder per class: labels, and no text encoder is loaded
  python -m train.data.extract photos/ /shared/store --model /shared/model --resolution 512 --workers 64 --address auto
      on the Ray cluster that this machine is part of; source, store, model and this project lie where all of it sees
      them by the same path
  python -m train.data.extract --check store/
      reads the whole of a store and compares it with its SHA-256 sums
"""


class Task(NamedTuple):
    """A shard to make: the lines of the listing that are its samples."""

    number: int
    start: int  # byte
    count: int  # lines


class ShardWriter:
    """Makes shards of a listed store, in a worker or in this process; the encoders' weights are loaded by the first."""

    def __init__(self, store: Path, root: Path, encoders: Encoders, threads: int):
        self.store, self.root, self.encoders, self.threads = store, root, encoders, threads

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """What Ray Data calls: columns of tasks to JSON, either a shard's note or {"error": sentence}."""
        rows = zip(*(batch[name].tolist() for name in Task._fields), strict=True)
        return {"note": [json.dumps(self.attempt(Task(*row))) for row in rows]}

    def attempt(self, task: Task) -> dict[str, Any]:
        """A shard's note or {"error": sentence}. Ray would try a shard that takes its worker down again for ever."""
        tries = self.store / f"{SHARDS}/{task.number:05d}{TRIES}"
        try:
            with tries.open("ab") as file:
                file.write(b".")
            if tries.stat().st_size > MOST_TRIES:
                raise UserError(
                    f"shard {task.number} took its worker down {MOST_TRIES} times, most likely for want of memory: run "
                    "the same command again with fewer --workers, or in another store with a smaller --shard-size."
                )
            note = self.make(task)
            tries.unlink()
            return note
        except UserError as error:
            return {"error": str(error)}
        except OSError as error:
            return {
                "error": f"shard {task.number} could not be written to {self.store} ({error.strerror or error}): free "
                "space there and run the same command again, it goes on with this shard."
            }

    def make(self, task: Task) -> dict[str, Any]:
        """Write a shard, then the note of what it holds. Raises OSError, UserError."""
        name = f"{SHARDS}/{task.number:05d}"
        with (self.store / LISTING).open("rb") as listing:
            listing.seek(task.start)
            entries = [Entry(*json.loads(listing.readline())) for _ in range(task.count)]
        self.encoders.load()
        samples, names, left_out = [], [], {}
        for batch in self.encoders.prepare_all(self.root, entries, self.threads):
            left_out |= {entry.key: str(picture) for entry, picture in batch if isinstance(picture, BadSample)}
            sound = [(entry, picture) for entry, picture in batch if isinstance(picture, Picture)]
            encoded = self.encoders.encode([picture for _, picture in sound])
            for (entry, _), sample in zip(sound, encoded, strict=True):
                reason = fault(sample)
                if reason:
                    left_out[entry.key] = reason
                else:
                    samples.append(sample)
                    names.append((entry.key, entry.caption))
        texts = [sample.text for sample in samples if sample.text is not None]
        note = {
            "number": task.number,
            "buckets": [sample.bucket for sample in samples],
            "latent_bytes": sum(2 * x.numel() for sample in samples for x in sample[:2] if x is not None),
            "text_bytes": sum(text.nbytes for text in texts),
            "full_captions": sum(len(text) == self.encoders.text.max_tokens for text in texts),
            "left_out": left_out,
            "file": None,
        }
        if self.encoders.text is not None and not (self.store / NULL_CAPTION).is_file():
            write_tensors(self.store / NULL_CAPTION, {"null_caption": self.encoders.null_caption})
        if samples:
            write_shard(self.store / f"{name}.safetensors", samples, names, LATENT_DTYPES[self.encoders.latent_dtype])
            note["file"] = describe(self.store, f"{name}.safetensors", len(samples)).model_dump()
        write_json(self.store / f"{name}.json", note)
        return note


def extract(
    raw: RawData,
    store: Path,
    encoders: Encoders,
    *,
    workers: int = 1,
    gpus: float = 0,
    threads: int = 1,
    address: str | None = None,
    shard_size: int = 1000,
    max_bad: float = 0.01,
    quiet: bool = False,
) -> Manifest:
    """Make a store, or what is still missing of it.

    Args:
        workers: how many make shards at a time, actors of Ray; 0: this process, without Ray.
        gpus, threads: of each worker; the threads decode pictures.
        address: of a Ray cluster; None starts Ray on this machine.
        shard_size: samples of a shard, bad ones included. A worker holds two shards' features in memory.
        max_bad: the share of samples that may be unusable. Those that are merely too narrow do not count.

    Raises UserError: too many bad samples, a full disk, a store of other things, too small a cluster.
    """
    tasks = begin(raw, store, encoders, shard_size)
    notes = {task.number: note for task in tasks if (note := finished(store, task.number)) is not None}
    pending = [task for task in tasks if task.number not in notes]
    total, bad = len(raw.entries) + len(raw.left_out), {}

    def tally(left_out: dict[str, str]) -> None:
        bad.update((key, reason) for key, reason in left_out.items() if not reason.startswith(TOO_NARROW))
        if len(bad) > max_bad * total:
            first = "; ".join(f"{key}: {reason}" for key, reason in islice(bad.items(), 3))
            raise UserError(
                f"{len(bad)} of {total} samples cannot be used, more than {max_bad:.2%} ({first} …): mend them, or run "
                "the same command again with a larger --max-bad, which leaves them out."
            )

    for left_out in (raw.left_out, *(note["left_out"] for note in notes.values())):
        tally(left_out)
    writer = {"store": store.resolve(), "root": raw.root.resolve(), "encoders": encoders, "threads": threads}
    done = sum(task.count for task in tasks if task.number in notes)
    counts = {task.number: task.count for task in tasks}
    cluster = connected(address, workers, gpus, threads) if workers and pending else nullcontext()
    with cluster as ray, tqdm(total=len(raw.entries), initial=done, unit="img", smoothing=0.1, disable=quiet) as bar:
        if ray is None:
            results = map(ShardWriter(**writer).attempt, pending)
        else:
            results = on_ray(ray, writer, pending, workers, gpus, threads)
        for note in results:
            if "error" in note:
                raise UserError(note["error"])
            notes[note["number"]] = note
            bar.update(counts[note["number"]])
            tally(note["left_out"])
    return finish(raw, store, encoders, [notes[task.number] for task in tasks])


def begin(raw: RawData, store: Path, encoders: Encoders, shard_size: int) -> list[Task]:
    """Write the listing and the plan; its tasks. Raises UserError where the store was begun with another plan."""
    digest = hashlib.sha256()
    for line in _lines(raw):
        digest.update(line)
    plan = {
        "version": VERSION,
        "samples": len(raw.entries),
        "listing_sha256": digest.hexdigest(),
        "shard_size": shard_size,
        "resolution": encoders.resolution,
        "multi_aspect": encoders.multi_aspect,
        "latent_dtype": encoders.latent_dtype,
        "encoders": encoders.described,
    }
    starts = []

    def write_listing(path: Path) -> None:
        with path.open("wb") as listing:
            for number, line in enumerate(_lines(raw)):
                if number % shard_size == 0:
                    starts.append(listing.tell())
                listing.write(line)

    try:
        (store / SHARDS).mkdir(parents=True, exist_ok=True)
        if (store / PLAN).is_file():
            begun = json.loads((store / PLAN).read_text())
            changed = [name for name, value in plan.items() if begun.get(name) != value]
            if changed:
                raise UserError(
                    f"{store} was begun with another {', '.join(changed)}: give the same source and options as then, "
                    "or another folder."
                )
        else:
            write_json(store / PLAN, plan)
        write_aside(store / LISTING, write_listing)
        for tries in (store / SHARDS).glob(f"*{TRIES}"):
            tries.unlink()
    except OSError as error:
        raise UserError(
            f"{store} cannot be written to ({error.strerror or error}): free space there, or choose another folder."
        ) from error
    counts = [min(shard_size, len(raw.entries) - first) for first in range(0, len(raw.entries), shard_size)]
    return [Task(number, *place) for number, place in enumerate(zip(starts, counts, strict=True))]


def _lines(raw: RawData) -> Iterator[bytes]:
    return (json.dumps(entry).encode() + b"\n" for entry in raw.entries)


def finished(store: Path, number: int) -> dict[str, Any] | None:
    """The note of a shard that is already there, else None."""
    try:
        note = json.loads((store / f"{SHARDS}/{number:05d}.json").read_text())
        file = note["file"]
        return note if file is None or (store / file["name"]).stat().st_size == file["bytes"] else None
    except (FileNotFoundError, ValueError):
        return None


def on_ray(ray: Any, writer: dict, tasks: list[Task], workers: int, gpus: float, threads: int) -> Iterator[dict]:
    """The notes of shards as actors finish them, in any order. Raises UserError."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shards = ray.data.from_items([task._asdict() for task in tasks], override_num_blocks=len(tasks)).map_batches(
        ShardWriter,
        fn_constructor_kwargs=writer,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=threads,
        num_gpus=gpus,
    )
    try:
        for row in shards.iter_rows():
            yield json.loads(row["note"])
    except ray.exceptions.RayActorError as error:
        raise UserError(
            f"Ray's workers cannot start ({str(error).strip().splitlines()[-1]}): every machine needs this project "
            f"at {ROOT}, with what it requires."
        ) from error


@contextmanager
def connected(address: str | None, workers: int, gpus: float, threads: int) -> Iterator[Any]:
    """Ray, as it runs already or at its address, else started on this machine. UserError where it is too small."""
    # One processor stays free: Ray Data waits for ever for its own tasks if the actors take all of them.
    cpus = workers * threads + 1
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: next to anything else, workers come to a halt
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters comes as an exception
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            "extraction by several workers needs Ray: `pip install 'ray[data]'`, or --workers 0."
        ) from error
    if ray.is_initialized():
        yield _large_enough(ray, cpus, workers * gpus)
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    else:
        # Only numbers of shards and notes pass through the object store.
        options |= {"address": "local", "num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
        options["object_store_memory"] = 200_000_000
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if port.isdigit():  # Ray itself knocks for ten minutes and more where nobody answers
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**options)
    except OSError as error:
        raise UserError(
            f"there is no Ray cluster at {address} that lets us in ({error}): start it with `ray start --head`; where "
            "it asks for a token, this machine must have it, see `ray get-auth-token`."
        ) from error
    try:
        yield _large_enough(ray, cpus, workers * gpus)
    finally:
        ray.shutdown()


def _large_enough(ray: Any, cpus: int, gpus: float) -> Any:
    have = ray.cluster_resources()
    if have.get("CPU", 0) < cpus or have.get("GPU", 0) < gpus:
        raise UserError(
            f"these workers need {cpus} CPUs and {gpus:g} GPUs, and Ray has {have.get('CPU', 0):g} and "
            f"{have.get('GPU', 0):g}: choose smaller --workers."
        )
    return ray


def finish(raw: RawData, store: Path, encoders: Encoders, notes: list[dict[str, Any]]) -> Manifest:
    """Write what is about the whole store, its manifest last."""
    left_out = raw.left_out | {key: reason for note in notes for key, reason in note["left_out"].items()}
    keys = [key for note in notes for key in note["buckets"]]
    if not keys:
        raise UserError(f"no sample of {raw.root} is left: see the reasons in {store / SHARDS}.")
    shards = [note["file"] for note in notes if note["file"] is not None]
    bytes_per_sample = {
        "text": sum(note["text_bytes"] for note in notes) / len(keys),
        "latents": sum(note["latent_bytes"] for note in notes) / len(keys),
        "all": sum(file["bytes"] for file in shards) / len(keys),
    }
    full = sum(note["full_captions"] for note in notes)
    manifest = encoders.manifest(
        raw, keys, left_out, full_captions=full, bytes_per_sample=bytes_per_sample, shards=shards
    )
    try:
        manifest = complete(store, manifest, keys, left_out)
        for path in (*store.iterdir(), *(store / SHARDS).iterdir()):
            # What killed workers leave: safetensors writes to .tmp* before it gives a file even the name we ask for.
            if path.name == LISTING or path.name.startswith(".tmp") or path.suffix == PARTIAL:
                path.unlink()
    except OSError as error:
        raise UserError(
            f"the manifest could not be written to {store} ({error.strerror or error}): free space there and run the "
            "same command again, the shards stay."
        ) from error
    return manifest


def report(manifest: Manifest, store: Path) -> str:
    """What a store holds, in a few lines."""
    each = manifest.bytes_per_sample
    buckets = f"{len(manifest.buckets)} bucket{'s' * (len(manifest.buckets) > 1)}"
    lines = [
        f"{store}: {manifest.count} samples at {manifest.resolution} px in {buckets}, {len(manifest.shards)} shards"
    ]
    sizes = [f"latents {each['latents'] / 1e3:.1f} kB"]
    published = 2 * each["latents"]  # fp32
    if manifest.caption_channels:
        sizes.insert(0, f"text {each['text'] / 1e3:.1f} kB")
        published += 4 * manifest.max_tokens * manifest.caption_channels  # fp32, padded
    lines.append(
        f"a sample takes {each['all'] / 1e3:.1f} kB ({', '.join(sizes)}), {published / each['all']:.1f} times less "
        f"than {published / 1e3:.1f} kB in the published layout"
    )
    if manifest.full_captions:
        lines.append(f"{manifest.full_captions} captions fill all {manifest.max_tokens} tokens: most were cut there")
    if manifest.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.left_out.items())
        lines.append(f"left out: {reasons}; each by name in {store / LEFT_OUT}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.extract",
        description="Encode pictures and captions, or labels, once, into a store to train from. What an interrupted "
        "command has finished is not done again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", type=Path, help="a folder of pictures, tars, or the file that lists them")
    parser.add_argument("store", nargs="?", type=Path, help="the folder to make")
    parser.add_argument("--check", metavar="STORE", type=Path, help="read a whole store, compare its SHA-256 sums")
    parser.add_argument(
        "--model",
        help="folder or Hugging Face name of a model with text encoder and VAE; without it, what `make train` left",
    )
    parser.add_argument("--resolution", type=int, help="256, 512 or 1024 px; 32 or 64 with what `make train` left")
    parser.add_argument("--multi-aspect", action="store_true", help="crop to the nearest aspect ratio, not to a square")
    parser.add_argument("--kind", default="auto", choices=["auto", *KINDS], help="the source's layout, if not obvious")
    parser.add_argument("--captions", type=Path, help="captions by picture, where the source has none (SAM)")
    parser.add_argument("--caption-field", help="where the source has several, such as sharegpt4v")
    parser.add_argument("--workers", type=int, default=1, help="how many encode (1); 0: this process, without Ray")
    parser.add_argument("--gpus-per-worker", type=float, help="1 where there is a GPU, else 0; 0.5 lets two share one")
    parser.add_argument("--cpus-per-worker", type=int, help="threads that decode pictures: 4 with a GPU, else 1")
    parser.add_argument("--address", help="a Ray cluster: auto, or ray://HOST:PORT; without it, this machine")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per file (1000, 0.8 GB with T5-XXL)")
    parser.add_argument(
        "--max-bad", type=float, default=0.01, help="share of unusable samples that is put up with (0.01)"
    )
    parser.add_argument("--text-precision", default="bf16", choices=PRECISIONS, help="of T5 (bf16); features are bf16")
    parser.add_argument(
        "--latent-dtype", default="fp16", choices=list(LATENT_DTYPES), help="as latents are kept (fp16)"
    )
    args = parser.parse_args(arguments)
    try:
        if args.check:
            FeatureStore(args.check).check()
            print(f"{args.check} is whole.")
            return 0
        if args.source is None or args.store is None or args.resolution is None:
            raise UserError("give SOURCE, STORE and --resolution; --help has examples.")
        print(report(run(args), args.store))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on with the shards that are missing.", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> Manifest:
    gpus = args.gpus_per_worker
    if gpus is None:
        gpus = float(torch.cuda.is_available())
    if args.workers < 0 or args.shard_size < 1 or gpus < 0:
        raise UserError("--workers and --gpus-per-worker cannot be negative, nor --shard-size 0.")
    try:
        model = find(args.model, parts=("model_index.json", FILE, "text_encoder/*", "tokenizer/*", "vae/*"))
    except OSError as error:
        raise UserError(str(error)) from error
    raw = open_raw(args.source, kind=args.kind, captions=args.captions, caption_field=args.caption_field)
    encoders = Encoders(
        model.resolve(),
        resolution=args.resolution,
        multi_aspect=args.multi_aspect,
        classes=raw.classes is not None,
        text_precision=args.text_precision,
        latent_dtype=args.latent_dtype,
        device="cuda" if gpus else "cpu",
    )
    return extract(
        raw,
        args.store,
        encoders,
        workers=args.workers,
        gpus=gpus,
        threads=args.cpus_per_worker or (4 if gpus else 1),
        address=args.address,
        shard_size=args.shard_size,
        max_bad=args.max_bad,
    )


if __name__ == "__main__":
    sys.exit(main())
