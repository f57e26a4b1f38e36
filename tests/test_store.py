import json
import os
import pickle
import resource

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from train.data import store as stores
from train.data.store import (
    INDEX,
    NULL_CAPTION,
    FeatureStore,
    Manifest,
    Sample,
    complete,
    describe,
    write_aside,
    write_shard,
    write_tensors,
)
from train.settings import UserError

KEYS = {"0.6": (3, 5), "1.0": (4, 4), "1.67": (5, 3)}  # latents' heights and widths


def sample(number, *, captions=True, std=True, tokens=None, width=8):
    torch.manual_seed(number)
    key = list(KEYS)[number % 3]
    mean = torch.randn(4, *KEYS[key]).half().float()
    text = torch.randn(tokens or 1 + number % 7, width).bfloat16() if captions else None
    label = None if captions else number % 5
    return Sample(mean, mean.abs() if std else None, text, label, (100 + number, 90), key)


def make(folder, samples, shard_size=10, dtype=torch.float16):
    """A finished store of samples, whose names and captions are their numbers."""
    (folder / "shards").mkdir(parents=True)
    shards = []
    for number, first in enumerate(range(0, len(samples), shard_size)):
        part = samples[first : first + shard_size]
        names = [
            (f"ü{first + row}.jpg", f"caption {first + row}" if x.text is not None else None)
            for row, x in enumerate(part)
        ]
        write_shard(folder / f"shards/{number:05d}.safetensors", part, names, dtype)
        shards.append(describe(folder, f"shards/{number:05d}.safetensors", len(part)))
    captioned = samples[0].text is not None
    if captioned:
        write_tensors(folder / NULL_CAPTION, {"null_caption": torch.ones(1, samples[0].text.shape[1]).bfloat16()})
    keys = [sample.bucket for sample in samples]
    manifest = Manifest(
        resolution=32,
        multi_aspect=True,
        latent_channels=4,
        downsample=8,
        latent_dtype="fp16",
        scaling_factor=0.2,
        shift_factor=0.0,
        caption_channels=samples[0].text.shape[1] if captioned else None,
        max_tokens=120 if captioned else None,
        classes=None if captioned else list("abcde"),
        encoders={},
        sources=[],
        count=len(samples),
        buckets={key: keys.count(key) for key in sorted(set(keys), key=float)},
        left_out={},
        shards=shards,
    )
    complete(folder, manifest, keys, {"bad.jpg": "no picture"})
    return folder


def equal(one, other):
    tensors = zip(one[:3], other[:3], strict=True)
    return one[3:] == other[3:] and all(
        x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in tensors
    )


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("captions", "std"), [(True, True), (True, False), (False, True)])
def test_gives_back_what_was_written(tmp_path, captions, std):
    samples = [sample(number, captions=captions, std=std) for number in range(25)]
    store = FeatureStore(make(tmp_path / "store", samples))
    assert len(store) == 25 and len(store.manifest.shards) == 3
    for index in np.random.default_rng(0).permutation(25).tolist():
        assert equal(store.read(index), samples[index])
        assert store.name(index) == f"ü{index}.jpg"
        assert store.caption(index) == (f"caption {index}" if captions else None)
    assert list(store.buckets) == list(KEYS) == list(store.manifest.buckets)
    for place, key in enumerate(KEYS):
        assert store.buckets[key].dtype == np.int64
        assert store.buckets[key].tolist() == list(range(place, 25, 3))
    assert store.null_caption is None if not captions else store.null_caption.shape == (1, 8)
    assert (tmp_path / "store/left_out.jsonl").read_text() == '{"key": "bad.jpg", "reason": "no picture"}\n'
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "store").rglob("*.*")}
    assert modes == {(tmp_path / "plain").stat().st_mode}, "others may read it"
    for wrong in (-1, 25):
        with pytest.raises(IndexError):
            store.read(wrong)


def test_latents_in_bf16(tmp_path):
    samples = [sample(number) for number in range(3)]
    store = FeatureStore(make(tmp_path / "store", samples, dtype=torch.bfloat16))
    assert torch.equal(store.read(1).mean, samples[1].mean.bfloat16().float())


def test_a_sample_owns_its_memory(tmp_path):
    """A view of the memory map would take the whole shard with it to another process."""
    store = FeatureStore(make(tmp_path / "store", [sample(number) for number in range(12)]))
    for tensor in store.read(5)[:3]:
        assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes


class Samples:
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return self.store.read(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_read_by_a_data_loader(tmp_path, workers):
    samples = [sample(number) for number in range(25)]
    store = FeatureStore(make(tmp_path / "store", samples))
    store.read(7)  # a shard is open when the workers are forked
    loaded = DataLoader(Samples(store), batch_size=None, num_workers=workers, collate_fn=lambda x: x)
    assert all(equal(got, want) for got, want in zip(loaded, samples, strict=True))


def test_travels_by_pickle(tmp_path):
    store = FeatureStore(make(tmp_path / "store", [sample(number) for number in range(12)]))
    store.read(3)
    assert equal(pickle.loads(pickle.dumps(store)).read(11), store.read(11))


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "OPEN_SHARDS", 3)
    samples = [sample(number) for number in range(25)]
    store = FeatureStore(make(tmp_path / "store", samples, shard_size=2))
    for index in [*range(25), *range(24, -1, -1)]:
        assert equal(store.read(index), samples[index])
        assert len(store._open) <= 3


def test_the_same_samples_are_the_same_bytes(tmp_path):
    samples = [sample(number) for number in range(25)]
    one, other = (make(tmp_path / name, samples) for name in ("one", "other"))
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert len(files) == 7
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("tensor", "place"), [("latents.1.0", 0), ("text", 7), ("names", 0), ("index", 16), ("index", 40)]
)
def test_a_flipped_bit_is_noticed(tmp_path, tensor, place):
    samples = [sample(number) for number in range(20)]
    folder = make(tmp_path / "store", samples)
    FeatureStore(folder).check()
    path = folder / "shards/00001.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    start, _ = json.loads(path.read_bytes()[8 : 8 + header])[tensor]["data_offsets"]
    flip(path, 8 + header + start + place)
    store = FeatureStore(folder)
    assert equal(store.read(0), samples[0]), "the other shards are sound"
    with pytest.raises(UserError, match=r"shards/00001.safetensors is damaged .*: delete"):
        for index in range(10, 20):
            store.read(index)
            store.caption(index)
    with pytest.raises(UserError, match=r"1 of 4 files .* \(shards/00001.safetensors\)"):
        store.check()


def test_a_damaged_header(tmp_path):
    folder = make(tmp_path / "store", [sample(number) for number in range(20)])
    flip(folder / "shards/00000.safetensors", 12)
    with pytest.raises(UserError, match=r"00000.safetensors is damaged"):
        FeatureStore(folder).read(0)


@pytest.mark.parametrize("name", ["shards/00001.safetensors", INDEX, NULL_CAPTION])
def test_missing_and_short_files_are_named_at_once(tmp_path, name):
    folder = make(tmp_path / "store", [sample(number) for number in range(20)])
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(UserError, match=rf"{name} is damaged \(it has \d+ of \d+ bytes\)"):
        FeatureStore(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is damaged \(it has 0 of \d+ bytes\)"):
        FeatureStore(folder)


def test_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"no finished store: run `python -m train.data.extract"):
        FeatureStore(tmp_path)
    for content in ("{", '{"version": 2}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest.json is damaged or of another version"):
            FeatureStore(tmp_path)


@pytest.fixture
def small_disk():
    """No file can grow beyond 64 kB, which to a process is what a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path, small_disk):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"x": torch.zeros(10)})
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"):
        write_tensors(path, {"x": torch.zeros(100_000)})
    with pytest.raises(OSError, match="File too large"):
        write_aside(path, lambda partial: partial.write_bytes(bytes(100_000)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_sixth_of_the_published_text(tmp_path):
    """At 40 tokens of T5-XXL: the text, with all that a store adds to it, beside padded fp32 in a file per sample."""
    samples = [sample(number, tokens=40, width=4096)._replace(bucket="1.0") for number in range(6)]
    samples = [one._replace(mean=torch.zeros(4, 32, 32), std=torch.ones(4, 32, 32)) for one in samples]
    folder = make(tmp_path / "store", samples)
    ours = sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.name != NULL_CAPTION) / 6
    latents = 2 * 2 * 4 * 32 * 32
    text = np.zeros((1, 120, 4096), np.float32)
    np.savez(tmp_path / "text.npz", caption_feature=text, attention_mask=np.zeros((1, 120), np.int64))
    np.save(tmp_path / "latents.npy", np.zeros((8, 32, 32), np.float32))
    published_text, published_latents = ((tmp_path / name).stat().st_size for name in ("text.npz", "latents.npy"))
    assert published_text == pytest.approx(1.97e6, rel=2e-3)
    assert published_text / (ours - latents) >= 6
    assert (published_text + published_latents) / ours > 5.8
