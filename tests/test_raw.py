"""Every layout of raw data, with what is wrong in real ones; pictures that decode, and those that must not."""

import csv
import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from train.data import raw
from train.data.raw import BadSample, Entry, decode, fit, open_raw, read_bytes
from train.settings import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(color="red", size=(8, 8), format="PNG", mode="RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(stream, format, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path: Path, content: bytes | str | list) -> Path:
    """Bytes, text, or a list as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pack(path: Path, members: list[tuple[str, bytes | str]], mode: str = "w", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def captions(data: raw.RawData) -> dict[str, str | None]:
    """Captions by key, in order, after a look at each picture."""
    for entry in data.entries:
        decode(read_bytes(data.root, entry))
    return {entry.key: entry.caption for entry in data.entries}


# Folders


def test_a_folder_with_metadata(tmp_path):
    for name in ("b.png", "sub/ü 雪.jpg", "sub/a.webp", "alone.png", "sub/empty.png", "null.png", "list.png"):
        write(tmp_path / name, picture(format={"jpg": "JPEG", "webp": "WEBP"}.get(name[-3:], "PNG")))
    write(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "sub/ü 雪.jpg", "text": " größer\n"},
            {"file_name": "./b.png", "text": "b"},
            {"file_name": "b.png", "text": "b again"},
            {"file_name": "gone.png", "text": "a caption for a missing file"},
            {"file_name": "sub/empty.png", "text": "   "},
            {"file_name": "null.png", "text": None},
            {"file_name": "list.png", "text": ["one", "two"]},
            {"text": "no name"},
        ],
    )
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        file.write(b"\n{torn")
    write(tmp_path / "sub" / "metadata.csv", '\ufefffile_name,text\na.webp,"a, quoted"\n')
    write(tmp_path / ".hidden.png", b"")
    write(tmp_path / ".cache" / "thumbnail.png", b"")

    data = open_raw(tmp_path)
    assert data.kind == "folder" and data.root == tmp_path and data.classes is None
    assert captions(data) == {"b.png": "b", "sub/a.webp": "a, quoted", "sub/ü 雪.jpg": "größer"}
    assert data.entries[1] == Entry("sub/a.webp", "sub/a.webp", None, None, "a, quoted", None)
    assert data.left_out == {
        "b.png": "listed more than once",
        "gone.png": "no such file",
        "sub/empty.png": "the caption is empty",
        "null.png": "no caption",
        "list.png": "the caption is no text: list",
        "alone.png": "no caption",
        "metadata.jsonl:8": "a row that names no picture",
        "metadata.jsonl:9": "a row that names no picture",
    }
    assert open_raw(tmp_path / "metadata.jsonl").entries == data.entries


def test_another_column_holds_the_captions(tmp_path):
    write(tmp_path / "a.png", picture())
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "blip": {"long": "deep inside"}}])
    with pytest.raises(
        UserError, match=r"1 left out, the first of them a\.png \(no caption\): check .* --caption-field"
    ):
        open_raw(tmp_path)
    assert captions(open_raw(tmp_path, caption_field="blip.long")) == {"a.png": "deep inside"}


def test_the_order_is_the_same_on_every_machine(tmp_path, monkeypatch):
    names = [f"{folder}{stem}.png" for folder in ("", "b/", "B/", "ä/") for stem in ("10", "9", "a", "Z")]
    for name in names:
        write(tmp_path / name, picture())
        write(tmp_path / name.replace(".png", ".txt"), name)
        write(tmp_path / f"{name}.jpg", b"no caption")
    expected = open_raw(tmp_path)
    assert list(captions(expected)) == sorted(names)

    walk = os.walk

    def shuffled(*args, **options):
        for folder, folders, files in walk(*args, **options):
            random.shuffle(folders)
            random.shuffle(files)
            yield folder, folders, files

    monkeypatch.setattr(os, "walk", shuffled)
    again = open_raw(tmp_path)
    assert again.entries == expected.entries
    assert list(again.left_out.items()) == list(expected.left_out.items()) and len(again.left_out) == len(names)


def test_texts_beside_pictures(tmp_path):
    for name in ("a/1.jpg", "a/1.v2.jpg", "a/2.PNG", "a/3.jpg", "a/4.jpg", "a/5.jpg"):
        write(tmp_path / name, picture())
    write(tmp_path / "a" / "1.txt", "\ufeffone")
    write(tmp_path / "a" / "1.v2.txt", "other dots")
    write(tmp_path / "a" / "2.json", json.dumps({"caption": "two", "long": {"text": "two, at length"}}))
    write(tmp_path / "a" / "2.txt", "two in short")
    write(tmp_path / "a" / "4.txt", "größer".encode("latin-1"))
    write(tmp_path / "a" / "5.json", "{torn")
    write(tmp_path / "a" / "6.txt", "no picture")
    data = open_raw(tmp_path)
    assert data.kind == "captions"
    assert captions(data) == {"a/1.jpg": "one", "a/1.v2.jpg": "other dots", "a/2.PNG": "two in short"}
    assert data.left_out == {
        "a/3.jpg": "no caption",
        "a/4.jpg": "the caption is no text: bytes",
        "a/5.jpg": "no caption",
        "a/6.txt": "a text without its picture",
    }
    assert captions(open_raw(tmp_path, caption_field="long.text"))["a/2.PNG"] == "two, at length"


def test_names_that_are_no_text_are_told(tmp_path):
    write(tmp_path / "a.png", picture())
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(picture())
    write(
        tmp_path / "metadata.jsonl",
        [{"file_name": "a.png", "text": "a"}, {"file_name": "\udcff.png", "text": "latin"}],
    )
    data = open_raw(tmp_path)
    assert list(captions(data)) == ["a.png"]
    assert data.left_out == {"\\udcff.png": "the name is not UTF-8"}
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "half a pair \ud83d"}])
    with pytest.raises(UserError, match="the caption is not Unicode"):
        open_raw(tmp_path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere" / "a.png", picture())
    write(tmp_path / "elsewhere" / "a.txt", "a")
    source = tmp_path / "source"
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "circle").symlink_to(source)
    assert captions(open_raw(source)) == {"linked/a.png": "a"}


def test_a_folder_that_cannot_be_listed_is_not_skipped(tmp_path, monkeypatch):
    def walk(top, onerror, **options):
        onerror(PermissionError(13, "Permission denied", f"{top}/closed"))
        yield top, [], []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match=r"closed cannot be listed \(Permission denied\): make it readable"):
        open_raw(tmp_path)


# Tars


def test_webdataset_tars(tmp_path):
    pack(
        tmp_path / "000001.tar",
        [
            ("./b.jpg", picture("red", format="JPEG")),
            ("./b.txt", "b"),
            ("./b.json", json.dumps({"caption": "b of the JSON"})),
            ("./sub/c.png", picture("blue")),
            ("./sub/c.json", json.dumps({"caption": "c of the JSON"})),
            ("./._b.jpg", b"what macOS adds"),
            ("./alone.webp", picture(format="WEBP")),
            ("./orphan.txt", "no picture"),
            ("./b.jpg", picture("green")),
        ],
    )
    pack(tmp_path / "000000.tar", [("雪" * 60 + ".png", picture("lime")), ("雪" * 60 + ".txt", "long")])
    data = open_raw(tmp_path)
    assert data.kind == "webdataset" and data.root == tmp_path
    assert captions(data) == {
        f"000000.tar/{'雪' * 60}.png": "long",
        "000001.tar/b.jpg": "b",
        "000001.tar/sub/c.png": "c of the JSON",
    }
    assert [entry.file for entry in data.entries] == ["000000.tar", "000001.tar", "000001.tar"]
    colors = [decode(read_bytes(data.root, entry)).getpixel((4, 4)) for entry in data.entries]
    assert colors[0] == GREEN and colors[2] == BLUE and colors[1][0] > 250
    assert data.left_out == {
        "000001.tar/b.jpg": "listed more than once",
        "000001.tar/alone.webp": "no caption",
        "000001.tar/orphan.txt": "a text without its picture",
    }
    assert captions(open_raw(tmp_path, caption_field="caption"))["000001.tar/b.jpg"] == "b of the JSON"


def test_patterns_of_tars(tmp_path, monkeypatch):
    for number in range(8, 12):
        pack(tmp_path / f"{number % 2}" / f"{number:03}.tar", [("a.png", picture()), ("a.txt", str(number))])

    def opened(pattern):
        data = open_raw(pattern)
        return data.root, [entry.key for entry in data.entries]

    keys = ["0/008.tar/a.png", "0/010.tar/a.png", "1/009.tar/a.png", "1/011.tar/a.png"]
    assert opened(tmp_path / "*" / "*.tar") == (tmp_path, keys)
    assert opened(tmp_path / "**" / "*.tar") == (tmp_path, keys)
    assert opened(tmp_path / "0" / "{008,010}.tar") == (tmp_path / "0", ["008.tar/a.png", "010.tar/a.png"])
    assert opened(tmp_path / "1" / "{009..009}.tar") == (tmp_path / "1", ["009.tar/a.png"])
    assert opened(tmp_path / "1" / "011.tar") == (tmp_path / "1", ["011.tar/a.png"])
    with pytest.raises(UserError, match=r"there is no \S*0/009\.tar, which \S* stands for"):
        open_raw(tmp_path / "0" / "{008..010}.tar")
    monkeypatch.chdir(tmp_path)
    assert opened(Path("{0..1}/0*.tar")) == (Path(), keys)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused(tmp_path, mode):
    path = pack(tmp_path / f"a.tar.{mode[2:]}", [("a.png", picture())], mode)
    for source in (tmp_path, path, shutil.copy(path, tmp_path / "renamed.tar")):
        with pytest.raises(UserError, match="is compressed, so that no picture in it can be reached alone: decompress"):
            open_raw(source)


def torn_at(tmp_path, cut) -> raw.RawData:
    members = [
        (f"{number}.{suffix}", content)
        for number in range(4)
        for suffix, content in (("txt", str(number)), ("png", picture(size=(40, 40))))
    ]
    path = pack(tmp_path / "t.tar", members)
    with tarfile.open(path) as tar:
        last = tar.getmember("2.png")
    with path.open("r+b") as file:
        cut(file, last)
    return open_raw(path)


@pytest.mark.parametrize("place", ["header", "data", "padding", "boundary"])
def test_a_torn_tar_gives_what_it_has(tmp_path, place):
    def cut(file, last):
        end = last.offset_data + last.size
        file.truncate({"header": last.offset + 99, "data": end - 1, "padding": end + 1, "boundary": last.offset}[place])

    data = torn_at(tmp_path, cut)
    whole = ["0", "1", "2"] if place == "padding" else ["0", "1"]
    assert list(captions(data).values()) == whole
    assert data.left_out.pop("t.tar").startswith("torn: readable up to byte ")
    assert data.left_out == ({} if place == "padding" else {"t.tar/2.txt": "a text without its picture"})


def test_damage_in_the_middle_of_a_tar_is_told(tmp_path):
    """tarfile takes a damaged header for the end and says nothing."""

    def damage(file, last):
        file.seek(last.offset + 100)
        file.write(b"\xff" * 50)

    data = torn_at(tmp_path, damage)
    assert list(captions(data).values()) == ["0", "1"] and "t.tar" in data.left_out


def test_a_tar_that_shrank_since_the_listing(tmp_path):
    path = pack(tmp_path / "t.tar", [("a.txt", "a"), ("a.png", picture())])
    data = open_raw(path)
    os.truncate(path, data.entries[0].offset + 10)
    with pytest.raises(BadSample, match="torn: its tar ends after 10 of"):
        read_bytes(data.root, data.entries[0])
    path.unlink()
    with pytest.raises(BadSample, match="cannot be read: No such file"):
        read_bytes(data.root, data.entries[0])


def test_what_is_no_file_in_a_tar_is_no_sample(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in (("dir.png", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("a.png", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            content = picture() if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    write(tmp_path / "c.jsonl", [{"key": name, "caption": name} for name in ("dir", "link", "a")])
    data = open_raw(tmp_path, captions=tmp_path / "c.jsonl")
    assert captions(data) == {"t.tar/a.png": "a"}


# SAM, PixArt's list, JourneyDB, ImageNet


@pytest.fixture
def sam(tmp_path):
    masks = json.dumps({"image": {"image_id": 1}, "annotations": []})
    for tar, numbers in ((20, (7, 8)), (21, (9, 10))):
        members = [
            (f"./sa_{n}.{suffix}", content)
            for n in numbers
            for suffix, content in (("jpg", picture(format="JPEG")), ("json", masks))
        ]
        pack(tmp_path / "sam" / f"sa_0000{tar}.tar", members)
    return tmp_path / "sam"


def test_sam(sam, tmp_path):
    expected = {"sa_000020.tar/sa_7.jpg": "seven", "sa_000021.tar/sa_10.jpg": "ten", "sa_000021.tar/sa_9.jpg": "nine"}
    lines = [("sa_7.jpg", "seven"), ("sa_000021/sa_9", "nine"), ("sa_10", "ten"), ("sa_99", "not downloaded")]
    by_line = write(tmp_path / "captions.jsonl", [{"key": key, "caption": caption} for key, caption in lines])
    for key, caption in lines:
        write(tmp_path / "texts" / f"{Path(key).stem}.txt", caption)
    for source in (by_line, tmp_path / "texts"):
        data = open_raw(sam, captions=source)
        assert data.kind == "sam" and captions(data) == expected
        assert data.left_out == {"sa_000020.tar/sa_8.jpg": "no caption"}

    for path in sam.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "unpacked" / path.stem, filter="data")
    for kind in ("auto", "sam"):
        data = open_raw(tmp_path / "unpacked", kind=kind, captions=by_line)
        assert data.kind == "sam"
        assert captions(data) == {key.replace(".tar", ""): caption for key, caption in expected.items()}


def test_sam_needs_captions(sam):
    for kind in ("auto", "sam", "webdataset"):
        with pytest.raises(UserError, match="is SAM's, whose pictures have no captions: give some with --captions"):
            open_raw(sam, kind=kind)
    with pytest.raises(UserError, match=r"there is no gone\.jsonl: --captions is"):
        open_raw(sam, captions=Path("gone.jsonl"))


def test_two_captions_for_one_key(sam, tmp_path):
    rows = [("sa_7", "seven"), ("sa_7.jpg", "seven"), ("sa_8", "eight"), ("./sa_8", "acht")]
    with (tmp_path / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    data = open_raw(sam, captions=tmp_path / "c.csv")
    assert list(captions(data).values()) == ["seven", "eight"]
    assert data.left_out["sa_8"] == "a second caption"


ITEM = {"height": 8, "width": 8, "ratio": 1.0}


@pytest.mark.parametrize(
    ("table", "pictures"),
    [
        ("data_info.json", ""),
        ("InternData/data_info.json", "InternImgs"),
        ("InternData/partition/data_info.json", "InternImgs"),
    ],
)
def test_data_info(tmp_path, table, pictures):
    items = [
        {"path": "gone.jpg", "prompt": "gone", **ITEM},
        {"path": "sub/2.jpg", "prompt": "two", "sharegpt4v": "two, at length", **ITEM},
        {"path": "1.png", "prompt": "one", "sharegpt4v": "one, at length", **ITEM},
        {"prompt": "nameless", **ITEM},
        "no item",
    ]
    write(tmp_path / table, json.dumps(items))
    write(tmp_path / pictures / "1.png", picture())
    write(tmp_path / pictures / "sub" / "2.jpg", picture(format="JPEG"))
    data = open_raw(tmp_path)
    assert data.kind == "data_info" and data.root.samefile(tmp_path / pictures)
    assert captions(data) == {"1.png": "one", "sub/2.jpg": "two"}
    assert data.left_out == {
        "gone.jpg": "no such file",
        "data_info.json:4": "a row that names no picture",
        "data_info.json:5": "a row that names no picture",
    }
    at_length = open_raw(tmp_path / table, caption_field="sharegpt4v")
    assert captions(at_length) == {"1.png": "one, at length", "sub/2.jpg": "two, at length"}


def test_data_info_with_absolute_paths(tmp_path):
    path = write(tmp_path / "far" / "1.png", picture())
    write(tmp_path / "near" / "data_info.json", json.dumps([{"path": str(path), "prompt": "one", **ITEM}]))
    data = open_raw(tmp_path / "near")
    assert captions(data) == {str(path): "one"} and data.entries[0].file == str(path)


def test_a_damaged_list_is_refused(tmp_path):
    for content, reason in (('[{"path": "a"', "cannot be read .*: fetch it again"), ('{"path": 1}', "no sample")):
        write(tmp_path / "data_info.json", content)
        with pytest.raises(UserError, match=reason):
            open_raw(tmp_path)


@pytest.mark.parametrize("place", [".", "train", "data/train"])
def test_journeydb(tmp_path, place):
    folder = tmp_path / place
    rows = [
        {"img_path": "./000/b.jpg", "prompt": "b --ar 3:2", "Task2": {"Caption": "A long b."}},
        {"img_path": "./001/a.jpg", "prompt": "a", "Task2": {"Caption": None}},
        {"img_path": "./199/z.jpg", "prompt": "not unpacked", "Task2": {"Caption": "Z."}},
    ]
    write(folder / "train_anno.jsonl", [{"img_path": "./3f/elsewhere.jpg", "prompt": "before they were moved"}])
    write(folder / "train_anno_realease_repath.jsonl", rows)
    for name in ("000/b.jpg", "001/a.jpg"):
        write(folder / "imgs" / name, picture(format="JPEG"))
    data = open_raw(tmp_path)
    assert data.kind == "journeydb" and captions(data) == {"000/b.jpg": "b --ar 3:2", "001/a.jpg": "a"}
    assert data.left_out == {"199/z.jpg": "no such file"}
    assert captions(open_raw(tmp_path, caption_field="Task2.Caption")) == {"000/b.jpg": "A long b."}


def test_imagenet(tmp_path):
    for name in ("n02/n02_2.JPEG", "n02/n02_1.JPEG", "n01/n01_9.JPEG"):
        write(tmp_path / name, picture(format="JPEG"))
    data = open_raw(tmp_path)
    assert data.kind == "imagenet" and data.classes == ["n01", "n02"]
    assert [(entry.key, entry.label) for entry in data.entries] == [
        ("n01/n01_9.JPEG", 0),
        ("n02/n02_1.JPEG", 1),
        ("n02/n02_2.JPEG", 1),
    ]
    assert set(captions(data).values()) == {None}

    (tmp_path / "n00").mkdir()
    write(tmp_path / "stray.JPEG", picture(format="JPEG"))
    data = open_raw(tmp_path, kind="imagenet")
    assert data.classes == ["n00", "n01", "n02"] and [entry.label for entry in data.entries] == [1, 2, 2]
    assert data.left_out == {"stray.JPEG": "in no class's folder", "n00/": "a class without pictures"}


# What is nothing


def test_unknown_layouts_are_refused(tmp_path):
    known = ("metadata.jsonl", "name.txt", r"\*.tar", "data_info.json", "train_anno", "per class")
    for names in ([], ["a.png"], ["images/a.png"], ["train/a.png", "val/b.png"], ["a/n01/a.png", "b/n01/b.png"]):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for name in names:
            write(tmp_path / name, picture())
        with pytest.raises(
            UserError, match=".*".join(known) + f".* found {len(names)} pictures among {len(names)} fil"
        ):
            open_raw(tmp_path)


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no \S*gone: give a folder"):
        open_raw(tmp_path / "gone")
    with pytest.raises(
        UserError, match="--kind wds is not known: choose auto, folder, captions, webdataset, sam, data_in"
    ):
        open_raw(tmp_path, kind="wds")
    for kind, missing in (
        ("folder", "has no sample"),
        ("captions", "has no sample"),
        ("webdataset", r"has no \*\.tar"),
        ("sam", "has no sample"),
        ("data_info", "has no data_info.json"),
        ("journeydb", "has no train_anno"),
        ("imagenet", "has no sample"),
    ):
        with pytest.raises(UserError, match=missing):
            open_raw(tmp_path, kind=kind)
    with pytest.raises(
        UserError, match="of kind imagenet, which has its own captions or labels: leave out --captions "
    ):
        open_raw(tmp_path, kind="imagenet", captions=tmp_path)
    write(tmp_path / "text.tar", "this is no tar")
    with pytest.raises(UserError, match=r"1 left out, the first of them text\.tar \(torn: readable up to byte 0"):
        open_raw(tmp_path)


# Pictures


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode(picture((200, 100, 50), (5, 3), format, **options))
    assert image.mode == "RGB" and image.size == (5, 3)
    assert np.abs(np.subtract(image.getpixel((2, 1)), (200, 100, 50))).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_modes(mode):
    grey = mode in ("1", "L", "LA", "I;16")
    stream = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.full((3, 3), 65535, np.uint16)).save(stream, "PNG")
    else:
        source = Image.new("RGB", (3, 3), "white" if grey else "red").convert(mode)
        source.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    assert decode(stream.getvalue()).getpixel((1, 1)) == ((255, 255, 255) if grey else RED)


def test_a_cmyk_jpeg():
    assert np.abs(np.subtract(decode(picture("red", (16, 16), "JPEG", "CMYK")).getpixel((8, 8)), RED)).max() <= 3


def test_sixteen_bits_keep_their_range():
    stream, levels = io.BytesIO(), np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(levels).save(stream, "PNG")
    assert np.asarray(decode(stream.getvalue()))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_is_white():
    for mode in ("RGBA", "LA"):
        image, stream = Image.new(mode, (2, 1), 0), io.BytesIO()
        image.putpixel((1, 0), (*([0] * (len(mode) - 1)), 128))
        image.save(stream, "PNG")
        seen = decode(stream.getvalue())
        assert seen.getpixel((0, 0)) == (255, 255, 255) and seen.getpixel((1, 0)) == (127, 127, 127)
    palette, stream = Image.new("P", (2, 1), 0), io.BytesIO()
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(stream, "PNG", transparency=0)
    assert [decode(stream.getvalue()).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_pictures(orientation):
    """The picture is stored as a camera held in that orientation would store it."""
    upright = noise(6, 4)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # of Image.Transpose
    stored, exif, stream = upright if undo is None else upright.transpose(undo), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored.save(stream, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(stream.getvalue())), np.asarray(upright))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_pictures_are_bad(format):
    stream = io.BytesIO()
    noise(64, 64).save(stream, format)
    data = stream.getvalue()
    decode(data)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(BadSample, match=r"cannot be decoded: |no picture: "):
            decode(data[: int(len(data) * share)])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_what_is_no_picture_is_bad(tmp_path):
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for data in (b"", b"\0" * 99, b"<html>404</html>", drawing):
        with pytest.raises(BadSample, match="no picture: neither JPEG, PNG, WEBP, GIF, BMP nor TIFF"):
            decode(data)
    stream = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(stream, "TIFF")
    with pytest.raises(BadSample, match="cannot be decoded: 32 bits per pixel"):
        decode(stream.getvalue())


def test_a_decompression_bomb_is_bad(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)
    with pytest.raises(BadSample, match="too large: "):
        decode(picture(size=(10, 10)))


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_else(monkeypatch):
    """Flipped bytes: a picture or a BadSample, whatever Pillow's decoders raise."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    generator, bad = random.Random(0), 0
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        stream = io.BytesIO()
        noise(12, 12).save(
            stream, format, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        )
        for _ in range(150):
            data = bytearray(stream.getvalue())
            for _ in range(generator.choice((1, 3, 20))):
                data[generator.randrange(min(len(data), generator.choice((64, 4096))))] = generator.randrange(256)
            try:
                assert decode(bytes(data)).mode == "RGB"
            except BadSample as error:
                assert str(error).partition(":")[0] in ("cannot be decoded", "no picture", "too large")
                bad += 1
    assert bad > 100


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize(
    "size", [(100, 100), (300, 100), (100, 300), (37, 61), (1, 1), (1, 1000), (999, 2), (640, 427)]
)
@pytest.mark.parametrize("target", [(64, 64), (32, 128), (256, 64)])
def test_fit_gives_the_exact_size(size, target):
    fitted = fit(noise(*size), *target)
    assert (fitted.height, fitted.width) == target and fitted.mode == "RGB"


def test_fit_keeps_the_aspect_and_the_centre():
    """Of a wide picture the height is all there, and of the width the middle: both at the same scale."""
    fitted = np.asarray(fit(gradient(300, 100), 50, 50)).astype(float)
    red, green = fitted[25, :, 0], fitted[:, 25, 1]
    assert green[0] < 3 and green[-1] > 252
    assert abs(red[0] - 255 / 3) < 2 and abs(red[-1] - 2 * 255 / 3) < 2
    assert abs((red[-1] - red[0]) * 3 - (green[-1] - green[0])) < 6, "circles stay circles"
    turned = fit(gradient(300, 100).transpose(Image.Transpose.TRANSPOSE), 50, 50)
    assert np.abs(np.asarray(turned.transpose(Image.Transpose.TRANSPOSE)) - fitted).max() <= 2


def test_fit_is_antialiased_and_leaves_what_fits():
    checks = Image.fromarray(np.tile(np.array([[0, 255], [255, 0]], np.uint8), (64, 64))).convert("RGB")
    assert np.ptp(np.asarray(fit(checks, 16, 16))[2:-2, 2:-2].astype(int)) < 8, "fine checks become grey"
    image = noise(48, 32)
    assert np.array_equal(np.asarray(fit(image, 32, 48)), np.asarray(image))
