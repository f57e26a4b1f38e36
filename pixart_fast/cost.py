"""What a forward pass costs, counted from the configuration, and what devices can do by their data sheets.

One place for logging, benchmarks and documentation.
"""

from types import MappingProxyType
from typing import NamedTuple


class DataSheet(NamedTuple):
    """A device as its maker prints it, and the machine that it is usually part of.

    `matmul` is the dense tensor-core rate in FLOP/s: bf16, and fp16 on V100, which has no bf16. NVIDIA prints the rate
    with sparsity for Hopper, twice as much. Links count one direction, half of what is printed.
    """

    name: str  # the end of torch.cuda.get_device_name
    matmul: float  # FLOP/s
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes
    watts: float  # maximal power
    nvlink: float  # bytes/s of one GPU to the others of its machine
    network: float  # bytes/s of a machine of eight to the others


# NVIDIA's data sheets: "V100 Tensor Core GPU" (2020), "A100 Tensor Core GPU" (2021), "H100 Tensor Core GPU" (2023) and
# "H200 Tensor Core GPU" (2024). Networks: DGX-1 (4 x 100 Gb/s), DGX A100 (8 x 200 Gb/s), DGX H100 and H200 (8 x 400).
DATA_SHEETS = MappingProxyType(
    {
        "v100-16gb": DataSheet("V100-SXM2-16GB", 125e12, 0.9e12, 16e9, 300, 150e9, 50e9),
        "v100": DataSheet("V100-SXM2-32GB", 125e12, 0.9e12, 32e9, 300, 150e9, 50e9),
        "a100-40gb": DataSheet("A100-SXM4-40GB", 312e12, 1.555e12, 40e9, 400, 300e9, 200e9),
        "a100": DataSheet("A100-SXM4-80GB", 312e12, 2.039e12, 80e9, 400, 300e9, 200e9),
        "h100": DataSheet("H100 80GB HBM3", 989e12, 3.35e12, 80e9, 700, 450e9, 400e9),
        "h200": DataSheet("NVIDIA H200", 989e12, 4.8e12, 141e9, 700, 450e9, 400e9),
    }
)


def forward_flops(
    *,
    layers: int,
    width: int,
    tokens: int,
    text_tokens: int,
    caption_channels: int,
    patch_features: int,
    out_features: int,
    cross_attention: bool = True,
) -> float:
    """Multiply-adds count two. One sample through `Transformer`: linear layers, both attentions, embeddings of text and
    patches.

    Args:
        tokens, text_tokens: image tokens N and caption tokens L of the sample.
        patch_features, out_features: values that a token reads from the latents, and writes (patch² · channels).
        cross_attention: False for a DiT, which has none; a modulation MLP in every block is not counted.
    """
    self_attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    to_text = 2 * tokens * width * width + 2 * text_tokens * width * width + 2 * tokens * text_tokens * width
    feed_forward = 8 * tokens * width * width
    text = text_tokens * (caption_channels * width + width * width)
    patches = tokens * width * (patch_features + out_features)
    time = 256 * width + width * width + 6 * width * width
    return 2.0 * (layers * (self_attention + to_text * cross_attention + feed_forward) + text + patches + time)


def data_sheet(device_name: str) -> DataSheet | None:
    """The data sheet of a device by the name that PyTorch gives it, else None.

    Only whole SXM modules: a PCIe or NVL board of the same chip is slower, and a MIG slice is a part of one.
    """
    return next((sheet for sheet in DATA_SHEETS.values() if device_name.endswith(sheet.name)), None)


def peak_flops(device_name: str) -> float | None:
    """The data-sheet peak of a device, else None."""
    sheet = data_sheet(device_name)
    return sheet and sheet.matmul
