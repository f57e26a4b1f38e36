"""A run that was killed goes on bit for bit; a kill at any moment leaves a checkpoint that loads."""

import collections
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import Processes, allow_fp16, assert_same_state, finished, run, wait_for
from train.checkpoints import Checkpoints

HALF, WHOLE = 4, 16


def rows(output):
    """Logged numbers that must not depend on when a run was interrupted."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "mse", "vb", "grad_norm", "lr")} for row in lines]


def steps_logged(output):
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_half_way(output, *options, **arrangement):
    """Start a run, kill it some steps after its first checkpoint; returns the step it will go on from."""
    interrupted = Processes(*options, f"output={output}", **arrangement)
    wait_for(lambda: steps_logged(output) > HALF, interrupted)
    interrupted.kill()
    newest = max((output / "checkpoints").glob("step_*")).name
    assert newest < f"step_{WHOLE:08d}", "killed too late"
    return int(newest.removeprefix("step_"))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_killed_run_continues_bit_for_bit(tmp_path, zero_stage, processes):
    options = [f"steps={WHOLE}", f"checkpoint_every={HALF}", f"zero_stage={zero_stage}", "model.dropout=0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = Processes(*options, f"output={whole}", processes=processes)
    step = kill_half_way(parts, *options, processes=processes)
    code, output = uninterrupted.wait()
    assert code == 0, output[-3000:]

    resumed = finished(*options, f"output={parts}", processes=processes)
    assert f"going on from step {step}" in resumed
    assert rows(whole) == rows(parts)
    assert_same_state(*(folder / "checkpoints" / f"step_{WHOLE:08d}" for folder in (whole, parts)))
    ema = [load_file(folder / "final" / "diffusion_pytorch_model.safetensors") for folder in (whole, parts)]
    assert all(ema[0][name].equal(ema[1][name]) for name in ema[0])


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 0), ("bf16", 3), ("fp16", 0), ("fp16", 2)])
def test_half_precision_continues_bit_for_bit(tmp_path, precision, zero_stage):
    """The loss scaler too: fp16 starts at 65536, and is still finding its scale when the run is killed."""
    before = allow_fp16 if precision == "fp16" else None
    options = [f"steps={WHOLE}", f"checkpoint_every={HALF}", f"precision={precision}", f"zero_stage={zero_stage}"]
    finished(*options, f"output={tmp_path / 'whole'}", before=before)
    kill_half_way(tmp_path / "parts", *options, before=before)
    finished(*options, f"output={tmp_path / 'parts'}", before=before)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert_same_state(*(tmp_path / name / "checkpoints" / f"step_{WHOLE:08d}" for name in ("whole", "parts")))


def test_muon_continues_bit_for_bit(tmp_path):
    options = [f"steps={WHOLE}", f"checkpoint_every={HALF}", "optimizer.kind=muon"]
    finished(*options, f"output={tmp_path / 'whole'}")
    kill_half_way(tmp_path / "parts", *options)
    finished(*options, f"output={tmp_path / 'parts'}")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert_same_state(*(tmp_path / name / "checkpoints" / f"step_{WHOLE:08d}" for name in ("whole", "parts")))


def test_kill_while_a_checkpoint_is_written(tmp_path):
    options = ["steps=6", "checkpoint_every=2", "model.width=512", "model.heads=8", f"output={tmp_path}"]
    checkpoints = tmp_path / "checkpoints"
    process = Processes(*options)
    wait_for(
        lambda: (checkpoints / "step_00000002").exists() and any(checkpoints.glob(".partial_00000004/state/*")), process
    )
    process.kill()
    assert not (checkpoints / "step_00000004").exists(), "killed too late to test anything"
    assert "going on from step 2" in finished(*options)
    assert not list(checkpoints.glob(".partial*"))


def test_damaged_checkpoint_is_passed_over(tmp_path):
    options = ["steps=6", "checkpoint_every=2", f"output={tmp_path}"]
    finished(*options)
    newest = tmp_path / "checkpoints" / "step_00000006"
    weights = next((newest / "state").glob("*model_states.pt"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    output = finished(*options)
    assert "step_00000006 is damaged" in output and "going on from step 4" in output
    # Written again, sound; the damaged one is kept for whoever wants to know.
    assert Checkpoints.fault(newest) is None and (newest.parent / "damaged_step_00000006").is_dir()


def _cut_short():
    save = torch.save

    def cut(value, path, *rest, **options):
        save(value, path, *rest, **options)
        os.truncate(path, os.path.getsize(path) - 30)

    torch.save = cut


def test_a_file_cut_short_is_no_checkpoint(tmp_path):
    """What a full disk leaves: torch.save may lose its end without an error."""
    finished("steps=2", f"output={tmp_path}")
    code, output = run("steps=4", f"output={tmp_path}", before=_cut_short)
    assert code == 2 and "is missing" in output and "Traceback" not in output, output[-2000:]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_keeps_the_last_checkpoints(tmp_path):
    finished("steps=5", "checkpoint_every=1", "keep_checkpoints=3", f"output={tmp_path}")
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000003",
        "step_00000004",
        "step_00000005",
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_cleanly(tmp_path, processes):
    options = ["steps=100000", f"output={tmp_path}"]
    run_ = Processes(*options, processes=processes)
    wait_for(lambda: steps_logged(tmp_path) > 2, run_)
    run_.send(signal.SIGTERM, rank=processes - 1)  # one process asked is enough
    code, output = run_.wait()
    assert code == 0, output[-3000:]
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"step {step} is saved" in output
    assert rows(tmp_path)[-1]["step"] == step


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_another_number_of_processes(tmp_path, zero_stage):
    """Accumulation may follow it; tests/test_universal.py compares the states."""
    options = ["steps=2", f"zero_stage={zero_stage}", "micro_tokens=64", f"output={tmp_path}"]
    finished(*options, processes=2)
    assert "going on from step 2" in finished(*options, "steps=4")


def test_a_finished_run_is_left_alone(tmp_path):
    finished("steps=2", f"output={tmp_path}")
    report = (tmp_path / "report.json").stat().st_mtime_ns
    assert "this run is finished" in finished("steps=2", f"output={tmp_path}")
    assert (tmp_path / "report.json").stat().st_mtime_ns == report


def _full_disk():
    usage = collections.namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(10**6, 10**6 - 10, 10)


def test_full_disk_is_refused_before_writing(tmp_path):
    code, output = run("steps=2", f"output={tmp_path / 'run'}", before=_full_disk)
    assert code == 2 and "GB free" in output and "Traceback" not in output
