"""`python -m pixart_fast.generate "prompt"`: pictures from a PixArt model, with their settings inside the files."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from pixart_fast.aspect import nearest, parse_aspect, parse_size
from pixart_fast.samplers import SAMPLERS

if TYPE_CHECKING:
    from pixart_fast.pipeline import Pictures, PixArtPipeline

EPILOG = """
examples:
  python -m pixart_fast.generate "a red circle left of a blue star"        the model that `make train` left
  python -m pixart_fast.generate --model PixArt-alpha/PixArt-XL-2-1024-MS "a cat in the snow" --aspect 16:9
  python -m pixart_fast.generate --model DIR --prompts-file prompts.txt --num-images 4 --seed 7 --out pictures
  python -m pixart_fast.generate --model DIR "in autumn" --init-image house.jpg --strength 0.5
  python -m pixart_fast.generate --model DIR "a hat" --init-image cat.jpg --mask where.png   white is painted anew
  python -m pixart_fast.generate --model DIR "a cat" --low-memory --text-precision int8     a GPU of 12 GB or less

A transformer alone (a repository of Σ, an official .pth) takes text encoder and VAE from elsewhere:
  --model PixArt-alpha/PixArt-Sigma-XL-2-512-MS --components PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pixart_fast.generate",
        description="Text to pictures with a PixArt model. Each PNG holds its prompt and settings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to paint")
    add("--prompts-file", type=Path, metavar="FILE", help="one prompt per line, beside those given")
    add(
        "--model",
        metavar="DIR",
        help="folder, name on the Hugging Face hub, or official .pth; default: runs/scenes/final",
    )
    add("--components", metavar="DIR", help="where text encoder, tokenizer and VAE are, if not in the model's folder")
    add("--out", type=Path, default=Path("pictures"), metavar="DIR", help="folder for the pictures (%(default)s)")

    what = parser.add_argument_group("what is painted")
    add = what.add_argument
    add("--negative", default="", metavar="PROMPT", help="what to stay away from")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--size", metavar="WxH", help="in pixels, as 1024x768; both divide by 16 (the model's own size)")
    size.add_argument(
        "--aspect", metavar="W:H", help="as 16:9: the nearest of the 40 sizes that the model was trained on"
    )
    add("--num-images", type=int, default=1, metavar="N", help="pictures per prompt (%(default)s)")
    add("--seed", type=int, default=0, help="of each prompt's first picture; the next have the next (%(default)s)")
    add("--init-image", type=Path, metavar="FILE", help="a picture to change instead of noise")
    add("--mask", type=Path, metavar="FILE", help="with --init-image: paint anew where this is white, keep the rest")
    add("--strength", type=float, metavar="S", help="how far from --init-image, 0 to 1 (0.6; with --mask 1)")

    how = parser.add_argument_group("how")
    add = how.add_argument
    listed = "; ".join(f"{name}: {info.description}, {info.steps} steps" for name, info in SAMPLERS.items())
    add("--sampler", choices=list(SAMPLERS), default="dpm", help=listed.replace("%", "%%"))
    add("--steps", type=int, metavar="N", help="evaluations of the model (the sampler's own number)")
    add(
        "--guidance", type=float, metavar="W", help="classifier-free guidance; 1 is none (the model's or sampler's own)"
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="guide at these times alone, 0 the picture, 1 pure noise (0 1)",
    )
    add("--official-guidance", action="store_true", help="guide three of four channels, as the published iDDPM sampler")
    add(
        "--null",
        choices=("t5_empty", "checkpoint"),
        help="what guidance leads away from (what the model's recipe says)",
    )
    add(
        "--null-mask",
        choices=("own", "cond"),
        help="how many of its tokens count: its own, or as many as the prompt has",
    )
    add(
        "--clean", action=argparse.BooleanOptionalAction, help="the published cleaning of prompts (on for α, off for Σ)"
    )
    add(
        "--keep-cjk", action=argparse.BooleanOptionalAction, help="cleaning keeps Chinese, Japanese, Korean (off for α)"
    )

    less = parser.add_argument_group("approximations", "quicker, by pictures that are a little off")
    less.add_argument("--quantize", choices=("int8", "fp8"), help="8-bit products in the blocks (none)")
    skipped = less.add_mutually_exclusive_group()
    skipped.add_argument(
        "--t-gate",
        type=int,
        metavar="STEP",
        help="after this step cross-attention is frozen and guidance ends; how far that is off is measured and printed",
    )
    skipped.add_argument(
        "--cache-blocks",
        type=int,
        metavar="N",
        help="evaluate the middle half of the blocks at every N-th step alone; measured and printed too",
    )

    machine = parser.add_argument_group("on this machine")
    add = machine.add_argument
    add("--device", help="cpu, cuda, cuda:1, … (the GPU if there is one)")
    add(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the transformer (%(default)s)"
    )
    add("--text-precision", choices=("bf16", "fp16", "int8", "fp32"), default="bf16", help="of T5 (%(default)s)")
    add("--batch-size", type=int, metavar="N", help="pictures at a time (what suits the size)")
    add(
        "--low-memory",
        action="store_true",
        help="text encoder, transformer and VAE take turns on the device; VAE in tiles",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep text features there, by prompt: T5 then loads for new prompts only",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the blocks (on a GPU)")
    return parser


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of a file's lines. Raises ValueError, OSError."""
    prompts = list(given)
    if file is not None:
        try:
            prompts += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise OSError(f"{file} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    if not prompts:
        raise ValueError('there is no prompt: give one, as in "a red circle", or --prompts-file FILE.')
    return prompts


class Bar:
    """The phases of a pipeline's call as one progress bar."""

    def __init__(self):
        self.bar = tqdm(unit="step", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.bar.set_description(phase, refresh=False)
        self.bar.total, self.bar.n = total, done
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def write(pictures: "Pictures", folder: Path) -> list[Path]:
    """PNG files with their settings, and a contact sheet. Raises OSError, one sentence."""
    from pixart_fast.pictures import contact_sheet, file_name, save_png

    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for image, settings in zip(pictures.images, pictures.settings, strict=True):
            paths.append(folder / file_name(settings["prompt"], settings["seed"]))
            save_png(image, paths[-1], settings)
        if len(paths) > 1:
            captions = [f"{settings['prompt']} · {settings['seed']}" for settings in pictures.settings]
            paths.append(folder / "contact_sheet.png")
            contact_sheet(pictures.images, captions).save(paths[-1])
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error}): choose another --out.") from error
    return paths


def run(args: argparse.Namespace) -> None:
    prompts = read_prompts(args.prompts, args.prompts_file)
    size = parse_size(args.size) if args.size else None
    ratio = parse_aspect(args.aspect) if args.aspect else None
    from pixart_fast.pipeline import PixArtPipeline  # seconds of imports, after the mistakes that need none

    recipe = {name: getattr(args, name) for name in ("null", "null_mask", "clean", "keep_cjk")}
    pipeline = PixArtPipeline.from_pretrained(
        args.model,
        components=args.components,
        device=args.device,
        precision=args.precision,
        text_precision=args.text_precision,
        recipe=recipe,
        cache=args.cache,
        low_memory=args.low_memory,
        compile=args.compile,
        quantize=args.quantize,
    )
    if ratio is not None:
        size = nearest(ratio, pipeline.default_size[0])[1:]
    bar = Bar()
    try:
        pictures = pipeline(
            prompts,
            negative=args.negative,
            size=size,
            steps=args.steps,
            guidance=args.guidance,
            interval=tuple(args.guidance_interval),
            official_guidance=args.official_guidance,
            sampler=args.sampler,
            seed=args.seed,
            num_images=args.num_images,
            batch_size=args.batch_size,
            init_image=args.init_image,
            mask=args.mask,
            strength=args.strength,
            t_gate=args.t_gate,
            cache_blocks=args.cache_blocks,
            progress=bar,
        )
    finally:
        bar.close()
    for prompt, cut in pictures.cut.items():
        print(f"note: the model reads {pipeline.text.max_tokens} tokens; of {shorten(prompt)!r} it did not read: {cut}")
    paths = write(pictures, args.out)
    report(pictures, pipeline, paths, args.out)


def report(pictures: "Pictures", pipeline: "PixArtPipeline", paths: list[Path], folder: Path) -> None:
    count, seconds = len(pictures.images), pictures.seconds
    shown = paths[-1] if count > 1 else paths[0]
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
    used = "GPU memory" if pipeline.device.type == "cuda" else "memory of the process"
    print(f"{count} picture{'s' * (count > 1)} in {folder}, see {shown}")
    if pictures.approximation is not None:
        print(pictures.approximation)
    print(f"{phases}; at most {pictures.peak_bytes / 1e9:.2f} GB {used}")


def shorten(prompt: str, length: int = 40) -> str:
    return prompt if len(prompt) <= length else prompt[: length - 1] + "…"


def main(argv: list[str] | None = None) -> int:
    """The command line; a mistake ends it with one sentence and exit code 2."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
