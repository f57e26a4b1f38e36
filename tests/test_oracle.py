from dataclasses import replace

import pytest
import torch

from pixart_fast.aspect import BUCKETS
from train.data import oracle
from train.data.scenes import Scene, SceneObject, Scenes, draw

RATES = ("background", "colour", "binding", "size", "count", "position", "relation", "all_correct")


@pytest.mark.parametrize("split", ["train", "seen", "held_out"])
def test_real_pictures_read_right(split):
    batch = Scenes(seed=5, split=split).batch(range(500))
    rates = oracle.score(batch.scenes, batch.images)
    assert tuple(rates) == RATES
    assert min(rates.values()) >= 0.98, rates


@pytest.mark.parametrize("size", [*BUCKETS[64].values(), (94, 62), (256, 144)])
def test_larger_pictures_read_right(size):
    batch = Scenes(seed=5).batch(range(200), *size)
    rates = oracle.score(batch.scenes, batch.images)
    assert tuple(rates) == RATES
    assert min(rates.values()) >= 0.97, rates


@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
def test_mistakes_in_larger_pictures_are_seen(size):
    moved = changed(SCENE, cell="bottom left")
    rates = oracle.score([replace(SCENE, states="position")], draw([moved], *size))
    assert {rate for rate, value in rates.items() if value == 0} == {"position", "all_correct"}
    rates = oracle.score([SCENE], draw([changed(SCENE, size="small")], *size))
    assert {rate for rate, value in rates.items() if value == 0} == {"size", "all_correct"}


def test_noisy_pictures_read_right():
    batch = Scenes(seed=6).batch(range(300))
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(0))
    rates = oracle.score(batch.scenes, batch.images + 0.15 * noise)
    assert min(rates.values()) >= 0.95, rates


def test_reading_lists_what_is_there():
    scene = Scene(
        "brown",
        (
            SceneObject("yellow", "cross", "small", "top right", (1, -1)),
            SceneObject("purple", "triangle", "large", "bottom left", (0, 1)),
        ),
    )
    (reading,) = oracle.read(draw([scene]))
    assert reading.background == "brown"
    found = {item.colour: item for item in reading.objects}
    assert found.keys() == {"yellow", "purple"}
    for item in scene.objects:
        seen = found[item.colour]
        assert (seen.shape, seen.size, seen.cell) == (item.shape, item.size, item.cell)
        assert seen.overlap > 0.9
    assert found["yellow"].centre == pytest.approx((25, 7), abs=0.6)


def changed(scene, **attributes):
    """The scene with its first object's attributes replaced."""
    return replace(scene, objects=(replace(scene.objects[0], **attributes), *scene.objects[1:]))


RED, BLUE = SceneObject("red", "circle", "large", "top left"), SceneObject("blue", "square", "large", "bottom right")
SCENE = Scene("white", (RED, BLUE), "relation")
WRONG_PICTURES = {
    "background": (replace(SCENE, background="grey"), {"background"}),
    "colour": (changed(SCENE, colour="green"), {"colour", "binding", "size", "relation"}),
    "shape": (changed(SCENE, shape="cross"), {"binding"}),
    "size": (changed(SCENE, size="small"), {"size"}),
    "swapped shapes": (
        replace(SCENE, objects=(replace(RED, shape="square"), replace(BLUE, shape="circle"))),
        {"binding"},
    ),
    "one missing": (replace(SCENE, objects=SCENE.objects[:1]), {"colour", "binding", "size", "count", "relation"}),
    "one too many": (
        replace(SCENE, objects=(*SCENE.objects, SceneObject("cyan", "circle", "small", "top right"))),
        {"count"},
    ),
    "other side": (
        replace(SCENE, objects=(replace(RED, cell="top right"), replace(BLUE, cell="bottom left"))),
        {"relation"},
    ),
}


@pytest.mark.parametrize("name", WRONG_PICTURES)
def test_each_mistake_costs_its_own_rate(name):
    picture, wrong = WRONG_PICTURES[name]
    rates = oracle.score([SCENE], draw([picture]))
    assert {rate for rate, value in rates.items() if value == 0} == wrong | {"all_correct"}
    assert all(value in (0, 1) for value in rates.values())


def test_position_counts_only_where_it_is_stated():
    stating, silent = replace(SCENE, states="position"), replace(SCENE, states="nothing")
    moved = changed(SCENE, cell="bottom left")
    rates = oracle.score([stating, silent], draw([moved, moved]))
    assert rates["position"] == 0 and rates["all_correct"] == 0.5 and "relation" not in rates


def test_every_object_counts():
    """A caption of two objects of which one is right is wrong."""
    rates = oracle.score([SCENE, SCENE], draw([SCENE, changed(SCENE, shape="triangle")]))
    assert rates["binding"] == 0.5 and rates["colour"] == 1


def test_nothing_is_seen_in_noise_and_in_flat_colour():
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert sum(len(reading.objects) for reading in oracle.read(noise)) <= 1
    pink = torch.tensor([1.0, -0.2, 0.4]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert oracle.read(pink) == [oracle.Reading(None, ())]


def test_out_of_range_pictures_are_clipped():
    batch = Scenes().batch(range(50))
    assert oracle.read((batch.images * 1.3).to(torch.float64)) == oracle.read((batch.images * 1.3).clamp(-1, 1))


def test_lengths_must_match():
    with pytest.raises(ValueError, match="1 scenes but 2 images"):
        oracle.score([SCENE], draw([SCENE, SCENE]))
