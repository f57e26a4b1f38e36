"""The noise schedule and the training loss of DiT and PixArt-α: iDDPM with a learned-range variance.

Ho et al. 2020 (arXiv 2006.11239) for the process, Nichol & Dhariwal 2021 (arXiv 2102.09672) for the learned variance.
"""

import math

import torch
from torch import Tensor


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of N(mean1, var1) from N(mean2, var2), elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() + (mean1 - mean2).square() * torch.exp(-log_variance2) - 1.0 - ratio)


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal CDF by its tanh approximation (Page 1977), as the published loss; within 3e-4 of exact."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log p of values that were rounded to 256 levels in [-1, 1] under a gaussian, elementwise, in nats."""
    inverse = torch.exp(-log_scale)
    upper = normal_cdf((x - mean + 1.0 / 255.0) * inverse)
    lower = normal_cdf((x - mean - 1.0 / 255.0) * inverse)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


class GaussianDiffusion:
    """The forward process q(x_t | x_0) and the loss of a model that predicts noise and variance.

    Betas rise linearly from 1e-4 to 0.02 over 1000 steps and keep their integral for another `num_timesteps`. Tables
    are computed in fp64 and stored as fp32 `[num_timesteps]`; they follow the device of the tensors they meet.
    """

    def __init__(self, num_timesteps: int = 1000):
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}.")
        self.num_timesteps = num_timesteps
        stretch = 1000 / num_timesteps
        betas = torch.linspace(1e-4 * stretch, 0.02 * stretch, num_timesteps, dtype=torch.float64).clamp(max=0.999)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alpha_bar)
        self.tables = {
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "snr": alpha_bar / (1 - alpha_bar),
            "recip_sqrt_alpha_bar": alpha_bar.rsqrt(),
            "sqrt_recip_minus_one": (1 / alpha_bar - 1).sqrt(),
            "posterior_x0": betas * previous.sqrt() / (1 - alpha_bar),
            "posterior_xt": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar),
            # The posterior variance is 0 at t = 0, where its logarithm takes the value of t = 1.
            "min_log_variance": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
            "max_log_variance": betas.log(),
        }
        self.tables = {name: table.float() for name, table in self.tables.items()}

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Row `t [B]` of a table, shaped to broadcast over `like [B, ...]`."""
        table = self.tables[name]
        if table.device != t.device:
            table = self.tables[name] = table.to(t.device)
        return table[t].reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε for `x0`, `noise [B, C, ...]` and integer `t [B]`."""
        return self.at("sqrt_alpha_bar", t, x0) * x0 + self.at("sqrt_one_minus_alpha_bar", t, x0) * noise

    def predict_x0(self, xt: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """x_0 = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t."""
        return self.at("recip_sqrt_alpha_bar", t, xt) * xt - self.at("sqrt_recip_minus_one", t, xt) * epsilon

    def training_losses(
        self, model_output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """`{"loss", "mse", "vb"}`, each fp32 `[B]`, for `model_output [B, 2C, ...]` = (ε̂, variance channel).

        mse = mean (ε - ε̂)²; vb is the variational bound's term at t in bits per dimension, which trains the variance
        alone (ε̂ is detached in it); loss = mse + vb, not divided by the number of steps (iDDPM's hybrid loss as DiT
        and PixArt train with it).
        """
        channels = x0.shape[1]
        if model_output.shape[1] != 2 * channels:
            raise ValueError(
                f"the loss needs {2 * channels} output channels (noise and variance), the model gave "
                f"{model_output.shape[1]}: set out_channels={2 * channels}."
            )
        x0, xt, noise = x0.float(), xt.float(), noise.float()
        epsilon, variance = model_output.float().chunk(2, dim=1)
        mse = mean_flat((noise - epsilon).square())

        def posterior_mean(start: Tensor) -> Tensor:
            return self.at("posterior_x0", t, xt) * start + self.at("posterior_xt", t, xt) * xt

        low, high = self.at("min_log_variance", t, xt), self.at("max_log_variance", t, xt)
        log_variance = low + (variance + 1) / 2 * (high - low)
        mean = posterior_mean(self.predict_x0(xt, t, epsilon.detach()))
        kl = mean_flat(normal_kl(posterior_mean(x0), low, mean, log_variance))
        nll = mean_flat(-discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance))
        vb = torch.where(t == 0, nll, kl) / math.log(2.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}
