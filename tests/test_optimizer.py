"""Optimizers: the average in the state, Muon's half, schedules that are functions of the step."""

import copy

import pytest
import torch
from torch import nn

from train.optimizer import build_optimizer, learning_rate_factor, set_step
from train.settings import DEFAULT, Optimizer, load_settings

CPU = torch.device("cpu")


class Small(nn.Module):
    """Names as the transformer's, a matrix in a block and others outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList([nn.Linear(6, 6)])
        self.proj_out = nn.Linear(6, 2)

    def loss(self, x):
        return self.proj_out(self.transformer_blocks[0](x)).square().mean()


def trained(kind: str, steps: int, **options):
    settings = load_settings(DEFAULT, [f"optimizer.kind={kind}", *(f"optimizer.{k}={v}" for k, v in options.items())])
    model = Small()
    optimizer = build_optimizer(model, settings, CPU)
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(steps):
        set_step(optimizer, step, steps, settings.optimizer)
        optimizer.zero_grad()
        model.loss(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        decay = min(settings.optimizer.ema, (1 + step) / (10 + step))
        averages = {name: decay * averages[name] + (1 - decay) * p.detach() for name, p in model.named_parameters()}
    return model, optimizer, averages


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_average_in_the_state(kind):
    model, optimizer, averages = trained(kind, 7, warmup_steps=0, lr=0.05)
    for name, p in model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["ema"], averages[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(optimizer.state[p]["ema"], p)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_square_root_rule_reaches_the_optimizer(kind):
    """The published code's: lr · √(batch / 256); Muon's own rate for matrices is not touched."""
    given = ["optimizer.lr=2e-5", "optimizer.lr_rule=sqrt", "batch_size=1024", f"optimizer.kind={kind}"]
    rates = [group["initial_lr"] for group in build_optimizer(Small(), load_settings(DEFAULT, given), CPU).param_groups]
    assert rates == pytest.approx([0.02, 4e-5] if kind == "muon" else [4e-5])


def test_average_does_not_disturb_adamw():
    model, _, _ = trained("adamw", 5, schedule="constant", warmup_steps=0)
    plain = Small()
    settings = load_settings(DEFAULT, []).optimizer
    options = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(plain.parameters(), **options)
    for step in range(5):
        optimizer.zero_grad()
        plain.loss(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_muon_takes_the_matrices_of_the_blocks():
    model, optimizer, _ = trained("muon", 2)
    muon, adamw = optimizer.param_groups
    assert [p.shape for p in muon["params"]] == [(6, 6)] and len(adamw["params"]) == 3
    assert muon["params"][0] is model.transformer_blocks[0].weight
    assert "momentum_buffer" in optimizer.state[muon["params"][0]] and "exp_avg" in optimizer.state[adamw["params"][0]]


def test_muon_survives_a_reload():
    model, optimizer, _ = trained("muon", 3)
    again, other, _ = trained("muon", 1)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((model, optimizer), (again, other)):
        opt.zero_grad()
        net.loss(torch.ones(2, 6)).backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ema = [[opt.state[p]["ema"] for p in net.parameters()] for net, opt in ((model, optimizer), (again, other))]
    assert all(torch.equal(a, b) for a, b in zip(*ema, strict=True))


def test_schedules():
    constant = Optimizer(warmup_steps=4)
    assert [learning_rate_factor(step, 100, constant) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = Optimizer(warmup_steps=0, schedule="cosine")
    assert learning_rate_factor(0, 100, cosine) == 1.0
    assert learning_rate_factor(50, 100, cosine) == pytest.approx(0.5)
    assert learning_rate_factor(99, 100, cosine) < 1e-3


def test_auto_is_muon_without_zero_and_adamw_with_it():
    assert load_settings(DEFAULT, ["optimizer.kind=auto"]).optimizer_kind() == "muon"
    assert load_settings(DEFAULT, ["optimizer.kind=auto", "zero_stage=2"]).optimizer_kind() == "adamw"
