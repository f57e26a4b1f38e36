"""Fewer FLOPs for pictures that deviate a little: opt-in approximations of sampling, and what they cost in accuracy.

    TGate        cross-attention is frozen after some steps, and guidance stops there (Zhang et al. 2024, arXiv
                 2404.02747)
    BlockCache   blocks in the middle are evaluated at some steps alone; between them the last residual is added (δ-DiT:
                 Chen et al. 2024, arXiv 2406.01125)

Each takes the place of a `Denoiser`, together with its own guidance:

    approximation = TGate(denoiser, sampler, guidance, gate=10)
    latents = denoise(approximation, sampler, noise, approximation.guidance)
    print(approximation.report(exact, latents))

Which steps are approximated is settled before the first: nothing here waits for the device.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pixart_fast.cost import forward_flops
from pixart_fast.denoise import Denoiser, Guidance
from pixart_fast.engine import uncompiled
from pixart_fast.layers import KeysValues
from pixart_fast.samplers import Sampler
from pixart_fast.transformer import Caption, Stream, Transformer


def deviation(exact: Tensor, approximate: Tensor) -> float:
    """Relative RMS difference of final latents, both `[B, C, h, w]` from the same noise.

    Raises ValueError for unequal shapes.
    """
    if exact.shape != approximate.shape:
        raise ValueError(f"latents of {tuple(approximate.shape)} cannot be compared with {tuple(exact.shape)}.")
    return ((approximate.double() - exact.double()).norm() / exact.double().norm()).item()


class Approximation:
    """What is called like a `Denoiser`, for the steps of one sampler.

    Attributes:
        guidance: what `denoise` is to be given with it.
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, guidance: Guidance, own: Guidance):
        self.denoiser, self.guidance = denoiser, own
        self.times: list[int] = sampler.timesteps.tolist()
        self.exactly = [guidance.applies(t) for t in self.times]
        self.guided = {t: own.applies(t) for t in self.times}

    def __call__(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        """As `Denoiser.__call__`. Raises ValueError for a step that this was not made for."""
        if self.guided.get(t) != guided:
            raise ValueError(
                f"this approximation was not made for a step at time {t:g}{' with guidance' if guided else ''}: give "
                "denoise() the sampler that it was made with, and its own guidance."
            )
        return self._evaluate(latents, t, guided)

    def _evaluate(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        raise NotImplementedError

    def _flops(self, t: int, tokens: int) -> float:
        """FLOPs of the step at time t."""
        raise NotImplementedError

    def describe(self) -> str:
        """What is approximated, in a few words."""
        raise NotImplementedError

    def share(self, latents: Tensor) -> float:
        """FLOPs of all steps for latents `[B, C, h, w]`, of those that exact sampling takes."""
        height, width = latents.shape[-2:]
        tokens = height * width // self.denoiser.model.config.patch_size**2
        exact = sum(evaluation_flops(self.denoiser, tokens, guided) for guided in self.exactly)
        return sum(self._flops(t, tokens) for t in self.times) / exact

    def report(self, exact: Tensor, approximate: Tensor) -> str:
        """One line on what the approximation did to final latents `[B, C, h, w]`, and what it saved."""
        return (
            f"{self.describe()}: latents deviate by {deviation(exact, approximate):.1%} (relative RMS, "
            f"{len(exact)} picture{'s' * (len(exact) > 1)}), "
            f"{1 / self.share(exact):.2f} × fewer FLOPs"
        )


def evaluation_flops(
    denoiser: Denoiser, tokens: int, guided: bool, *, blocks: int | None = None, cross_attention: bool = True
) -> float:
    """FLOPs of an evaluation of `blocks` (None: all), with `tokens` image tokens per picture.

    Without what is worked out once per prompt: keys and values, and cross-attention to captions of one token.
    """
    model = denoiser.model
    config, width = model.config, model.inner_dim
    lengths: list[int | None] = denoiser.lengths.tolist()
    if guided:
        lengths += [None if (denoiser.empty_lengths == 1).all() else n for n in denoiser.empty_lengths.tolist()]
    if not cross_attention:
        lengths = [None] * len(lengths)
    sizes = {
        "width": width,
        "tokens": tokens,
        "text_tokens": 0,
        "caption_channels": 0,
        "patch_features": config.patch_size**2 * config.in_channels,
        "out_features": config.patch_size**2 * model.out_channels,
    }
    outside = forward_flops(layers=0, **sizes)
    block = forward_flops(layers=1, **sizes) - outside  # with the projections of cross-attention, q and out
    count = len(model.transformer_blocks) if blocks is None else blocks
    of_text = (-4.0 * tokens * width * width if n is None else 4.0 * tokens * n * width for n in lengths)
    return sum(outside + count * (block + of_caption) for of_caption in of_text)


class TGate(Approximation):
    """T-GATE: up to step `gate` all is exact; after it cross-attention gives what it gave there, and guidance ends.

    Frozen is the mean of both branches, and one branch is evaluated (Zhang et al. 2024, arXiv 2404.02747).
    Where the step at the gate is not guided, the prompts' own results are frozen. The results take a tensor
    `[B, N, D]` per block: 264 MB per picture at 1024 px for XL/2 in bf16, and as much again with CUDA graphs.

    Args:
        denoiser: for a batch; its blocks may be compiled, its evaluations may be CUDA graphs (the step at the gate is
            evaluated without both).
        sampler, guidance: what `denoise` would be given for the exact latents.
        gate: steps to evaluate exactly, from 1; the number of all steps freezes nothing.

    Raises ValueError for a gate outside the steps.
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, guidance: Guidance, gate: int):
        steps = len(sampler.timesteps)
        if not 1 <= gate <= steps:
            raise ValueError(f"T-GATE takes a gate from 1 to {steps}, the steps of this sampler, got {gate}.")
        self.gate, self.time = gate, sampler.timesteps.tolist()[gate - 1]
        own = guidance._replace(low=max(guidance.low, self.time / 1000))  # of 1000, as `Guidance.applies` has it
        super().__init__(denoiser, sampler, guidance, own)
        self.recorded = copy.copy(denoiser)  # with the captions of `denoiser`: what one encodes serves both
        self.recorded.graphs = None
        self.frozen = copy.copy(denoiser)
        self.frozen.captions = {}

    def _evaluate(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        if t < self.time:
            if not self.frozen.captions:
                raise ValueError(f"T-GATE got the step at time {t:g} without the one at its gate, {self.time:g}.")
            return self.frozen(latents, t, guided)
        if t == self.time and self.gate < len(self.times):
            return self._record(latents, t, guided)
        return self.denoiser(latents, t, guided)

    def _record(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        """The step at the gate, whose results of cross-attention become the caption of the steps to come."""
        context = []

        def keep(layer: nn.Module, inputs: tuple, h: Tensor) -> None:
            context.append(KeysValues(None, None, h.unflatten(0, (2, -1)).mean(0) if guided else h))

        hooks = [block.attn2.register_forward_hook(keep) for block in self.denoiser.model.transformer_blocks]
        try:
            with uncompiled():
                output = self.recorded(latents, t, guided)
        finally:
            for hook in hooks:
                hook.remove()
        text, lengths, bias, _ = self.recorded.captions[guided]
        self.frozen.captions[False] = Caption(text[-len(latents) :], lengths[-len(latents) :], bias, context)
        return output

    def _flops(self, t: int, tokens: int) -> float:
        return evaluation_flops(self.denoiser, tokens, self.guided[t], cross_attention=t >= self.time)

    def describe(self) -> str:
        return f"T-GATE after step {self.gate} of {len(self.times)}"


class CachedBlocks:
    """A transformer in two forms that share its weights, for `BlockCache`.

    `refresh` evaluates all of it and keeps what blocks [first, stop) added to the stream, Δ = x_stop - x_first; `reuse`
    adds Δ in their place. Make it once per model and range, and keep it: CUDA graphs know both forms by their identity,
    and read Δ where it lay at their capture. It serves one batch at a time.

    Args:
        model: in eval mode.
        blocks: first and stop; None: all but the first and the last quarter.

    Raises ValueError for a range outside the depth.
    """

    def __init__(self, model: Transformer, blocks: tuple[int, int] | None = None):
        depth = len(model.transformer_blocks)
        first, stop = blocks or (depth // 4, depth - depth // 4)
        if not 0 <= first < stop <= depth:
            raise ValueError(f"cached blocks must be a range from 0 to {depth}, the model's depth, got {first}:{stop}.")
        self.model, self.first, self.stop = model, first, stop
        self.refresh, self.reuse = self._form(self._refresh), self._form(self._reuse)
        self.storage: list[Tensor] = []

    def _form(self, run_blocks: Callable[..., Stream]) -> Transformer:
        form = copy.copy(self.model)  # a shallow copy holds the same modules and weights, wherever they move
        form.run_blocks = run_blocks
        return form

    def _refresh(self, stream: Stream, *inputs) -> Stream:
        before = self.model.run_blocks(stream, *inputs, stop=self.first)
        after = self.model.run_blocks(before, *inputs, first=self.first, stop=self.stop)
        x = before.total()
        torch.sub(after.total(), x, out=self._residual(x))
        return self.model.run_blocks(after, *inputs, first=self.stop)

    def _reuse(self, stream: Stream, *inputs) -> Stream:
        x = self.model.run_blocks(stream, *inputs, stop=self.first).total()
        return self.model.run_blocks(Stream(x + self._residual(x)), *inputs, first=self.stop)

    def _residual(self, like: Tensor) -> Tensor:
        """Where Δ of a shape lies, for good: the first memory that holds it; of several shapes one is in use."""
        for flat in self.storage:
            if flat.numel() >= like.numel() and (flat.dtype, flat.device) == (like.dtype, like.device):
                break
        else:
            flat = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
            self.storage.append(flat)
        return flat[: like.numel()].view(like.shape)


class BlockCache(Approximation):
    """The blocks of `cached` at every `interval`-th step alone; between them what they added last.

    All is evaluated at the first two steps and the last, and where guidance sets in or ends.

    Args:
        denoiser: of the model that `cached` was made of; blocks may be compiled, evaluations may be CUDA graphs.
        sampler, guidance: what `denoise` would be given for the exact latents.
        cached: the blocks.
        interval: 1 is exact.

    Raises ValueError for an interval below 1 and another model's blocks.
    """

    def __init__(
        self, denoiser: Denoiser, sampler: Sampler, guidance: Guidance, cached: CachedBlocks, interval: int = 2
    ):
        if interval < 1:
            raise ValueError(f"blocks can be evaluated every 1 or more steps, got interval {interval}.")
        if cached.model is not denoiser.model:
            raise ValueError("these blocks are of another model than the denoiser's: make CachedBlocks of that one.")
        super().__init__(denoiser, sampler, guidance, guidance)
        self.cached, self.interval = cached, interval
        self.refresh, self.reuse = copy.copy(denoiser), copy.copy(denoiser)
        self.refresh.model, self.reuse.model = cached.refresh, cached.reuse
        self.full = set()
        since = 0
        for i, t in enumerate(self.times):
            since += 1
            turn = i > 0 and self.exactly[i] != self.exactly[i - 1]
            if i < 2 or i == len(self.times) - 1 or since == interval or turn:
                self.full.add(t)
                since = 0

    def _evaluate(self, latents: Tensor, t: float, guided: bool) -> Tensor:
        return (self.refresh if t in self.full else self.reuse)(latents, t, guided)

    def _flops(self, t: int, tokens: int) -> float:
        depth = len(self.cached.model.transformer_blocks)
        blocks = depth if t in self.full else depth - (self.cached.stop - self.cached.first)
        return evaluation_flops(self.denoiser, tokens, self.guided[t], blocks=blocks)

    def describe(self) -> str:
        depth = len(self.cached.model.transformer_blocks)
        return (
            f"blocks {self.cached.first}:{self.cached.stop} of {depth} at {len(self.full)} of {len(self.times)} steps "
            f"(interval {self.interval})"
        )
