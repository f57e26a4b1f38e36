"""Where the Triton kernels can be tested: compiled on a CUDA device, or on the CPU in Triton's interpreter.

The interpreter multiplies raw bits in a bf16 `tl.dot` and truncates fp32 to bf16: bf16 is tested on a GPU only.
"""

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

collect_ignore_glob = [] if INTERPRETED or DEVICE == "cuda" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest tests -m gpu` is everything that a CUDA device is needed for."""
    for item in items:
        if DEVICE == "cuda" and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
