"""Raw data in: pictures with captions or class labels, in the layouts that people have, listed in one fixed order.

| kind | pictures | captions |
|---|---|---|
| folder | a tree of files | `metadata.jsonl` or `.csv` anywhere in it: `file_name`, `text` (Hugging Face's) |
| captions | a tree of files | `name.txt` or `name.json` beside `name.jpg`, or the argument `captions` |
| webdataset | tars of files | the same: beside the picture in its tar, or the argument |
| sam | SAM's tars, or these unpacked | the argument |
| data_info | in the list's folder, one above it, or `InternImgs/` there | PixArt's `data_info.json`: `path`, `prompt` |
| journeydb | `imgs/` beside the annotations | `train_anno*.jsonl` or `valid_anno*.jsonl`: `img_path`, `prompt` |
| imagenet | one folder per class | none: labels number the folders in the order of their names |

What a listing leaves out is told by key with a reason. Reasons, those of `BadSample` too, are alike up to the first
colon where the fault is the same, so that they can be counted. Names that begin with a dot are no part of the data.
"""

import csv
import io
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from train.settings import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # the other decoders of Pillow are not for strangers' data
METADATA = ("metadata.jsonl", "metadata.csv")
DATA_INFO = tuple(f"{folder}data_info.json" for folder in ("", "partition/", "InternData/", "InternData/partition/"))
# Of two for one split, that with the paths of the published archives first.
ANNOTATIONS = ("train_anno*repath.jsonl", "train_anno.jsonl", "valid_anno*.jsonl")
CAPTION_KEYS, CAPTION_TEXTS = ("key", "file_name", "path", "image"), ("caption", "text", "prompt")
SAM_PICTURE = re.compile(r"sa_\d+\.jpg")
SPLITS = {"train", "val", "valid", "validation", "test"}
PATTERN = re.compile(r"[*?\[\]{}]")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
INDEX_THREADS = 8  # a tar is indexed by as many small reads as it has members, which wait for network storage


class BadSample(ValueError):
    """A sample that cannot be read or decoded; its text is the reason."""


class Entry(NamedTuple):
    """Where one sample lies, and its caption or label."""

    key: str  # unique and stable name of the sample in its source: "sub/0001.jpg", "sa_000001.tar/sa_12.jpg"
    file: str  # the picture, or the tar that holds it, relative to the source's root (absolute stays absolute)
    offset: int | None  # where the picture begins in the tar; None: the file is the picture
    bytes: int | None  # how many
    caption: str | None
    label: int | None


@dataclass
class RawData:
    """A listed source; `open_raw` makes it."""

    root: Path
    kind: str
    entries: list[Entry] = field(default_factory=list)  # sorted by key: the same order on every machine
    classes: list[str] | None = None  # names by label
    left_out: dict[str, str] = field(default_factory=dict)  # key to reason

    def add(self, key: str, file: str, caption: Any, label: int | None = None, place: tuple = (None, None)) -> None:
        """An entry, if its caption and key are text."""
        reason = _fault(caption) if label is None else None
        if reason is None and not _encodable(key):
            reason = "the name is not UTF-8"
        if reason is None:
            self.entries.append(Entry(key, file, *place, caption and caption.strip(), label))
        else:
            self.leave_out(key, reason)

    def leave_out(self, key: str, reason: str) -> None:
        key, number = key.encode("utf-8", "backslashreplace").decode(), 2
        unique = key
        while unique in self.left_out:
            unique, number = f"{key} #{number}", number + 1
        self.left_out[unique] = reason

    def sort(self) -> None:
        """By key; of entries with one key the first that was listed stays."""
        listed, self.entries = sorted(self.entries, key=attrgetter("key")), []
        for key, (first, *again) in groupby(listed, attrgetter("key")):
            self.entries.append(first)
            for _ in again:
                self.leave_out(key, "listed more than once")


def open_raw(
    source: Path, *, kind: str = "auto", captions: Path | None = None, caption_field: str | None = None
) -> RawData:
    """List a source.

    Args:
        source: a folder, a file that describes one (`metadata.jsonl`, `data_info.json` …), a tar, or a pattern of tars:
            `data/{000..099}.tar`, `data/**/*.tar`. A folder's tars are those directly in it.
        kind: one of `KINDS`, or "auto".
        captions: for the kinds that take it: lines of JSON or a CSV with `key` and `caption`, or a folder of `.txt`.
            Keys are pictures' paths without their suffix, with or without the name of the tar, or file names alone.
        caption_field: where captions are in JSON or CSV, if not where the kind has them: "sharegpt4v" of PixArt-Σ's
            `data_info.json`, "Task2.Caption" of JourneyDB.

    Raises:
        UserError: there is nothing there, it is none of the layouts, or not one sample of it can be used.
    """
    asked = _Source(Path(source), captions and Path(captions), caption_field)
    if not asked.path.exists() and not PATTERN.search(str(source)):
        raise UserError(f"there is no {source}: give a folder of pictures or a tar of them.")
    if kind not in ("auto", *KINDS):
        raise UserError(f"--kind {kind} is not known: choose auto, {', '.join(KINDS)}.")
    kind = _recognise(asked) if kind == "auto" else kind
    if captions is not None and kind not in ("captions", "webdataset", "sam"):
        raise UserError(
            f"{source} is of kind {kind}, which has its own captions or labels: leave out --captions {captions}, or "
            "choose --kind captions, webdataset or sam."
        )
    raw = KINDS[kind](asked)
    raw.sort()
    if not raw.entries:
        first = next((f", the first of them {key} ({reason})" for key, reason in raw.left_out.items()), "")
        raise UserError(
            f"{source}, read as kind {kind}, has no sample that can be used; {len(raw.left_out)} left out{first}: "
            "check the path, --kind and --caption-field, or give --captions."
        )
    if kind == "sam" or (kind in ("captions", "webdataset") and SAM_PICTURE.fullmatch(_last(raw.entries[0].key))):
        raw.kind = "sam"
    return raw


def read_bytes(root: Path, entry: Entry) -> bytes:
    """A picture's bytes as they are stored; BadSample if the file is missing or ends before the picture does."""
    try:
        with open(root / entry.file, "rb") as file:
            file.seek(entry.offset or 0)
            data = file.read(-1 if entry.bytes is None else entry.bytes)
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror or error}") from error
    if entry.bytes is not None and len(data) < entry.bytes:
        raise BadSample(f"torn: its tar ends after {len(data)} of {entry.bytes} bytes")
    return data


def decode(data: bytes) -> Image.Image:
    """The picture in RGB, turned as its EXIF says, on white where it is transparent; the first frame of several.

    16 bits per channel are scaled to 8. BadSample if it is no picture, not a whole one, or one of more than 179
    million pixels, which Pillow takes for an attack on memory.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _on_white(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise BadSample(f"no picture: neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]}") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"too large: {error}") from error
    # What Pillow's decoders raise for damaged files.
    except (OSError, RuntimeError, SyntaxError, TypeError, ValueError, LookupError, EOFError, struct.error) as error:
        raise BadSample(f"cannot be decoded: {error}") from error


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled (bicubic, antialiased) with its aspect kept until it covers the size, and cut to it around its centre.

    Both happen in one pass: the cut is centred to a fraction of a pixel.
    """
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts off at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, of which none says how much is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class _Source:
    """What `open_raw` was asked for."""

    path: Path
    captions: Path | None
    field: str | None

    @cached_property
    def files(self) -> list[str]:
        """Every file of the tree, by its path from the root."""

        def refuse(error: OSError) -> None:
            raise UserError(f"{error.filename} cannot be listed ({error.strerror}): make it readable.") from error

        root, files = str(self.path), []
        for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
            inside = Path(os.path.realpath(folder))  # a link to what it lies in would never end
            folders[:] = (
                name
                for name in folders
                if name[0] != "." and not inside.is_relative_to(os.path.realpath(os.path.join(folder, name)))
            )
            prefix = f"{os.path.relpath(folder, root)}/" if folder != root else ""
            files += [prefix + name for name in names if name[0] != "."]
        return sorted(files)

    @cached_property
    def pictures(self) -> list[str]:
        return [name for name in self.files if name.lower().endswith(SUFFIXES)]


def _recognise(source: _Source) -> str:
    path, given = source.path, source.captions is not None
    if not path.is_dir():
        if path.name in METADATA:
            return "folder"
        if path.suffix == ".json":
            return "data_info"
        return "journeydb" if path.suffix == ".jsonl" else "webdataset"
    if not given and _data_info_file(path):
        return "data_info"
    if not given and _annotations(path):
        return "journeydb"
    if _tars(path)[1]:
        return "webdataset"
    if not given and any(_last(name) in METADATA for name in source.files):
        return "folder"
    texts = {name for name in source.files if name.endswith(".txt")}
    if source.pictures and (
        given or any(_stem(name) + ".txt" in texts or SAM_PICTURE.match(_last(name)) for name in source.pictures)
    ):
        return "captions"
    classes = {name.partition("/")[0] for name in source.pictures}
    if len(classes - SPLITS) > 1 and all(name.count("/") == 1 for name in source.pictures):
        return "imagenet"
    raise UserError(
        f"{path} has none of the known layouts; looked for {' or '.join(METADATA)} (folder), name.txt beside name.jpg "
        "(captions), *.tar (webdataset, sam), data_info.json (data_info), train_anno*.jsonl (journeydb) and two or "
        f"more folders of pictures, one per class (imagenet), and found {len(source.pictures)} pictures among "
        f"{len(source.files)} files: choose --kind, give --captions, or a folder further in."
    )


def _folder(source: _Source) -> RawData:
    root = source.path.parent if source.path.is_file() else source.path
    source, raw = _Source(root, None, source.field), RawData(root, "folder")
    unnamed = set(source.pictures)
    for table in (name for name in source.files if _last(name) in METADATA):
        rows = _rows(raw, root / table, ("file_name",), (source.field or "text",))
        rows = [(os.path.normpath(os.path.join(os.path.dirname(table), name)), caption) for name, caption in rows]
        _listed(raw, rows)
        unnamed.difference_update(name for name, _ in rows)
    for name in sorted(unnamed):
        raw.leave_out(name, "no caption")
    return raw


def _data_info(source: _Source) -> RawData:
    path = _data_info_file(source.path)
    if path is None:
        raise UserError(f"{source.path} has no {' and no '.join(DATA_INFO)}: give the file itself.")
    raw = RawData(path.parent, "data_info")
    rows = list(_rows(raw, path, ("path",), (source.field or "prompt",)))
    above = (path.parent, *path.absolute().parent.parents[:2])
    for root in (base for folder in above for base in (folder, folder / "InternImgs")):
        if any((root / name).is_file() for name, _ in rows[:100]):
            raw.root = root
            break
    return _listed(raw, rows)


def _journeydb(source: _Source) -> RawData:
    path = source.path if source.path.is_file() else _annotations(source.path)
    if path is None:
        raise UserError(f"{source.path} has no {' or '.join(ANNOTATIONS)}: unpack them from their .tgz.")
    raw = RawData(path.parent / "imgs", "journeydb")
    return _listed(raw, _rows(raw, path, ("img_path",), (source.field or "prompt",)))


def _imagenet(source: _Source) -> RawData:
    with os.scandir(source.path) as found:
        classes = sorted(entry.name for entry in found if entry.is_dir() and entry.name[0] != ".")
    raw, labels = RawData(source.path, "imagenet", classes=classes), {name: i for i, name in enumerate(classes)}
    for name in source.pictures:
        if "/" in name:
            raw.add(name, name, None, labels[name.partition("/")[0]])
        else:
            raw.leave_out(name, "in no class's folder")
    for empty in sorted(set(classes) - {name.partition("/")[0] for name in source.pictures}):
        raw.leave_out(f"{empty}/", "a class without pictures")
    return raw


def _tree(source: _Source) -> RawData:
    raw, places = RawData(source.path, "captions"), dict.fromkeys(source.files, (None, None))
    _pair(raw, source, _captions(raw, source), places, lambda name: (source.path / name).read_bytes())
    return raw


def _all_tars(source: _Source) -> RawData:
    root, tars = _tars(source.path)
    if not tars:
        raise UserError(f"{source.path} has no *.tar in it: give their folder, or a pattern such as 'DIR/**/*.tar'.")
    whole = RawData(root, "webdataset")
    captions = _captions(whole, source)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        for part in pool.map(lambda path: _one_tar(source, root, path, captions), tars):
            whole.entries += part.entries
            whole.left_out |= part.left_out
    return whole


def _one_tar(source: _Source, root: Path, path: Path, captions: dict[str, Any] | None) -> RawData:
    raw, tar = RawData(root, "webdataset"), str(path.relative_to(root))
    with path.open("rb") as stream:
        places = _index(raw, stream, tar)

        def read(name: str) -> bytes:
            stream.seek(places[name][0])
            return stream.read(places[name][1])

        _pair(raw, source, captions, places, read, tar)
    return raw


def _sam(source: _Source) -> RawData:
    return _tree(source) if source.path.is_dir() and not _tars(source.path)[1] else _all_tars(source)


KINDS: dict[str, Callable[[_Source], RawData]] = {
    "folder": _folder,
    "captions": _tree,
    "webdataset": _all_tars,
    "sam": _sam,
    "data_info": _data_info,
    "journeydb": _journeydb,
    "imagenet": _imagenet,
}


def _rows(raw: RawData, path: Path, names: tuple[str, ...], texts: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Name and caption of each row of a JSON Lines, CSV or JSON file, by the first of the fields there are.

    Damaged rows are left out. Those of JSON shrink while they are read: 14 million would not fit as dicts.
    """

    def pick(row: dict[str, Any]) -> tuple[Any, Any]:
        found = ([value for key in keys if (value := _field(row, key))] for keys in (names, texts))
        return tuple(next(iter(values), None) for values in found)

    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                rows = json.load(file, object_hook=pick)
                rows = rows if isinstance(rows, list) else ()
                pairs = (row if isinstance(row, tuple) else (None, None) for row in rows)
            elif path.suffix == ".csv":
                pairs = map(pick, csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline="")))
            else:
                pairs = (pick(_object(line)) for line in file if line.strip())
            for number, (name, caption) in enumerate(pairs, 1):
                if name is None:
                    raw.leave_out(f"{path.name}:{number}", "a row that names no picture")
                else:
                    yield str(name), caption
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from error


def _listed(raw: RawData, rows: Iterable[tuple[str, Any]]) -> RawData:
    """Adds the rows whose picture exists, told by one look into each folder."""
    folders: dict[str, set[str]] = {}
    for name, caption in rows:
        key = os.path.normpath(name)
        folder, last = os.path.split(raw.root / key)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if last in folders[folder]:
            raw.add(key, key, caption)
        else:
            raw.leave_out(key, "no such file")
    return raw


def _pair(
    raw: RawData,
    source: _Source,
    captions: dict[str, Any] | None,
    places: dict[str, tuple],
    read: Callable[[str], bytes],
    tar: str = "",
) -> None:
    """Adds the pictures among the files of a tree or a tar, each with its caption from `captions` or from beside it."""
    prefix, used = f"{tar}/" if tar else "", set()
    for name, place in places.items():
        if not name.lower().endswith(SUFFIXES):
            continue
        stem, caption = _stem(name), None
        if captions is not None:
            named = (f"{_stem(tar)}/{stem}", stem, _last(stem))
            caption = next((captions[key] for key in named if key in captions), None)
        elif SAM_PICTURE.fullmatch(_last(name)):
            raise UserError(f"{source.path} is SAM's, whose pictures have no captions: give some with --captions.")
        else:
            beside = [f"{stem}.json", f"{stem}.txt"] if source.field else [f"{stem}.txt", f"{stem}.json"]
            for text in [text for text in beside if text in places][:1]:
                used.add(f"{stem}.txt")
                caption = _text(read(text), source.field or "caption" if text.endswith(".json") else None)
        raw.add(prefix + name, tar or name, caption, place=place)
    for name in places if captions is None else ():
        if name.endswith(".txt") and name not in used:
            raw.leave_out(prefix + name, "a text without its picture")


def _text(data: bytes, json_field: str | None) -> Any:
    """A caption from a text or from a field of JSON; bytes that are neither as they are, which no caption is."""
    if json_field:
        return _field(_object(data), json_field)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data


def _captions(raw: RawData, source: _Source) -> dict[str, Any] | None:
    """The argument `captions`, by the pictures' names without suffixes."""
    path = source.captions
    if path is None:
        return None
    if path.is_dir():
        texts = (name for name in _Source(path, None, None).files if name.endswith(".txt"))
        rows = ((name, _text((path / name).read_bytes(), None)) for name in texts)
    elif path.is_file():
        rows = _rows(raw, path, CAPTION_KEYS, (source.field,) if source.field else CAPTION_TEXTS)
    else:
        raise UserError(f"there is no {path}: --captions is a JSON Lines or CSV file, or a folder of .txt.")
    captions: dict[str, Any] = {}
    for name, caption in rows:
        key = _stem(os.path.normpath(name))
        if captions.setdefault(key, caption) != caption:
            raw.leave_out(key, "a second caption")
    return captions


def _index(raw: RawData, stream: io.BufferedReader, tar: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each file in a tar by name. What is torn off is left out."""
    if stream.peek(6).startswith(COMPRESSED):
        raise UserError(f"{stream.name} is compressed, so that no picture in it can be reached alone: decompress it.")
    size, places, end = os.fstat(stream.fileno()).st_size, {}, 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as index:
            while (member := index.next()) is not None and member.offset_data + member.size <= size:
                index.members.clear()  # else all headers stay in memory
                end, name = index.offset, os.path.normpath(member.name).lstrip("/")
                if name in places:
                    raw.leave_out(f"{tar}/{name}", "listed more than once")
                elif member.isreg() and not member.issparse() and _last(name)[0] != ".":
                    places[name] = member.offset_data, member.size
    except tarfile.TarError:
        pass  # told below
    stream.seek(end)
    # tarfile takes a damaged header for the end, which is a block of zeros.
    if stream.read(512) != bytes(512):
        raw.leave_out(tar, f"torn: readable up to byte {end}, without an end")
    return places


def _tars(path: Path) -> tuple[Path, list[Path]]:
    """A folder that all tars are in, and the tars; if there are none but compressed ones, which are refused, these."""
    if path.is_dir():
        return path, sorted(path.glob("*.tar")) or sorted([*path.glob("*.tar.*"), *path.glob("*.tgz")])
    if path.exists():
        return path.parent, [path]
    names = [name for text in _braces(str(path)) for name in (glob(text, recursive=True) or [text])]
    for name in names:
        if not os.path.isfile(name):
            raise UserError(f"there is no {name}, which {path} stands for: check the pattern.")
    root = next(folder for folder in path.parents if not PATTERN.search(str(folder)))
    return root, sorted({Path(name) for name in names})


def _braces(text: str) -> list[str]:
    """ "a{08..10}" as a08, a09, a10 and "{train,val}" as train, val, as a shell has them."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    choices = match[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        choices = [str(n).zfill(len(numbers[1])) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    return [whole for choice in choices for whole in _braces(text[: match.start()] + choice + text[match.end() :])]


def _data_info_file(path: Path) -> Path | None:
    return path if path.is_file() else next((path / name for name in DATA_INFO if (path / name).is_file()), None)


def _annotations(path: Path) -> Path | None:
    folders = (path, path / "train", path / "data" / "train")
    return next((file for folder in folders for name in ANNOTATIONS for file in sorted(folder.glob(name))), None)


def _object(data: bytes) -> dict[str, Any]:
    """What JSON says, {} if it is damaged."""
    try:
        return json.loads(data)
    except ValueError:
        return {}


def _field(row: Any, path: str) -> Any:
    """`row["Task2"]["Caption"]` for "Task2.Caption", None where there is no such thing."""
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _fault(caption: Any) -> str | None:
    """Why a caption is none."""
    if caption is None:
        return "no caption"
    if not isinstance(caption, str):
        return f"the caption is no text: {type(caption).__name__}"
    if not caption.strip():
        return "the caption is empty"
    return None if _encodable(caption) else "the caption is not Unicode"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    """Without the suffix of a picture, text or tar; other dots are part of a name."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (*SUFFIXES, ".txt", ".tar") else name
