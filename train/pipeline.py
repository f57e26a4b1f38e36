"""The paper's training as one command: `python train/pipeline.py [--miniature] [key=value …]`.

A stage is a run of train/run.py that starts from the weights of the one before. What is finished is not done again: the
same command goes on at the stage, and the step, where it stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pixart_fast.aspect import BUCKETS
from pixart_fast.pictures import contact_sheet
from train.settings import UserError, read_yaml

ROOT = Path(__file__).resolve().parents[1]
PAPER, MINIATURE = ROOT / "train" / "pipeline.yaml", ROOT / "train" / "miniature.yaml"


class Stage(BaseModel):
    """One run. `prepare` are commands that make its data; {output} in them and in `settings` is the chain's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    config: Path
    prepare: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    aspects: int = 0


class Chain(BaseModel):
    """The stages of a training, in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path
    stages: tuple[Stage, ...]


def load_chain(path: Path, output: Path | None) -> Chain:
    """Read a chain. Raises UserError."""
    try:
        chain = Chain.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    return chain if output is None else chain.model_copy(update={"output": output})


def command(chain: Chain, place: int, launcher: list[str], configs: list[Path], overrides: list[str]) -> list[str]:
    """What trains a stage."""
    stage = chain.stages[place]
    given = {"output": chain.output / stage.name}
    if place:
        given["init_from"] = chain.output / chain.stages[place - 1].name / "final"
    for key, value in stage.settings.items():
        given[key] = _filled(value, chain)
    settings = [f"{key}={_flow(value)}" for key, value in given.items()]
    files = [part for file in (stage.config, *configs) for part in ("--config", str(file))]
    return [*launcher, "train/run.py", *files, *settings, *overrides]


def _filled(value: Any, chain: Chain) -> Any:
    return yaml.safe_load(yaml.safe_dump(value).replace("{output}", str(chain.output)))


def _flow(value: Any) -> str:
    """A value in YAML's notation on one line."""
    if isinstance(value, (str, Path)):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def run(arguments: list[str], what: str) -> None:
    """Run a command from the project's root, its output on the terminal. Raises UserError where it fails."""
    code = subprocess.run(arguments, cwd=ROOT).returncode
    if code:
        raise UserError(
            f"{what} ended with exit code {code} (its message is above): once that is mended, the same command goes on "
            "from there."
        )


def train(chain: Chain, launcher: list[str], configs: list[Path], overrides: list[str]) -> None:
    """Every stage that is not finished."""
    for place, stage in enumerate(chain.stages):
        folder = chain.output / stage.name
        if (folder / "report.json").is_file():
            print(f"{stage.name} is finished: {folder / 'report.md'}", flush=True)
            continue
        begin = time.time()
        prepare(chain, stage)
        prepared = time.time()
        run(command(chain, place, launcher, configs, overrides), f"stage {stage.name}")
        if not (folder / "report.json").is_file():  # stopped on request
            raise UserError(f"stage {stage.name} was stopped: the same command goes on from there.")
        if stage.aspects:
            components = Path(_filled(stage.settings["sampling.components"], chain))
            accuracy = paint_aspects(folder, components, stage.aspects)
            (folder / "aspects.json").write_text(json.dumps(accuracy, indent=1) + "\n")
        note = {"prepare_seconds": prepared - begin, "seconds": time.time() - prepared}
        (folder / "stage.json").write_text(json.dumps(note) + "\n")


def prepare(chain: Chain, stage: Stage) -> None:
    """The stage's own commands that have not succeeded yet; `NAME.prepared` remembers which have."""
    record = chain.output / f"{stage.name}.prepared"
    done = record.read_text().splitlines() if record.is_file() else []
    for line in stage.prepare:
        if line in done:
            continue
        words = [sys.executable if word == "python" else word for word in shlex.split(line)]
        run([word.replace("{output}", str(chain.output)) for word in words], f"{stage.name}: {line}")
        with record.open("a") as file:
            file.write(f"{line}\n")


def paint_aspects(folder: Path, components: Path, count: int) -> dict[str, dict[str, float]]:
    """What the oracle reads in pictures of new scene captions at every size of the run, by size; `aspects.png`."""
    from pixart_fast.pictures import to_images
    from pixart_fast.pipeline import PixArtPipeline
    from train.data.oracle import score
    from train.data.scenes import Scenes

    pipeline = PixArtPipeline.from_pretrained(folder / "final", components=components, device="cpu", precision="fp32")
    drawn = Scenes(0, split="seen").batch(range(count))
    accuracy, shown, captions = {}, [], []
    for height, width in BUCKETS[pipeline.default_size[0]].values():
        images = pipeline(drawn.captions, size=(height, width), batch_size=count).images
        pixels = torch.stack([_pixels(image) for image in images])
        accuracy[f"{width}x{height}"] = score(drawn.scenes, pixels)
        shown += to_images(pixels[:6])
        captions += [f"{width}x{height}: {caption}" for caption in drawn.captions[:6]]
    contact_sheet(shown, captions).save(folder / "aspects.png")
    return accuracy


def _pixels(image) -> torch.Tensor:
    """A picture as fp32 `[3, H, W]` in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def write_report(chain: Chain) -> Path:
    """`report.md` of all stages: what each took, what it reached, and its pictures."""
    lines = [f"# {chain.output.name}", ""]
    lines += ["| stage | steps | pictures | parameters | minutes | images/s | right |", "|---|---|---|---|---|---|---|"]
    pictures = []
    for stage in chain.stages:
        folder = chain.output / stage.name
        report = json.loads((folder / "report.json").read_text())
        note = json.loads((folder / "stage.json").read_text())
        rates = {split: of.get("binding") for split, of in (report.get("accuracy") or {}).items()}
        right = ", ".join(f"{split.replace('_', ' ')} {rate:.2f}" for split, rate in rates.items() if rate is not None)
        if stage.aspects:
            aspects = json.loads((folder / "aspects.json").read_text())
            right = ", ".join(f"{size} {of['binding']:.2f}" for size, of in aspects.items())
        minutes = (note["prepare_seconds"] + note["seconds"]) / 60
        lines.append(
            f"| {stage.name} | {report['steps']} | {report['images']} | {report['parameters'] / 1e6:.2f} M | "
            f"{minutes:.1f} | {report['images_per_second']:.0f} | {right or '–'} |"
        )
        pictures += ["", f"## {stage.name}", ""]
        for name, told in (
            ("samples/final.png", "pictures of the averaged weights"),
            ("samples/progress.png", "the same from the same noise, over the steps"),
            ("aspects.png", "every aspect ratio"),
            ("timesteps.png", "squared error by timestep"),
        ):
            if (folder / name).is_file():
                pictures += [f"![{told}]({stage.name}/{name})", ""]
    lines += ["", "Right: pictures with every named colour and shape together, as the oracle reads them.", *pictures]
    path = chain.output / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python train/pipeline.py",
        description="The paper's stages in a row, each from the last one's result; what is finished is not done again.",
        epilog=(
            "examples: --miniature   --config train/configs/hardware/8xA100-40GB.yaml   "
            "--launcher 'deepspeed --hostfile hosts'   --config train/configs/values/published_code.yaml   seed=1"
        ),
    )
    parser.add_argument("--pipeline", type=Path, default=PAPER, metavar="FILE", help="the stages (%(default)s)")
    parser.add_argument("--miniature", action="store_true", help=f"the chain on scenes, minutes on a CPU ({MINIATURE})")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of all stages (the file's)")
    parser.add_argument("--launcher", default="deepspeed", help="what starts train/run.py (%(default)s)")
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE", help="over every stage's file: hardware …"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every stage")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    launcher = shlex.split(options.launcher)
    own = Path(sys.executable).with_name(launcher[0])
    if own.is_file():  # of this environment, whatever the PATH
        launcher[0] = str(own)
    try:
        chain = load_chain(MINIATURE if options.miniature else options.pipeline, options.output)
        chain = chain.model_copy(update={"output": chain.output.absolute()})
        train(chain, launcher, [file.absolute() for file in options.config], options.overrides)
        print(f"done: {write_report(chain)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
