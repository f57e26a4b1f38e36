"""The noise process and the loss against their definitions in fp64: Bayes' rule, distributions, diffusers' schedule."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pixart_fast import GaussianDiffusion
from pixart_fast.diffusion import discretized_gaussian_log_likelihood, normal_cdf, normal_kl

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETAS).cumprod(0)
TIMES = torch.tensor([1, 2, 57, 500, 999])


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion()


def columns(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def posterior(x0: Tensor, xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) for t ≥ 1: the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    beta, before = columns(BETAS, t), columns(ALPHA_BAR, t - 1)
    variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
    return variance * ((1 - beta).sqrt() / beta * xt + before.sqrt() / (1 - before) * x0), variance


def batch(t: Tensor, channels: int = 4) -> tuple[Tensor, ...]:
    """x_0, noise, x_t and the model's output for times t, fp64; the variance channel is between and beyond -1 and 1."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(len(t), channels, 6, 5, generator=generator, dtype=torch.float64).clamp(-1, 1)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    xt = columns(ALPHA_BAR.sqrt(), t) * x0 + columns((1 - ALPHA_BAR).sqrt(), t) * noise
    error, variance = torch.randn((2, *x0.shape), generator=generator, dtype=torch.float64)
    return x0, noise, xt, torch.cat([noise + 0.3 * error, variance], dim=1)


def losses(diffusion: GaussianDiffusion, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> dict:
    return diffusion.training_losses(output.float(), x0.float(), xt.float(), t, noise.float())


def predicted(output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """x_0 as the predicted noise has it."""
    epsilon = output.chunk(2, dim=1)[0]
    return (xt - columns((1 - ALPHA_BAR).sqrt(), t) * epsilon) / columns(ALPHA_BAR.sqrt(), t)


def log_variance(output: Tensor, t: Tensor, smallest: Tensor) -> Tensor:
    """Between the posterior's variance at -1 and β at 1, in the logarithm."""
    share = (output.chunk(2, dim=1)[1] + 1) / 2
    return share * columns(BETAS, t).log() + (1 - share) * smallest.log()


def test_schedule_is_the_published_one(diffusion):
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="learned_range")
    torch.testing.assert_close(
        diffusion.tables["sqrt_alpha_bar"].square(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(diffusion.tables["snr"].double(), ALPHA_BAR / (1 - ALPHA_BAR), rtol=1e-6, atol=0)
    for t in (1, 10, 500, 999):
        for share, table in ((-1.0, "min_log_variance"), (1.0, "max_log_variance")):
            expected = scheduler._get_variance(t, predicted_variance=torch.tensor(share))
            assert diffusion.tables[table][t].item() == pytest.approx(expected.item(), rel=1e-4)


def test_q_sample_is_scaled_data_plus_scaled_noise(diffusion):
    t = torch.cat([torch.tensor([0]), TIMES])
    x0, noise, xt, _ = batch(t)
    torch.testing.assert_close(diffusion.q_sample(x0.float(), t, noise.float()).double(), xt, rtol=1e-5, atol=1e-6)


def test_q_sample_has_the_marginal_that_one_step_at_a_time_has(diffusion):
    steps, samples = 30, 20000
    generator = torch.Generator().manual_seed(1)
    walked = torch.full((samples, 1), 0.7, dtype=torch.float64)
    for beta in BETAS[:steps]:
        walked = (1 - beta).sqrt() * walked + beta.sqrt() * torch.randn(samples, 1, generator=generator).double()
    t = torch.full((samples,), steps - 1)
    jumped = diffusion.q_sample(torch.full((samples, 1), 0.7), t, torch.randn(samples, 1, generator=generator))
    error = walked.std().item() / math.sqrt(samples)
    assert abs(jumped.mean().item() - walked.mean().item()) <= 5 * error
    assert jumped.std().item() == pytest.approx(walked.std().item(), rel=5 / math.sqrt(samples))


def test_predict_x0_inverts_q_sample(diffusion):
    t = torch.tensor([0, 57, 999])
    x0, noise, xt, _ = batch(t)
    torch.testing.assert_close(diffusion.predict_x0(xt.float(), t, noise.float()).double(), x0, rtol=1e-3, atol=1e-4)


def test_mse_is_the_mean_over_all_but_the_batch(diffusion):
    x0, noise, xt, output = batch(TIMES)
    mse = losses(diffusion, output, x0, xt, TIMES, noise)["mse"]
    expected = torch.stack([((n - o[:4]) ** 2).mean() for n, o in zip(noise, output, strict=True)])
    torch.testing.assert_close(mse.double(), expected, rtol=1e-5, atol=0)


def test_bound_is_the_divergence_from_the_posterior_in_bits_per_dimension(diffusion):
    x0, noise, xt, output = batch(TIMES)
    mean, variance = posterior(x0, xt, TIMES)
    model_mean, _ = posterior(predicted(output, xt, TIMES), xt, TIMES)
    model = Normal(model_mean, (log_variance(output, TIMES, variance) / 2).exp())
    expected = kl_divergence(Normal(mean, variance.sqrt()), model).flatten(1).mean(1) / math.log(2)
    vb = losses(diffusion, output, x0, xt, TIMES, noise)["vb"]
    torch.testing.assert_close(vb.double(), expected, rtol=1e-3, atol=1e-6)


def test_first_step_counts_the_likelihood_of_256_levels(diffusion):
    """At t = 0: bits of x_0 rounded to 256 levels under the model's gaussian, with the exact CDF."""
    t = torch.tensor([0, 0, 0])
    x0, noise, xt, output = batch(t)
    x0 = (x0 * 127.5).round() / 127.5
    xt = columns(ALPHA_BAR.sqrt(), t) * x0 + columns((1 - ALPHA_BAR).sqrt(), t) * noise
    _, second = posterior(x0, xt, t + 1)  # its variance stands in for that of t = 0, which is zero
    gaussian = Normal(predicted(output, xt, t), (log_variance(output, t, second) / 2).exp())
    upper = torch.where(x0 > 0.999, 1.0, gaussian.cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0.0, gaussian.cdf(x0 - 1 / 255))
    expected = -(upper - lower).clamp(min=1e-12).log2().flatten(1).mean(1)
    vb = losses(diffusion, output, x0, xt, t, noise)["vb"]
    torch.testing.assert_close(vb.double(), expected, rtol=2e-2, atol=0)


def test_each_sample_has_the_term_of_its_own_time(diffusion):
    t = torch.tensor([0, 500, 0, 3])
    x0, noise, xt, output = batch(t)
    together = losses(diffusion, output, x0, xt, t, noise)
    for i in range(4):
        alone = losses(diffusion, *(x[i : i + 1] for x in (output, x0, xt, t, noise)))
        for name, value in together.items():
            assert value.shape == (4,) and value.dtype == torch.float32
            torch.testing.assert_close(value[i : i + 1], alone[name])
    torch.testing.assert_close(together["loss"], together["mse"] + together["vb"])


@pytest.mark.parametrize("times", [[0, 0], [5, 700]])
def test_bound_trains_the_variance_alone_and_mse_the_noise_alone(diffusion, times):
    t = torch.tensor(times)
    x0, noise, xt, output = (x.float() for x in batch(t))
    output.requires_grad_()
    terms = diffusion.training_losses(output, x0, xt, t, noise)
    (mse,) = torch.autograd.grad(terms["mse"].sum(), output, retain_graph=True)
    (vb,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (both,) = torch.autograd.grad(terms["loss"].sum(), output)
    assert mse[:, :4].abs().min() > 0 and mse[:, 4:].abs().max() == 0
    assert vb[:, :4].abs().max() == 0 and vb[:, 4:].abs().max() > 0
    torch.testing.assert_close(both, mse + vb)


def test_perfect_prediction_costs_nothing(diffusion):
    x0, noise, xt, output = batch(TIMES)
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    terms = losses(diffusion, output, x0, xt, TIMES, noise)
    assert terms["mse"].max() == 0 and terms["vb"].abs().max() <= 1e-5


def test_half_precision_outputs_give_fp32_losses(diffusion):
    x0, noise, xt, output = (x.float() for x in batch(TIMES))
    half = output.bfloat16()
    terms = diffusion.training_losses(half, x0, xt, TIMES, noise)
    expected = diffusion.training_losses(half.float(), x0, xt, TIMES, noise)
    assert all(terms[name].dtype == torch.float32 and torch.equal(terms[name], expected[name]) for name in terms)


def test_divergence_and_cdf():
    a, b, c, d = torch.randn(4, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = kl_divergence(Normal(a, (b / 2).exp()), Normal(c, (d / 2).exp()))
    torch.testing.assert_close(normal_kl(a, b, c, d), expected)
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert (normal_cdf(x) - Normal(0.0, 1.0).cdf(x)).abs().max() <= 3e-4


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.3), (0.95, 0.1), (-1.2, 0.05), (0.3, 0.002)])
def test_probabilities_of_the_256_levels_sum_to_one(mean, scale):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_scale = torch.full_like(levels, math.log(scale))
    total = discretized_gaussian_log_likelihood(levels, torch.full_like(levels, mean), log_scale).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("steps", [50, 250, 4000])
def test_other_lengths_keep_the_sum_of_the_betas(steps):
    betas = GaussianDiffusion(steps).tables["max_log_variance"].exp()
    assert betas.shape == (steps,) and betas.sum().item() == pytest.approx(BETAS.sum().item(), rel=1e-5)
    assert (betas[-1] / betas[0]).item() == pytest.approx(200, rel=1e-4)


def test_user_mistakes():
    with pytest.raises(ValueError, match="num_timesteps must be at least 2, got 1"):
        GaussianDiffusion(1)
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"needs 8 output channels .* gave 4: set out_channels=8"):
        GaussianDiffusion().training_losses(x, x, x, torch.tensor([1, 2]), x)
