"""The Triton kernels without a GPU: `tests/kernels` in a process of its own, where Triton interprets its kernels."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "tests/kernels").glob("test_*.py")))
def test_kernels_in_the_interpreter(module):
    # One process is either interpreted or compiled: kernels are made one or the other while they are imported.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{module}.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 0, result.stdout[-1000:]
