"""More than one machine: two launchers share a run, and the presets fit the devices that they are for."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from bench.memory import Setting, predict
from pixart_fast.cost import DATA_SHEETS
from tests.runs import ROOT, TINY, finished, free_port, run
from train.settings import CONFIGS, load_settings

OPTIONS = ("model.layers=1", "steps=2", "zero_stage=1", "sampling.final_captions=2")


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_two_launchers_share_a_run(tmp_path):
    """As README has it for hosts without ssh; two names of this machine stand for two of them."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts), "--no_ssh"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    settings = [*TINY, *OPTIONS, f"output={tmp_path / 'nodes'}"]
    launchers = []
    for node in range(2):
        with (tmp_path / f"{node}.log").open("w") as log:
            arguments = [*command, f"--node_rank={node}", "train/run.py", *settings]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            launchers.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [launcher.wait(timeout=240) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    assert codes == [0, 0], (tmp_path / "0.log").read_text()[-3000:]
    report = json.loads((tmp_path / "nodes" / "report.json").read_text())
    assert (report["processes"], report["zero_stage"]) == (2, 1)

    finished(*OPTIONS, f"output={tmp_path / 'one'}", processes=2)
    assert losses(tmp_path / "nodes") == losses(tmp_path / "one")


def _own_disk(folder):
    """What hosts without shared storage have: the same path, and other files."""
    os.chdir(folder / os.environ["RANK"])


def test_hosts_need_shared_storage(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    code, output = run("steps=2", "output=run", processes=2, before=partial(_own_disk, tmp_path))
    assert code == 2 and "run is another folder on" in output and "Traceback" not in output, output[-2000:]
    assert [path.name for path in (tmp_path / "0" / "run").iterdir()] == ["config.yaml"]


# Device and its architecture, by the name that a preset's file ends with. Triton has no attention on a V100.
DEVICES = {
    "V100-16GB": ("v100-16gb", "sm_70", "reference"),
    "A100-40GB": ("a100-40gb", "sm_80", "ours"),
    "H100": ("h100", "sm_90", "ours"),
}
PARAMETERS = 833_213_984  # of the larger of the two models, with a modulation MLP in every block
STAGES = ["pixel_256", "align_256", "aesthetic_512", "aesthetic_1024"]  # aesthetic_256 is align_256 with other data


def test_there_is_no_other_stage_or_preset():
    stages = {path.stem for path in CONFIGS.glob("*_*.yaml")}
    assert stages == {*STAGES, "aesthetic_256"}
    one, other = (load_settings(CONFIGS / f"{name}_256.yaml", []) for name in ("align", "aesthetic"))
    assert (one.model, one.batch_size) == (other.model, other.batch_size)
    assert {path.stem.partition("x")[2] for path in (CONFIGS / "hardware").glob("*.yaml")} == DEVICES.keys()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml")))
def test_preset_fits_its_device(stage, preset):
    processes, _, device = preset.partition("x")
    sheet, architecture, kernels = DEVICES[device]
    settings = load_settings([CONFIGS / f"{stage}.yaml", CONFIGS / "hardware" / f"{preset}.yaml"], [])
    pixels = int(stage.split("_")[1])
    settings = settings.resolved(int(processes), (pixels // 16) ** 2)
    assert settings.precision == ("fp16" if device.startswith("V100") else "bf16")
    size = settings.model.resolved_size()
    setting = Setting(
        batch=settings.rows_per_process(int(processes)),
        pixels=pixels,
        layers=size.layers,
        width=size.width,
        heads=size.heads,
        # A DiT has no cross-attention, and so less than a PixArt with its modulation.
        modulation="adaln" if settings.model.kind == "dit" else settings.model.modulation,
        precision="bf16",  # or fp16: as many bytes
        kernels=kernels,
        recompute={False: "nothing", True: "blocks", "pointwise": "pointwise"}[settings.activation_checkpointing],
        zero_stage=settings.zero_stage,
        processes=int(processes),
    )
    need = predict(setting, architecture)["total"]
    if settings.zero_stage == 1 and settings.accumulation > 1:
        need += 2 * PARAMETERS  # whole gradients, until the last micro-batch; the prediction knows of one
    assert need < 0.9 * DATA_SHEETS[sheet].memory, f"{setting.batch} rows need {need / 1e9:.1f} GB"
