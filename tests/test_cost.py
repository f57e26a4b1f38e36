"""FLOPs by formula against PyTorch's own count of a real forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart_fast import Transformer
from pixart_fast.config import SIZES, transformer_config
from pixart_fast.cost import forward_flops, peak_flops


@pytest.mark.parametrize(("size", "latent", "text_tokens"), [("scenes", 16, 13), ("XL", 32, 120), ("S", 64, 300)])
def test_forward_flops(size, latent, text_tokens):
    config = transformer_config(SIZES[size], sample_size=latent, caption_channels=512)
    with torch.device("meta"):
        model = Transformer(**config)
        latents, text = torch.empty(1, 4, latent, latent), torch.empty(1, text_tokens, 512)
        t = torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, encoder_hidden_states=text, timestep=t)
    predicted = forward_flops(
        layers=SIZES[size].layers,
        width=SIZES[size].width,
        tokens=(latent // 2) ** 2,
        text_tokens=text_tokens,
        caption_channels=512,
        patch_features=16,
        out_features=32,
    )
    assert predicted == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_peaks_are_named_by_device():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB") == 125e12
    assert peak_flops("cpu") is None


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide"):
        transformer_config(SIZES["XL"]._replace(heads=5), sample_size=32)
