"""The paper's ablations in miniature: `python -m train.ablations` trains every arm with several seeds and plots them.

    re-parameterised    adaLN-single from a class-conditional DiT (section 2.3), against
    from scratch        the same model from fresh weights; this is the arm that the others differ from in one thing
    adaLN               DiT's modulation MLP in every block, from scratch
    sparse captions     fragments like the alternative texts of web pages (section 2.4), from scratch

Each run has one thread, `--jobs` at a time; finished runs are kept. Times are those of training steps, evaluation left
out, so they compare on an otherwise idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from tqdm import tqdm

from train.monitor import EVALUATIONS, METRICS, read_rows
from train.settings import DEFAULT, UserError

ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, tuple[str, ...]] = {
    "re-parameterised": (),
    "from scratch": (),
    "adaLN": ("model.modulation=adaln",),
    "sparse captions": ("data.captions=sparse",),
}
CLASSES = "classes"  # the DiT that the first arm starts from
PANELS = (
    ("re-parameterised", "from scratch"),
    ("from scratch", "adaLN"),
    ("from scratch", "sparse captions"),
)
RATES = {"binding": "shapes and colours", "count": "number of objects"}


class Point(NamedTuple):
    """An evaluation of one arm: over its seeds, mean and standard deviation."""

    step: int
    seconds: float
    rate: float
    deviation: float


def settings_of(arm: str, seed: int, output: Path, steps: int, every: int) -> list[str]:
    """Settings of a run, over those of the embedded default."""
    given = [f"output={folder(output, arm, seed)}", f"seed={seed}", "checkpoint_every=100000", "keep_checkpoints=1"]
    given += [
        f"sampling.every={every}",
        f"log_every={gcd(10, every)}",
        "sampling.captions=192",
        "sampling.final_captions=192",
        f"steps={steps}",
    ]
    if arm == CLASSES:
        return [*given, "model.kind=dit"]
    if arm == "re-parameterised":
        given.append(f"init_from={folder(output, CLASSES, seed) / 'final'}")
    return [*given, *ARMS[arm]]


def folder(output: Path, arm: str, seed: int) -> Path:
    return output / f"{arm.replace(' ', '_')}_{seed}"


def train(arm: str, seed: int, output: Path, steps: int, every: int) -> None:
    """Run unless it is finished. Raises UserError with the end of its output."""
    where = folder(output, arm, seed)
    if (where / "report.json").is_file():
        return
    command = [sys.executable, "train/run.py", "--config", str(DEFAULT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += settings_of(arm, seed, output, steps, every)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or not (where / "report.json").is_file():
        raise UserError(f"{where.name} ended with exit code {done.returncode}: {done.stderr[-500:]}")


def curve(arm: str, seeds: range, output: Path, rate: str) -> list[Point]:
    """A rate of new captions over the steps of an arm."""
    runs = []
    for seed in seeds:
        seconds = {row["step"]: row["seconds"] for row in read_rows(folder(output, arm, seed) / METRICS)}
        rows = read_rows(folder(output, arm, seed) / EVALUATIONS)
        runs.append({row["step"]: (seconds[row["step"]], row["seen"][rate]) for row in rows})
    points = []
    for step in sorted(runs[0]):
        times, rates = zip(*(run[step] for run in runs), strict=True)
        points.append(Point(step, mean(times), mean(rates), stdev(rates) if len(rates) > 1 else 0.0))
    return points


def plot(output: Path, seeds: range, path: Path) -> None:
    """A row of panels per rate: two arms against training time, bars of one standard deviation over the seeds; dashed:
    the first arm, its DiT's time included."""
    figure, axes = plt.subplots(len(RATES), len(PANELS), figsize=(13, 7), sharey=True, sharex=True)
    colours = dict(zip(ARMS, ("#d55e00", "#0072b2", "#009e73", "#7f7f7f"), strict=True))
    for row, (rate, told) in zip(axes, RATES.items(), strict=True):
        for place, arms in zip(row, PANELS, strict=True):
            for arm in arms:
                points = curve(arm, seeds, output, rate)
                x, y, bar = ([getattr(p, name) for p in points] for name in ("seconds", "rate", "deviation"))
                place.errorbar(x, y, bar, label=arm, color=colours[arm], marker="o", markersize=4, capsize=3)
                if arm == "re-parameterised":
                    later = [second + class_seconds(output, seeds) for second in x]
                    place.plot(later, y, "--", label="with the DiT's time", color=colours[arm], linewidth=1)
            place.set(ylim=(0, 1.02))
            place.grid(alpha=0.3)
            place.legend(loc="upper left", fontsize=8)
        row[0].set_ylabel(f"captions right in {told}")
    for place in axes[-1]:
        place.set_xlabel("seconds of training, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(output: Path, seeds: range) -> str:
    """Markdown: rate, mean ± standard deviation over the seeds, at a third, two thirds and all of the steps."""
    evaluated = [point.step for point in curve("from scratch", seeds, output, "binding")]
    steps = [evaluated[len(evaluated) * part // 3 - 1] for part in (1, 2, 3)]
    lines = [
        f"| | {' | '.join(f'{told}, step {step}' for told in RATES.values() for step in steps)} | seconds |",
        "|---" * (2 + len(RATES) * len(steps)) + "|",
    ]
    for arm in ARMS:
        cells = []
        for rate in RATES:
            points = {point.step: point for point in curve(arm, seeds, output, rate)}
            cells += [f"{points[step].rate:.3f} ± {points[step].deviation:.3f}" for step in steps]
        lines.append(f"| {arm} | {' | '.join(cells)} | {points[steps[-1]].seconds:.0f} |")
    return "\n".join(lines)


def class_seconds(output: Path, seeds: range) -> float:
    """What the DiT of the first arm took."""
    reports = [json.loads((folder(output, CLASSES, seed) / "report.json").read_text()) for seed in seeds]
    return mean(report["seconds"] for report in reports)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.ablations",
        description="The paper's ablations on scenes, with error bars: re-parameterisation, adaLN-single, captions.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per arm (%(default)s)")
    parser.add_argument("--steps", type=int, default=750, metavar="N", help="of every arm (%(default)s)")
    parser.add_argument("--class-steps", type=int, default=450, metavar="N", help="of the DiT (%(default)s)")
    parser.add_argument("--every", type=int, default=125, metavar="N", help="steps between evaluations (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    output, seeds = options.output.absolute(), range(options.seeds)
    try:
        with (
            ThreadPoolExecutor(options.jobs) as pool,
            tqdm(total=options.seeds * (1 + len(ARMS)), unit="run", disable=not sys.stderr.isatty()) as bar,
        ):
            # The DiTs first: an arm waits for them.
            first = [(CLASSES, seed, output, options.class_steps, options.class_steps) for seed in seeds]
            rest = [(arm, seed, output, options.steps, options.every) for arm in ARMS for seed in seeds]
            for runs in (first, rest):
                for done in [pool.submit(train, *run) for run in runs]:
                    done.result()
                    bar.update()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(output, seeds, output / "ablations.png")
    text = (
        f"{table(output, seeds)}\n\nThe DiT that the first arm starts from took {class_seconds(output, seeds):.0f} s.\n"
    )
    (output / "ablations.md").write_text(text)
    print(text)
    print(f"plot: {output / 'ablations.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
