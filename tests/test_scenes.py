import numpy as np
import pytest
import torch

from train.data.scenes import (
    BACKGROUNDS,
    CELL_SIZE,
    CELLS,
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Scenes,
    coverage,
    draw,
)


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
