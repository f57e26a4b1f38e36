import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_fast import aspect, embedded
from pixart_fast.text import T5Text
from tests import published
from train.data import extract as extraction
from train.data.encode import Encoders, OnlineStore, Picture
from train.data.extract import ShardWriter, begin, extract, main, report
from train.data.raw import open_raw
from train.data.store import FeatureStore, Manifest
from train.settings import UserError

CAPTIONS = ("a red cat", "a painting of the blue dog in the snow", "Snow, http://x.org/a.png (a dog)", "cat")
SIZES = ((90, 90), (130, 80), (70, 131), (96, 128))  # width, height


def picture(path, number, size):
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 pictures of four shapes, and one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for number in range(25):
        picture(folder / f"{number:02d}.png", number, SIZES[number % 4])
        rows.append({"file_name": f"{number:02d}.png", "text": CAPTIONS[number % 4]})
    (folder / "11.png").write_bytes(b"not a picture")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """As `make train` leaves it."""
    folder = tmp_path_factory.mktemp("small")
    embedded.HashedText().save(folder / "text_encoder")
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text('{"_class_name": "Autoencoder"}')
    shutil.copy("train/data/autoencoder.safetensors", folder / "vae")
    (folder / "recipe.json").write_text('{"family": "embedded", "max_tokens": 16, "clean": false, "keep_cjk": true}')
    return folder


def make(photos, store, encoders, **options):
    options = {"workers": 0, "shard_size": 10, "max_bad": 0.1, "quiet": True} | options
    return extract(open_raw(photos), store, encoders, **options)


def content(folder):
    """Every file's bytes by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one, other):
    tensors = zip(one[:3], other[:3], strict=True)
    return one[3:] == other[3:] and all(
        x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in tensors
    )


def assert_same_stores(store, online):
    assert len(store) == len(online) and store.buckets.keys() == online.buckets.keys()
    assert all(np.array_equal(store.buckets[key], online.buckets[key]) for key in store.buckets)
    left = {"shards", "files", "bytes_per_sample", "full_captions"}
    assert store.manifest.model_dump(exclude=left) == online.manifest.model_dump(exclude=left)
    for index in range(len(store)):
        assert same(store.read(index), online.read(index)), store.name(index)
        assert (store.name(index), store.caption(index)) == (online.name(index), online.caption(index))


@pytest.mark.parametrize("latent_dtype", ["fp16", "bf16"])
def test_online_is_what_the_store_has(tmp_path, photos, model, latent_dtype):
    """Bit for bit, for several aspects, whatever the threads of the process that computes it."""
    options = {"resolution": 64, "multi_aspect": True, "latent_dtype": latent_dtype}
    make(photos, tmp_path / "store", Encoders(model, **options))
    store = FeatureStore(tmp_path / "store")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        online = OnlineStore(open_raw(photos), Encoders(model, **options))
        assert len(store.buckets) >= 3
        assert_same_stores(store, online)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(store.null_caption, online.null_caption) and len(store.null_caption) == 1


def test_what_a_sample_holds(tmp_path, photos, model):
    make(photos, tmp_path / "store", Encoders(model, resolution=64, multi_aspect=True))
    store = FeatureStore(tmp_path / "store")
    manifest = store.manifest
    assert (manifest.scaling_factor, manifest.shift_factor, manifest.latent_channels) == (0.18215, 0, 4)
    assert (manifest.caption_channels, manifest.max_tokens, manifest.classes) == (published.TEXT_WIDTH, 120, None)
    assert manifest.count == 24 and manifest.left_out == {"no picture": 1}
    text = T5Text(model, max_tokens=120, clean=True, keep_cjk=False)
    for index in range(4):
        sample = store.read(index)
        key, height, width = aspect.nearest(SIZES[index][1] / SIZES[index][0], 64)
        assert sample.bucket == key and sample.size == SIZES[index][::-1] and sample.label is None
        assert sample.mean.shape == sample.std.shape == (4, height // 8, width // 8) and (sample.std > 0).all()
        features, lengths = text.encode([CAPTIONS[index]])
        assert sample.text.dtype == torch.bfloat16 and torch.equal(sample.text, features[0, : lengths[0]])
    # The published autoencoder's posterior of a picture that needs no cropping.
    pixels = np.asarray(Image.open(photos / "00.png").resize((64, 64), Image.Resampling.BICUBIC))
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    posterior = published.vae(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with torch.no_grad():
        expected = posterior.encode(images).latent_dist
    torch.testing.assert_close(store.read(0).mean, expected.mean[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(store.read(0).std, expected.std[0], rtol=2e-3, atol=2e-3)


def test_a_batch_is_encoded_as_one_by_one_up_to_rounding(photos, model):
    """As on a GPU; the pictures of a batch are of several buckets, and stay in order."""
    encoders = Encoders(model, resolution=64, multi_aspect=True)
    raw = open_raw(photos)
    (batch,) = encoders.prepare_all(raw.root, raw.entries, 2)
    pictures = [picture for _, picture in batch if isinstance(picture, Picture)]
    with torch.no_grad():
        together = encoders._encode(pictures)
    for one, other in zip(encoders.encode(pictures), together, strict=True):
        assert one[3:] == other[3:]
        for x, y in zip(one[:3], other[:3], strict=True):
            torch.testing.assert_close(x.float(), y.float(), rtol=0.02, atol=0.02)
    assert len({picture.bucket for picture in pictures}) > 2
    assert encoders.encode([]) == []


def test_one_square_without_multi_aspect(tmp_path, photos, model):
    make(photos, tmp_path / "store", Encoders(model, resolution=40))
    store = FeatureStore(tmp_path / "store")
    assert list(store.buckets) == ["1.0"] and not store.manifest.multi_aspect
    assert {store.read(index).mean.shape for index in range(24)} == {(4, 5, 5)}


def test_the_embedded_default(tmp_path, photos, small_model):
    options = {"resolution": 64, "multi_aspect": True}
    make(photos, tmp_path / "store", Encoders(small_model, **options))
    store = FeatureStore(tmp_path / "store")
    assert store.read(0).std is None and store.manifest.scaling_factor == 1
    assert store.manifest.caption_channels == embedded.HashedText().channels
    assert_same_stores(store, OnlineStore(open_raw(photos), Encoders(small_model, **options)))


def test_classes_need_no_text_encoder(tmp_path, model):
    source = tmp_path / "imagenet"
    for number in range(6):
        folder = source / ("n02", "n01", "n03")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(folder / f"{number}.png", number, (80, 70))
    shutil.copytree(model / "vae", tmp_path / "model/vae")
    encoders = Encoders(tmp_path / "model", resolution=64, classes=True)
    make(source, tmp_path / "store", encoders)
    store = FeatureStore(tmp_path / "store")
    assert store.manifest.classes == ["n01", "n02", "n03"] and store.manifest.caption_channels is None
    assert [store.read(index).label for index in range(6)] == [0, 0, 1, 1, 2, 2]
    assert store.null_caption is None and store.read(0).text is None and store.caption(0) is None
    assert_same_stores(store, OnlineStore(open_raw(source), encoders))


def test_bad_samples_are_named(tmp_path, model, capsys):
    source = tmp_path / "photos"
    source.mkdir()
    rows = []
    for number, size in enumerate([(80, 80), (300, 70), (80, 80), (70, 300), (80, 80), (280, 70)]):
        picture(source / f"{number}.png", number, size)
        rows.append({"file_name": f"{number}.png", "text": "a cat" if number != 4 else None})
    data = (source / "2.png").read_bytes()
    (source / "2.png").write_bytes(data[: len(data) // 2])
    rows.append({"file_name": "gone.png", "text": "a dog"})
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoders = Encoders(model, resolution=64, multi_aspect=True)
    with pytest.raises(UserError, match=r"3 of 7 samples cannot be used, more than 40.00% \(.*gone.png: no such file"):
        make(source, tmp_path / "store", encoders, max_bad=0.4)
    manifest = make(source, tmp_path / "store", encoders, max_bad=0.45)
    assert manifest.count == 2  # 280 x 70 is just not too narrow
    assert manifest.left_out == {
        "too narrow": 2,
        "no caption": 1,
        "no such file": 1,
        "cannot be decoded": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "store/left_out.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["1.png", "2.png", "3.png", "4.png", "gone.png"]
    assert lines[0]["reason"] == "too narrow: 300x70"
    assert "left out: 2 too narrow, " in report(manifest, tmp_path / "store")


def test_features_that_are_not_finite_are_left_out(tmp_path, photos, model):
    """Beyond fp16, as an autoencoder's latents may be; in bf16 they are kept."""

    class Loud(Encoders):
        def _posterior(self, pixels):
            self.vae.model.quant_conv.bias.data[0] = 1e6
            return super()._posterior(pixels)

    with pytest.raises(UserError, match="its latents are not finite"):
        make(photos, tmp_path / "fp16", Loud(model, resolution=64))
    assert make(photos, tmp_path / "bf16", Loud(model, resolution=64, latent_dtype="bf16")).count == 24


def test_goes_on_where_it_stopped(tmp_path, photos, small_model, monkeypatch):
    encoders = Encoders(small_model, resolution=64, multi_aspect=True)
    make(photos, tmp_path / "whole", encoders)
    shards = []
    write = extraction.write_shard

    def interrupted(path, *rest):
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(extraction, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path / "store", encoders)
    with pytest.raises(UserError, match="no finished store"):
        FeatureStore(tmp_path / "store")
    (tmp_path / "store/shards/00002.safetensors.0a0b.partial").write_bytes(b"of a worker that was killed")
    (tmp_path / "store/shards/.tmpKilled").write_bytes(b"of the same")
    monkeypatch.setattr(extraction, "write_shard", lambda path, *rest: shards.append(path.name) or write(path, *rest))
    make(photos, tmp_path / "store", encoders)
    assert shards == ["00000.safetensors", "00001.safetensors", "00002.safetensors"], "each once"
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    make(photos, tmp_path / "store", encoders)
    assert len(shards) == 3 and content(tmp_path / "store") == content(tmp_path / "whole")


def test_a_damaged_shard_is_made_again(tmp_path, photos, small_model, capsys):
    encoders = Encoders(small_model, resolution=64, multi_aspect=True)
    make(photos, tmp_path / "store", encoders)
    whole = content(tmp_path / "store")
    assert main(["--check", str(tmp_path / "store")]) == 0
    path = tmp_path / "store/shards/00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    assert main(["--check", str(tmp_path / "store")]) == 2
    assert "shards/00001.safetensors): delete what is damaged" in capsys.readouterr().err
    path.unlink()
    make(photos, tmp_path / "store", encoders)
    assert content(tmp_path / "store") == whole


def test_a_store_of_other_things_is_refused(tmp_path, photos, small_model):
    make(photos, tmp_path / "store", Encoders(small_model, resolution=32))
    with pytest.raises(UserError, match="begun with another resolution, multi_aspect: give the same"):
        make(photos, tmp_path / "store", Encoders(small_model, resolution=64, multi_aspect=True))
    with pytest.raises(UserError, match="begun with another shard_size:"):
        make(photos, tmp_path / "store", Encoders(small_model, resolution=32), shard_size=5)


def test_a_full_disk(tmp_path, photos, small_model):
    """No file can grow beyond 20 kB, which to a process is what a full disk is."""
    encoders = Encoders(small_model, resolution=64, multi_aspect=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"shard 0 could not be written .*File too large.*: free space"):
            make(photos, tmp_path / "store", encoders)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.suffix for path in (tmp_path / "store/shards").iterdir()} == {".tries"}
    assert make(photos, tmp_path / "store", encoders).count == 24


def test_encoders_that_cannot_be_loaded(tmp_path, photos, model):
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        broken = shutil.copytree(model, tmp_path / name.split("/")[0])
        (broken / name).write_bytes((broken / name).read_bytes()[:1000])
        with pytest.raises(UserError, match="the encoders cannot be loaded: "):
            make(photos, tmp_path / f"{name}.store", Encoders(broken, resolution=64))


def test_mistakes_are_one_sentence(tmp_path, photos, small_model, capsys):
    run = ["--workers", "0", "--model", str(small_model)]
    small = [str(photos), str(tmp_path / "small"), "--resolution", "32", "--max-bad", "0.1"]
    for arguments, sentence in (
        ([str(photos)], "give SOURCE, STORE and --resolution"),
        ([str(photos), str(tmp_path / "s"), "--resolution", "60", *run], "resolution 60 does not divide by 8"),
        (
            [str(photos), str(tmp_path / "s"), "--resolution", "32", "--multi-aspect", *run],
            "no aspect-ratio buckets for 32",
        ),
        ([str(tmp_path / "no"), str(tmp_path / "s"), "--resolution", "32", *run], "there is no"),
        ([str(photos), str(photos / "00.png"), "--resolution", "32", *run], "cannot be written to"),
        ([str(photos), str(tmp_path / "s"), "--resolution", "32", "--model", str(photos)], "vae has no config.json"),
        (["--check", str(tmp_path)], "is no finished store"),
        ([*small, "--model", str(small_model), "--address", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert sentence in error and "Traceback" not in error and error.count("\n") == 1, error


def test_bytes_are_stated(tmp_path, photos, model):
    """Text and latents apart, beside padded fp32 text and fp32 latents."""
    manifest = make(photos, tmp_path / "store", Encoders(model, resolution=64))
    store = FeatureStore(tmp_path / "store")
    samples = [store.read(index) for index in range(24)]
    each = manifest.bytes_per_sample
    assert each["text"] * 24 == sum(sample.text.nbytes for sample in samples)
    assert each["latents"] == 2 * 2 * 4 * 8 * 8
    assert each["all"] * 24 == sum(path.stat().st_size for path in (tmp_path / "store/shards").glob("*.safetensors"))
    told = (4 * 120 * published.TEXT_WIDTH + 4 * 2 * 4 * 8 * 8) / each["all"]
    assert f"{told:.1f} times less than" in report(manifest, tmp_path / "store")


def test_a_shard_that_takes_its_workers_down_is_given_up(tmp_path, photos, small_model, monkeypatch):
    encoders = Encoders(small_model, resolution=32)
    monkeypatch.setattr(encoders, "encode", lambda pictures: sys.exit(9))
    (task, *_) = begin(open_raw(photos), tmp_path, encoders, 10)
    writer = ShardWriter(tmp_path, photos, encoders, 1)
    for _ in range(4):
        with pytest.raises(SystemExit):
            writer.attempt(task)
    assert "shard 0 took its worker down 4 times" in writer.attempt(task)["error"]
    monkeypatch.undo()
    assert make(photos, tmp_path, encoders).count == 24, "run again, it has as many tries again"


@pytest.mark.slow
def test_the_same_bytes_from_one_worker_two_and_one_that_dies(tmp_path, photos, small_model):
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    picture(source / "13.png", 13, (91, 90))
    options = {"resolution": 64, "multi_aspect": True}
    died = tmp_path / "died"

    class Crashes(Encoders):
        """Takes its process down in the middle of a shard, once."""

        def encode(self, pictures):
            samples = super().encode(pictures)
            if any(picture.size == (90, 91) for picture in pictures) and not died.exists():
                died.touch()
                os._exit(1)
            return samples

    make(source, tmp_path / "here", Encoders(small_model, **options), shard_size=4)
    ray = pytest.importorskip("ray")
    command = [str(source), str(tmp_path / "one"), "--model", str(small_model), "--resolution", "64", "--multi-aspect"]
    assert main([*command, "--workers", "1", "--shard-size", "4", "--max-bad", "0.1"]) == 0  # starts and ends Ray
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        crashes = Crashes(small_model, **options)
        make(source, tmp_path / "two", crashes, shard_size=4, workers=2)
        with pytest.raises(UserError, match="these workers need 4 CPUs and 0 GPUs, and Ray has 3 and 0"):
            make(source, tmp_path / "three", crashes, shard_size=4, workers=3)
    finally:
        ray.shutdown()
    assert died.exists()
    assert content(tmp_path / "one") == content(tmp_path / "here")
    assert content(tmp_path / "two") == content(tmp_path / "here")
    assert Manifest.model_validate_json((tmp_path / "two/manifest.json").read_text()).count == 24
