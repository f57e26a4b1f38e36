import pytest
import torch

from pixart_fast.embedded import Autoencoder
from train.data import autoencoder
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
    with pytest.raises(ValueError, match=r"\[1, 3, 64, 64\]"):
        shipped.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\]"):
        shipped.decode(torch.zeros(1, 4, 8, 8))
