"""Forward of the fused adaLN operator at the model's shapes: native C++ against eager and compiled PyTorch, on the CPU.

`pytest bench --benchmark-only`. A row appears only if its result is as accurate as eager PyTorch's.
"""

import pytest
import torch
from torch.nn import functional as F

from pixart_fast import ops

EPS = 1e-6


def eager(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def native(x, shift, scale):
    return ops.modulated_layernorm(x, shift, scale, eps=EPS, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(4, 256, 1152), (2, 4096, 1152)], ids=["B4-N256-D1152", "B2-N4096-D1152"])
@pytest.mark.parametrize("path", ["eager", "compiled", "native"])
def test_forward(benchmark, path, shape, dtype):
    if path == "native" and ops.native_problem:
        pytest.skip(ops.native_problem)
    generator = torch.Generator().manual_seed(0)
    # Several inputs in turn, so that the caches are as cold as in a model, whose other layers pass between two calls.
    inputs = [
        [torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[::2], shape[::2])] for _ in range(8)
    ]
    function = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True), "native": native}[path]
    expected = eager(*(tensor.double() for tensor in inputs[0]))
    with torch.no_grad():
        accuracy = error(function(*inputs[0]), expected)
        assert accuracy <= max(1.25 * error(eager(*inputs[0]), expected), torch.finfo(dtype).eps / 8)
        rotation = iter(range(10**9))
        benchmark.extra_info.update(dtype=str(dtype), shape=shape, rms_error=accuracy, threads=torch.get_num_threads())
        benchmark.pedantic(lambda: function(*inputs[next(rotation) % len(inputs)]), rounds=60, warmup_rounds=8)
