"""Samplers: from noise to clean latents in few evaluations of the model, all behind one face.

DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) and DDIM (arXiv 2010.02502), its first order, are diffusers'
`DPMSolverMultistepScheduler`. The samplers that draw noise are ours: diffusers copies its noise to the device and
waits for it, in every step. iDDPM (arXiv 2102.09672) has the formulas of `DDPMScheduler`; SA-Solver (arXiv 2309.05019)
draws noise in the steps in which PixArt's own code does, one less than `SASolverScheduler` in 25; the consistency
sampler (arXiv 2310.04378) takes the timesteps of `LCMScheduler`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from torch import Generator, Tensor


@dataclass(frozen=True)
class SamplerInfo:
    """What a sampler is by default; `guidance` 1.0 is none."""

    steps: int
    guidance: float
    stochastic: bool
    learned_variance: bool
    description: str


SAMPLERS: Mapping[str, SamplerInfo] = MappingProxyType(
    {
        "dpm": SamplerInfo(20, 4.5, False, False, "DPM-Solver++ of order 2: the default of the paper"),
        "iddpm": SamplerInfo(100, 4.5, True, True, "iDDPM: the training's own chain, with the variance it learned"),
        "sa": SamplerInfo(25, 3.0, True, False, "SA-Solver: order 2, with noise in the middle of the way"),
        "lcm": SamplerInfo(4, 1.0, True, False, "consistency sampling, for models distilled to it (PixArt-LCM)"),
        "ddim": SamplerInfo(50, 4.5, False, False, "DDIM: deterministic, order 1"),
    }
)

# What a scheduler_config.json says about the model; the rest is about the sampler that wrote it.
_MODEL_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_LCM_ORIGINAL_STEPS = 50


class Sampler:
    """One way from noise to latents, in `len(timesteps)` steps; make it with `build`.

    `timesteps` is int64 `[n]` on the CPU. Latents are `[B, C, h, w]` of any device; all arithmetic is fp32. Between
    `start` and the last `step` a sampler remembers earlier steps: one batch at a time, its steps in order.
    `learned_variance` samplers take the model's whole output, the others its prediction alone.
    """

    learned_variance = False

    def __init__(self, name: str, alpha_bar: Tensor, timesteps: Sequence[int], prediction: str, strength: float):
        """`alpha_bar` is fp64 `[T]`; `timesteps` fall from T - 1 at most; of them the last share, `strength`, is
        kept."""
        steps = len(timesteps)
        self.name, self.strength, self.prediction = name, strength, prediction
        kept = int(steps * strength) if 0 < strength <= 1 else 0  # rounded as in diffusers' image-to-image
        if not kept:
            raise ValueError(
                f"strength {strength:g} does not leave 1 to {steps} of {steps} steps: take one from "
                f"{math.ceil(100 / steps) / 100:g} to 1."
            )
        self.first = steps - kept
        self.timesteps = torch.tensor(timesteps[self.first :], dtype=torch.int64)
        level = alpha_bar[self.timesteps]
        self.alpha, self.sigma = level.sqrt().tolist(), (1 - level).sqrt().tolist()
        self._next: int | None = None

    def start(self, noise: Tensor, clean: Tensor | None = None) -> Tensor:
        """The latents that the first step takes: fp32 noise, or `clean` latents with as much noise as belongs there.

        A ValueError says so where only a part of the steps is left (strength < 1) but no latents are given.
        """
        self._next = 0
        self._reset()
        if clean is not None:
            return self.noised(clean, noise, 0)
        if self.strength < 1:
            raise ValueError(f"strength {self.strength:g} starts from a picture: give one, or take strength 1.")
        return noise.float()

    def noised(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """`clean` latents at the noise level before step `index`, fp32; after the last step they are themselves."""
        if index == len(self.timesteps):
            return clean.float()
        return self.alpha[index] * clean.float() + self.sigma[index] * noise.float()

    def step(
        self, output: Tensor, index: int, latents: Tensor, generators: Sequence[Generator] | None = None
    ) -> Tensor:
        """The fp32 latents after step `index`, from those before it and the model's output for them.

        `output` is `[B, C, h, w]`, or `[B, 2C, h, w]` with `learned_variance`. Each picture's noise comes from its own
        generator, so that it does not depend on its batch; without generators from PyTorch's global one. Nothing here
        waits for the device. ValueError for a step out of order and for an output that does not fit.
        """
        if index != self._next:
            raise ValueError(f"{self.name} got step {index} where {self._next} was due: begin each batch with start().")
        channels = latents.shape[1] * (1 + self.learned_variance)
        if output.shape != (latents.shape[0], channels, *latents.shape[2:]):
            raise ValueError(
                f"{self.name} takes {channels} channels of output for latents {tuple(latents.shape)}, got "
                f"{tuple(output.shape)}"
                + (": the model predicts no variance, take another sampler." if self.learned_variance else ".")
            )
        if generators is not None and len(generators) != len(latents):
            raise ValueError(f"{len(latents)} pictures need as many generators, got {len(generators)}.")
        self._next = index + 1
        return self._step(output.float(), index, latents.float(), generators)

    def _reset(self) -> None:
        """Forget the steps of the batch before."""

    def _step(self, output: Tensor, index: int, latents: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        raise NotImplementedError

    def _clean(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """x_0 as the model predicts it."""
        alpha, sigma = self.alpha[index], self.sigma[index]
        if self.prediction == "epsilon":
            return (latents - sigma * output) / alpha
        return output if self.prediction == "sample" else alpha * latents - sigma * output

    @staticmethod
    def _noise(latents: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        if generators is None:
            return torch.randn_like(latents)
        shape = (1, *latents.shape[1:])
        noise = torch.cat(
            [torch.randn(shape, generator=each, device=each.device, dtype=torch.float32) for each in generators]
        )
        if noise.device.type == "cpu" and latents.is_cuda:
            noise = noise.pin_memory()  # or the copy would wait for all that the device has to do
        return noise.to(latents.device, non_blocking=True)


class _DPM(Sampler):
    """DPM-Solver++, multistep; order 1 is DDIM."""

    def __init__(self, *args, scheduler: DPMSolverMultistepScheduler, schedule: Sequence[int]):
        super().__init__(*args)
        self.scheduler, self.schedule = scheduler, schedule

    def _reset(self) -> None:
        self.scheduler.set_timesteps(timesteps=self.schedule)
        self.scheduler.set_begin_index(self.first)

    def _step(self, output: Tensor, index: int, latents: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        return self.scheduler.step(output, self.schedule[self.first + index], latents, return_dict=False)[0]


class _IDDPM(Sampler):
    """The ancestral chain over a part of the timesteps, with the variance that the model learned.

    iDDPM's equations 10, 11 and 15 with the betas that the chosen timesteps have among themselves (its section 4).
    """

    learned_variance = True

    def __init__(self, name: str, alpha_bar: Tensor, *args):
        super().__init__(name, alpha_bar, *args)
        here = alpha_bar[self.timesteps]
        after = torch.cat([here[1:], torch.ones(1, dtype=torch.float64)])
        beta = 1 - here / after
        self.from_clean = (beta * after.sqrt() / (1 - here)).tolist()
        self.from_latents = ((1 - after) * (1 - beta).sqrt() / (1 - here)).tolist()
        # The posterior's variance is 0 in the last step, which draws no noise.
        self.low, self.high = (beta * (1 - after) / (1 - here)).log().tolist(), beta.log().tolist()

    def _step(self, output: Tensor, index: int, latents: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        prediction, share = output.chunk(2, dim=1)
        clean = self._clean(prediction, index, latents)
        mean = self.from_clean[index] * clean + self.from_latents[index] * latents
        if index == len(self.timesteps) - 1:
            return mean
        log_variance = self.low[index] + (share + 1) / 2 * (self.high[index] - self.low[index])
        return mean + (log_variance / 2).exp() * self._noise(latents, generators)


class _SASolver(Sampler):
    """SA-Solver as PixArt runs it: predictor and corrector of order 2, data prediction, one evaluation per step.

    With λ = log(α / σ), h the λ of a step and k = 1 + τ², a step is
    x' = e^(-τ² h) (σ' / σ) x + α' [(1 - e^(-k h)) m + k h² / 2 · dm/dλ] + σ' √(1 - e^(-2 τ² h)) ε
    with the clean estimate m and, for the predictor, its slope to the step before. The corrector puts the slope to the
    new estimate in its place, which is all that it changes; so what a caller changes in the latents (inpainting) stays.
    The way ends at t = 0, whose noise is a hundredth of the latents'.
    """

    def __init__(self, name: str, alpha_bar: Tensor, schedule: Sequence[float], *args):
        super().__init__(name, alpha_bar, [round(t) for t in schedule[:-1]], *args)
        level = torch.cat([alpha_bar[self.timesteps], alpha_bar[:1]])
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
        h = (alpha / sigma).log().diff()
        # τ belongs to the time at which a step arrives, taken before it is rounded: of 25 steps one arrives at 0.8002,
        # without noise.
        arrival = (torch.tensor(schedule[self.first + 1 :], dtype=torch.float64) + 1) / len(alpha_bar)
        tau2 = ((arrival >= 0.2) & (arrival <= 0.8)).double()
        k = 1 + tau2
        self.keep = ((-tau2 * h).exp() * sigma[1:] / sigma[:-1]).tolist()
        self.take = (alpha[1:] * (1 - (-k * h).exp())).tolist()
        self.ahead = [0.0, *(alpha[2:] * k[1:] * h[1:].square() / (2 * h[:-1])).tolist()]  # per difference of m
        self.ahead[-1] = 0.0  # the last step is of order 1
        self.back = (alpha[1:] * k * h / 2).tolist()
        self.spread = (sigma[1:] * (1 - (-2 * tau2 * h).exp()).sqrt()).tolist()

    def _reset(self) -> None:
        self.previous: Tensor | None = None
        self.slope: Tensor | float = 0.0

    def _step(self, output: Tensor, index: int, latents: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        clean = self._clean(output, index, latents)
        slope: Tensor | float = 0.0
        if self.previous is not None:
            change = clean - self.previous
            latents = latents + self.back[index - 1] * change - self.slope
            slope = self.ahead[index] * change
        self.previous, self.slope = clean, slope
        latents = self.keep[index] * latents + self.take[index] * clean + slope
        if self.spread[index] > 0:
            latents = latents + self.spread[index] * self._noise(latents, generators)
        return latents


class _LCM(Sampler):
    """Multistep consistency sampling: the model's clean latents, noised to the next level, and so on."""

    def _step(self, output: Tensor, index: int, latents: Tensor, generators: Sequence[Generator] | None) -> Tensor:
        t = 10.0 * float(self.timesteps[index])  # the scaling of the boundary condition; σ_data is 0.5
        skip, out = 0.25 / (t * t + 0.25), t / (t * t + 0.25) ** 0.5
        clean = out * self._clean(output, index, latents) + skip * latents
        if index == len(self.timesteps) - 1:
            return clean
        return self.noised(clean, self._noise(latents, generators), index + 1)


def build(name: str, steps: int, *, config: Mapping | None = None, strength: float = 1.0) -> Sampler:
    """The sampler `name` of `SAMPLERS` for a number of steps.

    `config` is a scheduler_config.json: its betas and its kind of prediction are used, which belong to the model, and
    nothing else of it; the default is PixArt's, noise prediction and betas from 1e-4 to 0.02 over 1000 steps.
    `strength` below 1 keeps that share of the steps, the last, for image-to-image. ValueError names what is wrong.
    """
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}: choose one of {', '.join(SAMPLERS)}.")
    config = {} if config is None else config
    model = {key: config[key] for key in _MODEL_KEYS if config.get(key) is not None}
    prediction = model.setdefault("prediction_type", "epsilon")
    schedule = model.get("beta_schedule", "linear")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {prediction!r} is unknown: use epsilon, v_prediction or sample.")
    if schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2") or config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"the noise schedule {schedule!r}{' rescaled to zero SNR' if config.get('rescale_betas_zero_snr') else ''} "
            f"is not supported: use linear, scaled_linear or squaredcos_cap_v2."
        )
    scheduler = DPMSolverMultistepScheduler(**model, solver_order=1 if name == "ddim" else 2)
    alpha_bar = (1 - scheduler.betas.double()).cumprod(0)
    total = len(alpha_bar)

    least = 2 if name == "iddpm" else 1
    most = {"iddpm": total, "ddim": total, "lcm": _LCM_ORIGINAL_STEPS}.get(name, total - 1)
    if not least <= steps <= most:
        raise ValueError(f"{name} takes {least} to {most} steps, got {steps}: {SAMPLERS[name].steps} is its default.")

    ending = (prediction, strength)
    if name == "iddpm":
        return _IDDPM(name, alpha_bar, np.linspace(0, total - 1, steps).round()[::-1].tolist(), *ending)
    if name == "lcm":
        lcm = LCMScheduler(num_train_timesteps=total)
        lcm.set_timesteps(steps, original_inference_steps=_LCM_ORIGINAL_STEPS)
        return _LCM(name, alpha_bar, lcm.timesteps.tolist(), *ending)
    if name == "ddim":
        times = [round(total - i * total / steps) - 1 for i in range(steps)]
        return _DPM(name, alpha_bar, times, *ending, scheduler=scheduler, schedule=times)
    falling = np.linspace(0, total - 1, steps + 1)[::-1].tolist()
    if name == "sa":
        return _SASolver(name, alpha_bar, falling, *ending)
    times = [round(t) for t in falling[:-1]]
    return _DPM(name, alpha_bar, times, *ending, scheduler=scheduler, schedule=times)
