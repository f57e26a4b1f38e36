"""The fused adaLN operator on the CPU at the model's widths: native C++ against eager and compiled PyTorch.

`python -m pytest bench/test_modulated_layernorm.py --benchmark-only`. A row appears only if its result is accurate.
"""

import pytest
import torch

from bench import kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# XL/2 at 256 px, the embedded default, XL/2 at 1024 px.
@pytest.mark.parametrize(("B", "N", "D"), [(4, 256, 1152), (64, 16, 128), (2, 4096, 1152)])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_modulated_layernorm(row, passes, B, N, D, dtype, path):
    row(kernels.modulated_layernorm(passes, B, N, dtype, CPU, D=D), path)
