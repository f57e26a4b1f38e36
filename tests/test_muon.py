"""Batched Muon against torch.optim.Muon, which takes one matrix at a time."""

import pytest
import torch
from torch import nn

from train.muon import Muon, orthogonalize

SHAPES = [(48, 48), (96, 24), (24, 96), (48, 48), (96, 24)]


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_same_steps_as_torch():
    ours, theirs = parameters(0), parameters(0)
    start = [p.detach().clone() for p in ours]
    mine = Muon(ours, lr=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for step in range(4):
        for p, q, gradient in zip(ours, theirs, parameters(step + 1), strict=True):
            p.grad = q.grad = gradient.detach()
        mine.step()
        reference.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = (q - before).norm()
        assert (p - q).norm() < 0.02 * moved  # bf16 iterations round differently in a batch
        assert torch.allclose(mine.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"], atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 80, 20), (2, 20, 80)])
def test_singular_values_near_one(shape):
    update = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100)
    values = torch.linalg.svdvals(update.float())
    assert update.shape == shape and values.min() > 0.3 and values.max() < 1.3


def test_refuses_vectors():
    with pytest.raises(ValueError, match="two-dimensional"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_parameters_without_gradient_stay():
    params = parameters(0)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    Muon(params).step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, q) for p, q in zip(params[1:], before[1:], strict=True))
