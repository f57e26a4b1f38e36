"""Attention on the CPU for ragged captions and for few image tokens: native C++ against scaled_dot_product_attention.

`python -m pytest bench/test_cross_attention.py --benchmark-only`. A row appears only if its result is accurate.
"""

import pytest
import torch

from bench import kernels

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
PASSES = pytest.mark.parametrize("passes", ["forward", "forward+backward"])


@pytest.mark.parametrize("path", ["ours", "eager", "SDPA"])
@DTYPES
# The embedded default, and XL/2 at 256 and 512 px with the captions of α and Σ.
@pytest.mark.parametrize(
    ("B", "N", "L", "H", "d"), [(64, 16, 16, 4, 32), (4, 256, 120, 16, 72), (2, 1024, 300, 16, 72)]
)
@PASSES
def test_cross_attention(row, passes, B, N, L, H, d, dtype, path):
    row(kernels.cross_attention(passes, B, N, dtype, CPU, L=L, H=H, d=d), path)


@pytest.mark.parametrize("path", ["ours", "SDPA"])
@DTYPES
@pytest.mark.parametrize(("B", "N", "H", "d"), [(64, 16, 4, 32), (4, 256, 16, 72), (1, 1024, 16, 72)])
@PASSES
def test_self_attention(row, passes, B, N, H, d, dtype, path):
    row(kernels.self_attention(passes, B, N, dtype, CPU, H=H, d=d), path)
