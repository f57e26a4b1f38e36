"""Procedural captioned pictures: coloured shapes on a plain background, the embedded training set.

A picture is 32x32 and holds one or two objects, each in its own cell of a 2x2 layout. Every attribute of sample
`index` is a hash of (seed, index, attribute), so a data position is one integer, and any worker can draw any sample.

Dense captions state everything that is needed to redraw the objects, sparse ones are fragments like the alternative
texts of web pages: the contrast behind the paper's "high-informative data" (section 2.4).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from pixart_fast.embedded import IMAGE_SIZE

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
    """`images` fp32 `[B, 3, 32, 32]` in [-1, 1]; B `captions` and B `scenes`."""

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

    def batch(self, indices) -> SceneBatch:
        """Draw the samples `indices` (integers >= 0 in any order: a list, a range, an array or tensor `[B]`)."""
        indices = np.asarray(indices, dtype=np.uint64).reshape(-1)
        drawn = self._draw(indices)
        scenes = [_scene(row) for row in drawn.tolist()]
        dense = np.full(len(scenes), self.captions == "dense")
        if self.captions == "mixed":
            dense = drawn["is_dense"] == 1
        captions = [scene.dense() if full else scene.sparse() for scene, full in zip(scenes, dense, strict=True)]
        return SceneBatch(draw(scenes), captions, scenes)

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


def coverage(shape: str, size: str, x: float, y: float) -> np.ndarray:
    """How much of each pixel the shape centred on (x, y) covers: fp32 `[32, 32]` in [0, 1]."""
    centres = np.arange(IMAGE_SIZE) + 0.5
    distance = _signed_distance(shape, centres[None, :] - x, centres[:, None] - y, SIZES[size])
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


@cache
def _placed_coverage(shape: str, size: str, cell: str, offset: tuple[int, int]) -> torch.Tensor:
    row, column = divmod(CELLS.index(cell), 2)
    x, y = (column + 0.5) * CELL_SIZE + offset[0], (row + 0.5) * CELL_SIZE + offset[1]
    return torch.from_numpy(coverage(shape, size, x, y))


def draw(scenes: list[Scene]) -> torch.Tensor:
    """Pictures of the scenes: fp32 `[B, 3, 32, 32]` in [-1, 1]."""
    images = _rgb([BACKGROUNDS[scene.background] for scene in scenes]).expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE).clone()
    for place in range(max((len(scene.objects) for scene in scenes), default=0)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.objects) > place]
        objects = [scenes[row].objects[place] for row in rows]
        masks = torch.stack([_placed_coverage(item.shape, item.size, item.cell, item.offset) for item in objects])
        images[rows] = torch.lerp(images[rows], _rgb([COLOURS[item.colour] for item in objects]), masks[:, None])
    return images


def _rgb(colours: list[tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.float32).reshape(-1, 3, 1, 1) / 127.5 - 1
