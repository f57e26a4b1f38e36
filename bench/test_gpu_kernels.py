"""The operators on a CUDA device at the sizes of XL/2, against every kernel that a user could take instead.

`python -m pytest bench/test_gpu_kernels.py --benchmark-only`; without a CUDA device all of it skips.
"""

import pytest
import torch

from bench import kernels
from bench.kernels import SDPA
from bench.measure import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")

BF16 = torch.bfloat16
PASSES = ["forward", "forward+backward"]


@pytest.mark.parametrize("path", ["ours", "eager", "compiled", "apex", "liger"])
@pytest.mark.parametrize("N", [256, 1024])
@pytest.mark.parametrize("passes", ["forward", "backward", "forward+backward"])
def test_modulated_layernorm(row, passes, N, path):
    """16,384 and 65,536 rows."""
    row(kernels.modulated_layernorm(passes, 64, N, BF16, DEVICE), path)


CROSS = ["FlexAttention", "PyTorch varlen", "flash-attn 2 varlen", "flash-attn 3 varlen"]


@pytest.mark.parametrize("path", ["ours", "eager", "compiled", "SDPA", *SDPA, *CROSS])
@pytest.mark.parametrize("N", [256, 1024])
@pytest.mark.parametrize("passes", PASSES)
def test_cross_attention(row, passes, N, path):
    row(kernels.cross_attention(passes, 32, N, BF16, DEVICE), path)


@pytest.mark.parametrize("path", ["ours", "SDPA", *SDPA, "flash-attn 2", "flash-attn 3", "flash-attn 4"])
@pytest.mark.parametrize(("B", "N"), [(64, 256), (16, 1024), (4, 4096)])
@pytest.mark.parametrize("passes", PASSES)
def test_self_attention(row, passes, B, N, path):
    row(kernels.self_attention(passes, B, N, BF16, DEVICE), path)


@pytest.mark.parametrize("path", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("K", [1152, 4608])
def test_gated_linear(row, K, path):
    """The output of an attention and that of the feed-forward."""
    row(kernels.gated_linear(64, 256, K, BF16, DEVICE), path)


@pytest.mark.parametrize("path", ["ours", "eager", "compiled"])
def test_linear_gelu(row, path):
    row(kernels.linear_gelu(64, 256, BF16, DEVICE), path)
