"""What a run tells: one progress bar, `metrics.jsonl`, TensorBoard."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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


class Monitor:
    """Writes a run's progress; a no-op on all but the first process.

    On resume, rows after the checkpoint's step are cut off, so that the files read as if nothing had happened.

    Args:
        step, steps: finished and planned steps.
        flops_per_image: of a training step, for MFU; `peak_flops` of all devices together, None where unknown.
    """

    def __init__(
        self,
        output: Path,
        device: torch.device,
        *,
        main: bool,
        step: int,
        steps: int,
        batch_size: int,
        flops_per_image: float,
        peak_flops: float | None,
    ):
        self.main, self.device, self.batch_size = main, device, batch_size
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.step, self.clock, self.seconds = step, time.perf_counter(), 0.0
        if not main:
            return
        self.files = {}
        for name in (METRICS, EVALUATIONS):
            rows = read_rows(output / name, step)
            # A file of its own and a rename: a kill here must not cost the rows that there were.
            partial = output / f"{name}.partial"
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
            partial.replace(output / name)
            self.files[name] = (output / name).open("a", buffering=1)
            if name == METRICS and rows:
                self.seconds = rows[-1]["seconds"]
        self.board = SummaryWriter(output / "tensorboard", purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr, smoothing=0.05)

    def advance(self, step: int, loss: float) -> None:
        """Move the bar."""
        if self.main:
            rate = self.bar.format_dict["rate"] or 0.0
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate * self.batch_size:.0f} img/s", refresh=False)
            self.bar.update(step - self.bar.n)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics: `values`, throughput since the last row, memory, MFU where the device's peak is known."""
        if not self.main:
            return
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        images_per_second = (step - self.step) * self.batch_size / elapsed
        self.step, self.seconds = step, self.seconds + elapsed
        achieved = images_per_second * self.flops_per_image
        row = {
            "step": step,
            **values,
            "images_per_second": images_per_second,
            "peak_memory": peak_memory(self.device),
            "mfu": achieved / self.peak_flops if self.peak_flops else None,
            "seconds": self.seconds,
        }
        self.files[METRICS].write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(f"train/{name}", value, step)

    def evaluation(self, step: int, accuracy: dict[str, dict[str, float]]) -> None:
        """One row of oracle accuracies by split."""
        if self.main:
            self.files[EVALUATIONS].write(json.dumps({"step": step, **accuracy}) + "\n")
            for split, rates in accuracy.items():
                for name, value in rates.items():
                    self.board.add_scalar(f"{split}/{name}", value, step)

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
            for file in self.files.values():
                file.close()
