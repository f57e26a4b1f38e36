"""From noise to latents: classifier-free guidance and a sampler around the transformer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pixart_fast.engine import Graphs
from pixart_fast.samplers import Sampler
from pixart_fast.transformer import Caption, Transformer


class Guidance(NamedTuple):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): ε = ε(∅) + scale · (ε(text) - ε(∅)).

    It applies at times t / T in [low, high] alone (Kynkäänniemi et al. 2024, arXiv 2404.07724); elsewhere, and
    everywhere at scale 1, the empty prompt is not evaluated. `channels` of the noise are guided, None: all. The
    published iDDPM sampler guides the first three of four.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    channels: int | None = None

    def applies(self, t: float, total: int = 1000) -> bool:
        return self.scale != 1 and self.low <= t / total <= self.high

    def combine(self, output: Tensor, noise_channels: int) -> Tensor:
        """Outputs `[2B, C, h, w]`, those of the empty prompt first, to `[B, C, h, w]`: noise guided, the rest the
        prompt's."""
        empty, text = output.chunk(2)
        guided = self.channels or noise_channels
        noise = empty[:, :guided] + self.scale * (text - empty)[:, :guided]
        return torch.cat([noise, text[:, guided:]], dim=1)


class Denoiser:
    """The transformer, bound to the captions of a batch: what depends on them alone is worked out here, once.

    Args:
        model: in eval mode; its dtype is that of the matrix products.
        text, lengths: features `[B, L, C]` of the prompts, and how many tokens of each count `[B]` (on the CPU).
        empty, empty_lengths: the same of the unconditional branch, `[B, K, C]` and `[B]`.
        added: `[B]` rows of micro-conditions, or None.
        graphs: replays evaluations as CUDA graphs, or None.
    """

    def __init__(
        self,
        model: Transformer,
        text: Tensor,
        lengths: Tensor,
        empty: Tensor,
        empty_lengths: Tensor,
        added: dict[str, Tensor] | None = None,
        graphs: Graphs | None = None,
    ):
        self.model, self.graphs = model, graphs
        self.text, self.lengths, self.empty, self.empty_lengths = text, lengths, empty, empty_lengths
        self.added = added
        self.captions: dict[bool, Caption] = {}

    def __call__(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        """The model's output in fp32 for latents `[B, C, h, w]` at time `t`; guided: `[2B, …]`, empty prompts first."""
        if guided not in self.captions:
            self.captions[guided] = self.caption(guided)
        latents = latents.to(self.model.dtype)
        added = self.added
        if guided:
            latents = torch.cat([latents, latents])
            added = added and {name: torch.cat([rows, rows]) for name, rows in added.items()}
        time = torch.full((len(latents),), t, device=latents.device)
        evaluate = self.evaluate if self.graphs is None else self.graphs.evaluate
        output = evaluate(self.model, self.captions[guided], latents, time, added)
        return output.to(torch.float32, copy=True)  # a graph writes the next evaluation over this one

    @staticmethod
    def evaluate(
        model: Transformer, caption: Caption, latents: Tensor, time: Tensor, added: dict[str, Tensor] | None
    ) -> Tensor:
        return model(latents, caption, time, added, return_dict=False)[0]

    def caption(self, guided: bool) -> Caption:
        """Keys and values of both branches, or of the prompts alone."""
        text, lengths, single = self.text, self.lengths, 0
        if guided:
            longest = max(text.shape[1], self.empty.shape[1])
            text = torch.cat([pad(self.empty, longest), pad(text, longest)])
            lengths = torch.cat([self.empty_lengths, lengths])
            single = len(self.empty) if (self.empty_lengths == 1).all() else 0
        keep = torch.arange(text.shape[1]) < lengths[:, None]
        device, dtype = self.model.device, self.model.dtype
        return self.model.encode_caption(text.to(device, dtype), keep.to(device), single=single)


def pad(features: Tensor, tokens: int) -> Tensor:
    """Features `[B, L, C]` with zeros up to `tokens`."""
    return torch.nn.functional.pad(features, (0, 0, 0, tokens - features.shape[1]))


@torch.no_grad()
def denoise(
    evaluate: Callable[[Tensor, float, bool], Tensor],
    sampler: Sampler,
    noise: Tensor,
    guidance: Guidance,
    *,
    generators: list[torch.Generator] | None = None,
    clean: Tensor | None = None,
    repaint: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents `[B, C, h, w]` in fp32 from noise of that shape.

    Args:
        evaluate: a `Denoiser`.
        generators: one per picture, for samplers that draw noise on their way.
        clean: latents to start from (image-to-image: the sampler was built with strength < 1), or to keep.
        repaint: with `clean`, where to paint `[B, 1, h, w]`: 1 = anew, 0 = the latents of `clean`, whose noise level
            follows the sampler's (RePaint without its resampling: Lugmayr et al. 2022, arXiv 2201.09865).
        on_step: called with the number of steps done.

    Nothing here waits for the device.
    """
    channels = noise.shape[1]
    latents = sampler.start(noise, clean)
    for i, t in enumerate(sampler.timesteps.tolist()):
        guided = guidance.applies(t)
        output = evaluate(latents, t, guided)
        if guided:
            output = guidance.combine(output, channels)
        if not sampler.learned_variance:
            output = output[:, :channels]
        latents = sampler.step(output, i, latents, generators)
        if repaint is not None:
            latents = repaint * latents + (1 - repaint) * sampler.noised(clean, noise, i + 1)
        if on_step is not None:
            on_step(i + 1)
    return latents
