"""Pictures on disk: PNGs that carry their settings, contact sheets, and what image-to-image and inpainting read."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

SETTINGS_KEY = "pixart_fast"
# What other programs show and search, "parameters", names the settings so.
_PARAMETERS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "model": "Model",
    "strength": "Denoising strength",
}
_SMALL, _LARGE = 160, 512  # pixels of a picture's longer side on a contact sheet
_MOST_LINES = 12
# Pillow's own font has no letters beyond English: the first of these that is installed, in the order of what they have.
_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf")


def to_images(pixels: Tensor) -> list[Image.Image]:
    """RGB pictures from `pixels [B, 3, H, W]` in [-1, 1] of any float dtype; ValueError if a value is not finite."""
    if not torch.isfinite(pixels).all():
        raise ValueError(
            "the decoded pictures have values that are not finite: the weights are damaged, or the autoencoder "
            "overflows in fp16 and needs bf16 or fp32."
        )
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def file_name(prompt: str, seed: int) -> str:
    """A PNG's name that is safe everywhere, readable, and different for each prompt and seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "picture"
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{words}-{digest}-{seed}.png"


def save_png(image: Image.Image, path: str | Path, settings: Mapping) -> None:
    """Write a PNG with its settings, so that the picture can be made again (`read_settings`).

    They are in the chunk "pixart_fast" as JSON (a value that JSON lacks as its text), the prompt also in "prompt", and
    the chunk "parameters" has the usual ones as other programs read them. The file is written aside and renamed.
    """
    path = Path(path)
    # A terminal can hand over bytes that are no text; a picture is not lost for that.
    prompt, negative = (
        str(settings.get(key) or "").encode("utf-8", "replace").decode() for key in ("prompt", "negative")
    )
    named = [f"{name}: {settings[key]}" for key, name in _PARAMETERS.items() if settings.get(key) is not None]
    lines = [
        prompt,
        f"Negative prompt: {negative}" if negative else "",
        ", ".join([*named, f"Size: {image.width}x{image.height}"]),
    ]
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(SETTINGS_KEY, json.dumps(dict(settings), default=str))
    chunks.add_text("prompt", prompt)
    chunks.add_text("parameters", "\n".join(filter(None, lines)))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    image.save(aside, format="PNG", pnginfo=chunks)
    os.replace(aside, path)


def read_settings(path: str | Path) -> dict:
    """The settings of a picture that `save_png` wrote; ValueError if it has none, OSError if it cannot be read."""
    try:
        settings = json.loads(_open(path).info.get(SETTINGS_KEY, "null"))
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} carries no settings: pixart_fast did not write it, or it was edited since.")
    return settings


def load_image(path: str | Path | Image.Image, size: tuple[int, int]) -> Tensor:
    """A file or picture as fp32 `[1, 3, height, width]` in [-1, 1], for `size` = (height, width).

    Turned as its EXIF says, on white where it is transparent, scaled (bicubic) to cover the size and cut to it around
    its centre. OSError in one sentence if there is no such file or it cannot be decoded.
    """
    picture = ImageOps.fit(_on(_open(path), "white"), size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def image_size(path: str | Path | Image.Image) -> tuple[int, int]:
    """Height and width of a picture, turned as its EXIF says. Errors as `load_image`."""
    upright = _open(path)
    return upright.height, upright.width


def load_mask(path: str | Path | Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask as fp32 `[1, 1, height / 8, width / 8]` in [0, 1], 1 where it is white: what is to be painted anew.

    Cut as `load_image` cuts a picture of the same shape, and averaged over the area of each latent. What is
    transparent is kept, as black is. Errors as `load_image`.
    """
    grey = _on(_open(path), "black").convert("L").convert("F")
    mask = ImageOps.fit(grey, (size[1] // 8, size[0] // 8), Image.Resampling.BOX)
    return torch.from_numpy(np.array(mask))[None, None] / 255


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """All pictures on one, in rows of `columns` (as many as rows by default), each over its caption.

    Pictures of any sizes: small ones are enlarged by a whole factor without smoothing, large ones scaled down. A
    caption is wrapped to its picture's column and cut after twelve lines. ValueError if the lists do not match.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"a contact sheet needs a caption for each picture, got {len(images)} and {len(captions)}.")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    if columns < 1:
        raise ValueError(f"a contact sheet needs at least 1 column, got {columns}.")
    tiles = [_tile(image) for image in images]
    width, pad = max(max(tile.width for tile in tiles), _SMALL), 8
    font = _font(max(12, width // 32), "".join(captions))
    texts = [_wrap(caption, font, width) for caption in captions]
    line = math.ceil(sum(font.getmetrics()) * 1.1)

    rows = [range(first, min(first + columns, len(tiles))) for first in range(0, len(tiles), columns)]
    above = [max(tiles[i].height for i in row) for row in rows]
    below = [max(len(texts[i]) for i in row) * line + pad for row in rows]
    sheet = Image.new("RGB", (columns * (width + pad) + pad, sum(above) + sum(below) + (len(rows) + 1) * pad), "white")
    pen, y = ImageDraw.Draw(sheet), pad
    for row, picture, text in zip(rows, above, below, strict=True):
        for column, i in enumerate(row):
            x = pad + column * (width + pad)
            sheet.paste(tiles[i], (x + (width - tiles[i].width) // 2, y + picture - tiles[i].height))
            for number, words in enumerate(texts[i]):
                pen.text((x, y + picture + 4 + number * line), words, fill="black", font=font)
        y += picture + text + pad
    return sheet


def _open(path: str | Path | Image.Image) -> Image.Image:
    """The decoded picture, turned as its EXIF says."""
    if isinstance(path, Image.Image):
        return ImageOps.exif_transpose(path)
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture at {path}: check the path.") from None
    # What Pillow's decoders raise for damaged files.
    except (OSError, RuntimeError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no format that Pillow knows" if unknown else getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be read as a picture ({reason}): give a PNG, JPEG or WebP file.") from error


def _on(image: Image.Image, background: str) -> Image.Image:
    """RGB, with what is transparent on a background."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _tile(image: Image.Image) -> Image.Image:
    image, longer = image.convert("RGB"), max(image.size)
    if longer <= _SMALL:
        return image.resize([side * (_SMALL // longer) for side in image.size], Image.Resampling.NEAREST)
    if longer > _LARGE:
        return image.resize([max(1, round(side * _LARGE / longer)) for side in image.size], Image.Resampling.LANCZOS)
    return image


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    for name in () if text.isascii() else _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines not wider than `width` pixels; a word, or Chinese text, that is longer than a line is broken."""
    lines = [""]
    for word in caption.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], "…"]
    return lines
