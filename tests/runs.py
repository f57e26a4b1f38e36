"""Starts `train/run.py`'s main for tests: real processes, but small models, one thread, and imports paid once."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch

from train.run import main

ROOT = Path(__file__).resolve().parents[1]

TINY = (
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "batch_size=8",
    "optimizer.kind=adamw",
    "log_every=1",
    "sampling.every=0",
    "sampling.final_captions=4",
    "sampling.steps=2",
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _entry(arguments: list[str], environment: dict[str, str], log: Path, before: Callable[[], None] | None) -> None:
    """What a forked process does: what `python train/run.py` would, with the imports behind it."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(main(arguments))


class Processes:
    """A run of one or more real processes, forked from a server that has the imports behind it.

    Args:
        before: called in each process first, to break something on purpose.
    """

    def __init__(self, *overrides: str, processes: int = 1, before: Callable[[], None] | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.runs"])
        self.folder = tempfile.TemporaryDirectory()
        port = free_port()
        self.ranks = []
        for rank in range(processes):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            log = Path(self.folder.name, f"{rank}.log")
            self.ranks.append(context.Process(target=_entry, args=([*TINY, *overrides], environment, log, before)))
            self.ranks[-1].start()

    def send(self, number: int, rank: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def kill(self) -> None:
        """SIGKILL to every process, and wait."""
        for process in self.ranks:
            process.kill()
            process.join()

    def running(self) -> bool:
        return all(process.is_alive() for process in self.ranks)

    def output(self, rank: int = 0) -> str:
        log = Path(self.folder.name, f"{rank}.log")
        return log.read_text() if log.exists() else ""

    def wait(self, timeout: float = 240) -> tuple[int, str]:
        """The first non-zero exit code or 0, and rank 0's output."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0))
        if any(process.is_alive() for process in self.ranks):
            self.kill()
            raise TimeoutError(self.output()[-3000:])
        return next((process.exitcode for process in self.ranks if process.exitcode), 0), self.output()


def run(*overrides: str, **options) -> tuple[int, str]:
    return Processes(*overrides, **options).wait()


def finished(*overrides: str, **options) -> str:
    """Output of a run that must succeed."""
    code, output = run(*overrides, **options)
    assert code == 0, output[-3000:]
    return output


def allow_fp16() -> None:
    """CPUs without fp16 instructions compute it all the same, slowly; DeepSpeed refuses them out of care."""
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True


def wait_for(condition, processes: Processes, timeout: float = 120) -> None:
    """Poll until `condition()`; the run must not end before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert processes.running(), processes.output()[-3000:]
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.002)


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, moments, averages."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value, key: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[key] = value
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(item, f"{key}/{name}")
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, f"{key}/{i}")

    for file in sorted((checkpoint / "state").glob("*.pt")):
        # The test's own file: DeepSpeed pickles its settings beside the tensors.
        walk(torch.load(file, map_location="cpu", weights_only=False), file.name)
    return tensors


def assert_same_state(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits, averages included."""
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys()
    assert any(key.endswith("/ema") for key in left), sorted(left)[:20]
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different, different[:10]
