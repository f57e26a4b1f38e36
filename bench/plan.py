"""`python -m bench.plan`: what the training stages of PixArt-α would take on other devices, from the cost model.

    python -m bench.plan                                        all five stages on 64 A100
    python -m bench.plan --stage align_256 --gpus 8 --device h100 --price 2.5
    python -m bench.plan --path ours --markdown --grid 0.05     for a report; a grid of 50 g CO2 per kWh

A step takes its limit (`bench.cost`: the sum over all kernels of the longer of moving and multiplying) over the share
of the limit that a device reaches, and what of the gradients' reduction is not hidden. The share is measured where
bench/results has a training step or a forward pass of the device, else of another NVIDIA device, else assumed: the one
share that the paper's own V100 days imply. The output says which, and how well that one share gives the paper's days.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import cost
from bench.cost import Model
from pixart_fast.config import SIZES
from pixart_fast.cost import DATA_SHEETS, DataSheet, data_sheet

RESULTS = Path(__file__).resolve().parent / "results"
DAY = 86400
HALF = 2  # bytes; fp16 on V100, bf16 elsewhere
XL = SIZES["XL"]
PIXART = Model(XL.layers, XL.width)
DIT = Model(XL.layers, XL.width, caption_channels=None, modulation="adaln")


@dataclass(frozen=True)
class Stage:
    """A row of PixArt-α's table 4; captions count with all their tokens."""

    model: Model
    pixels: int
    per_gpu: int
    gpus: int
    steps: int
    v100_days: float
    caption: int = 120

    @property
    def batch(self) -> int:
        return self.per_gpu * self.gpus

    @property
    def tokens(self) -> int:
        return (self.pixels // 16) ** 2


STAGES = {
    "pixel_256": Stage(DIT, 256, per_gpu=128, gpus=8, steps=300_000, v100_days=88, caption=0),
    "align_256": Stage(PIXART, 256, per_gpu=178, gpus=64, steps=150_000, v100_days=672),
    "aesthetic_256": Stage(PIXART, 256, per_gpu=178, gpus=64, steps=90_000, v100_days=416),
    "aesthetic_512": Stage(PIXART, 512, per_gpu=40, gpus=64, steps=100_000, v100_days=320),
    "aesthetic_1024": Stage(PIXART, 1024, per_gpu=12, gpus=32, steps=16_000, v100_days=160),
}
V100_DAYS = sum(stage.v100_days for stage in STAGES.values())  # 1656
# The abstract in its later versions; the first, and the paper's page, say 675 days and 26,000 dollars.
A100_DAYS, DOLLARS = 753, 28_400
# What the paper's bill makes of a GPU hour. Prices of Hopper are not the paper's: --price.
PRICES = {"v100": DOLLARS / V100_DAYS / 24, "a100": DOLLARS / A100_DAYS / 24}

# Of the reduction, as long as the backward lasts: all buckets of gradients but the last go out while it runs.
OVERLAP = 0.9
BACKWARD = 2 / 3  # of a step without recomputation
# World averages: data centres of 2023 (Uptime Institute), electricity of 2022 in kg CO2 per kWh (Ember).
PUE, GRID = 1.58, 0.436

# Bytes a weight with AdamW and a moving average: weight and gradient in half precision, four in fp32.
STATE = 2 * HALF + 4 * 4
# What the backward needs in units of [B, N, D]: kept of every block, and present of one block only. Counted in
# tests/test_engine.py; a block that is recomputed whole keeps the stream, x and h, and for a moment all of eager's.
KEPT = {"pointwise": (14.3, 0), "block": (2, 28.3)}
USABLE = 0.9  # of the memory


@dataclass(frozen=True)
class Way:
    """How a step is run: with our kernels or in plain PyTorch, and what its backward may compute again."""

    name: str
    fused: bool
    recompute: tuple[str, ...]
    rows: tuple[str, ...]  # the paths of bench/results that it stands for


WAYS = {
    "reference": Way("reference", False, ("block",), ("reference eager",)),  # blocks checkpointed, as published
    "ours": Way("ours", True, ("pointwise", "block"), ("ours", "ours compiled")),
}


@dataclass(frozen=True)
class Basis:
    """The ceilings of a device, the share of the limit that a path reaches there, and how both are known.

    A measured share is one of the least that has to be moved, fused, whatever the path.
    """

    copy: float
    matmul: float
    share: float
    fused: bool
    known: str  # "measured", "carried over" (from another device, resolution or pass) or "assumed"
    source: str


@dataclass(frozen=True)
class Prediction:
    """A stage on a number of GPUs, each of which takes `per_gpu` samples in `parts` (gradient accumulation)."""

    per_gpu: int
    parts: int
    recompute: str
    seconds: float  # of a step
    reduction: float  # seconds of it that are not hidden
    gpu_days: float


class Unanswerable(ValueError):
    """A question without an answer; the message says what to ask instead."""


def fitting(stage: Stage, sheet: DataSheet, recompute: str) -> int:
    """How many samples of a stage a device holds at once, by an estimate: bench.memory predicts it."""
    everywhere, once = KEPT[recompute]
    model = stage.model
    sample = (everywhere * model.layers + once) * stage.tokens * model.width * HALF
    return max(0, int((USABLE * sheet.memory - STATE * model.parameters) / sample))


def reduction(parameters: int, gpus: int, sheet: DataSheet) -> float:
    """Seconds of a gradient all-reduce in half precision: rings in each machine of eight, and between the machines.

    Each direction of a ring carries 2 (n - 1) / n of the bytes; between machines all eight GPUs share the network.
    """
    size, local = parameters * HALF, min(gpus, 8)
    machines = -(-gpus // 8)
    return 2 * size * ((local - 1) / local / sheet.nvlink + (machines - 1) / machines / sheet.network)


def predict(stage: Stage, way: Way, basis: Basis, sheet: DataSheet, gpus: int) -> Prediction:
    """The fastest way that the path has and the memory allows. Raises `Unanswerable` where there is none."""
    if gpus > stage.batch:
        raise Unanswerable(
            f"the batch of {stage.batch} at {stage.pixels} px cannot be split over {gpus} GPUs: take fewer."
        )
    per_gpu = -(-stage.batch // gpus)  # the fullest GPU sets the pace
    found = []
    for recompute in way.recompute:
        fit = fitting(stage, sheet, recompute)
        if fit == 0:
            continue
        parts = -(-per_gpu // fit)
        seconds = _computing(stage, -(-per_gpu // parts), parts, recompute, basis)
        exposed = reduction(stage.model.parameters, gpus, sheet)
        exposed = max((1 - OVERLAP) * exposed, exposed - BACKWARD * seconds / parts)
        days = stage.steps * (seconds + exposed) * gpus / DAY
        found.append(Prediction(per_gpu, parts, recompute, seconds + exposed, exposed, days))
    if not found:
        raise Unanswerable(
            f"{sheet.name} with {sheet.memory / 1e9:.0f} GB holds not one sample of {stage.pixels} px with its "
            "optimizer: take a device with more memory."
        )
    return min(found, key=lambda prediction: prediction.seconds)


def _computing(stage: Stage, batch: int, parts: int, recompute: str, basis: Basis) -> float:
    """Seconds of a step of `parts` times `batch` samples on one GPU."""
    sizes = (stage.model, batch, stage.tokens, stage.caption, HALF)
    both = cost.transformer(*sizes, "forward+backward", fused=basis.fused, recompute=recompute)
    update = cost.optimizer(stage.model.parameters, HALF, fused=basis.fused)
    seconds = [cost.limit(costs, basis.copy, basis.matmul)[0] for costs in (both, update)]
    return (parts * seconds[0] + seconds[1]) / basis.share


def implied_shares() -> dict[str, float]:
    """The share of a V100's limit that eager PyTorch with checkpointed blocks reached, by the paper's days."""
    sheet, shares = DATA_SHEETS["v100"], {}
    for name, stage in STAGES.items():
        limit = predict(stage, WAYS["reference"], _by_data_sheet("v100", 1.0, False), sheet, stage.gpus)
        taken = stage.v100_days * DAY / stage.gpus / stage.steps
        shares[name] = (limit.seconds - limit.reduction) / (taken - limit.reduction)
    return shares


def _by_data_sheet(device: str, share: float, fused: bool) -> Basis:
    sheet = DATA_SHEETS[device]
    source = (
        f"{share:.0%} of this path's limit by data sheet, the share that the paper's V100 days imply for eager PyTorch"
    )
    return Basis(sheet.bandwidth, sheet.matmul, share, fused, "assumed", source)


def basis_for(way: Way, device: str, pixels: int, runs: Iterable[dict[str, Any]]) -> Basis:
    """The best knowledge of a path on a device: measured there, on another NVIDIA device, or assumed.

    A training step goes before a forward pass, then the nearest resolution, the newest run, the largest batch. Rows of
    a CPU say nothing about a GPU.
    """
    sheet, found = DATA_SHEETS[device], []
    for run in runs:
        for row in (benchmark["extra_info"] for benchmark in run["benchmarks"]):
            if run.get("ceilings") and _tells(row, way):
                own, off = data_sheet(row["device"]) is sheet, abs(row["pixels"] - pixels)
                found.append(((own, row["op"] == "train_step", -off, run["datetime"], row["batch"]), row, run))
    if not found:
        return _by_data_sheet(device, statistics.median(implied_shares().values()), way.fused)
    (own, *_), row, run = max(found, key=lambda of: of[0])
    copy = run["ceilings"]["copy_gb_per_s"] * 1e9
    matmul = run["ceilings"][f"{row['dtype']}_tflop_per_s"] * 1e12
    share = row["percent_of_ceiling"] / 100
    what = f"{row['op']} {row['shape']} {row['dtype']}, {row['path']!r} on {row['device']}, {run['datetime'][:10]}"
    if own:
        known = "measured" if row["op"] == "train_step" and row["pixels"] == pixels else "carried over"
        return Basis(copy, matmul, share, True, known, f"{share:.0%} of the measured limit: {what}")
    there = data_sheet(row["device"])
    copy, matmul = sheet.bandwidth * copy / there.bandwidth, sheet.matmul * matmul / there.matmul
    source = f"{share:.0%} of a limit in which copy and product reach as much of the data sheet as there: {what}"
    return Basis(copy, matmul, share, True, "carried over", source)


def _tells(info: dict[str, Any], way: Way) -> bool:
    """Whether a row of results says what share a path reaches on an NVIDIA device in half precision."""
    return (
        info.get("op") in ("train_step", "forward")
        and info["path"] in way.rows
        and info["shape"].startswith("XL")
        and info["dtype"] in ("bfloat16", "float16")
        and data_sheet(info["device"]) is not None
    )


def table(options: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
    """The stages' rows, the paper's beside each, and what they rest on."""
    stages = STAGES if options.stage == "all" else {options.stage: STAGES[options.stage]}
    ways = list(WAYS.values()) if options.path == "both" else [WAYS[options.path]]
    sheet = DATA_SHEETS[options.device]
    model = options.device.partition("-")[0]
    price = PRICES.get(model) if options.price is None else options.price
    # The paper names days of V100 and A100; for another device its V100's, as it took them.
    paper, scale = ("a100", A100_DAYS / V100_DAYS) if model == "a100" else ("v100", 1.0)

    rates = {"paper": (DATA_SHEETS[paper].watts, PRICES[paper])} | {way.name: (sheet.watts, price) for way in ways}

    def line(stage: str, path: str, days: float, batch: str = "", again: str = "", step: str = "", known: str = ""):
        watts, hour = rates[path]
        carbon = days * 24 * watts / 1000 * options.pue * options.grid
        dollars = "-" if hour is None else f"{days * 24 * hour:,.0f}"
        path = f"paper, {paper.upper()}" if path == "paper" else path
        return stage, path, batch, again, step, f"{days:,.0f}", dollars, f"{carbon:,.0f}", known

    lines, days, known = [], dict.fromkeys(rates, 0.0), {}
    for name, stage in stages.items():
        published = stage.v100_days * scale
        days["paper"] += published
        lines.append(line(name, "paper", published, str(stage.per_gpu), "block", "-", "published"))
        for way in ways:
            basis = basis_for(way, options.device, stage.pixels, runs)
            found = predict(stage, way, basis, sheet, options.gpus)
            days[way.name] += found.gpu_days
            batch = f"{found.per_gpu} in {found.parts}" if found.parts > 1 else str(found.per_gpu)
            step = f"{found.seconds:.3g} s"
            lines.append(line("", way.name, found.gpu_days, batch, found.recompute, step, basis.known))
            known[f"{way.name}: {basis.known}, {basis.source}."] = None
    if len(stages) > 1:
        lines += [line("all", path, total) for path, total in days.items()]
    head = ("stage", "path", "batch of a GPU", "recomputed", "step", "GPU days", "dollars", "kg CO2", "share known")
    title = f"PixArt-α's training stages on {options.gpus} {options.device.upper()} ({sheet.name})"
    hour = "no price is known, give --price" if price is None else f"{price:.2f} dollars"
    if options.price is None and price is not None:
        hour += f", as the paper's {DOLLARS:,} dollars for {A100_DAYS} A100 days, or {V100_DAYS} V100 days, have it"
    links = f"{sheet.nvlink / 1e9:.0f} GB/s a GPU in a machine of 8, {sheet.network / 1e9:.0f} GB/s between machines"
    notes = [
        *known,
        f"A GPU hour: {hour}; {sheet.watts:.0f} W x PUE {options.pue} x {options.grid} kg CO2/kWh. The paper's rows: "
        "its days and dollars, CO2 by the same formula.",
        f"Gradients are reduced over {links}; {OVERLAP:.0%} of it is assumed to be hidden behind the backward.",
        "Not in it: text encoder and autoencoder (features are stored), loading, evaluation; captions have 120 tokens.",
        "The model of pixel_256 is the class-conditional DiT, counted as PixArt's without caption.",
    ]
    return "\n".join([title, "", *_aligned(head, lines, options.markdown), "", *(f"- {note}" for note in notes), ""])


def check(markdown: bool) -> str:
    """How well one share of the limit gives the paper's own days."""
    shares, lines, totals = implied_shares(), [], {}
    share = statistics.median(shares.values())
    for device in PRICES:
        basis, sheet = _by_data_sheet(device, share, False), DATA_SHEETS[device]
        found = {name: predict(of, WAYS["reference"], basis, sheet, of.gpus) for name, of in STAGES.items()}
        totals[device] = {name: prediction.gpu_days for name, prediction in found.items()}
    for name, stage in STAGES.items():
        days = totals["v100"][name]
        off = f"{days / stage.v100_days - 1:+.0%}"
        lines.append((name, f"{stage.v100_days:.0f}", f"{shares[name]:.0%}", f"{days:.0f}", off))
    v100, a100 = (sum(of.values()) for of in totals.values())
    lines.append(("all", f"{V100_DAYS:.0f}", "", f"{v100:.0f}", f"{v100 / V100_DAYS - 1:+.0%}"))
    head = ("stage", "paper, V100 days", "share it implies", f"days at {share:.0%}", "error")
    median = next(name for name, of in shares.items() if of == share)
    notes = [
        f"{share:.0%} is the median, that of {median}, whose days it gives by construction.",
        f"A100 days at the same share: {a100:.0f}, the paper says {A100_DAYS}. That is {V100_DAYS:.0f} / 2.2, the"
        " lead of the A100 that Rombach et al. (2022) assume: a conversion, no second measurement.",
        "The stage at 1024 px took several times what its arithmetic explains; the cause is not published. That the sum"
        " comes out right is its luck: the errors of the stages cancel.",
    ]
    title = "One share of the limit for eager PyTorch, against the paper's days"
    return "\n".join([title, "", *_aligned(head, lines, markdown), "", *(f"- {note}" for note in notes)])


def _aligned(head: tuple[str, ...], lines: list[tuple[str, ...]], markdown: bool) -> list[str]:
    """A table: what starts with a letter in the first line stands left, numbers right."""
    if markdown:
        return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines)]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    left = [lines[0][column][:1].isalpha() for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(cells, widths, left, strict=True)
        ).rstrip()
        for cells in (head, *lines)
    ]


def load(folder: Path) -> list[dict[str, Any]]:
    """All runs of a results folder. Raises `Unanswerable` where it is missing."""
    if not folder.is_dir():
        raise Unanswerable(f"there is no folder {folder}: --results takes one like bench/results.")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", default="all", help=f"all (default), {', '.join(STAGES)}")
    parser.add_argument("--gpus", type=int, default=64, help="how many share the paper's batch; default 64")
    parser.add_argument("--device", default="a100", help=f"{', '.join(DATA_SHEETS)}; default a100")
    parser.add_argument("--path", choices=[*WAYS, "both"], default="both", help="plain PyTorch, ours, both (default)")
    parser.add_argument("--price", type=float, help="dollars of a GPU hour; default: what the paper's bill gives")
    parser.add_argument("--grid", type=float, default=GRID, help=f"kg CO2 per kWh; default {GRID}, the world in 2022")
    parser.add_argument("--pue", type=float, default=PUE, help=f"power of the data centre per GPU's; default {PUE}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measured rows; default bench/results")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    options = parser.parse_args(arguments)
    for name, value, known in (("stage", options.stage, ("all", *STAGES)), ("device", options.device, DATA_SHEETS)):
        if value not in known:
            raise Unanswerable(f"there is no {name} {value!r}: choose one of {', '.join(known)}.")
    if options.gpus < 1:
        raise Unanswerable(f"--gpus takes 1 or more, not {options.gpus}.")
    return options


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        print(table(options, load(options.results)))
        print(check(options.markdown))
    except Unanswerable as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
