"""Weight files from anywhere: nothing in them is run, and what is wrong with one is said in a sentence.

A `.pth` file is a pickle, which can name any function to call. Here only tensors, containers and plain values are read
(`torch.load(weights_only=True)`), through a memory map where the format has one: an optimizer's state is never loaded.
"""

import argparse
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TRAINED = ("state_dict", "model")  # where PixArt's and DiT's training scripts put the weights in their files
AVERAGED = ("state_dict_ema", "ema")
# What torch.load raises on bytes that were changed or cut off, as 4000 random changes of each file format showed.
DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)
FOLDER_STEM = "diffusion_pytorch_model"  # diffusers' name for the weights of a folder


def read_weights(source: str | Path | Mapping[str, Any], wrappers: tuple[str, ...] = TRAINED) -> dict[str, Tensor]:
    """The tensors of a file, a diffusers folder or a loaded checkpoint, by name.

    Args:
        source: a `.pth`, `.pt`, `.bin` or `.safetensors` file, a folder in diffusers' layout (sharded or not), or what
            `torch.load` made of a file. The weights may be wrapped (`{"state_dict": …}`) or bare.
        wrappers: the entries of a wrapped checkpoint to take, the first that exists.

    Returns:
        New dict; its tensors may be memory-mapped. Prefixes of `DataParallel` and `torch.compile` are stripped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, is damaged, or needs more than tensors.
    """
    if isinstance(source, Mapping):
        return unwrap(source, wrappers, "the state dict")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_dir():
        return unwrap(read_file(path), wrappers, path)
    weights: dict[str, Tensor] = {}
    for file in folder_files(path):
        weights |= unwrap(read_file(file), wrappers, file)
    return weights


def folder_files(folder: Path) -> list[Path]:
    """The weight files of a diffusers folder: one, or its shards."""
    for index in sorted(folder.glob(f"{FOLDER_STEM}*.index*.json")):
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {listed(absent)}, which {index.name} names.")
        return files
    for suffix in (".safetensors", ".bin"):
        plain = folder / (FOLDER_STEM + suffix)
        found = [plain] if plain.is_file() else sorted(folder.glob(f"{FOLDER_STEM}.*{suffix}"))
        if len(found) > 1:
            raise ValueError(f"{folder} has several variants, {listed(f.name for f in found)}: name one of the files.")
        if found:
            return found
    raise FileNotFoundError(f"{folder} has no {FOLDER_STEM}.safetensors or .bin: it is not a diffusers model folder.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: fetch it again.")
    return content


def read_file(path: Path) -> Any:
    """What a file holds: tensors by name, or a checkpoint around them. ValueError if it cannot be read safely."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: fetch them with `git lfs pull`.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}): fetch it again.") from error
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(f"{path} is not a PyTorch checkpoint: expected a .pth, .pt, .bin or .safetensors file.")
    damaged = f"{path} is damaged or cut short, or not a PyTorch checkpoint: fetch it again."
    try:
        # DiT's training script stores its command line; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ValueError(damaged) from error
        raise ValueError(
            f"{path} needs more than tensors (it asks for {wanted[1]}), which could run code, so it was not loaded: "
            "save its state dict alone, on a machine where you trust the file."
        ) from error
    except DAMAGE as error:
        raise ValueError(damaged) from error


def write_file(weights: Mapping[str, Any], path: str | Path) -> None:
    """`torch.save` aside and rename: `path` holds either the old file or the whole new one. OSError on a full disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        torch.save(weights, partial)
        # PyTorch's writer reports a full disk as a RuntimeError, and the last, buffered part not at all (torch 2.13).
        if not zipfile.is_zipfile(partial):
            raise RuntimeError(f"the end of {partial} is missing")
        os.replace(partial, path)
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def unwrap(checkpoint: Any, wrappers: tuple[str, ...], source: object) -> dict[str, Tensor]:
    """The tensors of a checkpoint, bare or under the first of `wrappers` that it has, without training's prefixes."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}, not named tensors.")
    known = [name for name in TRAINED + AVERAGED if isinstance(checkpoint.get(name), Mapping)]
    taken = [name for name in wrappers if name in known]
    if taken:
        checkpoint = checkpoint[taken[0]]
    elif not set(wrappers) & set(TRAINED):
        raise ValueError(f"{source} has no {' or '.join(wrappers)}: take its only weights, without ema.")
    elif known:
        raise ValueError(f"{source} has no {' or '.join(wrappers)}, only {listed(known)}: pass ema=True.")
    if not checkpoint or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in checkpoint.items()):
        raise ValueError(
            f"{source} holds no state dict: expected tensors by name, bare or under {' or '.join(wrappers)}."
        )
    return {re.sub(r"^(module\.|_orig_mod\.)+|_orig_mod\.", "", name): value for name, value in checkpoint.items()}


def check_fit(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: Mapping[str, str] | None = None
) -> None:
    """Raises ValueError naming the keys that `found` lacks, has over, or has in another shape than `expected`.

    `origin` gives a key's name in the file where that differs.
    """
    origin = origin or {}
    problems = []
    for problem, names in (("missing", expected.keys() - found.keys()), ("left over", found.keys() - expected.keys())):
        if names:
            problems.append(f"{problem}: {listed({origin.get(name, name) for name in names})}")
    shapes = [
        f"{name} is {list(found[name].shape)} in the checkpoint and {list(expected[name].shape)} in the model"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"of another shape: {listed(shapes)}")
    if problems:
        raise ValueError(f"the checkpoint does not fit the model; {'; '.join(problems)}.")


def count_blocks(names: Iterable[str], stem: str) -> int:
    """How many numbered blocks the names `stem.<i>.…` tell of."""
    return len({name.split(".")[1] for name in names if re.match(rf"{stem}\.\d+\.", name)})


def shape_of(weights: Mapping[str, Tensor], name: str, ndim: int) -> torch.Size:
    """The shape of a tensor that tells the model's size. ValueError where it is absent or of another rank."""
    if name not in weights:
        raise ValueError(f"the checkpoint does not fit the model; missing: {name}.")
    if weights[name].ndim != ndim:
        raise ValueError(f"{name} is {list(weights[name].shape)} in the checkpoint, where {ndim} dimensions belong.")
    return weights[name].shape


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names and the number of all."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "")
