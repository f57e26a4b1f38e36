"""Reads the attributes of a scene back from its picture, without any learned part.

The background is the median colour. A pixel belongs to an object if it lies past the middle of the way from the
background to that object's colour, which is right for antialiased edges as well. Connected pixels of one colour are
then compared with every shape in every size. All of that happens at 32x32: larger pictures are read from the middles of
their quarters.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from pixart_fast.embedded import IMAGE_SIZE
from train.data.scenes import BACKGROUNDS, CELL_SIZE, CELLS, COLOURS, SHAPES, SIZES, Scene, coverage

BACKGROUND_TOLERANCE = 0.19  # distance in RGB of channels from 0 to 1: the closest two backgrounds are 0.39 apart
COLOUR_TOLERANCE = 0.35
MIN_PIXELS = 12  # the smallest shape covers 46
MIN_OVERLAP = 0.5  # intersection over union with the best template, antialiased edges by their coverage

_WINDOW = 20
_NEIGHBOURS = np.ones((3, 3), bool)
_COLOUR_NAMES = tuple(COLOURS)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_COLOUR_VALUES = np.array(list(COLOURS.values())) / 255
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values())) / 255


@dataclass(frozen=True)
class SeenObject:
    """An object found in a picture: its attributes, centre (x, y) in pixels of 32x32, and overlap with its template,
    0 to 1."""

    colour: str
    shape: str
    size: str
    cell: str
    centre: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; `background` is None where no background colour is near the picture's."""

    background: str | None
    objects: tuple[SeenObject, ...]


def read(images: Tensor) -> list[Reading]:
    """Read pictures `[B, 3, H, W]` of any floating dtype, with values in [-1, 1] (others are clipped)."""
    images = _cells(images.detach().float().cpu().clamp(-1, 1))
    return [_read(picture) for picture in (images.numpy().transpose(0, 2, 3, 1) + 1) / 2]


def _cells(images: Tensor) -> Tensor:
    """The middle square of each quarter, put together and resized to `[B, 3, 32, 32]`: what the objects lie in."""
    side = min(images.shape[2:]) // 2
    height, width = (
        [quarter * (length // 2) + (length // 2 - side) // 2 + place for quarter in (0, 1) for place in range(side)]
        for length in images.shape[2:]
    )
    return F.interpolate(images[:, :, height][..., width], size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")


def score(scenes: list[Scene], images: Tensor) -> dict[str, float]:
    """Fractions of the pictures `[B, 3, H, W]` that agree with the dense captions of their `scenes`.

    A caption counts as right only if all of its objects are: `background`; `colour`, all named colours are there;
    `binding`, all (colour, shape) are; `size`, all (colour, size) are; `count`, as many objects as named; `position`,
    every object in its cell, among captions that state cells; `relation`, the two lie as stated, among captions that
    state it; `all_correct`, everything stated. A rate to which no caption applies is left out.

    Raises ValueError if there are not as many images as scenes.
    """
    if len(scenes) != len(images):
        raise ValueError(f"there are {len(scenes)} scenes but {len(images)} images")
    verdicts = [_verdict(scene, reading) for scene, reading in zip(scenes, read(images), strict=True)]
    names = ("background", "colour", "binding", "size", "count", "position", "relation", "all_correct")
    stated = {name: [verdict[name] for verdict in verdicts if name in verdict] for name in names}
    return {name: float(np.mean(values)) for name, values in stated.items() if values}


def _verdict(scene: Scene, reading: Reading) -> dict[str, bool]:
    wanted, found = scene.objects, reading.objects
    verdict = {
        "background": reading.background == scene.background,
        "colour": {item.colour for item in wanted} <= {item.colour for item in found},
        "binding": {(item.colour, item.shape) for item in wanted} <= {(item.colour, item.shape) for item in found},
        "size": {(item.colour, item.size) for item in wanted} <= {(item.colour, item.size) for item in found},
        "count": len(wanted) == len(found),
    }
    if scene.states == "position":
        cells = {(item.colour, item.cell) for item in found}
        verdict["position"] = all((item.colour, item.cell) in cells for item in wanted)
    if scene.states == "relation":
        verdict["relation"] = _related(scene, found)
    return verdict | {"all_correct": all(verdict.values())}


def _related(scene: Scene, found: tuple[SeenObject, ...]) -> bool:
    centres = {item.colour: item.centre for item in found}
    if not {item.colour for item in scene.objects} <= centres.keys():
        return False
    (x, y), (other_x, other_y) = (centres[item.colour] for item in scene.objects)
    gap = {
        "to the left of": other_x - x,
        "to the right of": x - other_x,
        "above": other_y - y,
        "below": y - other_y,
    }[scene.relation]
    return gap > CELL_SIZE / 4


def _read(picture: np.ndarray) -> Reading:
    background = np.median(picture, axis=(0, 1))
    distances = np.linalg.norm(_BACKGROUND_VALUES - background, axis=1)
    nearest = int(distances.argmin())
    name = _BACKGROUND_NAMES[nearest] if distances[nearest] < BACKGROUND_TOLERANCE else None

    way = _COLOUR_VALUES - background  # [6, 3]
    offset = picture - background  # [32, 32, 3]
    along = offset @ (way / (way**2).sum(1, keepdims=True)).T  # [32, 32, 6]: 0 at the background, 1 at the colour
    beside = np.linalg.norm(offset[:, :, None] - along.clip(0, 1)[..., None] * way, axis=-1)
    colour = beside.argmin(-1)
    is_object = (np.take_along_axis(along, colour[..., None], -1)[..., 0] > 0.5) & (beside.min(-1) < COLOUR_TOLERANCE)
    objects = []
    for number, colour_name in enumerate(_COLOUR_NAMES):
        labels, _ = ndimage.label(is_object & (colour == number))
        areas = np.bincount(labels.ravel())
        for label in np.flatnonzero(areas[1:] >= MIN_PIXELS) + 1:
            component = labels == label
            edges_too = ndimage.binary_dilation(component, _NEIGHBOURS)
            seen = _match(colour_name, np.where(edges_too, along[..., number].clip(0, 1), 0))
            if seen is not None:
                objects.append(seen)
    return Reading(name, tuple(objects))


def _match(colour: str, matte: np.ndarray) -> SeenObject | None:
    """Name the shape and size of one object, given how much of each pixel `[32, 32]` it covers."""
    window, corner = _around_centroid(matte)
    templates, names, centres = _templates()
    overlap = np.minimum(templates, window).sum((1, 2)) / np.maximum(templates, window).sum((1, 2))
    best = int(overlap.argmax())
    if overlap[best] < MIN_OVERLAP:
        return None
    x, y = (inside + start for inside, start in zip(centres[best], corner, strict=True))
    column, row = (int(np.clip(place // CELL_SIZE, 0, 1)) for place in (x, y))
    return SeenObject(colour, *names[best], CELLS[2 * row + column], (x, y), float(overlap[best]))


def _around_centroid(matte: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The window `[20, 20]` whose middle is nearest to the centroid, and its corner (x, y) in the picture."""
    rows, columns = matte.sum(1), matte.sum(0)
    places = np.arange(len(matte)) + 0.5
    x, y = (round(float(weights @ places / weights.sum())) - _WINDOW // 2 for weights in (columns, rows))
    padded = np.pad(matte, _WINDOW // 2)
    return padded[y + _WINDOW // 2 :, x + _WINDOW // 2 :][:_WINDOW, :_WINDOW], (x, y)


@cache
def _templates() -> tuple[np.ndarray, list[tuple[str, str]], list[tuple[float, float]]]:
    """Every shape and size in the window, give or take a pixel: coverage `[72, 20, 20]`, names, and centres (x, y)."""
    masks, names, centres = [], [], []
    for shape in SHAPES:
        for size in SIZES:
            window, (x, y) = _around_centroid(coverage(shape, size, CELL_SIZE, CELL_SIZE))
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    masks.append(np.roll(window, (dy, dx), axis=(0, 1)))
                    names.append((shape, size))
                    centres.append((float(CELL_SIZE - x + dx), float(CELL_SIZE - y + dy)))
    return np.stack(masks), names, centres
