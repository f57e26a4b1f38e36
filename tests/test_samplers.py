"""Samplers against diffusers', against the formulas in fp64, and by what they make of a distribution that is known.

For Gaussian data every model is a closed formula, so that the final mean and variance have exact values.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler, SASolverScheduler
from torch import Generator, Tensor

from pixart_fast.samplers import SAMPLERS, Sampler, build

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETAS).cumprod(0)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
MEAN, STD = 1.5, 0.5  # of the data


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def generators(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return ((got.double() - expected.double()).square().mean() / expected.double().square().mean()).sqrt().item()


def random_model(sampler: Sampler, latents: Tensor) -> Tensor:
    """Some smooth function of the latents, with as many channels as the sampler takes."""
    output = torch.tanh(latents) + 0.3 * latents.roll(1, -1)
    return torch.cat([output, torch.sin(3 * latents)], dim=1) if sampler.learned_variance else output


def exact_epsilon(latents: Tensor, t: int) -> Tensor:
    """E[ε | x_t] for data of N(MEAN, STD²)."""
    alpha, sigma = ALPHA_BAR[t].sqrt().item(), (1 - ALPHA_BAR[t]).sqrt().item()
    return sigma * (latents - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def consistent_epsilon(latents: Tensor, t: int) -> Tensor:
    """The ε of a perfect consistency model: its clean latents are where the probability-flow ODE ends."""
    alpha, sigma = ALPHA_BAR[t].sqrt().item(), (1 - ALPHA_BAR[t]).sqrt().item()
    clean = MEAN + STD * (latents - alpha * MEAN) / math.sqrt(alpha**2 * STD**2 + sigma**2)
    return (latents - alpha * clean) / sigma


def exact_share(sampler: Sampler, index: int) -> float:
    """The variance channel's value at which the reverse step has the variance of q(x_s | x_t), MEAN and STD known."""
    level = ALPHA_BAR[sampler.timesteps[index]].item()
    last = index == len(sampler.timesteps) - 1
    after = 1.0 if last else ALPHA_BAR[sampler.timesteps[index + 1]].item()
    beta = 1 - level / after
    posterior = beta * (1 - after) / (1 - level)
    clean = STD**2 * (1 - level) / (level * STD**2 + 1 - level)  # Var[x_0 | x_t]
    variance = posterior + (beta * math.sqrt(after) / (1 - level)) ** 2 * clean
    return 0.0 if last else 2 * math.log(variance / posterior) / math.log(beta / posterior) - 1


def sample(sampler: Sampler, latents: Tensor, draws: list[Generator] | None = None) -> Tensor:
    """All steps, with the model that knows the data's distribution."""
    for index, t in enumerate(sampler.timesteps.tolist()):
        output = (consistent_epsilon if sampler.name == "lcm" else exact_epsilon)(latents, t)
        if sampler.learned_variance:
            output = torch.cat([output, torch.full_like(output, exact_share(sampler, index))], dim=1)
        latents = sampler.step(output, index, latents, draws)
    return latents


def follow(sampler: Sampler, scheduler, timesteps: list[int], pick: str = "prev_sample", **options) -> float:
    """The largest error of a step, when both take the same model outputs and the same noise."""
    assert sampler.timesteps.tolist() == timesteps
    theirs = normal(0, 2, 4, 3, 5)
    ours = sampler.start(theirs)
    worst = 0.0
    for index, t in enumerate(timesteps):
        output = random_model(sampler, theirs)
        ours = sampler.step(output, index, ours, generators(index, 100 + index))
        theirs = scheduler.step(output, t, theirs, generator=generators(index, 100 + index), **options)[pick]
        worst = max(worst, error(ours, theirs))
    return worst


def test_dpm_is_diffusers_default_scheduler_to_the_bit():
    """The whole way of a pipeline, which passes its own latents on; any number of steps has its timesteps."""
    for steps in (1, 4, 20, 333):
        scheduler = DPMSolverMultistepScheduler(**LINEAR)
        scheduler.set_timesteps(steps)
        assert follow(build("dpm", steps), scheduler, scheduler.timesteps.tolist()) == 0


def test_ddim_is_diffusers():
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    assert follow(build("ddim", 50), scheduler, scheduler.timesteps.tolist()) <= 2e-6


def test_sa_is_diffusers_but_for_the_steps_with_noise():
    """Given the same τ for each step. By default theirs draws noise in one step more than PixArt's own code."""
    sampler = build("sa", 25)
    noisy = [t for t, spread in zip(sampler.timesteps.tolist(), sampler.spread, strict=True) if spread > 0]
    scheduler = SASolverScheduler(**LINEAR, tau_func=lambda t: int(t in noisy))
    scheduler.set_timesteps(25)
    assert follow(sampler, scheduler, scheduler.timesteps.tolist()) <= 2e-5
    by_default = [t for t in scheduler.timesteps.tolist() if SASolverScheduler(**LINEAR).tau_func(t)]
    assert by_default == [*noisy, 200]


def test_sa_draws_noise_where_the_published_code_does():
    """τ(t) of the time a step arrives at, between 0.2 and 0.8 of the continuous time that falls from 1 to 0.001."""
    for steps in (10, 25, 50):
        times = np.linspace(1, 0.001, steps + 1)
        expected = [0.2 <= t <= 0.8 and i < steps - 1 for i, t in enumerate(times[1:])]
        assert [spread > 0 for spread in build("sa", steps).spread] == expected


def test_lcm_is_diffusers():
    scheduler = LCMScheduler(**LINEAR)
    scheduler.set_timesteps(4, original_inference_steps=50)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert follow(build("lcm", 4), scheduler, [999, 759, 499, 259]) <= 2e-6
    scheduler.set_timesteps(50)  # to t = 19, where the boundary condition shows
    assert follow(build("lcm", 50), scheduler, scheduler.timesteps.tolist()) <= 2e-6


def test_iddpm_timesteps_are_evenly_spaced_and_rounded():
    assert build("iddpm", 100).timesteps.tolist() == [round(999 - i * 999 / 99) for i in range(100)]
    assert build("iddpm", 1000).timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [2, 10, 100])
def test_iddpm_is_the_definition(steps):
    """Each step in fp64: the product of q(x_t | x_s) and q(x_s | x_0) has the mean and the lower variance; the upper
    is β of q(x_t | x_s). iDDPM's equation 15 goes between them; the last step is the mean."""
    sampler = build("iddpm", steps)
    times = sampler.timesteps.tolist()
    latents = sampler.start(normal(0, 2, 4, 3, 5))
    for i, t in enumerate(times):
        level, after = ALPHA_BAR[t], ALPHA_BAR[times[i + 1]] if i + 1 < steps else torch.ones(1).double()
        output, x = random_model(sampler, latents).double(), latents.double()
        clean = (x - (1 - level).sqrt() * output[:, :4]) / level.sqrt()
        step_alpha, beta = level / after, 1 - level / after
        if i + 1 < steps:
            variance = 1 / (step_alpha / beta + 1 / (1 - after))
            mean = variance * (step_alpha.sqrt() / beta * x + after.sqrt() / (1 - after) * clean)
            share = (output[:, 4:] + 1) / 2
            std = ((share * beta.log() + (1 - share) * variance.log()) / 2).exp()
            noise = torch.cat([normal(seed, 1, 4, 3, 5) for seed in (i, 100 + i)])
            expected = mean + std * noise
        else:
            expected = clean
        got = sampler.step(output.float(), i, latents, generators(i, 100 + i))
        assert error(got, expected) <= 1e-6
        latents = got


def test_iddpm_beside_diffusers():
    """DDPMScheduler agrees when told to; as it comes it clips latents to [-1, 1], spaces otherwise, fixes β."""
    told = DDPMScheduler(**LINEAR, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    told.set_timesteps(100)
    assert follow(build("iddpm", 100), told, told.timesteps.tolist()) <= 1e-4
    default = DDPMScheduler(**LINEAR)
    default.set_timesteps(100)
    assert default.timesteps.tolist() != told.timesteps.tolist()
    clipping = DDPMScheduler(**LINEAR, variance_type="learned_range", timestep_spacing="linspace")
    clipping.set_timesteps(100)
    assert follow(build("iddpm", 100), clipping, clipping.timesteps.tolist()) >= 0.1


# DPM-Solver++ and DDIM leave their solver's error, that falls with the steps; iDDPM and LCM are exact in any number.
@pytest.mark.parametrize(
    ("name", "steps", "bias"),
    [
        ("dpm", 20, 0.05),
        ("dpm", 200, 0.0005),
        ("iddpm", 8, 0.0),
        ("iddpm", 100, 0.0),
        ("sa", 25, 0.002),
        ("sa", 250, 0.0),
        ("lcm", 4, 0.0),
        ("lcm", 1, 0.0),
        ("ddim", 50, 0.06),
        ("ddim", 500, 0.006),
    ],
)
def test_known_distribution_is_reached(name, steps, bias):
    sampler = build(name, steps)
    latents = sampler.start(normal(1, 64, 4, 16, 16), MEAN + STD * normal(2, 64, 4, 16, 16))
    final = sample(sampler, latents, generators(*range(64)))
    count = final.numel()
    assert abs(final.mean().item() - MEAN) <= 4 * STD / math.sqrt(count) + bias * STD
    assert abs(final.std().item() / STD - 1) <= 4 / math.sqrt(2 * count) + bias


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_starts_at_its_noise_level_and_stays_in_the_distribution(name, strength):
    steps = {"lcm": 50, "ddim": 500}.get(name, 120)
    sampler, whole = build(name, steps, strength=strength), build(name, steps)
    kept = int(steps * strength)
    assert sampler.timesteps.tolist() == whole.timesteps.tolist()[-kept:]
    clean, noise = MEAN + STD * normal(2, 64, 4, 16, 16), normal(3, 64, 4, 16, 16)
    level = ALPHA_BAR[sampler.timesteps[0]]
    latents = sampler.start(noise, clean)
    assert error(latents, level.sqrt() * clean.double() + (1 - level).sqrt() * noise.double()) <= 1e-6
    final = sample(sampler, latents, generators(*range(64)))
    assert abs(final.mean().item() - MEAN) <= 0.02 * STD
    assert final.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("strength", [0.05, 0.29, 0.5, 0.999, 1.0])
def test_image_to_image_of_dpm_is_diffusers(strength):
    """Their scheduler with the timesteps and the begin index that their image-to-image pipelines give it."""
    scheduler = DPMSolverMultistepScheduler(**LINEAR)
    scheduler.set_timesteps(20)
    first = max(20 - min(int(20 * strength), 20), 0)
    scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    sampler = build("dpm", 20, strength=strength)
    assert sampler.timesteps.tolist() == timesteps.tolist()
    clean, noise = normal(0, 2, 4, 3, 5), normal(1, 2, 4, 3, 5)
    theirs = scheduler.add_noise(clean, noise, timesteps[:1].repeat(2))
    ours = sampler.start(noise, clean)
    for index, t in enumerate(timesteps):
        output = random_model(sampler, theirs)
        ours, theirs = sampler.step(output, index, ours), scheduler.step(output, t, theirs).prev_sample
        assert error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_noised_latents_for_inpainting(name):
    sampler = build(name, 12)
    clean, noise = normal(0, 2, 4, 3, 5), normal(1, 2, 4, 3, 5)
    for index, t in enumerate(sampler.timesteps):
        level = ALPHA_BAR[t]
        expected = level.sqrt() * clean.double() + (1 - level).sqrt() * noise.double()
        assert error(sampler.noised(clean, noise, index), expected) <= 1e-6
    assert torch.equal(sampler.noised(clean, noise, 12), clean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_caller_paints_between_steps_stays(name):
    """Inpainting replaces a part of the latents before each step. A model that never mixes places must not show it
    elsewhere, and the part itself must follow what was painted: no sampler may fall back on latents of its own."""
    painted, untouched = build(name, 12), build(name, 12)
    noise = normal(0, 1, 4, 4, 4)
    a, b = painted.start(noise), untouched.start(noise)
    for index, t in enumerate(painted.timesteps.tolist()):
        a = torch.cat([torch.full_like(a[..., :2], 3.0), a[..., 2:]], dim=-1)
        outputs = []
        for sampler, latents in ((painted, a), (untouched, b)):
            epsilon = exact_epsilon(latents, t)
            outputs.append(torch.cat([epsilon, 0 * epsilon], dim=1) if sampler.learned_variance else epsilon)
        a = painted.step(outputs[0], index, a, generators(index))
        b = untouched.step(outputs[1], index, b, generators(index))
        assert torch.equal(a[..., 2:], b[..., 2:])
        if index and name == "sa" and painted.spread[index] == 0:
            assert a[..., :2].std() <= 1e-5  # the same everywhere, as what was painted


@pytest.mark.parametrize("name", [name for name, info in SAMPLERS.items() if info.stochastic])
def test_a_picture_does_not_depend_on_its_batch(name):
    noise = normal(0, 3, 4, 8, 8)
    together = build(name, 10)
    batch = sample(together, together.start(noise), generators(5, 6, 7))
    for row in range(3):
        alone = build(name, 10)
        picture = sample(alone, alone.start(noise[row : row + 1]), generators(5 + row))
        assert torch.equal(batch[row : row + 1], picture)
    again = sample(together, together.start(noise), generators(5, 6, 8))
    assert torch.equal(again[:2], batch[:2]) and not torch.equal(again[2], batch[2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_defaults_and_a_second_batch(name):
    info = SAMPLERS[name]
    sampler = build(name, info.steps)
    assert len(sampler.timesteps) == info.steps and sampler.timesteps.dtype == torch.int64
    assert sampler.learned_variance == info.learned_variance
    noise = normal(0, 2, 4, 8, 8)
    one = sample(sampler, sampler.start(noise), generators(1, 2))
    assert torch.equal(sample(sampler, sampler.start(noise), generators(1, 2)), one)
    torch.manual_seed(0)
    drawn = sample(sampler, sampler.start(noise))
    assert (not torch.equal(sample(sampler, sampler.start(noise)), drawn)) == info.stochastic


@pytest.mark.parametrize("name", SAMPLERS)
def test_arithmetic_is_fp32_whatever_the_model_is(name):
    for half in (build(name, 6), build(name, 6)):
        noise = normal(0, 1, 4, 4, 4).bfloat16()
        latents = half.start(noise)
        assert latents.dtype == torch.float32
        for index in range(6):
            output = random_model(half, latents).bfloat16()
            latents = half.step(output, index, latents, generators(index))
            assert latents.dtype == torch.float32
    same = build(name, 6)
    again = same.start(noise.float())
    for index in range(6):
        again = same.step(random_model(same, again).bfloat16().float(), index, again, generators(index))
    assert torch.equal(again, latents)


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_do_no_work_that_waits_for_the_device(name):
    """On the meta device a value that the host reads, or a table that a tensor indexes, is an error."""
    sampler = build(name, 6)
    latents = sampler.start(torch.zeros(2, 4, 4, 4, device="meta"))
    for index in range(6):
        output = torch.zeros(2, 4 * (1 + sampler.learned_variance), 4, 4, device="meta")
        latents = sampler.step(output, index, latents, generators(1, 2))
    assert latents.device.type == "meta" and latents.shape == (2, 4, 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_do_not_wait_for_the_device(name):
    """And they make the CPU's picture, from the same generators."""
    sampler, on_cpu = build(name, 6), build(name, 6)
    noise = normal(0, 2, 4, 16, 16)
    latents, expected = sampler.start(noise.cuda()), on_cpu.start(noise)
    draws, same = generators(1, 2), generators(1, 2)
    for index in range(6):
        output = random_model(on_cpu, expected)
        expected = on_cpu.step(output, index, expected, same)
        output = output.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            latents = sampler.step(output, index, latents, draws)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert error(latents.cpu(), expected) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_config_of_the_folder_gives_betas_and_prediction(name):
    """Data of the same distribution, reached by a model that predicts velocity under other betas."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 500,
        "beta_start": 0.001,
        "beta_end": 0.06,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "steps_offset": 1,
    }
    betas = torch.linspace(0.001**0.5, 0.06**0.5, 500, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    steps = {"lcm": 50, "ddim": 500}.get(name, 150)
    sampler = build(name, steps, config=config)
    latents, draws = sampler.start(normal(1, 16, 4, 16, 16)), generators(*range(16))
    for index, t in enumerate(sampler.timesteps.tolist()):
        alpha, sigma = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
        total = alpha**2 * STD**2 + sigma**2
        clean = MEAN + alpha * STD**2 * (latents - alpha * MEAN) / total
        if name == "lcm":
            clean = MEAN + STD * (latents - alpha * MEAN) / math.sqrt(total)
        velocity = (alpha * latents - clean) / sigma
        if sampler.learned_variance:
            velocity = torch.cat([velocity, torch.zeros_like(velocity)], dim=1)
        latents = sampler.step(velocity, index, latents, draws)
    assert abs(latents.mean().item() - MEAN) <= 0.05 * STD
    assert latents.std().item() == pytest.approx(STD, rel=0.05)


def test_predictions_of_the_clean_latents():
    """The same way as with the noise that belongs to them."""
    by_noise, by_clean = build("sa", 10), build("sa", 10, config={"prediction_type": "sample"})
    a = b = by_noise.start(normal(0, 1, 4, 8, 8))
    by_clean.start(a)
    for index, t in enumerate(by_noise.timesteps.tolist()):
        epsilon = exact_epsilon(b, t)
        clean = (b - (1 - ALPHA_BAR[t]).sqrt().item() * epsilon) / ALPHA_BAR[t].sqrt().item()
        a, b = by_noise.step(epsilon, index, a, generators(3)), by_clean.step(clean, index, b, generators(3))
        assert error(b, a) <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "euler"}, r"no sampler 'euler': choose one of dpm, iddpm, sa, lcm, ddim\."),
        ({"steps": 0}, r"dpm takes 1 to 999 steps, got 0: 20 is its default"),
        ({"steps": 1000}, r"dpm takes 1 to 999 steps"),
        ({"name": "iddpm", "steps": 1}, r"iddpm takes 2 to 1000 steps, got 1"),
        ({"name": "lcm", "steps": 51}, r"lcm takes 1 to 50 steps, got 51"),
        ({"strength": 0.04}, r"strength 0\.04 does not leave 1 to 20 of 20 steps: take one from 0\.05 to 1\."),
        ({"strength": 1.5}, r"strength 1\.5 does not leave 1 to 20"),
        ({"strength": math.nan}, r"strength nan does not"),
        ({"config": {"prediction_type": "flow_prediction"}}, r"prediction_type 'flow_prediction' is unknown"),
        ({"config": {"beta_schedule": "laplace"}}, r"schedule 'laplace' is not supported: use linear"),
        ({"config": {"rescale_betas_zero_snr": True}}, r"'linear' rescaled to zero SNR is not supported"),
    ],
)
def test_mistakes_in_building(change, message):
    arguments = {"name": "dpm", "steps": 20} | change
    with pytest.raises(ValueError, match=message):
        build(arguments.pop("name"), arguments.pop("steps"), **arguments)


def test_the_strength_that_an_error_names_is_enough():
    for steps in range(1, 1000):
        assert len(build("sa", steps, strength=math.ceil(100 / steps) / 100).timesteps) >= 1


def test_mistakes_in_sampling():
    latents = torch.zeros(2, 4, 8, 8)
    sampler = build("dpm", 5)
    with pytest.raises(ValueError, match=r"got step 0 where None was due: begin each batch with start"):
        sampler.step(latents, 0, latents)
    sampler.start(latents)
    with pytest.raises(ValueError, match="got step 1 where 0 was due"):
        sampler.step(latents, 1, latents)
    with pytest.raises(ValueError, match=r"dpm takes 4 channels of output .* got \(2, 8, 8, 8\)\."):
        sampler.step(torch.zeros(2, 8, 8, 8), 0, latents)
    with pytest.raises(ValueError, match="2 pictures need as many generators, got 1"):
        sampler.step(latents, 0, latents, generators(0))
    sampler.step(latents, 0, latents)  # what was refused changed nothing
    learned = build("iddpm", 5)
    learned.start(latents)
    with pytest.raises(ValueError, match=r"takes 8 channels .* the model predicts no variance, take another sampler"):
        learned.step(latents, 0, latents)
    with pytest.raises(ValueError, match=r"strength 0\.5 starts from a picture: give one, or take strength 1"):
        build("sa", 10, strength=0.5).start(latents)
