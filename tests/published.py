"""Small random PixArt models in the published folder layout, made on the spot: nothing is downloaded."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from pixart_fast import Transformer

TEXT_WIDTH = 16
WORDS = ("a", "painting", "of", "red", "blue", "cat", "dog", "in", "the", "snow", "blurry", "bad")


def tokenizer(max_tokens: int = 300) -> T5Tokenizer:
    """A unigram tokenizer of a few words and all letters: T5's own would be a download."""
    letters = "abcdefghijklmnopqrstuvwxyz,.\N{LOWER ONE EIGHTH BLOCK}"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -2.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_tokens)


def text_encoder(vocabulary: int) -> T5EncoderModel:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config).eval()
    nn.init.normal_(encoder.shared.weight)
    return encoder


def vae(**changes) -> AutoencoderKL:
    torch.manual_seed(2)
    config = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    return AutoencoderKL(**config | changes).eval()


def transformers(**changes) -> tuple[PixArtTransformer2DModel, Transformer]:
    """diffusers' transformer and ours with the same weights."""
    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "caption_channels": TEXT_WIDTH,
        **changes,
    }
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(**config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    ours = Transformer(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def save(folder: Path, kind: type = PixArtAlphaPipeline, **changes) -> Path:
    """A pipeline folder as published: model_index.json, tokenizer, text_encoder, transformer, vae, scheduler.

    `changes` are of the transformer's config. Its VAE makes pictures eight times the size of the latents, as the real
    one does.
    """
    words = tokenizer(300 if kind is PixArtSigmaPipeline else 120)
    wide = {
        "block_out_channels": (4,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 64,  # of a tile
        "scaling_factor": 0.13025 if kind is PixArtSigmaPipeline else 0.18215,
    }
    kind(
        tokenizer=words,
        text_encoder=text_encoder(len(words)),
        vae=vae(**wide),
        transformer=transformers(**changes)[0],
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(folder)
    return folder
