"""`metrics.jsonl` after a kill: torn and superseded rows go, the rest stays."""

import json
import sys

import pytest
import torch

from train.monitor import EVALUATIONS, METRICS, Monitor, open_wandb, read_rows
from train.settings import Settings, UserError


def monitor(output, step, **changes):
    settings = Settings(output=output, steps=9, batch_size=4, cost={"dollars_per_gpu_hour": 2.0})
    options = {"main": True, "processes": 2, "device_name": "NVIDIA H200", "flops_per_image": 1e9} | changes
    device = options.pop("device", torch.device("cpu"))
    return Monitor(settings, device, step=step, **options)


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


def test_throughput_utilisation_and_waiting(tmp_path):
    new = monitor(tmp_path, step=0)
    new.clock -= 2.0  # as if two seconds had passed
    for step in range(1, 6):
        new.waited(0.1)
        new.advance(step, 1.0, 4, [2.0, 0.0, 3.0, 4.0, 0.0, 1.0])
    new.log(5, {"loss": 1.0})
    new.close()
    (row,) = read_rows(tmp_path / METRICS)
    assert row["images"] == 20 and 9.0 < row["images_per_second"] <= 10.0
    assert abs(row["mfu"] - row["images_per_second"] * 1e9 / (2 * 989e12)) < 1e-12
    assert 0.2 < row["data_wait"] <= 0.25 and row["peak_memory"] > 1e6
    assert row["mse_by_timestep"] == [0.5, None, 3.0]
    assert row["gpu_days"] is row["dollars"] is row["kg_co2"] is None  # on a CPU


def test_cost_is_reckoned_from_hours_price_and_power(tmp_path):
    new = monitor(tmp_path, step=0)
    new.device, new.seconds = torch.device("cuda"), 12 * 3600.0
    cost = new.cost()
    new.close()
    assert cost["gpu_days"] == 1.0 and cost["dollars"] == 48.0  # two GPUs, half a day
    assert abs(cost["kg_co2"] - 24 * 0.7 * 1.58 * 0.436) < 1e-9


def test_wandb_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = Settings(output=tmp_path, steps=9, batch_size=4, wandb="mine")
    with pytest.raises(UserError, match="pip install wandb"):
        open_wandb(settings)


def test_wandb_hears_what_the_files_hold(tmp_path, monkeypatch):
    sent, started = [], {}

    class Board:
        def init(self, **options):
            started.update(options)
            return self

        def log(self, scalars, step):
            sent.append((step, scalars))

        def finish(self):
            sent.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Board())
    settings = Settings(output=tmp_path, steps=9, batch_size=4, wandb="mine")
    new = Monitor(
        settings, torch.device("cpu"), main=True, step=0, processes=1, device_name="a CPU", flops_per_image=1.0
    )
    new.advance(1, 0.5, 4, [1.0, 4.0])
    new.log(1, {"loss": 0.5})
    new.close()
    assert started["project"] == "mine" and started["resume"] == "allow" and started["config"]["batch_size"] == 4
    (step, scalars), end = sent
    assert (
        step == 1 and scalars["train/loss"] == 0.5 and scalars["train/mse_by_timestep/0"] == 0.25 and end == "finished"
    )


def test_other_processes_write_nothing(tmp_path):
    silent = monitor(tmp_path, step=0, main=False)
    silent.log(1, {"loss": 1.0})
    silent.evaluation(1, {})
    silent.say("unheard")
    silent.close()
    assert not (tmp_path / METRICS).exists() and not (tmp_path / EVALUATIONS).exists()
