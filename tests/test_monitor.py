"""`metrics.jsonl` after a kill: torn and superseded rows go, the rest stays."""

import json

import torch

from train.monitor import EVALUATIONS, METRICS, Monitor, read_rows


def monitor(output, step, **changes):
    options = {"main": True, "steps": 9, "batch_size": 4, "flops_per_image": 1e9, "peak_flops": 1e12} | changes
    return Monitor(output, torch.device("cpu"), step=step, **options)


def test_rows_after_the_checkpoint_and_torn_lines_are_cut(tmp_path):
    lines = [json.dumps({"step": step, "seconds": 10.0 * step}) for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [1, 2, 3]
    resumed = monitor(tmp_path, step=2)
    resumed.log(3, {"loss": 1.0})
    resumed.close()
    rows = read_rows(tmp_path / METRICS)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["loss"] == 1.0
    assert 20.0 < rows[-1]["seconds"] < 30.0


def test_throughput_and_utilisation(tmp_path):
    new = monitor(tmp_path, step=0)
    new.clock -= 2.0  # as if two seconds had passed
    new.log(5, {"loss": 1.0})
    new.close()
    (row,) = read_rows(tmp_path / METRICS)
    assert 9.0 < row["images_per_second"] <= 10.0
    assert abs(row["mfu"] - row["images_per_second"] * 1e9 / 1e12) < 1e-9
    assert row["peak_memory"] > 1e6


def test_other_processes_write_nothing(tmp_path):
    silent = monitor(tmp_path, step=0, main=False)
    silent.log(1, {"loss": 1.0})
    silent.evaluation(1, {})
    silent.say("unheard")
    silent.close()
    assert not (tmp_path / METRICS).exists() and not (tmp_path / EVALUATIONS).exists()
