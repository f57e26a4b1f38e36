"""The model's cases: a block, a forward pass, a training step, a guided generation, each beside what users run instead.

All paths share one set of random weights, so that only execution differs and a GPU holds them once:

ours                       `pixart_fast.Transformer` with the backends that "auto" chooses, its blocks compiled
ours eager                 the same, uncompiled
reference eager, compiled  the same class in plain PyTorch, `backend="reference"`
diffusers eager, compiled  `diffusers.PixArtTransformer2DModel`; compiled block by block, as ours is
diffusers compiled whole   `torch.compile(model)`, which compiles every block anew
diffusers fused qkv        after `fuse_qkv_projections()`, compiled block by block

A training step is forward, backward and AdamW on fp32 master weights, at a learning rate of 0: the weights stay. A
generation denoises with DPM-Solver++ and classifier-free guidance, both branches in one batch, the empty prompt as one
token (diffusers' convention); "ours" is what `PixArtPipeline` does: text once for all steps, prepacked weights on a
CPU, CUDA graphs on a GPU. "ours int8" and "ours fp8" are approximations and may err as much as a baseline may.
"""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

from bench import cost
from bench.measure import ACCURACY_OF_BASELINES, Case, Operands, Path
from pixart_fast import Transformer, ops
from pixart_fast.config import SIZES, Size, transformer_config
from pixart_fast.denoise import Denoiser, Guidance
from pixart_fast.denoise import denoise as denoise_ours
from pixart_fast.engine import Graphs, compile_blocks
from pixart_fast.quantized import prepack, quantize
from pixart_fast.samplers import build
from pixart_fast.transformer import Block, Caption, Stream

REFERENCE = dict.fromkeys(ops.OPS, "reference")
PATHS = (
    "ours",
    "reference compiled",
    "diffusers compiled",
    "diffusers compiled whole",
    "diffusers fused qkv",
    "ours eager",
    "reference eager",
    "diffusers eager",
)
# W8A8, by what the device's tensor cores take; beside ours in a generation.
EIGHT_BIT = ("ours int8", "ours fp8")
COMPILED = (*PATHS[:5], *EIGHT_BIT)
# Fused projections are for inference, and a model compiled whole takes as long as all the rest: measured in `forward`.
EVERYWHERE = tuple(path for path in PATHS if path not in ("diffusers fused qkv", "diffusers compiled whole"))
# What stands beside ours at more sizes than one.
NEAREST = ("ours", "diffusers eager", "diffusers compiled")
# One change per rung, each on top of those before it: the operators that leave plain PyTorch, or what the comment says.
LADDER: dict[str, tuple[str, ...]] = {
    "eager": (),
    "+ compile": (),
    "+ fused adaLN": ("modulated_layernorm",),
    "+ cross-attention": ("cross_attention",),
    "+ self-attention": ("self_attention",),
    "+ fused linear": ("gated_linear", "linear_gelu"),
    "+ text K/V once": (),  # keys and values of the caption, once for all steps
    "+ empty prompt once": (),  # cross-attention to its one token, once for all steps
    "+ packed weights": (),
    "+ CUDA graphs": (),
}
# Rungs that are other paths by another name: a device's last is all of "ours".
SAME = {
    "eager": "reference eager",
    "+ compile": "reference compiled",
    "+ packed weights": "ours",
    "+ CUDA graphs": "ours",
}
RUNGS = tuple(rung for rung in LADDER if rung not in SAME)
NOT_ON = {
    "cpu": {"+ CUDA graphs": "needs a CUDA device"},
    "cuda": {"+ packed weights": "the library takes weights as they are"},
}
GUIDANCE = 4.5
# Samples whose results are compared with fp64.
CHECKED = 2
ADDED = {"resolution": None, "aspect_ratio": None}

Predict = Callable[[Tensor, Tensor], Tensor]  # latents [B, 4, h, w], time [B] -> [B, 8, h, w]


@dataclass(frozen=True)
class Workload:
    """What is run: a size with its depth, square pictures, captions of up to `tokens` tokens, padded to them."""

    size: Size
    pixels: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    tokens: int = 120
    channels: int = 4096
    patch: int = 2
    steps: int = 0

    @property
    def name(self) -> str:
        layers = self.size.layers
        size = next(name for name, size in SIZES.items() if size.width == self.size.width)
        steps = f" {self.steps} steps" if self.steps else ""
        return f"{size}/{self.patch} {layers} block{'s' * (layers > 1)} {self.pixels}px B{self.batch}{steps}"

    @property
    def latent(self) -> int:
        """Height and width of the latents."""
        return self.pixels // 8

    @property
    def image_tokens(self) -> int:
        return (self.latent // self.patch) ** 2

    def lengths(self) -> Tensor:
        """Tokens of each caption `[B]`, spread evenly up to all of them."""
        return torch.linspace(0, self.tokens, self.batch + 1)[1:].ceil().long().to(self.device)

    def config(self) -> dict:
        return transformer_config(
            self.size,
            sample_size=self.latent,
            patch_size=self.patch,
            caption_channels=self.channels,
            use_additional_conditions=False,
        )


@cache
def _built(of: type, workload: Workload) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(workload.device):
        return of(**workload.config()).to(workload.device, workload.dtype).eval()  # buffers made by NumPy too


def _model(of: type, workload: Workload) -> nn.Module:
    """A model of its own on the weights that all models of a size, dtype and device share."""
    shape = replace(workload, batch=1, tokens=120, steps=0)
    weights = _built(Transformer, replace(shape, pixels=256)).state_dict(keep_vars=True)
    built = _built(of, shape)
    built.load_state_dict(weights, assign=True)
    return deepcopy(built, {id(weight): weight for weight in weights.values()})


def ours(workload: Workload, backends: dict[str, str] | None = None, *, compiled: bool = False) -> Transformer:
    """Our class; `backends` by operator, "auto" where they name none."""
    model = _model(Transformer, workload)
    for op, backend in (backends or {}).items():
        model.set_backend(backend, op=op)
    return compile_blocks(model) if compiled else model


def theirs(workload: Workload, *, compiled: str = "", fused: bool = False) -> nn.Module:
    """diffusers' class; compiled "blocks" or "whole"."""
    model = _model(PixArtTransformer2DModel, workload)
    if fused:
        model.fuse_qkv_projections()
    if compiled == "blocks":
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)
    return torch.compile(model) if compiled == "whole" else model


def in_double(workload: Workload) -> Transformer:
    """Our class in plain PyTorch with the weights in fp64; it keeps nothing of a block for its backward."""
    model = deepcopy(ours(workload, REFERENCE)).double()
    model.enable_gradient_checkpointing()
    return model


def models(workload: Workload, names: Iterable[str]) -> dict[str, nn.Module]:
    """A model for each of these of `PATHS`."""
    built = {
        "ours": partial(ours, compiled=True),
        "ours eager": ours,
        "reference eager": partial(ours, backends=REFERENCE),
        "reference compiled": partial(ours, backends=REFERENCE, compiled=True),
        "diffusers eager": theirs,
        "diffusers compiled": partial(theirs, compiled="blocks"),
        "diffusers compiled whole": partial(theirs, compiled="whole"),
        "diffusers fused qkv": partial(theirs, compiled="blocks", fused=True),
    }
    return {name: built[name](workload) for name in names if name in built}


def rungs(workload: Workload, names: Iterable[str]) -> dict[str, Transformer | str]:
    """The models of these of `RUNGS`, or the sentence that says why a rung is none on this device."""
    backends, found = dict(REFERENCE), {}
    for rung in RUNGS:
        choices = [ops.resolve(op, "auto", workload.device, dtype=workload.dtype) for op in LADDER[rung]]
        backends |= {op: choice.name for op, choice in zip(LADDER[rung], choices, strict=True)}
        if rung not in names:
            continue
        if choices and all(choice.name == "reference" for choice in choices):
            found[rung] = f"no kernel of ours on {workload.device.type}: {choices[0].reason}"
        else:
            found[rung] = ours(workload, backends, compiled=True)
    return found


def quantized(workload: Workload, dtype: str) -> Transformer | str:
    """Our class with 8-bit products, compiled, or the sentence that says why this device has none."""
    if dtype == "fp8" and workload.device.type == "cpu":
        return "8-bit floats are computed in fp32 on a CPU"
    try:
        return compile_blocks(quantize(ours(workload), dtype))
    except (ValueError, RuntimeError) as error:
        return str(error)


def run(model: nn.Module, text: Tensor | Caption, keep: Tensor | None, latents: Tensor, time: Tensor) -> Tensor:
    """The model's output for latents `[B, 4, h, w]`, text `[B, L, C]`, keep `[B, L]` and time `[B]`."""
    return model(latents, text, time, ADDED, encoder_attention_mask=keep).sample


def _inputs(workload: Workload, generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
    """Operands of `run` and a gradient of its output."""
    random = partial(torch.randn, generator=generator, device=workload.device)
    B, L, latent, dtype = workload.batch, workload.tokens, workload.latent, workload.dtype
    text, latents, upstream = (
        random(B, L, workload.channels),
        random(B, 4, latent, latent),
        random(B, 8, latent, latent),
    )
    time = torch.randint(1000, (B,), generator=generator, device=workload.device)
    keep = torch.arange(L, device=workload.device) < workload.lengths()[:, None]
    return (text.to(dtype), keep, latents.to(dtype), time), (upstream.to(dtype),)


@lru_cache(1)
def forward(workload: Workload, names: tuple[str, ...] = PATHS) -> Case:
    """One evaluation of the denoiser, without gradients."""

    def path(model: nn.Module) -> Path:
        return Path(partial(run, model))

    paths = {name: path(model) for name, model in models(workload, names).items()}
    plain, truth = path(ours(workload, REFERENCE)), path(in_double(workload))
    costs = cost.transformer(*_sizes(workload))
    return _case("forward", "forward", workload, partial(_inputs, workload), plain, truth, paths, costs)


@lru_cache(1)
def train_step(workload: Workload, names: tuple[str, ...] = PATHS) -> Case:
    """Forward, backward from a gradient of the output, AdamW."""
    shared = dict(_model(Transformer, workload).named_parameters())
    kinds = [re.sub(r"\.\d+\.", ".i.", name, count=1) for name in shared]
    update = adamw(list(shared.values()))

    def by_kind(gradients: tuple[Tensor, ...], operands: Operands) -> tuple[Tensor, ...]:
        """The gradients of each kind of weight, all blocks in one vector: few numbers make a poor comparison.

        Without those of the keys' biases, which are rounding alone: softmax does not see what all keys have in common.
        """
        return tuple(
            torch.cat([gradient.flatten() for gradient, of in zip(gradients, kinds, strict=True) if of == kind])
            for kind in dict.fromkeys(kinds)
            if not kind.endswith("to_k.bias")
        )

    def path(model: nn.Module) -> Path:
        parameters = dict(model.named_parameters())
        leaves = tuple(parameters[name] for name in shared)
        return Path(partial(run, model), unpack=by_kind, weights=leaves, update=update)

    paths = {name: path(model) for name, model in models(workload, names).items()}
    plain, truth = path(ours(workload, REFERENCE)), path(in_double(workload))
    costs = cost.step(*_sizes(workload))
    return _case("train_step", "forward+backward", workload, partial(_inputs, workload), plain, truth, paths, costs)


def adamw(parameters: list[nn.Parameter]) -> Callable[[tuple[Tensor, ...]], None]:
    """An optimizer step that takes gradients: fused AdamW on fp32 master weights, which are then rounded.

    Its learning rate is 0, so that every call of a benchmark meets the same weights; its work does not depend on it.
    """
    masters = [parameter.detach().float() for parameter in parameters]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=0.0, weight_decay=0.03, fused=True)

    @torch.no_grad()
    def update(gradients: tuple[Tensor, ...]) -> None:
        torch._foreach_copy_([master.grad for master in masters], gradients)
        optimizer.step()
        if masters[0].dtype != parameters[0].dtype:
            torch._foreach_copy_(parameters, masters)

    return update


@lru_cache(1)
def generate(workload: Workload, names: tuple[str, ...] = PATHS + RUNGS + EIGHT_BIT) -> Case:
    """Text features and noise to latents in `workload.steps` steps, the rungs of the ladder beside the other paths."""

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        """Text of both branches `[B, 2, L, C]`, the empty prompt first, what of it to keep `[B, 2, L]`, and noise."""
        (text, keep, noise, _), _ = _inputs(workload, generator)
        empty = torch.randn(1, *text.shape[1:], generator=generator, device=text.device).to(text.dtype)
        one = torch.arange(workload.tokens, device=keep.device).expand_as(keep) < 1
        return (torch.stack([empty.expand_as(text), text], 1), torch.stack([one, keep], 1), noise), ()

    def path(model: nn.Module, *, once: bool = False) -> Path:
        def function(text: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
            text, keep = (of.transpose(0, 1).flatten(0, 1) for of in (text, keep))
            caption = (model.encode_caption(text, keep), None) if once else (text, keep)
            return denoise(partial(run, model, *caption), noise, workload.steps)

        return Path(function)

    def pipeline(model: Transformer, graphs: Graphs | None = None, accuracy: float | None = None) -> Path:
        """As `PixArtPipeline` denoises, after its text encoder: which knows the lengths of the captions."""
        lengths = workload.lengths().cpu()

        def function(text: Tensor, keep: Tensor, noise: Tensor) -> Tensor:
            denoiser = Denoiser(model, text[:, 1], lengths, text[:, 0, :1], torch.ones_like(lengths), graphs=graphs)
            sampler = build("dpm", workload.steps, config={"beta_start": 1e-4, "beta_end": 0.02})
            return denoise_ours(denoiser, sampler, noise, Guidance(GUIDANCE)).to(noise.dtype)

        return Path(function, accuracy=accuracy)

    cuda = workload.device.type == "cuda"
    paths: dict[str, Path | str] = {}
    for name, model in models(workload, names).items():
        if name == "ours":
            paths[name] = pipeline(model if cuda else prepack(model), Graphs() if cuda else None)
        else:
            paths[name] = path(model, once=name.startswith("ours"))
    for rung, model in rungs(workload, names).items():
        if isinstance(model, str):
            paths[rung] = model
        else:
            paths[rung] = pipeline(model) if rung == RUNGS[-1] else path(model, once=rung == "+ text K/V once")
    paths |= NOT_ON[workload.device.type]
    for name in EIGHT_BIT:
        if name in names:
            made = quantized(workload, name.removeprefix("ours "))
            graphs = Graphs() if cuda else None
            paths[name] = made if isinstance(made, str) else pipeline(made, graphs, ACCURACY_OF_BASELINES)
    plain, truth = path(ours(workload, REFERENCE)), path(in_double(workload))
    model, B, N, L, itemsize = _sizes(workload)
    costs = cost.generation(model, B, N, (1 + L) / 2, itemsize, workload.steps)
    return _case("generate", "forward", workload, inputs, plain, truth, paths, costs)


def denoise(predict: Predict, noise: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ of order 2 with classifier-free guidance: noise `[B, 4, h, w]` to latents of its shape."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise
    for time in scheduler.timesteps:
        output = predict(torch.cat([latents, latents]), time.expand(2 * len(latents)))
        empty, text = output.chunk(2, dim=1)[0].chunk(2)  # without the variance
        latents = scheduler.step(empty + GUIDANCE * (text - empty), time, latents).prev_sample
    return latents


@lru_cache(1)
def block(passes: str, workload: Workload, names: tuple[str, ...] = PATHS) -> Case:
    """One block: its input and the projected caption to its output, and every gradient."""
    D, N, B, L = workload.size.width, workload.image_tokens, workload.batch, workload.tokens
    lengths = workload.lengths()
    bias = torch.where(torch.arange(L, device=workload.device) < lengths[:, None], 0.0, -10000.0)[:, None]

    def inputs(generator: torch.Generator) -> tuple[Operands, tuple[Tensor, ...]]:
        random = partial(torch.randn, generator=generator, device=workload.device)
        tensors = (random(B, N, D), random(B, 6, D), random(B, L, D), random(B, N, D))
        *operands, upstream = (tensor.to(workload.dtype) for tensor in tensors)
        return tuple(operand.requires_grad_(passes != "forward") for operand in operands), (upstream,)

    def of_operands(gradients: tuple[Tensor, ...], operands: Operands) -> tuple[Tensor, ...]:
        return tuple(gradient[:CHECKED] for gradient in gradients[: len(operands)])

    def path(model: nn.Module) -> Path:
        of = model.transformer_blocks[0]

        def our_block(x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
            return Stream(*of(Block.first(x), condition, text, lengths[: len(x)])).total()

        def their_block(x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
            return of(
                x,
                encoder_hidden_states=text,
                encoder_attention_mask=bias.to(x.dtype),
                timestep=condition.flatten(1),
            )

        weights = tuple(of.parameters()) if passes != "forward" else ()
        return Path(our_block if isinstance(of, Block) else their_block, weights=weights, unpack=of_operands)

    paths = {name: path(model) for name, model in models(workload, names).items()}
    plain, truth = path(ours(workload, REFERENCE)), path(in_double(workload))
    model, _, _, tokens, itemsize = _sizes(workload)
    costs = cost.block(model, B, N, tokens, itemsize, passes)
    costs += 2 * cost.linear(round(B * tokens), D, D, itemsize, passes)  # its keys and values
    return _case("block", passes, workload, inputs, plain, truth, paths, costs)


def _sizes(workload: Workload) -> tuple[cost.Model, int, int, float, int]:
    """What `bench.cost` counts with: model, samples, image tokens, caption tokens of a sample, bytes of a number."""
    tokens = workload.lengths().sum().item() / workload.batch
    return cost.Model.of(workload.config()), workload.batch, workload.image_tokens, tokens, workload.dtype.itemsize


def _case(
    op: str,
    passes: str,
    workload: Workload,
    inputs: Callable,
    plain: Path,
    truth: Path,
    paths: dict[str, Path | str],
    costs: cost.Costs,
) -> Case:
    paths = {
        name: replace(path, compiled=name in COMPILED) if isinstance(path, Path) else path
        for name, path in paths.items()
    }
    labels = {"layers": workload.size.layers, "batch": workload.batch, "pixels": workload.pixels}
    return Case(
        op, passes, workload.name, workload.dtype, workload.device, inputs, (plain,), paths, "auto",
        round(cost.total(costs).bytes), round(cost.total(costs).flops), parts=tuple(costs), checked=CHECKED,
        images=workload.batch, labels=labels, graphed=False, truth=truth,
    )  # fmt: skip
