"""`python -m pixart_fast.demo`: a page in the browser that paints with a PixArt model.

It is served on this machine alone unless told otherwise, asks nothing of any other, and reports to nobody.
"""

import argparse
import html
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_fast.aspect import parse_size
from pixart_fast.samplers import SAMPLERS

if TYPE_CHECKING:
    from types import ModuleType

    import gradio

    from pixart_fast.pipeline import PixArtPipeline

PHASES = {"text": "Reading the prompt", "denoise": "Painting", "decode": "Developing"}
MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE = 16, 100, 15
LAST_SEED = 2**31 - 1
SMALL = 128  # pixels, up to which a picture is shown in blocks, not blurred
WAITING = 16  # requests that may wait, before others are asked to come again
DAY = 24 * 3600
CSS = """
.gradio-container {width: 100%% !important; max-width: 1280px !important; margin: 0 auto !important}
#paint {min-height: 3rem}
#pictures img {image-rendering: %s}
#unread textarea {color: var(--body-text-color-subdued)}
"""


def load_gradio() -> "ModuleType":
    """Gradio, told to report to nobody. ValueError, with the command that installs it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs Gradio: `pip install 'pixart_fast[demo]'`.") from error
    return gradio


def usual(pipeline: "PixArtPipeline", sampler: str) -> tuple[int, float]:
    """Steps and guidance that a sampler has with this model where nothing is asked."""
    info = SAMPLERS[sampler]
    return info.steps, info.guidance if info.guidance == 1 else pipeline.recipe.guidance or info.guidance


def possible(pipeline: "PixArtPipeline") -> list[tuple[str, str]]:
    """Samplers that work with this model, described, and their names."""
    config = pipeline.transformer.config
    learned = config.out_channels == 2 * config.in_channels
    return [(info.description, name) for name, info in SAMPLERS.items() if learned or not info.learned_variance]


def build(pipeline: "PixArtPipeline", folder: Path) -> "gradio.Blocks":
    """The page. `folder` holds the pictures of the last request, until Gradio has taken its copies."""
    gr = load_gradio()
    from pixart_fast.pictures import file_name, save_png

    def paint(
        prompt: str,
        negative: str,
        size: str,
        sampler: str,
        steps: float,
        guidance: float,
        count: float,
        seed: float | None,
        new_seed: bool,
        progress=gr.Progress(),  # noqa: B008 - Gradio finds it here
    ) -> tuple[Any, ...]:
        try:
            if not prompt.strip():
                raise ValueError("there is no prompt: write what is to be painted.")
            if new_seed:
                seed = random.randint(0, LAST_SEED)
            elif seed is None or not 0 <= seed <= LAST_SEED:
                raise ValueError(f"a seed is a whole number from 0 to {LAST_SEED}.")
            pictures = pipeline(
                prompt,
                negative=negative,
                size=parse_size(size),
                sampler=sampler,
                steps=int(steps),
                guidance=guidance,
                num_images=int(count),
                seed=int(seed),
                progress=lambda phase, done, total: progress((done, total), desc=PHASES[phase]),
            )
            # One request at a time: the pictures of the one before are in Gradio's cache by now.
            for old in folder.glob("*.png"):
                old.unlink()
            shown = []
            for image, settings in zip(pictures.images, pictures.settings, strict=True):
                path = folder / file_name(settings["prompt"], settings["seed"])
                save_png(image, path, settings)
                shown.append((str(path), f"seed {settings['seed']}"))
        except (ValueError, OSError, MemoryError) as error:
            message = html.escape(str(error), quote=False)
            raise gr.Error(message, duration=None, title="This cannot be painted", print_exception=False) from error
        unread = " … ".join(pictures.cut.values())
        seconds = sum(pictures.seconds.values())
        return (
            shown,
            pictures.settings,
            pictures.settings[0],
            int(seed),
            gr.update(value=unread, visible=bool(unread)),
            f"{len(shown)} picture{'s' * (len(shown) > 1)} in {seconds:.1f} s",
        )

    def settings_of(made: list[dict[str, Any]], event: gr.SelectData) -> dict[str, Any]:
        return made[event.index]

    sizes = [(f"{width} × {height}", f"{width}x{height}") for height, width in pipeline.sizes()]
    height, width = pipeline.default_size
    samplers = possible(pipeline)
    first = samplers[0][1]
    steps, guidance = usual(pipeline, first)
    family = {"alpha": "PixArt-α", "sigma": "PixArt-Σ", "embedded": "the model of `make train`"}
    with gr.Blocks(title="pixart_fast", analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        gr.Markdown(f"# pixart_fast\n{family[pipeline.recipe.family]} · {width} × {height} px · on {pipeline.device}")
        with gr.Row():
            with gr.Column(scale=2, min_width=400):
                example = "a large red circle left of a small blue star"
                if pipeline.recipe.family != "embedded":
                    example = "a lighthouse on a cliff at dusk, oil painting"
                prompt = gr.Textbox(label="Prompt", lines=3, placeholder=example, autofocus=True, elem_id="prompt")
                negative = gr.Textbox(label="Negative prompt", lines=1, placeholder="what to stay away from")
                button = gr.Button("Paint", variant="primary", elem_id="paint")
                with gr.Row():
                    size = gr.Dropdown(
                        sizes,
                        value=f"{width}x{height}",
                        label="Width × height",
                        allow_custom_value=True,
                        min_width=160,
                        elem_id="size",
                    )
                    count = gr.Slider(1, MOST_IMAGES, value=1, step=1, label="Pictures", min_width=160, elem_id="count")
                sampler = gr.Dropdown(samplers, value=first, label="Sampler")
                with gr.Row():
                    step_count = gr.Slider(
                        1, MOST_STEPS, value=steps, step=1, label="Steps", min_width=160, elem_id="steps"
                    )
                    strength = gr.Slider(1, MOST_GUIDANCE, value=guidance, step=0.1, label="Guidance", min_width=160)
                with gr.Row():
                    seed = gr.Number(value=0, precision=0, label="Seed", min_width=160, elem_id="seed")
                    new_seed = gr.Checkbox(value=True, label="New seed each time", min_width=160, elem_id="new-seed")
            with gr.Column(scale=3, min_width=400):
                gallery = gr.Gallery(
                    label="Pictures",
                    elem_id="pictures",
                    format="png",
                    columns=2,
                    preview=True,
                    height=560,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                )
                report = gr.Markdown(
                    "The pictures are PNG files that hold their prompt and settings.", elem_id="report"
                )
                unread = gr.Textbox(
                    label="Beyond the model's length of prompts, and not read", visible=False, elem_id="unread"
                )
                with gr.Accordion("Settings of the chosen picture", open=False, elem_id="chosen"):
                    settings = gr.JSON(show_label=False, elem_id="settings")
        made = gr.State([])
        gr.on(
            [button.click, prompt.submit],
            paint,
            [prompt, negative, size, sampler, step_count, strength, count, seed, new_seed],
            [gallery, made, settings, seed, unread, report],
            api_name="paint",
            show_progress_on=gallery,
            trigger_mode="once",
        )
        gallery.select(settings_of, made, settings, api_visibility="private", show_progress="hidden")
        sampler.input(
            lambda name: usual(pipeline, name),
            sampler,
            [step_count, strength],
            api_visibility="private",
            show_progress="hidden",
        )
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def serve(page: "gradio.Blocks", pipeline: "PixArtPipeline", host: str, port: int, *, block: bool = True) -> str:
    """Serve the page and return its address, at once or (`block`) when it is stopped. OSError where it cannot be."""
    gr = load_gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    rendering = "pixelated" if max(pipeline.default_size) <= SMALL else "auto"
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=["api", "gradio"],
            theme=gr.themes.Soft(**fonts),
            css=CSS % rendering,
        )
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be served ({error}): choose another --port, or --host.") from error
    print(f"{address}  (Ctrl+C stops it)", flush=True)
    if block:
        page.block_thread()
        page.close(verbose=False)
    return address


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pixart_fast.demo",
        description="A page in the browser that paints with a PixArt model: prompt, size, sampler, seed, gallery.",
        epilog="The page is for this machine alone: --host 0.0.0.0 opens it to everyone who can reach the machine.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR",
        help="folder, name on the Hugging Face hub, or official .pth; default: runs/scenes/final",
    )
    add("--components", metavar="DIR", help="where text encoder, tokenizer and VAE are, if not in the model's folder")
    add("--host", default="127.0.0.1", help="address to serve on (%(default)s)")
    add("--port", type=int, default=7860, help="(%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, … (the GPU if there is one)")
    add(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the transformer (%(default)s)"
    )
    add("--text-precision", choices=("bf16", "fp16", "int8", "fp32"), default="bf16", help="of T5 (%(default)s)")
    add("--low-memory", action="store_true", help="text encoder, transformer and VAE take turns on the device")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; a mistake ends it with one sentence and exit code 2."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        load_gradio()
        from pixart_fast.pipeline import PixArtPipeline  # seconds of imports, after the mistakes that need none

        pipeline = PixArtPipeline.from_pretrained(
            args.model,
            components=args.components,
            device=args.device,
            precision=args.precision,
            text_precision=args.text_precision,
            low_memory=args.low_memory,
        )
        with tempfile.TemporaryDirectory(prefix="pixart_fast_") as folder:
            serve(build(pipeline, Path(folder)), pipeline, args.host, args.port)
    except (ValueError, OSError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
