"""Prompts to pictures: text encoder, transformer with guidance and a sampler, VAE."""

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from pixart_fast import ops, quantized
from pixart_fast.approximate import Approximation, BlockCache, CachedBlocks, TGate
from pixart_fast.aspect import BUCKETS, nearest
from pixart_fast.checkpoint import load_transformer
from pixart_fast.denoise import Denoiser, Guidance, denoise, pad
from pixart_fast.embedded import HashedText
from pixart_fast.engine import Graphs, compile_blocks
from pixart_fast.pictures import image_size, load_image, load_mask, to_images
from pixart_fast.recipe import Recipe, find, read_recipe, transformer_folder
from pixart_fast.samplers import SAMPLERS, Sampler, build
from pixart_fast.text import T5Text
from pixart_fast.transformer import Transformer
from pixart_fast.vae import VAE
from pixart_fast.weights import read_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[str, int, int], None]  # phase, done, of


class Pictures(NamedTuple):
    """What a call of the pipeline made, picture by picture."""

    images: list[Image.Image]
    latents: Tensor  # [B, C, h, w] fp32
    settings: list[dict[str, Any]]  # prompt, seed, size, steps, …: with them the picture is made again
    cut: dict[str, str]  # prompts beyond the token limit, and what of them the model did not read
    seconds: dict[str, float]  # by phase: text, denoise, measure (of an approximation), decode
    peak_bytes: int  # of the GPU's memory, or of the process where there is none
    approximation: str | None  # what it did to the first picture, measured beside the exact one


class PixArtPipeline:
    """Text to image with a PixArt model: `PixArtPipeline.from_pretrained(...)("a cat").images[0]`.

    Attributes:
        recipe: how the model wants to be used.
        default_size: height and width in pixels.
    """

    def __init__(
        self,
        transformer: Transformer,
        text: T5Text | HashedText,
        vae: VAE,
        recipe: Recipe,
        *,
        scheduler: dict[str, Any] | None = None,
        device: torch.device,
        low_memory: bool = False,
        name: str = "",
    ):
        self.name = name
        self.transformer, self.text, self.vae, self.recipe = transformer.eval(), text, vae, recipe
        self.scheduler, self.device, self.low_memory = scheduler, device, low_memory
        self.graphs = Graphs() if device.type == "cuda" and not low_memory else None
        self.cached_blocks = CachedBlocks(self.transformer)
        side = transformer.config.sample_size * vae.downsample
        self.default_size = (side, side)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        components: str | Path | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        text_precision: str = "bf16",
        recipe: dict[str, Any] | None = None,
        cache: Path | None = None,
        low_memory: bool = False,
        compile: bool | None = None,
        quantize: str | None = None,
    ) -> "PixArtPipeline":
        """A pipeline from files.

        Args:
            source: a model folder as published, or as training leaves it in `final/`; a name on the Hugging Face hub;
                an official `.pth`; None: what `make train` left.
            components: where text encoder, tokenizer and VAE are, if not in `source`.
            device: None: the GPU if there is one.
            precision: of the transformer: "fp32", "bf16", "fp16"; "auto": what the device is fastest at.
            text_precision: of T5: a name of `text.PRECISIONS`.
            recipe: what to do otherwise than the model's recipe says, by the names of `Recipe`.
            cache: folder for text features, by prompt.
            low_memory: text encoder, transformer and VAE take turns on the device, and the VAE works in tiles.
            compile: compile the blocks; None: on a GPU.
            quantize: "int8" or "fp8" for 8-bit products in the blocks, an approximation (`quantized.deviation`).

        Raises OSError, ValueError, one sentence.
        """
        if precision not in ("auto", *DTYPES):
            raise ValueError(f"precision must be one of auto, {', '.join(DTYPES)}, not {precision!r}.")
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise ValueError(
                f"there is no device {device!r}: choose cpu, cuda or cuda:1, as PyTorch names them."
            ) from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("PyTorch sees no CUDA device here: choose --device cpu, or install its CUDA build.")
        if precision == "auto":
            precision = ops.precision_for(ops.capability(device))
        dtype = DTYPES[precision]
        folder = find(source)
        shared = folder if components is None else find(components)
        if shared.is_file():
            raise ValueError(f"{folder} is a single file: name a folder with text encoder and VAE by --components.")
        transformer = load_transformer(folder if folder.is_file() else transformer_folder(folder))
        described = read_recipe(shared if folder.is_file() else folder, recipe, transformer.null_caption is not None)
        vae = VAE(shared / "vae", device, dtype, tiled=low_memory)
        text: T5Text | HashedText
        if described.family == "embedded":
            text = HashedText.load(shared / "text_encoder")
        else:
            text = T5Text(
                shared,
                max_tokens=described.max_tokens,
                precision=text_precision,
                device=device,
                clean=described.clean,
                keep_cjk=described.keep_cjk,
                cache=cache,
            )
        if text.channels != transformer.config.caption_channels:
            raise ValueError(
                f"the text encoder in {shared} gives {text.channels} channels, and the transformer reads "
                f"{transformer.config.caption_channels}: name the model's own by --components."
            )
        # Not diffusers' own `to`, which warns of casts even where a model keeps nothing in fp32.
        transformer = nn.Module.to(transformer, "cpu" if low_memory else device, dtype)
        if quantize is not None:
            quantized.quantize(transformer, quantize)
        elif dtype == torch.bfloat16 and ops.packing_problem(transformer.proj_out.weight) is None:
            quantized.prepack(
                transformer
            )  # in fp32 oneDNN's products are twice as fast, and err twice as much as MKL's
        if device.type == "cuda" if compile is None else compile:
            compile_blocks(transformer)
        scheduler = shared / "scheduler" / "scheduler_config.json"
        return cls(
            transformer,
            text,
            vae,
            described,
            scheduler=read_json(scheduler) if scheduler.is_file() else None,
            device=device,
            low_memory=low_memory,
            name=str(source or folder),
        )

    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths that the model was trained for."""
        base = self.default_size[0]
        if base not in BUCKETS:
            return [self.default_size]
        unit = self.vae.downsample * self.transformer.config.patch_size
        return [size for size in BUCKETS[base].values() if not (size[0] % unit or size[1] % unit)]

    def __call__(
        self,
        prompts: str | list[str],
        *,
        negative: str = "",
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        official_guidance: bool = False,
        sampler: str = "dpm",
        seed: int = 0,
        num_images: int = 1,
        batch_size: int | None = None,
        init_image: Image.Image | str | Path | None = None,
        mask: Image.Image | str | Path | None = None,
        strength: float | None = None,
        t_gate: int | None = None,
        cache_blocks: int | None = None,
        measure: bool = True,
        progress: Progress | None = None,
    ) -> Pictures:
        """Pictures of each prompt.

        Args:
            negative: what guidance leads away from; "": the model's null caption.
            size: height and width in pixels; None: the model's own, or the bucket nearest to `init_image`.
            steps, guidance: None: the sampler's, or the recipe's.
            interval: where in time (1: pure noise) guidance applies.
            official_guidance: guide three of the four channels, as the published iDDPM sampler does.
            sampler: a name of `samplers.SAMPLERS`.
            seed: of the first picture of each prompt, the next have the next. A picture depends on its seed alone, not
                on what it is batched with.
            num_images: pictures per prompt.
            batch_size: pictures at a time; None: what suits the size.
            init_image: a picture to change; `strength` in (0, 1] says how far (None: 0.6).
            mask: with init_image: where to paint it anew (white); the rest is kept (strength None: 1).
            t_gate: an approximation: after this step cross-attention is frozen and guidance ends (`approximate.TGate`).
            cache_blocks: another: the middle blocks are evaluated at every so many steps alone
                (`approximate.BlockCache`).
            measure: paint the first picture exactly too, to say how far an approximation is off.
            progress: called with phase, done, total.

        Raises ValueError for what cannot be, MemoryError where memory ran out: one sentence each.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("there is no prompt: give one at least.")
        if num_images < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError("num_images and batch_size must be 1 at least.")
        if sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
        if mask is not None and init_image is None:
            raise ValueError("a mask needs the picture that it masks: give init_image too.")
        if t_gate is not None and cache_blocks is not None:
            raise ValueError("t_gate and cache_blocks do not go together: choose one.")
        size = self.check_size(size, init_image)
        chosen = SAMPLERS[sampler]
        steps = chosen.steps if steps is None else steps
        if guidance is None:
            # A recipe's is for sampling with guidance; LCM was distilled with it inside.
            guidance = chosen.guidance if chosen.guidance == 1 else self.recipe.guidance or chosen.guidance
        if strength is None:
            strength = 0.6 if init_image is not None and mask is None else 1.0
        guide = Guidance(guidance, *interval, channels=3 if official_guidance else None)
        if batch_size is None:
            batch_size = max(1, min(64, 2 * 1024 * 1024 // (size[0] * size[1])))
        progress = progress or (lambda phase, done, total: None)
        asked = [(prompt, seed + k) for prompt in prompts for k in range(num_images)]
        settings = {
            "model": self.name,
            "negative": negative,
            "width": size[1],
            "height": size[0],
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            **({"interval": list(interval)} if interval != (0.0, 1.0) else {}),
            **({"official_guidance": True} if official_guidance else {}),
            **({"strength": strength} if init_image is not None else {}),
            **({"masked": True} if mask is not None else {}),
            **({"t_gate": t_gate} if t_gate is not None else {}),
            **({"cache_blocks": cache_blocks} if cache_blocks is not None else {}),
            "precision": next(name for name, dtype in DTYPES.items() if dtype == self.transformer.dtype),
        }
        clock, seconds = time.perf_counter(), {}

        def lap(phase: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[phase], clock = seconds.get(phase, 0.0) + now - clock, now

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.memory_advice(batch_size, size):
            progress("text", 0, 1)
            text = self.encode(prompts, negative)
            progress("text", 1, 1)
            lap("text")
            clean = repaint = None
            if init_image is not None:
                clean = self.vae.encode(load_image(init_image, size))
                repaint = None if mask is None else load_mask(mask, size).to(self.device)
            if self.low_memory:
                self.vae.free()
                self.transformer.to(self.device)
            latents, approximation = [], None
            batches = range(0, len(asked), batch_size)
            for number, start in enumerate(batches):
                part = asked[start : start + batch_size]
                rows, seeds = [prompts.index(prompt) for prompt, _ in part], [s for _, s in part]
                solver = build(sampler, steps, config=self.scheduler, strength=strength)
                exact = self.denoiser(text, rows, size)
                evaluate = self.approximate(exact, solver, guide, t_gate, cache_blocks)
                run = partial(self.denoise, size=size, clean=clean, repaint=repaint)
                latents.append(
                    run(
                        evaluate,
                        solver,
                        evaluate.guidance if isinstance(evaluate, Approximation) else guide,
                        seeds,
                        on_step=lambda done, n, number=number: progress("denoise", number * n + done, len(batches) * n),
                    )
                )
                if measure and number == 0 and isinstance(evaluate, Approximation):
                    lap("denoise")
                    again = build(sampler, steps, config=self.scheduler, strength=strength)
                    first = run(
                        self.denoiser(text, rows[:1], size),
                        again,
                        guide,
                        seeds[:1],
                        on_step=lambda done, n: progress("measure", done, n),
                    )
                    approximation = evaluate.report(first, latents[0][:1])
                    lap("measure")
            if self.low_memory:
                self.transformer.to("cpu")
            lap("denoise")
            images = []
            for done, part in enumerate(latents):
                progress("decode", done, len(latents))
                pixels = self.vae.decode(part)
                if repaint is not None:
                    pixels = self.keep_outside(pixels, init_image, repaint, size)
                images += to_images(pixels)
            progress("decode", len(latents), len(latents))
            if self.low_memory:
                self.vae.free()
            lap("decode")
        return Pictures(
            images,
            torch.cat(latents).cpu(),
            [{"prompt": prompt, "seed": s, **settings} for prompt, s in asked],
            {prompt: cut for prompt in [*prompts, negative] if (cut := self.text.cut(prompt))},
            seconds,
            peak_bytes(self.device),
            approximation,
        )

    def check_size(self, size: tuple[int, int] | None, init_image: Image.Image | str | Path | None) -> tuple[int, int]:
        """A size that the model can paint. ValueError, with the nearest that it can."""
        if size is None:
            if init_image is None or len(self.sizes()) == 1:
                return self.default_size
            height, width = image_size(init_image)
            return nearest(height / width, self.default_size[0])[1:]
        if self.vae.embedded and size not in self.sizes():
            known = ", ".join(f"{width}x{height}" for height, width in self.sizes())
            raise ValueError(f"this model paints {known} alone.")
        unit = self.vae.downsample * self.transformer.config.patch_size
        if min(size) < unit or size[0] % unit or size[1] % unit:
            height, width = (max(unit, unit * round(side / unit)) for side in size)
            raise ValueError(f"{size[1]}x{size[0]} does not divide by {unit}: take {width}x{height}.")
        return size

    @torch.no_grad()
    def encode(self, prompts: list[str], negative: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and lengths of the prompts, and of the unconditional branch, `[1, K, C]` or one per prompt."""
        use_checkpoint = self.recipe.null == "checkpoint" and not negative
        if use_checkpoint and self.transformer.null_caption is None:
            raise ValueError(
                "the recipe takes the null caption from the checkpoint, which has none: choose null=t5_empty."
            )
        features, lengths = self.text.encode(prompts if use_checkpoint else [*prompts, negative])
        if self.low_memory:
            self.text.free()
        if use_checkpoint:
            empty = self.transformer.null_caption[None].to(features)
            own = torch.tensor([empty.shape[1]])
        else:
            empty, own = features[-1:, : lengths[-1]], lengths[-1:]
            features, lengths = features[:-1], lengths[:-1]
        if self.recipe.null_mask == "cond" and not negative:
            own = lengths.clamp(max=int(own))
        return features[:, : int(lengths.max())], lengths, empty, own

    def denoiser(self, text: tuple[Tensor, Tensor, Tensor, Tensor], rows: list[int], size: tuple[int, int]) -> Denoiser:
        """The transformer, bound to `rows` of the prompts."""
        features, lengths, empty, own = text
        count = len(rows)
        if self.graphs is not None:  # a graph has one shape: few lengths, few graphs
            features = pad(features, -(-features.shape[1] // 16) * 16)
        return Denoiser(
            self.transformer,
            features[rows],
            lengths[rows],
            empty.expand(count, -1, -1),
            own[rows] if len(own) > 1 else own.expand(count),
            self.micro_conditions(size, count),
            self.graphs,
        )

    def approximate(
        self, exact: Denoiser, solver: Sampler, guidance: Guidance, t_gate: int | None, cache_blocks: int | None
    ) -> Denoiser | Approximation:
        """What was asked for in place of a denoiser; itself where nothing was."""
        if t_gate is not None:
            return TGate(exact, solver, guidance, t_gate)
        if cache_blocks is not None:
            return BlockCache(exact, solver, guidance, self.cached_blocks, cache_blocks)
        return exact

    def denoise(
        self,
        evaluate: Denoiser | Approximation,
        solver: Sampler,
        guidance: Guidance,
        seeds: list[int],
        size: tuple[int, int],
        clean: Tensor | None,
        repaint: Tensor | None,
        on_step: Callable[[int, int], None],
    ) -> Tensor:
        """Latents `[B, C, h, w]` of one batch, with these seeds."""
        channels = self.transformer.config.in_channels
        shape = (channels, size[0] // self.vae.downsample, size[1] // self.vae.downsample)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        return denoise(
            evaluate,
            solver,
            noise,
            guidance,
            generators=generators,
            clean=None if clean is None else clean.expand(len(seeds), -1, -1, -1),
            repaint=repaint,
            on_step=lambda done: on_step(done, len(solver.timesteps)),
        )

    def micro_conditions(self, size: tuple[int, int], count: int) -> dict[str, Tensor] | None:
        """Height, width and aspect ratio as the model was told them in training."""
        if not self.transformer.use_additional_conditions:
            return None
        ratio = size[0] / size[1]
        if self.recipe.micro_conditions != "exact" and self.default_size[0] in BUCKETS:
            ratio = float(nearest(ratio, self.default_size[0])[0])
        resolution = torch.tensor([size], dtype=torch.float32, device=self.device).expand(count, -1)
        return {
            "resolution": resolution,
            "aspect_ratio": torch.full((count, 1), ratio, dtype=torch.float32, device=self.device),
        }

    def keep_outside(
        self, pixels: Tensor, init_image: Image.Image | str | Path, repaint: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """The pictures, with the given one's own pixels where it was not to be painted anew."""
        where = nn.functional.interpolate(repaint.float().cpu(), size=size)
        return where * pixels + (1 - where) * load_image(init_image, size)

    @contextlib.contextmanager
    def memory_advice(self, batch_size: int, size: tuple[int, int]) -> Iterator[None]:
        """Memory that runs out is told in a sentence, with what to lower."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not (
                isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            ):
                raise
            ways = [f"a batch size below {batch_size}"] if batch_size > 1 else []
            ways += [] if self.low_memory else ["low_memory (--low-memory)"]
            ways.append(f"a size below {size[1]}x{size[0]}")
            if self.low_memory and isinstance(self.text, T5Text) and self.text.precision != "int8":
                ways.append("text_precision int8")
            raise MemoryError(f"memory of {self.device} ran out: try {', or '.join(ways)}.") from error


def peak_bytes(device: torch.device) -> int:
    """Most memory that was in use: of the GPU since the call began, of the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
