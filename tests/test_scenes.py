import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_fast.aspect import BUCKETS, nearest
from train.data import oracle
from train.data.scenes import (
    BACKGROUNDS,
    CELL_SIZE,
    CELLS,
    CLASSES,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Scenes,
    coverage,
    draw,
    main,
)

OFFSETS = ((1, -1), (0, 0), (-1, 1), (1, 1))


def pairs(scene):
    return {(item.colour, item.shape) for item in scene.objects}


def test_a_sample_depends_on_seed_and_index_alone():
    scenes = Scenes(seed=3, captions="mixed")
    whole = scenes.batch(range(100, 164))
    picked = Scenes(seed=3, captions="mixed").batch(torch.tensor([163, 100, 131]))
    for place, row in enumerate((63, 0, 31)):
        assert picked.scenes[place] == whole.scenes[row]
        assert picked.captions[place] == whole.captions[row]
        assert torch.equal(picked.images[place], whole.images[row])


def test_indices_and_seeds_give_other_samples():
    first, other_seed = Scenes(seed=0).batch(range(64)).scenes, Scenes(seed=1).batch(range(64)).scenes
    assert len(set(first)) > 55
    assert sum(a == b for a, b in zip(first, other_seed, strict=True)) < 4


def test_the_drawing_of_samples_never_changes():
    """A resumed run on another machine must go on with the same data."""
    batch = Scenes(seed=0).batch([0, 1, 10**12])
    assert batch.captions == [
        "a picture of a large blue circle in the top right on grey",
        "a picture of a large red square in the bottom left on brown",
        "a small blue triangle on a black background",
    ]
    sums = batch.images.double().sum(dim=(1, 2, 3)).tolist()
    assert sums == pytest.approx([-35.2736, -1149.6784, -2602.9084], abs=1e-2)


def test_batch_has_the_documented_form():
    batch = Scenes().batch(range(32))
    assert batch.images.shape == (32, 3, 32, 32) and batch.images.dtype == torch.float32
    assert -1 <= batch.images.min() < -0.8 and 0.8 < batch.images.max() <= 1
    assert len(batch.captions) == len(batch.scenes) == 32
    assert Scenes().batch([]).images.shape == (0, 3, 32, 32)


def test_pictures_show_their_scenes():
    batch = Scenes().batch(range(200))
    for image, scene in zip((batch.images + 1) * 127.5, batch.scenes, strict=True):
        taken = {item.cell for item in scene.objects}
        assert len(taken) == len(scene.objects)
        background = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1).float()
        for cell in set(CELLS) - taken:
            row, column = divmod(CELLS.index(cell), 2)
            free = image[:, row * CELL_SIZE :, column * CELL_SIZE :][:, :CELL_SIZE, :CELL_SIZE]
            assert torch.allclose(free, background.expand_as(free), atol=0.6)
        for item in scene.objects:
            row, column = divmod(CELLS.index(item.cell), 2)
            x = int((column + 0.5) * CELL_SIZE) + item.offset[0]
            y = int((row + 0.5) * CELL_SIZE) + item.offset[1]
            assert torch.allclose(image[:, y, x], torch.tensor(COLOURS[item.colour]).float(), atol=0.6)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_distinct_and_sizes_ordered(shape):
    small, large = (coverage(shape, size, 16, 16) for size in SIZES)
    assert small.sum() * 2 < large.sum()
    assert (small <= large + 1e-6).all()
    assert ((small > 0) & (small < 1)).sum() > 0, "no antialiased edge"
    for other in set(SHAPES) - {shape}:
        theirs = coverage(other, "small", 16, 16)
        assert np.minimum(small, theirs).sum() / np.maximum(small, theirs).sum() < 0.85


def test_classes_are_those_of_the_first_objects():
    assert len(set(CLASSES)) == 24 and CLASSES[0] == "red circle" and CLASSES[-1] == "cyan cross"
    scenes = Scenes().batch(range(2000)).scenes
    for scene in scenes:
        assert CLASSES[scene.label] == f"{scene.objects[0].colour} {scene.objects[0].shape}"
        assert divmod(scene.label, 4) == (
            list(COLOURS).index(scene.objects[0].colour),
            SHAPES.index(scene.objects[0].shape),
        )
    labels = Counter(scene.label for scene in scenes)
    assert set(range(24)) - set(labels) == {CLASSES.index(f"{colour} {shape}") for colour, shape in HELD_OUT_PAIRS}
    assert min(labels.values()) > 2000 / 20 / 2


def test_a_canvas_changes_neither_scenes_nor_captions():
    plain, large = Scenes(captions="mixed").batch(range(40)), Scenes(captions="mixed").batch(range(40), 48, 80)
    assert large.images.shape == (40, 3, 48, 80) and large.images.dtype == torch.float32
    assert large.captions == plain.captions and large.scenes == plain.scenes


@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, 2), (48, 80, 1.5), (80, 48, 1.5)])
def test_layouts_stretch_and_shapes_keep_their_form(height, width, scale):
    """In each cell the shape lies where it does at 32x32, in fractions of the cell, and is so many times as large."""
    white, blue = (torch.tensor(x).view(3, 1, 1) / 127.5 - 1 for x in (BACKGROUNDS["white"], COLOURS["blue"]))
    for shape, size in ((shape, size) for shape in SHAPES for size in SIZES):
        for cell, row, column, (dx, dy) in zip(CELLS, (1, 1, 3, 3), (1, 3, 1, 3), OFFSETS, strict=True):
            image = draw([Scene("white", (SceneObject("blue", shape, size, cell, (dx, dy)),))], height, width)
            covered = ((image[0] - white) / (blue - white))[0].numpy()
            x, y = column * width / 4 + dx * scale, row * height / 4 + dy * scale
            expected = coverage(shape, size, x, y, height, width, scale)
            np.testing.assert_allclose(covered, expected, atol=1e-5)
            assert expected.sum() == pytest.approx(coverage(shape, size, 16, 16).sum() * scale**2, rel=0.02)


@pytest.mark.parametrize("size", [(33, 32), (64, 63), (8, 64)])
def test_canvases_that_cannot_be_divided_into_cells(size):
    with pytest.raises(ValueError, match=rf"even sides from 16 pixels on, not {size[0]}x{size[1]}"):
        Scenes().batch([0], *size)


def exported(tmp_path, *arguments):
    """The files of an export by name."""
    assert main([str(tmp_path), *arguments]) == 0
    return {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1


def test_export_is_a_captioned_folder_of_uneven_pictures(tmp_path):
    files = exported(tmp_path / "a", "--count", "60", "--size", "64", "--aspects", "--captions", "mixed", "--seed", "3")
    lines = [json.loads(line) for line in files.pop("metadata.jsonl").decode().splitlines()]
    assert [line["file_name"] for line in lines] == sorted(files) and len(lines) == 60
    batch = Scenes(seed=3, captions="mixed").batch(range(60))
    assert [line["text"] for line in lines] == batch.captions
    buckets = Counter()
    for line, scene in zip(lines, batch.scenes, strict=True):
        with Image.open(tmp_path / "a" / line["file_name"]) as image:
            width, height = image.size
        key, *bucket = nearest(height / width, 64)
        buckets[key] += 1
        assert (
            height % 8 and width % 8 and all(1.4 < a / b < 1.65 for a, b in zip((height, width), bucket, strict=True))
        )
        (reading,) = oracle.read(pixels(tmp_path / "a" / line["file_name"]))
        assert reading.background == scene.background and len(reading.objects) == len(scene.objects)
    assert set(buckets) == set(BUCKETS[64]) and min(buckets.values()) >= 4
    again = exported(tmp_path / "b", "--count", "20", "--size", "64", "--aspects", "--captions", "mixed", "--seed", "3")
    assert again.pop("metadata.jsonl").decode().splitlines() == [json.dumps(line) for line in lines[:20]]
    assert all(files[name] == content for name, content in again.items()) and len(again) == 20


def test_export_by_class(tmp_path):
    files = exported(tmp_path / "a", "--count", "40", "--classes")
    scenes = Scenes().batch(range(40)).scenes
    assert set(files) == {f"{CLASSES[s.label].replace(' ', '_')}/{index:06d}.png" for index, s in enumerate(scenes)}
    sides = [side for name in files for side in Image.open(tmp_path / "a" / name).size]
    assert 44 <= min(sides) < max(sides) <= 50 and not any(side % 8 == 0 for side in sides)


MISTAKES = {
    "buckets": (["--size", "32", "--aspects"], "no aspect-ratio buckets for 32 px: choose from 64, 256"),
    "size": (["--size", "8"], "even sides from 16 pixels on"),
    "folder": ([], "exists already: name a new folder."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_an_export_are_one_sentence(name, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    out = tmp_path if name == "folder" else tmp_path / "new"
    assert main([str(out), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("python -m train.data.scenes: ") and message in error


def test_every_attribute_occurs_about_equally_often():
    scenes = Scenes().batch(range(4000)).scenes
    one = sum(len(scene.objects) == 1 for scene in scenes) / len(scenes)
    assert 0.45 < one < 0.6  # a little over a half: scenes of two objects are rejected more often
    for attribute, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("cell", CELLS)):
        seen = [getattr(item, attribute) for scene in scenes for item in scene.objects]
        for value in values:
            assert seen.count(value) / len(seen) == pytest.approx(1 / len(values), rel=0.3), value
    states = [scene.states for scene in scenes if len(scene.objects) == 2]
    assert min(states.count(name) for name in ("position", "relation", "nothing")) > len(states) / 4


def test_splits_share_no_caption_and_only_held_out_shows_held_out_pairs():
    train, seen, held_out = (Scenes(seed=seed, split=split) for seed, split in enumerate(("train", "seen", "held_out")))
    train, seen, held_out = train.batch(range(5000)), seen.batch(range(500)), held_out.batch(range(500))
    assert not any(pairs(scene) & HELD_OUT_PAIRS for scene in train.scenes + seen.scenes)
    assert all(pairs(scene) & HELD_OUT_PAIRS for scene in held_out.scenes)
    assert not set(train.captions) & (set(seen.captions) | set(held_out.captions))
    assert set.union(*map(pairs, train.scenes)) | HELD_OUT_PAIRS == {(c, s) for c in COLOURS for s in SHAPES}


def test_dense_captions_state_everything():
    batch = Scenes().batch(range(500))
    for scene, caption in zip(batch.scenes, batch.captions, strict=True):
        assert scene.background in caption
        assert all(f"a {item.size} {item.colour} {item.shape}" in caption for item in scene.objects)
        stated = [cell for cell in CELLS if f"in the {cell}" in caption]
        assert sorted(stated) == sorted(item.cell for item in scene.objects if scene.states == "position")
        relations = [name for name in ("to the left of", "to the right of", "above", "below") if name in caption]
        assert relations == ([scene.relation] if scene.states == "relation" else [])


@pytest.mark.parametrize(
    ("cell", "other", "axis", "relation"),
    [
        ("top left", "top right", "vertical", "to the left of"),
        ("bottom right", "bottom left", "vertical", "to the right of"),
        ("top left", "bottom left", "horizontal", "above"),
        ("bottom right", "top right", "horizontal", "below"),
        ("top left", "bottom right", "horizontal", "to the left of"),
        ("top left", "bottom right", "vertical", "above"),
        ("bottom left", "top right", "vertical", "below"),
    ],
)
def test_relation(cell, other, axis, relation):
    objects = (SceneObject("red", "cross", "small", cell), SceneObject("blue", "circle", "large", other))
    scene = Scene("white", objects, "relation", axis)
    assert scene.relation == relation
    assert scene.dense() == f"a small red cross {relation} a large blue circle on a white background"


def test_sparse_captions_are_fragments_of_the_same_pictures():
    dense, sparse, mixed = (Scenes(captions=kind).batch(range(300)) for kind in ("dense", "sparse", "mixed"))
    assert torch.equal(dense.images, sparse.images) and dense.scenes == sparse.scenes == mixed.scenes
    assert max(len(caption.split()) for caption in sparse.captions) <= 3
    assert len(set(sparse.captions)) > 20
    named = {word for caption in sparse.captions for word in caption.split()}
    assert named >= set(COLOURS) | set(SHAPES) | set(BACKGROUNDS)
    is_dense = [caption == full for caption, full in zip(mixed.captions, dense.captions, strict=True)]
    assert 100 < sum(is_dense) < 200
    assert all(
        caption == fragment
        for caption, fragment, full in zip(mixed.captions, sparse.captions, is_dense, strict=True)
        if not full
    )


def test_max_objects():
    assert {len(scene.objects) for scene in Scenes(max_objects=1, split="held_out").batch(range(50)).scenes} == {1}


def test_draw_lets_later_objects_not_touch_earlier_ones():
    first = SceneObject("red", "square", "large", "top left", (1, 1))
    other = SceneObject("cyan", "square", "large", "bottom right", (-1, -1))
    alone, both = draw([Scene("black", (first,)), Scene("black", (first, other))])
    assert torch.equal(alone[:, :16, :16], both[:, :16, :16])
    assert not torch.equal(alone, both)


@pytest.mark.parametrize("wrong", [{"captions": "long"}, {"split": "test"}, {"max_objects": 3}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Scenes(**wrong)
