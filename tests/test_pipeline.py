"""Our pipeline: diffusers' pictures from the same noise, and what it has beside them."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from PIL import Image
from safetensors.torch import save_file

from pixart_fast import pipeline as module
from pixart_fast.denoise import Denoiser, Guidance
from pixart_fast.pipeline import PixArtPipeline
from pixart_fast.recipe import read_recipe
from pixart_fast.transformer import Transformer
from tests import published

PROMPT = "a painting of a red cat in the snow"


@pytest.fixture(scope="module", params=[PixArtAlphaPipeline, PixArtSigmaPipeline], ids=["alpha", "sigma"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("model") / kind.__name__, kind)


@pytest.fixture(scope="module")
def alpha(tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("model") / "alpha")


def load(folder, **options) -> PixArtPipeline:
    return PixArtPipeline.from_pretrained(folder, **{"device": "cpu", "text_precision": "fp32"} | options)


def noise(seeds, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.stack([torch.randn(4, height, width, generator=torch.Generator().manual_seed(s)) for s in seeds])


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("negative", ["", "blurry, bad painting"], ids=["empty", "negative"])
def test_latents_equal_diffusers(kind, folder, negative):
    theirs = kind.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a dog", PROMPT]
    expected = theirs(
        [prompt for prompt in prompts for _ in range(2)],
        negative_prompt=negative,
        latents=noise((3, 4, 3, 4)),
        num_inference_steps=20,
        clean_caption=kind is PixArtAlphaPipeline,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    ours = load(folder)(prompts, negative=negative, steps=20, seed=3, num_images=2, batch_size=4)
    assert difference(ours.latents, expected) <= 1e-4
    decoded = theirs.vae.decode(expected / theirs.vae.config.scaling_factor).sample.detach().clamp(-1, 1)
    assert [image.size for image in ours.images] == [(64, 64)] * 4
    pixels = np.stack([np.asarray(image) for image in ours.images]).transpose(0, 3, 1, 2)
    assert np.abs(pixels / 127.5 - 1 - decoded.numpy()).max() <= 1.5 / 127.5
    assert [settings["seed"] for settings in ours.settings] == [3, 4, 3, 4]
    assert [settings["prompt"] for settings in ours.settings] == ["a dog", "a dog", PROMPT, PROMPT]


@pytest.mark.parametrize("sampler", ["dpm", "iddpm", "sa", "lcm", "ddim"])
def test_a_picture_does_not_depend_on_its_batch(alpha, sampler):
    pipeline = load(alpha)
    options = {"sampler": sampler, "steps": 3, "seed": 5}
    together = pipeline([PROMPT, "snow"], num_images=2, batch_size=4, **options).latents
    apart = pipeline([PROMPT, "snow"], num_images=2, batch_size=1, **options).latents
    assert difference(together, apart) <= 1e-5
    assert len({tuple(picture.flatten().tolist()) for picture in apart}) == 4
    assert difference(pipeline(PROMPT, **options).latents[0], apart[0]) <= 1e-5


def evaluations(monkeypatch) -> list[tuple[float, int]]:
    """Records time and rows of each evaluation of the transformer."""
    seen = []
    evaluate = Denoiser.evaluate

    def counted(model, caption, latents, time, added):
        seen.append((time[0].item(), len(latents)))
        return evaluate(model, caption, latents, time, added)

    monkeypatch.setattr(Denoiser, "evaluate", staticmethod(counted))
    return seen


def test_guidance_in_an_interval_evaluates_one_branch_elsewhere(alpha, monkeypatch):
    seen = evaluations(monkeypatch)
    pipeline = load(alpha)
    inside = pipeline(PROMPT, steps=10, interval=(0.3, 0.7))
    assert [rows for _, rows in seen] == [2 if 300 <= t <= 700 else 1 for t, _ in seen]
    assert {rows for _, rows in seen} == {1, 2}
    seen.clear()
    none = pipeline(PROMPT, steps=10, guidance=1.0)
    assert {rows for _, rows in seen} == {1}
    everywhere = pipeline(PROMPT, steps=10)
    assert difference(inside.latents, everywhere.latents) > 1e-3 and difference(inside.latents, none.latents) > 1e-3
    assert inside.settings[0]["interval"] == [0.3, 0.7]


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("asked", [{"t_gate": 3}, {"cache_blocks": 2}], ids=lambda asked: next(iter(asked)))
def test_an_approximation_says_how_far_it_is_off(tmp_path, asked, quantize):
    """Of its first picture, beside the same pipeline without it."""
    folder = published.save(
        tmp_path, num_layers=4, **({"attention_head_dim": 16, "cross_attention_dim": 48} if quantize else {})
    )
    pipeline = load(folder, quantize=quantize)
    options = {"steps": 8, "seed": 2, "num_images": 3, "batch_size": 2}
    exact, phases = pipeline(PROMPT, **options), []
    quick = pipeline(PROMPT, **options, **asked, progress=lambda phase, *_: phases.append(phase))
    said = re.search(
        r"latents deviate by ([0-9.]+)% .relative RMS, 1 picture., ([0-9.]+) × fewer FLOPs", quick.approximation
    )
    first = (quick.latents[0] - exact.latents[0]).norm() / exact.latents[0].norm()
    assert float(said[1]) == pytest.approx(100 * first.item(), abs=0.06) and float(said[1]) > 0 and float(said[2]) > 1
    assert exact.approximation is None and asked.items() <= quick.settings[0].items()
    assert "measure" in phases and quick.seconds["measure"] > 0
    unmeasured = pipeline(PROMPT, **options, **asked, measure=False)
    assert unmeasured.approximation is None and torch.equal(unmeasured.latents, quick.latents)


def test_approximations_do_not_go_together(alpha):
    with pytest.raises(ValueError, match="t_gate and cache_blocks do not go together: choose one"):
        load(alpha)(PROMPT, t_gate=2, cache_blocks=2)


def test_official_guidance_leaves_the_fourth_channel_and_the_variance_to_the_prompt():
    output = torch.randn(4, 8, 2, 2)
    empty, text = output.chunk(2)
    guided = empty + 4.5 * (text - empty)
    assert torch.equal(Guidance(4.5).combine(output, 4), torch.cat([guided[:, :4], text[:, 4:]], 1))
    assert torch.equal(Guidance(4.5, channels=3).combine(output, 4), torch.cat([guided[:, :3], text[:, 3:]], 1))


@pytest.fixture(scope="module")
def with_null(alpha, tmp_path_factory):
    """An α model with the null caption of its checkpoint."""
    folder = tmp_path_factory.mktemp("model") / "null"
    published.save(folder)
    null = torch.randn(120, published.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    save_file({"null_caption": null}, folder / "transformer" / "null_caption.safetensors")
    return folder


def test_null_captions(with_null):
    """The four conventions against guidance written out."""
    assert read_recipe(with_null).null == "checkpoint" and read_recipe(with_null).null_mask == "cond"
    seen = {}
    for null in ("checkpoint", "t5_empty"):
        for null_mask in ("cond", "own"):
            pipeline = load(with_null, recipe={"null": null, "null_mask": null_mask})
            seen[null, null_mask] = pipeline(PROMPT, steps=1).latents
    pipeline = load(with_null)
    text, lengths = pipeline.text.encode([PROMPT])
    empty, own = pipeline.text.encode([""])
    null = pipeline.transformer.null_caption[None]
    count = int(lengths)
    assert int(own) == 1 and count > 5
    time = torch.tensor([999])
    for (name, mask), latents in seen.items():
        rows = null[:, : count if mask == "cond" else 120] if name == "checkpoint" else empty[:, :1]
        start = noise([0])
        with torch.no_grad():
            branches = [
                pipeline.transformer(start, of, time, {"resolution": None, "aspect_ratio": None}).sample[:, :4]
                for of in (rows, text)
            ]
        epsilon = branches[0] + 4.5 * (branches[1] - branches[0])
        sampler = module.build("dpm", 1, config=pipeline.scheduler)
        expected = sampler.step(epsilon, 0, sampler.start(start), None)
        assert difference(latents, expected) <= 1e-4, (name, mask)
    assert difference(seen["checkpoint", "cond"], seen["checkpoint", "own"]) > 1e-3


def test_a_null_caption_that_is_not_there_is_missed(alpha):
    with pytest.raises(ValueError, match="takes the null caption from the checkpoint, which has none"):
        load(alpha, recipe={"null": "checkpoint"})(PROMPT)


def picture(width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_image_to_image(alpha, tmp_path, monkeypatch):
    picture().save(tmp_path / "in.png")
    pipeline = load(alpha)
    seen = evaluations(monkeypatch)
    results = {s: pipeline(PROMPT, init_image=tmp_path / "in.png", strength=s, steps=10).latents for s in (0.2, 1.0)}
    assert len(seen) == 2 + 10
    given = pipeline.vae.encode(module.load_image(tmp_path / "in.png", (64, 64)))
    assert difference(results[0.2], given) < difference(results[1.0], given)
    assert pipeline(PROMPT, init_image=tmp_path / "in.png", steps=10).settings[0]["strength"] == 0.6


def test_inpainting_keeps_the_rest(alpha, tmp_path):
    picture().save(tmp_path / "in.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    painted = load(alpha)(PROMPT, init_image=tmp_path / "in.png", mask=tmp_path / "mask.png", steps=4).images[0]
    before, after = np.asarray(picture()).astype(int), np.asarray(painted).astype(int)
    assert (before[:, :32] == after[:, :32]).all()
    assert np.abs(before[:, 32:] - after[:, 32:]).mean() > 5


def test_low_memory_gives_the_same_picture_and_frees_what_has_had_its_turn(alpha):
    expected = load(alpha)(PROMPT, steps=3)
    pipeline = load(alpha, low_memory=True)
    pictures = pipeline(PROMPT, steps=3)
    assert torch.equal(pictures.latents, expected.latents)
    assert pictures.images[0].tobytes() == expected.images[0].tobytes()
    assert pipeline.vae._model is None and pipeline.text.encoder is None
    assert set(pictures.seconds) == {"text", "denoise", "decode"} and pictures.peak_bytes > 1e8


@pytest.mark.parametrize("convention", ["original", "bucket", "exact"])
def test_micro_conditions(tmp_path, convention, monkeypatch):
    published.save(tmp_path, sample_size=128, use_additional_conditions=True, num_layers=1)
    pipeline = load(tmp_path, recipe={"micro_conditions": convention})
    given = pipeline.micro_conditions((512, 1984), 2)
    assert given["resolution"].tolist() == [[512.0, 1984.0]] * 2
    ratio = 512 / 1984 if convention == "exact" else 0.26
    torch.testing.assert_close(given["aspect_ratio"], torch.full((2, 1), ratio))
    assert pipeline.default_size == (1024, 1024) and (512, 1984) in pipeline.sizes()


def test_the_part_of_a_prompt_that_is_not_read_is_told(alpha):
    pictures = load(alpha)(["a cat", "a cat " * 100], steps=1)
    assert list(pictures.cut) == ["a cat " * 100] and pictures.cut["a cat " * 100].endswith("cat")


def test_bf16_stays_near_fp32(alpha):
    exact = load(alpha)(PROMPT, steps=4).latents
    half = load(alpha, precision="bf16")(PROMPT, steps=4)
    assert half.latents.dtype == torch.float32 and half.settings[0]["precision"] == "bf16"
    assert 1e-4 < difference(half.latents, exact) < 0.2


def test_memory_that_runs_out_is_a_sentence(alpha, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    pipeline = load(alpha)
    monkeypatch.setattr(Transformer, "forward", fail)
    with pytest.raises(MemoryError, match=r"memory of cpu ran out: try a batch size below 64, or low_memory .* 64x64"):
        pipeline(PROMPT)
    monkeypatch.setattr(Transformer, "forward", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline(PROMPT)


MISTAKES = {
    "no prompt": ({"prompts": []}, "there is no prompt"),
    "no pictures": ({"num_images": 0}, "num_images and batch_size must be 1 at least"),
    "sampler": ({"sampler": "euler"}, "no sampler 'euler': choose one of dpm, iddpm, sa, lcm, ddim"),
    "mask alone": ({"mask": "x.png"}, "a mask needs the picture that it masks"),
    "size": ({"size": (100, 64)}, "64x100 does not divide by 16: take 64x96"),
    "tiny": ({"size": (0, 64)}, "64x0 does not divide by 16: take 64x16"),
    "steps": ({"steps": 0}, "dpm takes 1 to 999 steps, got 0"),
    "missing picture": ({"init_image": "nowhere.png"}, "nowhere.png"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_sentences(alpha, name):
    change, message = MISTAKES[name]
    with pytest.raises((ValueError, OSError), match=message):
        load(alpha)(**{"prompts": PROMPT} | change)


def test_folders_that_are_none(alpha, tmp_path, monkeypatch):
    for source, message in (
        (tmp_path, "holds no transformer: a model folder has transformer/config.json beside"),
        (tmp_path / "nothing", "neither a folder nor the name of a model"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            load(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run `make train` first"):
        load(None)
    with pytest.raises(ValueError, match="precision must be one of auto, fp32, bf16, fp16, not 'half'"):
        load(alpha, precision="half")
    with pytest.raises(ValueError, match=r"the recipe of .* has a wrong null"):
        load(alpha, recipe={"null": "zero"})


def test_a_transformer_takes_its_components_from_elsewhere(alpha, tmp_path):
    published.transformers()[1].save_pretrained(tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=r"has no config.json: a model folder has its VAE there"):
        load(tmp_path / "alone")
    expected = load(alpha)(PROMPT, steps=2)
    assert torch.equal(load(tmp_path / "alone", components=alpha)(PROMPT, steps=2).latents, expected.latents)
    wide = published.save(tmp_path / "wide", caption_channels=24)
    with pytest.raises(ValueError, match="gives 16 channels, and the transformer reads 24"):
        load(wide)


def test_an_official_file(alpha, tmp_path):
    from pixart_fast import save_official

    heads = {"num_attention_heads": 1, "attention_head_dim": 72, "cross_attention_dim": 72}  # a file does not tell them
    model = published.transformers(sample_size=32, interpolation_scale=1.0, **heads)[1]
    save_official(model, tmp_path / "model.pth")
    pictures = load(tmp_path / "model.pth", components=alpha)(PROMPT, steps=1, size=(64, 64))
    assert pictures.images[0].size == (64, 64)
    with pytest.raises(ValueError, match="is a single file: name a folder with text encoder and VAE"):
        load(tmp_path / "model.pth")


def test_recipe_of_a_folder(alpha, folder, kind):
    recipe = read_recipe(folder)
    sigma = kind is PixArtSigmaPipeline
    assert (recipe.family, recipe.max_tokens) == (("sigma", 300) if sigma else ("alpha", 120))
    assert recipe.clean is not sigma and recipe.null == "t5_empty" and recipe.null_mask == "own"
    changed = recipe.model_copy(update={"max_tokens": 77, "guidance": 3.0})
    changed.save(folder)
    assert read_recipe(folder) == changed
    assert read_recipe(folder, {"max_tokens": 50, "clean": None}).max_tokens == 50
    (folder / "recipe.json").write_text(json.dumps({"family": "alpha"}))
    with pytest.raises(ValueError, match=r"the recipe of .* has a wrong max_tokens"):
        read_recipe(folder)
    (folder / "recipe.json").unlink()
