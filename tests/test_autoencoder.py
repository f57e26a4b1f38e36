import copy
import re

import pytest
import torch

from pixart_fast.aspect import BUCKETS
from pixart_fast.embedded import Autoencoder
from train.data import autoencoder
from train.data.autoencoder import WEIGHTS_64
from train.data.encode import Encoders
from train.data.scenes import Scene, SceneObject, Scenes, draw


@pytest.fixture(scope="module")
def shipped():
    return Autoencoder.load(autoencoder.WEIGHTS)


@pytest.fixture(scope="module")
def pictures():
    return Scenes(seed=9).batch(range(512)).images


def test_shipped_weights_are_small(shipped):
    assert autoencoder.WEIGHTS.stat().st_size < 500_000
    assert sum(p.numel() for p in shipped.parameters()) <= 250_000
    assert not shipped.training and not any(p.requires_grad for p in shipped.parameters())
    assert {x.dtype for x in shipped.parameters()} == {torch.float32}


def test_shapes(shipped, pictures):
    latents = shipped.encode(pictures[:5])
    assert latents.shape == (5, shipped.latent_channels, shipped.latent_size, shipped.latent_size)
    assert shipped.latent_size * shipped.downsample == 32
    assert shipped.decode(latents).shape == (5, 3, 32, 32)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_any_sides_that_divide_by_8(shipped, size):
    images = Scenes(seed=9).batch(range(3), *size).images
    latents = shipped.encode(images)
    assert latents.shape == (3, 8, size[0] // 8, size[1] // 8)
    assert shipped.decode(latents).shape == images.shape


def test_a_larger_picture_is_encoded_place_by_place(shipped, pictures):
    """Two latents away from a seam pictures side by side have their own latents: the weights know no position."""
    left, right = pictures[:4], pictures[4:8]
    together, alone = shipped.encode(torch.cat([left, right], 3)), shipped.encode(left)
    torch.testing.assert_close(together[..., :2], alone[..., :2])
    assert not torch.allclose(together[..., 3], alone[..., 3])


def test_latents_have_unit_scale(shipped, pictures):
    latents = shipped.encode(pictures)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_latent_depends_on_its_picture_alone(shipped, pictures):
    torch.testing.assert_close(shipped.encode(pictures[3:4]), shipped.encode(pictures[:64])[3:4])


@pytest.mark.parametrize("split", ["seen", "held_out"])
def test_the_oracle_reads_decoded_pictures(shipped, split):
    rates = autoencoder.reconstruction_score(shipped, split, count=384)
    assert min(rates["background"], rates["colour"], rates["size"], rates["count"]) >= 0.97, rates
    assert rates["binding"] >= 0.93, rates


def test_the_decoder_forgives_small_errors(shipped):
    batch = Scenes(seed=1, split="seen").batch(range(256))
    latents = shipped.encode(batch.images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rates = autoencoder.oracle.score(batch.scenes, shipped.decode(latents + 0.2 * noise))
    assert rates["binding"] >= 0.9, rates


def test_training_is_deterministic_and_survives_the_file(tmp_path):
    model, again, other = (
        autoencoder.train(3, batch=8, seed=seed, latent_channels=4, measured=64) for seed in (0, 0, 1)
    )
    weights, same = model.state_dict(), again.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(model.encoder[1].weight, other.encoder[1].weight)
    model.save(tmp_path / "weights.safetensors")
    loaded = Autoencoder.load(tmp_path / "weights.safetensors")
    assert loaded.latent_channels == 4
    images = Scenes().batch(range(8)).images
    torch.testing.assert_close(loaded.encode(images), model.encode(images), rtol=0, atol=2e-2)


def test_training_learns():
    """Sixty steps beat the best flat picture, which misses every object."""
    model = autoencoder.train(60, batch=16, measured=512)
    images = Scenes(seed=2).batch(range(128)).images
    flat = images.flatten(2).median(2).values[..., None, None].expand_as(images)
    with torch.no_grad():
        decoded = model.decode(model.encode(images))
    assert autoencoder.reconstruction_loss(decoded, images) < 0.7 * autoencoder.reconstruction_loss(flat, images)


def test_loss_weighs_small_objects_as_large_ones():
    """An object that is painted over costs about as much whatever its size; a right picture costs nothing."""
    small, large = (
        draw([Scene("black", (SceneObject("yellow", "square", size, "top left"),))]) for size in ("small", "large")
    )
    empty = draw([Scene("black", ())])
    costs = [autoencoder.reconstruction_loss(empty, image).item() for image in (small, large)]
    assert costs[0] == pytest.approx(costs[1], rel=0.25) and costs[0] > 0.5
    assert autoencoder.reconstruction_loss(small, small) == 0


def test_wrong_shapes_are_named(shipped):
    for shape in ((1, 3, 60, 64), (1, 3, 64, 60), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
            shipped.encode(torch.zeros(shape))
    for shape in ((1, 4, 8, 8), (8, 4, 4)):
        with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
            shipped.decode(torch.zeros(shape))


@pytest.mark.parametrize("size", BUCKETS[64].values())
def test_the_oracle_reads_decoded_pictures_of_64_px(size):
    rates = autoencoder.reconstruction_score(Autoencoder.load(WEIGHTS_64), "held_out", 256, *size)
    assert min(rates.values()) >= 0.95, rates


def test_both_weights_have_one_encoder(shipped):
    """So features of one are features of the other."""
    other = Autoencoder.load(WEIGHTS_64).state_dict()
    differ = {
        name.partition(".")[0] for name, tensor in shipped.state_dict().items() if not torch.equal(tensor, other[name])
    }
    assert differ == {"decoder"}


def test_the_decoder_learns_alone(shipped):
    model = autoencoder.train_decoder(copy.deepcopy(shipped), 2, batch=2)
    before, after = shipped.state_dict(), model.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_a_model_folder_to_extract_features_by(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["autoencoder", "--model-folder", str(tmp_path / "encoders")])
    autoencoder.main()
    encoders = Encoders(tmp_path / "encoders", resolution=64, multi_aspect=True)
    encoders.load()
    assert torch.equal(encoders.vae.model.decoder[0].weight, Autoencoder.load(WEIGHTS_64).decoder[0].weight)
    assert encoders.null_caption.shape == (1, 256)
