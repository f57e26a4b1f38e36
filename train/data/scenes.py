"""Procedural captioned pictures: coloured shapes on a plain background, the embedded training set.

A picture holds one or two objects, each in its own cell of a 2x2 layout. Every attribute of sample `index` is a hash of
(seed, index, attribute), so a data position is one integer, and any worker can draw any sample. 32x32 is the size that
all lengths are given for; on a larger canvas the layout stretches, and shapes grow with the shorter side.

Dense captions state everything that is needed to redraw the objects, sparse ones are fragments like the alternative
texts of web pages: the contrast behind the paper's "high-informative data" (section 2.4).

    python -m train.data.scenes OUT --count 4000 --size 64 --aspects

writes such pictures as files, for everything that starts from a folder of images.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pixart_fast.aspect import BUCKETS
from pixart_fast.embedded import IMAGE_SIZE
from train.settings import UserError

CELL_SIZE = IMAGE_SIZE // 2
JITTER = 1  # pixels, either way

COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 165, 60),
    "blue": (40, 75, 230),
    "yellow": (245, 220, 40),
    "purple": (165, 40, 195),
    "cyan": (40, 205, 215),
}
BACKGROUNDS = {"black": (15, 15, 15), "grey": (128, 128, 128), "white": (245, 245, 245), "brown": (110, 75, 45)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 4.75, "large": 7.0}  # half the side of the bounding box, in pixels
CELLS = ("top left", "top right", "bottom left", "bottom right")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

# Each shape and four of the six colours lose one combination: both halves of a held-out pair are learned elsewhere.
HELD_OUT_PAIRS = frozenset({("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square")})

# One composition (background and set of objects) in eight is never drawn for training, so its dense captions are new.
RESERVED_COMPOSITIONS = 8

_COLOUR_NAMES = tuple(COLOURS)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_SIZE_NAMES = tuple(SIZES)
_HELD_OUT_TABLE = np.array([[(colour, shape) in HELD_OUT_PAIRS for shape in SHAPES] for colour in _COLOUR_NAMES])

Captions = Literal["dense", "sparse", "mixed"]
Split = Literal["train", "seen", "held_out"]


@dataclass(frozen=True)
class SceneObject:
    """One object: names of its attributes, its cell, and its offset (x, y) in pixels from the centre of the cell."""

    colour: str
    shape: str
    size: str
    cell: str
    offset: tuple[int, int] = (0, 0)

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows and how its captions are worded.

    `states` says what the dense caption tells about places: each object's cell ("position"), how the first lies to the
    second ("relation"), or "nothing". `axis` picks the relation that is named when the objects lie diagonally, and
    `wording` the templates.
    """

    background: str
    objects: tuple[SceneObject, ...]
    states: Literal["position", "relation", "nothing"] = "nothing"
    axis: Literal["horizontal", "vertical"] = "horizontal"
    wording: int = 0

    @property
    def label(self) -> int:
        """The class, by the first object: an index into `CLASSES`."""
        return CLASSES.index(f"{self.objects[0].colour} {self.objects[0].shape}")

    @property
    def relation(self) -> str:
        """How the first object lies to the second: "to the left of", "to the right of", "above" or "below"."""
        (row, column), (other_row, other_column) = (divmod(CELLS.index(item.cell), 2) for item in self.objects)
        if column != other_column and (row == other_row or self.axis == "horizontal"):
            return "to the left of" if column < other_column else "to the right of"
        return "above" if row < other_row else "below"

    def dense(self) -> str:
        """Background, and size, colour and shape of every object; the places as `states` says."""
        if self.states == "relation":
            objects = f"{self.objects[0].phrase} {self.relation} {self.objects[1].phrase}"
        elif self.states == "position":
            objects = " and ".join(f"{item.phrase} in the {item.cell}" for item in self.objects)
        else:
            objects = " and ".join(item.phrase for item in self.objects)
        templates = (
            f"{objects} on a {self.background} background",
            f"a {self.background} background with {objects}",
            f"a picture of {objects} on {self.background}",
        )
        return templates[self.wording % len(templates)]

    def sparse(self) -> str:
        """A fragment that names at most two attributes of the picture."""
        item = self.objects[self.wording // 4 % len(self.objects)]
        templates = (
            f"{item.colour} {item.shape}",
            f"{item.shape} clip art",
            f"{item.colour} shapes",
            f"{self.background} background picture",
        )
        return templates[self.wording % len(templates)]


@dataclass(frozen=True)
class SceneBatch:
    """`images` fp32 `[B, 3, H, W]` in [-1, 1]; B `captions` and B `scenes`."""

    images: torch.Tensor
    captions: list[str]
    scenes: list[Scene]


class Scenes:
    """An endless, random-access data set of scenes.

    Args:
        seed: another seed is another order and another draw of the same distribution.
        captions: "dense", "sparse", or "mixed" (either, with equal chance).
        split: "train"; "seen" has only pairs of colour and shape that training shows, in compositions that it never
            shows; in "held_out" every scene has a pair of `HELD_OUT_PAIRS`. No composition of one split occurs in
            another, whatever the seeds.
        max_objects: 1 or 2.

    Raises ValueError for any other value.
    """

    def __init__(self, seed: int = 0, captions: Captions = "dense", split: Split = "train", max_objects: int = 2):
        if captions not in ("dense", "sparse", "mixed"):
            raise ValueError(f"captions must be dense, sparse or mixed, not {captions!r}")
        if split not in ("train", "seen", "held_out"):
            raise ValueError(f"split must be train, seen or held_out, not {split!r}")
        if max_objects not in (1, 2):
            raise ValueError(f"max_objects must be 1 or 2, not {max_objects!r}")
        self.seed, self.captions, self.split, self.max_objects = seed, captions, split, max_objects

    def batch(self, indices, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> SceneBatch:
        """Draw the samples `indices` (integers >= 0 in any order: a list, a range, an array or tensor `[B]`).

        The canvas changes neither scene nor caption. ValueError where `draw` has none of that size.
        """
        indices = np.asarray(indices, dtype=np.uint64).reshape(-1)
        drawn = self._draw(indices)
        scenes = [_scene(row) for row in drawn.tolist()]
        dense = np.full(len(scenes), self.captions == "dense")
        if self.captions == "mixed":
            dense = drawn["is_dense"] == 1
        captions = [scene.dense() if full else scene.sparse() for scene, full in zip(scenes, dense, strict=True)]
        return SceneBatch(draw(scenes, height, width), captions, scenes)

    def _draw(self, indices: np.ndarray) -> np.ndarray:
        """Attributes of the samples as a structured array `[B]`: the first attempt that belongs to the split."""
        drawn = np.zeros(len(indices), _ATTRIBUTES)
        pending = np.arange(len(indices))
        attempt = 0
        while len(pending):
            candidates = _attributes(self.seed, indices[pending], attempt, self.max_objects)
            accepted = _split_of(candidates) == self.split
            drawn[pending[accepted]] = candidates[accepted]
            pending = pending[~accepted]
            attempt += 1
        return drawn


_CHOICES = {
    "count": 2,
    "background": len(BACKGROUNDS),
    "states": 6,
    "axis": 2,
    "wording": 24,
    "is_dense": 2,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "size": len(SIZES),
    "cell": len(CELLS),
    "dx": 2 * JITTER + 1,
    "dy": 2 * JITTER + 1,
    "other_colour": len(COLOURS) - 1,  # a step away from the first one: two objects never share a colour or a cell
    "other_shape": len(SHAPES),
    "other_size": len(SIZES),
    "other_cell": len(CELLS) - 1,
    "other_dx": 2 * JITTER + 1,
    "other_dy": 2 * JITTER + 1,
}
_ATTRIBUTES = np.dtype([(name, np.int64) for name in _CHOICES])
_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection of uint64 that leaves no pattern."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _attributes(seed: int, indices: np.ndarray, attempt: int, max_objects: int) -> np.ndarray:
    """Hash (seed, index, attempt, attribute) to one value per attribute."""
    sample = _mix(np.full(1, seed * _GOLDEN + 1 & _WORD, np.uint64)) ^ indices
    sample = _mix(sample) + np.uint64(attempt * _GOLDEN & _WORD)
    drawn = np.zeros(len(indices), _ATTRIBUTES)
    for number, (name, choices) in enumerate(_CHOICES.items(), start=1):
        high_bits = _mix(_mix(sample) + np.uint64(number * _GOLDEN & _WORD)) >> np.uint64(32)
        drawn[name] = (high_bits * np.uint64(choices)) >> np.uint64(32)
    drawn["count"] = np.minimum(drawn["count"] + 1, max_objects)
    drawn["other_colour"] = (drawn["colour"] + 1 + drawn["other_colour"]) % len(COLOURS)
    drawn["other_cell"] = (drawn["cell"] + 1 + drawn["other_cell"]) % len(CELLS)
    return drawn


def _split_of(drawn: np.ndarray) -> np.ndarray:
    """The split of each scene, by its composition alone: the background and the set of (colour, shape, size)."""
    two = drawn["count"] == 2
    first = (drawn["colour"] * len(SHAPES) + drawn["shape"]) * len(SIZES) + drawn["size"]
    other = (drawn["other_colour"] * len(SHAPES) + drawn["other_shape"]) * len(SIZES) + drawn["other_size"]
    other = np.where(two, other, first)
    composition = (np.minimum(first, other) * 64 + np.maximum(first, other)) * len(BACKGROUNDS) + drawn["background"]
    reserved = _mix(_mix(composition.astype(np.uint64) + np.uint64(_GOLDEN))) % np.uint64(RESERVED_COMPOSITIONS) == 0
    held_out = _HELD_OUT_TABLE[drawn["colour"], drawn["shape"]]
    held_out = held_out | (two & _HELD_OUT_TABLE[drawn["other_colour"], drawn["other_shape"]])
    return np.where(held_out, "held_out", np.where(reserved, "seen", "train"))


def _scene(row: tuple[int, ...]) -> Scene:
    drawn = dict(zip(_CHOICES, row, strict=True))
    two = drawn["count"] == 2
    objects = tuple(
        SceneObject(
            _COLOUR_NAMES[drawn[f"{which}colour"]],
            SHAPES[drawn[f"{which}shape"]],
            _SIZE_NAMES[drawn[f"{which}size"]],
            CELLS[drawn[f"{which}cell"]],
            (drawn[f"{which}dx"] - JITTER, drawn[f"{which}dy"] - JITTER),
        )
        for which in (("", "other_") if two else ("",))
    )
    states = ("position", "nothing", "relation")[drawn["states"] % (3 if two else 2)]
    axis = ("horizontal", "vertical")[drawn["axis"]]
    return Scene(_BACKGROUND_NAMES[drawn["background"]], objects, states, axis, drawn["wording"])


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline, negative inside; exact near the edges, where antialiasing reads it."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * radius
    if shape == "triangle":  # isosceles, apex up, as tall as it is wide
        slope = (2 * abs(x) - y - radius) / np.sqrt(5)
        return np.maximum(slope, y - radius)
    bar = 0.36 * radius
    upright = np.maximum(abs(x) - bar, abs(y) - radius)
    level = np.maximum(abs(y) - bar, abs(x) - radius)
    return np.minimum(upright, level)


def coverage(
    shape: str, size: str, x: float, y: float, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE, scale: float = 1.0
) -> np.ndarray:
    """How much of each pixel the shape centred on (x, y), `scale` times its size, covers: fp32 `[H, W]` in [0, 1]."""
    columns, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
    distance = _signed_distance(shape, columns[None, :] - x, rows[:, None] - y, SIZES[size] * scale)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


@lru_cache(maxsize=1024)  # 72 to a canvas
def _cell_coverage(shape: str, size: str, offset: tuple[int, int], height: int, width: int) -> torch.Tensor:
    """The coverage within a cell `[height, width]`; next to nothing of an object lies beyond."""
    scale = min(height, width) / CELL_SIZE
    x, y = width / 2 + offset[0] * scale, height / 2 + offset[1] * scale
    return torch.from_numpy(coverage(shape, size, x, y, height, width, scale))


def draw(scenes: list[Scene], height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> torch.Tensor:
    """Pictures of the scenes: fp32 `[B, 3, H, W]` in [-1, 1]. ValueError unless both sides are even and at least 16."""
    if min(height, width) < 16 or height % 2 or width % 2:
        raise ValueError(f"scenes are drawn on canvases of even sides from 16 pixels on, not {height}x{width}.")
    images = _rgb([BACKGROUNDS[scene.background] for scene in scenes]).expand(-1, 3, height, width).clone()
    cell = (height // 2, width // 2)
    for place in range(max((len(scene.objects) for scene in scenes), default=0)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.objects) > place]
        objects = [scenes[row].objects[place] for row in rows]
        masks = torch.zeros(len(rows), 2, cell[0], 2, cell[1])
        for mask, item in zip(masks, objects, strict=True):
            row, column = divmod(CELLS.index(item.cell), 2)
            mask[row, :, column] = _cell_coverage(item.shape, item.size, item.offset, *cell)
        colours = _rgb([COLOURS[item.colour] for item in objects])
        images[rows] = torch.lerp(images[rows], colours, masks.view(len(rows), 1, height, width))
    return images


def _rgb(colours: list[tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.float32).reshape(-1, 3, 1, 1) / 127.5 - 1


ENLARGED = 1.5  # exported pictures are larger than what is learned from them, as photographs are
UNEVEN = 0.04  # by how much their sides deviate, so that cropping has something to cut off


def export(scenes: Scenes, folder: Path, count: int, size: int, *, aspects: bool = False, classes: bool = False):
    """Write the first `count` scenes as PNGs into a new folder, which is there whole or not at all; the same arguments
    give the same bytes.

    Beside them lies `metadata.jsonl` with file_name and text, the layout of Hugging Face's imagefolder; with `classes`
    each is in a folder named after its class instead, as in ImageNet. Their sides are about 1.5 times `size`, or with
    `aspects` a random one of its buckets, and no multiples of 8.

    Raises UserError for a size without buckets or a folder that is not empty, OSError where it cannot be written.
    """
    if aspects and size not in BUCKETS:
        raise UserError(f"there are no aspect-ratio buckets for {size} px: choose from {', '.join(map(str, BUCKETS))}.")
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder.")
    target, folder = folder, folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = list(BUCKETS[size].values()) if aspects else [(size, size)]
    lines = []
    for index in tqdm(range(count), unit="img", desc=str(target), dynamic_ncols=True):
        generator = np.random.Generator(np.random.Philox(key=[scenes.seed, index]))
        chosen = sizes[int(generator.random() * len(sizes))]
        batch = scenes.batch([index], *(_photographed(side, generator.random()) for side in chosen))
        (scene,), (caption,) = batch.scenes, batch.captions
        name = f"{index:06d}.png"
        if classes:
            name = f"{CLASSES[scene.label].replace(' ', '_')}/{name}"
            (folder / name).parent.mkdir(exist_ok=True)
        pixels = ((batch.images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
    if not classes:
        (folder / "metadata.jsonl").write_text("".join(lines))
    folder.rename(target)


def _photographed(side: int, fraction: float) -> int:
    """An even length near 1.5 times the side that does not divide by 8."""
    pixels = 2 * round(side * ENLARGED * (1 + UNEVEN * (2 * fraction - 1)) / 2)
    return pixels if pixels % 8 else pixels + 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.scenes",
        description="Write captioned scenes of the training split as PNGs, to extract features from.",
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="resolution that they are meant for (%(default)s)")
    parser.add_argument("--aspects", action="store_true", help="in all of its aspect ratios, not only squares")
    parser.add_argument("--captions", choices=["dense", "sparse", "mixed"], default="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", action="store_true", help="a folder to a class, as ImageNet has, and no captions")
    args = parser.parse_args(argv)
    try:
        scenes = Scenes(args.seed, captions=args.captions)
        export(scenes, args.out, args.count, args.size, aspects=args.aspects, classes=args.classes)
    except (UserError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
