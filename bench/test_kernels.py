"""Group `kernels`: each operator at the model's shapes, against every kernel that a user could take instead.

    python -m pytest bench --benchmark-only -k kernels

A row appears only if its result is accurate; what is not installed skips and says so.
"""

import pytest
import torch

from bench import kernels
from bench.kernels import SDPA
from bench.measure import DEVICE

DTYPES = FP32, BF16 = torch.float32, torch.bfloat16
PASSES = pytest.mark.parametrize("passes", ["forward", "forward+backward"])
ON_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="the products are the library's: there is no kernel of ours")


# Small: the embedded default, XL/2 at 256 and 1024 px. Full: 16,384 and 65,536 rows of XL/2.
@pytest.mark.sizes(
    "B, N, D, dtype",
    small=[*((*size, dtype) for size in ((64, 16, 128), (4, 256, 1152)) for dtype in DTYPES), (2, 4096, 1152, BF16)],
    full=[(64, 256, 1152, BF16), (64, 1024, 1152, BF16)],
)
@pytest.mark.paths("ours", "eager", "compiled", cuda=("apex", "liger"))
@pytest.mark.parametrize("passes", ["forward", "backward", "forward+backward"])
def test_modulated_layernorm(row, passes, B, N, D, dtype, path):
    if DEVICE.type == "cpu" and passes == "backward":
        pytest.skip("on the CPU its two passes are timed together")
    row(kernels.modulated_layernorm(passes, B, N, dtype, DEVICE, D=D), path)


# Small: the embedded default, XL/2 at 256 and 512 px with the captions of α and Σ.
@pytest.mark.sizes(
    "B, N, L, H, d, dtype",
    small=[
        *((64, 16, 16, 4, 32, dtype) for dtype in DTYPES),
        *((4, 256, 120, 16, 72, dtype) for dtype in DTYPES),
        (2, 1024, 300, 16, 72, BF16),
    ],
    full=[(32, 256, 120, 16, 72, BF16), (32, 1024, 120, 16, 72, BF16)],
)
@pytest.mark.paths(
    "ours",
    "eager",
    "compiled",
    "SDPA",
    cuda=(*SDPA, "FlexAttention", "PyTorch varlen", "flash-attn 2 varlen", "flash-attn 3 varlen"),
)
@PASSES
def test_cross_attention(row, passes, B, N, L, H, d, dtype, path):
    row(kernels.cross_attention(passes, B, N, dtype, DEVICE, L=L, H=H, d=d), path)


@pytest.mark.sizes(
    "B, N, H, d, dtype",
    small=[
        *((*size, dtype) for size in ((64, 16, 4, 32), (4, 256, 16, 72)) for dtype in DTYPES),
        (1, 1024, 16, 72, BF16),
    ],
    full=[(64, 256, 16, 72, BF16), (16, 1024, 16, 72, BF16), (4, 4096, 16, 72, BF16)],
)
@pytest.mark.paths("ours", "SDPA", cuda=(*SDPA, "flash-attn 2", "flash-attn 3", "flash-attn 4"))
@PASSES
def test_self_attention(row, passes, B, N, H, d, dtype, path):
    row(kernels.self_attention(passes, B, N, dtype, DEVICE, H=H, d=d), path)


@ON_CUDA
@pytest.mark.sizes("B, N", small=[(4, 256)], full=[(64, 256)])
@pytest.mark.paths("ours", "eager", "compiled")
@pytest.mark.parametrize("K", [1152, 4608])
def test_gated_linear(row, B, N, K, path):
    """The output of an attention and that of the feed-forward."""
    row(kernels.gated_linear(B, N, K, BF16, DEVICE), path)


@ON_CUDA
@pytest.mark.sizes("B, N", small=[(4, 256)], full=[(64, 256)])
@pytest.mark.paths("ours", "eager", "compiled")
def test_linear_gelu(row, B, N, path):
    row(kernels.linear_gelu(B, N, BF16, DEVICE), path)
