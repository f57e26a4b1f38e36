"""Muon for many matrices of few shapes: `torch.optim.Muon`'s update, orthogonalised as one batch per shape.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A transformer's blocks repeat the same
few shapes, and one Newton-Schulz iteration of a small matrix is mostly overhead.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

# The reference implementation's quintic polynomial: steepest at zero, so that 5 iterations bring all singular values
# near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7


def orthogonalize(updates: Tensor) -> Tensor:
    """Semi-orthogonal matrices near the updates, singular values about 0.7 to 1.2: `[K, m, n]` to bf16 `[K, m, n]`."""
    a, b, c = COEFFICIENTS
    x = updates.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # the Frobenius norm bounds the spectral one
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step of an m x n matrix is lr · sqrt(max(1, m / n)). No weight decay.

    Args:
        matrices: two-dimensional parameters. Raises ValueError for any other.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float = 0.02, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        if any(p.ndim != 2 for p in matrices):
            raise ValueError("Muon orthogonalises matrices: give it two-dimensional parameters only.")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), params in by_shape.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                gradients = [p.grad for p in params]
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalize(torch.stack(looked_ahead)).to(params[0].dtype)
                torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))
