"""diffusers' PixArt pipelines draw the same picture with `pixart_fast.Transformer` as with diffusers' transformer."""

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import T5EncoderModel, T5Tokenizer

from pixart_fast import Transformer
from tests import published
from tests.published import transformers


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    return published.tokenizer()


@pytest.fixture(scope="module")
def text_encoder(tokenizer) -> T5EncoderModel:
    return published.text_encoder(len(tokenizer))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return published.vae()


@pytest.fixture(scope="module", params=[PixArtAlphaPipeline, PixArtSigmaPipeline], ids=["alpha", "sigma"])
def build(request, tokenizer, text_encoder, vae):
    """Builds the pipeline around a transformer."""

    def build(transformer, scheduler=None):
        pipe = request.param(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler or DPMSolverMultistepScheduler(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def draw(pipe, seed: int = 0, **arguments) -> torch.Tensor:
    """The picture, as latents unless `output_type` says otherwise."""
    defaults = {
        "prompt": "a painting of a red cat in the snow",
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "latent",
    }
    return pipe(**{**defaults, **arguments, "generator": torch.Generator().manual_seed(seed)}).images


def assert_same_picture(first: torch.Tensor, second: torch.Tensor) -> None:
    assert first.shape == second.shape and first.isfinite().all()
    assert (first - second).abs().max() <= 1e-4 * second.square().mean().sqrt()


REQUESTS = {
    "a prompt": {},
    "no guidance": {"guidance_scale": 1.0},
    "not square": {"height": 16, "width": 40},
    "two of two prompts": {"prompt": ["a dog", "a painting of a blue cat in the snow"], "num_images_per_prompt": 2},
    "negative prompt": {"negative_prompt": "blurry, bad painting"},
    "negative prompts": {"prompt": ["a dog", "a cat"], "negative_prompt": ["bad", "blurry, blurry, blurry dog"]},
    "few tokens": {"max_sequence_length": 5},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_latents_equal_diffusers(build, name):
    theirs, ours = transformers()
    request = {"num_inference_steps": 20, **REQUESTS[name]}
    expected = draw(build(theirs), **request)
    assert_same_picture(draw(build(ours), **request), expected)
    other = draw(build(ours), prompt="snow", num_inference_steps=20)
    assert other.shape != expected.shape or (other - expected).abs().max() > 1e-2, "the request makes no difference"


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_pictures_equal_diffusers(build, scheduler):
    theirs, ours = transformers()
    expected = draw(build(theirs, scheduler()), output_type="np")
    picture = draw(build(ours, scheduler()), output_type="np")
    assert picture.shape == (1, 16, 16, 3) and picture.std() > 0
    assert np.abs(picture - expected).max() <= 1e-3


def test_micro_conditions_equal_diffusers(build):
    """At sample_size 128 the α pipeline tells the transformer the picture's size; Σ has no micro-conditions."""
    alpha = isinstance(build(None), PixArtAlphaPipeline)
    theirs, ours = transformers(sample_size=128, use_additional_conditions=alpha)
    size = {"height": 16, "width": 24}
    assert_same_picture(draw(build(ours), **size), draw(build(theirs), **size))


def test_binned_resolution_equals_diffusers(build):
    theirs, ours = transformers(sample_size=32, num_layers=1)
    request = {"height": 64, "width": 120, "use_resolution_binning": True, "num_inference_steps": 2}
    expected = draw(build(theirs), output_type="np", **request)
    assert expected.shape[:3] == (1, 64, 120)
    assert np.abs(draw(build(ours), output_type="np", **request) - expected).max() <= 1e-3


def encode(pipe, prompt: str) -> dict:
    """Arguments of the pipeline that give it the encoded prompt in place of the words."""
    embeds, mask, negative, negative_mask = pipe.encode_prompt(prompt, clean_caption=False)
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
    }


def test_given_prompt_embeddings(build):
    theirs, ours = transformers()
    pipe = build(ours)
    given = encode(pipe, "a red cat") | {"num_images_per_prompt": 2}
    assert_same_picture(draw(pipe, **given), draw(build(theirs), **given))
    assert_same_picture(draw(pipe, **given), draw(pipe, prompt="a red cat", num_images_per_prompt=2))


def test_a_batch_gives_what_single_prompts_give(build):
    _, ours = transformers()
    pipe = build(ours)
    prompts = ["a dog", "a cat", "very long " * 30]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    common = {
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "latent",
        "num_inference_steps": 2,
    }
    batch = pipe(prompt=prompts, generator=generators(), **common).images
    for prompt, generator, picture in zip(prompts, generators(), batch, strict=True):
        assert_same_picture(pipe(prompt=prompt, generator=generator, **common).images[0], picture)


def test_switches_of_the_pipeline(build):
    """Slicing, processors, fused projections, regional compilation's hooks: the picture stays."""
    _, ours = transformers()
    pipe = build(ours)
    expected = draw(pipe)
    pipe.enable_attention_slicing(slice_size=1)
    assert_same_picture(draw(pipe), expected)
    pipe.disable_attention_slicing()
    ours.set_default_attn_processor()
    assert_same_picture(draw(pipe), expected)
    ours.fuse_qkv_projections()
    assert_same_picture(draw(pipe), expected)
    ours.unfuse_qkv_projections()
    assert torch.equal(draw(pipe), expected)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert_same_picture(draw(pipe), expected)


def test_half_precision_and_layerwise_casting(build):
    theirs, ours = transformers()
    prompt = encode(build(ours), "a painting of a red cat in the snow")

    def textless(transformer) -> torch.Tensor:
        pipe = build(transformer)
        pipe.tokenizer = pipe.text_encoder = None  # it would set the dtype of everything
        return draw(pipe, **prompt)

    exact = textless(theirs)
    theirs.to(torch.bfloat16)
    ours.to(torch.bfloat16)
    picture = textless(ours)
    assert picture.dtype == torch.bfloat16
    error = (textless(theirs).float() - exact).square().mean().sqrt()
    assert (picture.float() - exact).square().mean().sqrt() <= 1.25 * error
    ours.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert ours.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert textless(ours).isfinite().all()


def test_saved_pipelines_load(build, tmp_path, caplog):
    """With our class in it, from a folder saved with diffusers' class, and the reverse."""
    theirs, ours = transformers()
    expected = draw(build(ours))
    kind = type(build(ours))
    build(ours).save_pretrained(tmp_path / "ours")
    build(theirs).save_pretrained(tmp_path / "theirs")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        loaded = kind.from_pretrained(tmp_path / "ours")
        passed = kind.from_pretrained(tmp_path / "theirs", transformer=ours)
        again = kind.from_pretrained(tmp_path / "ours", transformer=ours)
        back = kind.from_pretrained(tmp_path / "ours", transformer=theirs)
        own = Transformer.from_pretrained(tmp_path / "theirs", subfolder="transformer")
        alone = PixArtTransformer2DModel.from_pretrained(tmp_path / "ours", subfolder="transformer")
    assert not [record for record in caplog.records if record.name.startswith("diffusers")], caplog.text
    assert type(loaded.transformer) is Transformer and type(passed.transformer) is Transformer
    for pipe in (
        loaded,
        passed,
        again,
        back,
        kind.from_pipe(loaded, transformer=loaded.transformer),
        build(own),
        build(alone),
    ):
        pipe.set_progress_bar_config(disable=True)
        assert_same_picture(draw(pipe), expected)
    half = kind.from_pretrained(tmp_path / "ours", torch_dtype=torch.float16)
    assert half.transformer.dtype == torch.float16


def test_without_text_encoder(build, tmp_path):
    _, ours = transformers()
    pipe = build(ours)
    prompt = encode(pipe, "a cat")
    pipe.tokenizer = pipe.text_encoder = None
    expected = draw(pipe, **prompt)
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.tokenizer is None and loaded.text_encoder is None
    assert_same_picture(draw(loaded, **prompt), expected)


def test_a_lora_around_the_transformer(build, tmp_path):
    """A LoRA is put around the transformer of a pipeline, as PixArt's LoRA files are used."""
    theirs, ours = transformers()
    plain = draw(build(ours))
    torch.manual_seed(3)
    adapted = get_peft_model(transformers()[1], LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    expected = draw(build(PeftModel.from_pretrained(theirs, tmp_path)))
    picture = draw(build(PeftModel.from_pretrained(ours, tmp_path)))
    assert_same_picture(picture, expected)
    assert (picture - plain).abs().max() > 1e-2
