"""How far a result may be from the truth: no farther than plain PyTorch is, at the same dtype."""

import torch
from torch import Tensor


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error |actual - expected| / |expected| in fp64; absolute where expected is all zero."""
    expected = expected.double()
    norm = expected.norm().item()
    return (actual.double() - expected).norm().item() / (norm or 1.0)


def assert_rms(actual: Tensor, expected_fp64: Tensor, baseline: Tensor) -> None:
    """Asserts that `actual` errs at most 1.25 times as much as `baseline`, plain PyTorch at the same dtype.

    The bound has a floor of eps / 8, since a baseline can be exact by luck. NaN fails.
    """
    assert actual.shape == expected_fp64.shape == baseline.shape, (actual.shape, expected_fp64.shape, baseline.shape)
    assert actual.dtype == baseline.dtype, (actual.dtype, baseline.dtype)
    error, bound = rms_error(actual, expected_fp64), 1.25 * rms_error(baseline, expected_fp64)
    bound = max(bound, torch.finfo(actual.dtype).eps / 8)
    assert error <= bound, f"relative RMS error {error:.3g} exceeds {bound:.3g}, 1.25 times that of plain PyTorch"
