"""What a run tells: one progress bar, `metrics.jsonl`, TensorBoard, and Weights & Biases if it is asked for."""

import hashlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pixart_fast.cost import data_sheet
from train.settings import Settings, UserError, flatten

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


def read_rows(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, up to `last_step`; a torn last line, as a kill leaves it, is dropped."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if last_step is None or row["step"] <= last_step:
                rows.append(row)
    return rows


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_wandb(settings: Settings):
    """A run of Weights & Biases that goes on where it was left. Raises UserError."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb= needs Weights & Biases: `pip install wandb`, or leave it out.") from error
    name = settings.output.name
    identity = hashlib.sha256(str(settings.output.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=settings.wandb, name=name, id=identity, resume="allow", config=flatten(settings))


class Monitor:
    """Writes a run's progress; a no-op on all but the first process.

    On resume, rows after the checkpoint's step are cut off, so that the files read as if nothing had happened.

    Args:
        step: finished steps.
        flops_per_image: of a training step, for MFU, which is told where the device's peak is known.

    Raises UserError where Weights & Biases was asked for and is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        *,
        main: bool,
        step: int,
        processes: int,
        device_name: str,
        flops_per_image: float,
    ):
        self.main, self.device, self.processes, self.terms = main, device, processes, settings.cost
        self.flops_per_image, self.sheet = flops_per_image, data_sheet(device_name)
        self.clock, self.seconds, self.images = time.perf_counter(), 0.0, step * settings.batch_size
        self.since = self.images
        self.waiting = 0.0
        self.bins: list[float] = []
        if not main:
            return
        output, steps = settings.output, settings.steps
        self.files = {}
        for name in (METRICS, EVALUATIONS):
            rows = read_rows(output / name, step)
            # A file of its own and a rename: a kill here must not cost the rows that there were.
            partial = output / f"{name}.partial"
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            partial.replace(output / name)
            self.files[name] = (output / name).open("a", buffering=1)
            if name == METRICS and rows:
                self.seconds, self.images = rows[-1]["seconds"], rows[-1].get("images", self.images)
                self.since = self.images
        self.board = SummaryWriter(output / "tensorboard", purge_step=step + 1)
        self.wandb = open_wandb(settings) if settings.wandb else None
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr, smoothing=0.05)

    def waited(self, seconds: float) -> None:
        """The loop stood still for its data so long."""
        self.waiting += seconds

    def advance(self, step: int, loss: float, images: int, bins: list[float]) -> None:
        """Move the bar. bins: squared errors summed by bin of timesteps, then the counts behind them."""
        self.images += images
        self.bins = [a + b for a, b in zip(self.bins or [0.0] * len(bins), bins, strict=True)]
        if self.main:
            rate = self.bar.format_dict["rate"] or 0.0
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate * images:.0f} img/s", refresh=False)
            self.bar.update(step - self.bar.n)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics: `values`, and since the last row the loss by bin of timesteps (from clean to noisy),
        throughput, the share of the time that was spent waiting for data, MFU; memory, and what the run cost so far."""
        if not self.main:
            return
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        images_per_second = (self.images - self.since) / elapsed
        achieved = images_per_second * self.flops_per_image
        count = len(self.bins) // 2
        row = {
            "step": step,
            **values,
            "mse_by_timestep": [
                total / number if number else None
                for total, number in zip(self.bins[:count], self.bins[count:], strict=True)
            ],
            "images": self.images,
            "images_per_second": images_per_second,
            "data_wait": min(self.waiting / elapsed, 1.0),
            "peak_memory": peak_memory(self.device),
            "mfu": achieved / (self.sheet.matmul * self.processes) if self.sheet else None,
            "seconds": self.seconds + elapsed,
        }
        self.seconds, self.since, self.waiting, self.bins = self.seconds + elapsed, self.images, 0.0, []
        row |= self.cost()
        self.files[METRICS].write(json.dumps(row) + "\n")
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        for number, value in enumerate(row["mse_by_timestep"]):
            if value is not None:
                scalars[f"mse_by_timestep/{number}"] = value
        self._send({f"train/{name}": value for name, value in scalars.items()}, step)

    def cost(self) -> dict[str, float | None]:
        """GPU days, and dollars and kg of CO2 where price and power are known; None on a CPU."""
        if self.device.type != "cuda":
            return {"gpu_days": None, "dollars": None, "kg_co2": None}
        hours, terms = self.seconds / 3600 * self.processes, self.terms
        price = terms.dollars_per_gpu_hour
        kilowatt_hours = None if self.sheet is None else hours * self.sheet.watts / 1000 * terms.pue
        return {
            "gpu_days": hours / 24,
            "dollars": None if price is None else hours * price,
            "kg_co2": None if kilowatt_hours is None else kilowatt_hours * terms.kg_co2_per_kwh,
        }

    def _send(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)

    def evaluation(self, step: int, accuracy: dict[str, dict[str, float]]) -> None:
        """One row of oracle accuracies by split."""
        if self.main:
            self.files[EVALUATIONS].write(json.dumps({"step": step, **accuracy}) + "\n")
            rates = {f"{split}/{name}": value for split, of in accuracy.items() for name, value in of.items()}
            self._send(rates, step)

    def pause(self) -> None:
        """Leave the time since the last row out of the throughput: sampling and saving are not training."""
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.main:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.board.close()
            if self.wandb is not None:
                self.wandb.finish()
            for file in self.files.values():
                file.close()
