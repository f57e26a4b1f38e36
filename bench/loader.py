"""What a training step of a GPU takes of stored features, and the process that loads them: PixArt-α's stages at 256 px.

train/data/throughput.py loads, in a process of its own, as training does.
"""

import subprocess
import sys
from pathlib import Path

from bench import plan
from pixart_fast.cost import DATA_SHEETS, forward_flops

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 92  # of a caption
MFU = 0.4


class Loader:
    """A process that takes batches when it is asked."""

    def __init__(self, rows: int, workers: int, count: int):
        command = [sys.executable, "-m", "train.data.throughput", "--ask"]
        command += ["--rows", str(rows), "--workers", str(workers), "--count", str(count)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self.bytes_of_one = float(self.process.stdout.readline())

    def take(self, batches: int) -> int:
        """How many samples so many batches had."""
        self.process.stdin.write(f"{batches}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def demand(device: str) -> dict[str, float | str]:
    """Samples a second that one GPU takes in PixArt-α's stage `align_256`, by `bench.plan` and at 40 % MFU."""
    stage, sheet, way = plan.STAGES["align_256"], DATA_SHEETS[device], plan.WAYS["ours"]
    basis = plan.basis_for(way, device, stage.pixels, plan.load(plan.RESULTS))
    predicted = plan.predict(stage, way, basis, sheet, stage.gpus)
    model = stage.model
    flops = 3 * forward_flops(
        layers=model.layers,
        width=model.width,
        tokens=stage.tokens,
        text_tokens=TOKENS,
        caption_channels=model.caption_channels,
        patch_features=model.patch_features,
        out_features=model.out_features,
    )
    return {
        "planned": predicted.per_gpu / predicted.seconds,
        "known": basis.known,
        "at_40_percent_mfu": MFU * sheet.matmul / flops,
    }
