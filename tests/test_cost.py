"""FLOPs by formula against PyTorch's own count of a real forward pass."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pixart_fast import Transformer
from pixart_fast.config import SIZES, transformer_config
from pixart_fast.cost import DATA_SHEETS, forward_flops, peak_flops
from pixart_fast.kernels import reference


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


def test_our_attention_counts_as_products():
    """Two of them forward, as plain PyTorch has, and five backward: the scores are computed again."""
    q, k = torch.empty(2, 5, 3, 8, requires_grad=True), torch.empty(2, 7, 3, 8, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with FlopCounterMode(display=False) as forward:
            o, _ = torch.ops.pixart_fast.cross_attention(q, k, k, None)
        with FlopCounterMode(display=False) as plain:
            reference.self_attention(q, k, k)
        with FlopCounterMode(display=False) as backward:
            o.sum().backward()
    product = 2 * (2 * 3) * 5 * 7 * 8
    assert forward.get_total_flops() == plain.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),  # slower than the module of the same chip
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),  # a part of a device
        ("cpu", None),
    ],
)
def test_peaks_are_named_by_device(device, peak):
    assert peak_flops(device) == peak


def test_data_sheets_agree_with_what_is_known_of_the_chips():
    """Tensor-core rates from units, clock and width: 640 units of 64 multiply-adds at 1.53 GHz, 432 of 256 at 1.41 GHz,
    528 of 512 at 1.83 GHz; memory rates from 4096, 5120, 5120 and 6144 lines at 1.75, 2.43, 3.19, 5.23 and 6.25 Gb/s.
    """
    products = {"v100": 640 * 64 * 1.53e9, "a100": 432 * 256 * 1.41e9, "h100": 528 * 512 * 1.83e9}
    lines = {
        "v100": 4096 * 1.75e9,
        "a100-40gb": 5120 * 2.43e9,
        "a100": 5120 * 3.19e9,
        "h100": 5120 * 5.23e9,
        "h200": 6144 * 6.25e9,
    }
    for name, rate in products.items():
        assert DATA_SHEETS[name].matmul == pytest.approx(2 * rate, rel=0.01)
    for name, rate in lines.items():
        assert DATA_SHEETS[name].bandwidth == pytest.approx(rate / 8, rel=0.01)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="5 heads do not divide"):
        transformer_config(SIZES["XL"]._replace(heads=5), sample_size=32)
