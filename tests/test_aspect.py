"""The buckets against diffusers' tables and the published counts; sizes as people write them."""

import pytest
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN

from pixart_fast import aspect

PUBLISHED = {
    256: ASPECT_RATIO_256_BIN,
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
}
TRAINING_ONLY_1024 = {
    "0.26": (512, 1984),
    "0.27": (512, 1920),
    "2.89": (1664, 576),
    "3.11": (1792, 576),
    "3.62": (1856, 512),
    "3.75": (1920, 512),
    "3.88": (1984, 512),
}


def tokens(base: int) -> list[int]:
    return [(height // 16) * (width // 16) for height, width in aspect.BUCKETS[base].values()]


@pytest.mark.parametrize("base", PUBLISHED)
def test_buckets_are_the_published_ones(base):
    """diffusers' tables: 33 entries, 40 at 2048. What they lack is what only training has."""
    published = {key: (int(height), int(width)) for key, (height, width) in PUBLISHED[base].items()}
    rest = {key: (h * base // 1024, w * base // 1024) for key, (h, w) in TRAINING_ONLY_1024.items()}
    assert published | rest == aspect.BUCKETS[base]
    assert list(aspect.BUCKETS[base]) == sorted(aspect.BUCKETS[base], key=float)
    offered = {aspect.nearest(float(key), base, inference=True) for key in aspect.BUCKETS[base]}
    assert offered == {(key, *size) for key, size in published.items()}


def test_token_counts():
    assert (min(tokens(1024)), max(tokens(1024)), len(set(tokens(1024)))) == (3696, 4096, 14)
    assert (min(tokens(512)), max(tokens(512))) == (924, 1024)
    assert (min(tokens(256)), max(tokens(256))) == (231, 256)
    assert sum(count % 64 != 0 for count in tokens(1024)) == 19


@pytest.mark.parametrize("base", PUBLISHED)
def test_sizes_divide_by_16_and_keys_are_their_ratios(base):
    assert len(aspect.BUCKETS[base]) == 40
    for key, (height, width) in aspect.BUCKETS[base].items():
        assert height % 16 == width % 16 == 0
        assert abs(float(key) - height / width) <= 0.005 + 1e-9


def test_the_embedded_default_has_five_at_64():
    sizes = {"0.6": (48, 80), "0.78": (56, 72), "1.0": (64, 64), "1.29": (72, 56), "1.67": (80, 48)}
    assert list(aspect.BUCKETS[64].items()) == list(sizes.items())
    assert aspect.nearest(9 / 16, 64, inference=True) == ("0.6", 48, 80)


@pytest.mark.parametrize("inference", [False, True])
def test_nearest_is_the_published_choice(inference):
    """The first of the smallest distances to the key in the order of the table, as the published data loader takes."""
    table = {k: s for k, s in aspect.BUCKETS[1024].items() if not (inference and k in TRAINING_ONLY_1024)}
    for ratio in [0.1, 0.255, 0.265, 0.3, 0.56, 0.75, 1, 1.035, 1.24, 1.58, 2.3, 2.95, 3.4, 3.5, 3.9, 7]:
        key = min(table, key=lambda key, ratio=ratio: abs(float(key) - ratio))
        assert aspect.nearest(ratio, 1024, inference=inference) == (key, *table[key])


def test_buckets_of_a_model_without_a_table():
    assert aspect.base_size(128) == 1024 and aspect.base_size(4) == 32
    with pytest.raises(ValueError, match=r"no aspect-ratio buckets for 32 px, only for 64, 256, 512, 1024, 2048: give"):
        aspect.nearest(1.0, aspect.base_size(4))


@pytest.mark.parametrize(
    ("text", "ratio"), [("16:9", 9 / 16), (" 2 : 3 ", 1.5), ("1.5", 1 / 1.5), ("2.35:1", 1 / 2.35), ("1", 1), (".5", 2)]
)
def test_aspects_are_width_to_height(text, ratio):
    assert aspect.parse_aspect(text) == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("text", ["", "16/9", "16:", "0", "0:1", "1:0", "-1", "a:b", "nan", "inf", "9" * 400, "16:9:1"])
def test_what_is_no_aspect(text):
    with pytest.raises(ValueError, match=r"is no aspect ratio: write width:height, for example 16:9"):
        aspect.parse_aspect(text)


def test_sizes_are_width_by_height():
    assert aspect.parse_size("1024x768") == (768, 1024)
    assert aspect.parse_size(" 512 X 2048 ") == (2048, 512)
    assert aspect.parse_size("16×32") == (32, 16)


@pytest.mark.parametrize(
    ("text", "instead"), [("1000x750", "992x752"), ("1024x770", "1024x768"), ("1x5", "16x16"), ("1016x16", "1024x16")]
)
def test_sizes_that_do_not_divide_by_16_name_the_nearest(text, instead):
    with pytest.raises(ValueError, match=rf"{text} does not divide by 16: take {instead}\."):
        aspect.parse_size(text)
    aspect.parse_size(instead)


@pytest.mark.parametrize("text", ["", "1024", "1024x", "0x16", "1024x768x3", "-16x16", "16.0x16", "9999999x16", "axb"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"is no size: write WIDTHxHEIGHT in pixels"):
        aspect.parse_size(text)
