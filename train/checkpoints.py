"""Checkpoints that survive a kill at any moment: written aside, verified, renamed; the newest sound one is found again.

    checkpoints/step_00001000/state/…          what DeepSpeed wrote
                              manifest.json    step, processes, ZeRO stage, every file's size and SHA-256

A folder named step_* is complete by construction: it takes that name after everything in it has reached the disk, and
loses it before anything in it is deleted.
"""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.settings import UserError
from train.universal import Shards

MANIFEST = "manifest.json"
TAG = "state"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(files: list[Path], root: Path) -> dict[str, dict[str, Any]]:
    """Flushed to the disk, their sizes and digests, by path below `root`."""
    entries = {}
    for file in files:
        _sync(file)
        entries[str(file.relative_to(root))] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    return entries


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _first(failure: str | None) -> str | None:
    """The first failure of any process, or None; collective."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next(filter(None, failures), None)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie; made on the first save.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*"))

    def save(self, engine, step: int) -> Path:
        """Write a checkpoint of `step` finished steps; collective. A failed write leaves the earlier ones untouched.

        Raises UserError on every process when any of them cannot write (disk full, no permission).
        """
        target, partial = self.folder / f"step_{step:08d}", self.folder / f".partial_{step:08d}"
        if target.exists():
            return target
        failure = None
        if dist.get_rank() == 0:
            for stale in self.folder.glob(".partial_*"):
                shutil.rmtree(stale)
        self._require_space(engine, step)
        try:
            engine.save_checkpoint(str(partial), tag=TAG, client_state={"step": step}, save_latest=False)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            failure = _reason(error)
        failure = _first(failure)
        if dist.get_rank() == 0 and failure is None:
            try:
                self._commit(partial, target, step, engine)
            except OSError as error:
                failure = _reason(error)
        failure = _first(failure)
        if failure:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({failure}): "
                "free space there and start again, the earlier checkpoints are untouched."
            )
        return target

    def _require_space(self, engine, step: int) -> None:
        """Refuse a save that will not fit, before any process waits for another in the middle of it."""
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        need = 20 * parameters  # fp32 weights, two moments and average, and the model's own weights
        free = [0]
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = [shutil.disk_usage(self.folder).free]
        dist.broadcast_object_list(free)
        if free[0] < need:
            raise UserError(
                f"the checkpoint of step {step} needs {need / 1e9:.1f} GB and {self.folder} has {free[0] / 1e9:.1f} "
                "GB free: free space there and start again with the same command, the earlier ones are untouched."
            )

    def _commit(self, partial: Path, target: Path, step: int, engine) -> None:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for file in files:
            # On a full disk torch.save may lose its last, buffered part without an error (torch 2.13).
            if file.suffix == ".pt" and not zipfile.is_zipfile(file):
                raise OSError(f"the end of {file.name} is missing")
        manifest = {
            "step": step,
            "processes": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "files": describe(files, partial),
        }
        path = partial / MANIFEST
        path.write_text(json.dumps(manifest, indent=1))
        for written in (path, partial / TAG, partial):
            _sync(written)
        os.rename(partial, target)
        _sync(self.folder)
        for old in self.all()[: -self.keep]:
            doomed = old.rename(self.folder / f".partial_{old.name}")
            shutil.rmtree(doomed)

    def _require_shared(self) -> None:
        """Every process writes its part here, and rank 0 makes a checkpoint of them: on all hosts it is one folder."""
        output, name = self.folder.parent, [""]
        if dist.get_rank() == 0:
            handle, mark = tempfile.mkstemp(prefix=".partial_", dir=output)
            os.close(handle)
            name = [os.path.basename(mark)]
        dist.broadcast_object_list(name)
        blind = _first(None if (output / name[0]).exists() else socket.gethostname())
        if dist.get_rank() == 0:
            os.unlink(mark)
        if blind:
            raise UserError(
                f"{output} is another folder on {blind} than on the first host: choose an output= on storage that all "
                "hosts share, under the same path."
            )

    def newest_sound(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose files match its manifest, or None. Rank 0 looks, and renames damaged ones to
        damaged_step_*, so that the run can write that step again."""
        self._require_shared()
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            for path in reversed(self.all()):
                fault = self.fault(path)
                if fault is None:
                    found = [(path, json.loads((path / MANIFEST).read_text()))]
                    break
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                print(
                    f"checkpoint {path.name} is damaged ({fault}), now {aside.name}; looking at the one before it.",
                    flush=True,
                )
        dist.broadcast_object_list(found)
        return found[0]

    @staticmethod
    def fault(path: Path) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            for name, entry in manifest["files"].items():
                file = path / name
                if file.stat().st_size != entry["bytes"]:
                    return f"{name} has {file.stat().st_size} of {entry['bytes']} bytes"
                if digest(file) != entry["sha256"]:
                    return f"{name} has other bytes than were written"
        except (OSError, json.JSONDecodeError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def load(self, engine, path: Path, manifest: dict[str, Any]) -> int:
        """Restore weights, optimizer, EMA and loss scaler; returns the number of finished steps. Collective.

        ZeRO shards of another number of processes are dealt to the present ones, bit for bit, in files that go again.
        Raises UserError when they were written with another stage, or there is no room for them.
        """
        stage, processes = engine.zero_optimization_stage(), dist.get_world_size()
        if manifest["zero_stage"] != stage:
            raise UserError(
                f"{path} was written with zero_stage={manifest['zero_stage']}: go on with that, or start another "
                "output from its final/ weights with init_from=."
            )
        dealt = self._deal(path, manifest) if stage and manifest["processes"] != processes else None
        loaded, client_state = engine.load_checkpoint(str(dealt or path), tag=TAG)
        if loaded is None:
            raise UserError(f"DeepSpeed found no state in {path}: remove that folder to go on from the one before it.")
        dist.barrier()
        if dealt and dist.get_rank() == 0:
            shutil.rmtree(dealt)
        return client_state["step"]

    def _deal(self, path: Path, manifest: dict[str, Any]) -> Path:
        """A folder with the checkpoint's shards for as many processes as there are now; collective."""
        rank, processes, was = dist.get_rank(), dist.get_world_size(), manifest["processes"]
        folder, failure = self.folder / f".partial_{path.name}_for_{processes}", None
        if rank == 0:
            print(f"{path.name} has the shards of {was} process(es): dealing them to {processes}.", flush=True)
        try:
            Shards(path / TAG, manifest["zero_stage"], was).write(folder / TAG, rank, processes)
        except (OSError, RuntimeError) as error:
            failure = _reason(error)
        failure = _first(failure)
        if failure:
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"{path} could not be dealt from {was} to {processes} process(es), which needs its size again in "
                f"{self.folder} ({failure}): free space there, or go on with {was} (deepspeed --num_gpus {was})."
            )
        return folder
