"""Pictures on disk: settings that come back, geometry of what is read, contact sheets of any sizes and captions."""

import json
import string

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pixart_fast import pictures

PROMPTS = [
    "a red cat, 50 % larger; <b>\"'/\\",
    "eine Katze — größer als ein Haus\nin zwei Zeilen",
    "雪の中の猫が座っている",
    "🙂 مرحبا",
    "",
    "a\udcff lone surrogate, as a terminal gives",
    "nul \0 inside",
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def plain(size: tuple[int, int], color: str | tuple = "red") -> Image.Image:
    return Image.new("RGB", size, color)


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_become_the_pictures_that_diffusers_makes(dtype):
    pixels = (1.2 * noise(2, 3, 6, 9)).to(dtype)
    expected = VaeImageProcessor().postprocess(pixels.float(), output_type="np")
    for picture, values in zip(pictures.to_images(pixels), expected, strict=True):
        assert picture.mode == "RGB" and picture.size == (9, 6)
        assert np.array_equal(np.asarray(picture), (values * 255).round().astype(np.uint8))


def test_pictures_that_are_not_finite_are_refused():
    for bad in (float("nan"), float("inf")):
        pixels = noise(1, 3, 4, 4)
        pixels[0, 1, 2, 3] = bad
        with pytest.raises(ValueError, match="values that are not finite: the weights are damaged, or the autoencoder"):
            pictures.to_images(pixels)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_settings_come_back(tmp_path, prompt):
    settings = {"prompt": prompt, "negative": "blurry, 悪い", "seed": 2**53 + 1, "guidance": 4.5, "size": [16, 8]}
    picture = pictures.to_images(noise(1, 3, 8, 16))[0]
    path = tmp_path / "new" / "folder" / pictures.file_name(prompt, 7)
    pictures.save_png(picture, path, settings)
    assert pictures.read_settings(path) == settings
    with Image.open(path) as written:
        assert written.format == "PNG" and np.array_equal(np.asarray(written), np.asarray(picture))
    assert list(path.parent.iterdir()) == [path]


def test_other_programs_find_prompt_and_parameters(tmp_path):
    settings = {
        "prompt": "猫 in the snow",
        "negative": "blurry",
        "steps": 20,
        "sampler": "dpm",
        "guidance": 4.5,
        "seed": 3,
        "model": tmp_path,
        "strength": None,
    }
    pictures.save_png(plain((16, 8)), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as written:
        assert written.text["prompt"] == "猫 in the snow"
        assert written.text["parameters"] == (
            "猫 in the snow\nNegative prompt: blurry\n"
            f"Steps: 20, Sampler: dpm, CFG scale: 4.5, Seed: 3, Model: {tmp_path}, Size: 16x8"
        )
        assert json.loads(written.text["pixart_fast"])["model"] == str(tmp_path)
    pictures.save_png(plain((16, 8)), tmp_path / "b.png", {})
    with Image.open(tmp_path / "b.png") as written:
        assert (written.text["prompt"], written.text["parameters"]) == ("", "Size: 16x8")


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "a.png"
    pictures.save_png(plain((4, 4)), path, {"seed": 1})
    with pytest.raises(OSError):
        pictures.save_png(Image.new("HSV", (4, 4)), path, {"seed": 2})
    assert pictures.read_settings(path) == {"seed": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("chunk", [None, "no json", "3"])
def test_pictures_without_settings(tmp_path, chunk):
    info = pictures.PngImagePlugin.PngInfo()
    if chunk:
        info.add_text(pictures.SETTINGS_KEY, chunk)
    plain((4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png carries no settings: pixart_fast did not write it"):
        pictures.read_settings(tmp_path / "a.png")


def test_file_names_are_safe_short_and_different():
    prompts = [*PROMPTS, "a/b", "a b", "../../etc/passwd", "CON", "x" * 5000, "x" * 5001]
    names = [pictures.file_name(prompt, seed) for prompt in prompts for seed in (0, 1, 2**63)]
    assert len(set(names)) == len(names)
    for name in names:
        assert set(name) <= set(string.ascii_lowercase + string.digits + "-.") and len(name) <= 80
        assert not name.startswith(("-", ".")) and name.endswith(".png") and name.count(".") == 1
    assert pictures.file_name("A red cat!", 3) == pictures.file_name("A red cat!", 3)
    assert pictures.file_name("A red cat!", 3).startswith("a-red-cat-")


def test_a_picture_of_the_right_size_is_read_exactly(tmp_path):
    pixels = noise(1, 3, 32, 48)
    pictures.save_png(pictures.to_images(pixels)[0], tmp_path / "a.png", {})
    read = pictures.load_image(tmp_path / "a.png", (32, 48))
    assert read.shape == (1, 3, 32, 48) and read.dtype == torch.float32
    assert (read - pixels).abs().max() <= 1 / 255 + 1e-6
    assert np.array_equal(np.asarray(pictures.to_images(read)[0]), np.asarray(pictures.to_images(pixels)[0]))


def test_pictures_in_memory_are_read_as_their_files(tmp_path):
    picture = gradient(40, 24)
    picture.save(tmp_path / "a.png")
    assert torch.equal(pictures.load_image(picture, (16, 16)), pictures.load_image(tmp_path / "a.png", (16, 16)))
    assert torch.equal(pictures.load_mask(picture, (16, 16)), pictures.load_mask(tmp_path / "a.png", (16, 16)))
    assert pictures.image_size(picture) == pictures.image_size(tmp_path / "a.png") == (24, 40)


def test_other_shapes_are_covered_and_cut_around_the_centre(tmp_path):
    gradient(200, 100).save(tmp_path / "wide.png")
    read = pictures.load_image(tmp_path / "wide.png", (32, 32))
    red, green = read[0, 0], read[0, 1]
    # Half of the width is left, its middle half, and all of the height.
    assert red[:, 0].mean() == pytest.approx(-0.5, abs=0.05) and red[:, -1].mean() == pytest.approx(0.5, abs=0.05)
    assert green[0].mean() == pytest.approx(-1, abs=0.05) and green[-1].mean() == pytest.approx(1, abs=0.05)
    gradient(100, 200).save(tmp_path / "high.png")
    read = pictures.load_image(tmp_path / "high.png", (16, 32))
    assert read.shape == (1, 3, 16, 32)
    assert read[0, 1, 0].mean() == pytest.approx(-0.25, abs=0.05) and read[0, 0].min() <= -0.95


def test_pictures_stand_upright(tmp_path):
    """A photograph on its side with the EXIF tag that says so."""
    upright = gradient(64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    read = pictures.load_image(tmp_path / "a.png", (32, 64))
    assert np.array_equal(np.asarray(pictures.to_images(read)[0]), np.asarray(upright))
    assert pictures.image_size(tmp_path / "a.png") == (32, 64)


def test_transparent_and_deep_pictures(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "clear.png")
    read = pictures.load_image(tmp_path / "clear.png", (8, 8))
    assert read[0, :, 0, 0].tolist() == [1, -1, -1] and read[0, :, 1:].min() == 1
    deep = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    read = pictures.load_image(tmp_path / "deep.png", (8, 8))
    assert (read[0, 0] - torch.from_numpy(deep / 32767.5 - 1).float()).abs().max() <= 1 / 255
    for mode in ("1", "L", "P", "CMYK"):
        plain((8, 8), "white").convert(mode).save(tmp_path / "a.tiff")
        assert pictures.load_image(tmp_path / "a.tiff", (8, 8)).min() == 1


def test_masks_are_averages_over_the_area_of_each_latent(tmp_path):
    levels = np.zeros((16, 32), np.uint8)
    levels[:8, 8:16] = 255
    levels[8:, 16:20] = 255
    levels[:, 24:] = np.arange(8) * 16
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = pictures.load_mask(tmp_path / "mask.png", (16, 32))
    assert mask.shape == (1, 1, 2, 4) and mask.dtype == torch.float32
    ramp = 56 / 255
    assert torch.allclose(mask[0, 0], torch.tensor([[0, 1, 0, ramp], [0, 0, 0.5, ramp]]), rtol=0, atol=1e-6)


def test_masks_are_cut_as_pictures_are(tmp_path):
    """The same file read as both: where the picture is white, the mask is one."""
    drawn = plain((300, 100), "black")
    drawn.paste("white", (140, 20, 180, 60))
    drawn.save(tmp_path / "a.png")
    mask = pictures.load_mask(tmp_path / "a.png", (128, 64))
    picture = pictures.load_image(tmp_path / "a.png", (128, 64)).mean(1, keepdim=True) / 2 + 0.5
    assert (mask - torch.nn.functional.avg_pool2d(picture, 8)).abs().mean() <= 0.01
    assert 0.1 <= mask.mean() <= 0.5


def test_strokes_on_a_transparent_layer_are_a_mask(tmp_path):
    layer = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 16, 32))
    layer.save(tmp_path / "a.png")
    mask = pictures.load_mask(tmp_path / "a.png", (32, 32))
    assert mask[..., :2].min() == 1 and mask[..., 2:].max() == 0


@pytest.mark.parametrize("load", [pictures.load_image, pictures.load_mask])
def test_files_that_are_no_pictures(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"there is no picture at .*none\.png: check the path\."):
        load(tmp_path / "none.png", (8, 8))
    with pytest.raises(OSError, match=r"cannot be read as a picture \(Is a directory\): give a PNG, JPEG or WebP"):
        load(tmp_path, (8, 8))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(OSError, match=r"text\.png cannot be read as a picture \(no format that Pillow knows\)"):
        load(tmp_path / "text.png", (8, 8))
    pictures.to_images(noise(1, 3, 64, 64))[0].save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "damaged.png").write_bytes(data[:60] + bytes(40) + data[100:])
    pictures.to_images(noise(1, 3, 160, 160))[0].save(tmp_path / "chunk.png")
    start, _, end = (tmp_path / "chunk.png").read_bytes().rpartition(b"IDAT")  # the second of two
    (tmp_path / "chunk.png").write_bytes(start + b"\x1f\x05;\xa8" + end)
    (tmp_path / "number.ppm").write_bytes(b"P6\nI0 40\n255\n" + bytes(99))
    plain((8, 8)).save(tmp_path / "huge.bmp")
    data = (tmp_path / "huge.bmp").read_bytes()
    (tmp_path / "huge.bmp").write_bytes(data[:18] + (2**20).to_bytes(4, "little") * 2 + data[26:])
    for name in ("half.png", "damaged.png", "chunk.png", "number.ppm", "huge.bmp"):
        with pytest.raises(OSError, match=r"cannot be read as a picture \(.+\): give a PNG"):
            load(tmp_path / name, (8, 8))


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Pixels of a box that are not white."""
    return int((np.asarray(sheet.crop(box)).min(axis=-1) < 255).sum())


def test_small_pictures_are_enlarged_without_smoothing():
    """Six pictures of 32 x 32 in rows of three, as during training."""
    images = pictures.to_images(noise(6, 3, 32, 32))
    sheet = pictures.contact_sheet(images, [f"picture {i}" for i in range(6)], columns=3)
    assert sheet.mode == "RGB" and sheet.width == 3 * 168 + 8
    row = (sheet.height - 8) // 2
    for i, image in enumerate(images):
        x, y = 8 + i % 3 * 168, 8 + i // 3 * row
        tile = np.asarray(sheet.crop((x, y, x + 160, y + 160)))
        assert np.array_equal(tile, np.asarray(image).repeat(5, 0).repeat(5, 1))
        assert ink(sheet, (x, y + 162, x + 160, y + row - 8)) > 50  # the caption


@pytest.mark.parametrize("fonts", [pictures._FONTS, ()])
def test_pictures_of_any_sizes_and_captions(monkeypatch, fonts):
    """With the fonts of this machine and with Pillow's own, which lacks most letters."""
    monkeypatch.setattr(pictures, "_FONTS", fonts)
    sizes = [(1024, 1024), (2048, 512), (512, 2048), (1, 1), (3000, 2), (160, 161), (7, 90)]
    captions = [
        "short",
        "a long caption " * 60,
        "雪の中の猫が座っている" * 30,
        "x" * 400,
        "",
        "zwei\nZeilen 🙂 مرحبا\t\0",
        "a\udcff surrogate",
    ]
    sheet = pictures.contact_sheet([plain(size) for size in sizes], captions)
    assert sheet.width == 3 * 520 + 8
    red = (np.asarray(sheet) == (255, 0, 0)).all(-1).sum()
    assert red == 512 * 512 + 2 * 512 * 128 + 160 * 160 + 512 + 160 * 161 + 7 * 90
    assert ink(sheet, (0, 0, 6, sheet.height)) == ink(sheet, (0, sheet.height - 8, sheet.width, sheet.height)) == 0


@pytest.mark.parametrize("text", ["a long caption of many words " * 20, "雪の中の猫" * 200, "wordwithoutanyspace" * 20])
def test_captions_are_wrapped_to_the_width_and_cut_after_twelve_lines(text):
    font = pictures._font(12, text)
    lines = pictures._wrap(text, font, 160)
    assert len(lines) == 12 and lines[-1] == "…"
    assert all(100 <= font.getlength(line) <= 160 for line in lines[:-1])
    assert text.replace(" ", "").startswith("".join(lines[:-1]).replace(" ", ""))
    if " " in text:
        assert set(" ".join(lines[:-1]).split()) <= set(text.split())  # only words longer than a line are broken
    assert pictures._wrap("a few words", font, 160) == ["a few words"]


def test_captions_do_not_run_into_the_next_picture():
    captions = ["one line", "many words " * 12, "x" * 90]
    sheet = pictures.contact_sheet([plain((160, 160))] * 3, captions, columns=3)
    for gap in range(4):  # a letter may reach a pixel beyond its advance
        assert ink(sheet, (gap * 168 + 2, 0, gap * 168 + 6, sheet.height)) == 0


def test_small_pictures_stand_in_the_middle_above_the_lines_of_their_caption():
    sheet = pictures.contact_sheet([plain((400, 300)), plain((200, 100))], ["", "x" * 150], columns=2)
    red = (np.asarray(sheet) == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red[:, 416:])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8 + 200, 8 + 299, 100, 299)
    inked = (np.asarray(sheet)[308:, 416:].min(axis=-1) < 128).any(axis=1)
    assert np.diff(inked.astype(int)).tolist().count(1) == 3  # lines of 400 pixels, apart


def test_as_many_columns_as_asked_for():
    images = [plain((160, 160))] * 5
    widths = [pictures.contact_sheet(images, ["a"] * 5, columns).width for columns in (None, 1, 2, 9)]
    assert widths == [8 + columns * 168 for columns in (3, 1, 2, 5)]


def test_mistakes_on_contact_sheets():
    with pytest.raises(ValueError, match="needs a caption for each picture, got 1 and 2"):
        pictures.contact_sheet([plain((4, 4))], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        pictures.contact_sheet([], [])
    with pytest.raises(ValueError, match="at least 1 column, got -1"):
        pictures.contact_sheet([plain((4, 4))], ["a"], columns=-1)
